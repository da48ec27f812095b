"""ΔW of every adapted matrix, in factors, read from a peft model; what cannot be read right is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn

import fishergeo as fg


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def active_adapter(model: PeftModel) -> str:
    """The one adapter that trains.

    Raises:
        ValueError: none or several are active.
    """
    active = list(model.active_adapters)
    if len(active) != 1:
        raise ValueError(f"the guard needs exactly one active adapter, found {active}; call model.set_adapter(name)")
    return active[0]


def check_adapters(model: nn.Module) -> None:
    """Refuse models whose ΔW is not scaling·B·A.

    Raises:
        TypeError: not a peft model.
        ValueError: merged adapters, adapters that are not plain LoRA, or an initialisation that moved the base.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(
            f"expected a PeftModel with a LoRA adapter, found {type(model).__name__}; see peft.get_peft_model"
        )
    adapter = active_adapter(model)
    init = getattr(model.peft_config[adapter], "init_lora_weights", True)
    if isinstance(init, str) and init not in {"gaussian", "orthogonal", "eva"}:
        raise ValueError(f"init_lora_weights={init!r} moves the base weights at the start, so ΔW is not scaling·B·A")
    found = False
    for name, layer in _lora_layers(model):
        if layer.merged:
            raise ValueError(f"the adapter of {name} is merged into its base; call model.unmerge_adapter() first")
        if adapter not in layer.lora_A:
            continue
        variant = getattr(layer, "lora_variant", {}).get(adapter)
        if variant is not None:
            raise ValueError(
                f"{name} uses {type(variant).__name__}: its ΔW is not scaling·B·A, so it cannot be guarded"
            )
        base = layer.get_base_layer()
        if not isinstance(base, nn.Linear):
            raise ValueError(f"{name} adapts a {type(base).__name__}; the guard covers nn.Linear")
        found = True
    if not found:
        raise ValueError(f"adapter {adapter!r} has no LoRA matrices; check target_modules")


def lora_updates(model: PeftModel) -> dict[str, fg.LowRank]:
    """ΔW = scaling·B·A of every adapted Linear, never formed.

    The scaling is read from the layer at each call, so rsLoRA, rank and alpha patterns and later changes are right.

    Returns:
        name of the adapted module in ``model`` -> ``LowRank`` with left (p, r) and right (r, q), float32 or better,
        still attached to the adapter's parameters.
    """
    adapter = active_adapter(model)
    updates = {}
    for name, layer in _lora_layers(model):
        if adapter in layer.lora_A:
            b, a = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
            if b.element_size() < 4:
                b, a = b.float(), a.float()
            updates[name] = fg.LowRank(b * layer.scaling[adapter], a)
    return updates


def base_name(name: str) -> str:
    """Name of the plain Linear inside an adapted module: its inputs and output gradients are the effective weight's."""
    return f"{name}.base_layer"
