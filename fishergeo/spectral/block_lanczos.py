"""Leading eigenpairs of symmetric operators known by their products, one operator or many in lockstep."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fishergeo._checks import check_choice, check_finite, check_integer, check_number, check_tensor
from fishergeo.operators import BlackBox, EachOperator, LayerProducts, Product, SymmetricOperator, black_box
from fishergeo.spectral.krylov import WHICH, KrylovRun, Plan, read_checkpoint, write_checkpoint
from fishergeo.spectral.spectrum import Spectrum, enforce


def lanczos(
    op: BlackBox,
    k: int,
    *,
    size: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    which: str = "largest",
    tol: float | None = None,
    energy: float | None = None,
    trace: float | Tensor | None = None,
    max_passes: int = 300,
    block: int | None = None,
    basis: int | None = None,
    start: Tensor | None = None,
    recheck: bool = True,
    strict: bool = False,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Spectrum:
    """The k leading eigenpairs of a symmetric operator, certified: block Lanczos with thick restart.

    After Wu and Simon (2000), with the certificates of Parlett (1998). Full reorthogonalisation, a random block start that is the same on every device, soft locking, deflation at
    breakdown. With ``block >= k``, the default, an eigenvalue repeated up to k times is found with all its copies;
    a narrower block finds at most ``block`` copies for sure. Any indefinite operator will do; ``energy`` is for
    positive semi-definite ones.

    Args:
        op: an operator, a symmetric tensor (dense or sparse), a SciPy LinearOperator, or a function of a (size, c) block.
        k: pairs, from 1 to the size.
        size: size of a function's blocks.
        dtype: dtype of a function's blocks, float64 if left out.
        device: device of a function's blocks, the CPU if left out.
        which: ``"largest"``, ``"smallest"`` (ascending) or ``"magnitude"`` (by |λ|, descending).
        tol: a pair has converged when ‖A v − θ v‖ ≤ tol·|θ|, or is at rounding level: 4·ε·√size·‖A‖, or 4·ε·‖A‖ for an ε
            of half precision, whose sums are made in float32. √ε if left out.
        energy: stop as soon as the leading values hold this share of the trace, converged or not, and return just
            those pairs: the captured energy of an orthonormal V is Σ θ exactly.
        trace: trace of the operator, a number or scalar tensor, for ``energy``; taken from a SymmetricOperator if left
            out. One that is less than the sum of what was found is refused.
        max_passes: block products allowed, each a pass over the data of a streamed operator; the final check counts.
        block: columns of a product, k if left out.
        basis: most columns kept; memory is 2·size·basis numbers. 4k + 4·block if left out, at least 60.
        start: (size, c), an old basis or a sketch's vectors to start from. Random columns join it up to a block; what
            the basis has no room for is left out. With ``c >= block`` no random ones join: a start that is itself an
            invariant subspace then hides what it lacks.
        recheck: residuals are recomputed with the operator from the final vectors, ⌈k/block⌉ passes more, where the
            allowance permits; otherwise they come from the products already made, which is the same to rounding.
        strict: raise if the operator's pairs do not converge, rather than warn.
        seed: seed of the random block.
        checkpoint: a file written after every block step. If it exists, the run goes on from there, on the CPU bit
            for bit as if it had never stopped; a finished one is read back, and goes on if it lacked passes and has more now. The operator must be the same.

    Returns:
        Spectrum of k pairs (fewer with ``energy``) in float32 or float64.

    Raises:
        TypeError: for arguments of the wrong type.
        ValueError: for arguments out of range, an operator that is not symmetric, a checkpoint of another run.
        FloatingPointError: if a product holds NaN or infinity.
        ConvergenceError: with ``strict``.

    Warns:
        ConvergenceWarning: without ``strict``.

    Examples:
        >>> A = torch.diag(torch.arange(1.0, 101.0, dtype=torch.float64))
        >>> found = fg.lanczos(lambda block: A @ block, 2, size=100)
        >>> [round(v, 4) for v in found.values.tolist()], found.converged
        ([100.0, 99.0], True)
    """
    product, n, kind, place = black_box(op, size, dtype, device)
    check_integer("k", k, low=1, high=n)
    if trace is None and energy is not None:
        if not isinstance(op, SymmetricOperator):
            raise ValueError("energy needs the trace: pass trace=, or an operator that knows its own")
        trace = op.trace()
    found = lanczos_layers(
        EachOperator({"": product}, {"": n}, kind, place), k, which=which, tol=tol, energy=energy,
        traces=None if trace is None else {"": float(trace)}, max_passes=max_passes, block=block, basis=basis,
        start=None if start is None else {"": start}, recheck=recheck, strict=strict, seed=seed,
        checkpoint=checkpoint,
    )  # fmt: skip
    return found[""]


def lanczos_layers(
    ops: LayerProducts | Mapping[str, SymmetricOperator],
    k: int,
    *,
    which: str = "largest",
    tol: float | None = None,
    energy: float | None = None,
    traces: Mapping[str, float] | None = None,
    max_passes: int = 300,
    block: int | None = None,
    basis: int | None = None,
    start: Mapping[str, Tensor] | None = None,
    recheck: bool = True,
    strict: bool = False,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
) -> dict[str, Spectrum]:
    """:func:`lanczos` for many operators in lockstep: one pass is one block step of every layer that is not done.

    The method is that of :func:`lanczos` (Wu and Simon 2000); the lockstep is this project's own.

    Args:
        ops: what multiplies the blocks of all layers together, such as :class:`fishergeo.StreamingFisher`; or a
            mapping of operators, such as a :class:`fishergeo.Fisher`, symmetric tensors or SciPy LinearOperators. Each
            is multiplied in its own dtype; vectors are of the widest of all.
        k: pairs; of a layer smaller than that, all.
        which: end of the spectrum that is wanted; here and in all that is not named, as in :func:`lanczos`.
        tol: tol of every layer.
        energy: share of each layer's trace at which it is done.
        traces: layer -> trace, for ``energy``; else the attribute ``traces`` of ``ops`` or the operators' own.
        max_passes: block products allowed, each one pass for all layers.
        block: columns of a layer's product.
        basis: most columns kept a layer.
        start: layer -> (size, c), for some or all layers.
        recheck: multiply the final vectors once more.
        strict: raise at the first layer that has not converged, once all are done.
        seed: seed of random blocks; each layer has its own.
        checkpoint: one file for all layers.

    Returns:
        layer -> Spectrum. ``passes`` of a layer counts the passes in which it took part.

    Raises:
        TypeError, ValueError: see :func:`lanczos`.
        FloatingPointError: naming the layer.
        ConvergenceError: with ``strict``.

    Examples:
        >>> ops = {"a": fg.DenseOperator(torch.diag(torch.tensor([3.0, 1.0])).double())}
        >>> found = fg.lanczos_layers(ops, 1)
        >>> round(float(found["a"].values[0]), 4)
        3.0
    """
    check_integer("k", k, low=1)
    check_choice("which", which, WHICH)
    check_integer("max_passes", max_passes, low=1)
    check_integer("seed", seed, low=0)
    if energy is not None:
        check_number("energy", energy, low=1e-12, high=1.0)
        if which != "largest":
            raise ValueError(f"energy is held by the largest values, but which={which!r}")
    source: Any = ops
    kinds: dict[str, torch.dtype] = {}  # of single operators
    if isinstance(ops, Mapping):
        if not ops:
            raise ValueError("ops is empty: at least one operator is needed")
        if energy is not None and traces is None and all(hasattr(op, "trace") for op in ops.values()):
            traces = {name: float(op.trace()) for name, op in ops.items()}
        boxes = {name: black_box(op) for name, op in ops.items()}
        kinds = {name: kind for name, (_, _, kind, _) in boxes.items()}
        ops = EachOperator(
            {name: _as_its_own(product, kind, device) for name, (product, _, kind, device) in boxes.items()},
            {name: size for name, (_, size, _, _) in boxes.items()},
            reduce(torch.promote_types, kinds.values()),
            next(iter(boxes.values()))[3],
        )
    # A streaming operator learns its traces in the first pass, so they are looked up when they are needed.
    lookup: Any = traces if traces is not None else getattr(source, "traces", None)
    if energy is not None and lookup is None:
        raise ValueError("energy needs the trace of every layer: pass traces=")
    unknown = sorted(set(start or {}) - set(ops.sizes))
    if unknown:
        raise ValueError(f"start has layers that ops lacks: {unknown}; it has {sorted(ops.sizes)}")
    dtype = torch.promote_types(ops.dtype, torch.float32)
    tol = torch.finfo(dtype).eps ** 0.5 if tol is None else check_number("tol", tol, low=0.0, high=1.0)
    runs: dict[str, KrylovRun] = {}
    for name, size in ops.sizes.items():
        guess = None if start is None else start.get(name)
        if guess is not None:
            check_finite("start", check_tensor("start", guess, min_dim=2))
            if guess.ndim != 2 or len(guess) != size:
                raise ValueError(f"start must be ({size}, c), got shape {tuple(guess.shape)}")
        plan = _plan(size, k, block, basis, tol, which, energy, _reader(lookup, name), max_passes, recheck, seed)
        eps = torch.finfo(kinds.get(name, ops.dtype)).eps
        runs[name] = KrylovRun(size, plan, dtype, eps, ops.device, name, guess)
    with torch.no_grad():
        _drive(ops, runs, None if checkpoint is None else Path(checkpoint))
    return {name: enforce(run.spectrum(), name, strict) for name, run in runs.items()}


def _as_its_own(product: Product, dtype: torch.dtype, device: torch.device) -> Product:
    return lambda block: product(block.to(device, dtype))


def _reader(lookup: Any, name: str) -> Callable[[], float] | None:
    return None if lookup is None else lambda: float(lookup[name])


def _plan(
    size: int, k: int, block: int | None, basis: int | None, tol: float, which: str, energy: float | None,
    trace: Callable[[], float] | None, max_passes: int, recheck: bool, seed: int,
) -> Plan:  # fmt: skip
    k = min(k, size)
    width = k if block is None else min(check_integer("block", block, low=1), size)
    if basis is None:
        basis = max(4 * (k + width), 60)
    elif check_integer("basis", basis, low=1) < min(size, k + 2 * width):
        raise ValueError(f"basis={basis} is too small: k={k} pairs and two blocks of {width} need {k + 2 * width}")
    return Plan(k, width, min(basis, size), tol, which, energy, trace, max_passes, recheck, seed)


def _drive(ops: LayerProducts, runs: dict[str, KrylovRun], checkpoint: Path | None) -> None:
    if checkpoint is not None and checkpoint.exists():
        read_checkpoint(checkpoint, runs)
    while True:
        blocks = {name: run.request() for name, run in runs.items() if not run.done}
        if not blocks:
            return
        products = ops.multi_matmul(blocks)
        for name in blocks:
            runs[name].receive(products[name])
        if checkpoint is not None:
            write_checkpoint(checkpoint, runs)
