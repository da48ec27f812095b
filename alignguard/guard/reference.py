"""What the model said before training, at the supervised tokens of alignment examples, kept so as to be asked once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from alignguard.loading import switched_off
from alignguard.objective import divergence, evaluation_mode, supervised

Collate = Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]


class Reference:
    """Log-probabilities of the model before training, which KL is measured from (Li and Hoiem 2017).

    Every example is read alone, so that what is kept does not depend on the company it was first asked in, and a
    resumed run reads the same numbers.

    Args:
        model: the model that trains.
        rows: encoded examples.
        collate: rows -> a batch on the model's device.
        switchable: whether the model with its adapter off is the model before training. If not, every example is
            read at once, so make this before training.
        limit: most bytes kept; beyond them examples are asked again each time.
        needed: whether all examples must be read. If not, those that ``limit`` does not hold are left out where the model
            before training cannot be read later.

    Attributes:
        held: bytes kept.

    Raises:
        ValueError: the model before training cannot be read later, and ``limit`` does not hold all examples.
    """

    def __init__(
        self,
        model: Any,
        rows: Sequence[Mapping[str, Any]],
        collate: Collate,
        switchable: bool,
        limit: int,
        needed: bool = True,
    ) -> None:
        self.model, self.rows, self.collate, self.switchable, self.limit = model, rows, collate, switchable, limit
        self._kept: dict[int, Tensor] = {}
        self.held = 0
        if not switchable:
            self.read()
            if needed and len(self._kept) < len(rows):
                raise ValueError(
                    f"reference log-probabilities of {len(rows)} alignment examples need more than "
                    f"kl_cache_mb={limit >> 20} MiB, and this model's start cannot be read later; raise kl_cache_mb or "
                    "give fewer examples"
                )
            self.rows = rows[: len(self._kept)]

    def read(self) -> None:
        """Read every example that ``limit`` holds, at the weights of now."""
        self._kept, self.held = {}, 0
        for place in range(len(self.rows)):
            self._read(place)
            if place not in self._kept:
                break

    def switch(self) -> None:
        """Forget what was read: the model with its adapter off turned out to be the model before training."""
        self.switchable, self._kept, self.held = True, {}, 0

    def _read(self, place: int) -> Tensor:
        if place in self._kept:
            return self._kept[place]
        batch = self.collate([self.rows[place]])
        with evaluation_mode(self.model), switched_off(self.model) if self.switchable else nullcontext():
            found = supervised(self.model, batch)[0]
        size = found.numel() * found.element_size()
        if self.held + size <= self.limit:
            self._kept[place] = found.cpu()
            self.held += size
        return found

    def divergence(self, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """KL(before ‖ present) at the supervised tokens of some examples, differentiable in the present weights.

        Both are read in evaluation mode: with dropout or NEFTune's noise in one of them, a model that has not moved
        would be charged for the noise.

        Args:
            places: which examples, by their place among the rows.

        Returns:
            nats (tokens,) in float32 or wider, and the row of each token among ``places`` (tokens,), int64.
        """
        batch = self.collate([self.rows[place] for place in places])
        with evaluation_mode(self.model, gradients=True):
            present, _, rows = supervised(self.model, batch)
        base = torch.cat([self._read(place).to(present.device) for place in places])
        return divergence(base, present), rows

    def drift(self, places: Sequence[int]) -> float:
        """Mean over the examples at ``places`` of the KL of the whole response in nats, without gradients, dropout off."""
        with evaluation_mode(self.model):
            nats, _ = self.divergence(places)
        return float(nats.sum(dtype=torch.float64)) / len(places)
