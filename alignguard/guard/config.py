"""What a guarded run can be told, with defaults chosen by measurement (docs/evidence.md)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STRUCTURES = ("kfac", "kfac-sketch", "gram", "sketch")

LABELS = ("empirical", "mc", "margin")

METRICS = ("input-gram", "euclidean")

PROJECTIONS = ("hard", "soft")

REFRESH_EVERY = 25  # steps of an estimate in a run long enough for five of them


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold, and no truth value."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


@dataclass(frozen=True)
class GuardConfig:
    """Strengths and schedule of the guard.

    The penalty added to the task loss is, summed over the adapted layers,

        λ_A ‖F^½ ΔW_A‖² + λ_T ‖ΔW_T‖² + λ_NC (α E_rm + (1−α) E_geo) + λ_KL KL(base ‖ present)

    with ΔW_A = PΔW and ΔW_T = ΔW − ΔW_A, P the projector on the leading eigenvectors of the output side of F
    (arXiv 2508.02079, section 4), F re-estimated at the present weights every ``refresh_every`` steps.

    With ``scale_free`` the last two curvature terms do not depend on the model's size: in every layer the parts are
    divided by ω = ‖W0‖_F / √(pq), its root mean square weight, and λ_T mean((ΔW_T/ω)²) + λ_NC (α mean η|ΔW_A ΔW_T|/ω²
    + (1−α) E_geo) is averaged over the layers; τ is then a share of ω. The alignment term is in nats in any case.

    With ``max_drift`` λ_A and λ_KL say how the two share the work, and both are multiplied by one factor that a damped
    dual ascent finds (:class:`alignguard.guard.schedule.DriftBudget`).

    Attributes:
        structure: Fisher of the alignment data: ``"kfac"`` (both sides), ``"kfac-sketch"`` (both sides, each through one
            pass of O((p+q)·rank) memory), ``"gram"`` (the paper's one-sided F, exact) or ``"sketch"`` (the same F
            through such a pass).
        kind: where labels come from: ``"empirical"``, ``"mc"`` or ``"margin"`` (see ``fishergeo.estimate_fisher``), of whole
            responses. λ_A is a price per nat with the first two; a margin is a difference of logits.
        lambda_alignment: λ_A, per nat: F is the Fisher of a whole response (with the default ``kind``), so
            ½ tr(ΔWᵀFΔW) is a drift in nats.
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
        noise_edge: leave out of P, whatever ``energy`` asks for, eigenvectors whose eigenvalue pure noise of as many
            supervised tokens could have (Marchenko and Pastur 1967, see :func:`fishergeo.rank_by_noise_edge`).
        sketch_rank: columns of a sketch, eigenpairs that are known of what it stands for.
        refresh_every: optimizer steps between two estimates of F; None: a fifth of the run, and 25 at the most, see
            :meth:`interval`.
        first_refresh: optimizer steps before the second estimate of F, which is the first at weights that have moved;
            None, or more than ``refresh_every``, waits for that. A new adapter moves fastest where the F of its start
            is blind.
        refresh_examples: alignment examples read at each estimate, in rotation.
        lambda_kl: λ_KL, weight of KL to the base model on alignment examples, nats a response token; 0 leaves it out.
        kl_examples: alignment examples of each KL evaluation.
        kl_every: optimizer steps between two of them; the weight is multiplied by it, so the pull stays the same.
        kl_tokens: most response tokens that KL reads of an example, the first ones; None reads whole responses.
        kl_memory: KL evaluations that go on charging until the next one, each by a quadratic model of itself along its
            own gradient, which spans all layers; the weight is then not multiplied. 0 keeps none. LoRA only: each holds
            one number for every trainable weight.
        batch_size: alignment examples in one forward pass of the estimate.
        max_length: longest alignment example in tokens.
        seed: of whatever the guard draws; the run's own random state is never touched.
        projection: ``"hard"``, or ``"soft"``: every known direction with the weight λ/(λ + ε), one half at the last
            one that the hard projector holds; for tasks entangled with what is to be kept.
        scale_free: measure λ_T and λ_NC in units of the layer's own weights, see above.
        max_drift: allowed drift KL(base ‖ present) in nats a response, in place of the strengths' scale; None leaves
            them as they are.
        held_back: alignment examples kept out of the Fisher, on which drift is measured; only with ``max_drift`` or
            adaptive refreshes.
        measure_every: optimizer steps between two measurements of that drift, one forward pass of them each.
        adaptive: refresh when measured and predicted drift part, not by the clock; ``refresh_every`` is then the
            soonest.
        refresh_budget: share of the training's compute that adaptive refreshes and measurements may take; an
            alignment example's forward and backward pass counts as a task example's, its forward pass a third.
        refresh_tolerance: adaptive refreshes come when the drift measured is off the predicted one by this share.
        averaging: weight in [0, 1) of the earlier estimates in each new one, by exponential forgetting.
        kl_cache_mb: most MiB of reference log-probabilities kept.
        exclude: names of matrices left unguarded, as globs, without what peft puts around them.
        include_router: guard the routers of mixtures of experts too.

    Raises:
        ValueError: a value outside its range; the message names the field.

    Examples:
        >>> config = alignguard.GuardConfig(max_drift=0.5)
        >>> alignguard.GuardConfig.from_dict(config.to_dict()) == config
        True
        >>> alignguard.GuardConfig(structure="hessian")
        Traceback (most recent call last):
            ...
        ValueError: structure must be one of ('kfac', 'kfac-sketch', 'gram', 'sketch'), not 'hessian'
    """

    structure: str = "kfac-sketch"
    kind: str = "empirical"
    lambda_alignment: float = 1.0
    whole_update: bool = True
    lambda_task: float = 0.0
    lambda_collision: float = 0.0
    alpha: float = 0.5
    beta: float = 4.0
    tau: float = 0.01
    metric: str = "input-gram"
    energy: float = 0.8
    max_rank: int | None = None
    noise_edge: bool = False
    sketch_rank: int = 64
    refresh_every: int | None = None
    first_refresh: int | None = 10
    refresh_examples: int = 8
    lambda_kl: float = 0.0
    kl_examples: int = 2
    kl_every: int = 1
    kl_tokens: int | None = None
    kl_memory: int = 0
    batch_size: int = 8
    max_length: int = 256
    seed: int = 0
    projection: str = "hard"
    scale_free: bool = False
    max_drift: float | None = None
    held_back: int = 8
    measure_every: int = 5
    adaptive: bool = False
    refresh_budget: float = 0.03
    refresh_tolerance: float = 0.5
    averaging: float = 0.0
    kl_cache_mb: int = 512
    exclude: tuple[str, ...] = ()
    include_router: bool = False

    def __post_init__(self) -> None:
        choices_of = {"structure": STRUCTURES, "kind": LABELS, "metric": METRICS, "projection": PROJECTIONS}
        for field, choices in choices_of.items():
            if not isinstance(getattr(self, field), str) or getattr(self, field) not in choices:
                raise ValueError(f"{field} must be one of {choices}, not {getattr(self, field)!r}")
        for field in ("lambda_alignment", "lambda_task", "lambda_collision", "lambda_kl", "beta", "refresh_tolerance"):
            value = getattr(self, field)
            if not (is_number(value) and value >= 0):
                raise ValueError(f"{field} must be a finite number of at least 0, not {value!r}")
        for field, low, high in (
            ("alpha", 0.0, 1.0),
            ("energy", 1e-6, 1.0),
            ("refresh_budget", 1e-6, 1.0),
            ("averaging", 0.0, 0.99),
        ):
            value = getattr(self, field)
            if not (is_number(value) and low <= value <= high):
                raise ValueError(f"{field} must lie in [{low}, {high}], not {value!r}")
        if not is_number(self.tau):
            raise ValueError(f"tau must be a finite number, not {self.tau!r}")
        counts = (
            "sketch_rank",
            "refresh_examples",
            "kl_examples",
            "kl_every",
            "batch_size",
            "max_length",
            "held_back",
            "measure_every",
            "kl_cache_mb",
        )
        optional = ("max_rank", "refresh_every", "first_refresh", "kl_tokens")
        for field in counts + tuple(field for field in optional if getattr(self, field) is not None):
            value = getattr(self, field)
            if not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
                raise ValueError(f"{field} must be a whole number of at least 1, not {value!r}")
        if isinstance(self.kl_memory, bool) or not isinstance(self.kl_memory, int) or self.kl_memory < 0:
            raise ValueError(f"kl_memory must be a whole number of at least 0, not {self.kl_memory!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be a whole number from 0 to 2**32 - 1, not {self.seed!r}")
        for field in ("whole_update", "noise_edge", "scale_free", "adaptive", "include_router"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field} must be true or false, not {getattr(self, field)!r}")
        names = self.exclude
        if not isinstance(names, (list, tuple)) or not all(isinstance(pattern, str) for pattern in names):
            raise ValueError(f"exclude must be a list of names, not {self.exclude!r}")
        object.__setattr__(self, "exclude", tuple(names))
        if self.max_drift is not None:
            drift = self.max_drift
            if not (is_number(drift) and drift > 0):
                raise ValueError(f"max_drift must be a positive number of nats, not {drift!r}")
            if not (self.lambda_alignment or self.lambda_kl):
                raise ValueError("max_drift steers lambda_alignment and lambda_kl, and both are 0; give one of them")

    @classmethod
    def paper(cls, **changes: Any) -> GuardConfig:
        """The method of arXiv 2508.02079 as printed, for whoever comes for it.

        One-sided Gram of the alignment data, its 32 leading directions, estimated once in 1000 steps; the alignment term
        on ΔW_A alone, λ_A 0.1 and λ_T 0.01 with H the identity, both collision terms with λ_NC 0.1 and α 0.5, β 4 and
        τ 0.01 in η, and the euclidean reading of the separation, which is zero for every update. λ_NC, β and τ are
        those of a public re-implementation, since no text at hand prints them. Measured, it keeps less than the default
        (docs/evidence.md).

        Args:
            **changes: fields that differ.

        Raises:
            ValueError: a value outside its range.

        Examples:
            >>> config = alignguard.GuardConfig.paper()
            >>> config.structure, config.max_rank, config.lambda_alignment, config.lambda_task
            ('gram', 32, 0.1, 0.01)
        """
        printed: dict[str, Any] = {
            "structure": "gram", "kind": "empirical", "whole_update": False, "projection": "hard",
            "lambda_alignment": 0.1, "lambda_task": 0.01, "lambda_collision": 0.1, "lambda_kl": 0.0,
            "alpha": 0.5, "beta": 4.0, "tau": 0.01, "metric": "euclidean", "energy": 1.0, "max_rank": 32,
            "refresh_every": 1000, "first_refresh": None, "refresh_examples": 128,
        }  # fmt: skip
        return cls(**{**printed, **changes})

    @classmethod
    def combined(cls, **changes: Any) -> GuardConfig:
        """Curvature and KL together, each weaker than alone: the combination that the evidence page recommends on small models.

        Args:
            **changes: fields that differ.

        Raises:
            ValueError: a value outside its range.

        Examples:
            >>> alignguard.GuardConfig.combined(seed=3).lambda_kl
            0.3
        """
        both: dict[str, Any] = {
            "structure": "kfac", "lambda_alignment": 0.3, "refresh_every": 100, "refresh_examples": 16,
            "lambda_kl": 0.3, "kl_examples": 2, "kl_every": 4,
        }  # fmt: skip
        return cls(**{**both, **changes})

    def interval(self, steps: int | None = None) -> int:
        """Optimizer steps between two estimates of F.

        Args:
            steps: optimizer steps of the whole run; None where they are not known.

        Returns:
            ``refresh_every``. Where that is None, 25, or a fifth of a run of fewer than 125 steps, which with fewer
            estimates ends further from its start (docs/evidence.md, short runs).
        """
        if self.refresh_every is not None:
            return self.refresh_every
        return REFRESH_EVERY if steps is None else max(1, min(REFRESH_EVERY, steps // 5))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> GuardConfig:
        """The inverse of :meth:`to_dict`.

        Args:
            values: fields by name; those left out take their defaults.

        Raises:
            ValueError: an unknown field, named, or a value out of its range.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"GuardConfig fields must be a mapping, not {values!r}")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(map(str, values)) - known):
            raise ValueError(f"unknown GuardConfig fields {unknown}; known: {sorted(known)}")
        return cls(**values)

    def to_json(self) -> str:
        """The fields as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)
