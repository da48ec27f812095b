"""One block Lanczos run as a machine: it asks for a product, takes it, and asks again.

The basis V and its products A V are both kept. Then Rayleigh-Ritz and true residuals cost no further product, and a
random direction can join at any time: after a breakdown, or from an old basis. While every residual of the basis lies
in the span of the next block, the space is a block Krylov space and expanding it by A·(latest block) is block Lanczos
with full reorthogonalisation; a thick restart (Wu and Simon 2000, for blocks) keeps that property, because it keeps
the next block. Converged pairs stay in the basis at every restart (soft locking, Stathopoulos and McCombs 2007).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fishergeo import _storage
from fishergeo._linalg import binary_exponent, directions, orthonormalise
from fishergeo.operators import fix_signs
from fishergeo.sketching.error import check_trace
from fishergeo.spectral.spectrum import Spectrum

WHICH = ("largest", "smallest", "magnitude")


@dataclass(frozen=True)
class Plan:
    """What a run is asked for.

    Attributes:
        k: pairs.
        block: columns of a product.
        basis: most columns kept.
        tol: a pair has converged when ‖A v − θ v‖ ≤ tol·|θ|, or is at rounding level.
        which: end of the spectrum.
        energy: share of the trace at which to stop, or None.
        trace: gives the trace, where ``energy`` is set.
        max_passes: products allowed, those of the check included.
        recheck: multiply the final vectors once more.
        seed: seed of random directions.
    """

    k: int
    block: int
    basis: int
    tol: float
    which: str
    energy: float | None
    trace: Callable[[], float] | None
    max_passes: int
    recheck: bool
    seed: int

    def key(self, values: Tensor) -> Tensor:
        """What the wanted values have least of, (m,)."""
        return {"largest": -values, "smallest": values, "magnitude": -values.abs()}[self.which]

    def kept(self, key: Tensor, needed: int, norm: float) -> int:
        """How many Ritz vectors a restart keeps, so that convergence is fastest (Yamazaki et al. 2010).

        With m columns for further block steps of width b, errors fall like exp(−2·(m/b)·√γ), γ the gap from the last
        wanted value to the first that is dropped, relative to the rest of the spectrum. So a cluster is kept whole.

        Args:
            key: sort key of all Ritz values, ascending.
            needed: columns that are to join at once.
            norm: norm of the operator.

        Returns:
            From k to what fits.
        """
        first, most = min(self.k, len(key)), min(self.basis - needed, len(key) - 1)
        counts = torch.arange(first, most + 1)
        gap = (key[counts] - key[first - 1]) / (key[-1] - key[counts]).clamp_min(1e-6 * norm)
        return int(counts[((self.basis - counts) * gap.sqrt()).argmax()])


REFRESHES = 3


class KrylovRun:
    """The state of one operator's run.

    Use: while not :attr:`done`, multiply :meth:`request` by the operator and give the product to :meth:`receive`;
    then :meth:`spectrum`.

    Args:
        size: size of the operator.
        plan: eigenpairs that are wanted, and how.
        dtype: dtype of vectors, float32 or float64.
        eps: rounding unit of the operator's products.
        device: device of vectors.
        name: name of the layer; random directions depend on it.
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
        # Sums over the size are made in float32 or wider, so half precision rounds what goes in and what comes out, once.
        self.rounding = 4 * max(self.eps, min(self.eps, torch.finfo(torch.float32).eps) * size**0.5)
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
            # Operators of any scale are solved as if of norm about one.
            self.numbers["exponent"] = binary_exponent(peak, asked.dtype)
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
        return self.rounding * norm

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
            trace = self.plan.trace()
            held = math.ldexp(float(self.tensors["values"].clamp_min(0).sum()), exponent)
            check_trace(trace, held, self.eps, name=self.name)
            goal = math.ldexp(self.plan.energy * trace, -exponent)
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


STATE = ("basis", "image", "pending", "partial", "projected", "values", "rotation", "found")


def _described(run: KrylovRun) -> dict[str, Any]:
    plan = run.plan
    return {
        "size": run.size, "k": plan.k, "block": plan.block, "basis": plan.basis, "tol": plan.tol, "which": plan.which,
        "energy": plan.energy, "recheck": plan.recheck, "seed": plan.seed,
        "dtype": str(run.tensors["basis"].dtype),
    }  # fmt: skip


def write_checkpoint(path: Path, runs: Mapping[str, KrylovRun]) -> None:
    """Writes the state of all runs, atomically.

    Args:
        path: the file.
        runs: layer -> run.
    """
    tensors = {f"{name}|{key}": run.tensors[key] for name, run in runs.items() for key in STATE}
    header = {name: {"plan": _described(run), "numbers": run.numbers} for name, run in runs.items()}
    _storage.write(path, tensors, {"lanczos": header})


def read_checkpoint(path: Path, runs: Mapping[str, KrylovRun]) -> None:
    """Sets runs to a state that :func:`write_checkpoint` wrote.

    Args:
        path: the file.
        runs: layer -> run, freshly made with the same settings.

    Raises:
        ValueError: if the file is damaged, or of a run with other layers, sizes or settings.
    """
    file = _storage.TensorFile(path)
    header = file.header.get("lanczos")
    if not isinstance(header, dict):
        raise ValueError(f"{path}: not a checkpoint of lanczos")
    if set(header) != set(runs):
        raise ValueError(f"{path}: a checkpoint of the layers {sorted(header)}, not of {sorted(runs)}")
    tensors = {f"{name}|{key}": file.tensor(f"{name}|{key}", "cpu") for name in runs for key in STATE}
    for name, run in runs.items():
        try:
            saved, numbers = header[name]["plan"], header[name]["numbers"]
            differing = [key for key, value in _described(run).items() if saved[key] != value]
            complete = set(numbers) == set(run.numbers)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: damaged checkpoint ({error})") from error
        if differing:
            key = differing[0]
            raise ValueError(
                f"{path}: a checkpoint of another run, with {key}={saved[key]!r} and not {_described(run)[key]!r}; "
                "delete the file or pass another"
            )
        if not complete:
            raise ValueError(f"{path}: damaged checkpoint (its counters are {sorted(numbers)})")
        _check_shapes(path, {key: tensors[f"{name}|{key}"] for key in STATE}, run.size)
        for key in STATE:
            # clone: memory of our own alignment, or the products' rounding could differ from that of an unbroken run.
            run.tensors[key] = tensors[f"{name}|{key}"].clone().to(run.tensors[key].device)
        run.numbers = dict(numbers)
        run.reopen()


def _check_shapes(path: Path, state: Mapping[str, Tensor], size: int) -> None:
    kept, done = state["values"].numel(), state["partial"].shape[-1]
    expected = {
        "basis": (size, kept), "image": (size, kept), "projected": (kept, kept), "values": (kept,),
        "rotation": (kept, kept), "partial": (size, done),
    }  # fmt: skip
    wrong = [key for key, shape in expected.items() if tuple(state[key].shape) != shape]
    if wrong or state["pending"].ndim != 2 or len(state["pending"]) != size or state["pending"].shape[1] < done:
        key = wrong[0] if wrong else "pending"
        raise ValueError(f"{path}: damaged checkpoint ({key} has shape {tuple(state[key].shape)})")
