"""What a user of another tool says about the guard, in that tool's own configuration: one block, the same in every tool."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from alignguard.data import read_text
from alignguard.guard import Guard, GuardConfig
from alignguard.training import DriftCallback, make_guard

PRESETS: dict[str, Callable[..., GuardConfig]] = {
    "default": GuardConfig,
    "curvature": GuardConfig.curvature,
    "combined": GuardConfig.combined,
    "paper": GuardConfig.paper,
}


@dataclass(frozen=True)
class Options:
    """The block ``alignguard:`` of a configuration.

    Attributes:
        alignment_data: file or hub name of what to keep; packaged prompts, answered by the model itself, if left out.
        preset: guard that ``config`` changes.
        config: fields of :class:`alignguard.GuardConfig`.
        drift_every: optimizer steps between two readings of DriftCheck while training; None takes none.
        max_drift: nats a response above which such a reading stops the run.
        driftcheck: whether DriftCheck's report is written after training.
        limit: prompts of each category that are asked then and while training.
    """

    alignment_data: str | None = None
    preset: str = "default"
    config: Mapping[str, Any] | None = None
    drift_every: int | None = None
    max_drift: float | None = None
    driftcheck: bool = True
    limit: int | None = 32

    @classmethod
    def read(cls, given: Mapping[str, Any] | str | Path | None) -> Options:
        """Options of a mapping, or of a YAML file that holds one.

        Raises:
            TypeError, ValueError: an unknown option or preset, or a field of the guard that is wrong; named.
        """
        if isinstance(given, (str, Path)):
            given = yaml.safe_load(read_text(given))
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(f"alignguard: expected options and values, found {type(given).__name__}")
        given = {name: value for name, value in dict(given or {}).items() if value is not None}
        if unknown := sorted(set(given) - {field.name for field in fields(cls)}):
            raise ValueError(
                f"alignguard: unknown options {unknown}; there are {[field.name for field in fields(cls)]}"
            )
        made = cls(**given)
        if made.preset not in PRESETS:
            raise ValueError(f"alignguard: preset must be one of {', '.join(PRESETS)}, not {made.preset!r}")
        made.guard_config()
        return made

    def guard_config(self) -> GuardConfig:
        """The guard's strengths and schedule."""
        return PRESETS[self.preset](**dict(self.config or {}))

    def guard(self, model: Any, tokenizer: Any) -> Guard:
        """The guard, made once the tool has put its adapter on."""
        return make_guard(model, tokenizer, self.alignment_data, self.guard_config())

    def callback(self, trainer: Any, tokenizer: Any) -> DriftCallback | None:
        """Readings of DriftCheck while training, through the trainer's own log."""
        if self.drift_every is None:
            return None
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        return DriftCallback(
            every=self.drift_every, limit=self.limit, tokenizer=tokenizer, trainer=trainer, max_drift=self.max_drift
        )
