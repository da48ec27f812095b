"""The coordinate-wise collision term as autograd functions, over the sweeps that suit device and dtype.

The gradient of a sum is linear in the incoming scalar, so for factors it is formed in the same sweep as the value and
only scaled in the backward pass, for memory the size of the factors. Dense gradients are as large as their inputs, so
there the backward pass recomputes.
"""

import functools
import warnings
from types import ModuleType
from typing import Any

import torch

from fishergeo._checks import refuse_second_order
from fishergeo.updates import _tiles


@functools.cache
def _kernels(device: torch.device) -> ModuleType | None:
    """The Triton kernels if they run on this device, which takes triton, a driver and a C compiler; else None."""
    try:
        from fishergeo.updates import _triton
    except ImportError:
        return None
    try:
        _triton.probe(device)
    except Exception as error:
        warnings.warn(
            f"the Triton kernel of riemannian_overlap does not run on {device}, so the slower tiled way is taken: {error}"
        )
        return None
    return _triton


def sweeps(device: torch.device, dtype: torch.dtype, rank: int = 1) -> ModuleType:
    """The module whose sweeps compute the term: Triton kernels where they serve, tiles everywhere else.

    Args:
        device: device of the updates.
        dtype: dtype of the updates.
        rank: the larger inner size of factored updates.
    """
    if device.type == "cuda" and dtype != torch.float64:
        kernels = _kernels(device)
        if kernels is not None and 1 <= rank <= kernels.LARGEST_RANK:
            return kernels
    return _tiles


class FactoredOverlap(torch.autograd.Function):
    """The term for A = la @ ra and T = lt @ rt: (totals (B,), row sums (B, p)); only the totals have a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        la: torch.Tensor,
        ra: torch.Tensor,
        lt: torch.Tensor,
        rt: torch.Tensor,
        base: torch.Tensor | None,
        beta: float,
        tau: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        backend = sweeps(la.device, la.dtype, max(la.shape[-1], lt.shape[-1]))
        sums, grads = backend.factored_sweep((la, ra, lt, rt), base, beta, tau, ctx.needs_input_grad[:4])
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(sums)
        return sums.sum(-1), sums

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor, _grad_sums: None) -> tuple[torch.Tensor | None, ...]:
        refuse_second_order("riemannian_overlap")
        scale = grad_total[:, None, None]
        return *(None if g is None else g * scale for g in ctx.saved_tensors), None, None, None


class DenseOverlap(torch.autograd.Function):
    """The same for dense A and T of shape (B, p, q)."""

    @staticmethod
    def forward(
        ctx: Any, part: torch.Tensor, rest: torch.Tensor, base: torch.Tensor | None, beta: float, tau: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sums = sweeps(part.device, part.dtype).dense_sums(part, rest, base, beta, tau)
        ctx.save_for_backward(part, rest, base)
        ctx.beta, ctx.tau = beta, tau
        ctx.mark_non_differentiable(sums)
        return sums.sum(-1), sums

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor, _grad_sums: None) -> tuple[torch.Tensor | None, ...]:
        refuse_second_order("riemannian_overlap")
        part, rest, base = ctx.saved_tensors
        backend = sweeps(part.device, part.dtype)
        grads = backend.dense_gradients(part, rest, base, grad_total, ctx.beta, ctx.tau, ctx.needs_input_grad[:2])
        return *grads, None, None, None
