"""The coordinate-wise collision term as Triton kernels, with the sweeps of `fishergeo.updates._tiles` and their meaning.

A tile of A and T lives in registers: products, term and gradient are one launch, and of the update nothing is ever
written out. Both kernels run over rows. A program owns a block of rows and a share of the columns, and adds up what
belongs to its rows, their sums and the gradient of the left factors, so no two programs write to one place and the
result does not depend on their order. The gradient of the right factors is that of the left ones of the transpose:
the same kernel with transposed views. Accumulation is float32, and products are IEEE float32, not TF32.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

ROWS, COLUMNS = 32, 64

# tl.dot wants inner sizes of at least 16; far beyond 64 the factors' tiles no longer fit beside the accumulators.
SMALLEST_RANK, LARGEST_RANK = 16, 64

# Programs wanted: a few for each of the hundred-odd multiprocessors of a large GPU.
PROGRAMS = 512


@triton.jit
def _term(a, t, d, beta, tau):
    """|X|, s = σ(|D| − τ), and the gradients by A and by T, per coordinate."""
    x = a * t
    size = tl.abs(x)
    s = tl.sigmoid(tl.abs(d) - tau)
    sign_x = tl.where(x > 0, 1.0, 0.0) - tl.where(x < 0, 1.0, 0.0)
    sign_d = tl.where(d > 0, 1.0, 0.0) - tl.where(d < 0, 1.0, 0.0)
    eta = 1.0 + beta * s
    common = beta * s * (1.0 - s) * sign_d * size
    return size * eta, eta * sign_x * t + common, eta * sign_x * a + common


@triton.jit
def _factored_kernel(
    la, ra, lt, rt, base, sums, grad_a, grad_t,
    p, q, rank_a, rank_t, share, batch, beta, tau,
    la_b, la_i, la_r, ra_b, ra_r, ra_j, lt_b, lt_i, lt_r, rt_b, rt_r, rt_j, base_b, base_i, base_j,
    HAS_BASE: tl.constexpr, WANT_SUMS: tl.constexpr, WANT_A: tl.constexpr, WANT_T: tl.constexpr,
    RANK_A: tl.constexpr, RANK_T: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(p, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    i = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    k, m = tl.arange(0, RANK_A), tl.arange(0, RANK_T)
    left_a = tl.load(
        la + b * la_b + i[:, None] * la_i + k[None, :] * la_r,
        mask=(i[:, None] < p) & (k[None, :] < rank_a), other=0.0,
    )  # fmt: skip
    left_t = tl.load(
        lt + b * lt_b + i[:, None] * lt_i + m[None, :] * lt_r,
        mask=(i[:, None] < p) & (m[None, :] < rank_t), other=0.0,
    )  # fmt: skip
    total = tl.zeros((ROWS,), dtype=tl.float32)
    sum_a = tl.zeros((ROWS, RANK_A), dtype=tl.float32)
    sum_t = tl.zeros((ROWS, RANK_T), dtype=tl.float32)
    for start in range(split * share, tl.minimum(q, (split + 1) * share), COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        right_a = tl.load(
            ra + b * ra_b + k[:, None] * ra_r + j[None, :] * ra_j,
            mask=(k[:, None] < rank_a) & (j[None, :] < q), other=0.0,
        )  # fmt: skip
        right_t = tl.load(
            rt + b * rt_b + m[:, None] * rt_r + j[None, :] * rt_j,
            mask=(m[:, None] < rank_t) & (j[None, :] < q), other=0.0,
        )  # fmt: skip
        a = tl.dot(left_a, right_a, input_precision="ieee")
        t = tl.dot(left_t, right_t, input_precision="ieee")
        d = a + t
        if HAS_BASE:
            d += tl.load(
                base + b * base_b + i[:, None] * base_i + j[None, :] * base_j,
                mask=(i[:, None] < p) & (j[None, :] < q), other=0.0,
            ).to(tl.float32)  # fmt: skip
        # Beyond the matrix a and t are zero, and so are the term and its gradients.
        value, by_a, by_t = _term(a, t, d, beta, tau)
        if WANT_SUMS:
            total += tl.sum(value, axis=1)
        if WANT_A:
            sum_a += tl.dot(by_a, tl.trans(right_a), input_precision="ieee")
        if WANT_T:
            sum_t += tl.dot(by_t, tl.trans(right_t), input_precision="ieee")
    row = (split * batch + b) * p + i
    if WANT_SUMS:
        tl.store(sums + row, total, mask=i < p)
    if WANT_A:
        tl.store(
            grad_a + row[:, None] * rank_a + k[None, :], sum_a, mask=(i[:, None] < p) & (k[None, :] < rank_a)
        )  # fmt: skip
    if WANT_T:
        tl.store(
            grad_t + row[:, None] * rank_t + m[None, :], sum_t, mask=(i[:, None] < p) & (m[None, :] < rank_t)
        )  # fmt: skip


@triton.jit
def _dense_kernel(
    part, rest, base, scale, sums, grad_a, grad_t,
    p, q, share, batch, beta, tau,
    a_b, a_i, a_j, t_b, t_i, t_j, base_b, base_i, base_j,
    HAS_BASE: tl.constexpr, WANT_SUMS: tl.constexpr, WANT_A: tl.constexpr, WANT_T: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(p, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    i = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(split * share, tl.minimum(q, (split + 1) * share), COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        inside = (i[:, None] < p) & (j[None, :] < q)
        a = tl.load(part + b * a_b + i[:, None] * a_i + j[None, :] * a_j, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(rest + b * t_b + i[:, None] * t_i + j[None, :] * t_j, mask=inside, other=0.0).to(tl.float32)
        d = a + t
        if HAS_BASE:
            d += tl.load(
                base + b * base_b + i[:, None] * base_i + j[None, :] * base_j, mask=inside, other=0.0
            ).to(tl.float32)  # fmt: skip
        value, by_a, by_t = _term(a, t, d, beta, tau)
        if WANT_SUMS:
            total += tl.sum(value, axis=1)
        place = (b * p + i[:, None]) * q + j[None, :]
        if WANT_A:
            tl.store(grad_a + place, by_a * tl.load(scale + b), mask=inside)
        if WANT_T:
            tl.store(grad_t + place, by_t * tl.load(scale + b), mask=inside)
    if WANT_SUMS:
        tl.store(sums + (split * batch + b) * p + i, total, mask=i < p)


def _grid(batch: int, p: int, q: int) -> tuple[tuple[int, int], int]:
    """(row blocks, splits of the columns), and the columns of a split, a multiple of a block's."""
    blocks, widths = batch * triton.cdiv(p, ROWS), triton.cdiv(q, COLUMNS)
    share = triton.cdiv(widths, min(widths, triton.cdiv(PROGRAMS, blocks))) * COLUMNS
    return (blocks, triton.cdiv(q, share)), share


def _padded(rank: int) -> int:
    return max(SMALLEST_RANK, triton.next_power_of_2(rank))


def _left_sweep(la, ra, lt, rt, base, beta, tau, want_sums, want_a, want_t):
    """Row sums, and gradients by the left factors, each or None."""
    batch, p, rank_a = la.shape
    q, rank_t = ra.shape[2], lt.shape[2]
    grid, share = _grid(batch, p, q)
    sums = la.new_empty(grid[1], batch, p) if want_sums else None
    grad_a = la.new_empty(grid[1], batch, p, rank_a) if want_a else None
    grad_t = la.new_empty(grid[1], batch, p, rank_t) if want_t else None
    with torch.cuda.device_of(la):
        _factored_kernel[grid](
            la, ra, lt, rt, la if base is None else base,
            *(la if out is None else out for out in (sums, grad_a, grad_t)),
            p, q, rank_a, rank_t, share, batch, beta, tau,
            *la.stride(), *ra.stride(), *lt.stride(), *rt.stride(), *((0, 0, 0) if base is None else base.stride()),
            HAS_BASE=base is not None, WANT_SUMS=want_sums, WANT_A=want_a, WANT_T=want_t,
            RANK_A=_padded(rank_a), RANK_T=_padded(rank_t), ROWS=ROWS, COLUMNS=COLUMNS, num_stages=1,
        )  # fmt: skip
    return [None if out is None else out.sum(0) for out in (sums, grad_a, grad_t)]


def factored_sweep(
    factors: Sequence[torch.Tensor], base: torch.Tensor | None, beta: float, tau: float, needs: Sequence[bool]
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """As `fishergeo.updates._tiles.factored_sweep`, for float32 factors of rank 1 to `LARGEST_RANK`."""
    la, ra, lt, rt = factors
    sums, grad_la, grad_lt = _left_sweep(la, ra, lt, rt, base, beta, tau, True, needs[0], needs[2])
    grad_ra = grad_rt = None
    if needs[1] or needs[3]:
        turned = None if base is None else base.mT
        _, right_a, right_t = _left_sweep(ra.mT, la.mT, rt.mT, lt.mT, turned, beta, tau, False, needs[1], needs[3])
        grad_ra, grad_rt = (None if g is None else g.mT for g in (right_a, right_t))
    return sums, [grad_la, grad_ra, grad_lt, grad_rt]


def _dense_sweep(part, rest, base, scale, beta, tau, want_sums, want_a, want_t):
    batch, p, q = part.shape
    grid, share = _grid(batch, p, q)
    sums = part.new_empty(grid[1], batch, p, dtype=torch.float32) if want_sums else None
    grads = [part.new_empty(part.shape) if want else None for want in (want_a, want_t)]
    with torch.cuda.device_of(part):
        _dense_kernel[grid](
            part, rest, part if base is None else base, part if scale is None else scale,
            *(part if out is None else out for out in (sums, *grads)),
            p, q, share, batch, beta, tau,
            *part.stride(), *rest.stride(), *((0, 0, 0) if base is None else base.stride()),
            HAS_BASE=base is not None, WANT_SUMS=want_sums, WANT_A=want_a, WANT_T=want_t, ROWS=ROWS, COLUMNS=COLUMNS,
        )  # fmt: skip
    return sums, grads


def dense_sums(
    part: torch.Tensor, rest: torch.Tensor, base: torch.Tensor | None, beta: float, tau: float
) -> torch.Tensor:
    """As `fishergeo.updates._tiles.dense_sums`, for float32 and narrower; always float32."""
    return _dense_sweep(part, rest, base, None, beta, tau, True, False, False)[0].sum(0)


def dense_gradients(
    part: torch.Tensor,
    rest: torch.Tensor,
    base: torch.Tensor | None,
    scale: torch.Tensor,
    beta: float,
    tau: float,
    needs: Sequence[bool],
) -> list[torch.Tensor | None]:
    """As `fishergeo.updates._tiles.dense_gradients`, for float32 and narrower."""
    return _dense_sweep(part, rest, base, scale.contiguous(), beta, tau, False, *needs)[1]


def probe(device: torch.device) -> None:
    """Run problems of one entry through both kernels, the largest rank included, before the first real one needs them.

    Raises:
        Exception: whatever triton raises where it cannot compile or launch, or RuntimeError if a result is wrong.
    """
    for rank in (1, LARGEST_RANK):
        row, base = torch.ones(1, 1, rank, device=device), torch.ones(1, 1, 1, device=device)
        # A = T = W0 = 1 and |D| = τ = 3: η = 1 + σ(0) = 3/2, and the gradient by A and by T is 3/2 + σ'(0) = 7/4.
        sums, grads = factored_sweep((row / rank, row.mT, row / rank, row.mT), base, 1.0, 3.0, [True] * 4)
        sums_too = dense_sums(base, base, base, 1.0, 3.0)
        dense = dense_gradients(base, base, base, torch.ones(1, device=device), 1.0, 3.0, (True, True))
        wanted = [1.5, 1.75, 1.75 / rank, 1.75, 1.75 / rank, 1.5, 1.75, 1.75]
        found = [sums, *grads, sums_too, *dense]
        off = max(float((x - y).abs().max()) for x, y in zip(found, wanted, strict=True) if x is not None)
        if off > 1e-5:
            raise RuntimeError(f"a problem of one entry and rank {rank} came out wrong by {off:.3g}")
