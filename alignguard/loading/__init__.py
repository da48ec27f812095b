"""Models as people name them, and the adapters put on them."""

from alignguard.loading.adapters import (
    ROUTER,
    adapt,
    adapter_off,
    check_bare,
    check_weights,
    default_lora,
    load_adapter,
    lora_config,
    moves_base,
    put_on,
    settle,
    switched_off,
    taken_off_again,
    what_trains,
)
from alignguard.loading.models import check_device, kind_of, load_model, load_tokenizer, load_weights, positions_of

__all__ = [
    "ROUTER",
    "adapt",
    "adapter_off",
    "check_bare",
    "check_device",
    "check_weights",
    "default_lora",
    "kind_of",
    "load_adapter",
    "load_model",
    "load_tokenizer",
    "load_weights",
    "lora_config",
    "moves_base",
    "positions_of",
    "put_on",
    "settle",
    "switched_off",
    "taken_off_again",
    "what_trains",
]
