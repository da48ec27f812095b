"""What a model says at supervised tokens, for every kind of model: one reading that likelihoods, KL and the Fisher share."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fishergeo.capture import decoder_inputs

IGNORED = -100  # the label that torch's cross entropy and every HF model leave out


def base_model(model: Any) -> Any:
    """The Hugging Face model that peft has wrapped, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def model_kind(model: Any) -> str:
    """``"seq2seq"`` for encoder-decoders, ``"classification"`` for sequence classifiers, else ``"causal"``."""
    inner = base_model(model)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        return "seq2seq"
    return "classification" if type(inner).__name__.endswith("ForSequenceClassification") else "causal"


def text_config(model: Any) -> Any:
    """The configuration of the language model inside a causal model that takes images, sound or video too, else None."""
    inner = base_model(model)
    config: Any = getattr(inner, "config", None)
    if model_kind(inner) != "causal" or not hasattr(config, "get_text_config"):
        return None
    found = config.get_text_config()
    return None if found is config else found


def positions(config: Any) -> int | None:
    """How many tokens a model's configuration has positions for; None where it sets no limit."""
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def beyond_text(model: Any) -> set[int]:
    """What text alone does not pass through: towers of other modalities, what projects from them, and layers that read them.

    Args:
        model: a Hugging Face model, wrapped by peft or not.

    Returns:
        ``id`` of every such module; empty for a model of text.
    """
    text = text_config(model)
    if text is None:
        return set()
    inner = base_model(model)
    decoder = inner.get_decoder()
    read = [decoder, inner.get_output_embeddings()]
    reached = {id(module) for part in read if part is not None for module in part.modules()}
    # Llama 3.2 Vision leaves its layers of cross-attention out where there is no image.
    idle = [decoder.layers[place] for place in getattr(text, "cross_attention_layers", None) or ()]
    reached -= {id(module) for layer in idle for module in layer.modules()}
    return {id(module) for module in inner.modules()} - reached


def placeholders(model: Any) -> set[int]:
    """Ids of the tokens that stand for an image, sound or video in a model's text; empty for a model of text."""
    if text_config(model) is None:
        return set()
    inner = base_model(model)
    names = [f"{kind}_token_{form}" for kind in ("image", "video", "audio") for form in ("id", "index")]
    return {found for name in names if isinstance(found := getattr(inner.config, name, None), int)}


def aligned_logits(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits and the labels that they should predict.

    Args:
        model: a Hugging Face model, wrapped by peft or not.
        batch: ``input_ids``, ``attention_mask`` and ``labels``; (n, T) labels, or (n,) classes.

    Returns:
        (n, T, V) and (n, T): shifted by one for a decoder alone, of the positions that some row supervises where the
        model can leave the others out; fed to the decoder for an encoder-decoder; and T = 1 for a classifier.
    """
    labels = batch["labels"]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    kind = model_kind(model)
    inner = base_model(model)
    if kind == "seq2seq":
        read = decoder_inputs(inner, labels)
        if read is None:
            raise TypeError(
                f"a {type(inner).__name__} does not say what its decoder reads for given labels; take a model that generates"
            )
        return model(**inputs, decoder_input_ids=read).logits, labels
    if kind == "classification":
        return model(**inputs).logits[:, None], labels[:, None]
    targets = labels[:, 1:]
    # Prompts are most of an alignment row, and a vocabulary is wide: the output embedding is spared their positions.
    columns = (targets != IGNORED).any(0).nonzero()[:, 0]
    if len(columns) and "logits_to_keep" in inspect.signature(inner.forward).parameters:
        logits = model(**inputs, logits_to_keep=columns).logits
        if logits.shape[1] == len(columns):
            return logits, targets[:, columns]
    else:
        logits = model(**inputs).logits
    return logits[:, :-1], targets


def widened(logits: Tensor) -> Tensor:
    """In float32 or better."""
    return logits if logits.dtype == torch.float64 else logits.float()


def response_loss(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Negative log-likelihood of each example's whole response in nats, (n,): the loss whose Fisher is a drift."""
    logits, labels = aligned_logits(model, batch)
    nll = torch.nn.functional.cross_entropy(
        widened(logits).flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return nll.view(labels.shape).sum(1)


def supervised(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What the model predicts at every supervised token, row by row.

    Args:
        model: a Hugging Face model, wrapped by peft or not.
        batch: batch of :func:`alignguard.data.pad_rows`: tensors (n, T), labels of a classifier (n,), int64.

    Returns:
        log-probabilities (tokens, V) in float32 or better, targets (tokens,) and the row of each (tokens,).
    """
    logits, labels = aligned_logits(model, batch)
    chosen = labels != IGNORED
    rows = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)[chosen]
    return widened(logits[chosen]).log_softmax(-1), labels[chosen], rows


def divergence(base: Tensor, present: Tensor) -> Tensor:
    """KL(base ‖ present) of each token in nats, (tokens,), from log-probabilities (tokens, V).

    Raises:
        ValueError: two vocabularies.
    """
    if base.shape != present.shape:
        raise ValueError(f"model and base differ in vocabulary: {present.shape[-1]} and {base.shape[-1]} tokens")
    # What the base never says adds nothing, 0 · log 0, whatever the present gives it.
    return (base.exp() * (base - present).masked_fill(base == -torch.inf, 0.0)).sum(-1)


@contextmanager
def evaluation_mode(model: torch.nn.Module, gradients: bool = False) -> Iterator[None]:
    """Put every module into evaluation mode, and each back as it was.

    Args:
        model: whose dropout and noise are switched off.
        gradients: leave recording as it is; else nothing is recorded.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.set_grad_enabled(gradients and torch.is_grad_enabled()):
            yield
    finally:
        for module in training:
            module.training = True
