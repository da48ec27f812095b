"""What people would do instead of the guard: small implementations on the same Trainer, for comparison.

Every rival is a :class:`Rival` with a few settings; :func:`train_rival` trains one, :data:`RIVALS` names them all, and
:func:`make_rival` builds one from a name and settings. KL to the base model (LwF style) is a term of the guard itself,
``GuardConfig(lambda_alignment=0, lambda_kl=1)``.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from studies.rivals.adapters import OFT, OSF, CorDA, KappaTargets, MLPTargets, OPLoRA
from studies.rivals.afterwards import Intruders, OneShot, SafeDelta, SafeMERGE
from studies.rivals.averaging import EMA, Interpolation
from studies.rivals.base import Rival, Run
from studies.rivals.distillation import ConstrainedSFT, StoredLogits, TaskKL
from studies.rivals.nullspace import NullSpace, quiet_directions
from studies.rivals.penalties import EWC, KFAC, L2
from studies.rivals.projections import GradientProjection, SafeLoRA, alignment_map, without_conflict
from studies.rivals.rows import Replay, SelfRewritten, SystemPrompt
from studies.rivals.training import RivalResult, train_rival

__all__ = [
    "EMA",
    "EWC",
    "KFAC",
    "L2",
    "OFT",
    "OSF",
    "RIVALS",
    "ConstrainedSFT",
    "CorDA",
    "GradientProjection",
    "Interpolation",
    "Intruders",
    "KappaTargets",
    "MLPTargets",
    "NullSpace",
    "OPLoRA",
    "OneShot",
    "Replay",
    "Rival",
    "RivalResult",
    "Run",
    "SafeDelta",
    "SafeLoRA",
    "SafeMERGE",
    "SelfRewritten",
    "StoredLogits",
    "SystemPrompt",
    "TaskKL",
    "alignment_map",
    "make_rival",
    "quiet_directions",
    "sweep",
    "train_rival",
    "without_conflict",
]

RIVALS: dict[str, type[Rival]] = {
    rival.name: rival
    for rival in (
        Rival,
        EMA,
        Interpolation,
        L2,
        EWC,
        KFAC,
        Replay,
        SafeLoRA,
        OneShot,
        GradientProjection,
        NullSpace,
        ConstrainedSFT,
        TaskKL,
        StoredLogits,
        SelfRewritten,
        SystemPrompt,
        OFT,
        CorDA,
        MLPTargets,
        OPLoRA,
        OSF,
        KappaTargets,
        SafeDelta,
        SafeMERGE,
        Intruders,
    )
}


def make_rival(name: str, settings: Mapping[str, Any] | None = None) -> Rival:
    """A fresh rival by its name.

    Args:
        name: a key of :data:`RIVALS`, such as ``"ewc"``.
        settings: its dataclass fields; those left out take their defaults.

    Returns:
        The rival, for one run.

    Raises:
        ValueError: an unknown name, an unknown setting, or a value out of range; each is named.
    """
    if name not in RIVALS:
        raise ValueError(f"unknown rival {name!r}; there are {', '.join(RIVALS)}")
    kind = RIVALS[name]
    known: list[str] = [f.name for f in dataclasses.fields(kind) if f.init] if dataclasses.is_dataclass(kind) else []
    if unknown := sorted(set(settings or {}) - set(known)):
        raise ValueError(f"{name}: unknown settings {unknown}; known: {known}")
    return kind(**(settings or {}))


def sweep(name: str) -> list[dict[str, Any]]:
    """The settings of a rival's tuning sweep: the product of its grid.

    Args:
        name: a key of :data:`RIVALS`.

    Returns:
        12 dicts for :func:`make_rival`; fewer where a rival has fewer settings to choose, one empty dict where none.
    """
    grid = RIVALS[name].grid
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
