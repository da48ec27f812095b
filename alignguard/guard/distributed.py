"""What several processes do as one: each reads its share, and all decide by the same numbers.

Where torch.distributed is not initialised there is one process and nothing is sent. Every process must call alike and
in the same order, so nothing here may stand where only the first one comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fishergeo as fg


def world() -> tuple[int, int]:
    """This process's rank and the number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def agreed(value: float) -> float:
    """The first process's value: numbers that differ in their last bits would part decisions, and then nobody comes."""
    if world()[1] == 1:
        return value
    told = torch.tensor([value], dtype=torch.float64, device=_device())
    dist.broadcast(told, 0)
    return float(told)


def same_everywhere(tensor: Tensor) -> Tensor:
    """The first process's values, in the tensor's own memory, as :func:`agreed`."""
    if world()[1] > 1:
        dist.broadcast(tensor, 0)
    return tensor


def pooled_mean(items: Sequence[Any], model: nn.Module, mean: Callable[[Sequence[Any]], float]) -> float:
    """The mean over all processes' items, each read by one process; the same number on all.

    Args:
        items: the same number on every process.
        model: what ``mean`` runs.
        mean: of some items.
    """
    if world()[1] == 1:
        return mean(items)
    mine = _share(items, model)
    told = torch.tensor([mean(mine) * len(mine) if mine else 0.0, float(len(mine))], dtype=torch.float64)
    told = told.to(_device())
    dist.all_reduce(told)
    return float(told[0] / told[1])


def pooled_fisher(rows: Sequence[Any], model: nn.Module, estimate: Callable[[Sequence[Any]], fg.Fisher]) -> fg.Fisher:
    """The Fisher of all rows, each read by one process, by one all-reduce of the sums (one a dtype).

    Args:
        rows: the same number on every process.
        model: what ``estimate`` runs.
        estimate: of some rows.

    Raises:
        ValueError: the processes do not estimate the same thing (:func:`fishergeo.all_reduce`).
    """
    if world()[1] == 1 or _all_read_all(rows, model):
        return estimate(rows)
    mine = _share(rows, model)
    return fg.all_reduce(estimate(mine) if mine else None)


def _share(items: Sequence[Any], model: nn.Module) -> Sequence[Any]:
    rank, size = world()
    return items if _all_read_all(items, model) else items[rank::size]


def _all_read_all(items: Sequence[Any], model: nn.Module) -> bool:
    """Whether items cannot be shared out: sharded parameters (FSDP2) are gathered from all processes in every pass, so
    that all must run as many, and these do not divide evenly.
    """
    return len(items) % world()[1] != 0 and any(hasattr(p, "full_tensor") for p in model.parameters())


def _device() -> torch.device:
    """Where the process group's tensors live."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
