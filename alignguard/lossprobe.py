"""Does a model's loss heed ``num_items_in_batch``? Asked of the model, not of its signature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from alignguard.objective import evaluation_mode


def honours_item_count(model: torch.nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether the loss halves when ``num_items_in_batch`` doubles; two forward passes, random state untouched.

    transformers' Trainer concludes from ``**kwargs`` in a signature that a model divides its loss by that number.
    Encoder-decoders that take a plain mean (T5, mT5, BART, ...) accept and ignore it, and gradients come out too
    large by the number of micro-batches and of processes.

    Args:
        model: not wrapped for data parallelism.
        inputs: a batch with labels, as the Trainer passes it.

    Returns:
        True too where nothing can be told: a loss that is zero or not finite.
    """
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    losses = []
    with torch.random.fork_rng(devices=devices), evaluation_mode(model):
        for count in (64, 128):
            output = model(**{**inputs, "num_items_in_batch": torch.tensor(count)})
            loss = output["loss"] if isinstance(output, dict) else output[0]
            losses.append(float(loss))
    if not all(map(torch.isfinite, map(torch.tensor, losses))) or losses[1] == 0:
        return True  # nothing can be told from this batch; the loss itself is checked elsewhere
    return abs(losses[0] / losses[1] - 2) < 1e-2
