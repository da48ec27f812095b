"""Whether a model trains by the loss that is differentiated in its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fishergeo.capture.model_adapters import forward_arguments, is_sharded, problem_type, unwrapped
from fishergeo.capture.objectives.by_kind import objectives_of_outputs
from fishergeo.capture.objectives.labels import of_tokens, own_output


def check_own_loss(model: nn.Module, batch: Any, kind: str) -> None:
    """Refuse a model that trains by another loss than the one that is differentiated in its place.

    Labels of tokens are :func:`fishergeo.capture.objectives.labels.label_alignment`'s. Others are asked about here: of a few
    examples, of unlike labels, the model's own loss is to be the mean or the sum of the built-in one, over examples or over
    all that is supervised. A model that takes no ``labels``, gives no loss, or whose parameters are sharded says nothing.
    Of kinds that are the Fisher of the model's probabilities nothing is asked.

    Args:
        model: run twice at most, on a few examples, under no_grad.
        batch: any batch.
        kind: as :func:`fishergeo.capture.objectives.by_kind.example_objectives`.

    Raises:
        ValueError: if the two differ, as with weights of classes, smoothed labels, or the absolute error.
    """
    if kind not in ("empirical", "ggn") or not isinstance(batch, Mapping):
        return
    labels, inner = batch.get("labels"), unwrapped(model)
    if type(labels) is not Tensor or labels.ndim == 0 or len(labels) == 0 or of_tokens(labels):
        return
    tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.ndim]
    if any(len(value) not in (1, len(labels)) for value in tensors):  # whose rows are not the examples'
        return
    if is_sharded(model) or "labels" not in forward_arguments(inner):
        return
    alike = (labels == labels[:1]).flatten(1).all(1) if labels.ndim > 1 else labels == labels[0]
    other = int(torch.nonzero(~alike)[0]) if not bool(alike.all()) else min(1, len(labels) - 1)
    few = _rows(batch, [0, other], len(labels))
    found = own_output(model, few)
    if found is None:
        return
    what = problem_type(inner, found[0], labels)
    squared = what == "regression" or (what is None and labels.is_floating_point())
    if kind == "ggn" and not squared:
        return
    classes = found[0].shape[-1]
    if labels.ndim == 1 and not squared and not labels.is_floating_point() and classes > 1:
        # One example under several labels: those of the data may all be of one class, whose weight then cancels. The first
        # stands twice: smoothing cancels where each class stands once.
        drawn = torch.cat([labels.new_zeros(1), torch.linspace(0, classes - 1, min(classes, 8)).round().to(labels)])
        few = _rows(batch, [0] * len(drawn), len(labels)) | {"labels": drawn}
        found = own_output(model, few)
    if found is None:
        return
    logits, own = found
    try:
        built_in = objectives_of_outputs(inner, logits, few["labels"], few, "empirical")
    except ValueError:  # which the estimate will say better
        return
    values, counts = built_in.values.double(), built_in.counts.double()
    total = (values * counts).sum()
    same = torch.stack([values.mean(), values.sum(), total / counts.sum(), total])
    most = (1e-4 if logits.element_size() >= 4 else 2e-2) * abs(own) + 1e-6
    if bool(((same - own).abs() > most).all()):
        name = {"multi_label_classification": "binary cross-entropy"}.get(str(what), "cross-entropy")
        advice = "kind='ggn' is of that alone, so " if kind == "ggn" else ""
        raise ValueError(
            f"{type(inner).__name__} gives a loss of its own, {own:.6g} for {len(values)} examples whose mean "
            f"{'squared error' if squared else name} is {float(same[0]):.6g} (weights of classes, smoothed labels, another "
            f"error or factor?); {advice}pass loss=(model, batch) -> (n,), with kind='empirical'"
        )


def _rows(batch: Mapping[str, Any], places: list[int], examples: int) -> dict[str, Any]:
    """These examples of a batch; what is no tensor of examples is handed on."""
    return {
        key: value[places] if isinstance(value, Tensor) and value.ndim and len(value) == examples else value
        for key, value in batch.items()
    }
