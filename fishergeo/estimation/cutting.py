"""One example of a batch by itself, or all but one: batches cut along their examples, whatever their structure."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_OF_TOKENS = ("inputs_embeds", "decoder_inputs_embeds")


class Uncuttable(Exception):
    """A batch holds something whose examples cannot be told apart."""


def cut(batch: Any, rows: list[int], examples: int) -> Any:
    """The batch of these examples alone.

    Tensors are cut along a leading dimension of n, lists of n things that are no tensors of such a dimension along
    themselves; scalars, texts and tensors of leading dimension 1 serve every example.

    Args:
        batch: mappings, lists, tuples and dataclasses are walked.
        rows: places of the examples.
        examples: n.

    Raises:
        Uncuttable: if a tensor has another leading dimension, or an object is of a kind that is not known here.
    """
    if isinstance(batch, Tensor):
        if batch.ndim and len(batch) == examples:
            return batch[rows]
        if batch.ndim == 0 or len(batch) == 1:
            return batch
        raise Uncuttable(f"a tensor of shape {tuple(batch.shape)}")
    if batch is None or isinstance(batch, str | bytes | int | float | complex):
        return batch
    if isinstance(batch, Mapping):
        return {key: cut(value, rows, examples) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(cut(value, rows, examples) for value in batch))
    if isinstance(batch, list | tuple):
        try:
            parts = [cut(value, rows, examples) for value in batch]
        except Uncuttable:
            if not isinstance(batch, list) or len(batch) != examples:
                raise
            return [batch[row] for row in rows]
        if isinstance(batch, list) and len(batch) == examples and not any(isinstance(v, Tensor) for v in batch):
            return [batch[row] for row in rows]
        return type(batch)(parts)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        result = copy.copy(batch)
        for entry in dataclasses.fields(batch):
            object.__setattr__(result, entry.name, cut(getattr(batch, entry.name), rows, examples))
        return result
    raise Uncuttable(f"a {type(batch).__name__}")


def padding(batch: Any, encoder_decoder: bool, examples: int) -> list[int]:
    """How many positions of every example are padding, those of its labels among them where they are a sequence apart."""
    total = torch.zeros(examples, dtype=torch.long)
    if isinstance(batch, Mapping):
        mask, labels = batch.get("attention_mask"), batch.get("labels")
        if isinstance(mask, Tensor) and mask.ndim == 2 and len(mask) == examples:
            total += (mask == 0).sum(1).cpu()
        if encoder_decoder and isinstance(labels, Tensor) and labels.ndim == 2 and len(labels) == examples:
            total += (labels == -100).sum(1).cpu()
    return total.tolist()


def unpadded(batch: Any, weights: Tensor | None, encoder_decoder: bool) -> tuple[Any, Tensor | None]:
    """A batch of one example without the padding at its edges, which is how it would be read alone.

    Args:
        batch: batch of one example; of anything but a mapping with an ``attention_mask`` (1, T) nothing is taken away.
        weights: weights of tokens, shaped as the labels, or None.
        encoder_decoder: the labels are a sequence of their own, whose padding is −100 at its end.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or not bool(mask.any()):
        return batch, weights
    labels = batch.get("labels")
    edges = slice(None)
    if not bool((mask != 0).all()):
        here = torch.nonzero(mask[0])[:, 0]
        edges = slice(int(here[0]), int(here[-1]) + 1)
    result = dict(batch)
    of_labels = edges
    if encoder_decoder and isinstance(labels, Tensor) and labels.ndim == 2:
        supervised = torch.nonzero(labels[0] != -100)
        of_labels = slice(0, int(supervised[-1]) + 1) if len(supervised) else slice(None)
    for key, value in batch.items():
        if not isinstance(value, Tensor) or value.ndim < 2:
            continue
        if "input_ids" in batch and value.ndim > 2 and value.is_floating_point() and key not in _OF_TOKENS:
            continue  # an image beside a text, perhaps of as many patches or channels as the text has tokens
        decoder = encoder_decoder and (key == "labels" or str(key).startswith("decoder_"))
        width = labels.shape[1] if decoder and isinstance(labels, Tensor) and labels.ndim == 2 else mask.shape[1]
        if value.shape[:2] == (1, width):
            result[key] = value[:, of_labels if decoder else edges]
    if weights is not None and isinstance(labels, Tensor) and weights.shape == labels.shape and weights.ndim == 2:
        weights = weights[:, of_labels]
    return result, weights
