"""What one more pass over the data makes of a one-pass sketch: a power step with certified residuals."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fishergeo._checks import check_integer
from fishergeo._linalg import orthonormalise
from fishergeo.operators import LayerProducts, SymmetricOperator
from fishergeo.sketching import SketchOperator, factor_eigh, nystrom_factor
from fishergeo.sketching.error import check_trace
from fishergeo.spectral.spectrum import Spectrum


def second_pass(
    sketch: Mapping[str, SymmetricOperator],
    stream: LayerProducts,
    k: int,
    *,
    tol: float = 1e-2,
    traces: Mapping[str, float] | None = None,
) -> dict[str, Spectrum]:
    """The leading pairs of every layer from a sketch and one pass of products with its basis.

    The Nyström formula is that of Tropp et al. (2017), its certificate this project's own derivation. With U the sketch's orthonormal basis and Y = F U, the Nyström approximation F̂ = Y (UᵀY)⁺ Yᵀ is a step of block
    subspace iteration with its Rayleigh-Ritz step folded in. It needs no third product for its certificates: E = F − F̂
    is positive semi-definite and vanishes on U, so for a unit eigenvector v of F̂

        ‖F v − θ v‖ = ‖E (v − U Uᵀ v)‖ ≤ (tr F − tr F̂)·‖v − U Uᵀ v‖,

    and the captured energy vᵀFv lies between θ and θ + (tr F − tr F̂)·‖v − U Uᵀ v‖².

    Args:
        sketch: layer -> sketch; a :class:`fishergeo.Fisher` gives all its columns, any other operator its ``vectors``
            or, lacking those, its leading eigenvectors.
        stream: multiplies the blocks of all layers in one pass: :class:`fishergeo.StreamingFisher`.
        k: pairs a layer, at most the columns of the sketch.
        tol: pairs with a certificate of at most tol·|θ| are marked converged.
        traces: layer -> exact trace of F; by default those of ``stream``, else each sketch's ``full_trace``.

    Returns:
        layer -> Spectrum of min(k, columns) pairs with ``passes`` = 1. ``stopped`` says ``"tolerance"`` where all pairs
        meet tol, else ``"passes"``; nothing is warned of, since no more was to be done.

    Raises:
        TypeError: if k is not an int.
        ValueError: for a layer without a trace or with one that is less than the sum of the values found, or k < 1.
        KeyError: for a layer of ``sketch`` that ``stream`` lacks.

    Examples:
        >>> model = torch.nn.Linear(3, 2)
        >>> batches = [(torch.eye(3), torch.zeros(3, 2))]
        >>> def loss(model, batch):
        ...     return (model(batch[0]) - batch[1]).square().sum(1)
        ...
        >>> sketch = fg.estimate_fisher(model, batches, rank=2, loss=loss)
        >>> better = fg.second_pass(sketch, fg.StreamingFisher(model, batches, loss=loss), 2)
        >>> better[""].values.shape, better[""].passes
        (torch.Size([2]), 1)
    """
    check_integer("k", k, low=1)
    bases = {name: _basis(sketch, name).to(stream.dtype) for name in sketch}
    products = stream.multi_matmul(bases)
    known: Mapping[str, float] = traces if traces is not None else getattr(stream, "traces", {})
    found = {}
    for name, basis in bases.items():
        total = known.get(name)
        if total is None:
            full = getattr(sketch[name], "full_trace", None)
            if full is None:
                raise ValueError(f"layer {name!r}: its trace is not known; pass traces=")
            total = float(full)
        found[name] = _refined(name, basis, products[name].to(basis.device), min(k, basis.shape[1]), total, tol)
    return found


def _basis(sketch: Mapping[str, SymmetricOperator], name: str) -> Tensor:
    """All that a sketch knows of the leading space, orthonormal."""
    operator = sketch[name]
    if not isinstance(operator, SketchOperator) or operator.factor is None:
        return operator.known_eigenpairs()[1]
    columns = operator.factor
    values, vectors = factor_eigh(columns, min(columns.shape))
    rounding = torch.finfo(columns.dtype).eps * len(columns)
    kept = vectors[:, values > rounding * values[0]] if bool(values[0] > 0) else vectors[:, :1]
    return orthonormalise(kept, kept[:, :0], 0.0).to(columns.dtype)


def _refined(name: str, basis: Tensor, product: Tensor, k: int, trace: float, tol: float) -> Spectrum:
    eps = torch.finfo(product.dtype).eps
    values, vectors = factor_eigh(nystrom_factor(product, basis), basis.shape[1])
    check_trace(trace, float(values.sum()), eps, len(values), name)
    missing = max(0.0, trace - float(values.sum()))
    values, vectors, wide = values[:k], vectors[:, :k], basis.double()
    outside = torch.linalg.vector_norm(vectors - wide @ (wide.T @ vectors), dim=0)
    # Rounding: of the product, and the shift that keeps the factorisation positive.
    rounding = 4 * eps * len(basis) ** 0.5 * float(torch.linalg.matrix_norm(product.double()))
    residuals = missing * outside + rounding
    converged = residuals <= (tol * values.abs()).clamp_min(2 * rounding)
    work = product.dtype
    return Spectrum(
        values.to(work), vectors.to(work), residuals.to(work), converged, 1, basis.shape[1],
        "tolerance" if bool(converged.all()) else "passes",
    )  # fmt: skip
