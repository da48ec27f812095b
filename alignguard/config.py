"""What a guarded run can be told, with defaults chosen by measurement (docs/evidence.md)."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

STRUCTURES = ("kfac", "gram", "sketch")
KINDS = ("empirical", "mc", "margin")
METRICS = ("input-gram", "euclidean")


@dataclass(frozen=True)
class GuardConfig:
    """Strengths and schedule of the guard.

    The penalty added to the task loss is, summed over the adapted layers,

        λ_A ‖F^½ ΔW_A‖² + λ_T ‖ΔW_T‖² + λ_NC (α E_rm + (1−α) E_geo) + λ_KL KL(base ‖ present)

    with ΔW_A = PΔW and ΔW_T = ΔW − ΔW_A, P the projector on the leading eigenvectors of the output side of F
    (arXiv 2508.02079, section 4), F re-estimated at the present weights every ``refresh_every`` steps.

    Attributes:
        structure: Fisher of the alignment data: ``"kfac"`` (both sides), ``"gram"`` (the paper's one-sided F, exact)
            or ``"sketch"`` (the same F through one pass of O((p+q)·rank) memory).
        kind: where labels come from: ``"empirical"``, ``"mc"`` or ``"margin"`` (see :func:`fishergeo.estimate_fisher`).
        lambda_alignment: λ_A, per nat: F is the Fisher of a whole response, so ½ tr(ΔWᵀFΔW) is a drift in nats.
        whole_update: charge λ_A ‖F^½ ΔW‖² for the whole update in place of ΔW_A alone: the part outside the leading
            directions is charged too, and no eigenvectors are needed until a report asks for them.
        lambda_task: λ_T.
        lambda_collision: λ_NC; 0 leaves both collision terms out.
        alpha: share of the coordinate-wise term in the collision penalty, in [0, 1].
        beta: weight of large coordinates in E_rm, η = 1 + β σ(|ΔW| − τ).
        tau: threshold of that sigmoid.
        metric: reading of E_geo; ``"euclidean"`` is the paper's, identically zero under a hard projector.
        energy: share of the trace of F that P holds, in (0, 1].
        max_rank: most eigenvectors that P may have; None sets no bound.
        sketch_rank: columns of the sketch.
        refresh_every: optimizer steps between two estimates of F.
        refresh_examples: alignment examples read at each estimate, in rotation.
        lambda_kl: λ_KL, weight of KL to the base model on alignment examples, nats a response token; 0 leaves it out.
        kl_examples: alignment examples of each KL evaluation.
        kl_every: optimizer steps between two of them; the weight is multiplied by it, so the pull stays the same.
        batch_size: alignment examples in one forward pass of the estimate.
        max_length: longest alignment example in tokens.
        seed: of whatever the guard draws; the run's own random state is never touched.

    Raises:
        ValueError: a value outside its range; the message names the field.
    """

    structure: str = "kfac"
    kind: str = "empirical"
    lambda_alignment: float = 30.0
    whole_update: bool = False
    lambda_task: float = 0.0
    lambda_collision: float = 0.0
    alpha: float = 0.5
    beta: float = 4.0
    tau: float = 0.01
    metric: str = "input-gram"
    energy: float = 0.8
    max_rank: int | None = None
    sketch_rank: int = 64
    refresh_every: int = 25
    refresh_examples: int = 32
    lambda_kl: float = 0.0
    kl_examples: int = 2
    kl_every: int = 1
    batch_size: int = 16
    max_length: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for field, choices in (("structure", STRUCTURES), ("kind", KINDS), ("metric", METRICS)):
            if getattr(self, field) not in choices:
                raise ValueError(f"{field} must be one of {choices}, not {getattr(self, field)!r}")
        for field in ("lambda_alignment", "lambda_task", "lambda_collision", "lambda_kl", "beta"):
            value = getattr(self, field)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ValueError(f"{field} must be a finite number of at least 0, not {value!r}")
        for field, low, high in (("alpha", 0.0, 1.0), ("energy", 1e-6, 1.0)):
            value = getattr(self, field)
            if not (isinstance(value, (int, float)) and low <= value <= high):
                raise ValueError(f"{field} must lie in [{low}, {high}], not {value!r}")
        if not (isinstance(self.tau, (int, float)) and math.isfinite(self.tau)):
            raise ValueError(f"tau must be a finite number, not {self.tau!r}")
        counts = (
            "sketch_rank",
            "refresh_every",
            "refresh_examples",
            "kl_examples",
            "kl_every",
            "batch_size",
            "max_length",
        )
        for field in counts + (("max_rank",) if self.max_rank is not None else ()):
            value = getattr(self, field)
            if not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
                raise ValueError(f"{field} must be a whole number of at least 1, not {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GuardConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: an unknown field, named.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown GuardConfig fields {unknown}; known: {sorted(known)}")
        return cls(**values)

    def to_json(self) -> str:
        """The fields as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)
