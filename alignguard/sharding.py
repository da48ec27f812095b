"""Ways of spreading parameters that the guard cannot read, refused with the reason."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

ADVICE = "take data parallel (DDP, ZeRO-2), or shard with FSDP2 (fsdp_version: 2)"


def check_parameters(model: nn.Module) -> None:
    """Refuse a model whose parameters are placeholders outside its forward pass.

    Raises:
        ValueError: FSDP1, whose flat parameters hold no matrices, or ZeRO-3, whose gather has no gradient.
    """
    for name, module in model.named_modules():
        if _is_fsdp1(module):
            raise ValueError(
                f"{name or 'the model'} is wrapped by FSDP1: outside its forward pass its weights are pieces of a flat "
                f"tensor, from which no ΔW can be read with a gradient; {ADVICE}"
            )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise ValueError(
                f"{name} is partitioned by DeepSpeed ZeRO-3: outside the forward pass it is empty, and gathering it has "
                f"no gradient, so the penalty cannot be charged; {ADVICE}"
            )


def _is_fsdp1(module: nn.Module) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel

    return isinstance(module, FullyShardedDataParallel)


def check_plugins(state: Any) -> None:
    """Refuse an accelerate configuration that would spread the parameters so, before the model is wrapped.

    Args:
        state: ``accelerator.state``.

    Raises:
        ValueError: as :func:`check_parameters`.
    """
    sharded = getattr(state, "fsdp_plugin", None)
    if sharded is not None and sharded.fsdp_version == 1:
        raise ValueError(
            "the guard does not run under FSDP1 (fsdp_version: 1): outside the forward pass weights are pieces of a flat "
            f"tensor, from which no ΔW can be read with a gradient; {ADVICE}"
        )
    zero = getattr(state, "deepspeed_plugin", None)
    if zero is not None and int(zero.zero_stage) == 3:
        raise ValueError(
            "the guard does not run under DeepSpeed ZeRO-3: outside the forward pass parameters are empty, and gathering "
            f"them has no gradient, so the penalty cannot be charged; {ADVICE}"
        )
