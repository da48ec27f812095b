"""The exact Fisher of a layer, 1/N Σ vec(G_i) vec(G_i)ᵀ, known through every example's factors G_i = D_iᵀA_i."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from fishergeo._checks import check_choice, check_finite
from fishergeo.operators.base import (
    DENSE_LIMIT,
    SIDES,
    SymmetricOperator,
    check_layer_shape,
    check_single,
    checked_rank,
    fix_signs,
)
from fishergeo.operators.spectral import SpectralOperator


class ExactOperator(SymmetricOperator):
    """1/N Σ w_i vec(G_i) vec(G_i)ᵀ, (pq, pq), row-major, the definition itself; nothing of that size is formed.

    Products form weight gradients of a few examples at a time, which costs 2Tpq multiplications an example and 2pq
    for every column of the block. Eigenpairs come from the dual matrix ⟨G_i, G_j⟩/N, (N, N), wherever N < pq.

    Args:
        gradients: (rows, p), the rows of all D_i one after the other; any floating dtype, in which products come.
        inputs: (rows, q), those of A_i.
        lengths: (N,) long, rows of each example, none for one that does not reach the layer; their sum is ``rows``. Of kinds
            that take several draws of labels (``"type2"``, ``"ggn"``) every draw is one of the N.
        count: divisor of the sum; N if nothing is weighted.
        budget: entries of the weight gradients formed at a time.
        weights: (N,), of each example: D_i carries the root of its own. Ones if None.

    Raises:
        ValueError: if the three do not belong together, or the weights are of other examples.
        TypeError: if their dtype is not a floating one.

    Examples:
        >>> gradients, inputs = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.eye(2)
        >>> op = fg.ExactOperator(gradients, inputs, torch.tensor([1, 1]), count=2)  # two examples of one row each
        >>> op.shape, [round(v, 4) for v in op.eigh(2)[0].tolist()]
        ((4, 4), [2.0, 0.5])
    """

    def __init__(
        self,
        gradients: Tensor,
        inputs: Tensor,
        lengths: Tensor,
        count: float,
        budget: int = 2**24,
        weights: Tensor | None = None,
    ) -> None:
        if (
            gradients.ndim != 2
            or inputs.ndim != 2
            or len(gradients) != len(inputs)
            or int(lengths.sum()) != len(inputs)
        ):
            raise ValueError(
                f"gradients {tuple(gradients.shape)}, inputs {tuple(inputs.shape)} and lengths that sum to "
                f"{int(lengths.sum())} do not belong together"
            )
        if weights is not None and weights.shape != lengths.shape:
            raise ValueError(f"weights {tuple(weights.shape)} are not one for each of {len(lengths)} examples")
        lengths = lengths.cpu()
        order = torch.arange(len(lengths))
        if bool((lengths[1:] < lengths[:-1]).any()):  # examples of one length side by side; their order means nothing
            order = lengths.argsort(stable=True)
            ends = lengths.cumsum(0)
            rows = torch.cat([torch.arange(int(ends[i] - lengths[i]), int(ends[i])) for i in order])
            gradients, inputs = gradients[rows.to(gradients.device)], inputs[rows.to(inputs.device)]
            lengths = lengths[order]
        places = order.argsort()
        if (missing := int((lengths == 0).sum())) > 1:  # examples that do not reach the layer are alike: one is held
            lengths, places = lengths[missing - 1 :], (places - (missing - 1)).clamp_min(0)
        super().__init__(gradients.shape[1] * inputs.shape[1], gradients.dtype, gradients.device, "both")
        self.gradients = gradients
        self.inputs = inputs
        self.lengths = lengths
        self._places = places.to(gradients.device)  # of the examples as given, among those held
        self.count = count
        self.budget = budget
        self.weights = weights
        self._dual: tuple[Tensor, Tensor] | None = None

    @property
    def layer_shape(self) -> tuple[int, int]:
        """(p, q)."""
        return self.gradients.shape[1], self.inputs.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """``gradients`` (rows, p), ``inputs`` (rows, q), ``lengths`` (M,), ``places`` (N,), the scalar ``count``, float64,
        and ``weights`` (N,) where examples are weighted. ``places`` says where each example as it was given stands among
        the M held, of which one without a row stands for all such.
        """
        weights = {} if self.weights is None else {"weights": self.weights}
        return weights | {
            "gradients": self.gradients,
            "inputs": self.inputs,
            "lengths": self.lengths,
            "places": self._places,
            "count": torch.tensor(self.count, dtype=torch.float64),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], side: str = "both") -> Self:
        """The operator whose :meth:`tensors` these were, whatever ``side``: it acts on both."""
        made = cls(tensors["gradients"], tensors["inputs"], tensors["lengths"], float(tensors["count"]))
        made._places, made.weights = tensors["places"], tensors.get("weights")
        return made

    def _factors(self, width: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Examples, D (n, T, p) and A (n, T, q): runs of one length, n·width entries within the budget."""
        p, q = self.layer_shape
        example = row = 0
        for length, run in zip(*(x.tolist() for x in self.lengths.unique_consecutive(return_counts=True)), strict=True):
            for start in range(0, run, max(1, self.budget // max(1, width))):
                n = min(max(1, self.budget // max(1, width)), run - start)
                rows = slice(row, row + n * length)
                yield (
                    slice(example, example + n),
                    self.gradients[rows].reshape(n, length, p),
                    self.inputs[rows].reshape(n, length, q),
                )
                example, row = example + n, row + n * length

    def _weight_gradients(self) -> Iterator[tuple[slice, Tensor]]:
        """Examples and their vec(G), (n, pq)."""
        for examples, d, a in self._factors(self.shape[0]):
            yield examples, torch.bmm(d.mT, a).flatten(1)

    def _matmat(self, block: Tensor) -> Tensor:
        total = block.new_zeros(block.shape)
        for _, g in self._weight_gradients():
            total = torch.addmm(total, g.T, g @ block)
        return total / self.count

    def diagonal(self) -> Tensor:
        """(pq,)."""
        total = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        for _, g in self._weight_gradients():
            total += g.square().sum(0)
        return total / self.count

    def trace(self) -> Tensor:
        """Σ w_i‖G_i‖² / N, a scalar tensor."""
        return torch.stack([g.square().sum() for _, g in self._weight_gradients()]).sum() / self.count

    def partial_trace(self, side: str = "output") -> Tensor:
        """1/N Σ w_i G_i G_iᵀ, (p, p), or 1/N Σ w_i G_iᵀ G_i, (q, q), by ``side``; weight gradients of a few examples at a time.

        Raises:
            ValueError: for another side than ``"output"`` and ``"input"``.
        """
        check_choice("side", side, SIDES)
        p, q = self.layer_shape
        total = self.gradients.new_zeros((p, p) if side == "output" else (q, q))
        for _, g in self._weight_gradients():
            cube = g.reshape(-1, p, q)
            rows = (cube.mT if side == "output" else cube).flatten(0, 1)
            total.addmm_(rows.T, rows)
        return total / self.count

    @property
    def examples(self) -> int:
        """N."""
        return len(self._places)

    def weight_gradients(self) -> Tensor:
        """G_i of every example, dense, (N, p, q), in the order in which the examples were given, whatever their weights.

        Raises:
            ValueError: for an example of weight zero, whose gradient is not here.
        """
        every = torch.cat([g for _, g in self._weight_gradients()])[self._places]
        return self._unweighted(every.T).T.reshape(-1, *self.layer_shape)

    def _unweighted(self, values: Tensor) -> Tensor:
        """Values linear in each example's gradient, (..., N), without the roots of the weights."""
        if self.weights is None:
            return values
        if not bool((self.weights > 0).all()):
            none = int((self.weights <= 0).sum())
            raise ValueError(
                f"{none} of {len(self.weights)} examples have the weight zero, so that nothing is known of them here; leave "
                "them out of the estimate"
            )
        return values / self.weights.sqrt().to(values)

    def inner(self, delta: Any) -> Tensor:
        """The first-order change of each example's objective, ⟨G_i, ΔW⟩, whatever its weight; differentiable in the update.

        Several updates at once meet every example in the cheaper of two ways: through its factors, or through its
        weight gradient, which is formed for a few examples at a time.

        Args:
            delta: ΔW, a (p, q) tensor, several, (Q, p, q), or factors with ``.left`` (p, r) and ``.right`` (r, q).

        Returns:
            (N,), or (Q, N) for several, of the operator's dtype, in the order in which the examples were given.

        Raises:
            ValueError: if the shape does not fit, or for an example of weight zero.
        """
        return self._unweighted(self._weighted_inner(delta))

    def _weighted_inner(self, delta: Any) -> Tensor:
        """√w_i ⟨G_i, ΔW⟩, whose squares the Fisher sums: see :meth:`inner`."""
        p, q = self.layer_shape
        several = isinstance(delta, Tensor) and delta.ndim == 3
        if not several:
            check_single(delta)
        if isinstance(delta, Tensor):
            self._check_delta(delta.shape[-2], delta.shape[-1])
            dense = delta.to(self.dtype)
            if several and len(delta) * (len(self.inputs) - len(self.lengths)) > len(self.inputs):
                columns = dense.flatten(1).T
                return torch.cat([g @ columns for _, g in self._weight_gradients()])[self._places].T
            if several:
                return torch.stack([self._weighted_inner(one) for one in dense])
            parts = [((a @ dense.T) * d).sum((1, 2)) for _, d, a in self._factors(p + q)]
        else:
            left, right = delta.left.to(self.dtype), delta.right.to(self.dtype)
            self._check_delta(left.shape[0], right.shape[-1])
            parts = [((d @ left) * (a @ right.T)).sum((1, 2)) for _, d, a in self._factors(p + q)]
        return torch.cat(parts)[self._places]

    def dual(self) -> Tensor:
        """√(w_i w_j) ⟨G_i, G_j⟩/N, (N, N), in the order in which the examples were given: the same eigenvalues but for zeros.

        ⟨G_i, G_j⟩ = Σ (A_iA_jᵀ)∘(D_iD_jᵀ); weights are ones where none were given.
        """
        return self._held_dual()[self._places][:, self._places]

    def _held_dual(self) -> Tensor:
        """The dual matrix in the order in which the examples are held."""
        n, (p, q) = len(self.lengths), self.layer_shape
        rows = len(self.inputs)
        matrix = torch.empty(n, n, dtype=self.dtype, device=self.device)
        if n * p * q <= 4 * self.budget and (rows + n * n) * p * q <= rows * rows * (p + q):
            every = torch.cat([g for _, g in self._weight_gradients()])
            return every @ every.T / self.count
        for mine, d, a in self._factors(max(1, rows * int(self.lengths.max()))):
            for theirs, e, b in self._factors(max(1, a.shape[0] * a.shape[1] * int(self.lengths.max()))):
                both = (a.flatten(0, 1) @ b.flatten(0, 1).T).mul_(d.flatten(0, 1) @ e.flatten(0, 1).T)
                matrix[mine, theirs] = both.view(a.shape[0], a.shape[1], b.shape[0], b.shape[1]).sum((1, 3))
        return matrix / self.count

    def _dual_pairs(self) -> tuple[Tensor, Tensor]:
        if self._dual is None:
            matrix = self._held_dual().double()
            check_finite("the inner products of the examples' gradients", matrix)
            values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
            self._dual = values.flip(0).clamp_min(0), vectors.flip(1)
        return self._dual

    def eigh(self, k: int | None = None) -> tuple[Tensor, Tensor]:
        """The k largest eigenvalues, descending, and their orthonormal vectors, exact, through the dual matrix.

        Args:
            k: number of eigenpairs, by default min(M, pq), beyond which all eigenvalues are zero; M is N, but examples that do
                not reach the layer count as one.

        Returns:
            (values (k,), vectors (pq, k)).

        Raises:
            ValueError: if k is not between 1 and the size, or exceeds N in a layer too large to be made dense.
        """
        n, size = len(self.lengths), self.shape[0]
        k = checked_rank(min(n, size) if k is None else k, size)
        if k > n or size <= n:
            if size > DENSE_LIMIT:
                raise ValueError(
                    f"k={k} exceeds the {n} examples, beyond which every eigenvalue is zero; take k <= {n}"
                )
            return super().eigh(k)
        values, rotation = (x[..., :k] for x in self._dual_pairs())
        # Pairs that vanish have no vector of their own: QR completes the basis in the place of zero columns.
        weights = (rotation / (values * self.count).sqrt()).to(self.dtype)
        weights = torch.where(values > values[0] * 2.0**-104, weights, 0)
        vectors = torch.zeros(size, k, dtype=self.dtype, device=self.device)
        for examples, g in self._weight_gradients():
            vectors.addmm_(g.T, weights[examples])
        # A small pair carries the rounding errors of the large ones, magnified by the root of their quotient.
        if bool(values[-1] < torch.finfo(self.dtype).eps ** 0.35 * values[0]) or not bool(values[0] > 0):
            vectors = torch.linalg.qr(vectors)[0]
        return values.to(self.dtype), fix_signs(vectors)

    def _map(self, function: Callable[[Tensor], Tensor]) -> SymmetricOperator:
        if self.shape[0] <= len(self.lengths):
            return super()._map(function)
        values, vectors = self.eigh()
        return SpectralOperator(values, vectors, side=self.side)._map(function)

    def eigenvalues(self) -> Tensor:
        """All eigenvalues, (pq,) float64, zeros among them; through the dual matrix where N < pq."""
        if self.shape[0] <= len(self.lengths):
            return super().eigenvalues()
        values = self._dual_pairs()[0]
        return torch.cat([values, values.new_zeros(self.shape[0] - len(values))])

    def _check_delta(self, rows: int, columns: int) -> None:
        check_layer_shape(*self.layer_shape, rows, columns)

    def _quadratic_dense(self, delta: Tensor) -> Tensor:
        # ⟨G_i, ΔW⟩ = ⟨D_i, A_i ΔWᵀ⟩ without a weight gradient.
        p, q = self.layer_shape
        parts = [((a @ delta.T) * d).sum((1, 2)).square().sum() for _, d, a in self._factors(p + q)]
        return torch.stack(parts).sum() / self.count

    def _quadratic_factored(self, left: Tensor, right: Tensor) -> Tensor:
        p, q = self.layer_shape
        parts = [((d @ left) * (a @ right.T)).sum((1, 2)).square().sum() for _, d, a in self._factors(p + q)]
        return torch.stack(parts).sum() / self.count

    def __repr__(self) -> str:
        shape: Any = self.layer_shape
        return f"ExactOperator(layer {shape[0]}×{shape[1]}, {self.examples} examples)"
