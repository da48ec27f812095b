"""An adapter that starts where alignment prompts put nothing in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import fishergeo as fg
from studies.rivals.base import Rival, Run, check_count, check_strength
from studies.rivals.penalties import fisher_at_start


def quiet_directions(covariance: Tensor, energy: float, least: int) -> Tensor:
    """Orthonormal directions that hold the last 1 − ``energy`` of an input covariance's trace, at least ``least``.

    Args:
        covariance: (q, q), the mean of a aᵀ over inputs a.
        energy: share of the trace that the directions left out hold, in (0, 1].
        least: fewest directions, at most q.

    Returns:
        (q, d), the quietest last.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    loud = fg.rank_for_energy(values, energy=energy) if values.sum() > 0 else 0
    return vectors[:, min(loud, len(values) - least) :]


@dataclass
class NullSpace(Rival):
    """A starts inside the null space of the alignment prompts' activations and stays there (LoRA-Null, AAAI 2026).

    Held there, ΔW·a = B·A·a is nearly zero for every input a that alignment prompts bring to the layer at θ0. The
    published method also moves the base weights; here only A's start and its freezing are taken over.

    Attributes:
        energy: share of the activations' energy that A must not see, in (0, 1].
        examples: alignment examples whose activations are read.
        freeze: keep A where it starts; False lets it train away.

    Raises:
        ValueError: an energy outside (0, 1], or fewer than one example.
    """

    name: ClassVar[str] = "null-space"
    reads_alignment: ClassVar[bool] = True
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "energy": (0.5, 0.7, 0.8, 0.9, 0.95, 0.99),
        "freeze": (True, False),
    }
    energy: float = 0.95
    examples: int = 128
    freeze: bool = True

    def __post_init__(self) -> None:
        check_strength("energy", self.energy, 1.0)
        check_count("examples", self.examples)
        if not self.energy:
            raise ValueError("energy must lie above 0, or A would not be held at all")

    def start(self, run: Run) -> None:
        """Draw A of ``run`` in the quiet directions, as large as it was."""
        covariances = {
            name: operator.input_factor
            for name, operator in fisher_at_start(run, "kfac", "empirical", self.examples).items()
        }
        generator = torch.Generator().manual_seed(run.seed)
        (adapter,) = run.model.active_adapters
        for name, covariance in covariances.items():
            module: Any = run.model.get_submodule(name)
            a = module.lora_A[adapter].weight
            quiet = quiet_directions(covariance, self.energy, min(a.shape))
            drawn = torch.randn(len(a), quiet.shape[1], generator=generator, dtype=torch.float64).to(a.device)
            inside = drawn @ quiet.mT
            with torch.no_grad():
                a.copy_(inside * (a.double().norm() / inside.norm()))
            a.requires_grad_(not self.freeze)
