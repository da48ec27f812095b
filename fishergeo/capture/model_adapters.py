"""All that is known here of how Hugging Face models and peft's adapters are built, read from their attributes alone.

Neither library is imported: a model that says nothing of the kind is a plain module, and every answer is then the
plain one.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

_LORA = "lora_"
_BASE = ".base_layer"
_WRAPPING = re.compile(r"^base_model\.model\.|\.base_layer(?=\.|\+|$)|\.modules_to_save\.[^.]+(?=\.|$)")
_PARAMETER_WRAPPER = "ParamWrapper"
_LAST_FIRST = ("mbart", "plbart")  # whose own shift of labels wraps the last one around
_SHIFTED = ("CausalLM", "LMHead", "ForConditionalGeneration", "DoubleHeads")
_UNSHIFTED = ("MaskedLM", "TokenClassification")
_CLASSIFIERS = ("SequenceClassification", "ImageClassification", "VideoClassification", "AudioClassification")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside adapters, compilation and wrappers that hand everything on, whose forward names its arguments."""
    inner = model
    while True:
        if callable(getattr(inner, "get_base_model", None)):
            deeper = cast(Any, inner).get_base_model()
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            deeper = cast(nn.Module, inner._orig_mod)
        elif isinstance(getattr(inner, "module", None), nn.Module):
            deeper = cast(nn.Module, inner.module)
        elif _hands_on(inner):
            deeper = next(iter(inner.children()))
        else:
            return inner
        if deeper is inner:
            return inner
        inner = deeper


def _hands_on(model: nn.Module) -> bool:
    """Whether a module names none of its arguments and holds one other: a wrapper of a user's own."""
    kinds = {parameter.kind for parameter in inspect.signature(model.forward).parameters.values()}
    variadic = kinds <= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return variadic and inspect.Parameter.VAR_KEYWORD in kinds and len(list(model.children())) == 1


def forward_arguments(model: nn.Module) -> frozenset[str]:
    """Names of the arguments that the model's forward takes."""
    return frozenset(inspect.signature(model.forward).parameters)


def decoder_inputs(model: nn.Module, labels: Tensor) -> Tensor | None:
    """What a generating encoder-decoder's decoder reads while it is asked for ``labels``: they themselves, one place later.

    As the model's own function has it, but for those that put the last label first: of a response cut short that is no
    end and no language, and their start token is taken.

    Args:
        model: an encoder-decoder, wrapped by peft or not.
        labels: token ids, (n, T), −100 where nothing is asked.

    Returns:
        (n, T); None where the model does not say, as a classifier.
    """
    inner: Any = unwrapped(model)
    prepare = getattr(inner, "prepare_decoder_input_ids_from_labels", None)
    if prepare is None:
        return None
    start, pad = (getattr(inner.config, name, None) for name in ("decoder_start_token_id", "pad_token_id"))
    if inner.config.model_type not in _LAST_FIRST or start is None or pad is None:
        return prepare(labels=labels)
    shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], 1)
    return shifted.masked_fill(shifted < 0, pad)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model says of itself that it reads one sequence and predicts another."""
    return bool(getattr(getattr(unwrapped(model), "config", None), "is_encoder_decoder", False))


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are spread over processes, which must then run the model together."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def problem_type(model: nn.Module, logits: Tensor, labels: Tensor) -> str | None:
    """What a model says its labels are, as transformers names it; for its own classifiers, what it would infer.

    Args:
        model: unwrapped.
        logits: its outputs; one vector an example, or this is not asked.
        labels: integer or floating.

    Returns:
        ``"regression"``, ``"single_label_classification"``, ``"multi_label_classification"``, or None for a model that
        does not say.
    """
    config = getattr(model, "config", None)
    if config is None or logits.ndim > 2:
        return None
    said = getattr(config, "problem_type", None)
    if said is not None:
        return str(said)
    name = str(getattr(model, "loss_type", None) or type(model).__name__)
    if not any(part in name for part in _CLASSIFIERS):
        return None
    if getattr(config, "num_labels", None) == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def shifts_labels(model: nn.Module) -> bool:
    """Whether position t's logits predict token t + 1: decoder-only language models."""
    name = str(getattr(model, "loss_type", None) or type(model).__name__)
    return not (is_encoder_decoder(model) or any(part in name for part in _UNSHIFTED))


def tells_its_labels(model: nn.Module) -> bool:
    """Whether a model's class is known to have labels that are shifted, or not."""
    if getattr(model, "loss_type", None) is not None or is_encoder_decoder(model):
        return True
    return any(part in type(model).__name__ for part in (*_UNSHIFTED, *_SHIFTED))


def output_embedding(model: nn.Module) -> nn.Module | None:
    """The layer that turns hidden states into logits over the vocabulary, where the model names one."""
    ask = getattr(model, "get_output_embeddings", None)
    if not callable(ask):
        return None
    try:
        head = ask()
    except (AttributeError, NotImplementedError):  # transformers' answer for models without a head
        return None
    return head if isinstance(head, nn.Module) else None


def is_adapter_part(name: str) -> bool:
    """Whether a module's path leads into one of LoRA's own matrices."""
    return any(part.startswith(_LORA) for part in name.split("."))


def is_mere_storage(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a module is half of a LoRA on a bare parameter (peft's target_parameters): an nn.Linear never called."""
    owner = name.split(f".{_LORA}")[0]
    return owner != name and type(modules.get(owner)).__name__ == _PARAMETER_WRAPPER


def plain_name(name: str) -> str:
    """A layer's or parameter's name without what peft puts around it."""
    return _WRAPPING.sub("", name)


def adapter_factors(model: nn.Module, name: str) -> list[tuple[Tensor, Tensor]]:
    """What the active LoRA adapters add to the weight of a layer: their ΔW = left @ right, as factors.

    Args:
        model: any module.
        name: name of the layer; only one that ends in ``base_layer`` is adapted.

    Returns:
        (left (p, r), right (r, q)) of each active adapter, the scaling in the left one, attached to its parameters; none
        where nothing is added.

    Raises:
        ValueError: if an adapter is merged, or its ΔW is something else than scaling·B·A.
    """
    owner, found, tail = name.rpartition(_BASE)
    if not found or tail == ".bias":
        return []
    wrapper = cast(Any, model.get_submodule(owner))
    if wrapper.merged:
        raise ValueError(f"the adapter of layer {name!r} is merged into its base; call model.unmerge_adapter() first")
    if wrapper.disable_adapters:
        return []
    pairs = []
    for adapter in wrapper.active_adapters:
        if adapter not in getattr(wrapper, "lora_A", {}):
            if adapter in getattr(wrapper, "lora_embedding_A", {}) or not hasattr(wrapper, "lora_A"):
                raise ValueError(f"layer {name!r} is adapted by a {type(wrapper).__name__}, which is not plain LoRA")
            continue
        if tail or getattr(wrapper, "lora_variant", {}).get(adapter) is not None:
            raise ValueError(
                f"layer {name!r} is adapted, and its update is not scaling·B·A of a weight (DoRA, or weight and bias "
                "together); merge the adapter first"
            )
        a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
        pairs.append((b.flatten(1) * wrapper.scaling[adapter], a.flatten(1)))
    return pairs
