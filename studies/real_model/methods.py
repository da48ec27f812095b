"""What is compared on the aligned model: the guard's forms and its rivals by name, and the settings tried of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignguard.guard import GuardConfig
from studies.jobs import GUARD, make_job
from studies.rivals import RIVALS

_ANEW = {"lambda_alignment": 0.0, "kl_tokens": 8, "kl_memory": 0}  # KL as it is read, nothing remembered
PAPER: dict[str, dict[str, Any]] = {  # the paper's form as printed, each term taken away, and its other knobs turned
    "": {},
    ", without its Fisher term": {"lambda_alignment": 0.0},
    ", without its stability term": {"lambda_task": 0.0},
    ", without its overlap term": {"lambda_collision": 0.05, "alpha": 0.0},  # separation keeps its weight
    ", 4 directions": {"max_rank": 4},
    ", 128 directions": {"max_rank": 128},
    ", estimated every 25 steps": {"refresh_every": 25, "refresh_examples": 32},
}
BASE = "base"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    BASE: (BASE, {}),
    "plain": ("plain", {}),
    **{f"kl with memory, λ {s}": (GUARD, GuardConfig(lambda_kl=float(s)).to_dict()) for s in (1, 4, 16)},
    "kl with memory, climb 0.3": (GUARD, GuardConfig(kl_climb=0.3).to_dict()),
    "kl with memory, every 2nd": (GUARD, GuardConfig(kl_every=2).to_dict()),
    "kl with memory, 1 row every 2nd": (GUARD, GuardConfig(kl_every=2, kl_examples=1).to_dict()),
    "kl with memory, at most 3 nats": (GUARD, GuardConfig(max_drift=3.0).to_dict()),
    **{
        f"kl, nothing remembered, λ {s}": (GUARD, GuardConfig(lambda_kl=float(s), kl_memory=0).to_dict())
        for s in (1, 4)
    },
    # what was tried where every weight trains
    "kl with memory, 8 kept": (GUARD, GuardConfig(kl_memory=8, kl_every=4).to_dict()),
    "kl with memory, 2 kept, every 2nd": (GUARD, GuardConfig(kl_memory=2, kl_every=2).to_dict()),
    "kl with memory, 2 kept, every 3rd": (GUARD, GuardConfig(kl_memory=2, kl_every=3).to_dict()),
    "kl with memory, 4 kept, every 3rd": (GUARD, GuardConfig(kl_memory=4, kl_every=3).to_dict()),
    "kl with memory, 2 kept, every 4th": (GUARD, GuardConfig(kl_memory=2, kl_every=4).to_dict()),
    "kl with memory, 4 kept, every 2nd": (GUARD, GuardConfig(kl_memory=4, kl_every=2).to_dict()),
    "kl with memory, 1 kept, every step": (GUARD, GuardConfig(kl_memory=1, kl_every=1).to_dict()),
    "kl with memory, 1 kept, every step, climb 0.3": (
        GUARD,
        GuardConfig(kl_memory=1, kl_every=1, kl_climb=0.3).to_dict(),
    ),
    "kl with memory, 2 kept, every step": (GUARD, GuardConfig(kl_memory=2, kl_every=1).to_dict()),
    "kl with memory, 2 kept, every 2nd, climb 0.03": (
        GUARD,
        GuardConfig(kl_memory=2, kl_every=2, kl_climb=0.03).to_dict(),
    ),
    "kl, 1 row every step": (GUARD, {**_ANEW, "lambda_kl": 1.0, "kl_examples": 1, "kl_every": 1}),
    "kl, 2 rows every 4th": (GUARD, {**_ANEW, "lambda_kl": 4.0, "kl_examples": 2, "kl_every": 4}),
    "curvature by layers": (GUARD, {}),
    "curvature and KL": (GUARD, GuardConfig.combined().to_dict()),
    **{f"the paper's form{words}": (GUARD, GuardConfig.paper(**changes).to_dict()) for words, changes in PAPER.items()},
    # rivals at the settings of their papers
    "constrained SFT": ("constrained-sft", {}),
    "kl on the task": ("task-kl", {}),
    "OFT": ("oft", {}),
    "CorDA, knowledge-preserving": ("corda", {}),
    "self-rewritten targets": ("self-rewritten", {}),
    "system prompt at test": ("system-prompt", {}),
    "MLP targets alone": ("mlp-targets", {}),
    "replay of own answers": ("replay", {"share": 0.1}),  # the alignment rows are the model's own answers
    "EWC": ("ewc", {}),
    "L2 to the start": ("l2", {}),
    "SafeLoRA": ("safelora", {}),
    "stored logits": ("stored-logits", {}),
    "OPLoRA": ("oplora", {}),
    "weights averaged over the steps": ("ema", {}),
    "weights between both": ("interpolation", {"factor": 0.8}),
    "Safe Delta": ("safe-delta", {}),
    "intruders scaled down": ("intruders", {}),
    "SafeMERGE": ("safemerge", {}),
}
# What is tried of each on the sources that settings are chosen by, beside the settings of its paper.
TRIED: dict[str, tuple[dict[str, Any], ...]] = {
    "kl, 1 row every step": ({"lambda_kl": 0.3}, {"lambda_kl": 3.0}),
    "curvature and KL": ({"lambda_kl": 1.0}, {"lambda_kl": 3.0}),
    "constrained SFT": ({"early": 4.0, "later": 0.3}, {"early": 4.0, "later": 1.0}),
    "kl on the task": ({"strength": 1.0}, {"strength": 10.0}),
    "OFT": ({"eps": 0.1}, {"eps": 0.01}),
    "replay of own answers": ({"share": 0.05}, {"share": 0.2}),
    "EWC": ({"strength": 1e4}, {"strength": 1e6}),
    "L2 to the start": ({"strength": 0.001}, {"strength": 0.1}),
    "SafeLoRA": tuple({"threshold": t} for t in (0.1, 0.2, 0.5, 0.8)),
    "stored logits": ({"strength": 0.1}, {"strength": 10.0}),
    "OPLoRA": ({"directions": 64}, {"directions": 128}),
    "weights averaged over the steps": ({"decay": 0.95}, {"decay": 0.98}),
    "weights between both": ({"factor": 0.6}, {"factor": 0.4}),
    "Safe Delta": ({"strength": 0.01}, {"strength": 1.0}),
    "intruders scaled down": ({"strength": 0.25}, {"strength": 0.0}),
    "SafeMERGE": ({"threshold": 1.0}, {"threshold": 1.0, "weight": 0.5}),
}


def _titled(name: str, settings: Mapping[str, Any]) -> str:
    return f"{name}, {', '.join(f'{key} {value:g}' for key, value in settings.items())}"


def settings_tried(name: str) -> list[str]:
    """What is tried of a rival, by its names in ``METHODS``: its paper's setting, then those of ``TRIED``."""
    return [name, *(_titled(name, settings) for settings in TRIED[name])]


METHODS |= {
    _titled(name, settings): (METHODS[name][0], {**METHODS[name][1], **settings})
    for name, tried in TRIED.items()
    for settings in tried
}


def default() -> str | None:
    """The method that ``GuardConfig()`` is; None where it is none of these."""
    settings = GuardConfig().to_dict()
    return next((name for name, (method, given) in METHODS.items() if (method, given) == (GUARD, settings)), None)


def needs_unaligned(name: str) -> bool:
    """Whether a method compares with the model before its alignment."""
    method = METHODS[name][0]
    return method in RIVALS and RIVALS[method].needs_unaligned


def job_of(name: str, seed: int, training: Mapping[str, Any], unaligned: str | None = None) -> dict[str, Any]:
    """A run; the model before any is measured once, whatever the seed."""
    if name == BASE:
        return {"name": BASE, "method": BASE, "settings": {}, "seed": 0, "group": "real model"}
    method, settings = METHODS[name]
    before = {"unaligned": unaligned} if needs_unaligned(name) else {}
    return make_job(name, method, {**settings, **before}, seed, "real model", training)
