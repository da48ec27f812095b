"""Operators on both sides of a layer's W at once: they act on vec(W), row-major, of shape (pq, pq)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from fishergeo._checks import check_choice, check_finite
from fishergeo._linalg import tiled_squares
from fishergeo.operators.base import ROUNDINGS, SIDES, SymmetricOperator, check_layer_shape, checked_rank, fix_signs
from fishergeo.operators.spectral import SpectralOperator


class FactoredKronecker(SymmetricOperator):
    """What kron(S, A) on vec(W), row-major, is whatever form its two factors have: tensors, or operators."""

    def __init__(self, output_factor: Any, input_factor: Any) -> None:
        size = output_factor.shape[0] * input_factor.shape[0]
        super().__init__(size, output_factor.dtype, output_factor.device, "both")
        self.output_factor = output_factor
        self.input_factor = input_factor

    def factors(self) -> tuple[Any, Any]:
        """S (p, p) and A (q, q), in the form that they were given in."""
        return self.output_factor, self.input_factor

    def diagonal(self) -> Tensor:
        """(pq,)."""
        return torch.outer(self.output_factor.diagonal(), self.input_factor.diagonal()).flatten()

    def trace(self) -> Tensor:
        """tr(S)·tr(A), a scalar tensor."""
        traces: Tensor = self.output_factor.trace() * self.input_factor.trace()
        return traces

    def partial_trace(self, side: str = "output") -> Tensor:
        """S·tr(A), (p, p), or A·tr(S), (q, q), by ``side``.

        Raises:
            ValueError: for another side than ``"output"`` and ``"input"``.
        """
        check_choice("side", side, SIDES)
        near, far = (self.output_factor, self.input_factor)[:: 1 if side == "output" else -1]
        dense: Tensor = near if isinstance(near, Tensor) else near.to_dense()
        return dense * far.trace()

    def rotated(self) -> EigenKroneckerOperator:
        """The same operator in the eigenbases of its factors."""
        raise NotImplementedError

    def eigh(self, k: int | None = None) -> tuple[Tensor, Tensor]:
        """The k largest products of the factors' eigenvalues (k,), and the Kronecker products of their vectors (pq, k).

        Raises:
            ValueError: if k is not between 1 and pq.
        """
        return self.rotated().eigh(k)

    def _map(self, function: Callable[[Tensor], Tensor]) -> SymmetricOperator:
        return self.rotated()._map(function)

    def _rounding(self, values: Tensor) -> Tensor:
        # An eigenvalue of a factor is known to rounding of that factor's own largest, whatever it is multiplied with.
        products = values.abs().reshape(self.output_factor.shape[0], self.input_factor.shape[0])
        each = products.amax(0) + products.amax(1, keepdim=True)
        return ROUNDINGS * torch.finfo(self.dtype).eps * each.reshape(values.shape)

    def eigenvalues(self) -> Tensor:
        """The products of the factors' eigenvalues, (pq,) float64."""
        return self.rotated().eigenvalues()

    def _check_delta(self, rows: int, columns: int) -> None:
        check_layer_shape(self.output_factor.shape[0], self.input_factor.shape[0], rows, columns)


class KroneckerOperator(FactoredKronecker):
    """kron(S, A) on vec(W), row-major: vec(ΔW) goes to vec(S ΔW A) (KFAC: Martens and Grosse 2015).

    Args:
        output_factor: S, (p, p), symmetric positive semi-definite; any floating dtype, in which products come.
        input_factor: A, (q, q), the same.

    Raises:
        ValueError: if a factor is not square.
        TypeError: if the dtype of the factors is not a floating one.

    Examples:
        >>> op = fg.KroneckerOperator(torch.diag(torch.tensor([1.0, 2.0])), 3 * torch.eye(2))
        >>> op.shape, float(op.trace())
        ((4, 4), 18.0)
        >>> float(op.quadratic(torch.ones(2, 2)))  # tr(ΔWᵀ S ΔW A)
        18.0
    """

    def __init__(self, output_factor: Tensor, input_factor: Tensor) -> None:
        for name, factor in (("output_factor", output_factor), ("input_factor", input_factor)):
            if factor.ndim != 2 or factor.shape[0] != factor.shape[1]:
                raise ValueError(f"{name} must be square, got shape {tuple(factor.shape)}")
        super().__init__(output_factor, input_factor)

    def tensors(self) -> dict[str, Tensor]:
        """``output_factor``, (p, p), and ``input_factor``, (q, q)."""
        return {"output_factor": self.output_factor, "input_factor": self.input_factor}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], side: str = "both") -> Self:
        """The operator whose :meth:`tensors` these were, whatever ``side``: it acts on both."""
        return cls(tensors["output_factor"], tensors["input_factor"])

    def _matmat(self, block: Tensor) -> Tensor:
        p, q = len(self.output_factor), len(self.input_factor)
        cube = block.T.reshape(-1, p, q)
        return (self.output_factor @ cube @ self.input_factor).reshape(-1, p * q).T

    def to_dense(self) -> Tensor:
        """(pq, pq)."""
        return torch.kron(self.output_factor, self.input_factor)

    def rotated(self) -> EigenKroneckerOperator:
        """The same operator in the eigenbases of its factors.

        Raises:
            ValueError: for NaN or infinity, of which an eigensolver makes numbers like any others.
        """
        check_finite("output_factor", self.output_factor)
        check_finite("input_factor", self.input_factor)
        s, u = torch.linalg.eigh(self.output_factor.double())
        a, v = torch.linalg.eigh(self.input_factor.double())
        return EigenKroneckerOperator(u.to(self.dtype), v.to(self.dtype), torch.outer(s, a).to(self.dtype))

    def _quadratic_dense(self, delta: Tensor) -> Tensor:
        return ((self.output_factor @ delta) * (delta @ self.input_factor)).sum()

    def _quadratic_factored(self, left: Tensor, right: Tensor) -> Tensor:
        if self.output_factor.requires_grad or self.input_factor.requires_grad:
            return ((left.T @ (self.output_factor @ left)) * (right @ (self.input_factor @ right.T))).sum()
        return _KroneckerQuadratic.apply(self.output_factor, self.input_factor, left, right)  # type: ignore[no-untyped-call]


class _KroneckerQuadratic(torch.autograd.Function):
    """tr((LᵀSL)(RARᵀ)); the gradient, 2 SL(RARᵀ) and 2 (LᵀSL)RA, reuses the two large products of the value.

    Autograd's own backward would multiply by S and A a second time, which is half of the term's cost. Both large
    products have the few rows on the left, LᵀS for SL: BLAS reads a square matrix twice as fast that way.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, inside: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(output, inside, left, right)
        ctx.products = (left.T @ output, right @ inside)
        ctx.inner = (ctx.products[0] @ left, ctx.products[1] @ right.T)
        return (ctx.inner[0] * ctx.inner[1]).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, None, Tensor, Tensor]:
        output, inside, left, right = ctx.saved_tensors
        (ls, ra), (lsl, rar) = ctx.products, ctx.inner
        if torch.is_grad_enabled():  # a second derivative is wanted: these must depend on their inputs
            ls, ra = left.T @ output, right @ inside
            lsl, rar = ls @ left, ra @ right.T
        return None, None, ((2 * upstream * rar) @ ls).T, (2 * upstream * lsl) @ ra


class EigenKroneckerOperator(SymmetricOperator):
    """kron(U, V) diag(vec(values)) kron(U, V)ᵀ on vec(W): what every function of KFAC is, and EKFAC (George et al. 2018).

    Args:
        output_basis: U, (p, p), orthogonal; any floating dtype.
        input_basis: V, (q, q), orthogonal, the same.
        values: (p, q), the same; products come in their dtype.

    Raises:
        ValueError: if the values do not fit the bases.
        TypeError: if the dtype of the values is not a floating one.

    Examples:
        >>> op = fg.EigenKroneckerOperator(torch.eye(2), torch.eye(3), torch.arange(6.0).reshape(2, 3))
        >>> op.shape, float(op.trace())
        ((6, 6), 15.0)
    """

    def __init__(self, output_basis: Tensor, input_basis: Tensor, values: Tensor) -> None:
        if values.shape != (output_basis.shape[-1], input_basis.shape[-1]):
            raise ValueError(
                f"values {tuple(values.shape)} do not fit bases {tuple(output_basis.shape)}, {tuple(input_basis.shape)}"
            )
        super().__init__(values.numel(), values.dtype, values.device, "both")
        self.output_basis = output_basis
        self.input_basis = input_basis
        self.values = values

    def tensors(self) -> dict[str, Tensor]:
        """``output_basis`` (p, p), ``input_basis`` (q, q) and ``eigenvalues`` (p, q)."""
        return {"output_basis": self.output_basis, "input_basis": self.input_basis, "eigenvalues": self.values}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], side: str = "both") -> Self:
        """The operator whose :meth:`tensors` these were, whatever ``side``: it acts on both."""
        return cls(tensors["output_basis"], tensors["input_basis"], tensors["eigenvalues"])

    def _matmat(self, block: Tensor) -> Tensor:
        cube = block.T.reshape(-1, *self.values.shape)
        inside = self.values * (self.output_basis.T @ cube @ self.input_basis)
        return (self.output_basis @ inside @ self.input_basis.T).reshape(-1, self.shape[0]).T

    def diagonal(self) -> Tensor:
        """(pq,)."""
        return (self.output_basis.square() @ self.values @ self.input_basis.square().T).flatten()

    def trace(self) -> Tensor:
        """Sum of the eigenvalues, a scalar tensor."""
        return self.values.sum()

    def eigh(self, k: int | None = None) -> tuple[Tensor, Tensor]:
        """The k largest values (k,) and the Kronecker products of their vectors (pq, k); all by default.

        Raises:
            ValueError: if k is not between 1 and pq.
        """
        k = checked_rank(k, self.shape[0])
        values, index = self.values.flatten().topk(k)
        width = self.values.shape[1]
        left, right = self.output_basis[:, index // width], self.input_basis[:, index % width]
        return values, fix_signs((left[:, None] * right[None]).reshape(-1, k))

    def _map(self, function: Callable[[Tensor], Tensor]) -> SymmetricOperator:
        values = function(self.values.double()).to(self.dtype)
        return EigenKroneckerOperator(self.output_basis, self.input_basis, values)

    def eigenvalues(self) -> Tensor:
        """The values, (pq,) float64."""
        return self.values.double().flatten()

    def partial_trace(self, side: str = "output") -> Tensor:
        """U diag(row sums) Uᵀ, (p, p), or V diag(column sums) Vᵀ, (q, q), by ``side``.

        Raises:
            ValueError: for another side than ``"output"`` and ``"input"``.
        """
        check_choice("side", side, SIDES)
        basis, sums = (self.output_basis, 1) if side == "output" else (self.input_basis, 0)
        return (basis * self.values.sum(sums)) @ basis.T

    def _check_delta(self, rows: int, columns: int) -> None:
        check_layer_shape(self.values.shape[0], self.values.shape[1], rows, columns)

    def _quadratic_dense(self, delta: Tensor) -> Tensor:
        return (self.values * (self.output_basis.T @ delta @ self.input_basis).square()).sum()

    def _quadratic_factored(self, left: Tensor, right: Tensor) -> Tensor:
        inside = self.output_basis.T @ left, right @ self.input_basis
        return tiled_squares(self.values, *inside)


class SpectralKroneckerOperator(FactoredKronecker):
    """kron(S, A) on vec(W), row-major, with S = U diag(λ) Uᵀ + ρ(I − U Uᵀ) and A alike: KFAC of sketched factors.

    The form of KFAC (Martens and Grosse 2015); memory and products go by the eigenpairs that are known. Functions of
    the whole operator (:meth:`power`, :meth:`logdet`, :meth:`eigh`) complete the bases, (p, p) and (q, q).

    Args:
        output_factor: S, (p, p), in whose dtype products come.
        input_factor: A, (q, q).

    Raises:
        TypeError: if a factor is no SpectralOperator.

    Examples:
        >>> one = fg.SpectralOperator(torch.tensor([2.0]), torch.eye(2)[:, :1], rest=1.0)
        >>> op = fg.SpectralKroneckerOperator(one, one)
        >>> op.shape, op.diagonal().tolist()
        ((4, 4), [4.0, 2.0, 2.0, 1.0])
        >>> float(op.quadratic(torch.ones(2, 2)))  # tr(ΔWᵀ S ΔW A)
        9.0
    """

    output_factor: SpectralOperator
    input_factor: SpectralOperator

    def __init__(self, output_factor: SpectralOperator, input_factor: SpectralOperator) -> None:
        for name, factor in (("output_factor", output_factor), ("input_factor", input_factor)):
            if not isinstance(factor, SpectralOperator):
                raise TypeError(f"{name} must be a SpectralOperator, got {type(factor).__name__}")
        super().__init__(output_factor, input_factor)

    def tensors(self) -> dict[str, Tensor]:
        """Those of both factors, (k,), (size, k) and scalars, after ``output_`` and ``input_``; see
        :meth:`SpectralOperator.tensors`.
        """
        factors = {"output": self.output_factor, "input": self.input_factor}
        return {f"{side}_{name}": t for side, factor in factors.items() for name, t in factor.tensors().items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], side: str = "both") -> Self:
        """The operator whose :meth:`tensors` these were, whatever ``side``: it acts on both."""
        factors = []
        for one in ("output", "input"):
            own = {k.removeprefix(f"{one}_"): tensor for k, tensor in tensors.items() if k.startswith(f"{one}_")}
            factors.append(SpectralOperator.from_tensors(own, one))
        return cls(*factors)

    def _matmat(self, block: Tensor) -> Tensor:
        p, q = self.output_factor.shape[0], self.input_factor.shape[0]
        columns = block.shape[1]
        rows = self.output_factor @ block.reshape(p, q * columns)
        inside = rows.reshape(p, q, columns).transpose(0, 1).reshape(q, p * columns)
        return (self.input_factor @ inside).reshape(q, p, columns).transpose(0, 1).reshape(p * q, columns)

    def to_dense(self) -> Tensor:
        """(pq, pq)."""
        return torch.kron(self.output_factor.to_dense(), self.input_factor.to_dense())

    def rotated(self) -> EigenKroneckerOperator:
        """The same operator in complete eigenbases of its factors."""
        (s, u), (a, v) = (_complete(factor) for factor in (self.output_factor, self.input_factor))
        return EigenKroneckerOperator(u, v, torch.outer(s, a))

    def _quadratic_dense(self, delta: Tensor) -> Tensor:
        return ((self.output_factor @ delta) * (self.input_factor @ delta.T).T).sum()

    def _quadratic_factored(self, left: Tensor, right: Tensor) -> Tensor:
        return ((left.T @ (self.output_factor @ left)) * (right @ (self.input_factor @ right.T))).sum()


def _complete(factor: SpectralOperator) -> tuple[Tensor, Tensor]:
    """All eigenvalues, (size,), and vectors, (size, size), the known ones first."""
    size, known = factor.vectors.shape
    others = torch.linalg.qr(factor.vectors.double(), mode="complete")[0][:, known:].to(factor.dtype)
    values = torch.cat([factor.values, factor.values.new_full((size - known,), factor.rest)])
    return values.to(factor.dtype), torch.cat([factor.vectors, others], 1)
