"""The leg that charges the update by the curvature of the alignment data at the present weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

import fishergeo as fg
from alignguard.data import supervised_tokens
from alignguard.guard.config import GuardConfig
from alignguard.guard.distributed import pooled_fisher, world
from alignguard.guard.layer_curvature import LayerCurvature, check_widths, curvatures
from alignguard.guard.legs.base import Leg
from alignguard.guard.rows import AlignmentRows, Encoded
from alignguard.guard.schedule import DriftBudget, whole_number
from alignguard.guard.terms import CurvatureTerms
from alignguard.updates import Matrix, WeightUpdates
from fishergeo.accumulators import ACCUMULATORS
from fishergeo.estimation import NeverCalled

FUSED = (
    "A fused kernel that computes with a layer's weights without calling it hides it from the Fisher. Switch it off: "
    "lora_mlp_kernel, lora_qkv_kernel, lora_o_kernel and lora_embedding_kernel: false in axolotl, lora_dropout above 0 in "
    "unsloth, use_liger_kernel=False in transformers. GuardConfig() as it is charges KL alone, which reads no layer and "
    "holds under such kernels. If the alignment examples cannot reach these layers, leave them out"
)


class CurvatureLeg(Leg):
    """The terms ``alignment``, ``task``, ``overlap`` and ``separation`` of one Fisher estimate after another.

    The split and its terms are those of AlignGuard-LoRA (arXiv 2508.02079, section 4).

    Args:
        rows: alignment examples.
        config: strengths, and how the Fisher is estimated.
        budget: multiplies the alignment term.
        updates: what is guarded and how ΔW is read.

    Attributes:
        charged: whether any term needs the Fisher; false for the KL term alone.
        running: weighted sum of the estimates so far, where they are averaged.

    Raises:
        ValueError: a matrix whose curvature would not fit in memory.
    """

    name = "curvature"

    def __init__(
        self, rows: AlignmentRows, config: GuardConfig, budget: DriftBudget | None, updates: WeightUpdates
    ) -> None:
        super().__init__(rows, config, budget)
        self.charged = config.reads_fisher
        if self.charged:
            check_widths(updates.matrices.values(), config)
        self.updates = updates
        self.running: fg.Fisher | None = None
        self._scales: dict[str, float] = {}
        self._proven = False
        self.layers = {}

    @property
    def layers(self) -> dict[str, LayerCurvature]:
        """Curvature by matrix, empty before the first estimate."""
        return self._terms.layers

    @layers.setter
    def layers(self, layers: Mapping[str, LayerCurvature]) -> None:
        self._terms = CurvatureTerms(self.updates, layers, self.config, self._scale)

    @property
    def samples(self) -> int | None:
        """Supervised tokens that the present estimate is made of; None where they are unknown."""
        return next((layer.samples for layer in self.layers.values()), None)

    def refresh(self, step: int, turn: int, progress: bool = False) -> None:
        """Estimate the Fisher of the next examples in rotation; one forward and backward pass each."""
        c = self.config
        if not c.averaging:
            self.layers = {}  # or the old factors would stand beside the new ones
        chosen = [self.rows.rotating[place] for place in self.rows.places(c.refresh_examples, turn)]
        rows = sorted(chosen, key=lambda row: len(row["input_ids"]))
        fisher = pooled_fisher(rows, self.rows.model, lambda mine: self.estimate(mine, step, progress))
        if c.averaging:
            fisher = fisher if self.running is None else fisher.merge(self.running.scaled(c.averaging))
            self.running = fisher
        self.rows.readings += len(rows)
        tokens = sum(supervised_tokens(row) for row in rows) + c.averaging * (self.samples or 0)
        self.take(fisher, round(tokens))

    def estimate(self, rows: Sequence[Encoded], step: int, progress: bool = False) -> fg.Fisher:
        """The Fisher of some examples at the present weights.

        Args:
            rows: examples that this process reads.
            step: optimizer steps done, from which random draws are seeded.
            progress: show a bar.

        Raises:
            ValueError: guarded layers that never fire while others do; names them, and what may be switched off.
        """
        c = self.config
        try:
            fisher = fg.estimate_fisher(
                self.rows.model,
                [self.rows.batch(rows[i : i + c.batch_size]) for i in range(0, len(rows), c.batch_size)],
                structure=c.structure,
                kind=c.kind,
                rank=c.sketch_rank,
                layers=[matrix.layer for matrix in self.updates.matrices.values()],
                reduction="sum",  # of whole responses, so that the quadratic is in nats a response
                progress=progress,
                seed=c.seed + step + 1_000_003 * world()[0],  # what is drawn for one share is not drawn for the next
                verify=not self._proven,
            )
        except NeverCalled as error:
            missed = sorted(
                (m for m in self.updates.matrices.values() if m.layer in error.layers), key=lambda m: m.plain
            )
            names = [matrix.plain for matrix in missed]
            raise ValueError(
                f"{len(names)} guarded layers never fire while {error.others} others do: {', '.join(names[:4])}"
                f"{', ...' if len(names) > 4 else ''}. {FUSED} (exclude={missed[0].excludable!r})"
            ) from error
        self._proven = True  # the modules stay what they are, so once in a run is enough
        return fisher

    def take(self, fisher: Mapping[str, Any], samples: int | None = None) -> None:
        """Take curvatures that were estimated elsewhere; see :meth:`alignguard.Guard.use_fisher`."""
        self.layers = curvatures(fisher, self.updates.matrices.values(), self.config, samples)

    def terms(self, step: int) -> dict[str, Tensor]:
        """Every curvature term at the present weights, the alignment term as heavy as the budget says."""
        if not self.charged:
            return {}
        if not self.layers:
            raise RuntimeError(
                "the guard has no curvature yet: call begin_step(step) at the start of every optimizer step, or "
                "refresh() or use_fisher() before the first penalty()"
            )
        sums = self._terms.terms()
        if self.budget is not None and "alignment" in sums:
            sums["alignment"] = sums["alignment"] * (self.budget.multiplier * self.budget.scale)
        return sums

    def drift(self) -> float:
        """½ Σ tr(ΔWᵀFΔW) over the matrices in nats a response."""
        return self._terms.drift()

    def cosine(self) -> float:
        """Mean over the matrices of how alike the inputs of the two parts are, in [0, 1]."""
        return self._terms.cosine()

    def _scale(self, matrix: Matrix) -> float:
        """Root mean square of W0."""
        if matrix.name not in self._scales:
            weight = matrix.weight().detach()
            self._scales[matrix.name] = float(weight.float().square().mean().sqrt()) or 1.0
        return self._scales[matrix.name]

    def state_dict(self) -> dict[str, Any]:
        """Operators as tensors with their kinds, scales of the weights, and the running Fisher."""
        return {
            "layer": {name: layer.operator.tensors() for name, layer in self.layers.items()},
            "layers": {name: type(layer.operator).__name__ for name, layer in self.layers.items()},
            "samples": self.samples,
            "scales": dict(self._scales),
            "running": None if self.running is None else _sums_of(self.running),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        self._scales = {str(name): float(value) for name, value in state["scales"].items()}
        operators = {
            name: fg.operator_from_tensors(state["layers"][name], parts) for name, parts in state["layer"].items()
        }
        if operators:
            self.take(operators, None if state["samples"] is None else whole_number(state, "samples"))
        else:
            self.layers = {}
        self.running = None if state["running"] is None else _fisher_of(state["running"])


def _sums_of(fisher: fg.Fisher) -> dict[str, Any]:
    sums = {name: dict(accumulator.sums) for name, accumulator in fisher.accumulators.items()}
    return {"header": dataclasses.asdict(fisher.header), "sums": sums}


def _fisher_of(state: Mapping[str, Any]) -> fg.Fisher:
    shapes = {name: (int(p), int(q)) for name, (p, q) in state["header"]["shapes"].items()}
    header = fg.FisherHeader(**{**state["header"], "shapes": shapes})
    kind = ACCUMULATORS[header.structure]
    first: dict[int, str] = {}
    made = {}
    for name, sums in state["sums"].items():
        made[name] = kind(header.layout(name), dict(sums))
        # Layers that read one input hold its sum once, in a checkpoint too, and are known by that.
        if held := [id(sums[key]) for key in kind.shared if key in sums]:
            made[name].group = first.setdefault(held[0], name)
    return fg.Fisher(header, made)
