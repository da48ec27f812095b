"""Products of a layer's Fisher with a fixed block, summed over the stream of records."""

from __future__ import annotations

import torch
from torch import Tensor

from fishergeo.accumulators.base import Accumulator, Layout, Shared
from fishergeo.capture import Record


class ProductAccumulator(Accumulator):
    """Σ F_i X for a fixed block X, F_i = vec(G) vec(G)ᵀ (``layout.side == "both"``), G Gᵀ or Gᵀ G; and the trace.

    Two-sided, the weight gradient of each example is formed: 2Tpq multiplications, as in an ordinary backward pass,
    and 2pq for every column, against 4Tpq for every column without it.
    """

    def __init__(self, layout: Layout, sums: dict[str, Tensor], block: Tensor) -> None:
        super().__init__(layout, sums)
        self.block = block

    @classmethod
    def expected(cls, layout: Layout) -> dict[str, tuple[int | None, ...]]:
        """The product."""
        return {"product": (layout.size, None)}

    @classmethod
    def of(cls, layout: Layout, block: Tensor, trace: bool) -> ProductAccumulator:
        """The product with no data; with ``trace``, its sum too."""
        sums = {"product": torch.zeros_like(block)}
        if trace:
            sums["trace"] = torch.zeros(1, dtype=torch.float64, device=block.device)
        return cls(layout, sums, block)

    def add(self, record: Record, shared: Shared) -> None:
        """Adds one batch of one layer."""
        if self.layout.side != "both":
            near, far, _ = self._near_and_far(record, shared)
            self.sums["product"] += gram_product(near, far, self.block, self.layout.unit)
            if "trace" in self.sums:
                self.sums["trace"] += gram_trace(near, far, self.layout.unit)
            return
        a, d = self._cast(record, shared)
        for start in range(0, len(d), 8):  # a few at a time, which stay in the cache
            g = torch.bmm(d[start : start + 8].mT, a[start : start + 8]).flatten(1)
            self.sums["product"].addmm_(g.T, g @ self.block)
            if "trace" in self.sums:
                self.sums["trace"] += torch.linalg.vector_norm(g).square()


def gram_product(near: Tensor, far: Tensor, omega: Tensor, unit: str) -> Tensor:
    """Σ_i X_iᵀ (Y_i (Y_iᵀ (X_i Ω))) over a batch, by the cheapest of three orders of multiplication.

    Args:
        near: X, (n, T, s), the factor on the operator's side.
        far: Y, (n, T, r), the other one.
        omega: (s, c).
        unit: with ``"token"`` every row is a datum of its own.

    Returns:
        (s, c).
    """
    n, t, s = near.shape
    r, c = far.shape[2], omega.shape[1]
    if unit == "token" or t == 1:
        flat = near.flatten(0, 1)
        return flat.T @ ((flat @ omega) * far.flatten(0, 1).square().sum(1, keepdim=True))
    through_kernel, through_factors, through_gradient = t * t * (r + c), 2 * t * r * c, t * r * s + 2 * c * r * s
    cheapest = min(through_kernel + 2 * t * s * c, through_factors + 2 * t * s * c, through_gradient)
    if cheapest == through_gradient:
        total = torch.zeros_like(omega)
        for one_near, one_far in zip(near, far, strict=True):
            gradient = one_near.T @ one_far
            total += gradient @ (gradient.T @ omega)
        return total
    inner = near @ omega
    if through_kernel <= through_factors:
        inner = torch.bmm(torch.bmm(far, far.mT), inner)
    else:
        inner = torch.bmm(far, torch.bmm(far.mT, inner))
    return near.flatten(0, 1).T @ inner.flatten(0, 1)


def gram_trace(near: Tensor, far: Tensor, unit: str) -> Tensor:
    """Σ_i ‖X_iᵀ Y_i‖_F² over a batch, scalar; arguments as in :func:`gram_product`."""
    t = near.shape[1]
    if unit == "token" or t == 1:
        return (near.square().sum(2) * far.square().sum(2)).sum()
    if t * (near.shape[2] + far.shape[2]) <= near.shape[2] * far.shape[2]:
        return (torch.bmm(near, near.mT) * torch.bmm(far, far.mT)).sum()
    return torch.stack([(x.T @ y).square().sum() for x, y in zip(near, far, strict=True)]).sum()
