"""How one call of each kind of module becomes (a, g) with Σ_t g_t a_tᵀ the gradient of a (p, q) view of its weight.

=========================  ================  =====================  =================================
kind                       (p, q)            inputs a_t             gradients g_t
=========================  ================  =====================  =================================
nn.Linear, Conv1D (GPT-2)  (out, in)         the module's input     of the module's output
nn.Conv1d, nn.Conv2d       (out, in·kernel)  patches                of the output, T = output positions
nn.Embedding               (width, rows)     one-hot of the id      of the output; none at padding_idx
LayerNorm, RMSNorm         (width, 1)        1                      of the output ∘ normalised input
bias of any but Embedding  (out, 1)          1                      of the output
weight and bias together   (p, q + 1)        a_t with a 1 appended  of the output
=========================  ================  =====================  =================================

An embedding's weight is stored (rows, width) and GPT-2's Conv1D as (in, out): the view is the transpose of those.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module, with the gradient that came back to it.

    Attributes:
        args: of the call.
        kwargs: of the call.
        gradient: of the output.
        note: what :meth:`Kind.examine` found.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    gradient: Tensor
    note: Any = None


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The tensor that a module reads."""
    return args[0] if args else next(iter(kwargs.values()))


class Kind:
    """One kind of module; the class itself is of no kind, its subclasses are.

    Attributes:
        transposed: the weight is stored (q, p).
        joint: weight and bias have a common (p, q + 1) view.
        positions: the output's positions are the batch's own, so that its padding mask applies.
        mates: kinds of the same mates may share one parameter.
    """

    mates = "matrix"
    transposed = False
    joint = True
    positions = True

    def accepts(self, module: nn.Module) -> bool:
        """Whether a module is of this kind."""
        raise NotImplementedError

    def refusal(self, module: nn.Module) -> str | None:
        """Why this very module cannot be captured, or None."""
        return None

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(p, q) of the weight's view."""
        raise NotImplementedError

    def view(self, tensor: Tensor) -> Tensor:
        """(p, q) of a tensor shaped as the weight is stored."""
        flat = tensor.reshape(len(tensor), -1)
        return flat.mT if self.transposed else flat

    def examine(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Checks on the module's first call that it computes what this kind says.

        Returns:
            Whatever :meth:`terms` needs to know.

        Raises:
            ValueError: if it computes something else, by name.
        """
        return None

    def geometry(self, module: nn.Module) -> tuple[Any, ...]:
        """What a depends on beside the input tensor: layers that agree in both share their a."""
        return ()

    def terms(self, module: nn.Module, call: Call) -> tuple[Tensor, Tensor]:
        """(a, g): (..., q) and (..., p), of the weight."""
        return first_input(call.args, call.kwargs), call.gradient

    def output_gradient(self, call: Call) -> Tensor:
        """(..., p): what the bias sees."""
        return call.gradient


class Linear(Kind):
    """nn.Linear and what derives from it, LoRA's halves among them."""

    def accepts(self, module: nn.Module) -> bool:
        """Whether it is an nn.Linear."""
        return isinstance(module, nn.Linear)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(out, in), as the module states them: a quantised weight is stored in another shape."""
        linear = cast(nn.Linear, module)
        return linear.out_features, linear.in_features


class TransposedLinear(Kind):
    """GPT-2's Conv1D: a linear map whose weight is stored (in, out)."""

    transposed = True

    def accepts(self, module: nn.Module) -> bool:
        """Whether it is called Conv1D and has a matrix for a weight."""
        return type(module).__name__ == "Conv1D" and getattr(module, "weight", torch.empty(0)).ndim == 2

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = cast(Tensor, module.weight).shape
        return columns, rows


class Convolution(Kind):
    """nn.Conv1d and nn.Conv2d: a linear map of every patch."""

    mates = "convolution"
    positions = False

    def accepts(self, module: nn.Module) -> bool:
        """Whether it is one of the two."""
        return isinstance(module, nn.Conv1d | nn.Conv2d)

    def refusal(self, module: nn.Module) -> str | None:
        """Grouped convolutions have no (out, in·kernel) view."""
        groups = cast(nn.Conv2d, module).groups
        return None if groups == 1 else f"has groups={groups}; only groups=1 can be captured"

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(out, in·kernel), the weight flattened behind its first dimension."""
        weight = cast(Tensor, module.weight)
        return weight.shape[0], weight[0].numel()

    def geometry(self, module: nn.Module) -> tuple[Any, ...]:
        """Of the patches."""
        conv = cast(nn.Conv2d, module)
        return conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.padding_mode

    def terms(self, module: nn.Module, call: Call) -> tuple[Tensor, Tensor]:
        """Patches (n, L, q) and gradients (n, L, p)."""
        conv = cast(nn.Conv2d, module)
        x = first_input(call.args, call.kwargs)
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = functional.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
        kernel, dilation, stride = conv.kernel_size, conv.dilation, conv.stride
        if x.ndim == 3:  # one-dimensional: an image of height 1
            x, kernel, dilation, stride = x[:, :, None], (1, *kernel), (1, *dilation), (1, *stride)
        return functional.unfold(x, kernel, dilation, 0, stride).mT, self.output_gradient(call)

    def output_gradient(self, call: Call) -> Tensor:
        """(n, L, p)."""
        return call.gradient.flatten(2).mT


class Embedding(Kind):
    """nn.Embedding as a linear map of one-hot inputs: W viewed as (width, rows). The inputs take n·T·rows numbers."""

    transposed = True
    joint = False

    def accepts(self, module: nn.Module) -> bool:
        """Whether it is an nn.Embedding."""
        return isinstance(module, nn.Embedding)

    def refusal(self, module: nn.Module) -> str | None:
        """Rows renormalised in the forward pass, or gradients scaled by frequency, are not the linear map's."""
        embedding = cast(nn.Embedding, module)
        if embedding.max_norm is not None:
            return "has max_norm, which changes its weight as it runs"
        return "has scale_grad_by_freq, so its gradients are not its own" if embedding.scale_grad_by_freq else None

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(width, rows)."""
        embedding = cast(nn.Embedding, module)
        return embedding.embedding_dim, embedding.num_embeddings

    def examine(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
        """The constant that a derived class multiplies its rows by (Gemma's sqrt of the width)."""
        if type(module).forward is nn.Embedding.forward:
            return 1.0
        rows = functional.embedding(first_input(args, kwargs), cast(Tensor, module.weight)).detach().double()
        output = module.forward(*args, **kwargs).detach().double()
        if output.shape == rows.shape:
            scale = float((output * rows).sum() / rows.square().sum().clamp_min(1e-300))
            if float((output - scale * rows).norm()) <= _tolerance(cast(Tensor, module.weight)) * float(output.norm()):
                return scale
        raise ValueError(f"layers: {name!r} is a {type(module).__name__}, which is no multiple of its weight's rows")

    def terms(self, module: nn.Module, call: Call) -> tuple[Tensor, Tensor]:
        """One-hot ids (..., rows) and gradients (..., width)."""
        embedding = cast(nn.Embedding, module)
        ids = first_input(call.args, call.kwargs)
        g = call.gradient if call.note == 1.0 else call.gradient * call.note
        if embedding.padding_idx is not None:
            g = torch.where((ids == embedding.padding_idx)[..., None], 0, g)
        return functional.one_hot(ids.long(), embedding.num_embeddings).to(g.dtype), g


class Norm(Kind):
    """Any LayerNorm or RMSNorm with a vector of scales: its output is affine in them, coordinate by coordinate.

    The normalised input is what the module gives with scales of one, or of zero where weights act as 1 + w (Gemma),
    and no bias, whatever its further inputs. Each module is probed once to be so.
    """

    mates = "norm"
    joint = False

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
        """Output = (scales or 1 + scales) ∘ normalised input, along the last dimension, + bias.

        Returns:
            The scales, 1 or 0, with which the output is the normalised input itself.
        """
        weight = cast(Tensor, module.weight)
        probe = torch.linspace(0.5, 1.5, len(weight), device=weight.device)
        settings = ((0.0, 0.0), (1.0, 0.0), (probe, 0.0), (0.0, probe))
        runs = [_run_with(module, args, kwargs, *setting) for setting in settings]
        finite = runs[1].isfinite()  # what stands at padding may be NaN
        zero, one, other, biased = (torch.where(finite, run, 0) for run in runs)
        if bool(one.any()) and zero.shape[-1] == len(weight):
            scales = 0.0 if bool(zero.any()) else 1.0
            normalised = one if scales else zero
            offset = 0 if module._parameters.get("bias") is None else torch.where(finite, probe, 0)
            if _close(other, normalised * (probe + 1 - scales), weight) and _close(biased, zero + offset, weight):
                return scales
        raise ValueError(
            f"layers: {name!r} is a {type(module).__name__}, whose scales are not understood here (or all it has "
            "read are zeros)"
        )

    def terms(self, module: nn.Module, call: Call) -> tuple[Tensor, Tensor]:
        """Ones (..., 1) and gradients times the normalised input (..., width)."""
        g = call.gradient * _run_with(module, call.args, call.kwargs, call.note)
        return torch.ones_like(g[..., :1]), g


KINDS: tuple[Kind, ...] = (Linear(), TransposedLinear(), Convolution(), Embedding(), Norm())


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a module, None if it has none."""
    return next((kind for kind in KINDS if kind.accepts(module)), None)


@torch.no_grad()
def _run_with(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    scales: float | Tensor,
    bias: float | Tensor = 0.0,
) -> Tensor:
    with _replaced(module, weight=scales, bias=bias):
        return module.forward(*args, **kwargs)


@contextmanager
def _replaced(module: nn.Module, **values: float | Tensor) -> Iterator[None]:
    """The module with plain tensors for its parameters; sharded ones need not be gathered for it."""
    kept = {name: module._parameters[name] for name in values if module._parameters.get(name) is not None}
    try:
        for name, parameter in kept.items():
            plain = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device) + values[name]  # type: ignore[union-attr]
            module._parameters[name] = nn.Parameter(plain.to(parameter.dtype), requires_grad=False)  # type: ignore[union-attr]
        yield
    finally:
        module._parameters.update(kept)


def _close(actual: Tensor, expected: Tensor, weight: Tensor) -> bool:
    return float((actual - expected).norm()) <= _tolerance(weight, actual) * float(expected.norm())


def _tolerance(*tensors: Tensor) -> float:
    """Wide: norms compute in float32 whatever the model's dtype, and what is not understood is off by its own size."""
    return 0.03 if any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in tensors) else 1e-4
