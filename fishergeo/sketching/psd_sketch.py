"""Randomised Nyström sketches of positive semi-definite sums that are seen once.

A stream is cut into segments of growing length (16 examples, then up to 64, 256, ...). Within a segment the test
matrix Ω is fixed and Y = F_segment Ω is summed; at its end the segment is replaced by its Nyström factor B,
B Bᵀ ≤ F_segment, which joins the factor of the earlier ones, cut to as many columns as Ω has. The first Ω is random,
every later one is an orthonormal basis of F̂ Ω with F̂ all that is known so far: one step of block power iteration for
which no second pass over the data is needed. What is cut only lowers F̂, so it never exceeds F.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fishergeo._linalg import gaussian
from fishergeo.operators import fix_signs

FIRST_SEGMENT = 16

GROWTH = 4


def segments(examples: int) -> int:
    """How many segments so many examples fill or begin."""
    count, end = 1, FIRST_SEGMENT
    while end < examples:
        count, end = count + 1, end * GROWTH
    return count


def nystrom_factor(product: Tensor, omega: Tensor, eps: float | None = None) -> Tensor:
    """B with B Bᵀ = Y (Ωᵀ Y)⁺ Yᵀ, the Nyström approximation, which never exceeds F.

    Shift-corrected for stability (Tropp, Yurtsever, Udell, Cevher 2017, "Fixed-rank approximation of a
    positive-semidefinite matrix from streaming data", Algorithm 3): Y + νΩ is factored with ν at rounding level.

    Args:
        product: Y = F Ω, (size, columns), of a positive semi-definite F.
        omega: Ω, the same shape, its columns orthonormal or nearly so.
        eps: rounding unit of Y, where its products were made in a lower precision than its dtype's.

    Returns:
        (size, columns), the dtype of ``product``; the core is formed and factored in float64.

    Raises:
        FloatingPointError: if Y is not finite, or Ωᵀ Y far from positive semi-definite.
    """
    y, w = product.double(), omega.double()
    norm = torch.linalg.matrix_norm(y)
    if not bool(torch.isfinite(norm)):
        raise FloatingPointError("a sum is not finite; pass dtype=torch.float64")
    if not bool(norm > 0):
        return torch.zeros_like(product)
    core, own = w.T @ y, (omega.T @ omega).double()  # of the shift, which is of the size of rounding itself
    core = (core + core.T) / 2
    shift = float(max(eps or 0.0, torch.finfo(product.dtype).eps) * norm)
    for _ in range(6):
        factor, failed = torch.linalg.cholesky_ex(core + shift * own)
        if not int(failed):
            # Backward stable: rounding of the dtype moves the core by no more than the shift does.
            shifted, upper = torch.add(product, omega, alpha=shift), factor.T.to(product.dtype)
            return torch.linalg.solve_triangular(upper, shifted, upper=True, left=False).contiguous()
        shift = shift * 10
    raise FloatingPointError("the sketch is not positive semi-definite: was something that is not added to it?")


def factor_eigh(factor: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k leading eigenpairs of V Vᵀ, in float64.

    Args:
        factor: V, (size, columns).
        k: number of eigenpairs at most; fewer if V is smaller.

    Returns:
        (values descending, vectors (size, k) orthonormal with the sign convention of the package).
    """
    wide = factor.double()
    if wide.shape[1] and k <= wide.shape[1] < len(wide):
        squares, rotation = torch.linalg.eigh(wide.T @ wide)
        squares, rotation = squares[-k:].flip(0), rotation[:, -k:].flip(1)
        if bool(squares[-1] > 1e-8 * squares[0]):
            return squares, fix_signs(wide @ rotation / squares.sqrt())
    # Small pairs stay orthonormal only without squaring; this is several times as slow.
    left, singular, _ = torch.linalg.svd(wide, full_matrices=False)
    return singular[:k].square(), fix_signs(left[:, :k])


def compress(factor: Tensor, columns: int) -> Tensor:
    """The best factor of ``columns`` columns for V Vᵀ; what is dropped only lowers it.

    In the factor's own dtype: a rotation that is inexact by rounding mistakes directions only where they differ by
    rounding of the largest.
    """
    if factor.shape[1] <= columns:
        return factor
    _, rotation = torch.linalg.eigh(factor.T @ factor)
    return factor @ rotation[:, -columns:].flip(1)


def probe_matrix(size: int, probes: int, seed: int, name: str) -> Tensor:
    """The Gaussian columns Z, (size, probes) in float32, that a layer's sketch is measured with.

    They depend on the arguments only, so that only the products with them have to be kept.
    """
    return gaussian(size, probes, seed, f"{name}/probes")


class PsdSketch:
    """A stream of positive semi-definite terms, known through a factor of bounded width.

    Use: multiply a term by :attr:`omega`, give the product to :meth:`add`, and read :attr:`factor` after
    :meth:`close`. No call to ``add`` may carry more than :attr:`room` examples.

    Args:
        size: size of the matrix.
        columns: columns of Ω; with ``columns >= size`` the sketch is exact.
        seed: seed of the random directions.
        name: name of the layer.
        dtype: dtype of the sums.
        device: device of the sums.
        factor: sketch factor to continue from.
        probed: (size, probes), the sum of products with :func:`probe_matrix` to go on with, changed in place; products
            then have ``columns + probes`` columns.
    """

    def __init__(
        self,
        size: int,
        columns: int,
        seed: int,
        name: str,
        dtype: torch.dtype,
        device: torch.device,
        factor: Tensor | None = None,
        probed: Tensor | None = None,
    ) -> None:
        self.columns = min(columns, size)
        self.seed = seed
        self.name = name
        self.factor = torch.zeros(size, 0, dtype=dtype, device=device) if factor is None else factor
        self._seen = 0
        self._end = FIRST_SEGMENT
        self._product: Tensor | None = None
        self._omega: Tensor | None = None
        self._last: Tensor | None = None
        self.probed = probed
        self._probes: Tensor | None = None

    @property
    def omega(self) -> Tensor:
        """(size, columns + probes): the present test matrix, orthonormal or nearly so, and the probes, Gaussian."""
        basis = self._basis()
        if self.probed is None:
            return basis
        if self._probes is None:
            held = probe_matrix(*self.probed.shape, self.seed, self.name)  # type: ignore[call-arg]
            self._probes = held.to(self.probed.device, self.probed.dtype)
        return torch.cat([basis, self._probes], 1)

    def _basis(self) -> Tensor:
        if self._omega is None:
            start, self._last = self._last, None
            if start is None:
                start = gaussian(len(self.factor), self.columns, self.seed, self.name).to(self.factor)
                start = start / len(start) ** 0.5
            if self.factor.shape[1]:
                # A step of power iteration with F̂ + a little of the identity: what the data have not shown yet keeps
                # its random direction and is not filled with rounding errors.
                known = self.factor @ (self.factor.T @ start)
                start = known / torch.linalg.matrix_norm(known).clamp_min(torch.finfo(known.dtype).tiny) + 1e-6 * start
            # A tall Gaussian matrix is as good as orthonormal: its singular values lie between 1/2 and 3/2.
            tall = self.factor.shape[1] == 0 and 4 * self.columns <= len(start)
            self._omega = start if tall else torch.linalg.qr(start)[0]
        return self._omega

    @property
    def room(self) -> int:
        """How many more examples the present segment takes."""
        return self._end - self._seen

    def widths(self, examples: int) -> tuple[int, int]:
        """Columns held by a new sketch after so many examples, for planning.

        Args:
            examples: added one after another.

        Returns:
            (before the last segment is closed: factor and, if a segment is open, Ω and product; the factor after it).
        """
        last, end = 0, FIRST_SEGMENT
        if self.columns < len(self.factor):  # a complete basis never closes before the end
            while end <= examples:
                last, end = end, end * GROWTH
        held = (last > 0) + 2 * (examples > last)
        return held * self.columns, (examples > 0) * self.columns

    def add(self, product: Tensor, examples: int) -> None:
        """Adds F_part Ω of so many examples.

        Raises:
            ValueError: if they do not fit into the segment.
        """
        if examples > self.room:
            raise ValueError(f"examples={examples} exceed the room of {self.room} in this segment")
        if self.probed is not None:
            self.probed += product[:, self.columns :]
            product = product[:, : self.columns]
        self._product = product if self._product is None else self._product.add_(product)
        self._seen += examples
        if self._seen == self._end:
            self._end = self._seen * GROWTH
            if self.columns < len(self.factor):  # a complete basis has nothing to learn from a new one
                self.close()

    def close(self) -> Tensor:
        """Ends the segment; :attr:`factor` then stands for everything added. Returns the factor."""
        if self._product is not None:
            try:
                latest = nystrom_factor(self._product, self._basis())
            except FloatingPointError as error:
                raise FloatingPointError(f"layer {self.name!r}: {error}") from error
            known = torch.cat([self.factor, latest], 1) if self.factor.shape[1] else latest
            self.factor = compress(known, self.columns)
            self._last, self._omega, self._product = self._omega, None, None
        return self.factor

    def scale_(self, weight: float) -> None:
        """Everything added so far counts ``weight`` times as much."""
        self.factor = self.factor * weight**0.5
        for total in (self._product, self.probed):
            if total is not None:
                total.mul_(weight)

    def state(self) -> dict[str, Tensor]:
        """What :meth:`restore` needs beside factor and probed products to go on in the middle of a segment."""
        place = torch.tensor([self._seen, self._end])
        open_segment = {"sketch product": self._product, "sketch omega": self._omega, "sketch last": self._last}
        return {"sketch place": place, **{key: t for key, t in open_segment.items() if t is not None}}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Goes on from :meth:`state`; factor and probed products are those this sketch was made with."""
        self._seen, self._end = (int(x) for x in state["sketch place"])
        self._product = state.get("sketch product")
        self._omega = state.get("sketch omega")
        self._last = state.get("sketch last")
