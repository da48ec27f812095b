"""One block Lanczos run as a machine: it asks for a product, takes it, and asks again.

The basis V and its products A V are both kept. Then Rayleigh-Ritz and true residuals cost no further product, and a
random direction can join at any time: after a breakdown, or from an old basis. While every residual of the basis lies
in the span of the next block, the space is a block Krylov space and expanding it by A·(latest block) is block Lanczos
with full reorthogonalisation; a thick restart (Wu and Simon 2000, for blocks) keeps that property, because it keeps
the next block. Converged pairs stay in the basis at every restart (soft locking, Stathopoulos and McCombs 2007).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fishergeo._linalg import directions, orthonormalise
from fishergeo.krylov_plan import Plan
from fishergeo.operators import fix_signs
from fishergeo.spectrum import Spectrum

REFRESHES = 3


class KrylovRun:
    """The state of one operator's run.

    Use: while not :attr:`done`, multiply :meth:`request` by the operator and give the product to :meth:`receive`;
    then :meth:`spectrum`.

    Args:
        size: of the operator.
        plan: what is wanted.
        dtype: of vectors, float32 or float64.
        eps: rounding unit of the operator's products.
        device: of vectors.
        name: of the layer; random directions depend on it.
        start: (size, c), a guess of the wanted space, or None.
    """

    def __init__(
        self,
        size: int,
        plan: Plan,
        dtype: torch.dtype,
        eps: float,
        device: torch.device,
        name: str,
        start: Tensor | None,
    ) -> None:
        self.size, self.plan, self.name = size, plan, name
        self.eps = max(eps, torch.finfo(dtype).eps)
        empty = torch.zeros(size, 0, dtype=dtype, device=device)
        self.tensors: dict[str, Tensor] = {
            "basis": empty, "image": empty, "pending": empty, "partial": empty,
            "projected": torch.zeros(0, 0, dtype=torch.float64),
            "values": torch.zeros(0, dtype=torch.float64), "rotation": torch.zeros(0, 0, dtype=torch.float64),
            "found": torch.zeros(0, dtype=torch.float64),
        }  # fmt: skip
        # Plain numbers, so that they go into a checkpoint's header as they are.
        self.numbers: dict[str, Any] = {
            "phase": "grow", "krylov": True, "exponent": None, "norm": 0.0, "draws": 0, "passes": 0, "columns": 0,
            "refreshes": 0, "stopped": "", "pairs": 0, "warm": start is not None,
        }  # fmt: skip
        first = empty
        if start is not None:
            start = start.detach()
            scale = start.abs().max().clamp_min(torch.finfo(start.dtype).tiny)
            guess = (start / scale).to(device, dtype)[:, : max(plan.block, plan.basis - plan.block)]
            first = orthonormalise(guess, empty, self._rounding(float(torch.linalg.matrix_norm(guess))))
        self.numbers["krylov"] = first.shape[1] <= plan.block
        self.tensors["pending"] = self._filled(first, empty, plan.block)

    @property
    def done(self) -> bool:
        """Whether nothing more is to be multiplied."""
        return self.numbers["phase"] == "done"

    def request(self) -> Tensor:
        """(size, c), c ≤ block: what to multiply next, orthonormal columns."""
        start = self.tensors["partial"].shape[1]
        return self.tensors["pending"][:, start : start + self.plan.block].contiguous()

    def receive(self, product: Tensor) -> None:
        """Takes A·request.

        Raises:
            ValueError: if the shape is not the request's, or the products are clearly not those of a symmetric matrix.
            FloatingPointError: for NaN or infinity.
        """
        asked = self.request()
        where = f"layer {self.name!r}: " if self.name else ""
        if product.shape != asked.shape:
            raise ValueError(
                f"{where}the operator returned {tuple(product.shape)} for a block of {tuple(asked.shape)}; it must "
                "accept a (size, c) block and return one of the same shape"
            )
        if not bool(torch.isfinite(product).all()):
            raise FloatingPointError(f"{where}the operator's product holds NaN or infinity")
        peak = float(product.abs().max())
        if self.numbers["exponent"] is None and peak > 0:
            # A power of two, so exact: operators of any scale are solved as if of norm about one.
            most = 1000 if asked.dtype == torch.float64 else 120
            self.numbers["exponent"] = max(-most, min(most, math.frexp(peak)[1]))
        image = product.to(asked) * math.ldexp(1.0, -(self.numbers["exponent"] or 0))
        overlap = asked.T @ image
        skew = float((overlap - overlap.T).abs().max())
        # Loose, since a function may well compute in a lower precision than that of its blocks. A start of the caller's
        # may lie in the null space, where all there is to compare is rounding: the first random block is asked instead.
        known = self.numbers["norm"] > 0 or not self.numbers["warm"]
        if known and skew > self.eps**0.25 * max(float(overlap.abs().max()), self.numbers["norm"]):
            raise ValueError(
                f"{where}the operator is not symmetric: ⟨u, A v⟩ and ⟨A u, v⟩ differ by {skew:.3g}, relative"
            )
        self.tensors["partial"] = torch.cat([self.tensors["partial"], image], 1)
        self.numbers["passes"] += 1
        self.numbers["columns"] += asked.shape[1]
        if self.tensors["partial"].shape[1] == self.tensors["pending"].shape[1]:
            self._check() if self.numbers["phase"] == "check" else self._grow()

    def reopen(self) -> None:
        """Goes on where the allowance of an earlier run ended, if the present one is larger."""
        if self.done and self.numbers["stopped"] == "passes" and self.numbers["passes"] < self.plan.max_passes:
            self.numbers.update(phase="grow", krylov=False, stopped="", pairs=0)
            self._expand(self.plan.block)

    def spectrum(self) -> Spectrum:
        """What is known now; the best there is, whether or not :attr:`done`."""
        vectors, pairs = self._leading(self.numbers["pairs"] or self._pairs())
        norms = self.tensors["found"] if self.done else self._residual_norms(vectors, self._image_of(len(pairs)), pairs)
        unit = math.ldexp(1.0, self.numbers["exponent"] or 0)
        bounds = norms + 0.5 * self._rounding(self.numbers["norm"])
        return Spectrum(
            (pairs * unit).to(vectors), fix_signs(vectors), (bounds * unit).to(vectors), (norms <= self._limits(pairs)).to(vectors.device),
            self.numbers["passes"], self.numbers["columns"], self.numbers["stopped"] or "passes",
        )  # fmt: skip

    def _rounding(self, norm: float) -> float:
        return 4 * self.eps * self.size**0.5 * norm

    def _limits(self, values: Tensor) -> Tensor:
        return (self.plan.tol * values.abs()).clamp_min(self._rounding(self.numbers["norm"]))

    def _pairs(self) -> int:
        return min(self.plan.k, len(self.tensors["values"]))

    def _leading(self, count: int) -> tuple[Tensor, Tensor]:
        basis = self.tensors["basis"]
        return basis @ self.tensors["rotation"][:, :count].to(basis), self.tensors["values"][:count]

    def _image_of(self, count: int) -> Tensor:
        image = self.tensors["image"]
        return image @ self.tensors["rotation"][:, :count].to(image)

    @staticmethod
    def _residual_norms(vectors: Tensor, images: Tensor, values: Tensor) -> Tensor:
        return torch.linalg.vector_norm(images - vectors * values.to(vectors), dim=0).cpu().double()

    def _grow(self) -> None:
        """The pending block and its products join the basis; then decide what comes next."""
        t = self.tensors
        latest, image = t["pending"], t["partial"]
        t["basis"], t["image"] = torch.cat([t["basis"], latest], 1), torch.cat([t["image"], image], 1)
        cross = (t["basis"].T @ image).cpu().double()
        old = len(t["projected"])
        projected = cross.new_zeros(len(cross), len(cross))
        projected[:old, :old] = t["projected"]
        projected[:, old:] = cross
        projected[old:, :old] = cross[:old].T
        t["projected"] = (projected + projected.T) / 2
        self._rayleigh_ritz()
        count = self._pairs()
        vectors, values = self._leading(count)
        norms = self._residual_norms(vectors, self._image_of(count), values)
        stopped, pairs = self._verdict(norms, values)
        left = self.plan.max_passes - self.numbers["passes"]
        check = math.ceil(pairs / self.plan.block) if self.plan.recheck else 0
        if stopped or left <= check:
            self.numbers["stopped"], self.numbers["pairs"] = stopped or "passes", pairs
            if 0 < check <= left:
                t["pending"], t["partial"] = self._leading(pairs)[0], t["partial"][:, :0]
                self.numbers["phase"] = "check"
            else:
                self._finish(norms[:pairs])
            return
        self._expand(latest.shape[1])

    def _rayleigh_ritz(self) -> None:
        values, rotation = torch.linalg.eigh(self.tensors["projected"])
        self.numbers["norm"] = max(self.numbers["norm"], float(values.abs().max()))
        order = self.plan.key(values).argsort(stable=True)
        self.tensors["values"], self.tensors["rotation"] = values[order], rotation[:, order].contiguous()

    def _verdict(self, norms: Tensor, values: Tensor) -> tuple[str, int]:
        """Why to stop, or an empty string, and with how many pairs."""
        count = len(values)
        if self.plan.energy is not None and self.plan.trace is not None:
            exponent = self.numbers["exponent"] or 0
            goal = math.ldexp(self.plan.energy * self.plan.trace(), -exponent)
            # Ritz values of a positive semi-definite operator: their sum is the energy captured, converged or not.
            reached = values.clamp_min(0).cumsum(0) >= goal * (1 - 1e-12)
            if bool(reached.any()):
                return "energy", int(reached.to(torch.int64).argmax()) + 1
        if count == self.plan.k and bool((norms <= self._limits(values)).all()):
            return "tolerance", count
        return ("stalled" if self.tensors["basis"].shape[1] >= self.size else ""), count

    def _expand(self, latest: int) -> None:
        """The next block: A times the latest one, or residuals where the space is no Krylov space; random if short."""
        t = self.tensors
        candidates = t["image"][:, -latest:] if self.numbers["krylov"] else self._open_residuals()
        block = orthonormalise(candidates, t["basis"], self._rounding(self.numbers["norm"]))
        columns = min(self.plan.block, self.size - t["basis"].shape[1])
        block = self._filled(block[:, :columns], t["basis"], columns)
        if t["basis"].shape[1] + block.shape[1] > self.plan.basis:
            self._restart(block.shape[1])
        t["pending"], t["partial"] = block, t["image"][:, :0]

    def _open_residuals(self) -> Tensor:
        """Residuals of the first Ritz pairs that have not converged, at most a block of them."""
        vectors, values = self._leading(len(self.tensors["values"]))
        residuals = self._image_of(len(values)) - vectors * values.to(vectors)
        lengths = torch.linalg.vector_norm(residuals, dim=0).cpu().double()
        still_open = (lengths > self._limits(values)).nonzero()[: self.plan.block, 0]
        return residuals[:, still_open.to(residuals.device)]

    def _filled(self, block: Tensor, basis: Tensor, columns: int) -> Tensor:
        """``block`` widened to ``columns`` by fresh random directions, orthonormal to it and to ``basis``."""
        floor = 4 * torch.finfo(block.dtype).eps * self.size**0.5
        for _ in range(4):
            missing = columns - block.shape[1]
            if missing <= 0:
                break
            fresh = directions(self.size, missing, self.plan.seed, self.name, self.numbers["draws"]).to(block)
            self.numbers["draws"] += missing
            block = torch.cat([block, orthonormalise(fresh, torch.cat([basis, block], 1), floor)], 1)
        return block.contiguous()

    def _restart(self, needed: int) -> None:
        """Keeps the leading Ritz vectors, beside ``needed`` columns that are to join."""
        self._rotate(self.plan.kept(self.plan.key(self.tensors["values"]), needed, self.numbers["norm"]))

    def _rotate(self, keep: int, fresh: Tensor | None = None) -> None:
        """The basis becomes its ``keep`` leading Ritz vectors; ``fresh``: new products of the first of them."""
        t = self.tensors
        basis, images = self._leading(keep)[0], self._image_of(keep)
        if fresh is not None:
            images = torch.cat([fresh, images[:, fresh.shape[1] :]], 1)
        # One Newton step towards orthonormality, so that rounding does not add up over restarts.
        step = 1.5 * torch.eye(keep, dtype=basis.dtype, device=basis.device) - 0.5 * (basis.T @ basis)
        t["basis"], t["image"] = (basis @ step).contiguous(), (images @ step).contiguous()
        projected = (t["basis"].T @ t["image"]).cpu().double()
        t["projected"] = (projected + projected.T) / 2
        self._rayleigh_ritz()

    def _check(self) -> None:
        """Residuals from fresh products of the final vectors; on failure those replace the stored ones."""
        t, pairs = self.tensors, self.numbers["pairs"]
        values, fresh = t["values"][:pairs], t["partial"]
        norms = self._residual_norms(t["pending"], fresh, values)
        failed = self.numbers["stopped"] == "tolerance" and bool((norms > self._limits(values)).any())
        if not failed or t["basis"].shape[1] >= self.size:
            self.numbers["stopped"] = "stalled" if failed else self.numbers["stopped"]
            self._finish(norms)
            return
        if self.numbers["refreshes"] == REFRESHES or self.numbers["passes"] >= self.plan.max_passes:
            self.numbers["stopped"] = "stalled" if self.numbers["refreshes"] == REFRESHES else "passes"
            self._finish(norms)
            return
        self.numbers.update(refreshes=self.numbers["refreshes"] + 1, phase="grow", krylov=False, stopped="", pairs=0)
        room = max(pairs, self.plan.basis - self.plan.block)
        self._rotate(min(room, len(t["values"])), fresh)
        self._expand(self.plan.block)

    def _finish(self, norms: Tensor) -> None:
        self.tensors["found"] = norms
        self.tensors["pending"] = self.tensors["partial"] = self.tensors["basis"][:, :0].contiguous()
        self.numbers["phase"] = "done"
