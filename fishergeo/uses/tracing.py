"""Which training examples a prediction owes to: influence scores by the Fisher's inverse, in blocks that can be resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from fishergeo import _storage
from fishergeo._checks import check_integer
from fishergeo._linalg import directions
from fishergeo.capture import batch_mark, content_mark, indexed, is_padded, most_examples, padding_mask, to_device
from fishergeo.estimation import (
    DataKeywords,
    DataOptions,
    chosen_options,
    estimate_fisher,
    faults_shown,
    option_facts,
)
from fishergeo.operators import ExactOperator, JointFisher, SymmetricOperator
from fishergeo.uses.weights import Curvature, damped_inverse, layers_of, mark_of


@dataclass(frozen=True, eq=False)
class Influence:
    """Scores of Q queries by examples, as :func:`fishergeo.influence` found them.

    Attributes:
        values: (Q, K) scores, of the dtype of the Fisher; in the order of the examples, or the K largest, descending.
        examples: (Q, K) long, the example that each score is of, counted through the batches.
        tokens: (Q, K) long, the place among the example's positions that are not padding; None for whole examples.

    Examples:
        >>> scores = fg.Influence(torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([[0, 1, 2]]))
        >>> scores.top(2).examples.tolist()
        [[1, 2]]
    """

    values: Tensor
    examples: Tensor
    tokens: Tensor | None = None

    def top(self, count: int) -> Influence:
        """The ``count`` largest scores of each query, descending, or all if there are fewer.

        Raises:
            ValueError: if count is less than 1.
            TypeError: if it is no integer.
        """
        check_integer("count", count, low=1)
        values, places = self.values.topk(min(count, self.values.shape[1]), 1)
        tokens = None if self.tokens is None else self.tokens.gather(1, places)
        return Influence(values, self.examples.gather(1, places), tokens)

    def by_example(self, length: int) -> Tensor:
        """Sums over the tokens of each example, (Q, length), of the dtype of the scores.

        Args:
            length: number of examples.
        """
        total = self.values.new_zeros(len(self.values), length)
        return total.scatter_add_(1, self.examples, self.values)


def influence(
    model: nn.Module,
    fisher: Curvature,
    queries: Iterable[Any],
    examples: Iterable[Any],
    *,
    damping: float | None = None,
    data: DataOptions | None = None,
    query_data: DataOptions | None = None,
    tokens: bool = False,
    top: int | None = None,
    path: str | os.PathLike[str] | None = None,
    **keywords: Unpack[DataKeywords],
) -> Influence:
    r"""g_qᵀ (F + damping·I)⁻¹ g_i for every query q and example i, summed over the layers of the Fisher.

    g is the gradient of an example's objective. A positive score says that more weight on example i lowers the objective of
    q (Koh and Liang 2017); with EKFAC these are the scores of Grosse et al. (2023, arXiv 2308.03296). Examples' gradients
    are kept in factors and meet a block of queries in the cheaper of two ways (:meth:`ExactOperator.inner`). The examples
    are read once for every batch of queries, so a batch should hold as many queries as fit: one query takes as much memory
    as the weights of the layers.

    Args:
        model: any module, as the Fisher saw it.
        fisher: Fisher of any structure, ``"ekfac"`` above all, or a mapping from layers to operators.
        queries: batches of queries.
        examples: batches of training examples; a list or a loader that gives the same batches each time.
        damping: number added to every eigenvalue, not negative; None takes a tenth of each layer's mean eigenvalue
            (Grosse et al. 2023).
        data: options of the examples' objectives, ``"empirical"`` or ``"margin"``; by default those that ``keywords`` make.
        query_data: options of the queries' objectives; by default those of the examples.
        tokens: score every position of an example by itself; with ``reduction="sum"``, under which they add up to the score
            of the example.
        top: number of the largest scores of each query to keep; None keeps all.
        path: folder of one file for every block of scores. Blocks that are there are not computed again, if they were
            made with the same model, Fisher (to the bit), batches and options (functions by their code).
        **keywords: fields of :class:`fishergeo.DataOptions` (``loss``, ``reduction``, ...), in place of ``data``.

    Returns:
        Influence: scores (Q, N), (Q, positions) with ``tokens``, or (Q, top).

    Raises:
        ValueError: a Fisher of another model, a damping that leaves a layer singular, an option that changes what a
            gradient is of (unit, decay, example weights, draws of labels), examples without a supervised token, or a block
            of other settings or batches under ``path``; by name.
        TypeError: examples that can be read only once, or an unknown keyword.

    Examples:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> loss = lambda model, batch: model(batch)[:, 0]  # whose gradient is the input
        >>> fisher = {"": fg.DiagonalOperator(torch.ones(1, 2))}
        >>> scores = fg.influence(model, fisher, [torch.eye(2)], [2 * torch.eye(2)], damping=0.0, loss=loss)
        >>> scores.values.tolist()
        [[2.0, 0.0], [0.0, 2.0]]
    """
    options = chosen_options("influence", data, None, keywords)
    asked = options if query_data is None else query_data
    for name, one in (("data", options), ("query_data", asked)):
        _check_options(name, one, tokens and one is options)
    if isinstance(examples, Iterator):
        raise TypeError("examples are read once for every batch of queries; pass a list or a loader")
    if top is not None:
        check_integer("top", top, low=1)
    layers = layers_of(model, fisher)
    levels = {name: _damping(fisher[name], damping) for name in layers}
    inverses = {name: damped_inverse(name, fisher[name], level) for name, level in levels.items()}
    facts: dict[str, Any] = {}
    if path is not None:
        facts = {
            "model": mark_of(model, fisher),
            "fisher": {name: [type(fisher[name]).__name__, _operator_mark(fisher[name])] for name in layers},
            "damping": levels,
            "data": option_facts(options),
            "queries": option_facts(asked),
            "tokens": tokens,
            "top": top,
        }
    gradients = _Gradients(model, layers, next(iter(inverses.values())).dtype)
    found = []
    for number, batch in indexed(queries):
        best: Influence | None = None
        turned: dict[str, Tensor] | None = None
        start = 0
        for place, others in indexed(examples):
            file = None if path is None else Path(path) / f"queries-{number:05d}-examples-{place:05d}.safetensors"
            known = facts if file is None else facts | {"batches": [batch_mark(batch), batch_mark(others)]}
            block = None if file is None or not file.is_file() else _read(file, known)
            if block is None:
                if turned is None:
                    of_queries = gradients.of(batch, asked, "queries").operators
                    turned = {n: inverses[n].apply(one.weight_gradients()) for n, one in of_queries.items()}
                of_examples = gradients.of(others, options, "examples", tokens)
                block = _scores(of_examples, turned, start, others, gradients.count, tokens), gradients.count
                if top is not None:
                    block = block[0].top(top), block[1]
                if file is not None:
                    _write(file, known, *block)
            start += block[1]
            best = block[0] if best is None else _joined(best, block[0])
            best = best if top is None else best.top(top)
        if best is None:
            raise ValueError("examples hold no batch")
        found.append(best)
    if not found:
        raise ValueError("queries hold no batch")
    return _joined(*found, dimension=0)


class _Gradients:
    """Gradients of batches in factors; those of the first queries and examples that show a fault are verified.

    Attributes:
        count: examples of the batch that was read last.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, Any], dtype: torch.dtype) -> None:
        self.model, self.names, self.dtype = model, list(layers), dtype
        self.device = next(iter(layers.values())).weight.device
        self.count = 0
        self._proven: set[tuple[str, str]] = set()

    def of(self, batch: Any, options: DataOptions, role: str, tokens: bool = False) -> JointFisher:
        """One batch's gradients, by example or by position, of ``"queries"`` or ``"examples"``."""
        shown = {(role, fault) for fault in faults_shown(is_padded(self.model, batch), most_examples(batch))}
        chosen = replace(options, unit="token") if tokens else options
        fisher = estimate_fisher(
            self.model,
            [to_device(batch, self.device)],
            "exact",
            data=chosen,
            layers=self.names,
            dtype=self.dtype,
            verify=not shown <= self._proven,
        )
        self._proven |= shown
        self.count = round(fisher.header.examples)
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if options.loss is None and isinstance(labels, Tensor) and len(labels) != self.count:
            raise ValueError(
                f"{len(labels) - self.count} of {len(labels)} examples of a batch have no supervised token, so no gradient; "
                "leave them out"
            )
        operators = {name: one for name, one in fisher.items() if isinstance(one, ExactOperator)}
        return JointFisher(operators)


def _scores(
    gradients: JointFisher, turned: Mapping[str, Tensor], start: int, batch: Any, count: int, tokens: bool
) -> Influence:
    """Scores of one block of ``count`` examples, counted from ``start``."""
    values = gradients.inner(turned)
    places = torch.arange(values.shape[1], device=values.device)
    if not tokens:
        return Influence(values, (start + places).expand(values.shape))
    mask = padding_mask(batch)
    if mask is None:
        lengths = torch.full((count,), values.shape[1] // count)
    else:
        lengths = mask.sum(1).cpu()
    if int(lengths.sum()) != values.shape[1]:
        raise ValueError(
            f"layers of the Fisher saw {values.shape[1]} positions in a batch of {int(lengths.sum())}; tokens=True needs "
            "layers that read every position once"
        )
    lengths = lengths.to(values.device)
    owner = torch.arange(len(lengths), device=values.device).repeat_interleave(lengths)
    within = places - (lengths.cumsum(0) - lengths)[owner]
    return Influence(values, (start + owner).expand(values.shape), within.expand(values.shape))


def _joined(*parts: Influence, dimension: int = 1) -> Influence:
    tokens = [part.tokens for part in parts if part.tokens is not None]
    return Influence(
        torch.cat([part.values for part in parts], dimension),
        torch.cat([part.examples for part in parts], dimension),
        torch.cat(tokens, dimension) if tokens else None,
    )


def _damping(operator: SymmetricOperator, damping: float | None) -> float:
    return 0.1 * float(operator.trace()) / operator.shape[0] if damping is None else damping


def _check_options(name: str, options: DataOptions, tokens: bool) -> None:
    """Refuses what would make of an example's gradient something else."""
    plain = options.kind in ("empirical", "margin") and options.unit == "sequence"
    if not plain or options.decay != 1 or options.example_weights is not None:
        raise ValueError(
            f"{name}: influence takes each example's own gradient, so kind 'empirical' or 'margin', unit 'sequence', no "
            "decay and no example_weights"
        )
    if tokens and options.loss is None and options.reduction != "sum":
        raise ValueError("tokens=True needs reduction='sum', under which tokens add up to their example")


def _operator_mark(operator: SymmetricOperator) -> str:
    """A hash of an operator's tensors, or of one product of an operator that is not made of any."""
    try:
        return content_mark(operator.tensors())
    except TypeError:
        return content_mark(operator @ directions(operator.shape[0], 1, 0, "mark").to(operator.device))


def _write(file: Path, facts: Mapping[str, Any], scores: Influence, count: int) -> None:
    tensors = {"values": scores.values, "examples": scores.examples}
    tensors |= {} if scores.tokens is None else {"tokens": scores.tokens}
    _storage.write(file, tensors, {"influence": dict(facts), "count": count})


def _read(file: Path, facts: Mapping[str, Any]) -> tuple[Influence, int]:
    """The scores of a block that is there, and its number of examples.

    Raises:
        ValueError: if it was made with other settings, or is damaged.
    """
    stored = _storage.TensorFile(file)
    theirs = stored.header.get("influence", {})
    for key, value in json.loads(json.dumps(facts)).items():
        if theirs.get(key) != value:
            there, here = (repr(one)[:60] for one in (theirs.get(key), value))
            raise ValueError(f"{file}: made with other {key} ({there}, now {here}); take another path")
    tokens = stored.tensor("tokens") if facts["tokens"] else None
    return Influence(stored.tensor("values"), stored.tensor("examples"), tokens), int(stored.header["count"])
