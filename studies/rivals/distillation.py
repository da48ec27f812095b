"""Held by the base's own outputs: on the task's tokens, and by logits stored of alignment rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from alignguard.loading import adapter_off
from alignguard.objective import IGNORED, aligned_logits, divergence, evaluation_mode, supervised, widened
from studies.rivals.base import Encoded, Rival, Run, check_count, check_strength


def base_and_present(run: Run, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of the base and of the model at every supervised token, (tokens, V) each, targets and rows."""
    with evaluation_mode(run.model), adapter_off(run.model):
        base = supervised(run.model, batch)[0]
    present, targets, rows = supervised(run.model, batch)
    return base, present, targets, rows


def places_in_rows(rows: Tensor) -> Tensor:
    """The place of every supervised token in its own row, from 0 on, of the row numbers (tokens,) in ascending order."""
    first = torch.searchsorted(rows, rows)
    return torch.arange(len(rows), device=rows.device) - first


@dataclass
class ConstrainedSFT(Rival):
    """The task's loss with each token held near the base, the first tokens most (Qi et al., 2406.05946, equation 3).

    Token t of a response costs −(2/β_t)·log σ(β_t·log(π_θ/π_base)) in place of −log π_θ. Its gradient is that of the
    cross entropy times 2·σ(−β_t·log(π_θ/π_base)): 1 at the base, and less the likelier a token has become. The
    defaults are those of the paper: 0.5 for the first token, 2 for the second to the fifth, 0.1 for all others. The
    authors' code keeps the factor above 0.001; here it may fall to zero.

    Attributes:
        first: β of a response's first token, above 0.
        early: β of the tokens after it.
        later: β of the rest.
        length: how many tokens count as first and early, at least 1.

    Raises:
        ValueError: a β that is not above 0, or a length below 1.
    """

    name: ClassVar[str] = "constrained-sft"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"early": (0.5, 1.0, 2.0, 4.0), "later": (0.03, 0.1, 0.3)}
    first: float = 0.5
    early: float = 2.0
    later: float = 0.1
    length: int = 5

    def __post_init__(self) -> None:
        for name in ("first", "early", "later"):
            check_strength(name, getattr(self, name))
            if not getattr(self, name):
                raise ValueError(f"{name} must lie above 0; plain fine-tuning is the limit, and the rival of that name")
        check_count("length", self.length)

    def token_losses(self, run: Run, batch: Mapping[str, Tensor]) -> Tensor:
        """The constrained loss of every supervised token of ``batch``, (tokens,)."""
        base, present, targets, rows = base_and_present(run, batch)
        place = places_in_rows(rows)
        beta = torch.full_like(present[:, 0], self.later)
        beta[place < self.length] = self.early
        beta[place == 0] = self.first
        gain = (present - base).gather(1, targets[:, None])[:, 0]
        return -2 / beta * torch.nn.functional.logsigmoid(beta * gain)


@dataclass
class TaskKL(Rival):
    """Cross entropy and strength · KL(base ‖ model) on the task's own tokens: no alignment example is read.

    The anchor of ASFT (2509.23753), in the direction of its authors' code: the whole next-token distributions are
    compared at every supervised token. ``weighted`` takes its other part too, DFT's weight: each token's cross entropy
    times the probability that the model gives it, held constant; both together are ASFT.

    Attributes:
        strength: weight of the KL, not negative; the authors' code has 0.1.
        weighted: whether DFT's weights are taken too.

    Raises:
        ValueError: a strength that is negative or not finite, or ``weighted`` that is neither True nor False.
    """

    name: ClassVar[str] = "task-kl"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "strength": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
        "weighted": (False, True),
    }
    strength: float = 0.1
    weighted: bool = False

    def __post_init__(self) -> None:
        check_strength("strength", self.strength)
        if not isinstance(self.weighted, bool):
            raise ValueError(f"weighted must be True or False, not {self.weighted!r}")

    def token_losses(self, run: Run, batch: Mapping[str, Tensor]) -> Tensor:
        """Cross entropy and KL of every supervised token of ``batch``, (tokens,)."""
        base, present, targets, _ = base_and_present(run, batch)
        told = present.gather(1, targets[:, None])[:, 0]
        weight = told.detach().exp() if self.weighted else 1.0
        return -weight * told + self.strength * divergence(base, present)


def response_logits(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits at every supervised token, row by row, (tokens, V), in float32 or better."""
    logits, labels = aligned_logits(model, batch)
    return widened(logits[labels != IGNORED])


@dataclass
class StoredLogits(Rival):
    """Alignment rows are kept with the base's logits, and strength · MSE to these is added: Dark Experience Replay.

    Buzzega et al. (2004.07211, equation 6), as Alssum et al. (2512.10150) take it up for the alignment of language
    models. The mean runs over the supervised tokens and the vocabulary. The buffer is filled before training and not
    renewed, since all of what is to be kept is there at the start.

    Attributes:
        strength: weight of the mean squared error, not negative.
        batch: rows of the buffer read in each optimizer step.
        examples: alignment rows in the buffer; their logits stay in memory.

    Raises:
        ValueError: a strength that is negative or not finite, or a count below 1.
    """

    name: ClassVar[str] = "stored-logits"
    reads_alignment: ClassVar[bool] = True
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"strength": (0.1, 0.3, 1.0, 3.0, 10.0, 30.0), "batch": (2, 8)}
    strength: float = 1.0
    batch: int = 4
    examples: int = 64
    buffer: list[tuple[Encoded, Tensor]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        check_strength("strength", self.strength)
        check_count("batch", self.batch)
        check_count("examples", self.examples)

    def start(self, run: Run) -> None:
        """Store the logits of the aligned model of ``run``, row by row."""
        with evaluation_mode(run.model):
            for row in run.draw(self.examples, 0):
                self.buffer.append((row, response_logits(run.model, run.batch([row])).cpu()))

    def gradients(self, run: Run, step: int) -> None:
        """Add the error's gradient to the task's; the rows of ``step`` are the buffer's next, in rotation."""
        count = min(self.batch, len(self.buffer))
        turn = [self.buffer[(step * count + i) % len(self.buffer)] for i in range(count)]
        run.examples_read += count
        present = response_logits(run.model, run.batch([row for row, _ in turn]))
        stored = torch.cat([logits for _, logits in turn]).to(present)
        run.add_gradient(self.strength * (present - stored).square().mean())
