"""What a run would do, before it does anything: coverage, sizes, steps, the guard's share of the compute."""

from __future__ import annotations

import math
from typing import Any

from alignguard.coverage import coverage_table
from alignguard.fit import Prepared


def curvature_bytes(guard: Any) -> int:
    """Bytes that curvatures and bases of all guarded matrices take at most, in float32.

    KFAC holds p² and q² and a basis of at most p²; the one-sided Gram p² and the basis; a sketch p·rank and its basis.
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
            total += 2 * p * min(p, guard.config.sketch_rank)
    return 4 * total if guard.uses_curvature else 0


def plan_text(ready: Prepared, seconds_per_step: float | None = None) -> str:
    """The plan in words.

    Args:
        ready: what :func:`alignguard.fit.prepare` read.
        seconds_per_step: time of an optimizer step of the plain run, where it is known.

    Returns:
        Lines on model, data, memory, compute and time, then the table of what is guarded.
    """
    settings, guard = ready.settings, ready.guard
    batch = settings["per_device_train_batch_size"] * settings.get("gradient_accumulation_steps", 1)
    steps = settings.get("max_steps", -1)
    if steps <= 0:
        steps = math.ceil(settings["num_train_epochs"] * math.ceil(len(ready.rows) / batch))
    trained = sum(p.numel() for p in ready.model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in ready.model.parameters())
    lines = [
        f"model: {ready.record['model']} ({ready.kind}, {whole:,} parameters, {trained:,} of them train)",
        f"task: {len(ready.rows)} rows, {batch} a step and process, {steps} steps",
    ]
    if guard is None:
        lines.append("guard: none")
    else:
        c = guard.config
        lines.append(f"alignment: {len(guard.rows)} rows for the Fisher, {c.refresh_examples} at each estimate")
        references = sum(t.numel() * t.element_size() for t in guard.updates.references().values())
        lines.append(f"memory: curvature {_mib(curvature_bytes(guard))}, reference weights {_mib(references)} at most")
        share = min(c.refresh_examples, len(guard.rows)) / (c.refresh_every * batch) if guard.uses_curvature else 0.0
        share = min(share, c.refresh_budget) if c.adaptive else share
        share += min(c.kl_examples, len(guard.rows)) / (c.kl_every * batch) if c.lambda_kl else 0.0
        share += c.held_back / (3 * c.measure_every * batch) if c.max_drift is not None and not c.adaptive else 0.0
        lines.append(
            f"compute: {100 * share:.1f} % more examples pass through the model than task rows, the penalty's own "
            "arithmetic aside"
        )
    if seconds_per_step is not None:
        lines.append(f"time: {steps * seconds_per_step / 60:.1f} minutes without the guard")
    if guard is not None:
        lines += ["", coverage_table(guard.coverage())]
    return "\n".join(lines)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
