"""Other adapters than LoRA on every Linear: kinds, places and starts, most of them as peft ships them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import LoraConfig, OFTConfig, OSFConfig, PeftConfig
from peft.helpers import find_kappa_target_modules
from peft.tuners.lora.config import CordaConfig
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

import fishergeo as fg
from alignguard.data import pad_rows
from alignguard.loading import ROUTER
from alignguard.objective import aligned_logits, evaluation_mode, model_kind
from alignguard.updates import lora_updates
from studies.rivals.base import Encoded, Rival, Run, check_count, check_strength, put_updates

FEED_FORWARD = {"mlp", "feed_forward", "ffn", "DenseReluDense"}  # what models call these blocks


def linear_names(model: Any) -> list[str]:
    """Paths of every linear layer but the output embedding and the routers of a mixture."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and not ROUTER.search(name)
    ]


@dataclass
class MLPTargets(Rival):
    """LoRA on the feed-forward blocks' matrices alone; attention is left as it is.

    Of the LoRAs in peft's ``method_comparison`` this one forgets least at equal accuracy.
    """

    name: ClassVar[str] = "mlp-targets"

    def adapter(self, model: Any, lora: LoraConfig, alignment: Sequence[Encoded]) -> PeftConfig:
        """``lora`` on the linear layers inside the feed-forward blocks of ``model``.

        Raises:
            ValueError: there are none by the names known here.
        """
        names = [name for name in linear_names(model) if FEED_FORWARD & set(name.split("."))]
        if not names:
            raise ValueError(f"mlp-targets: the model has no linear layer inside a block named {sorted(FEED_FORWARD)}")
        return dataclasses.replace(lora, target_modules=names, target_parameters=None)


@dataclass
class KappaTargets(Rival):
    """LoRA on the matrices of the smallest condition numbers (KappaTune, 2506.16289), as peft chooses them.

    Attributes:
        share: of all linear layers, in (0, 1]; peft takes the best 0.2.

    Raises:
        ValueError: a share outside (0, 1].
    """

    name: ClassVar[str] = "kappa-targets"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "share": (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    }
    share: float = 0.2

    def __post_init__(self) -> None:
        check_strength("share", self.share, 1.0)
        if not self.share:
            raise ValueError("share must lie above 0, or nothing would train")

    def adapter(self, model: Any, lora: LoraConfig, alignment: Sequence[Encoded]) -> PeftConfig:
        """``lora`` on what peft chooses of ``model``; the output embedding is left out.

        Raises:
            ValueError: nothing else is chosen.
        """
        found: Any = find_kappa_target_modules(model, top_p=self.share, show_progress=False)
        known = set(linear_names(model))
        names = [name for name in found["target_modules"] if name in known]
        if not names:
            raise ValueError(f"kappa-targets: share={self.share} leaves no layer but the output embedding; give more")
        return dataclasses.replace(lora, target_modules=names, target_parameters=found["target_parameters"])


@dataclass
class OFT(Rival):
    """Orthogonal fine-tuning: every weight times a block-diagonal rotation of its inputs (Qiu et al., 2306.07280).

    peft's implementation with the Cayley-Neumann series. A matrix whose inputs the block size does not divide gets
    the nearest block size that does.

    Attributes:
        block: size of the rotations, at least 2.
        eps: largest Frobenius norm of a block's skew matrix (the paper's constrained variant); None sets no limit.

    Raises:
        ValueError: a block below 2, or an eps that is not above 0.
    """

    name: ClassVar[str] = "oft"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"block": (8, 16, 32, 64), "eps": (None, 0.1, 0.3)}
    block: int = 32
    eps: float | None = None

    def __post_init__(self) -> None:
        check_count("block", self.block)
        if self.block < 2:
            raise ValueError("block must be at least 2: a rotation needs two directions")
        if self.eps is not None:
            check_strength("eps", self.eps)
            if not self.eps:
                raise ValueError("eps must lie above 0, or nothing could turn; None sets no limit")

    def adapter(self, model: Any, lora: LoraConfig, alignment: Sequence[Encoded]) -> PeftConfig:
        """OFT on the modules that ``lora`` names."""
        limit: dict[str, Any] = {} if self.eps is None else {"coft": True, "eps": self.eps}
        return OFTConfig(
            oft_block_size=self.block, target_modules=lora.target_modules, task_type=lora.task_type, **limit
        )


@dataclass
class OSF(Rival):
    """Each weight's leading singular directions are frozen, the others train orthogonally to them (OSF, 2504.07097).

    peft's implementation: gradients are projected, so that Adam's steps, scaled entry by entry, leave the orthogonal
    complement a little. What trains is as large as the adapted matrices themselves.

    Attributes:
        share: singular directions that are frozen, of all, in (0, 1); peft takes half.

    Raises:
        ValueError: a share outside (0, 1).
    """

    name: ClassVar[str] = "osf"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "share": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
    }
    share: float = 0.5

    def __post_init__(self) -> None:
        check_strength("share", self.share, 1.0)
        if self.share in (0, 1):
            raise ValueError("share must lie inside (0, 1), so that something is frozen and something trains")

    def adapter(self, model: Any, lora: LoraConfig, alignment: Sequence[Encoded]) -> PeftConfig:
        """OSF on the modules that ``lora`` names."""
        targets = lora.target_modules
        return OSFConfig(
            effective_rank=float(self.share),
            target_modules=sorted(targets) if isinstance(targets, set) else targets,
            task_type=lora.task_type,
        )


@dataclass
class CorDA(Rival):
    """LoRA that starts in the directions that alignment prompts use least: CorDA's knowledge-preserving mode (2406.05223).

    With C the second moments of a layer's inputs on alignment examples and U S Vᵀ = SVD(W C), the adapter takes the
    last r components, B = U_r √S_r and A = √S_r V_rᵀ C⁻¹, and the frozen weight is W less these. The decomposition is
    peft's. After training the update is put on the aligned weights again, as an adapter of rank 2 r: the model is the
    same, and with its adapter switched off it is the aligned one.

    Attributes:
        examples: alignment examples that C is read on, one at a time.

    Raises:
        ValueError: fewer than one example.
    """

    name: ClassVar[str] = "corda"
    reads_alignment: ClassVar[bool] = True
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"examples": (16, 64, 256)}
    examples: int = 256
    aligned: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    begun: dict[str, fg.LowRank] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_count("examples", self.examples)

    def adapter(self, model: Any, lora: LoraConfig, alignment: Sequence[Encoded]) -> PeftConfig:
        """``lora`` with CorDA's start, its decomposition made of the inputs of ``alignment``.

        Raises:
            ImportError: peft's decomposition needs the package attrs, which peft does not ask for.
            ValueError: experts are adapted too, which CorDA does not decompose.
        """
        try:
            from peft.tuners.lora.corda import preprocess_corda
        except ImportError as error:
            raise ImportError(f"corda: peft's decomposition cannot be imported ({error}); install attrs") from error
        if lora.target_parameters:
            raise ValueError("corda: peft decomposes linear layers alone; name target_modules without the experts")
        everywhere = lora.target_modules == "all-linear"
        config = dataclasses.replace(
            lora,
            target_modules=linear_names(model) if everywhere else lora.target_modules,
            init_lora_weights="corda",
            corda_config=CordaConfig(corda_method="kpm"),
        )
        rows, kind = alignment[: self.examples], model_kind(model)
        device = next(model.parameters()).device

        def read() -> None:
            for row in rows:
                aligned_logits(model, {key: value.to(device) for key, value in pad_rows([row], 0, kind).items()})

        self.aligned = {name: model.get_submodule(name).weight.detach().clone() for name in linear_names(model)}
        with evaluation_mode(model):
            preprocess_corda(model, config, read)
        return config

    def start(self, run: Run) -> None:
        """Keep where the adapter of ``run`` begins."""
        self.begun = {
            name: fg.LowRank(delta.left.detach().clone(), delta.right.detach().clone())
            for name, delta in lora_updates(run.model).items()
        }
        run.examples_read += min(self.examples, len(run.alignment))

    @torch.no_grad()
    def finish(self, run: Run) -> None:
        """Put the aligned weights of ``run`` back, and what was learned beside them."""
        updates = {}
        for name, delta in lora_updates(run.model).items():
            weight = run.model.get_submodule(name).get_base_layer().weight  # type: ignore[operator]
            weight.copy_(self.aligned[name.removeprefix("base_model.model.")])
            updates[name] = delta - self.begun[name]
        put_updates(run.model, updates)
        config: Any = run.model.peft_config[run.model.active_adapters[0]]
        config.corda_config = None  # what is saved is a plain LoRA


class Complement(nn.Module):
    """A factor less its part in the span of ``basis``, (n, k) orthonormal: F − U Uᵀ F, or F − F V Vᵀ on the right."""

    def __init__(self, basis: Tensor, right: bool) -> None:
        super().__init__()
        self.register_buffer("basis", basis, persistent=False)
        self.right = right

    def forward(self, factor: Tensor) -> Tensor:
        """The projected factor."""
        basis: Any = self.basis
        return factor - (factor @ basis) @ basis.mT if self.right else factor - basis @ (basis.mT @ factor)


@dataclass
class OPLoRA(Rival):
    """LoRA that leaves each weight's leading singular triples exactly as they are (OPLoRA, 2510.13003).

    ΔW = s (I − U_k U_kᵀ) B A (I − V_k V_kᵀ), with U_k, V_k of the aligned weight's k largest singular values: in
    every forward pass, so that the optimizer sees the gradients of the projected factors.

    Attributes:
        directions: k, at least 1.

    Raises:
        ValueError: fewer than one direction.
    """

    name: ClassVar[str] = "oplora"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"directions": (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192)}
    directions: int = 16

    def __post_init__(self) -> None:
        check_count("directions", self.directions)

    def start(self, run: Run) -> None:
        """Project both factors of every adapted matrix of ``run`` from now on.

        Raises:
            ValueError: of a matrix nothing would be left to train, since it has too few singular triples.
        """
        (adapter,) = run.model.active_adapters
        for name in lora_updates(run.model):
            module: Any = run.model.get_submodule(name)
            base = module.get_base_layer()
            weight = base.weight.detach().mT if isinstance(base, Conv1D) else base.weight.detach()
            if self.directions >= min(weight.shape):
                raise ValueError(
                    f"oplora: directions={self.directions} leaves nothing of {name}, a matrix of {tuple(weight.shape)}"
                )
            u, _, vh = torch.linalg.svd(
                weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False
            )
            for factor, basis, right in (
                (module.lora_B[adapter], u[:, : self.directions], False),
                (module.lora_A[adapter], vh[: self.directions].mT, True),
            ):
                complement = Complement(basis.to(factor.weight).contiguous(), right)
                parametrize.register_parametrization(factor, "weight", complement)

    def finish(self, run: Run) -> None:
        """Write the projected factors of ``run`` in the place of those that trained."""
        (adapter,) = run.model.active_adapters
        for name in lora_updates(run.model):
            module: Any = run.model.get_submodule(name)
            for factor in (module.lora_A[adapter], module.lora_B[adapter]):
                parametrize.remove_parametrizations(factor, "weight", leave_parametrized=True)
