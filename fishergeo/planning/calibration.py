"""Seconds of a long pass, foretold from short ones over a real batch on the machine that will run it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fishergeo.accumulators import Structure
from fishergeo.capture import LossFunction, example_objectives, select_layers
from fishergeo.estimation import estimate_fisher
from fishergeo.sketching import segments


def lengths(examples: int, segmented: bool) -> tuple[int, int]:
    """Two numbers of batches whose difference in time is that of batches alone.

    Args:
        examples: examples in a batch.
        segmented: the work factors what it has gathered at the end of growing segments, as the sketch does; both
            lengths then end in the same one.

    Returns:
        (shorter, twice that); at least 2 and 4.
    """
    short = 2
    while segmented and segments(short * examples) != segments(2 * short * examples):
        short += 1
    return short, 2 * short


def foretold(run: Callable[[int], object], short: int, long: int, batches: float, repeats: int = 3) -> float:
    """Seconds of ``run(batches)``: of ``run(long)``, and the rest by the difference to ``run(short)``.

    Args:
        run: does the work on so many copies of a batch.
        short: batches.
        long: batches, more than ``short``.
        batches: batches of the work; a fraction where they differ in size. Up to ``long`` they are simply run.
        repeats: medians are taken of.
    """
    run(1)
    if batches <= long:
        whole = max(1, round(batches))
        return seconds(lambda: run(whole), repeats) * batches / whole
    taken = [(seconds(lambda: run(short)), seconds(lambda: run(long))) for _ in range(repeats)]
    first, second = (sorted(each)[repeats // 2] for each in zip(*taken, strict=True))
    each = max((second - first) / (long - short), second / (100 * long))  # a disturbed clock may run backwards
    return second + each * (batches - long)


def seconds(action: Callable[[], object], repeats: int = 1) -> float:
    """Median wall-clock seconds, once the device has finished."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return sorted(taken)[repeats // 2]


def plain_pass(model: nn.Module, names: list[str], batch: Any, kind: str, loss: LossFunction | None) -> None:
    """A plain forward and backward with these layers' weight gradients, which are thrown away; no ``.grad`` is set."""
    weights: list[Tensor] = []
    for layer in select_layers(model, names).values():
        if not any(layer.weight is known for known in weights):  # experts are slices of one
            weights.append(layer.weight)
    with _only(model, weights), torch.enable_grad():
        values = example_objectives(model, batch, kind, loss).values
        torch.autograd.grad(values.sum(), weights, allow_unused=True)


@contextmanager
def _only(model: nn.Module, weights: list[Tensor]) -> Iterator[None]:
    """Only these weights ask for a gradient; eval mode; all as before afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


@dataclass(frozen=True)
class Part:
    """Batches that cost alike.

    Attributes:
        options: of an estimate_fisher of such batches alone.
        number: number of them.
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
    number, weight, decay = 0, 0.0, options["data"].decay
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
    # The proof belongs to the first batch of all.
    return [
        Part(other | {"structure": named[0]}, number, sum(sizes[:number]) / largest),
        Part(other | {"structure": named[1], "verify": False}, len(rows) - number, sum(sizes[number:]) / largest, True),
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
