"""How an estimate falls into runs of batches that cost alike: EKFAC in one sweep is KFAC first and moments afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fishergeo.accumulators import Structure
from fishergeo.calibration import foretold
from fishergeo.estimation import estimate_fisher


@dataclass(frozen=True)
class Part:
    """Batches that cost alike.

    Attributes:
        options: of an estimate_fisher of such batches alone.
        number: of them.
        share: their elements over those of the largest batch.
        based: its ``basis=`` is the estimate of the part before it.
    """

    options: dict[str, Any]
    number: int
    share: float
    based: bool = False


def parts_of(options: Mapping[str, Any], rows: list[int], sizes: list[int]) -> list[Part]:
    """The parts of an estimate.

    Args:
        options: of estimate_fisher, ``structure`` among them.
        rows: examples of every batch.
        sizes: elements of every batch.

    Returns:
        One part, or the two of a single sweep of EKFAC.

    Raises:
        ValueError: if the examples that fix the eigenbases leave none for the moments.
    """
    structure, largest = options["structure"], max(sizes)
    whole = Part(dict(options), len(sizes), sum(sizes) / largest)
    given = isinstance(structure, Structure)
    leading = structure.basis_examples if given else options.get("basis_examples")
    if leading is None or (structure.name if given else structure) != "ekfac":
        return [whole]
    number, weight, decay = 0, 0.0, float(options.get("decay", 1.0))
    while weight < leading and number < len(rows):
        # A batch of n more: all before it fade by decayⁿ, its own weigh 1 + decay + ... + decayⁿ⁻¹.
        fading = decay ** rows[number]
        weight = weight * fading + (rows[number] if decay == 1 else (1 - fading) / (1 - decay))
        number += 1
    if number >= len(rows):
        raise ValueError(
            f"basis_examples={leading}: of {sum(rows)} examples none is left for the moments; take fewer, or None for "
            "two passes"
        )
    other = {key: value for key, value in options.items() if key != "basis_examples"}
    kinds = ["kfac", "ekfac"]
    named = [replace(structure, name=kind, basis_examples=None) for kind in kinds] if given else kinds
    return [
        Part(other | {"structure": named[0]}, number, sum(sizes[:number]) / largest),
        Part(other | {"structure": named[1]}, len(rows) - number, sum(sizes[number:]) / largest, True),
    ]


def leading(structure: str | Structure, examples: int) -> dict[str, Any]:
    """The options that make EKFAC fix its bases on so many examples."""
    if isinstance(structure, str):
        return {"basis_examples": examples}
    return {"structure": replace(structure, basis_examples=examples)}


def calibrated(model: nn.Module, sample: Any, parts: list[Part], runs: tuple[int, int]) -> Iterator[float]:
    """Seconds of every part, by short runs of it.

    Args:
        model: on a real device.
        sample: the largest batch.
        parts: of the estimate.
        runs: the two numbers of batches to time.
    """
    for part in parts:
        basis = {"basis": estimate_fisher(model, [sample], **parts[0].options)} if part.based else {}

        def run(number: int, options: dict[str, Any] = part.options | basis) -> None:
            estimate_fisher(model, [sample] * number, **options)

        yield foretold(run, *runs, part.share)
