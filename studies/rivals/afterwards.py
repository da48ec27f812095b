"""Repair after training: a few steps on one alignment example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from alignguard.objective import response_loss
from studies.rivals.base import Rival, Run, check_count, check_strength


@dataclass
class OneShot(Rival):
    """Plain LoRA, then AdamW steps on a single alignment example (Safety at One Shot, 2601.01887).

    Attributes:
        steps: how many, at least 1.
        learning_rate: of those steps.
        example: which alignment example, by its place in the run's order.

    Raises:
        ValueError: fewer than one step, or a learning rate that is negative or not finite.
    """

    name: ClassVar[str] = "one-shot"
    reads_alignment: ClassVar[bool] = True
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"steps": (1, 5, 10, 20), "learning_rate": (1e-4, 5e-4, 2e-3)}
    steps: int = 10
    learning_rate: float = 5e-4
    example: int = 0

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_strength("learning_rate", self.learning_rate)

    def finish(self, run: Run) -> None:
        """Take the steps with the model of ``run``; the loss is the mean over the response's tokens."""
        batch = run.batch([run.alignment[self.example % len(run.alignment)]])
        tokens = (batch["labels"][:, 1:] != -100).sum()
        optimizer = torch.optim.AdamW(run.parameters(), lr=self.learning_rate, weight_decay=0.0)
        run.model.eval()
        for _ in range(self.steps):
            optimizer.zero_grad()
            (response_loss(run.model, batch).sum() / tokens).backward()
            optimizer.step()
            run.examples_read += 1
        optimizer.zero_grad()
