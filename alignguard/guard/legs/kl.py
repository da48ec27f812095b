"""The leg that charges what the model says: KL to the model before training."""

from __future__ import annotations

from torch import Tensor

from alignguard.guard.config import GuardConfig
from alignguard.guard.legs.base import Leg
from alignguard.guard.reference import Reference
from alignguard.guard.rows import AlignmentRows
from alignguard.guard.schedule import DriftBudget


class KLLeg(Leg):
    """λ_KL KL(start ‖ present) a response token, on a few examples in rotation (Li and Hoiem 2017).

    Args:
        rows: alignment examples.
        config: strength, examples and interval.
        budget: multiplies the strength.
        reference: what the model said before training at ``rows.rotating``.
    """

    name = "kl"

    def __init__(
        self, rows: AlignmentRows, config: GuardConfig, budget: DriftBudget | None, reference: Reference
    ) -> None:
        super().__init__(rows, config, budget)
        self.reference = reference

    def terms(self, step: int) -> dict[str, Tensor]:
        """The term ``kl``, every ``kl_every`` optimizer steps and so many times as heavy."""
        c = self.config
        if step % c.kl_every != 0:
            return {}
        places = self.rows.places(c.kl_examples, step // c.kl_every)
        multiplier = 1.0 if self.budget is None else self.budget.multiplier
        value = c.lambda_kl * multiplier * c.kl_every * self.reference.divergence(places)[0].mean()
        self.rows.readings += len(places)
        return {"kl": value}
