"""Kinds of modules that scale what they normalise: along the last dimension, or along channels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fishergeo.capture.kinds.kind import Call, Kind, close, run_with


class Norm(Kind):
    """Any LayerNorm or RMSNorm with a vector of scales: its output is affine in them, coordinate by coordinate.

    The normalised input is what the module gives with scales of one, or of zero where weights act as 1 + w (Gemma),
    and no bias, whatever its further inputs. Each module is probed once to be so.
    """

    mates = "norm"
    joint = False
    axis = -1

    def accepts(self, module: nn.Module) -> bool:
        """Whether its class is called so and has a weight."""
        named = re.search(r"(Layer|RMS)_?Norm", type(module).__name__, re.IGNORECASE) is not None
        return (named or isinstance(module, nn.LayerNorm | nn.RMSNorm)) and isinstance(
            getattr(module, "weight", None), Tensor
        )

    def refusal(self, module: nn.Module) -> str | None:
        """Scales of several dimensions are not understood."""
        ndim = cast(Tensor, module.weight).ndim
        return None if ndim == 1 else f"has scales of {ndim} dimensions; only a vector of scales can be captured"

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(width, 1)."""
        return cast(Tensor, module.weight).shape[0], 1

    def examine(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
        """Output = (scales or 1 + scales) ∘ normalised input, along the kind's dimension, + bias.

        Returns:
            The scales, 1 or 0, with which the output is the normalised input itself.
        """
        weight = cast(Tensor, module.weight)
        probe = torch.linspace(0.5, 1.5, len(weight), device=weight.device)
        settings = ((0.0, 0.0), (1.0, 0.0), (probe, 0.0), (0.0, probe))
        runs = [run_with(module, args, kwargs, *setting) for setting in settings]
        finite = runs[1].isfinite()  # what stands at padding may be NaN
        zero, one, other, biased = (torch.where(finite, run, 0) for run in runs)
        if bool(one.any()) and zero.shape[self.axis] == len(weight):
            scales = 0.0 if bool(zero.any()) else 1.0
            normalised = one if scales else zero
            along = probe.view(-1, *[1] * (zero.ndim - 1 - self.axis % zero.ndim))
            offset = 0 if module._parameters.get("bias") is None else torch.where(finite, along, 0)
            if close(other, normalised * (along + 1 - scales), weight) and close(biased, zero + offset, weight):
                return scales
        raise ValueError(
            f"layers: {name!r} is a {type(module).__name__}, whose scales are not understood here (or all it has "
            "read are zeros)"
        )

    def terms(self, module: nn.Module, call: Call) -> tuple[Tensor, Tensor]:
        """Ones (..., 1) and gradients times the normalised input (..., width)."""
        g = call.gradient * run_with(module, call.args, call.kwargs, call.note)
        return torch.ones_like(g[..., :1]), g


class ChannelNorm(Norm):
    """BatchNorm with running statistics, GroupNorm, InstanceNorm: scales along dimension 1, the channels."""

    positions = False
    axis = 1

    def accepts(self, module: nn.Module) -> bool:
        """Whether it is one of torch's and has scales."""
        return isinstance(module, _BatchNorm | _InstanceNorm | nn.GroupNorm) and isinstance(
            getattr(module, "weight", None), Tensor
        )

    def refusal(self, module: nn.Module) -> str | None:
        """Statistics of the batch mix its examples."""
        mixing = isinstance(module, _BatchNorm) and module.running_mean is None
        return "has no running statistics, so that its output mixes the examples" if mixing else super().refusal(module)

    def terms(self, module: nn.Module, call: Call) -> tuple[Tensor, Tensor]:
        """Ones (n, L, 1) and gradients times the normalised input (n, L, channels)."""
        a, g = super().terms(module, call)
        g = _channels_last(g)
        return torch.ones_like(g[..., :1]), g

    def output_gradient(self, call: Call) -> Tensor:
        """(n, L, channels)."""
        return _channels_last(call.gradient)


def _channels_last(tensor: Tensor) -> Tensor:
    """(n, L, channels) of (n, channels, ...)."""
    return tensor.reshape(*tensor.shape[:2], -1).mT
