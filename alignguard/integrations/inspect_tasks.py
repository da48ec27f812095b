"""DriftCheck as tasks of inspect_ai: its prompts as samples, its judges as scorers, found by inspect's entry point.

``inspect eval alignguard/driftcheck_unsafe --model hf/local -M model_path=DIR -M do_sample=false -M dtype=float32``
"""

from __future__ import annotations

import functools
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr
from inspect_ai.solver import TaskState, generate

from alignguard.drift import COMPLIANCE, INCOHERENT, REFUSAL, make_judge, prompts_of
from alignguard.drift.judges import Judge
from alignguard.drift.verdicts import judged_rows

ASKED = "driftcheck_category"  # in a sample's metadata; other tasks' own "category" is mostly a kind of harm

SHARES = {"refused": REFUSAL, "answered": COMPLIANCE, "incoherent": INCOHERENT}


@functools.cache
def _judge(kind: str, model: str | None, labels: tuple[str, ...]) -> Judge:
    """One judge for all samples, so that its model is read once."""
    return make_judge(kind, model, list(labels) or None)


@scorer(metrics={name: [mean(), stderr()] for name in SHARES})
def driftcheck_judge(judge: str = "rules", judge_model: str | None = None, judge_labels: Any = ()) -> Scorer:
    """The verdict of one of DriftCheck's judges on every answer.

    Args:
        judge: kind of judge, see :func:`alignguard.drift.make_judge`.
        judge_model: folder or hub name of the judge's model.
        judge_labels: labels of a classifier that mean a refusal, a list or words with commas between them.

    Returns:
        A scorer of 0 or 1 for ``refused``, ``answered`` and ``incoherent``, the verdict as explanation.
    """
    labels = judge_labels.split(",") if isinstance(judge_labels, str) else judge_labels
    decide = _judge(judge, judge_model, tuple(labels))

    async def score(state: TaskState, target: Target) -> Score:
        answer = state.output.completion.strip()
        # A judge of harm says nothing about safe prompts; who scores other tasks with it asks it about all.
        category = (state.metadata or {}).get(ASKED, "unsafe")
        row = {"id": str(state.sample_id), "prompt": state.input_text, "category": category}
        verdict = judged_rows([row], [answer], decide, {})[0].verdict
        value = {name: int(verdict == meaning) for name, meaning in SHARES.items()}
        return Score(value=value, answer=answer, explanation=verdict)

    return score


def _task(category: str, prompts: str | None, limit: int | None, max_new_tokens: int, **judging: Any) -> Task:
    samples = [
        Sample(id=row["id"], input=row["prompt"], metadata={ASKED: category, "harm": row.get("harm")})
        for row in prompts_of(category, prompts, limit)
    ]
    return Task(
        dataset=MemoryDataset(samples, name=f"driftcheck-{category}"),
        solver=generate(),
        scorer=driftcheck_judge(**judging),
        config=GenerateConfig(max_tokens=max_new_tokens, temperature=0.0),
    )


@task
def driftcheck_unsafe(
    prompts: str | None = None,
    limit: int | None = None,
    max_new_tokens: int = 32,
    judge: str = "rules",
    judge_model: str | None = None,
    judge_labels: Any = (),
) -> Task:
    """Unsafe prompts; ``refused`` is what DriftCheck calls refusal.

    Args:
        prompts: file or hub name of prompts, public benchmarks' files among them; the packaged set if left out.
        limit: keep only so many prompts, evenly spaced.
        max_new_tokens: longest answer in tokens.
        judge: kind of judge, see :func:`alignguard.drift.make_judge`.
        judge_model: folder or hub name of its model.
        judge_labels: labels of a classifier that mean a refusal.
    """
    options: dict[str, Any] = {"judge": judge, "judge_model": judge_model, "judge_labels": judge_labels}
    return _task("unsafe", prompts, limit, max_new_tokens, **options)


@task
def driftcheck_borderline(
    prompts: str | None = None,
    limit: int | None = None,
    max_new_tokens: int = 32,
    judge: str = "rules",
    judge_model: str | None = None,
    judge_labels: Any = (),
) -> Task:
    """Safe prompts that look unsafe; ``answered`` is what DriftCheck calls borderline. Arguments as the first task's."""
    options: dict[str, Any] = {"judge": judge, "judge_model": judge_model, "judge_labels": judge_labels}
    return _task("borderline", prompts, limit, max_new_tokens, **options)


@task
def driftcheck_ordinary(
    prompts: str | None = None,
    limit: int | None = None,
    max_new_tokens: int = 32,
    judge: str = "rules",
    judge_model: str | None = None,
    judge_labels: Any = (),
) -> Task:
    """Everyday prompts; ``answered`` is what DriftCheck calls compliance. Arguments as the first task's."""
    options: dict[str, Any] = {"judge": judge, "judge_model": judge_model, "judge_labels": judge_labels}
    return _task("ordinary", prompts, limit, max_new_tokens, **options)
