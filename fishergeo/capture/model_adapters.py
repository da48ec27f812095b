"""All that is known here of how Hugging Face models and peft's adapters are built, read from their attributes alone.

Neither library is imported: a model that says nothing of the kind is a plain module, and every answer is then the
plain one.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

_LORA = "lora_"
_PARAMETER_WRAPPER = "ParamWrapper"
_UNSHIFTED = ("MaskedLM", "TokenClassification")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside an adapter or data-parallel wrapper, whose forward names its arguments."""
    inner = model
    while True:
        if callable(getattr(inner, "get_base_model", None)):
            deeper = cast(Any, inner).get_base_model()
        elif isinstance(getattr(inner, "module", None), nn.Module):
            deeper = cast(nn.Module, inner.module)
        else:
            return inner
        if deeper is inner:
            return inner
        inner = deeper


def forward_arguments(model: nn.Module) -> frozenset[str]:
    """Names of the arguments that the model's forward takes."""
    return frozenset(inspect.signature(model.forward).parameters)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model says of itself that it reads one sequence and predicts another."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def shifts_labels(model: nn.Module) -> bool:
    """Whether position t's logits predict token t + 1: decoder-only language models."""
    name = str(getattr(model, "loss_type", None) or type(model).__name__)
    return not (is_encoder_decoder(model) or any(part in name for part in _UNSHIFTED))


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
