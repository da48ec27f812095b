"""The section that a guarded run adds to the model card peft or transformers writes."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignguard.guard import Guard

VERSIONS = ("fishergeo", "torch", "transformers", "peft", "accelerate")


def card_section(record: Mapping[str, Any], guard: Guard | None) -> str:
    """Markdown: data, strengths or budget, drift, coverage, versions.

    Args:
        record: :func:`alignguard.runrecord.record_of`.
        guard: after training, or None for a plain run.

    Returns:
        A section headed "Training with alignguard".
    """
    data = [
        f"{record[name]['rows']} rows (sha256 `{record[name]['sha256'][:16]}`)"
        for name in ("task_data", "alignment_data")
    ]
    lines = ["## Training with alignguard", "", f"- Base model: `{record['model']}`", f"- Method: {record['method']}"]
    lines += [f"- Task data: {data[0]}", f"- Seed: {record['seed']}"]
    if guard is None:
        lines.append("- Trained without a guard.")
    else:
        c = guard.config
        lines.append(f"- Alignment data: {data[1]}, {guard.examples_read} readings")
        if guard.budget is not None:
            lines.append(
                f"- Drift budget: {c.max_drift:g} nats a response; last multiplier {guard.budget.multiplier:.3g} on "
                f"λ_A = {c.lambda_alignment:g}, λ_KL = {c.lambda_kl:g}"
            )
        else:
            lines.append(
                f"- Strengths: λ_A = {c.lambda_alignment:g}, λ_T = {c.lambda_task:g}, λ_NC = {c.lambda_collision:g}, λ_KL = {c.lambda_kl:g}"
            )
        lines.append(f"- Fisher: {c.structure}, {c.kind}, {guard.refreshes} estimates of {c.refresh_examples} examples")
        drift = guard.measured_drift()
        measured = "not measurable" if drift is None else f"{drift:.4g}"
        lines.append(f"- Drift from the base on alignment responses, nats a response: 0 before, {measured} after")
        covered = guard.coverage()
        lines.append(
            f"- Matrices guarded: {sum(x.guarded for x in covered)}; trained but not guarded: {sum(not x.guarded for x in covered)}"
        )
    shown = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS)
    lines += [f"- Versions: {shown}", ""]
    lines.append(
        "The guard is meant against drift in benign fine-tuning. It is no defence against someone who holds the weights."
    )
    return "\n".join(lines) + "\n"


def add_card_section(folder: Path, section: str) -> None:
    """Append the section to ``README.md`` of a saved model, which is made if it is not there."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8").rstrip() + "\n\n" if card.is_file() else "# Fine-tuned model\n\n"
    card.write_text(text + section, encoding="utf-8")
