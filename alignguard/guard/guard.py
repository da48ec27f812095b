"""The guard: curvature of the alignment data at the present weights, and the penalty it puts on the update."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from alignguard.guard.config import GuardConfig
from alignguard.guard.distributed import agreed, pooled_mean
from alignguard.guard.layer_curvature import LayerCurvature
from alignguard.guard.legs import CurvatureLeg, KLLeg, Leg, measures, metric_of
from alignguard.guard.reference import Reference
from alignguard.guard.report import DriftGauge, Report
from alignguard.guard.rows import AlignmentRows, Encoded, shortened
from alignguard.guard.schedule import DriftBudget, Freshness, Schedule, whole_number
from alignguard.objective import model_kind
from alignguard.updates import Covered, WeightUpdates, coverage

TERMS = ("alignment", "task", "overlap", "separation", "kl")
CHECKED = 2  # alignment examples of an estimate on which the estimate before it is held against the drift
MEASURED = 16  # alignment examples on which the drift is measured when it is asked for
REMEDY = (
    "Hold the function itself: GuardConfig() as it is reads alignment examples at the weights of the run, and leaves the "
    "curvature out."
)


class Guard:
    """Holds what alignment needs of the model and charges the update for touching it.

    The split and its terms are those of AlignGuard-LoRA (arXiv 2508.02079, section 4), see :class:`GuardConfig`; that
    ½ tr(ΔWᵀFΔW) is a drift in nats is the second-order expansion of KL (Martens 2020, arXiv 1412.1193).

    In a loop of one's own:

        guard = Guard.from_alignment(model, rows, config, pad_token_id=tokenizer.pad_token_id)
        guard.attach(optimizer)
        guard.begin_run(len(batches))
        for step, batch in enumerate(batches):
            guard.begin_step(step)
            loss = model(**batch).loss + guard.penalty()

    Args:
        model: a peft model with LoRA adapters, or with ``method="full"`` any model whose weights train. Make the
            guard before training: its references are the weights of this moment.
        rows: encoded alignment examples, ``{"input_ids": list, "labels": list}``
            (:func:`alignguard.data.encode_source`).
        config: strengths and schedule.
        pad_token_id: fills padded positions.
        method: ``"lora"`` or ``"full"``.
        offload: device of the reference weights of dense updates; their weight's own if None.

    Attributes:
        updates: what is guarded and how ΔW is read.
        terms: the parts of the last penalty, detached scalars.
        alignment: the examples, in rotation or held back.
        schedule: when drift is measured and the curvature is estimated anew.
        budget: multiplier that meets ``max_drift``; None without it.
        curvature: leg whose Fisher the terms, the drift predicted and the report are of.
        kl: leg that charges KL to the start; None without ``lambda_kl``.
        legs: everything that the penalty is the sum of, by name.
        start: what the model said before training at the examples held back; None where there are none.
        gauge: drift that the penalty believed in, beside the drift measured, as last compared.
        report: numbers and spectra for people.

    Raises:
        TypeError, ValueError: a model whose ΔW is not understood, or no alignment example.

    Examples:
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=16)
        >>> model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), LoraConfig(r=2, target_modules=["q_proj"]))
        >>> rows = [{"input_ids": [3, 4, 5, 6], "labels": [-100, -100, 5, 6]}]
        >>> guard = alignguard.Guard.from_alignment(model, rows)
        >>> guard.penalty().item()  # nothing has moved yet
        0.0
    """

    def __init__(
        self,
        model: torch.nn.Module,
        rows: Sequence[Encoded],
        config: GuardConfig,
        pad_token_id: int = 0,
        method: str = "lora",
        offload: str | torch.device | None = None,
    ) -> None:
        self.model, self.config = model, config
        self.updates = WeightUpdates(model, method, config.exclude, config.include_router, offload)
        self.alignment = AlignmentRows(rows, model, config, pad_token_id)
        rotating, held = self.alignment.rotating, self.alignment.held
        self.schedule = Schedule(config, len(rotating), len(held))
        self.budget = DriftBudget(config.max_drift) if config.max_drift is not None else None
        self.curvature = CurvatureLeg(self.alignment, config, self.budget, self.updates)
        self.kl: KLLeg | None = None
        if config.lambda_kl:
            kind = model_kind(model)
            read = [shortened(row, config.kl_tokens, kind) for row in rotating]
            moved = self.updates.distance if method == "lora" else None
            self.kl = KLLeg(self.alignment, config, self.budget, self._reference(read), moved)
        self.legs: dict[str, Leg] = {leg.name: leg for leg in (self.curvature, self.kl) if leg is not None}
        self.start = self._reference(held) if held else None
        self._whole = None if held or self.updates.base_is_reference else self._first_rows()
        self._begun = False  # the weights may have moved
        self.gauge = DriftGauge()
        self.report = Report(self.curvature, self.schedule, self.budget, self.gauge, self.predicted_drift)
        self.terms: dict[str, Tensor] = {}
        self._attached: RemovableHandle | None = None

    def _reference(self, rows: Sequence[Encoded]) -> Reference:
        limit = self.config.kl_cache_mb << 20
        return Reference(self.model, rows, self.alignment.batch, self.updates.base_is_reference, limit)

    def _first_rows(self) -> Reference | None:
        """Whole responses, where KL reads their first tokens and the start can be read at this moment alone: of as many
        examples as a measurement reads, and as ``kl_cache_mb`` has room for. None without KL.
        """
        if self.kl is None:
            return None
        read = self.kl.reference
        if all(one is other for one, other in zip(read.rows, self.rows, strict=True)):
            return read
        room = (self.config.kl_cache_mb << 20) - read.held
        found = Reference(self.model, self.rows[:MEASURED], self.alignment.batch, False, room, needed=False)
        return found if found.rows else None

    def read_start(self, under: Callable[[], AbstractContextManager[Any]]) -> None:
        """Read anew what the model says at its start, where that was read when the guard was made, as its adapter cannot be
        switched off. Does nothing once a step has begun. A Trainer's guard is told.

        Args:
            under: context that the model computes under while it trains, such as ``accelerator.autocast``: in another
                precision a model that has not moved would be charged for the rounding.
        """
        if self._begun:
            return
        read = self.start, self._whole, None if self.kl is None else self.kl.reference
        found = {id(reference): reference for reference in read if reference is not None and not reference.switchable}
        with under():
            for reference in found.values():
                reference.read()

    @classmethod
    def from_alignment(
        cls,
        model: torch.nn.Module,
        rows: Sequence[Encoded],
        config: GuardConfig | None = None,
        pad_token_id: int = 0,
        progress: bool = False,
        **options: Any,
    ) -> Guard:
        """Build a guard, and where its terms need it estimate its curvature at the present weights.

        Args:
            model: model that trains; this, ``rows`` and ``pad_token_id`` are those of the constructor.
            rows: encoded alignment examples.
            config: strengths and schedule; the defaults if None.
            pad_token_id: token that fills padded positions.
            progress: show a bar over the batches of the estimate.
            **options: ``method`` and ``offload`` of the constructor.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        guard = cls(model, rows, config or GuardConfig(), pad_token_id, **options)
        if guard.uses_curvature:
            guard.refresh(progress=progress)
        return guard

    @property
    def layers(self) -> dict[str, LayerCurvature]:
        """Curvature by matrix, empty before the first estimate."""
        return self.curvature.layers

    @property
    def rows(self) -> list[Encoded]:
        """Alignment examples in rotation, those held back left out."""
        return self.alignment.rotating

    @property
    def examples_read(self) -> int:
        """Alignment examples read so far, each reading counted."""
        return self.alignment.readings

    @property
    def step(self) -> int:
        """Optimizer steps done when the present one began."""
        return self.schedule.step

    @property
    def refreshes(self) -> int:
        """Estimates of the curvature so far."""
        return self.schedule.refreshes

    @property
    def freshness(self) -> Freshness | None:
        """Cost and outcome of drift measurements; None where drift is not measured."""
        return self.schedule.freshness

    @property
    def uses_curvature(self) -> bool:
        """Whether any term needs the Fisher; false for the KL term alone."""
        return self.curvature.charged

    def coverage(self) -> list[Covered]:
        """What is guarded, matrix by matrix, and what trains outside the guard or is charged by KL alone."""
        return coverage(self.updates, self.kl is not None)

    def begin_run(self, steps: int) -> None:
        """Tell the guard how many optimizer steps the run has: where ``refresh_every`` is None, a short one has estimates
        more often. A Trainer's guard is told.

        Args:
            steps: optimizer steps of the whole run, those before a resumed one's checkpoint too.

        Raises:
            ValueError: no positive number of steps.
        """
        self.schedule.begin_run(steps)

    def attach(self, optimizer: torch.optim.Optimizer) -> bool:
        """Let what KL remembers move the weights after each step of the optimizer, no longer through the loss.

        Its gradients then neither slow Adam's steps for the task nor share its clipping
        (:meth:`alignguard.guard.legs.memory.Memory.step`). A Trainer's guard is attached when training begins.

        Args:
            optimizer: the one that trains the model; torch's SGD, Adam or AdamW, as it is or wrapped by accelerate. With
                any other, and where nothing is remembered, the term stays in the loss.

        Returns:
            Whether the term has left the loss.
        """
        self.detach()
        inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        kl = self.kl
        if kl is None or not kl.remembers() or not measures(inner, kl.trained()):
            return False
        self._attached = inner.register_step_post_hook(lambda *_: kl.step(metric_of(inner, kl.trained())))
        kl.apart = True
        return True

    def detach(self) -> None:
        """Undo :meth:`attach`."""
        if self._attached is not None:
            self._attached.remove()
            self._attached = None
        if self.kl is not None:
            self.kl.apart = False

    def begin_step(self, step: int, task_examples: int | None = None) -> None:
        """Tell the guard which optimizer step begins; measures drift and estimates the curvature anew when due.

        With torch.distributed every process must call this alike. Alignment examples are then shared out among them,
        and all decide by the same numbers.

        Args:
            step: optimizer steps done.
            task_examples: task examples of this step, of all processes, which adaptive refreshes count their budget in.

        Raises:
            ValueError: adaptive refreshes without ``task_examples``.
        """
        self._begun = True
        self.schedule.begin_step(step, task_examples)
        if self.uses_curvature and not self.layers:
            self.refresh()
        parted = self.schedule.measures() and self._measure()
        if self.uses_curvature and self.schedule.refreshes_now(parted):
            self._renew()
        if self.budget is not None:
            self.budget.update(step, agreed(self.predicted_drift()))

    def _measure(self) -> bool:
        """Measure drift on the examples held back; whether the prediction is off by more than the tolerance."""
        assert self.start is not None and self.freshness is not None
        held = range(len(self.start.rows))
        drift = pooled_mean(held, self.model, self.start.drift)
        self.alignment.readings += len(held)
        predicted = agreed(self.predicted_drift())
        if self.uses_curvature:
            self.gauge.compare(predicted, drift, REMEDY)
        if self.budget is not None:
            self.budget.measured(drift, predicted)
        return self.freshness.measured(self.step, drift, predicted)

    def _renew(self) -> None:
        """Refresh, and where drift is measured tell those who compare it with the prediction that it has changed."""
        if self.freshness is None:
            self._compare()
            self.refresh()
            return
        before = agreed(self.predicted_drift())
        self.refresh()
        after = agreed(self.predicted_drift())
        self.freshness.calibrate(after)
        if self.budget is not None:
            self.budget.renewed(before, after)

    def _readable(self) -> Reference | None:
        """What the model said before training at whole examples in rotation; None where it can no longer be asked."""
        if self._whole is None and self.updates.base_is_reference:
            self._whole = self._reference(self.rows)
        return self._whole

    def _compare(self) -> None:
        """Hold the curvature against the drift of examples that the next estimate reads, where the start can be read."""
        reference = self._readable()
        if reference is None:
            return
        chosen = self.alignment.places(self.config.refresh_examples, self.refreshes)[:CHECKED]
        # A start that could be read at the beginning alone was read on a few rows: one of those stands in.
        chosen = [place % len(reference.rows) for place in chosen]
        drift = pooled_mean(chosen, self.model, reference.drift)
        self.alignment.readings += len(chosen)
        self.gauge.compare(agreed(self.predicted_drift()), drift, REMEDY)

    def refresh(self, progress: bool = False) -> None:
        """Estimate the Fisher of the next alignment examples at the present weights; one forward and backward each.

        With ``progress`` a bar is shown. Several processes read a share each. Gradients, optimizer state, training mode
        and random state are left as they were.
        """
        for leg in self.legs.values():
            leg.refresh(self.schedule.step, self.schedule.refreshes, progress)
        self.schedule.estimated()

    def use_fisher(self, fisher: Mapping[str, Any], samples: int | None = None) -> None:
        """Take curvatures that were estimated elsewhere.

        Args:
            fisher: operator by name, of captured layers or of matrices with or without what peft puts around them.
            samples: supervised tokens that it was made of, which ``noise_edge`` needs.

        Raises:
            ValueError: a guarded matrix has no operator in it, or one of another shape.
        """
        self.curvature.take(fisher, samples)
        self.schedule.estimated()

    def penalty(self) -> Tensor:
        """The penalty at the present weights, a differentiable scalar, float32 or wider; its parts are left in ``terms``.

        Raises:
            RuntimeError: a term needs the curvature, and neither :meth:`begin_step` nor :meth:`refresh` nor
                :meth:`use_fisher` has been called.
        """
        sums: dict[str, Tensor] = {}
        for leg in self.legs.values():
            sums |= leg.terms(self.step)
        self.terms = {term: value.detach() for term, value in sums.items()}
        if self.kl is not None and not self.uses_curvature and (compared := self.kl.compared()) is not None:
            self.gauge.compare(*compared)
        if not sums:
            return next(self.model.parameters()).new_zeros(())
        return torch.stack(list(sums.values())).sum()

    def predicted_drift(self) -> float:
        """The drift from the start in nats a response, as the penalty believes it to be.

        ½ Σ tr(ΔWᵀFΔW) over the matrices, the drift to second order; without a term of the curvature KL's last readings, of
        the response tokens that it reads, carried on to the present ‖ΔW‖.
        """
        return self.curvature.drift() if self.kl is None or self.uses_curvature else self.kl.drift()

    def measured_drift(self, examples: int = MEASURED) -> float | None:
        """KL(start ‖ present) of whole responses in nats, on the examples held back, else on the first few.

        Args:
            examples: most examples to read.

        Returns:
            Nats a response, the mean over the examples; None where the model's start can no longer be read, or was read at
            the first tokens alone, for want of room (``kl_cache_mb``).
        """
        reference = self.start or self._readable()
        return None if reference is None else reference.drift(range(min(examples, len(reference.rows))))

    def cosine(self) -> float:
        """Mean over matrices of how alike the two parts' inputs are: <ΔW_AᵀΔW_A, ΔW_TᵀΔW_T> / (‖·‖‖·‖), in [0, 1]."""
        return self.curvature.cosine()

    def angle(self) -> float | None:
        """Mean principal angle in degrees between the leading directions and those of the estimate shown before it.

        Found when asked for, as the eigenvectors are: a run that logs nothing pays for none. None until two estimates
        have been shown.
        """
        return self.report.angle()

    def numbers(self) -> dict[str, float]:
        """What a log line should show beside the terms: cosine, drift, multiplier, angle to the last basis shown.

        The first call after a refresh finds the leading eigenvectors of every matrix.
        """
        return self.report.numbers()

    def spectra(self) -> dict[str, dict[str, Any]]:
        """Leading eigenvalues, trace, rank and share of energy of every layer, for reports."""
        return self.report.spectra()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: tensors and plain values in nested dicts, keys as in a checkpoint's files."""
        state = {"config": self.config.to_dict(), "examples_read": self.examples_read, **self.schedule.state_dict()}
        state["gauge"] = self.gauge.state_dict()
        state["budget"] = None if self.budget is None else self.budget.state_dict()
        state["reference"] = self.updates.references()
        state["base_is_reference"] = self.updates.base_is_reference
        for leg in self.legs.values():
            state |= leg.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave, its tensors on the model's device.

        Args:
            state: state of a guard of the same configuration on the same model.

        Raises:
            KeyError, TypeError: a value is missing, or is of another kind.
            ValueError: of another configuration, of another model, of a run that began at other weights than this guard was
                made on, or a counter is no number.
        """
        kept, ours = (json.loads(json.dumps(config)) for config in (state["config"], self.config.to_dict()))
        if differ := sorted(name for name in ours if kept.get(name) != ours[name]):
            raise ValueError(f"written with other settings of {differ}; resume with the same, or start anew")
        readings = whole_number(state, "examples_read")
        self._begun = True
        try:
            for leg in self.legs.values():
                leg.load_state_dict(state)
            self._restore(state["reference"], state["base_is_reference"])
        except ValueError as error:
            raise ValueError(f"of another model ({error})") from error
        self.schedule.load_state_dict(state)
        self.alignment.readings = readings
        self.gauge.load_state_dict(state["gauge"])
        if self.budget is not None:
            self.budget.load_state_dict(state["budget"])

    def _restore(self, references: dict[str, Tensor], base_is_reference: bool) -> None:
        """Take the start that a resumed run is measured from."""
        if not isinstance(base_is_reference, bool):
            raise TypeError(f"base_is_reference must be true or false, not {base_is_reference!r}")
        switched = base_is_reference and not self.updates.base_is_reference
        self.updates.restore(references, base_is_reference)
        if switched:
            for reference in (self.start, None if self.kl is None else self.kl.reference):
                if reference is not None:
                    reference.switch()
            self._whole = None
