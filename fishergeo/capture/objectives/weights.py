"""How much examples and tokens count: weights that stand in a batch or are made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

WeightSource = str | Callable[[Any], Tensor] | None
"""A key of the batch, or ``batch -> tensor``."""


def take_weights(batch: Any, source: WeightSource, argument: str) -> tuple[Any, Tensor | None]:
    """The batch without its weights, and the weights.

    Args:
        batch: any batch; a key is only known to a mapping.
        source: see :data:`WeightSource`; None gives None.
        argument: its name, for the message.

    Raises:
        ValueError: if the key is not in the batch.
    """
    if source is None:
        return batch, None
    if callable(source):
        return batch, source(batch)
    if not isinstance(batch, Mapping) or source not in batch:
        known = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"{argument}={source!r} is no key of the batch ({known})")
    return {key: value for key, value in batch.items() if key != source}, batch[source]


def checked_example_weights(weights: Tensor, examples: int) -> Tensor:
    """(n,) float64.

    Raises:
        ValueError: if they are not n finite, non-negative numbers.
    """
    if weights.shape != (examples,):
        raise ValueError(
            f"example_weights have shape {tuple(weights.shape)}; a batch of {examples} needs ({examples},)"
        )
    weights = weights.double()
    if bool((weights < 0).any()) or not bool(torch.isfinite(weights).all()):
        raise ValueError("example_weights must be finite and non-negative")
    return weights


class FirstTokens:
    """Token weights under which an example's first supervised tokens count ``factor`` times as much as the rest.

    A refusal is decided in the first few tokens of a response (Qi et al. 2024, arXiv 2406.05946); a step of two levels is
    this project's own way to heed it. Pass an instance as ``token_weights``.

    Args:
        tokens: number of tokens, at least 1.
        factor: weight of those tokens, at least 0.

    Raises:
        ValueError: if one of them is out of range.

    Examples:
        >>> batch = {"labels": torch.tensor([[-100, 5, 6, 7]])}
        >>> fg.FirstTokens(2, 3.0)(batch).tolist()
        [[1.0, 3.0, 3.0, 1.0]]
    """

    def __init__(self, tokens: int, factor: float) -> None:
        if tokens < 1 or not factor >= 0:
            raise ValueError(f"FirstTokens(tokens={tokens}, factor={factor}): tokens >= 1 and factor >= 0 are needed")
        self.tokens = tokens
        self.factor = factor

    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        """(n, T), of the shape of the labels.

        Estimators that are passed an instance count after the labels were laid against the logits: a causal model predicts
        no first token of a sequence, so it does not count among the first even where it is supervised. A function that
        calls an instance counts it.
        """
        supervised = batch["labels"] != -100
        early = supervised & (supervised.long().cumsum(1) <= self.tokens)
        return torch.where(early, self.factor, 1.0)
