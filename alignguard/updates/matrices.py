"""One guarded weight matrix: its names, its orientation, and how its ΔW is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

import fishergeo as fg
from fishergeo.capture import plain_name


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is GPT-2's Conv1D: a linear map whose weight is stored (q, p)."""
    return type(module).__name__ == "Conv1D" and getattr(module, "weight", torch.empty(0)).ndim == 2


def whole(parameter: Tensor) -> Tensor:
    """The tensor itself, gathered where it is sharded, in float32 or better; differentiable."""
    gathered = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return gathered if gathered.dtype in (torch.float32, torch.float64) else gathered.float()


def is_any(tensor: Tensor) -> bool:
    """Whether any entry of a tensor, which may be sharded, is not zero."""
    return bool(whole(tensor.detach()).any())


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, which may be sharded and on two devices, hold the same numbers, of whatever float types."""
    ours, theirs = whole(one.detach()), whole(other.detach())
    wide = torch.promote_types(ours.dtype, theirs.dtype)
    return torch.equal(ours.to(wide), theirs.to(ours.device, wide))


def owners(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Parameter -> the modules that hold it."""
    holders: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(module)
    return holders


def check_untied(name: str, weight: Tensor, holders: dict[int, list[nn.Module]]) -> None:
    """Refuse a weight that several modules share.

    Raises:
        ValueError: naming them.
    """
    others = holders.get(id(weight), [])
    if len(others) > 1:
        kinds = " and ".join(type(module).__name__ for module in others)
        raise ValueError(
            f"{name} is tied: one weight serves {len(others)} modules ({kinds}), so its Fisher is not one layer's; "
            f"untie it (tie_word_embeddings=False), or leave it unguarded with exclude={plain_name(name)!r}"
        )


def plain_weight(base: nn.Module) -> Tensor:
    """The (p, q) weight of a layer, out of its quantisation where it has one."""
    weight = cast(Tensor, base.weight)
    if not weight.is_floating_point():
        from peft.utils.integrations import dequantize_module_weight

        return dequantize_module_weight(base)
    return oriented(base, weight)


def oriented(module: nn.Module, weight: Tensor) -> Tensor:
    """The weight as (p, q), whichever way round the module stores it."""
    return weight.mT if is_conv1d(module) else weight


def turned(matrix: Tensor, flip: bool) -> Tensor:
    """The matrix, or its transpose if ``flip``."""
    return matrix.mT if flip else matrix


Update = fg.LowRank | Tensor

METHODS = ("lora", "full")


@dataclass(frozen=True)
class Matrix:
    """One guarded weight matrix.

    Attributes:
        name: the key of penalties and curvatures: the adapted module's name, an expert's with its number.
        layer: whose inputs and output gradients its Fisher is made of.
        kind: how ΔW is read, in words for people.
        shape: (p, q), outputs and inputs.
        rank: columns of the factors, None for a dense ΔW.
        read: ΔW at the present weights, attached to what trains: ``LowRank`` or a (p, q) tensor, float32 or better.
        weight: W0 as (p, q), for scales.
    """

    name: str
    layer: str
    kind: str
    shape: tuple[int, int]
    rank: int | None
    read: Callable[[], Update]
    weight: Callable[[], Tensor]

    @property
    def plain(self) -> str:
        """The matrix's name in the model without adapters."""
        return plain_name(self.name)

    @property
    def excludable(self) -> str:
        """What ``exclude`` knows it by: experts are left out together."""
        return self.plain.rpartition(".")[0] if self.kind.endswith("of an expert") else self.plain
