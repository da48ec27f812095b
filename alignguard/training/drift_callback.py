"""Drift and refusals while a Trainer trains, any Trainer: measured, logged, and the run stopped where they go too far."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback

from alignguard.data import Source, encode_source, pad_id, pad_rows
from alignguard.drift import CATEGORIES, MEASURES, REFUSAL, DriftReport, driftcheck, load_prompts
from alignguard.drift.judges import Judge
from alignguard.drift.prompts import Prompts
from alignguard.guard import Reference
from alignguard.guard.distributed import agreed
from alignguard.loading import adapter_off
from alignguard.objective import model_kind
from alignguard.updates import starts_at_base

logger = logging.getLogger(__name__)

STATE = "alignguard.DriftCallback"  # in the trainer's state, which stands in its checkpoints

KEPT_MIB = 512  # of what the model said at the start


class DriftCallback(TrainerCallback):
    """Asks the model DriftCheck's prompts before training, every so many steps and at the end.

    What is logged as ``driftcheck/<measure>`` are the shares of :class:`~alignguard.DriftReport`, the share of refusals lost
    since the start (``driftcheck/lost``), and the drift KL(start ‖ present) of whole responses in nats (``driftcheck/drift``),
    measured as the guard measures it. The start is the model as training began: with a fresh adapter its base, with one that
    was trained before, base and adapter.

    A callback sees the weights and may stop the run. It cannot charge the loss: the penalty needs the guard itself, in a
    trainer with :class:`~alignguard.GuardMixin`. The run's own numbers stay what they are without it: nothing here draws
    at random, and the model is left as it was.

    Args:
        prompts: packaged prompts, a JSONL path, or rows (see :func:`alignguard.drift.load_prompts`).
        alignment: prompt and response rows on which drift is measured; None takes the model's own answers at the start,
            of unsafe prompts its refusals alone.
        every: optimizer steps between two measurements.
        limit: keep only so many prompts of each category, evenly spaced; None asks all.
        categories: which prompts are asked.
        tokenizer: None takes the trainer's ``processing_class``.
        trainer: the trainer, whose ``log`` then takes what is found, so that every reporter gets it; None writes it into the
            trainer's history and this package's log alone.
        judge: who gives the verdicts; the rules where left out.
        batch_size: prompts answered together.
        max_new_tokens: longest answer in tokens.
        max_length: longest alignment row in tokens.
        max_drift: nats a response above which the run stops; None never stops it.
        max_lost: share in [0, 1] of the refusals at the start above whose loss the run stops; None never stops it.

    Attributes:
        reports: step -> :class:`~alignguard.DriftReport`.
        logged: step -> what was logged.
        stopped: why the run was stopped; None where it was not.

    Raises:
        ValueError: bad prompts, an unknown category, or a limit out of range.

    Examples:
        >>> callback = alignguard.DriftCallback(every=100, limit=16, max_lost=0.1)
        >>> callback.reports, callback.stopped
        ({}, None)
    """

    def __init__(
        self,
        prompts: Prompts | None = None,
        alignment: Source | None = None,
        *,
        every: int = 50,
        limit: int | None = 32,
        categories: Sequence[str] = ("unsafe", "borderline", "ordinary"),
        tokenizer: Any = None,
        trainer: Any = None,
        judge: Judge | None = None,
        batch_size: int = 32,
        max_new_tokens: int = 32,
        max_length: int = 256,
        max_drift: float | None = None,
        max_lost: float | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, found {every}")
        if max_lost is not None and not 0 <= max_lost <= 1:
            raise ValueError(f"max_lost must lie in [0, 1], found {max_lost}")
        if max_drift is not None and not max_drift > 0:
            raise ValueError(f"max_drift must be a positive number of nats, found {max_drift}")
        if unknown := sorted(set(categories) - set(CATEGORIES)):
            raise ValueError(f"categories: unknown {unknown}; there are {', '.join(CATEGORIES)}")
        self.rows = [row for row in load_prompts(prompts, limit) if row["category"] in categories]
        if not self.rows:
            raise ValueError(f"prompts: none is of the categories {list(categories)}")
        self.alignment, self.every, self.tokenizer, self.trainer = alignment, every, tokenizer, trainer
        self.max_length, self.max_drift, self.max_lost = max_length, max_drift, max_lost
        self._options: dict[str, Any] = {"judge": judge, "batch_size": batch_size, "max_new_tokens": max_new_tokens}
        self.reports: dict[int, DriftReport] = {}
        self.logged: dict[int, dict[str, float]] = {}
        self.stopped: str | None = None
        self._start: DriftReport | None = None
        self._reference: Reference | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the start, in a resumed run too where the model with its adapter off is that start.

        Args:
            args: arguments of the Trainer, which like all that follows come from it.
            state: state of the run, whose history takes what is found where no trainer was given.
            control: what to do next; told to stop where a limit is passed.
            **kwargs: model and ``processing_class``.

        Raises:
            ValueError: no tokenizer, bad alignment rows, or more of them than can be kept.
        """
        model = kwargs["model"]
        self.tokenizer = self.tokenizer or kwargs.get("processing_class")
        if self.tokenizer is None:
            raise ValueError("the trainer has no processing_class; give DriftCallback(tokenizer=...)")
        switched = _switched_off(model)
        if not state.global_step:  # later it can no longer be seen what the adapter was
            self.reports, self.logged, self.stopped = {}, {}, None  # of another run with this callback
            state.stateful_callbacks[STATE] = {"starts_at_base": switched is not None and starts_at_base(model)}
        if not state.stateful_callbacks.get(STATE, {}).get("starts_at_base", False):
            switched = None
        if switched is None:
            if state.global_step:
                logger.warning(
                    "drift is measured from the checkpoint's weights: the model before training is not there"
                )
            self._start = self._ask(model)
        else:
            with switched():
                self._start = self._ask(model)
        self._reference = self._reads(model, self._start, switched is not None)
        self._measure(args, state, control, model, None if state.global_step else self._start)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, every so many steps.

        Args:
            args: arguments of the Trainer.
            state: state of the run.
            control: what to do next.
            **kwargs: model.
        """
        if state.global_step % self.every == 0:
            self._measure(args, state, control, kwargs["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the end, where it was not a step of measuring.

        Args:
            args: arguments of the Trainer.
            state: state of the run.
            control: what to do next.
            **kwargs: model.
        """
        if state.global_step not in self.reports:
            self._measure(args, state, control, kwargs["model"])

    def _ask(self, model: Any) -> DriftReport:
        return driftcheck(model, self.tokenizer, self.rows, **self._options)

    def _reads(self, model: Any, start: DriftReport, switchable: bool) -> Reference | None:
        """What drift is measured on; None where nothing was given and nothing was answered."""
        kind = model_kind(model)
        rows = self.alignment
        if rows is None:
            kept = [row for row in start.rows if row.text and (row.category != "unsafe" or row.verdict == REFUSAL)]
            if not kept:
                return None
            rows = [{"prompt": row.prompt, "response": row.text} for row in kept]
        encoded = encode_source(rows, "alignment", self.tokenizer, kind, self.max_length)
        fill, device = pad_id(self.tokenizer), next(model.parameters()).device

        def collate(some: Any) -> dict[str, Any]:
            return {name: tensor.to(device) for name, tensor in pad_rows(some, fill, kind).items()}

        try:
            return Reference(model, encoded, collate, switchable, KEPT_MIB << 20)
        except ValueError as error:
            raise ValueError(
                f"alignment: what the model says of {len(encoded)} rows at its start takes more than {KEPT_MIB} MiB, and this "
                "model's start cannot be read later; give DriftCallback fewer or shorter alignment rows, or a smaller limit"
            ) from error

    def _measure(self, args: Any, state: Any, control: Any, model: Any, report: DriftReport | None = None) -> None:
        assert self._start is not None
        report = self._ask(model) if report is None else report
        summary = report.summary()
        found = {f"driftcheck/{name}": summary[name].value for name in MEASURES if name in summary}
        change = self._start.compare(report).get("refusal")
        held = sum(row.category == "unsafe" and row.verdict == REFUSAL for row in self._start.rows)
        if change is not None and held:
            found["driftcheck/lost"] = change.lost / held
        if self._reference is not None:
            places = range(len(self._reference.rows))
            found["driftcheck/drift"] = self._reference.drift(places)
        self.reports[state.global_step], self.logged[state.global_step] = report, found
        logger.info("step %d: %s", state.global_step, {name: round(value, 4) for name, value in found.items()})
        if self.trainer is not None:
            due = control.should_log  # logging takes the wish to log back, and the Trainer's own turn is still to come
            self.trainer.log(dict(found))
            control.should_log = due
        else:
            state.log_history.append({**found, "step": state.global_step})
        for name, most in (("drift", self.max_drift), ("lost", self.max_lost)):
            if most is None:
                continue
            # Of several processes one that stops alone would leave the others waiting in their next exchange.
            value = agreed(found.get(f"driftcheck/{name}", math.nan))
            if value > most and self.stopped is None:
                self.stopped = f"{name} {value:.3g} above {most:.3g} at step {state.global_step}"
                logger.warning("training stops: %s", self.stopped)
        if self.stopped is not None:
            control.should_training_stop = True


def _switched_off(model: Any) -> Callable[[], Any] | None:
    """The adapter's switch where the model with it off is the model before training."""
    try:
        adapter_off(model)
    except ValueError:
        return None
    return lambda: adapter_off(model)
