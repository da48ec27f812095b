"""How a batch is laid out: which rows of a layer's tensors belong to which example, and where its padding is."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fishergeo.capture.model_adapters import is_encoder_decoder


def by_example(name: str, tensor: Tensor, examples: int, lengths: Collection[int]) -> Tensor:
    """(n, T, width) whatever the layer's own leading shape.

    Args:
        name: name of the layer, for the error.
        tensor: (..., width).
        examples: n.
        lengths: second dimensions that the batch is known to have, for layers that read (n·T, ...).

    Raises:
        ValueError: if the rows cannot be told apart by example.
    """
    width = tensor.shape[-1]
    if tensor.shape[0] == examples or examples == 1:
        return tensor.reshape(examples, -1, width)
    if any(len(tensor) == examples * length for length in lengths):  # flattened: positions, choices, images
        return tensor.reshape(examples, -1, width)
    raise ValueError(
        f"layer {name!r} saw a tensor of shape {tuple(tensor.shape)} in a batch of {examples} examples: its rows "
        "cannot be told apart by example (rows routed to an expert, or shared by all examples); leave it out of "
        "layers, or use batches of one example"
    )


def packed(
    rows: tuple[Tensor, Tensor], tokens: Tensor, total: int, examples: int, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows gathered from some tokens of a batch, put back under their examples, in the order of the tokens.

    Args:
        rows: a (R, q) and g (R, p).
        tokens: (R,) long, the token each row stands for, counted through the batch example by example.
        total: total of tokens, padding included; a multiple of ``examples``.
        examples: n.
        mask: (n, T) bool or None; rows of padding are left out.

    Returns:
        (n, R', q), (n, R', p) and (n, R') bool, R' the most rows that an example has, at least 1.
    """
    keep = None if mask is None or mask.numel() != total else mask.flatten()[tokens]
    if keep is not None:
        tokens, rows = tokens[keep], (rows[0][keep], rows[1][keep])
    tokens, order = torch.sort(tokens, stable=True)
    example = tokens // (total // examples)
    counts = torch.bincount(example, minlength=examples)
    place = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[example]
    width = max(1, int(counts.max()))
    filled = torch.zeros(examples, width, dtype=torch.bool, device=order.device)
    filled[example, place] = True
    a, g = (part.new_zeros(examples, width, part.shape[1]) for part in rows)
    a[example, place], g[example, place] = rows[0][order], rows[1][order]
    return a, g, filled


def lengths_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> set[tuple[int, int]]:
    """Leading two dimensions of every tensor that a model is called with."""
    tensors = [*args, *kwargs.values(), *(v for a in args if isinstance(a, Mapping) for v in a.values())]
    return {(t.shape[0], t.shape[1]) for t in tensors if isinstance(t, Tensor) and t.ndim >= 2}


def padding_mask(batch: Any) -> Tensor | None:
    """(n, T) bool from a batch's ``attention_mask`` (key or attribute); None if nothing is padded.

    One of several rows an example (n, C, T) is flattened to (n, C·T), as their rows are.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else getattr(batch, "attention_mask", None)
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 3):
        return None
    mask = mask.bool().flatten(1)
    return None if bool(mask.all()) else mask


def target_mask(model: nn.Module, batch: Any) -> Tensor | None:
    """(n, T) bool of an encoder-decoder's target positions, False behind each example's last supervised label.

    A decoder reads its labels shifted by one, and no mask tells it where they end: −100 in the labels does. None for
    other models, where there are no two-dimensional ``labels``, or where nothing is padded.
    """
    if not is_encoder_decoder(model):
        return None
    labels = batch.get("labels") if isinstance(batch, Mapping) else getattr(batch, "labels", None)
    if not isinstance(labels, Tensor) or labels.ndim != 2:
        return None
    mask = (labels != -100).flip(1).cummax(1).values.flip(1)
    return None if bool(mask.all()) else mask


def is_padded(model: nn.Module, batch: Any) -> bool:
    """Whether some position of a batch is padding, of its text or of a decoder's targets."""
    return padding_mask(batch) is not None or target_mask(model, batch) is not None


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on ``device``; mappings, lists, tuples and dataclasses are walked."""
    if isinstance(batch, Tensor):
        there = batch.to(device)
        return there.clone() if there.is_inference() else there  # which autograd may not keep
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        moved = copy.copy(batch)
        for entry in dataclasses.fields(batch):
            # Past __setattr__, which a frozen dataclass refuses, and past __init__, which may take other arguments.
            object.__setattr__(moved, entry.name, to_device(getattr(batch, entry.name), device))
        return moved
    return batch


def most_examples(batch: Any) -> int:
    """The largest leading dimension of a batch's tensors: as many examples as it may hold; 0 where none is found."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 0
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        batch = [getattr(batch, entry.name) for entry in dataclasses.fields(batch)]
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    return max(map(most_examples, batch), default=0) if isinstance(batch, list | tuple) else 0


def sized(batches: Any) -> int | None:
    """len(batches) where it has one."""
    try:
        return len(batches)
    except TypeError:
        return None


def indexed(batches: Any) -> Iterator[tuple[int, Any]]:
    """Enumerates batches, refusing a single batch passed in place of an iterable of them."""
    if isinstance(batches, Mapping | Tensor):
        raise TypeError("batches must be an iterable of batches; wrap a single batch in a list")
    yield from enumerate(batches)
