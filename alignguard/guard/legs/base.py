"""What every leg of the penalty is: a value at the present weights, estimates from time to time, and a state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from alignguard.guard.config import GuardConfig
from alignguard.guard.rows import AlignmentRows
from alignguard.guard.schedule import DriftBudget


class Leg(ABC):
    """One leg of the penalty.

    Args:
        rows: alignment examples; a leg counts those that it reads in ``rows.readings``.
        config: strengths.
        budget: multiplies the strengths that bound drift; None leaves them as they are.

    Attributes:
        name: key of the leg in ``Guard.legs``.
    """

    name: ClassVar[str]

    def __init__(self, rows: AlignmentRows, config: GuardConfig, budget: DriftBudget | None) -> None:
        self.rows, self.config, self.budget = rows, config, budget

    @abstractmethod
    def terms(self, step: int) -> dict[str, Tensor]:
        """The parts of the penalty at the present weights, weighted.

        Args:
            step: optimizer steps done.

        Returns:
            Differentiable scalars by the name under which they are logged; empty where nothing is charged at this step.

        Raises:
            RuntimeError: the leg needs an estimate, and there is none yet.
        """

    def refresh(self, step: int, turn: int, progress: bool = False) -> None:  # noqa: B027
        """Estimate anew at the present weights; a leg that estimates nothing leaves this out.

        Args:
            step: optimizer steps done, from which random draws are seeded.
            turn: estimates made so far, which choose the examples.
            progress: show a bar.
        """

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values under keys that no other part of the guard uses; empty where nothing is kept."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take back what :meth:`state_dict` gave.

        Args:
            state: state of the whole guard, of which the leg reads its own keys.

        Raises:
            KeyError, TypeError, ValueError: a value is missing, or of another model.
        """
