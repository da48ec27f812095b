"""What a guarded run can be told, with defaults chosen by measurement (docs/evidence.md)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

STRUCTURES = ("kfac", "kfac-sketch", "gram", "sketch")

LABELS = ("empirical", "mc", "margin")

METRICS = ("input-gram", "euclidean")

PROJECTIONS = ("hard", "soft")

# What trains: optimizer steps between two readings of KL where they are remembered, and how many are. Chosen on a public model;
# of all weights each reading is as large as they are in bfloat16.
KL_READ = {"lora": (4, 8), "full": (3, 2)}

OF_COLLISION = ("alpha", "beta", "tau", "metric")

OF_ADAPTIVE = ("refresh_budget", "refresh_tolerance")

OF_THE_FISHER = (
    "structure", "kind", "whole_update", *OF_COLLISION, "energy", "max_rank", "noise_edge",
    "sketch_rank", "refresh_every", "first_refresh", "refresh_examples", "batch_size", "projection", "scale_free",
    "adaptive", *OF_ADAPTIVE, "averaging",
)  # fmt: skip

OF_KL = ("kl_examples", "kl_every", "kl_tokens", "kl_memory", "kl_climb")

OF_MEASURING = ("held_back", "measure_every")

_READ_ANEW: dict[str, Any] = {
    "kl_every": 1,
    "kl_tokens": None,
    "kl_memory": 0,
}  # KL as it is, whole responses, each step

_PRINTED: dict[str, Any] = {
    "structure": "gram", "kind": "empirical", "whole_update": False, "projection": "hard",
    "lambda_alignment": 0.1, "lambda_task": 0.01, "lambda_collision": 0.1, "lambda_kl": 0.0,
    "alpha": 0.5, "beta": 4.0, "tau": 0.01, "metric": "euclidean", "energy": 1.0, "max_rank": 32,
    "refresh_every": 1000, "first_refresh": None, "refresh_examples": 128,
}  # fmt: skip

REFRESH_EVERY = 25  # steps of an estimate in a run long enough for five of them


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold, and no truth value."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class Requirement(NamedTuple):
    """What a field's value must be.

    Attributes:
        words: what follows "must" in the error.
        met: whether a value is so.
    """

    words: str
    met: Callable[[Any], bool]


def one_of(choices: tuple[str, ...]) -> Requirement:
    """One of these words."""
    return Requirement(f"be one of {choices}", lambda value: isinstance(value, str) and value in choices)


def between(low: float, high: float) -> Requirement:
    """A number in [low, high]."""
    return Requirement(f"lie in [{low}, {high}]", lambda value: is_number(value) and low <= value <= high)


def whole(low: int) -> Requirement:
    """A whole number of at least ``low``."""
    return Requirement(f"be a whole number of at least {low}", lambda value: _is_whole(value) and value >= low)


STRENGTH = Requirement("be a finite number of at least 0", lambda value: is_number(value) and value >= 0)
FINITE = Requirement("be a finite number", is_number)
FLAG = Requirement("be true or false", lambda value: isinstance(value, bool))


def _setting(default: Any, requirement: Requirement, summary: str) -> Any:
    """A field with its check and the line that the command line shows of it; the class docstring says the whole."""
    return dataclasses.field(default=default, metadata={"requirement": requirement, "summary": summary})


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

    The defaults leave all of it out but KL, which is read on a few examples, remembered in between, and where the optimizer is
    known charged beside the loss (:meth:`alignguard.Guard.attach`) as far as ``kl_climb`` lets it. They were chosen on
    SmolLM2-135M-Instruct, where in 120 steps of LoRA they kept 98 % of the refusals of foreign unsafe prompts that plain LoRA
    lost, at no price in task score (three seeds at a rate of 5e-4; at 1e-3 they kept 88 %, and with ``kl_every=2`` all of one
    seed's; in runs of 500 and 1500 steps all, and borderline prompts were refused too, docs/evidence.md).

    With ``max_drift`` λ_A and λ_KL say how the two share the work, and both are multiplied by one factor that a damped
    dual ascent finds (:class:`alignguard.guard.schedule.DriftBudget`).

    Attributes:
        structure: Fisher of the alignment data, estimated where a term needs it (``lambda_alignment`` and those below): ``"kfac"`` (both sides), ``"kfac-sketch"`` (both sides, each through one
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
        kl_every: optimizer steps between two of them; without a memory the weight is multiplied by it, so the pull stays
            the same. None: 4 with a memory, 3 where all weights train, 1 without.
        kl_tokens: most response tokens that KL reads of an example, the first ones, in which a refusal is decided; None
            reads whole responses.
        kl_memory: KL evaluations that go on charging until the next one, each by a quadratic model of itself along its
            own gradient, which spans all layers. 0 keeps none; None: 8 where adapters train, 2 where all weights do, none
            where they are sharded. Each holds one number of two bytes for every trainable weight. In the loss their mean is
            charged; beside it each counts in full, for there ``kl_climb`` bounds the price.
        kl_climb: largest share of what the optimizer's step gains on its loss, to first order, that KL evaluations remembered
            may take back where they act beside the loss, times the multiplier that meets ``max_drift``; None sets no bound.
        batch_size: alignment examples in one forward pass of the estimate.
        max_length: longest alignment example in tokens.
        seed: seed of whatever the guard draws; the run's own random state is never touched.
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
        exclude: names of matrices left out of the Fisher's terms and of ‖ΔW‖, as globs, without what peft puts around them;
            each must name something that trains. KL is charged through them all the same.
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

    structure: str = _setting(
        "kfac-sketch", one_of(STRUCTURES), "Fisher of the alignment data: " + " | ".join(STRUCTURES)
    )
    kind: str = _setting("empirical", one_of(LABELS), "where its labels come from: " + " | ".join(LABELS))
    lambda_alignment: float = _setting(
        0.0, STRENGTH, "price of drift as the Fisher predicts it, per nat; 0 leaves it out"
    )
    whole_update: bool = _setting(True, FLAG, "charge the whole update, not its part in the leading directions alone")
    lambda_task: float = _setting(0.0, STRENGTH, "price of the part outside the leading directions")
    lambda_collision: float = _setting(0.0, STRENGTH, "price of the two parts' collision")
    alpha: float = _setting(0.5, between(0.0, 1.0), "share of the coordinate-wise term in the collision")
    beta: float = _setting(4.0, STRENGTH, "weight of large coordinates in it")
    tau: float = _setting(0.01, FINITE, "what is large")
    metric: str = _setting("input-gram", one_of(METRICS), "inner product of the separation: " + " | ".join(METRICS))
    energy: float = _setting(0.8, between(1e-6, 1.0), "share of the Fisher's trace that its leading directions hold")
    max_rank: int | None = _setting(None, whole(1), "most leading directions")
    noise_edge: bool = _setting(False, FLAG, "leave out directions that noise of as many tokens could have")
    sketch_rank: int = _setting(64, whole(1), "columns of a sketch")
    refresh_every: int | None = _setting(
        None, whole(1), "optimizer steps between two estimates; by default a fifth of the run, 25 at the most"
    )
    first_refresh: int | None = _setting(10, whole(1), "optimizer steps before the second estimate")
    refresh_examples: int = _setting(8, whole(1), "alignment examples of an estimate")
    lambda_kl: float = _setting(4.0, STRENGTH, "price of KL to the base model on alignment examples, per nat a token")
    kl_examples: int = _setting(2, whole(1), "alignment examples of a KL evaluation")
    kl_every: int | None = _setting(
        None,
        whole(1),
        "optimizer steps between two KL evaluations; by default 4 with a memory (3 where all weights train), 1 without",
    )
    kl_tokens: int | None = _setting(8, whole(1), "most response tokens that KL reads of an example, the first ones")
    kl_memory: int | None = _setting(
        None,
        whole(0),
        "KL evaluations that go on charging by their quadratic models; by default 8 with adapters, 2 where all weights train",
    )
    kl_climb: float | None = _setting(
        0.1,
        STRENGTH,
        "share of a step's gain on the task that KL evaluations remembered may take back; None sets no bound",
    )
    batch_size: int = _setting(8, whole(1), "alignment examples in a forward pass of the estimate")
    max_length: int = _setting(256, whole(2), "longest alignment example in tokens")
    seed: int = _setting(
        0,
        Requirement("be a whole number from 0 to 2**32 - 1", lambda value: _is_whole(value) and 0 <= value < 2**32),
        "seed",
    )
    projection: str = _setting(
        "hard", one_of(PROJECTIONS), "edge of the leading directions: " + " | ".join(PROJECTIONS)
    )
    scale_free: bool = _setting(False, FLAG, "measure task and collision terms in units of the layer's own weights")
    max_drift: float | None = _setting(
        None,
        Requirement("be a positive number of nats", lambda value: is_number(value) and value > 0),
        "allowed drift in nats a response, in place of the strengths' scale",
    )
    held_back: int = _setting(8, whole(1), "alignment examples on which drift is measured")
    measure_every: int = _setting(5, whole(1), "optimizer steps between two measurements of drift")
    adaptive: bool = _setting(False, FLAG, "estimate anew when measured and predicted drift part, not by the clock")
    refresh_budget: float = _setting(0.03, between(1e-6, 1.0), "share of the training's compute for that")
    refresh_tolerance: float = _setting(0.5, STRENGTH, "share by which they may part")
    averaging: float = _setting(0.0, between(0.0, 0.99), "weight of earlier estimates in each new one")
    kl_cache_mb: int = _setting(512, whole(1), "most MiB of the base model's kept answers")
    exclude: tuple[str, ...] = _setting(
        (),
        Requirement(
            "be a list of names",
            lambda value: isinstance(value, (list, tuple)) and all(isinstance(p, str) for p in value),
        ),
        "names of matrices left out of the Fisher's terms, as globs; KL is charged through them all the same",
    )
    include_router: bool = _setting(False, FLAG, "guard the routers of mixtures of experts too")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, requirement = getattr(self, field.name), field.metadata["requirement"]
            optional = value is None and str(field.type).endswith("| None")
            if not (optional or requirement.met(value)):
                raise ValueError(f"{field.name} must {requirement.words}, not {value!r}")
        object.__setattr__(self, "exclude", tuple(self.exclude))
        if self.max_drift is not None and not (self.lambda_alignment or self.lambda_kl):
            raise ValueError("max_drift steers lambda_alignment and lambda_kl, and both are 0; give one of them")

    @classmethod
    def curvature(cls, **changes: Any) -> GuardConfig:
        """The Fisher layer by layer in place of KL, for models of few layers.

        It charges ½ tr(ΔWᵀFΔW) for the whole update, with a two-sided one-pass sketch of each layer's Fisher, estimated
        every 25 steps. On models of up to six layers it holds what KL holds at a little less cost. On a model of thirty layers
        it was blind, as tokens and layers move together and it takes them apart (docs/evidence.md).

        Args:
            **changes: fields that differ.

        Raises:
            ValueError: a value outside its range.

        Examples:
            >>> config = alignguard.GuardConfig.curvature(refresh_examples=16)
            >>> config.structure, config.lambda_alignment, config.lambda_kl
            ('kfac-sketch', 1.0, 0.0)
        """
        by_layer: dict[str, Any] = {"lambda_alignment": 1.0, "lambda_kl": 0.0, **_READ_ANEW}
        return cls(**{**by_layer, **changes})

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
        return cls(**{**_PRINTED, **_READ_ANEW, **changes})

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
            "lambda_kl": 0.3, "kl_examples": 2, **_READ_ANEW, "kl_every": 4,
        }  # fmt: skip
        return cls(**{**both, **changes})

    def interval(self, steps: int | None = None) -> int:
        """Optimizer steps between two estimates of F.

        Args:
            steps: optimizer steps of the whole run; None where they are not known.

        Returns:
            ``refresh_every``. Where that is None, 25, or a fifth of a run of fewer than 125 steps, which with fewer
            estimates ends further from its start (docs/small-models.md, short runs).
        """
        if self.refresh_every is not None:
            return self.refresh_every
        return REFRESH_EVERY if steps is None else max(1, min(REFRESH_EVERY, steps // 5))

    @property
    def reads_fisher(self) -> bool:
        """Whether any term needs the Fisher; false for KL alone."""
        return bool(self.lambda_alignment or self.lambda_task or self.lambda_collision)

    def unread(self) -> list[str]:
        """Fields that are set and would change nothing: of the Fisher where no term reads it, of collision and of KL where
        they are not charged, of a sketch where there is none, of measuring where drift is not measured. Those of the
        projectors shape what is logged too, whatever is charged.

        Examples:
            >>> alignguard.GuardConfig(structure="gram").unread(), alignguard.GuardConfig.curvature(structure="gram").unread()
            (['structure'], [])
        """
        if self.reads_fisher:
            off: tuple[str, ...] = () if self.lambda_collision else OF_COLLISION
            off += () if self.lambda_collision or self.lambda_task else ("scale_free",)
            off += () if "sketch" in self.structure else ("sketch_rank",)
            off += () if self.adaptive else OF_ADAPTIVE
        else:
            off = OF_THE_FISHER
        idle: tuple[str, ...] = OF_KL if not self.lambda_kl else ("kl_climb",) if self.kl_memory == 0 else ()
        idle += () if self.max_drift is not None or self.adaptive else OF_MEASURING
        plain = {field.name: field.default for field in dataclasses.fields(self)}
        # What a preset sets is no choice of whoever turns off the term that reads it: the presets without KL set some of
        # its fields, and the paper's those of collision.
        printed = _PRINTED if self.reads_fisher else {}
        usual = {name: (plain[name], printed.get(name, plain[name])) for name in off}
        usual |= {name: (plain[name], _READ_ANEW.get(name, plain[name])) for name in idle}
        return [name for name in usual if getattr(self, name) not in usual[name]]

    def kl_schedule(self, method: str, sharded: bool = False) -> tuple[int, int]:
        """When KL is read, and how much of it is remembered.

        Args:
            method: ``"lora"`` or ``"full"``.
            sharded: whether the trainable weights are, whose gradients are not kept.

        Returns:
            Optimizer steps between two readings, and readings remembered.

        Examples:
            >>> config = alignguard.GuardConfig()
            >>> config.kl_schedule("lora"), config.kl_schedule("full"), config.kl_schedule("full", sharded=True)
            ((4, 8), (3, 2), (1, 0))
        """
        every, kept = KL_READ[method]
        memory = self.kl_memory if self.kl_memory is not None else 0 if sharded else kept
        return self.kl_every if self.kl_every is not None else every if memory else 1, memory

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
