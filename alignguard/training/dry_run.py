"""What a run would do, before it does anything: coverage, sizes, steps, the guard's share of the compute."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from alignguard.data import collator, pad_id, shown_row
from alignguard.guard.legs.kl import due
from alignguard.guard.schedule import FORWARD, Schedule
from alignguard.training.preparation.prepared import Prepared
from alignguard.updates import coverage_table


def curvature_bytes(guard: Any) -> int:
    """Bytes that curvatures and bases of all guarded matrices take at most, in float32.

    KFAC holds p² and q² and a basis of at most p²; the one-sided Gram p² and the basis; a sketch p·rank and its basis,
    one of both sides (p + q)·rank and that basis.
    """
    total = 0
    for matrix in guard.updates.matrices.values():
        p, q = matrix.shape
        basis = p * min(p, guard.config.max_rank or p)
        if guard.config.structure == "kfac":
            total += p * p + q * q + basis
        elif guard.config.structure == "gram":
            total += p * p + basis
        else:
            rank = guard.config.sketch_rank
            total += 2 * p * min(p, rank) + (q * min(q, rank) if guard.config.structure == "kfac-sketch" else 0)
    return 4 * total if guard.uses_curvature else 0


def examples_read(guard: Any, steps: int, task_examples: int) -> float:
    """Alignment examples that a run passes forward and backward; a forward pass alone counts a third.

    Adaptive refreshes are taken to come whenever they are paid for, which is the most that they can cost.

    Args:
        guard: before the run.
        steps: optimizer steps.
        task_examples: task examples of a step.
    """
    c, rows = guard.config, guard.alignment
    schedule = Schedule(c, len(rows.rotating), len(rows.held))
    schedule.refreshes, schedule.estimated_at = guard.refreshes, guard.schedule.estimated_at
    schedule.begin_run(steps)
    readings = 0
    if guard.kl is not None:
        every, memory = guard.kl.schedule()
        readings = sum(due(step, every, memory) for step in range(steps))
    measured = 0
    for step in range(steps):
        schedule.begin_step(step, task_examples)
        if guard.uses_curvature and not schedule.refreshes:
            schedule.estimated()
        if measures := schedule.measures():
            measured += 1
            assert schedule.freshness is not None
            schedule.freshness.measured(step, 0.0, 0.0)
        if guard.uses_curvature and schedule.refreshes_now(measures):
            schedule.estimated()
    estimates = (schedule.refreshes - guard.refreshes) * rows.at_once(c.refresh_examples)
    return estimates + readings * rows.at_once(c.kl_examples) + FORWARD * measured * len(rows.held)


def seconds_of_step(ready: Prepared) -> float:
    """Seconds of a plain optimizer step on this machine: a forward and backward pass over the first micro-batch, timed
    at its second run, times the micro-batches of a step. Gradients and random state are left as they were.
    """
    model, settings = ready.model, ready.settings
    device = torch.device("cuda" if torch.cuda.is_available() and not settings.get("use_cpu") else "cpu")
    model.to(device)
    rows = ready.rows[: settings["per_device_train_batch_size"]]
    batch = {k: v.to(device) for k, v in collator(pad_id(ready.tokenizer), ready.kind)(rows).items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    seconds = 0.0
    with torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
        for _ in range(2):
            begun = time.perf_counter()
            gradients = torch.autograd.grad(model(**batch).loss, trained, allow_unused=True)
            float(sum(g.flatten()[0] for g in gradients if g is not None))  # waits for the device
            seconds = time.perf_counter() - begun
    return seconds * settings.get("gradient_accumulation_steps", 1)


def activation_bytes(ready: Prepared) -> int:
    """Bytes that a forward pass keeps for its backward pass, weights left out: of the longest task rows of a micro-batch, or
    of the longest alignment examples that are read together, whichever is more.
    """
    model = ready.model
    device = next(model.parameters()).device
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}

    def kept(batch: dict[str, Tensor]) -> int:
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(**{name: value.to(device) for name, value in batch.items()})
        del output  # until here everything that was saved is alive, so no address is counted for two
        return sum(found.values())

    def longest(rows: Sequence[Any], count: int) -> list[Any]:
        return sorted(rows, key=lambda row: len(row["input_ids"]))[-count:]

    collate = collator(pad_id(ready.tokenizer), ready.kind)
    with torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
        most = kept(collate(longest(ready.rows, ready.settings["per_device_train_batch_size"])))
        if ready.guard is not None:
            config = ready.guard.config
            together = max(config.batch_size if ready.guard.uses_curvature else 1, config.kl_examples)
            most = max(most, kept(collate(longest(ready.alignment, together))))
    return most


def plan_text(
    ready: Prepared, seconds_per_step: float | None = None, activations: int | None = None, verbose: bool = False
) -> str:
    """The plan in words.

    Args:
        ready: what :func:`alignguard.training.prepare` read.
        seconds_per_step: time of an optimizer step of the plain run, where it is known (:func:`seconds_of_step`).
        activations: bytes of a micro-batch's activations, where they are known (:func:`activation_bytes`).
        verbose: give every guarded matrix a line, not every kind of layer.

    Returns:
        Lines on model, data, memory, compute and time, a row of the data with its loss mask, and the table of what is guarded.
    """
    settings, guard = ready.settings, ready.guard
    batch = settings["per_device_train_batch_size"] * settings.get("gradient_accumulation_steps", 1)
    steps = ready.steps
    trained = sum(p.numel() for p in ready.model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in ready.model.parameters())
    lines = [
        f"model: {ready.record['model']} ({ready.kind}, {whole:,} parameters, {trained:,} of them train)",
        f"task: {len(ready.rows)} rows, {batch} a step and process, {steps} steps",
    ]
    held = ""
    if guard is None:
        lines.append("guard: none")
    else:
        c = guard.config
        every, memory = c.kl_schedule(ready.method)
        reading = []
        if guard.uses_curvature:
            count = guard.alignment.at_once(c.refresh_examples)
            reading.append(f"{count} at each estimate of the Fisher, every {c.interval(steps)} steps")
        if c.lambda_kl:
            reading.append(f"{guard.alignment.at_once(c.kl_examples)} at each KL, every {every} steps")
        lines.append(f"alignment: {len(guard.rows)} rows, " + "; ".join(reading or ["none read"]))
        references = sum(t.numel() * t.element_size() for t in guard.updates.references().values())
        extra = [f"curvature {_mib(curvature_bytes(guard))}"] if guard.uses_curvature else []
        # Gradients in bfloat16, one more while it is read, and their root mean square.
        remembered = 2 * (memory + 2) * trained
        extra += [f"KL's memory {_mib(remembered)}"] if c.lambda_kl and memory else []
        held = "".join(f", {part}" for part in [*extra, f"reference weights {_mib(references)}"]) + " at most"
        share = examples_read(guard, steps, batch) / (steps * batch)
        lines.append(
            f"compute: {100 * share:.1f} % more examples pass through the model than task rows, the penalty's own "
            "arithmetic aside"
        )
    weights = sum(p.numel() * p.element_size() for p in ready.model.parameters())
    moving = sum(p.numel() * p.element_size() for p in ready.model.parameters() if p.requires_grad)
    passing = "" if activations is None else f", activations {_mib(activations)}"
    lines.insert(
        2 if guard is None else 3,
        f"memory: weights {_mib(weights)}, gradients and Adam's moments {_mib(3 * moving)}{passing}{held}",
    )
    if seconds_per_step is not None:
        without = steps * seconds_per_step / 60
        guarded = f", {without * (1 + share):.1f} with its passes" if guard is not None else ""
        lines.append(f"time: about {without:.1f} minutes of steps like a first one here without the guard{guarded}")
    lines += [*ready.rows.notes, *ready.alignment.notes]
    lines += ["", shown_row(ready.tokenizer, ready.rows, "task_data", ready.kind)]
    if guard is not None:
        lines += ["", shown_row(ready.tokenizer, ready.alignment, "alignment_data", ready.kind)]
        lines += ["", coverage_table(guard.coverage(), fold=not verbose)]
    return "\n".join(lines)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
