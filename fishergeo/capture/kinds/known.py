"""How one call of each kind of module becomes (a, g) with Σ_t g_t a_tᵀ the gradient of a (p, q) view of its weight.

=========================  ================  =====================  =================================
kind                       (p, q)            inputs a_t             gradients g_t
=========================  ================  =====================  =================================
nn.Linear, Conv1D (GPT-2)  (out, in)         the module's input     of the module's output
in_proj of an attention    (3·width, in)     each tensor read       of the three maps, 0 elsewhere
nn.Conv1d to nn.Conv3d     (out, in·kernel)  patches                of the output, T = output positions
nn.ConvTranspose1d to 3d   (out·kernel, in)  the module's input     patches of the output's gradient
nn.Embedding               (width, rows)     one-hot of the id      of the output; none at padding_idx
LayerNorm, RMSNorm         (width, 1)        1                      of the output ∘ normalised input
BatchNorm, GroupNorm       (channels, 1)     1                      the same, T = positions of the output
bias of any but Embedding  (out, 1)          1                      of the output
weight and bias together   (p, q + 1)        a_t with a 1 appended  of the output
=========================  ================  =====================  =================================

In a grouped convolution in and out are those of a group in the weight's view, and every position stands once for each
group, with the channels of the others zero. BatchNorm is one of running statistics, which examples do not share.

An embedding's weight is stored (rows, width) and GPT-2's Conv1D as (in, out): the view is the transpose of those.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fishergeo.capture.kinds.attention import Projection
from fishergeo.capture.kinds.convolutions import Convolution, TransposedConvolution
from fishergeo.capture.kinds.kind import Call, Kind, first_input, linear_scale, tolerance
from fishergeo.capture.kinds.norms import ChannelNorm, Norm


class Linear(Kind):
    """nn.Linear and what derives from it, LoRA's halves among them."""

    def accepts(self, module: nn.Module) -> bool:
        """Whether it is an nn.Linear."""
        return isinstance(module, nn.Linear)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        """(out, in), as the module states them: a quantised weight is stored in another shape."""
        linear = cast(nn.Linear, module)
        return linear.out_features, linear.in_features

    def examine(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
        """The constant that a derived class multiplies the map by, 1 for nn.Linear itself."""
        if type(module).forward is nn.Linear.forward:
            return 1.0
        return linear_scale(name, module, args, kwargs, functional.linear)

    def factor(self, call: Call) -> float:
        """What :meth:`examine` found."""
        return 1.0 if call.note is None else float(call.note)

    def terms(self, module: nn.Module, call: Call) -> tuple[Tensor, Tensor]:
        """The input (..., in) and the gradient (..., out)."""
        g = call.gradient if self.factor(call) == 1.0 else call.gradient * self.factor(call)
        return first_input(call.args, call.kwargs), g


class InProjection(Linear):
    """An input projection of nn.MultiheadAttention."""

    def accepts(self, module: nn.Module) -> bool:
        """Whether it is such a projection."""
        return isinstance(module, Projection)

    def examine(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
        """Nothing: the attention's outputs have been compared as a whole."""
        return 1.0


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

    def geometry(self, module: nn.Module) -> tuple[Any, ...]:
        """Of the one-hot inputs."""
        embedding = cast(nn.Embedding, module)
        return embedding.num_embeddings, embedding.padding_idx

    def examine(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[float, int | None]:
        """The constant that a derived class multiplies its rows by (Gemma's sqrt of the width), and the id without gradient."""
        padding = cast(nn.Embedding, module).padding_idx
        if type(module).forward is nn.Embedding.forward:
            return 1.0, padding
        rows = functional.embedding(first_input(args, kwargs), cast(Tensor, module.weight)).detach().double()
        output = module.forward(*args, **kwargs).detach().double()
        if output.shape == rows.shape:
            scale = float((output * rows).sum() / rows.square().sum().clamp_min(1e-300))
            if float((output - scale * rows).norm()) <= tolerance(cast(Tensor, module.weight)) * float(output.norm()):
                return scale, padding if padding is None or _passes_by(module, padding) else None
        raise ValueError(f"layers: {name!r} is a {type(module).__name__}, which is no multiple of its weight's rows")

    def terms(self, module: nn.Module, call: Call) -> tuple[Tensor, Tensor]:
        """One-hot ids (..., rows) and gradients (..., width)."""
        embedding, (scale, _) = cast(nn.Embedding, module), call.note
        g = call.gradient if scale == 1.0 else call.gradient * scale
        # Ids that all examples share stand once for each of them, as the gradient does.
        ids = first_input(call.args, call.kwargs).long().expand(g.shape[:-1])
        return functional.one_hot(ids, embedding.num_embeddings).to(g.dtype), g

    def skipped(self, module: nn.Module, call: Call) -> Tensor | None:
        """Positions of ``padding_idx``, whose row has no gradient."""
        ids, (_, padding) = first_input(call.args, call.kwargs), call.note
        return None if padding is None else (ids == padding).expand(call.gradient.shape[:-1])


def _passes_by(module: nn.Module, padding: int) -> bool:
    """Whether a derived embedding leaves the row of its ``padding_idx`` without a gradient, as nn.Embedding does."""
    kept = module._parameters.get("weight")
    if kept is None or type(kept) is not nn.Parameter:  # computed, or sharded
        return True
    probe = nn.Parameter(kept.detach().clone())
    try:
        module._parameters["weight"] = probe
        with torch.enable_grad():
            output = module.forward(torch.full((1, 1), padding, device=kept.device))
            (gradient,) = torch.autograd.grad(output.sum(), [probe], allow_unused=True)
    finally:
        module._parameters["weight"] = kept
    return gradient is None or not bool(gradient.any())


KINDS: tuple[Kind, ...] = (
    InProjection(), Linear(), TransposedLinear(), Convolution(), TransposedConvolution(), Embedding(), Norm(), ChannelNorm(),
)  # fmt: skip


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a module, None if it has none."""
    return next((kind for kind in KINDS if kind.accepts(module)), None)
