"""The coordinate-wise collision term tile by tile: value and gradient without a p×q tensor, on any device.

With X = A∘T and D = W0 + A + T, the value is Σ|X|·(1 + β·s), s = σ(|D| − τ), and per coordinate

    ∂/∂A = η·sign(X)·T + β·s·(1 − s)·sign(D)·|X|,    ∂/∂T = η·sign(X)·A + the same second term.
"""

from collections.abc import Iterator, Sequence

import torch

# Entries and columns of a tile. On a CPU the live tiles should stay near the L2 cache, and a tile be large enough that
# calls cost little beside it (64K entries measured best of 8K to 256K, r = 8 and 16); on an accelerator large enough to
# hide the launches.
CPU_TILE = 1 << 16

DEVICE_TILE = 1 << 20

TILE_COLUMNS = 512

TILES = 6

_ONE = torch.ones(())


class _Workspace:
    """Preallocated tiles, reused for every block of the sweep, so that the allocator stays out of the inner loop."""

    def __init__(self, like: torch.Tensor, rows: int, columns: int, dtype: torch.dtype) -> None:
        size = CPU_TILE if like.device.type == "cpu" else DEVICE_TILE
        self._columns = min(columns, TILE_COLUMNS)
        self._rows = max(1, min(rows, size // self._columns))
        self._extent = (rows, columns)
        self._flat = like.new_empty(TILES, self._rows * self._columns, dtype=dtype)

    def blocks(self) -> Iterator[tuple[slice, slice, list[torch.Tensor]]]:
        """Row slice, column slice and the tiles cut to that size, over the whole matrix."""
        rows, columns = self._extent
        for i in range(0, rows, self._rows):
            height = min(self._rows, rows - i)
            for j in range(0, columns, self._columns):
                width = min(self._columns, columns - j)
                tiles = [flat[: height * width].view(height, width) for flat in self._flat]
                yield slice(i, i + height), slice(j, j + width), tiles


def _tile_value(
    a: torch.Tensor,
    t: torch.Tensor,
    base: torch.Tensor | None,
    beta: float,
    tau: float,
    d: torch.Tensor,
    s: torch.Tensor,
    x: torch.Tensor,
    scratch: torch.Tensor,
) -> torch.Tensor:
    """Row sums of the term over one tile; leaves D in `d`, σ(|D| − τ) in `s` and X in `x`."""
    torch.add(a, t, out=d)
    if base is not None:
        d.add_(base)
    torch.abs(d, out=s)
    s.sub_(tau).sigmoid_()
    torch.mul(a, t, out=x)
    torch.addcmul(x, x, s, value=beta, out=scratch)
    return scratch.abs_().sum(-1)


def _tile_gradient(
    a: torch.Tensor,
    t: torch.Tensor,
    beta: float,
    d: torch.Tensor,
    s: torch.Tensor,
    x: torch.Tensor,
    by_t: torch.Tensor,
) -> torch.Tensor:
    """Leave the gradients by A in `x`, which is returned, and by T in `by_t`, from what `_tile_value` leaves.

    Overwrites `d` and `s`, keeps `a` and `t`. Where D is zero, whose sign is then 1, this is one of the subgradients.
    """
    torch.copysign(x, d, out=d)
    torch.ops.aten.sigmoid_backward.grad_input(d, s, grad_input=d)  # s·(1 − s)·sign(D)·|X|
    d.mul_(beta)
    torch.add(_ONE, s, alpha=beta, out=s)
    s.mul_(x.sign_())  # η·sign(X)
    torch.addcmul(d, s, a, out=by_t)
    return torch.addcmul(d, s, t, out=x)


def _cut(base: torch.Tensor | None, b: int, i: slice, j: slice) -> torch.Tensor | None:
    return None if base is None else base[b, i, j]


def _widened(matrix: torch.Tensor, tile: torch.Tensor) -> torch.Tensor:
    """The block itself, or if it is stored narrower than the tiles, its copy in `tile`."""
    return matrix if matrix.dtype == tile.dtype else tile.copy_(matrix)


def factored_sweep(
    factors: Sequence[torch.Tensor], base: torch.Tensor | None, beta: float, tau: float, needs: Sequence[bool]
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Row sums of the term for A = la @ ra and T = lt @ rt, and the gradient of their total by each factor.

    Args:
        factors: la (B, p, r), ra (B, r, q), lt (B, p, r'), rt (B, r', q), float32 or float64.
        base: W0 (B, p, q) of any floating dtype, or None.
        beta: β.
        tau: τ.
        needs: flags for the factors that ask for a gradient.

    Returns:
        Sums (B, p), and for each factor its gradient, or None where none is asked for.
    """
    la, ra, lt, rt = factors
    batch, p, q = la.shape[0], la.shape[1], ra.shape[2]
    sums = la.new_zeros(batch, p)
    grads = [torch.zeros_like(f) if need else None for f, need in zip(factors, needs, strict=True)]
    grad_la, grad_ra, grad_lt, grad_rt = grads
    work = _Workspace(la, p, q, la.dtype)
    for b in range(batch):
        for i, j, (a, t, d, s, x, by_t) in work.blocks():
            torch.mm(la[b, i], ra[b, :, j], out=a)
            torch.mm(lt[b, i], rt[b, :, j], out=t)
            sums[b, i] += _tile_value(a, t, _cut(base, b, i, j), beta, tau, d, s, x, by_t)
            if not any(needs):
                continue
            by_a = _tile_gradient(a, t, beta, d, s, x, by_t)
            if grad_la is not None:
                grad_la[b, i].T.addmm_(ra[b, :, j], by_a.T)  # with the few rows on the left, which BLAS does faster
            if grad_lt is not None:
                grad_lt[b, i].T.addmm_(rt[b, :, j], by_t.T)
            if grad_ra is not None:
                grad_ra[b, :, j].addmm_(la[b, i].T, by_a)
            if grad_rt is not None:
                grad_rt[b, :, j].addmm_(lt[b, i].T, by_t)
    return sums, grads


def dense_sums(
    part: torch.Tensor, rest: torch.Tensor, base: torch.Tensor | None, beta: float, tau: float
) -> torch.Tensor:
    """Row sums (B, p) of the term for dense A and T of shape (B, p, q), float32 or wider."""
    batch, p, q = part.shape
    dtype = torch.promote_types(part.dtype, torch.float32)
    sums = part.new_zeros(batch, p, dtype=dtype)
    work = _Workspace(part, p, q, dtype)
    for b in range(batch):
        for i, j, (wide_a, wide_t, d, s, x, scratch) in work.blocks():
            a, t = _widened(part[b, i, j], wide_a), _widened(rest[b, i, j], wide_t)
            sums[b, i] += _tile_value(a, t, _cut(base, b, i, j), beta, tau, d, s, x, scratch)
    return sums


def dense_gradients(
    part: torch.Tensor,
    rest: torch.Tensor,
    base: torch.Tensor | None,
    scale: torch.Tensor,
    beta: float,
    tau: float,
    needs: Sequence[bool],
) -> list[torch.Tensor | None]:
    """Gradients of Σ_b scale_b·total_b by A and by T, of their dtype; None where `needs` says so."""
    batch, p, q = part.shape
    grad_part, grad_rest = (torch.empty_like(part) if need else None for need in needs)
    work = _Workspace(part, p, q, torch.promote_types(part.dtype, torch.float32))
    for b in range(batch):
        for i, j, (wide_a, wide_t, d, s, x, by_t) in work.blocks():
            a, t = _widened(part[b, i, j], wide_a), _widened(rest[b, i, j], wide_t)
            _tile_value(a, t, _cut(base, b, i, j), beta, tau, d, s, x, by_t)
            by_a = _tile_gradient(a, t, beta, d, s, x, by_t)
            if grad_part is not None:
                torch.mul(by_a, scale[b], out=grad_part[b, i, j])
            if grad_rest is not None:
                torch.mul(by_t, scale[b], out=grad_rest[b, i, j])
    return [grad_part, grad_rest]
