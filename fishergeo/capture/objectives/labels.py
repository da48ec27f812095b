"""What a model says at the labels of a batch: its forward pass, how labels stand against logits, a row per token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from fishergeo.capture.model_adapters import (
    decoder_inputs,
    forward_arguments,
    is_encoder_decoder,
    is_sharded,
    shifts_labels,
    tells_its_labels,
    unwrapped,
)

Alignment = Literal["same", "next", "prefixed", "untold"]
"""Logits at position t are for the label at t (``"same"``), at t + 1 (``"next"``), or, where a model puts positions of its
own before the batch's, at t + 1 counted from the last of those (``"prefixed"``). ``"untold"`` if nothing says which."""


def logits_and_labels(model: nn.Module, batch: Any, alignment: Alignment | None = None) -> tuple[Tensor, Tensor]:
    """One forward pass: logits (n, ..., classes) and the labels (n, ...) that stand against them.

    Args:
        model: a Hugging Face style model.
        batch: a mapping with ``labels``.
        alignment: alignment of logits (n, T', classes) and labels (n, T); None takes what the model's class is known
            for.

    Raises:
        TypeError: if the batch is not a mapping, or its labels are no tensor.
        ValueError: if there are no labels or no logits, their shapes do not fit, or their alignment is ``"untold"``.
    """
    labels = _labels(batch)
    output = model(**_inputs(model, batch))
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise ValueError(f"the output of {type(model).__name__} has no logits; pass loss=(model, batch) -> (n,)")
    if of_tokens(labels) and logits.ndim == 3:
        if alignment == "untold":
            raise ValueError(
                f"labels {tuple(labels.shape)} of {type(unwrapped(model)).__name__} are none of the batch's own tokens, and it "
                "gives no loss that would tell whether they stand against the logits of their own positions or of those "
                "before; let forward take labels and return a loss beside the logits, or pass loss=(model, batch) -> (n,)"
            )
        logits, labels = _against(logits, labels, alignment or _by_class(unwrapped(model)))
    return logits, labels


def label_alignment(model: nn.Module, batch: Any) -> Alignment | None:
    """How labels (n, T) stand against logits (n, T', classes), by the model's own loss on one example.

    The example's labels are replaced by others drawn from the batch's, at every position that is not padding, and the
    loss that the model gives is compared with the cross-entropy in each alignment. A model that takes no ``labels``,
    gives no loss, whose parameters are sharded, or on which alignments do not differ, is taken for what its class says;
    one whose class says nothing for a causal model, if its labels are tokens that stand in the batch.

    Args:
        model: run once under no_grad.
        batch: batch, as :func:`logits_and_labels`.

    Returns:
        The alignment, None if the batch cannot tell.

    Raises:
        ValueError: if the model's own loss is none of these.
    """
    labels, inner = _labels(batch), unwrapped(model)
    if type(labels) is not Tensor:  # a plan's, which hold nothing
        return None
    values = labels[labels >= 0] if of_tokens(labels) else labels[:0]
    if len(values) == 0 or is_encoder_decoder(inner):
        return None
    if is_sharded(model) or "labels" not in forward_arguments(inner):
        return _by_the_batch(inner, labels, batch)
    pick = torch.randint(len(values), labels[:1].shape, generator=torch.Generator().manual_seed(0))
    drawn = values[pick.to(values.device)]
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == labels.shape:
        drawn = torch.where(mask[:1] != 0, drawn, -100)
    one = {k: v[:1] if isinstance(v, Tensor) and v.ndim and len(v) == len(labels) else v for k, v in batch.items()}
    found = own_output(model, one | {"labels": drawn})
    if found is None:
        return _by_the_batch(inner, labels, batch)
    logits, own = found
    return None if logits.ndim != 3 else _fitting(logits, drawn, own, inner)


def own_output(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, float] | None:
    """Logits and the loss that a model gives of itself when it is shown labels; None unless it gives both.

    Args:
        model: run once under no_grad; random states and its config are left as they were.
        batch: a mapping with ``labels``.
    """
    inputs = _inputs(model, batch) | {"labels": batch["labels"]}
    if "output_router_logits" in forward_arguments(unwrapped(model)):
        inputs["output_router_logits"] = False  # whose loss is added to the model's own
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    config: Any = getattr(unwrapped(model), "config", None)
    said = getattr(config, "problem_type", None)
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        try:
            output = model(**inputs)
            parts = output if isinstance(output, Mapping) else vars(output) if hasattr(output, "__dict__") else {}
            logits, own = parts.get("logits"), parts.get("loss")
            if not isinstance(logits, Tensor) or not isinstance(own, Tensor) or own.numel() != 1:
                return None
            return logits, float(own)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a model says to a few examples, or to labels of its own vocabulary alone
            return None
        finally:
            if hasattr(config, "problem_type"):
                config.problem_type = said  # which classifiers set by the first labels that they see


def _fitting(logits: Tensor, labels: Tensor, own: float, model: nn.Module) -> Alignment:
    """The alignment whose mean cross-entropy is the model's own loss; the known one where several are as near."""
    errors: dict[Alignment, float] = {}
    for alignment in ("same", "next", "prefixed"):
        try:
            rows, targets = _against(logits, labels, cast(Alignment, alignment))
        except ValueError:
            continue
        if rows.shape[:2] == targets.shape:
            loss = float(nn.functional.cross_entropy(rows.flatten(0, 1).double(), targets.flatten().long()))
            gap = 0.0 if loss != loss and own != own else abs(loss - own) / max(abs(own), 1e-30)
            errors[cast(Alignment, alignment)] = gap
    least = min(errors.values(), default=float("inf"))
    if not least <= (2e-2 if logits.element_size() < 4 else 1e-4):
        raise ValueError(
            f"labels {tuple(labels.shape)} of {type(model).__name__}: its own loss is the cross-entropy of its logits "
            f"{tuple(logits.shape)} neither at the labels of the same positions nor at those of the next ones; pass "
            "loss=(model, batch) -> (n,)"
        )
    near = [alignment for alignment, error in errors.items() if error <= 2 * least + 1e-9]
    known = _by_class(model)
    return known if known in near else near[-1]


def _by_the_batch(model: nn.Module, labels: Tensor, batch: Mapping[str, Any]) -> Alignment | None:
    """Of a model that gives no loss: None if its class is known, else ``"next"`` if its labels are the batch's own tokens."""
    if tells_its_labels(model):
        return None
    others = (value for key, value in batch.items() if key != "labels" and isinstance(value, Tensor))
    same = (bool(((labels == one) | (labels < 0)).all()) for one in others if one.shape == labels.shape)
    return "next" if any(same) else "untold"


def of_tokens(labels: Tensor) -> bool:
    """Whether labels are classes of tokens, (n, T)."""
    return labels.ndim == 2 and not labels.is_floating_point()


def _by_class(model: nn.Module) -> Alignment:
    return "next" if shifts_labels(model) else "same"


def _against(logits: Tensor, labels: Tensor, alignment: Alignment) -> tuple[Tensor, Tensor]:
    """The positions of logits and labels that belong together."""
    ahead, length = {"same": 0, "next": 0, "prefixed": 1}[alignment], labels.shape[1]
    if alignment == "same":
        return logits, labels
    if logits.shape[1] < length + ahead:
        raise ValueError(f"logits of shape {tuple(logits.shape)} do not cover labels {tuple(labels.shape)}")
    return logits[:, -length - ahead : -1], labels[:, 1 - ahead :]


def _labels(batch: Any) -> Tensor:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batches must yield dicts such as input_ids, attention_mask, labels; got {type(batch).__name__}. "
            "Pass loss=(model, batch) -> (n,) for any other structure"
        )
    labels = batch.get("labels")
    if labels is None:
        raise ValueError(f"a batch has no 'labels' (it has {', '.join(map(str, batch))}); add them or pass loss=")
    if not isinstance(labels, Tensor):
        raise TypeError(f"the labels of a batch are a {type(labels).__name__}; make them a tensor")
    if labels.ndim == 0:
        raise ValueError("the labels of a batch are a scalar; they must be (n,) or (n, T), of n examples")
    return labels


def _inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the model is called with for its logits."""
    inner = unwrapped(model)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    accepted = forward_arguments(inner)
    if "use_cache" in accepted:
        inputs.setdefault("use_cache", False)
    if is_encoder_decoder(inner):
        if "decoder_input_ids" not in inputs:
            read = decoder_inputs(inner, batch["labels"])
            inputs |= {"labels": batch["labels"]} if read is None else {"decoder_input_ids": read}
        return inputs
    mask = inputs.get("attention_mask")
    left_padded = isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask[:, 0] == 0).any())
    if left_padded and "position_ids" in accepted and "position_ids" not in inputs and shifts_labels(inner):
        # Models with learned positions count from the left edge: give every example the positions it has alone.
        inputs["position_ids"] = (cast(Tensor, mask).long().cumsum(1) - 1).clamp_min(0)
    return inputs


@dataclass(frozen=True)
class Rows:
    """The supervised tokens of a batch, one row each, in the order of the examples.

    Attributes:
        logits: (m, classes), float32 or float64.
        targets: (m,) long, or (m, classes) probabilities.
        example: (m,) long, ascending.
        share: (m,) each token's part of its example's mean; they sum to one over an example.
        counts: (n,) long, rows of each example.
        tokens: (n,) long, what they count as; ``counts`` but where the rows of an example are one datum.
        total: (n,) the weight of all tokens of an example, which turns its mean into its sum; ``tokens`` if None.
    """

    logits: Tensor
    targets: Tensor
    example: Tensor
    share: Tensor
    counts: Tensor
    tokens: Tensor
    total: Tensor | None = None

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, weights: Tensor | None) -> Rows:
        """Of integer labels, −100 among them ignored, and so are tokens of weight zero.

        Raises:
            ValueError: if shapes do not fit, a label is no class, or weights are negative or not finite.
        """
        if logits.shape[:-1] != labels.shape:
            raise ValueError(f"logits {tuple(logits.shape)} do not fit labels {tuple(labels.shape)}; pass loss=")
        count = len(labels)
        valid = labels != -100
        if weights is not None:
            chosen = weights[valid]
            if not bool(((chosen >= 0) & torch.isfinite(chosen)).all()):
                raise ValueError("token_weights must be finite and non-negative")
            valid = valid & (weights > 0)
        example = torch.arange(count, device=labels.device).view(-1, *[1] * (labels.ndim - 1)).expand_as(labels)[valid]
        # Only supervised rows are widened to float32: prompts would otherwise pay for a vocabulary-wide copy. A view is
        # cheaper than a selection, whose gradient is scattered back.
        rows = logits.flatten(0, -2) if bool(valid.all()) else logits[valid]
        rows = rows if rows.dtype == torch.float64 else rows.float()
        targets = labels[valid].long()
        if rows.shape[1] == 1:
            raise ValueError(
                "integer labels stand against logits of one class, which say nothing; a model of one binary outcome has "
                "config.problem_type='multi_label_classification', one that regresses 'regression'"
            )
        if not bool(((targets >= 0) & (targets < rows.shape[1])).all()):
            raise ValueError(
                f"labels must be −100, which is ignored, or one of the {rows.shape[1]} classes of the logits; they range "
                f"from {int(targets.min())} to {int(targets.max())}"
            )
        counts = torch.bincount(example, minlength=count)
        if weights is None:
            share = (1.0 / counts.clamp_min(1).to(rows.dtype))[example]
            return cls(rows, targets, example, share, counts, counts)
        # In float64, which holds the sum of any weights of a narrower dtype, however small or large.
        chosen = weights[valid].double()
        total = torch.zeros(count, dtype=torch.float64, device=rows.device).index_add(0, example, chosen)
        share = (chosen / total[example]).to(rows.dtype)
        return cls(rows, targets, example, share, counts, counts, total)

    @classmethod
    def of_probabilities(cls, logits: Tensor, labels: Tensor) -> Rows:
        """Of floating labels (n, classes), each row a distribution over the classes.

        Raises:
            ValueError: if shapes do not fit, or a row is no distribution.
        """
        wide = _wide(logits)
        if wide.ndim != 2 or wide.shape != labels.shape:
            raise ValueError(f"logits {tuple(logits.shape)} do not fit soft labels {tuple(labels.shape)}; pass loss=")
        targets = labels.to(wide.dtype)
        off = (targets.sum(1) - 1).abs()
        if not bool(((targets >= 0).all(1) & (off <= 1e-2)).all()):
            raise ValueError("soft labels must be distributions: no entry negative, every row of sum one")
        places = torch.arange(len(labels), device=labels.device)
        ones = torch.ones(len(labels), dtype=torch.long, device=labels.device)
        return cls(wide, targets, places, ones.to(wide.dtype), ones, ones)

    @classmethod
    def of_bits(cls, logits: Tensor, labels: Tensor) -> Rows:
        """Of labels that are K independent outcomes, 0 or 1 or a probability: logits 0 and z for each output z.

        Raises:
            ValueError: if shapes do not fit, or a label is not in [0, 1].
        """
        count = len(labels)
        outputs, bits = _wide(logits).reshape(count, -1), labels.reshape(count, -1)
        if outputs.shape != bits.shape:
            raise ValueError(f"logits {tuple(logits.shape)} do not fit labels {tuple(labels.shape)}; pass loss=")
        if not bool(((bits >= 0) & (bits <= 1)).all()):
            raise ValueError("labels of a multi-label model must lie in [0, 1], one for each output")
        width = outputs.shape[1]
        z, y = outputs.flatten(), bits.flatten().to(outputs.dtype)
        targets = y.long() if bool(((y == 0) | (y == 1)).all()) else torch.stack([1 - y, y], 1)
        places = torch.arange(count, device=labels.device)
        ones = torch.ones_like(places)
        share = torch.full_like(z, 1.0 / width)
        return cls(
            torch.stack([torch.zeros_like(z), z], 1),
            targets,
            places.repeat_interleave(width),
            share,
            ones * width,
            ones,
        )

    def summed(self, per_token: Tensor, example: Tensor) -> Tensor:
        """(n,) sums of token values by example."""
        return torch.zeros(len(self.counts), dtype=per_token.dtype, device=per_token.device).index_add(
            0, example, per_token
        )


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def on_labels(weights: Tensor, batch: Any, labels: Tensor) -> Tensor:
    """Token weights on the positions of labels that stand against logits, which a causal model's first do not.

    Args:
        weights: of the shape of the batch's labels.
        batch: a mapping with ``labels``.
        labels: those that :func:`logits_and_labels` gave.

    Raises:
        ValueError: for weights of another shape.
    """
    whole = _labels(batch)
    if weights.shape != whole.shape:
        raise ValueError(
            f"token_weights returned {tuple(weights.shape)}; it must have the shape of the batch's labels, {tuple(whole.shape)}"
        )
    return weights[:, whole.shape[1] - labels.shape[1] :] if labels.shape != whole.shape else weights
