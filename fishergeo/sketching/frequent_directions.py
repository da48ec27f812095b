"""Frequent directions: a sketch of a matrix's rows with a deterministic bound on its error.

Ghashami, Liberty, Phillips and Woodruff (2016), "Frequent Directions: simple and deterministic matrix sketching". Rows
fill a buffer; when it is full, the squared singular values all shrink by the ℓ-th one. Whatever shrank is added
up, so the true bound of this stream, ‖AᵀA − BᵀB‖₂ ≤ Δ, is known exactly and is often far below the bound of the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fishergeo._checks import check_finite, check_integer, check_tensor
from fishergeo.operators import SpectralOperator, fix_signs
from fishergeo.sketching.psd_sketch import factor_eigh


class FrequentDirections:
    """B of at most ``rows`` rows with 0 ⪯ AᵀA − BᵀB ⪯ Δ·I for all rows A that were added, in any order.

    With A_k the best rank-k part of A, Δ ≤ ‖A − A_k‖_F²/(rows − k) for every k < rows. No randomness, no spectrum
    assumed; two sketches merge with the same guarantee for both streams together (Ghashami et al. 2016).

    Args:
        size: columns of A.
        rows: ℓ, rows of B. Memory is 2·rows·size numbers, time O(rows·size) a row.
        dtype: dtype of the buffer, float32 or float64.
        device: device of the buffer.

    Raises:
        TypeError: for arguments of the wrong type.
        ValueError: for arguments out of range.

    Examples:
        >>> sketch = fg.FrequentDirections(size=4, rows=2)
        >>> sketch.add(torch.eye(4, dtype=torch.float64)[:1] * 3)
        >>> sketch.matrix().shape, float(sketch.bound)
        (torch.Size([1, 4]), 0.0)
    """

    def __init__(
        self, size: int, rows: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
    ) -> None:
        self.size = check_integer("size", size, low=1)
        self.rows = check_integer("rows", rows, low=1)
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype must be float32 or float64, got {dtype}")
        self._buffer = torch.zeros(0, size, dtype=dtype, device=device)
        self._settled = True
        self._shrunk = 0.0
        self._squares = 0.0

    @property
    def bound(self) -> float:
        """Δ: ‖AᵀA − BᵀB‖₂ is at most this. What the open buffer still has to lose is included."""
        self._settle()
        return self._shrunk

    @property
    def squares(self) -> float:
        """‖A‖_F², exact."""
        return self._squares

    def add(self, rows: Tensor) -> None:
        """Adds rows of A.

        Args:
            rows: (n, size) or (size,), floating.

        Raises:
            TypeError: if they are not a floating tensor.
            ValueError: if the shape is wrong or NaN or infinity is in them.
        """
        check_tensor("rows", rows, min_dim=1)
        check_finite("rows", rows)
        block = rows[None] if rows.ndim == 1 else rows
        if block.ndim != 2 or block.shape[1] != self.size:
            raise ValueError(f"rows must be (n, {self.size}), got shape {tuple(rows.shape)}")
        self._squares += float(block.double().square().sum())
        for piece in block.to(self._buffer).split(self.rows):
            self._buffer, self._settled = torch.cat([self._buffer, piece]), False
            if len(self._buffer) >= 2 * self.rows:
                self._settle()

    def matrix(self) -> Tensor:
        """B, (ℓ, size) or with fewer rows, orthogonal ones by falling length."""
        self._settle()
        return self._buffer.clone()

    def eigh(self, k: int | None = None) -> tuple[Tensor, Tensor]:
        """The k leading eigenpairs of BᵀB: (values (k,), vectors (size, k)); all there are by default.

        Raises:
            TypeError: if k is not an int.
            ValueError: if k is not between 1 and the rows of B.
        """
        factor = self.matrix().T
        k = min(factor.shape) if k is None else check_integer("k", k, low=1, high=max(1, min(factor.shape)))
        values, vectors = factor_eigh(factor, k)
        return values.to(factor.dtype), vectors.to(factor.dtype)

    def operator(self, side: str = "output") -> SpectralOperator:
        """BᵀB as an operator; ``full_trace`` is ‖A‖_F².

        Args:
            side: side of a layer's weight that the matrix stands for, see :class:`fishergeo.SymmetricOperator`.
        """
        values, vectors = self.eigh()
        return SpectralOperator(values, vectors, values.new_tensor(self.squares), side)

    def merge(self, other: FrequentDirections) -> FrequentDirections:
        """The sketch of both streams; neither is changed.

        Args:
            other: a sketch of the same size and rows.

        Raises:
            ValueError: if sizes or rows differ.
        """
        if (self.size, self.rows) != (other.size, other.rows):
            raise ValueError(
                f"sketches differ: size {self.size} and rows {self.rows}, size {other.size} and rows {other.rows}"
            )
        merged = FrequentDirections(self.size, self.rows, self._buffer.dtype, self._buffer.device)
        merged._buffer, merged._settled = torch.cat([self.matrix(), other.matrix().to(self._buffer)]), False
        merged._shrunk = self._shrunk + other._shrunk
        merged._squares = self._squares + other._squares
        merged._settle()
        return merged

    def _settle(self) -> None:
        """Brings the buffer down to ``rows`` rows, orthogonal ones, less than that if it shrank."""
        if self._settled:  # once: a second decomposition turns rows within what rounding cannot tell apart
            return
        _, singular, right = torch.linalg.svd(self._buffer.double(), full_matrices=False)
        squares = singular.square()
        if len(squares) > self.rows:
            # The (ℓ+1)-th: the least that leaves ℓ rows; each unit of Δ costs ℓ + 1 of ‖A‖², so the bound holds.
            loss = float(squares[self.rows])
            squares = (squares[: self.rows] - loss).clamp_min(0)
            self._shrunk += loss
        kept = int((squares > 0).sum())
        self._buffer = (squares[:kept].sqrt()[:, None] * fix_signs(right[:kept].T).T).to(self._buffer)
        self._settled = True
