"""What a user of another tool says about the guard, in that tool's own configuration: one block, the same in every tool."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from alignguard.data import read_text
from alignguard.files import readable
from alignguard.guard import Guard, GuardConfig, is_number
from alignguard.guard.config import FLAG, Requirement, one_of, whole
from alignguard.training import DriftCallback, make_guard

PRESETS: dict[str, Callable[..., GuardConfig]] = {
    "default": GuardConfig,
    "curvature": GuardConfig.curvature,
    "combined": GuardConfig.combined,
    "paper": GuardConfig.paper,
}


REQUIREMENTS = {
    "preset": one_of(tuple(PRESETS)),
    "config": Requirement("map fields of GuardConfig to values", lambda value: isinstance(value, Mapping)),
    "drift_every": whole(1),
    "max_drift": Requirement("be a positive number of nats", lambda value: is_number(value) and value > 0),
    "driftcheck": FLAG,
    "limit": whole(1),
}


@dataclass(frozen=True)
class Options:
    """The block ``alignguard:`` of a configuration.

    Attributes:
        alignment_data: file or hub name of what to keep; packaged prompts, answered by the model itself, if left out.
        preset: guard that ``config`` changes.
        config: fields of :class:`alignguard.GuardConfig`.
        drift_every: optimizer steps between two readings of DriftCheck while training; None takes none.
        max_drift: nats a response above which such a reading stops the run; None never stops it.
        driftcheck: whether DriftCheck's report is written after training.
        limit: prompts of each category that are asked then and while training; None asks all.
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
            TypeError, ValueError: a file that cannot be read, an unknown option, one that is wrong or that nothing would
                read beside the others, or a field of the guard that is; named.
        """
        if isinstance(given, (str, Path)):
            text = read_text(given)
            with readable(f"alignguard: {given}", "give options and values as YAML"):
                given = yaml.safe_load(text)
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(f"alignguard: expected options and values, found {type(given).__name__}")
        given = dict(given or {})
        if unknown := sorted(set(map(str, given)) - {field.name for field in fields(cls)}):
            raise ValueError(
                f"alignguard: unknown options {unknown}; there are {[field.name for field in fields(cls)]}"
            )
        made = cls(**given)
        for field in fields(cls):
            value, requirement = getattr(made, field.name), REQUIREMENTS.get(field.name)
            optional = value is None and str(field.type).endswith("| None")
            if requirement is not None and not (optional or requirement.met(value)):
                raise ValueError(f"alignguard: {field.name} must {requirement.words}, not {value!r}")
        if made.drift_every is None and made.max_drift is not None:
            raise ValueError(
                "alignguard: max_drift stops the run at a reading of DriftCheck, and there is none; give drift_every too, "
                "or give it in config, where it is the guard's budget"
            )
        if made.drift_every is None and not made.driftcheck and "limit" in given:
            raise ValueError("alignguard: limit is of DriftCheck, and neither drift_every nor driftcheck asks for it")
        made.guard_config()
        return made

    def guard_config(self) -> GuardConfig:
        """The guard's strengths and schedule.

        Raises:
            TypeError, ValueError: an unknown field, one that is wrong, or one that nothing reads; named.
        """
        config = PRESETS[self.preset](**dict(self.config or {}))
        if idle := config.unread():
            raise ValueError(
                f"alignguard: config: {', '.join(idle)}: set, and nothing here reads that; fields of the Fisher need "
                "lambda_alignment too, or preset: curvature; those of KL lambda_kl; those of measuring max_drift or adaptive"
            )
        return config

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
