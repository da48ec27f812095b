"""Seconds of a long pass, foretold from short ones over a real batch on the machine that will run it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fishergeo.capture import LossFunction, example_objectives, select_layers
from fishergeo.sketching import segments


def lengths(examples: int, segmented: bool) -> tuple[int, int]:
    """Two numbers of batches whose difference in time is that of batches alone.

    Args:
        examples: in a batch.
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
        batches: of the work; a fraction where they differ in size. Up to ``long`` they are simply run.
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
    weights = list({id(layer.weight): layer.weight for layer in select_layers(model, names).values()}.values())
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
