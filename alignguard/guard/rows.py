"""The alignment examples of a guard: those in rotation, those held back, and batches of either."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from alignguard.data import pad_rows
from alignguard.guard.config import GuardConfig
from alignguard.objective import IGNORED, model_kind, placeholders

Encoded = Mapping[str, Any]


class AlignmentRows:
    """Encoded alignment examples, shuffled once. Where drift is measured, the last ones are held back for that.

    Args:
        rows: encoded examples, ``{"input_ids": list, "labels": list}``.
        model: the model that reads them; batches go to its device.
        config: ``seed`` of the order, and how many are held back.
        pad_token_id: token that fills padded positions.

    Attributes:
        rotating: examples that the legs of the penalty read in turn.
        held: examples on which drift is measured; empty where it is not.
        readings: examples read so far, each reading counted.

    Raises:
        ValueError: no example, or none left once one is held back; an example that holds the place of an image, sound or
            video, which is not read here.
    """

    def __init__(self, rows: Sequence[Encoded], model: nn.Module, config: GuardConfig, pad_token_id: int = 0) -> None:
        if not rows:
            raise ValueError("the guard needs at least one alignment example")
        stand_in = placeholders(model)
        for place, row in enumerate(rows):
            if found := stand_in.intersection(row["input_ids"]):
                raise ValueError(
                    f"alignment example {place} holds token {min(found)}, the place of an image, sound or video, and the guard "
                    "reads text alone; give alignment examples without any"
                )
        self.model, self.pad_token_id = model, pad_token_id
        self.rotating, self.held = list(rows), list[Encoded]()
        self.readings = 0
        random.Random(config.seed).shuffle(self.rotating)
        if config.max_drift is not None or config.adaptive:
            count = min(config.held_back, len(rows) // 2)
            if count < 1:
                raise ValueError("measuring drift needs at least two alignment examples, one of them held back")
            self.rotating, self.held = self.rotating[:-count], self.rotating[-count:]

    def places(self, count: int, turn: int) -> list[int]:
        """Places of the next examples in rotation: the turn decides, so that a resumed run reads the same ones.

        Args:
            count: examples; at most as many as there are.
            turn: number of the reading, from 0.
        """
        count = self.at_once(count)
        return [(turn * count + i) % len(self.rotating) for i in range(count)]

    def at_once(self, count: int) -> int:
        """How many examples a reading of ``count`` takes: at most as many as there are in rotation."""
        return min(count, len(self.rotating))

    def batch(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """Rows padded to one batch on the model's device."""
        device = next(self.model.parameters()).device
        return {k: v.to(device) for k, v in pad_rows(rows, self.pad_token_id, model_kind(self.model)).items()}


def shortened(row: Encoded, tokens: int | None, kind: str) -> Encoded:
    """The row up to its first supervised tokens; what comes after them is not run.

    A refusal is decided in its first words, and where these are kept the rest follows from them.

    Args:
        row: encoded example; a class instead of labels leaves it as it is.
        tokens: most supervised tokens; None leaves the row as it is.
        kind: kind of model, see :func:`alignguard.objective.model_kind`.
    """
    labels = row["labels"]
    if tokens is None or isinstance(labels, int):
        return row
    supervised = [place for place, label in enumerate(labels) if label != IGNORED]
    if len(supervised) <= tokens:
        return row
    end = supervised[tokens - 1] + 1
    read = row["input_ids"] if kind == "seq2seq" else row["input_ids"][:end]
    return {**row, "input_ids": read, "labels": labels[:end]}
