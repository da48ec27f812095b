"""The coordinate-wise collision term tile by tile: value and gradient without a p×q tensor.

With X = A∘T and D = W0 + A + T, the value is Σ|X|·(1 + β·s), s = σ(|D| − τ), and per coordinate

    ∂/∂A = η·sign(X)·T + β·s·(1 − s)·sign(D)·|X|,    ∂/∂T = η·sign(X)·A + the same second term.

The gradient of a sum is linear in the incoming scalar, so for factors it is formed in the same sweep as the value and
only scaled in the backward pass: six rank-r products instead of the eight that recomputing would take, for memory the
size of the factors. Dense gradients are as large as their inputs, so there the backward pass recomputes.
"""

from collections.abc import Iterator

import torch

from fishergeo._autograd import refuse_second_order

# Entries and columns of a tile. On a CPU the seven live tiles should stay near the L2 cache (64K entries measured best
# of 32K to 64K, r = 16); on an accelerator a tile should be large enough to hide the launches.
CPU_TILE = 1 << 16
DEVICE_TILE = 1 << 20
TILE_COLUMNS = 512
TILES = 7


class _Workspace:
    """Preallocated tiles, reused for every block of the sweep, so that the allocator stays out of the inner loop."""

    def __init__(self, like: torch.Tensor, rows: int, columns: int) -> None:
        size = CPU_TILE if like.device.type == "cpu" else DEVICE_TILE
        self._columns = min(columns, TILE_COLUMNS)
        self._rows = max(1, min(rows, size // self._columns))
        self._extent = (rows, columns)
        self._flat = like.new_empty(TILES, self._rows * self._columns)

    def blocks(self) -> Iterator[tuple[slice, slice, list[torch.Tensor]]]:
        """Row slice, column slice and the tiles cut to that size, over the whole matrix."""
        rows, columns = self._extent
        for i in range(0, rows, self._rows):
            height = min(self._rows, rows - i)
            for j in range(0, columns, self._columns):
                width = min(self._columns, columns - j)
                tiles = [flat[: height * width].view(height, width) for flat in self._flat]
                yield slice(i, i + height), slice(j, j + width), tiles


def _tile_value(a, t, base, beta: float, tau: float, d, s, x, scratch) -> torch.Tensor:
    """Row sums of the term over one tile; leaves D in `d`, σ(|D| − τ) in `s` and X in `x`."""
    torch.add(a, t, out=d)
    if base is not None:
        d.add_(base)
    torch.abs(d, out=s)
    s.sub_(tau).sigmoid_()
    torch.mul(a, t, out=x)
    torch.addcmul(x, x, s, value=beta, out=scratch)
    return scratch.abs_().sum(-1)


def _tile_gradient(a, t, beta: float, d, s, x, by_a, by_t) -> None:
    """Write the gradients by A and T from what `_tile_value` leaves; overwrites `d`, `s` and `x`, keeps `a` and `t`."""
    torch.sign(x, out=by_a)
    d.sign_().mul_(x.abs_())
    torch.addcmul(s, s, s, value=-1, out=x)
    d.mul_(x).mul_(beta)  # β·s·(1 − s)·sign(D)·|X|
    by_a.mul_(s.mul_(beta).add_(1))  # η·sign(X)
    torch.addcmul(d, by_a, a, out=by_t)
    torch.addcmul(d, by_a, t, out=x)
    by_a.copy_(x)


class FactoredOverlap(torch.autograd.Function):
    """The term for A = la @ ra and T = lt @ rt: (totals (B,), row sums (B, p)); only the totals have a gradient."""

    @staticmethod
    def forward(ctx, la, ra, lt, rt, base, beta, tau):
        batch, p, q = la.shape[0], la.shape[1], ra.shape[2]
        sums = la.new_zeros(batch, p)
        factors = (la, ra, lt, rt)
        grads = [torch.zeros_like(f) if need else None for f, need in zip(factors, ctx.needs_input_grad, strict=False)]
        grad_la, grad_ra, grad_lt, grad_rt = grads
        work = _Workspace(la, p, q)
        for b in range(batch):
            for i, j, (a, t, d, s, x, by_a, by_t) in work.blocks():
                torch.mm(la[b, i], ra[b, :, j], out=a)
                torch.mm(lt[b, i], rt[b, :, j], out=t)
                sums[b, i] += _tile_value(a, t, None if base is None else base[b, i, j], beta, tau, d, s, x, by_t)
                if not any(ctx.needs_input_grad):
                    continue
                _tile_gradient(a, t, beta, d, s, x, by_a, by_t)
                if grad_la is not None:
                    grad_la[b, i].addmm_(by_a, ra[b, :, j].T)
                if grad_lt is not None:
                    grad_lt[b, i].addmm_(by_t, rt[b, :, j].T)
                if grad_ra is not None:
                    grad_ra[b, :, j].addmm_(la[b, i].T, by_a)
                if grad_rt is not None:
                    grad_rt[b, :, j].addmm_(lt[b, i].T, by_t)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(sums)
        return sums.sum(-1), sums

    @staticmethod
    def backward(ctx, grad_total, _grad_sums):
        refuse_second_order("riemannian_overlap")
        scale = grad_total[:, None, None]
        return *(None if g is None else g * scale for g in ctx.saved_tensors), None, None, None


class DenseOverlap(torch.autograd.Function):
    """The same for dense A and T of shape (B, p, q)."""

    @staticmethod
    def forward(ctx, part, rest, base, beta, tau):
        batch, p, q = part.shape
        sums = part.new_zeros(batch, p)
        work = _Workspace(part, p, q)
        for b in range(batch):
            for i, j, (d, s, x, scratch, *_) in work.blocks():
                tile = None if base is None else base[b, i, j]
                sums[b, i] += _tile_value(part[b, i, j], rest[b, i, j], tile, beta, tau, d, s, x, scratch)
        ctx.save_for_backward(part, rest, base)
        ctx.beta, ctx.tau = beta, tau
        ctx.mark_non_differentiable(sums)
        return sums.sum(-1), sums

    @staticmethod
    def backward(ctx, grad_total, _grad_sums):
        refuse_second_order("riemannian_overlap")
        part, rest, base = ctx.saved_tensors
        batch, p, q = part.shape
        grad_part, grad_rest = (torch.empty_like(part) if need else None for need in ctx.needs_input_grad[:2])
        work = _Workspace(part, p, q)
        for b in range(batch):
            for i, j, (d, s, x, by_a, by_t, *_) in work.blocks():
                a, t, tile = part[b, i, j], rest[b, i, j], None if base is None else base[b, i, j]
                _tile_value(a, t, tile, ctx.beta, ctx.tau, d, s, x, by_t)
                _tile_gradient(a, t, ctx.beta, d, s, x, by_a, by_t)
                if grad_part is not None:
                    torch.mul(by_a, grad_total[b], out=grad_part[b, i, j])
                if grad_rest is not None:
                    torch.mul(by_t, grad_total[b], out=grad_rest[b, i, j])
        return grad_part, grad_rest, None, None, None
