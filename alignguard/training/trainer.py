"""The guard inside transformers' Trainer: one mixin, one callback."""

from __future__ import annotations

import logging
import operator
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput, get_last_checkpoint, rotate_checkpoints

from alignguard.files import readable
from alignguard.guard import COUNTERS, TERMS, Guard, load_guard, save_guard
from alignguard.loading import check_weights
from alignguard.objective import base_model, evaluation_mode
from alignguard.training.checkpoint import MARKER, STAGING, check_complete, seal
from alignguard.updates import check_plugins, check_trained


def honours_item_count(model: torch.nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether the loss halves when ``num_items_in_batch`` doubles; two forward passes, random state untouched.

    transformers' Trainer concludes from ``**kwargs`` in a signature that a model divides its loss by that number.
    Encoder-decoders that take a plain mean (T5, mT5, BART, ...) accept and ignore it, and gradients come out too
    large by the number of micro-batches and of processes.

    Args:
        model: not wrapped for data parallelism.
        inputs: a batch with labels, as the Trainer passes it.

    Returns:
        True too where nothing can be told: a loss that is zero or not finite.
    """
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    losses = []
    with torch.random.fork_rng(devices=devices), evaluation_mode(model):
        for count in (64, 128):
            output = model(**{**inputs, "num_items_in_batch": torch.tensor(count)})
            loss = output["loss"] if isinstance(output, dict) else output[0]
            losses.append(float(loss))
    if not all(map(torch.isfinite, map(torch.tensor, losses))) or losses[1] == 0:
        return True  # nothing can be told from this batch; the loss itself is checked elsewhere
    return abs(losses[0] / losses[1] - 2) < 1e-2


logger = logging.getLogger(__name__)


def _readable(path: str | Path | None) -> AbstractContextManager[None]:
    return readable(f"resume: {path}", "resume from another checkpoint, or start anew in another folder")


class _GuardCallback(TrainerCallback):
    """Tells the guard when a run and an optimizer step begin (never inside an accumulation window) and keeps the time."""

    def __init__(self, trainer: GuardMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.guard is not None:
            self._check_restart(args)
            self.trainer.check_guard()  # once more: model_init has made a new model since
            self.trainer.guard.begin_run(state.max_steps)
            self.trainer.guard.attach(kwargs["optimizer"])

    def _check_restart(self, args: Any) -> None:
        """Refuse to begin anew with smaller batches once weights have moved: they would stay moved, and the guard would take
        what it remembers for another run's.

        Raises:
            ValueError: naming the batch size to begin with.
        """
        done, began = len(self.trainer.step_seconds), self.trainer._began
        if began is not None and done > began:
            size = self.trainer._train_batch_size  # type: ignore[attr-defined]
            raise ValueError(
                f"auto_find_batch_size: memory ran out after {done - began} steps, and the Trainer would begin anew on weights "
                f"that have moved; start anew with per_device_train_batch_size={size} and without auto_find_batch_size"
            )
        self.trainer._began = done

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.guard is not None:
            self.trainer.guard.detach()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._step_started = time.perf_counter()
        if self.trainer.guard is not None:
            examples = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
            self.trainer.guard.begin_step(state.global_step, examples)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.step_seconds.append(time.perf_counter() - self.trainer._step_started)


class GuardMixin:
    """Put before a Trainer class: ``class GuardSFTTrainer(GuardMixin, SFTTrainer): ...``.

    Adds ``guard.penalty()`` to the training loss, scaled so that gradient accumulation does not change it, logs each
    term through the Trainer and leaves the evaluation loss untouched. With ``guard=None`` it is the plain trainer.

    Models whose loss ignores the number of supervised tokens although their ``forward`` takes it (T5, BART and others
    in transformers 5) would be trained with gradients too large by the number of micro-batches and processes. The
    first batch shows whether the model is one of them, and the Trainer is then told to average instead.

    Checkpoints are written beside their place and moved there whole, with the guard's state and a marker that lists
    every file; ``train(resume_from_checkpoint=...)`` restores the guard and refuses a checkpoint without its marker.

    Args:
        guard: a :class:`~alignguard.Guard` on the model that is trained, or a function of model and tokenizer that makes
            one (:func:`alignguard.make_guard`), called once the trainer has put its adapter on; None trains plainly.

    Raises:
        ValueError: an engine under accelerate that shards parameters so that the guard cannot read them (FSDP1, ZeRO-3),
            or a guard on another model object than the trainer's.

    Examples:
        >>> from transformers import Trainer
        >>> class MyTrainer(alignguard.GuardMixin, Trainer):
        ...     pass
        ...
        >>> MyTrainer.__mro__[1].__name__
        'GuardMixin'
    """

    model_accepts_loss_kwargs: bool

    def __init__(self, *args: Any, guard: Guard | Callable[[Any, Any], Guard] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if guard is not None and not isinstance(guard, Guard):
            guard = guard(self.model, self.processing_class)  # type: ignore[attr-defined]
        if guard is not None:
            check_plugins(self.accelerator.state)  # type: ignore[attr-defined]
            if self.accelerator.native_amp:  # type: ignore[attr-defined]
                guard.read_start(self.accelerator.autocast)  # type: ignore[attr-defined]
        self.guard = guard
        self.step_seconds: list[float] = []
        self._step_started = 0.0
        self._began: int | None = None  # steps timed when the loop began that is running
        self._term_sums: dict[str, torch.Tensor] = {}
        self._term_counts = 0
        self._probed = False
        self._staging: Path | None = None
        self.check_guard()
        self.add_callback(_GuardCallback(self))  # type: ignore[attr-defined]

    def check_guard(self) -> None:
        """Refuse a guard that charges other weights than those that train.

        Raises:
            ValueError: the guard was made on another model object, or on frozen weights.
        """
        if self.guard is not None:
            check_trained(self.guard.updates.matrices.values(), self.model)  # type: ignore[attr-defined]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """The trainer's own loss, and in training the penalty with it.

        Args:
            model: as transformers' ``Trainer.compute_loss`` takes it, like all arguments.
            inputs: a batch.
            return_outputs: whether to return (loss, outputs) rather than the loss.
            num_items_in_batch: supervised tokens of the whole accumulation window.
            **kwargs: passed on.

        Raises:
            FloatingPointError: the loss is NaN or infinite; names the step.
        """
        if model.training and not self._probed:
            self._probe(model, inputs, num_items_in_batch)
        result = super().compute_loss(  # type: ignore[misc]
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **kwargs
        )
        if not model.training:
            return result
        loss, rest = (result[0], result[1:]) if return_outputs else (result, ())
        if self.guard is not None:
            loss = loss + self._scaled_penalty(loss, num_items_in_batch)
        if not torch.isfinite(loss.detach()):
            step = self.state.global_step + 1  # type: ignore[attr-defined]
            terms = {name: float(value) for name, value in (self.guard.terms if self.guard else {}).items()}
            raise FloatingPointError(
                f"the training loss is {float(loss)} at step {step} (penalty terms: {terms or 'none'}); "
                "lower the learning rate or look for bad rows in the task data"
            )
        return (loss, *rest) if return_outputs else loss

    def _says_scaled(self) -> bool | None:
        """What the trainer itself says of its loss and the window's size; older transformers have no word for it."""
        return getattr(self, "loss_is_scaled_for_ga", None)

    def _probe(self, model: Any, inputs: Any, num_items_in_batch: Any) -> None:
        """Find out once whether the model's loss heeds the number of items that the Trainer passes it."""
        self._probed = True
        decided = self._says_scaled() is not None or self.compute_loss_func is not None  # type: ignore[attr-defined]
        takes = self.model_accepts_loss_kwargs and num_items_in_batch is not None  # type: ignore[has-type]
        if decided or not takes or self.label_smoother is not None:  # type: ignore[attr-defined]
            return
        inner = self.accelerator.unwrap_model(model)  # type: ignore[attr-defined]
        if not honours_item_count(inner, inputs):
            logger.warning(
                "%s ignores num_items_in_batch in its loss; the Trainer averages over micro-batches and processes "
                "instead of trusting it (model_accepts_loss_kwargs=False)",
                type(base_model(inner)).__name__,
            )
            self.model_accepts_loss_kwargs = False

    def _scaled_penalty(self, loss: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        """The whole penalty once an optimizer step, on the window's last micro-batch: weights do not change within it.

        Where the Trainer divides the loss by the window's size afterwards, the penalty is multiplied by it first.
        """
        if not self.accelerator.sync_gradients:  # type: ignore[attr-defined]
            return loss.new_zeros(())
        with torch.autocast(loss.device.type, enabled=False):
            penalty = self.guard.penalty().to(loss.device)  # type: ignore[union-attr]
        for name, value in self.guard.terms.items():  # type: ignore[union-attr]
            self._term_sums[name] = self._term_sums.get(name, torch.zeros_like(value)) + value
        self._term_counts += 1
        scaled = self._says_scaled()
        if scaled is None:
            scaled = (
                self.model_accepts_loss_kwargs and num_items_in_batch is not None
            ) or self.compute_loss_func is not None  # type: ignore[attr-defined]
        return penalty if scaled else penalty * self.current_gradient_accumulation_steps  # type: ignore[attr-defined]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The trainer's log; into ``logs`` goes the mean of each penalty term since the last one as ``alignguard/<term>``."""
        if self._term_counts and "loss" in logs:
            means = {name: float(value) / self._term_counts for name, value in self._term_sums.items()}
            for name in TERMS:
                if name in means:
                    logs[f"alignguard/{name}"] = means[name]
            logs |= {f"alignguard/{name}": value for name, value in self.guard.numbers().items()}  # type: ignore[union-attr]
            self._term_sums, self._term_counts = {}, 0
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    # checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        """Where checkpoints go; while one is being written, the folder beside it that it is moved from."""
        folder = super()._get_output_dir(trial)  # type: ignore[misc]
        return folder if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The trainer's own checkpoint and the guard's state, written aside and moved into place whole."""
        state, args = self.state, self.args  # type: ignore[attr-defined]
        run = Path(self._get_output_dir(trial))
        name = f"checkpoint-{state.global_step}"
        # An upload reads the folder while training goes on, so that one is not moved; its marker still comes last.
        self._staging = None if args.push_to_hub else run / STAGING
        try:
            if args.should_save and self._staging is not None:
                shutil.rmtree(self._staging, ignore_errors=True)
            self.accelerator.wait_for_everyone()  # type: ignore[attr-defined]
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            self.accelerator.wait_for_everyone()  # type: ignore[attr-defined]
            if args.should_save:
                written = (self._staging or run) / name
                if state.best_model_checkpoint == str(written):
                    state.best_model_checkpoint = str(run / name)
                    state.save_to_json(str(written / TRAINER_STATE_NAME))
                save_guard(written, self.guard, self._accumulated())
                seal(written, run / name)
                if self._staging is not None:
                    self._staging.rmdir()
        finally:
            self._staging = None
        if args.should_save:
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=args.save_total_limit,
                best_model_checkpoint=state.best_model_checkpoint,
                use_mtime=False,
            )
        self.accelerator.wait_for_everyone()  # type: ignore[attr-defined]

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own loop; from the checkpoint of the last step nothing is left to do but to load it, unless the
        arguments now ask for more steps.

        ``resume_from_checkpoint`` is a checkpoint's folder, True for the latest, or None. transformers 5.23 would take
        one more step from there.

        Raises:
            ValueError: a checkpoint that is not whole, or whose files are not what they should be.
        """
        self._began = None
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir) or True  # type: ignore[attr-defined]
        if isinstance(resume_from_checkpoint, (str, Path)):
            folder = Path(resume_from_checkpoint)
            if (folder / TRAINER_STATE_NAME).is_file():
                with _readable(folder / TRAINER_STATE_NAME):
                    state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
                    if not isinstance(state.log_history, list) or not isinstance(state.train_batch_size, int):
                        raise ValueError("log_history or train_batch_size is missing")
                    reached = operator.index(state.global_step)
                    done = 0 < operator.index(state.max_steps) <= reached
                if done:
                    loader = self.get_train_dataloader()  # type: ignore[attr-defined]
                    done = self.set_initial_training_values(self.args, loader)[-1] <= reached  # type: ignore[attr-defined]
                if done:
                    self._load_from_checkpoint(str(folder))
                    self.state = state
                    return TrainOutput(state.global_step, float("nan"), {})
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _accumulated(self) -> dict[str, Any]:
        """What the mixin itself must not forget: times, and terms not logged yet."""
        sums = {name: float(value) for name, value in self._term_sums.items()}
        return {"step_seconds": self.step_seconds, "term_sums": sums, "term_counts": self._term_counts}

    def _is_ours(self, folder: Path) -> bool:
        return self.guard is not None or (folder / MARKER).exists()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The trainer's own loading, and the guard's state.

        Raises:
            ValueError: a checkpoint that is not whole, whose files are not what they should be, or of another guard.
        """
        folder, ours = Path(resume_from_checkpoint), self._is_ours(Path(resume_from_checkpoint))
        if ours:
            check_complete(folder)
        trained = self.model  # type: ignore[attr-defined]
        active = list(trained.active_adapters) if isinstance(trained, PeftModel) else []
        with _readable(folder):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            if len(active) > 1:  # the trainer leaves only the first of them active
                trained.base_model.set_adapter(active)
            elif active and (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
                check_weights(folder, set(load_peft_weights(str(folder), device="cpu")), trained)
        if ours:
            kept = load_guard(folder, self.guard)
            with _readable(folder / COUNTERS):
                self.step_seconds = [float(seconds) for seconds in kept["step_seconds"]]
                self._term_sums = {name: torch.tensor(float(value)) for name, value in kept["term_sums"].items()}
                self._term_counts = operator.index(kept["term_counts"])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The trainer's own, its errors named."""
        with _readable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The trainer's own, its errors named."""
        with _readable(checkpoint):
            super()._load_rng_state(checkpoint)  # type: ignore[misc]


class GuardTrainer(GuardMixin, Trainer):
    """transformers' Trainer with a guard.

    Args:
        guard: a :class:`~alignguard.Guard` on the model that is trained, or None; all else is the Trainer's.

    Examples:
        >>> from transformers import Trainer
        >>> issubclass(alignguard.GuardTrainer, Trainer)
        True
    """


class GuardSeq2SeqTrainer(GuardMixin, Seq2SeqTrainer):
    """transformers' Seq2SeqTrainer with a guard.

    Args:
        guard: a :class:`~alignguard.Guard` on the model that is trained, or None; all else is the Trainer's.

    Examples:
        >>> from transformers import Seq2SeqTrainer
        >>> issubclass(alignguard.GuardSeq2SeqTrainer, Seq2SeqTrainer)
        True
    """
