"""Convolutions of one to three dimensions, grouped and transposed ones among them, as linear maps of every patch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fishergeo.capture.kinds.kind import Call, Kind, first_input, linear_scale

_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class Convolution(Kind):
    """nn.Conv1d to nn.Conv3d: a linear map of every patch."""

    mates = "convolution"
    positions = False

    def accepts(self, module: nn.Module) -> bool:
        """Whether it is one of the three."""
        return isinstance(module, _PLAIN)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(out, in·kernel), the weight flattened behind its first dimension."""
        weight = cast(Tensor, module.weight)
        return weight.shape[0], weight[0].numel()

    def geometry(self, module: nn.Module) -> tuple[Any, ...]:
        """Of the patches."""
        conv = cast(_ConvNd, module)
        return conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode, conv.groups

    def examine(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
        """The constant that a derived class multiplies the map by, 1 for torch's own."""
        conv = cast(nn.Conv2d, module)
        _check_batched(name, conv, first_input(args, kwargs))
        own: Any = type(module)
        base: Any = next(kind for kind in _PLAIN if isinstance(module, kind))
        if own.forward is base.forward and own._conv_forward is base._conv_forward:
            return 1.0
        return linear_scale(name, module, args, kwargs, lambda x, w, b: base._conv_forward(conv, x, w, b))

    def factor(self, call: Call) -> float:
        """What :meth:`examine` found."""
        return 1.0 if call.note is None else float(call.note)

    def terms(self, module: nn.Module, call: Call) -> tuple[Tensor, Tensor]:
        """Patches (n, L, q) and gradients (n, L, p); every position once for each group."""
        conv = cast(nn.Conv2d, module)
        x = first_input(call.args, call.kwargs)
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = functional.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
        patches, g = _patches(x, conv, call.gradient.shape[2:]), self.output_gradient(call)
        g = g if self.factor(call) == 1.0 else g * self.factor(call)
        if conv.groups == 1:
            return patches, g
        return _in_turn(patches, conv.groups), _apart(g, conv.groups)

    def output_gradient(self, call: Call) -> Tensor:
        """(n, L, p)."""
        return call.gradient.flatten(2).mT


class TransposedConvolution(Kind):
    """nn.ConvTranspose1d to 3d: each input position adds its multiple of the kernel to a patch of the output."""

    mates = "transposed convolution"
    transposed = True
    joint = False
    positions = False

    def accepts(self, module: nn.Module) -> bool:
        """Whether it is one of the three."""
        return isinstance(module, _ConvTransposeNd)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(out·kernel, in), the transpose of the weight flattened behind its first dimension."""
        weight = cast(Tensor, module.weight)
        return weight[0].numel(), weight.shape[0]

    def refusal(self, module: nn.Module) -> str | None:
        """A forward of its own is not probed."""
        plain = any(type(module).forward is kind.forward for kind in _TRANSPOSED.values())
        return None if plain else "has a forward of its own"

    def geometry(self, module: nn.Module) -> tuple[Any, ...]:
        """Of the inputs, which stand once for each group."""
        return (cast(_ConvNd, module).groups,)

    def examine(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Nothing but that the input is a batch."""
        _check_batched(name, cast(nn.Conv2d, module), first_input(args, kwargs))

    def terms(self, module: nn.Module, call: Call) -> tuple[Tensor, Tensor]:
        """Inputs (n, L, in) and patches of the gradient (n, L, out·kernel), L the input's positions, each once a group."""
        conv = cast(nn.Conv2d, module)
        x = first_input(call.args, call.kwargs)
        padding = [size for size in reversed(cast(tuple[int, ...], conv.padding)) for _ in range(2)]
        patches = _patches(functional.pad(call.gradient, padding), conv, x.shape[2:])
        a = x.flatten(2).mT
        if conv.groups == 1:
            return a, patches
        return _apart(a, conv.groups), _in_turn(patches, conv.groups)

    def output_gradient(self, call: Call) -> Tensor:
        """(n, output positions, out)."""
        return call.gradient.flatten(2).mT


def _check_batched(name: str, conv: nn.Conv2d, x: Tensor) -> None:
    if x.ndim != len(conv.kernel_size) + 2:
        raise ValueError(
            f"layers: {name!r} reads an input of shape {tuple(x.shape)} without a batch, so that its rows have no example; "
            "give it (n, channels, ...), or leave it out of layers"
        )


def _patches(x: Tensor, conv: nn.Conv2d, positions: tuple[int, ...]) -> Tensor:
    """(n, L, channels·kernel) of a padded (n, channels, ...), at as many positions as are asked for, from the first."""
    kernel, dilation, stride = conv.kernel_size, conv.dilation, conv.stride
    if x.ndim < 5:
        if x.ndim == 3:  # one-dimensional: an image of height 1
            x, kernel, dilation, stride = x[:, :, None], (1, *kernel), (1, *dilation), (1, *stride)
            positions = (1, *positions)
        # What an output padding added behind the last patch may hold another one.
        ends = [(n - 1) * s + (k - 1) * d + 1 for n, s, k, d in zip(positions, stride, kernel, dilation, strict=True)]
        return functional.unfold(x[:, :, : ends[0], : ends[1]], kernel, dilation, 0, stride).mT
    for place, (k, d, s) in enumerate(zip(kernel, dilation, stride, strict=True)):
        x = x.unfold(2 + place, (k - 1) * d + 1, s)[..., ::d].narrow(2 + place, 0, positions[place])
    n, channels = x.shape[:2]
    return x.movedim(1, 4).reshape(n, -1, channels * kernel[0] * kernel[1] * kernel[2])


def _in_turn(patches: Tensor, groups: int) -> Tensor:
    """(n, L·groups, width/groups): the part of each group in turn."""
    return patches.reshape(*patches.shape[:2], groups, -1).flatten(1, 2)


def _apart(rows: Tensor, groups: int) -> Tensor:
    """(n, L·groups, width): each group's part alone, zeros in the place of the others'."""
    n, length, width = rows.shape
    group = torch.arange(groups, device=rows.device)
    own = group[:, None] == group.repeat_interleave(width // groups)
    return torch.where(own, rows[:, :, None], 0).flatten(1, 2)
