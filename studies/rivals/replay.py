"""Replay: some alignment examples among the task's rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from studies.rivals.base import Encoded, Rival, Run, check_strength


@dataclass
class Replay(Rival):
    """Alignment examples make up a share of the rows that are trained on; they repeat where there are few.

    Rows are marked, so that the trainer counts those that were read. How little of it holds off forgetting: Bethune et al.
    2025 (arXiv 2502.06042); for safety, Bianchi et al. 2023 (arXiv 2309.07875).

    Attributes:
        share: of all rows, in [0, 0.99]; 0.01, 0.05 and 0.1 are usual.

    Raises:
        ValueError: a share outside [0, 0.99].
    """

    name: ClassVar[str] = "replay"
    reads_alignment: ClassVar[bool] = True
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "share": (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5)
    }
    share: float = 0.05

    def __post_init__(self) -> None:
        check_strength("share", self.share, 0.99)

    def rows(self, task: Sequence[Encoded], run: Run) -> list[Encoded]:
        """The task's rows and after them the replayed ones of ``run``; the trainer shuffles all."""
        count = math.ceil(self.share / (1 - self.share) * len(task) - 1e-10)  # 15.000000000000002 rows are 15
        replayed = [{**run.alignment[i % len(run.alignment)], "replayed": True} for i in range(count)]
        return [*task, *replayed]
