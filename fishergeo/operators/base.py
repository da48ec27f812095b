"""The protocol of a layer's symmetric operators, and the two that its own algebra makes: dense ones and sums.

A one-sided operator has the shape of one side of W: (p, p) for ``side="output"``, (q, q) for ``side="input"``. A
two-sided one acts on vec(W), row-major, and has shape (pq, pq).
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor

from fishergeo._checks import FLOAT_DTYPES, HALF_DTYPES, check_choice, check_finite, check_number
from fishergeo._linalg import leading_pairs

DENSE_LIMIT = 8192
"""The largest operator, of those known by products alone, whose eigenpairs are found by making it dense."""

ROUNDINGS = 4
"""Roundings of the largest eigenvalue within which another may as well be zero; Grams of too few rows were seen to reach 1.1."""

SIDES = ("output", "input")
"""What a one-sided matrix may stand for."""


class SymmetricOperator(abc.ABC):
    """A real symmetric operator, known by its action.

    Powers, inverses and the like are by definition those of its eigenvalues; they are computed in float64, and operators
    come back in this one's dtype. F is the operator, ΔW an update of the layer's weight.

    Args:
        size: the number of rows and of columns.

    Attributes:
        shape: (size, size).
        dtype: floating dtype of its numbers and of its products; what it is multiplied with is cast to it.
        device: device of its tensors.
        side: ``"output"``, ``"input"`` or ``"both"``: which side of W it acts on.

    Raises:
        TypeError: if its numbers are not of a real floating dtype, in which products would be cut to integers.
        ValueError: for an unknown side.

    Examples:
        >>> op = fg.DenseOperator(torch.diag(torch.tensor([4.0, 1.0])))
        >>> float(op.trace()), op.sqrt().to_dense().diagonal().tolist()
        (5.0, [2.0, 1.0])
    """

    _kinds: ClassVar[dict[str, type[SymmetricOperator]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        SymmetricOperator._kinds[cls.__name__] = cls

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device, side: str = "output") -> None:
        if dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"a {type(self).__name__} must be of a real floating dtype, got {dtype}; convert its tensors with "
                ".to(torch.float32)"
            )
        check_choice("side", side, ("output", "input", "both"))
        self.shape = (size, size)
        self.dtype = dtype
        self.device = device
        self.side = side

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, of whatever shape, everything that the operator is made of; :meth:`from_tensors` makes it again.

        Raises:
            TypeError: if it is not made of tensors, as one whose products read the data again.
        """
        raise TypeError(f"a {type(self).__name__} is not made of tensors and cannot be written to a file")

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], side: str = "output") -> Self:
        """The operator of this class whose :meth:`tensors` these were.

        Args:
            tensors: name -> tensor, as :meth:`tensors` gave them, of the shape that each had and any floating dtype.
            side: the side of W that a one-sided operator acts on; a two-sided one knows its own.

        Raises:
            TypeError: if operators of this class are not made of tensors.
            KeyError: if a tensor is missing.
            ValueError: if the tensors do not fit each other.
        """
        raise TypeError(f"a {cls.__name__} is not made of tensors")

    def compact(self) -> SymmetricOperator:
        """The same operator, as a file gives it back: its tensors contiguous, and none that products can do without.

        Products of other strides may round otherwise. Tensors that are contiguous are kept, not copied, and so is an
        operator that is not made of tensors.
        """
        try:
            tensors = self.tensors()
        except TypeError:
            return self
        return self.from_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, self.side)

    def factors(self) -> tuple[Tensor | SymmetricOperator | None, Tensor | SymmetricOperator | None]:
        """S (p, p) and A (q, q) of an operator that acts on vec(W) as kron(S, A), None for an identity.

        By definition, (F, I) for a one-sided operator of the output side and (I, F) for one of the input side. A
        two-sided operator without that form has two None.
        """
        return (self if self.side == "output" else None), (self if self.side == "input" else None)

    @abc.abstractmethod
    def _matmat(self, block: Tensor) -> Tensor:
        """The product with a (size, k) block of the operator's own dtype."""

    @abc.abstractmethod
    def diagonal(self) -> Tensor:
        """The diagonal, (size,)."""

    def trace(self) -> Tensor:
        """Sum of the diagonal, a scalar tensor."""
        return self.diagonal().sum()

    def partial_trace(self, side: str = "output") -> Tensor:
        """The one-sided matrix that it implies: E[G Gᵀ] or E[Gᵀ G] where it is E[vec(G) vec(G)ᵀ], the other side traced out.

        Args:
            side: ``"output"`` or ``"input"``.

        Returns:
            (p, p) or (q, q), symmetric, of the operator's dtype.

        Raises:
            ValueError: for an unknown side, the other side of a one-sided operator, or a two-sided one that does not know
                p and q.
        """
        check_choice("side", side, SIDES)
        if side != self.side:
            raise ValueError(f"a {type(self).__name__} of side {self.side!r} says nothing of the side {side!r} alone")
        return self.to_dense()

    def __matmul__(self, other: Tensor) -> Tensor:
        """Product with a vector (size,) or a block (size, k), differentiable in both.

        Raises:
            ValueError: if the leading dimension of ``other`` is not the operator's size.
        """
        if not isinstance(other, Tensor):
            return NotImplemented
        if other.ndim not in (1, 2) or other.shape[0] != self.shape[1]:
            raise ValueError(f"operator of shape {self.shape} @ tensor of shape {tuple(other.shape)}")
        block = other.to(self.dtype)
        return self._matmat(block[:, None])[:, 0] if other.ndim == 1 else self._matmat(block)

    def to_dense(self) -> Tensor:
        """The whole matrix, (size, size)."""
        return self._matmat(torch.eye(self.shape[0], dtype=self.dtype, device=self.device))

    def eigh(self, k: int | None = None) -> tuple[Tensor, Tensor]:
        """The k largest eigenvalues, descending, and their orthonormal vectors.

        The sign of each vector is fixed by making its entry of largest magnitude positive.

        Args:
            k: number of eigenpairs, all by default.

        Returns:
            (values (k,), vectors (size, k)), in the operator's dtype and, on the CPU, of its precision; see
            :func:`fishergeo._linalg.leading_pairs`.

        Raises:
            ValueError: if k is not between 1 and the size, or for NaN.
        """
        values, vectors = leading_pairs(self._finite(), checked_rank(k, self.shape[0]))
        return values, fix_signs(vectors)

    def known_eigenpairs(self) -> tuple[Tensor, Tensor]:
        """The eigenpairs that are at hand or else all of them: values (k,), descending, and vectors (size, k)."""
        return self.eigh()

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """The same operator for SciPy, on NumPy arrays."""

        def product(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            block = torch.from_numpy(np.ascontiguousarray(array)).to(self.device, self.dtype)
            return (self @ block).detach().cpu().numpy()

        numpy_dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return scipy.sparse.linalg.LinearOperator(
            self.shape, matvec=product, matmat=product, rmatvec=product, rmatmat=product, dtype=numpy_dtype
        )

    def quadratic(self, delta: Any) -> Tensor:
        """The quadratic form of an update ΔW (p, q), differentiable in it.

        One-sided, ``side="output"``: tr(ΔWᵀ F ΔW); ``side="input"``: tr(ΔW F ΔWᵀ). Two-sided: vec(ΔW)ᵀ F vec(ΔW).

        Args:
            delta: a (p, q) tensor, or factors with ``.left`` (p, r) and ``.right`` (r, q) standing for their product;
                then no (p, q) tensor is formed, unless the operator is two-sided and knows nothing better.

        Returns:
            Scalar tensor, float32 or wider where the operator is made of tensors, else of its dtype.

        Raises:
            ValueError: if the shape does not fit, or there are several updates.
        """
        check_single(delta)
        form = self.widened()
        if isinstance(delta, Tensor):
            form._check_delta(*delta.shape)
            return form._quadratic_dense(delta.to(form.dtype))
        left, right = delta.left, delta.right
        form._check_delta(left.shape[0], right.shape[1])
        return form._quadratic_factored(left.to(form.dtype), right.to(form.dtype))

    def widened(self) -> Self:
        """The same operator in float32 where it is in half precision, whose range squares of small updates leave.

        Returns:
            Another operator; this one itself where it is in float32 or float64 already, or is not made of tensors.
        """
        if self.dtype not in HALF_DTYPES:
            return self
        try:
            wide = {name: t.float() if t.dtype in HALF_DTYPES else t for name, t in self.tensors().items()}
            return self.from_tensors(wide, self.side)
        except TypeError:
            return self

    def apply(self, delta: Tensor) -> Tensor:
        """F as it acts on weights: the update whose inner product with ΔW is :meth:`quadratic`, differentiable.

        One-sided, ``side="output"``: F ΔW; ``side="input"``: ΔW F. Two-sided: F vec(ΔW), as a matrix again.

        Args:
            delta: ΔW, (p, q), or several of them, (..., p, q); any floating dtype.

        Returns:
            The same shape, in the operator's dtype.

        Raises:
            ValueError: if the shape does not fit.
        """
        if delta.ndim < 2:
            raise ValueError(f"delta of shape {tuple(delta.shape)} does not fit: it must be (p, q), or (..., p, q)")
        p, q = delta.shape[-2:]
        self._check_delta(p, q)
        batch = delta.to(self.dtype).reshape(-1, p, q)
        if self.side == "output":
            return (
                self._matmat(batch.transpose(0, 1).reshape(p, -1))
                .reshape(p, -1, q)
                .transpose(0, 1)
                .reshape(delta.shape)
            )
        width = q if self.side == "input" else p * q
        return self._matmat(batch.reshape(-1, width).T).T.reshape(delta.shape)

    def _check_delta(self, rows: int, columns: int) -> None:
        size = {"output": rows, "input": columns}.get(self.side, rows * columns)
        if size != self.shape[0]:
            raise ValueError(
                f"delta of shape ({rows}, {columns}) does not fit an operator of shape {self.shape}, side {self.side!r}"
            )

    def _quadratic_dense(self, delta: Tensor) -> Tensor:
        if self.side == "input":
            delta = delta.T
        elif self.side == "both":
            delta = delta.reshape(-1, 1)
        return (delta * self._matmat(delta)).sum()

    def _quadratic_factored(self, left: Tensor, right: Tensor) -> Tensor:
        # tr(RᵀLᵀ F L R) = ⟨Lᵀ F L, R Rᵀ⟩, and the mirror image of it.
        if self.side == "output":
            return ((left.T @ self._matmat(left)) * (right @ right.T)).sum()
        if self.side == "input":
            return ((right @ self._matmat(right.T)) * (left.T @ left)).sum()
        return self._quadratic_dense(left @ right)

    def _finite(self) -> Tensor:
        """The whole matrix, for eigensolvers: of one with NaN they return numbers like any others.

        Raises:
            ValueError: for NaN or infinity.
        """
        dense = self.to_dense()
        check_finite(f"the matrix of this {type(self).__name__}", dense)
        return dense

    def _map(self, function: Callable[[Tensor], Tensor]) -> SymmetricOperator:
        """The operator with the same vectors and ``function`` of the eigenvalues (float64 in, float64 out)."""
        values, vectors = torch.linalg.eigh(self._finite().double())
        return DenseOperator(((vectors * function(values)) @ vectors.T).to(self.dtype), self.side)

    def eigenvalues(self) -> Tensor:
        """All eigenvalues, (size,) float64, in any order.

        Raises:
            ValueError: for NaN.
        """
        return torch.linalg.eigvalsh(self._finite().double())

    def _rounding(self, values: Tensor) -> Tensor:
        """By how much rounding may have moved each of these eigenvalues, all of them in float64: what broadcasts to them."""
        return ROUNDINGS * torch.finfo(self.dtype).eps * values.abs().amax()

    def _damped(self, values: Tensor, damping: float) -> Tensor:
        """Eigenvalues of F + damping·I; zero where those of F, all of them, leave them within rounding of it.

        Rounding makes zero eigenvalues as often positive as negative: their sign says nothing of the rank.

        Raises:
            ValueError: for NaN, or where the damping leaves an eigenvalue negative.
        """
        shifted = self._shifted(values, damping)
        return torch.where(shifted > self._rounding(values), shifted, 0)

    def _shifted(self, values: Tensor, damping: float) -> Tensor:
        """Eigenvalues of F + damping·I, none negative; those of F within rounding of a sum below zero count as zero, and so
        do those that lie below it by √ε of the largest where the damping does not lift them.

        Raises:
            ValueError: for NaN, or where the damping leaves an eigenvalue negative.
        """
        check_finite(f"the eigenvalues of this {type(self).__name__}", values)
        rounding = self._rounding(values)
        # A sum of many terms rounds once in each: thousands of batches in float32 were seen to leave -13 ε of the largest.
        of_sums, noise = 16 * rounding, rounding * torch.finfo(self.dtype).eps ** -0.5 / ROUNDINGS
        if self.dtype in HALF_DTYPES:
            of_sums = noise = rounding
        shifted = torch.where(values < -of_sums, values, values.clamp_min(0)) + damping
        shifted = torch.where((shifted < 0) & (values >= -noise), damping, shifted)
        if bool((shifted < 0).any()):
            raise ValueError(
                f"this {type(self).__name__} is not positive semi-definite: its least eigenvalue is {float(values.min()):.3g}, "
                f"its largest {float(values.max()):.3g}, and damping={damping:g} leaves it negative; pass more"
            )
        return shifted

    def power(self, exponent: float, damping: float = 0.0) -> SymmetricOperator:
        """(F + damping·I) to a real power, of a positive semi-definite F; rounding below zero is taken as zero.

        Args:
            exponent: the power.
            damping: not negative, in the unit of the eigenvalues.

        Raises:
            ValueError: for a negative exponent of a matrix that is singular to the precision of its dtype, an eigenvalue
                that is negative beyond rounding and damping, values that leave the dtype's range, a negative damping, or NaN.
            TypeError: if one of the two is no real number.
        """
        check_number("exponent", exponent)
        check_number("damping", damping, low=0.0)

        def function(values: Tensor) -> Tensor:
            if exponent >= 0:
                image = self._shifted(values, damping) ** exponent
                if not bool(torch.isfinite(image.to(self.dtype)).all()):
                    raise ValueError(
                        f"exponent={exponent:g} of eigenvalues up to {float(values.max()):.3g} leaves the range of {self.dtype}"
                    )
                return image
            shifted = self._damped(values, damping)
            if not bool(torch.isfinite((shifted.min() ** exponent).to(self.dtype))):
                raise ValueError(
                    f"exponent={exponent:g} of a {type(self).__name__} that is singular to the precision of {self.dtype}: "
                    f"its eigenvalues reach from {float(values.min()):.3g} to {float(values.max()):.3g}, and "
                    f"damping={damping:g} is too little; pass more"
                )
            return shifted**exponent

        return self._map(function)

    def sqrt(self) -> SymmetricOperator:
        """The positive semi-definite square root.

        Raises:
            ValueError: for an eigenvalue that is negative beyond rounding, or NaN.
        """
        return self.power(0.5)

    def inverse(self, damping: float = 0.0) -> SymmetricOperator:
        """(F + damping·I)⁻¹.

        Args:
            damping: not negative, in the unit of the eigenvalues.

        Raises:
            ValueError: if that is singular to the precision of its dtype, or has a negative eigenvalue, for a negative
                damping, or NaN.
            TypeError: if damping is no real number.
        """
        return self.power(-1.0, damping)

    def solve(self, rhs: Tensor, damping: float = 0.0) -> Tensor:
        """(F + damping·I)⁻¹ rhs.

        Args:
            rhs: a vector (size,) or a block (size, k).
            damping: damping added to the eigenvalues, as in :meth:`inverse`.

        Returns:
            The shape of ``rhs``.

        Raises:
            ValueError: as :meth:`inverse`.
            TypeError: as :meth:`inverse`.
        """
        return self.inverse(damping) @ rhs

    def logdet(self, damping: float = 0.0) -> Tensor:
        """The logarithm of det(F + damping·I), scalar, float64; −inf if that is singular to the precision of its dtype.

        Args:
            damping: not negative, in the unit of the eigenvalues.

        Raises:
            ValueError: if it has a negative eigenvalue, for a negative damping, or NaN.
            TypeError: if damping is no real number.
        """
        check_number("damping", damping, low=0.0)
        return self._damped(self.eigenvalues(), damping).log().sum()

    def __mul__(self, factor: float) -> SymmetricOperator:
        if isinstance(factor, SymmetricOperator) or not isinstance(factor, int | float):
            return NotImplemented
        return SumOperator([self], [float(factor)])

    __rmul__ = __mul__

    def __add__(self, other: SymmetricOperator) -> SymmetricOperator:
        if not isinstance(other, SymmetricOperator):
            return NotImplemented
        return SumOperator([self, other], [1.0, 1.0])


class DenseOperator(SymmetricOperator):
    """A symmetric matrix held whole.

    Args:
        matrix: (size, size), symmetric, which is not checked; any floating dtype, in which products come.
        side: side of a layer's weight that the matrix stands for, see :class:`SymmetricOperator`.

    Raises:
        ValueError: if it is not square, or for an unknown side.
        TypeError: if its dtype is not a floating one.

    Examples:
        >>> op = fg.DenseOperator(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        >>> [round(v, 4) for v in op.eigh()[0].tolist()]
        [3.0, 1.0]
        >>> (op @ torch.ones(2)).tolist()
        [3.0, 3.0]
    """

    def __init__(self, matrix: Tensor, side: str = "output") -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix must be square, got shape {tuple(matrix.shape)}")
        super().__init__(len(matrix), matrix.dtype, matrix.device, side)
        self.matrix = matrix

    def tensors(self) -> dict[str, Tensor]:
        """``matrix``, (size, size)."""
        return {"matrix": self.matrix}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], side: str = "output") -> Self:
        """The operator whose :meth:`tensors` these were; see :meth:`SymmetricOperator.from_tensors`."""
        return cls(tensors["matrix"], side)

    def _matmat(self, block: Tensor) -> Tensor:
        return self.matrix @ block

    def diagonal(self) -> Tensor:
        """The diagonal, (size,)."""
        return self.matrix.diagonal()

    def to_dense(self) -> Tensor:
        """(size, size), the matrix itself."""
        return self.matrix


class SumOperator(SymmetricOperator):
    """Σ w_j F_j, by the products of its terms.

    Args:
        terms: operators of one shape and side. Sums come in the floating dtype of the first.
        weights: one real number each.

    Raises:
        ValueError: no terms, other than one weight a term, or terms of different shapes or sides.

    Examples:
        >>> one = fg.DenseOperator(torch.eye(2))
        >>> op = fg.SumOperator([one, one], [1.0, 2.0])
        >>> (op @ torch.ones(2)).tolist()
        [3.0, 3.0]
    """

    def __init__(self, terms: list[SymmetricOperator], weights: list[float]) -> None:
        if not terms or len(terms) != len(weights):
            raise ValueError(f"{len(terms)} terms and {len(weights)} weights do not make a sum")
        first = terms[0]
        for term in terms[1:]:
            if term.shape != first.shape or term.side != first.side:
                raise ValueError(f"terms differ: {first.shape} {first.side!r} and {term.shape} {term.side!r}")
        super().__init__(first.shape[0], first.dtype, first.device, first.side)
        self.terms = terms
        self.weights = weights

    def tensors(self) -> dict[str, Tensor]:
        """``weights``, (terms,) float64, and each term's own tensors, (its own shapes), as ``place|class|name``."""
        found = {"weights": torch.tensor(self.weights, dtype=torch.float64)}
        for place, term in enumerate(self.terms):
            found |= {f"{place}|{type(term).__name__}|{name}": tensor for name, tensor in term.tensors().items()}
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], side: str = "output") -> Self:
        """The operator whose :meth:`tensors` these were; see :meth:`SymmetricOperator.from_tensors`."""
        parts: dict[tuple[int, str], dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key != "weights":
                place, kind, name = key.split("|", 2)
                parts.setdefault((int(place), kind), {})[name] = tensor
        terms = [operator_from_tensors(kind, part, side) for (_, kind), part in sorted(parts.items())]
        return cls(terms, tensors["weights"].tolist())

    def _total(self, function: Callable[[SymmetricOperator], Tensor]) -> Tensor:
        parts = [w * function(t).to(self.dtype) for w, t in zip(self.weights, self.terms, strict=True)]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def _matmat(self, block: Tensor) -> Tensor:
        return self._total(lambda term: term @ block)

    def diagonal(self) -> Tensor:
        """The diagonal, (size,)."""
        return self._total(lambda term: term.diagonal())

    def trace(self) -> Tensor:
        """Sum of the diagonal, a scalar tensor."""
        return self._total(lambda term: term.trace())

    def partial_trace(self, side: str = "output") -> Tensor:
        """The same sum of the terms' partial traces, (p, p) or (q, q); see :meth:`SymmetricOperator.partial_trace`."""
        return self._total(lambda term: term.partial_trace(side))

    def quadratic(self, delta: Any) -> Tensor:
        """The same sum of the terms' quadratic forms of ``delta``, a scalar; see :meth:`SymmetricOperator.quadratic`."""
        values = [weight * term.quadratic(delta) for weight, term in zip(self.weights, self.terms, strict=True)]
        work = torch.promote_types(self.dtype, torch.float32)
        return torch.stack([value.to(work) for value in values]).sum()

    def _check_delta(self, rows: int, columns: int) -> None:
        for term in self.terms:
            term._check_delta(rows, columns)


def operator_from_tensors(kind: str, tensors: Mapping[str, Tensor], side: str = "output") -> SymmetricOperator:
    """The operator whose class and :meth:`SymmetricOperator.tensors` were written to a file.

    Args:
        kind: the name of its class, ``type(operator).__name__``.
        tensors: name -> tensor, as ``operator.tensors()`` gave them, of the shape that each had and any floating dtype.
        side: ``operator.side``; a two-sided operator knows its own.

    Returns:
        SymmetricOperator of that class, on the device of the tensors.

    Raises:
        ValueError: for a class that is not known, or tensors that do not fit each other.
        KeyError: if a tensor is missing.

    Examples:
        >>> op = fg.DiagonalOperator(torch.ones(2, 3))
        >>> again = fg.operator_from_tensors("DiagonalOperator", op.tensors())
        >>> type(again).__name__, again.shape
        ('DiagonalOperator', (6, 6))
    """
    if kind not in SymmetricOperator._kinds:
        raise ValueError(
            f"there is no operator class {kind!r}; there are {', '.join(sorted(SymmetricOperator._kinds))}"
        )
    return SymmetricOperator._kinds[kind].from_tensors(tensors, side)


def checked_rank(k: int | None, most: int) -> int:
    """K, or ``most`` where it is None.

    Raises:
        ValueError: unless 1 <= k <= most.
    """
    if k is None:
        return most
    if not 1 <= k <= most:
        raise ValueError(f"k={k} must be between 1 and {most}")
    return int(k)


def fix_signs(vectors: Tensor) -> Tensor:
    """Columns flipped so that each one's entry of largest magnitude is positive."""
    if not vectors.numel():
        return vectors
    negative = -vectors.amin(0, keepdim=True) > vectors.amax(0, keepdim=True)
    return vectors * torch.where(negative, -1, 1).to(vectors.dtype)


def check_single(delta: Any) -> None:
    """Refuses several updates where one is asked for, as a tensor or in factors.

    Raises:
        ValueError: naming the shape.
    """
    for part in (delta,) if isinstance(delta, Tensor) else (delta.left, delta.right):
        if part.ndim != 2:
            raise ValueError(f"delta of shape {tuple(part.shape)} does not fit: pass one update at a time, (p, q)")


def check_layer_shape(p: int, q: int, rows: int, columns: int) -> None:
    """Refuses an update (rows, columns) of a layer that is (p, q).

    Raises:
        ValueError: if they differ.
    """
    if (rows, columns) != (p, q):
        raise ValueError(f"delta of shape ({rows}, {columns}) does not fit an operator of a layer of shape ({p}, {q})")
