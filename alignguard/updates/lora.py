"""LoRA layers of a peft model: their factors, their names, and the refusal of those whose ΔW is something else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

import fishergeo as fg
from alignguard.updates.matrices import check_untied, is_any, is_conv1d, is_same, whole
from fishergeo.capture import plain_name


def base_name(name: str) -> str:
    """Name of the plain layer inside an adapted module: its inputs and output gradients are the effective weight's."""
    return f"{name}.base_layer"


def active_adapters(model: PeftModel) -> list[str]:
    """The adapters whose sum is ΔW.

    Raises:
        ValueError: none is active.
    """
    active = list(model.active_adapters)
    if not active:
        raise ValueError("no adapter is active; call model.set_adapter(name)")
    return active


def lora_factors(layer: Any, adapter: str) -> fg.LowRank:
    """ΔW = scaling·B·A of one adapter of one layer, oriented (p, q); batched (experts, p, q) for expert parameters.

    The scaling is read at each call, so rsLoRA, rank and alpha patterns and later changes are right.
    """
    a, b, scale = whole(layer.lora_A[adapter].weight), whole(layer.lora_B[adapter].weight), layer.scaling[adapter]
    if isinstance(layer, ParamWrapper) and layer.num_experts > 1:
        # peft interleaves: A has its experts outermost, B its experts innermost.
        right = a.reshape(layer.num_experts, -1, a.shape[1])
        left = b.reshape(b.shape[0], -1, layer.num_experts).permute(2, 0, 1)
        # B·A is (experts, out, in) where peft exchanged the sides of the stored tensor, else the stored one transposed.
        return fg.LowRank(left * scale, right)
    return fg.LowRank(b * scale, a)


def lora_updates(model: PeftModel) -> dict[str, fg.LowRank]:
    """ΔW = scaling·B·A of every adapted layer, summed over the active adapters, never formed.

    Returns:
        name of the adapted module in ``model`` -> ``LowRank`` with left (p, r) and right (r, q), float32 or better,
        still attached to the adapters' parameters; expert parameters carry a batch dimension.
    """
    active = active_adapters(model)
    updates = {}
    for name, layer in lora_layers(model):
        parts = [lora_factors(layer, adapter) for adapter in active if adapter in layer.lora_A]
        if parts:
            updates[layer_key(name, layer)] = sum(parts[1:], parts[0])
    return updates


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every LoRA layer by name, wrappers inside wrappers included."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def starts_at_base(model: nn.Module) -> bool:
    """Whether a model with its active adapters on computes what it computes with them off, as right after their making.

    Told by everything that the adapters hold, not by what the model says of some examples.

    Args:
        model: a peft model; of any other, and of adapters that are no LoRA, the answer is no.
    """
    if not isinstance(model, PeftModel):
        return False
    active = list(model.active_adapters)
    if any(str(getattr((kind := model.peft_config[a].peft_type), "value", kind)) != "LORA" for a in active):
        return False
    return not any(_changes(module, adapter) for module in model.modules() for adapter in active)


def _changes(module: nn.Module, adapter: str) -> bool:
    """Whether an adapter changes what a module computes."""
    if isinstance(module, LoraLayer):
        for firsts, seconds in ((module.lora_A, module.lora_B), (module.lora_embedding_A, module.lora_embedding_B)):
            if adapter in firsts:
                held: tuple[Any, Any] = firsts[adapter], seconds[adapter]
                product = all(is_any(one if isinstance(one, Tensor) else one.weight) for one in held)
                bias = getattr(held[1], "bias", None)
                return product or (bias is not None and is_any(bias))
    if isinstance(module, TrainableTokensLayer) and adapter in module.trainable_tokens_delta:
        return not is_same(module.trainable_tokens_delta[adapter], module.trainable_tokens_original[adapter])
    if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
        before = module.original_module.state_dict()
        after = module.modules_to_save[adapter].state_dict()
        return before.keys() != after.keys() or not all(is_same(after[name], before[name]) for name in after)
    return False


def layer_key(name: str, layer: Any) -> str:
    """Wrappers of several parameters of one module are nested; their key is the module's name and the parameter's."""
    if isinstance(layer, ParamWrapper):
        outermost = re.sub(r"(\.base_layer)+$", "", name)
        return f"{outermost}.{layer.parameter_name}"
    return name


def check_layer(name: str, layer: Any, adapters: list[str], holders: dict[int, list[nn.Module]]) -> None:
    """Refuse a layer whose ΔW is not scaling·B·A on a matrix with a known Fisher."""
    advice = f"leave it unguarded with exclude={plain_name(name)!r}, or choose other target modules"
    if layer.merged:
        raise ValueError(f"the adapter of {name} is merged into its base; call model.unmerge_adapter() first")
    if not type(layer).__module__.startswith("peft.tuners.lora."):
        raise ValueError(f"{name} is a {type(layer).__qualname__}: its ΔW is not scaling·B·A; use plain LoRA")
    for adapter in adapters:
        variant = layer.lora_variant.get(adapter)
        if variant is not None:
            raise ValueError(
                f"{name} uses {type(variant).__name__}: its ΔW is not scaling·B·A; make the adapter without it (for DoRA "
                "use_dora=False), or train without the guard (guarded=False, --plain)"
            )
    base = layer.get_base_layer()
    if isinstance(layer, ParamWrapper) and layer.num_experts > 1:
        if not layer._did_swap_in_out_features and layer.get_param().ndim != 3:
            raise ValueError(f"{name} adapts a parameter of {layer.get_param().ndim} dimensions; {advice}")
        return
    if not isinstance(base, nn.Linear) and not is_conv1d(base):
        raise ValueError(
            f"{name} adapts a {type(base).__name__}; the guard covers Linear, Conv1D and experts; {advice}"
        )
    check_untied(name, base.weight, holders)


def check_start(name: str, layer: Any, config: Any) -> None:
    """Refuse a start that peft makes wrongly on this kind of layer.

    Raises:
        ValueError: OLoRA on Conv1D, whose weight peft takes for its transpose.
    """
    if str(getattr(config, "init_lora_weights", "")).lower() == "olora" and is_conv1d(layer.get_base_layer()):
        raise ValueError(
            f"{name}: peft's OLoRA start takes a Conv1D's weight for its transpose, so the adapted layer is another one; "
            'take init_lora_weights="pissa", or plain LoRA'
        )
