"""A one-pass, mergeable Nyström sketch of any stream of positive semi-definite terms, with an estimate of its error.

Tropp, Yurtsever, Udell and Cevher (2017), "Fixed-rank approximation of a positive-semidefinite matrix from streaming
data". Only Y = F Ω is kept, which is linear in F: sketches of shards, processes or decayed pasts add up exactly. Some
columns of Ω are held back from the approximation F̂ and measure it.
"""

from __future__ import annotations

import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from fishergeo._checks import HALF_DTYPES, check_finite, check_integer, check_number, check_tensor
from fishergeo._linalg import directions
from fishergeo.operators import BlackBox, SpectralOperator, SymmetricOperator, black_box
from fishergeo.sketching.error import ErrorEstimate, factor_error
from fishergeo.sketching.psd_sketch import factor_eigh, nystrom_factor


class NystromSketch:
    """Σ_i F_i of positive semi-definite terms, known through Y = F Ω and, where it is given, the exact trace.

    F̂ = Y(ΩᵀY)⁺Yᵀ, the Nyström approximation in the stabilised form of Tropp et al. (2017).

    Use: multiply each term by :attr:`test_matrix` and give the product to :meth:`add`; or hand terms to
    :meth:`add_operator`. Read :meth:`eigh`, :meth:`operator` and :meth:`error`.

    Args:
        size: size of the terms.
        columns: columns of Ω; with ``columns >= size`` the sketch is exact. The best rank-r part wants 2r columns or
            more.
        seed: seed of Ω and the probes. Sketches add up if size, columns, probes, seed and name are equal.
        probes: columns held back to measure the error; 0 for none.
        name: name of the layer.
        dtype: dtype of the sums, float32 or float64.
        device: device of the sums.

    Raises:
        TypeError: for arguments of the wrong type.
        ValueError: for arguments out of range.

    Examples:
        >>> sketch = fg.NystromSketch(size=3, columns=3, probes=0)
        >>> sketch.add_operator(torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)))
        >>> [round(v, 6) for v in sketch.eigh(2)[0].tolist()]
        [3.0, 2.0]
    """

    def __init__(
        self,
        size: int,
        columns: int,
        *,
        seed: int = 0,
        probes: int = 8,
        name: str = "",
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        self.size = check_integer("size", size, low=1)
        self.columns = min(check_integer("columns", columns, low=1), size)
        self.probes = check_integer("probes", probes, low=0)
        self.seed, self.name = seed, name
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype must be float32 or float64, got {dtype}")
        omega = torch.linalg.qr(directions(size, self.columns, seed, f"{name}/sketch"))[0]
        held = directions(size, self.probes, seed, f"{name}/probes") * size**0.5
        self.test_matrix = torch.cat([omega, held], 1).to(device, dtype)
        self.product = torch.zeros_like(self.test_matrix)
        self.trace: float | None = 0.0
        self._eps = torch.finfo(dtype).eps  # of the coarsest product that was added
        self._half: torch.dtype | None = None  # of a product whose rounding the bounds of the error do not cover

    def add(self, product: Tensor, trace: float | Tensor | None = None) -> None:
        """Adds F_i :attr:`test_matrix`.

        Args:
            product: (size, columns + probes), in the dtype that it was computed in.
            trace: tr(F_i), a number or scalar tensor; once it is missing, the sum's trace is unknown.

        Raises:
            TypeError: if it is not a floating tensor.
            ValueError: if the shape is wrong or NaN or infinity is in it.
        """
        check_tensor("product", product)
        if product.shape != self.product.shape:
            raise ValueError(f"product must have shape {tuple(self.product.shape)}, got {tuple(product.shape)}")
        check_finite("product", product)
        # Rounding of half precision is found by the factorisation itself: a shift of its size would cost more than it saves.
        self._eps = max(self._eps, torch.finfo(torch.promote_types(product.dtype, torch.float32)).eps)
        self._half = product.dtype if product.dtype in HALF_DTYPES else self._half
        self.product = self.product + product.to(self.product)
        self.trace = None if trace is None or self.trace is None else self.trace + float(trace)

    def add_operator(self, term: SymmetricOperator | Tensor | LinearOperator, weight: float = 1.0) -> None:
        """Adds weight·term; of an operator or dense matrix the trace is taken along, and half precision is widened first.

        Args:
            term: an operator, a symmetric tensor (size, size), dense or sparse, or a SciPy LinearOperator.
            weight: not negative.

        Raises:
            TypeError: for a term that is none of them, or a weight that is no number.
            ValueError: for a term of another size or not symmetric, or a negative weight.
        """
        check_number("weight", weight, low=0.0)
        wide = _widened(term)
        matmul, size, dtype, device = black_box(wide)
        if size != self.size:
            raise ValueError(f"term has size {size}, the sketch {self.size}")
        product = weight * matmul(self.test_matrix.to(device, dtype))
        trace = _trace(wide)
        self.add(product, None if trace is None else weight * trace)

    def merge(self, other: NystromSketch) -> NystromSketch:
        """The sketch of both sums; neither is changed.

        Args:
            other: a sketch with the same test matrix: size, columns, probes, seed, name and dtype.

        Raises:
            ValueError: if the two have not the same test matrix.
        """
        mine, theirs = (
            (s.size, s.columns, s.probes, s.seed, s.name, str(s.product.dtype)) for s in (self, other)
        )  # fmt: skip
        if mine != theirs:
            raise ValueError(f"sketches differ in (size, columns, probes, seed, name, dtype): {mine} and {theirs}")
        merged = self.scaled(1.0)
        merged.add(other.product, other.trace)
        merged._eps, merged._half = max(self._eps, other._eps), self._half or other._half
        return merged

    def scaled(self, weight: float) -> NystromSketch:
        """The sketch of weight·F, weight ≥ 0: exponential forgetting.

        Raises:
            TypeError: for a weight that is no number.
            ValueError: for a negative weight.
        """
        check_number("weight", weight, low=0.0)
        result = NystromSketch(
            self.size, self.columns, seed=self.seed, probes=self.probes, name=self.name,
            dtype=self.product.dtype, device=self.product.device,
        )  # fmt: skip
        result.product = self.product * weight
        result._eps, result._half = self._eps, self._half
        result.trace = None if self.trace is None else self.trace * weight
        return result

    def factor(self) -> Tensor:
        """B, (size, columns), with F̂ = B Bᵀ ≤ F up to rounding."""
        c = self.columns
        return nystrom_factor(self.product[:, :c], self.test_matrix[:, :c], self._eps)

    def eigh(self, k: int | None = None) -> tuple[Tensor, Tensor]:
        """The k leading eigenpairs of F̂, at most ``columns``: (values (k,), vectors (size, k)).

        Raises:
            TypeError: if k is not an int.
            ValueError: for k out of range.
        """
        k = self.columns if k is None else check_integer("k", k, low=1, high=self.columns)
        values, vectors = factor_eigh(self.factor(), k)
        return values.to(self.product.dtype), vectors.to(self.product.dtype)

    def operator(self, k: int | None = None, side: str = "output") -> SpectralOperator:
        """F̂, cut to rank k, as an operator; ``full_trace`` is that of F where it is known.

        Args:
            k: rank, all columns if left out.
            side: side of a layer's weight that the matrix stands for, see :class:`fishergeo.SymmetricOperator`.

        Raises:
            TypeError: if k is not an int.
            ValueError: for k out of range.
        """
        values, vectors = self.eigh(k)
        return SpectralOperator(values, vectors, None if self.trace is None else values.new_tensor(self.trace), side)

    def error(self, k: int | None = None, level: float = 0.95) -> ErrorEstimate:
        """How far F̂, cut to rank k, is from F.

        Args:
            k: rank, all columns if left out.
            level: probability of the bounds.

        Returns:
            ErrorEstimate.

        Raises:
            TypeError: for arguments of the wrong type.
            ValueError: if no probes were held back, for arguments out of range, a trace that is less than that of F̂, or
                products in half precision, whose rounding no bound covers.
        """
        k = self.columns if k is None else check_integer("k", k, low=1, high=self.columns)
        if self._half is not None:
            raise ValueError(
                f"products of {self._half} were added, whose rounding the bounds on the error do not cover; make them "
                "in float32"
            )
        if self.probes and self.columns == self.size == k:
            check_number("level", level, low=0.5, high=1 - 1e-9)
            return ErrorEstimate(0.0, 0.0, 0.0, 0.0, 1.0, level)
        probes, images = (x[:, self.columns :] for x in (self.test_matrix, self.product))
        return factor_error(*self.eigh(), probes, images, self.trace, level, k, self._eps)


def _widened(op: BlackBox) -> BlackBox:
    """The same numbers in float32 where they are in half precision, since products are rounded to what they are in."""
    if isinstance(op, SymmetricOperator):
        return op.widened()
    return op.float() if isinstance(op, Tensor) and op.dtype in HALF_DTYPES else op


def _trace(op: BlackBox) -> float | None:
    """tr(op) of what knows its own."""
    if isinstance(op, SymmetricOperator):
        return float(op.trace())
    if isinstance(op, Tensor) and op.layout == torch.strided:
        return float(op.detach().diagonal().double().sum())
    return None


def nystrom(
    op: BlackBox, columns: int, *, size: int | None = None, seed: int = 0, probes: int = 8,
    trace: float | Tensor | None = None,
) -> NystromSketch:  # fmt: skip
    """One product with ``columns + probes`` columns: the Nyström approximation of a positive semi-definite operator.

    By the formula of Tropp et al. (2017); see :class:`NystromSketch`.

    Args:
        op: an operator, a symmetric tensor (size, size), a SciPy LinearOperator, or a function of a (size, c) block; any
            floating dtype, products and sums are in float32 or float64.
        columns: columns of the sketch.
        size: size of a function's blocks.
        seed: seed of the test matrix.
        probes: columns held back to measure the error with.
        trace: tr(op), a number or scalar tensor, where it is known exactly; taken from an operator or a dense tensor if
            left out. :meth:`~NystromSketch.error` refuses one that is less than what was found.

    Returns:
        NystromSketch: read :meth:`~NystromSketch.eigh`, :meth:`~NystromSketch.operator`, :meth:`~NystromSketch.error`.

    Raises:
        FloatingPointError: once read, if the operator is far from positive semi-definite.
        TypeError: for arguments of the wrong type.
        ValueError: for arguments out of range.

    Examples:
        >>> A = torch.diag(torch.tensor([3.0, 2.0, 0.0], dtype=torch.float64))
        >>> [round(v, 6) for v in fg.nystrom(A, 2, probes=0).eigh(2)[0].tolist()]
        [3.0, 2.0]
    """
    op = _widened(op)
    product, n, dtype, device = black_box(op, size)
    trace = _trace(op) if trace is None else check_number("trace", float(trace), low=0.0)
    work = torch.promote_types(dtype, torch.float32)
    sketch = NystromSketch(n, columns, seed=seed, probes=probes, dtype=work, device=device)
    sketch.add(product(sketch.test_matrix.to(dtype)), trace)
    return sketch
