"""The Fisher information of a model's layers, of any structure and kind, estimated in one or two sweeps."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Unpack, overload

import torch
from torch import nn

from fishergeo.accumulators import (
    ACCUMULATORS,
    Accumulator,
    EkfacAccumulator,
    Layout,
    Structure,
    Structures,
    named_structures,
)
from fishergeo.capture import (
    Autocast,
    Layer,
    LayerFilter,
    content_mark,
    fingerprint,
    select_layers,
)
from fishergeo.estimation.checkpoint import Checkpoint, SweepState
from fishergeo.estimation.fisher import Fisher, FisherHeader
from fishergeo.estimation.options import DataKeywords, DataOptions, check_sums_dtype, chosen_options, option_facts
from fishergeo.estimation.sweep import Sweep, in_eigenbases


@overload
def estimate_fisher(  # type: ignore[overload-overlap]  # a name is a sequence of names to mypy, and one name here
    model: nn.Module,
    batches: Iterable[Any],
    structure: str | Structure = ...,
    kind: str | None = ...,
    *,
    data: DataOptions | None = ...,
    layers: LayerFilter = ...,
    rank: int = ...,
    side: str = ...,
    sharing: str = ...,
    probes: int = ...,
    basis: Fisher | None = ...,
    basis_examples: int | None = ...,
    share_inputs: bool = ...,
    dtype: torch.dtype | None = ...,
    progress: bool = ...,
    checkpoint: str | os.PathLike[str] | None = ...,
    checkpoint_every: int = ...,
    verify: bool = ...,
    **keywords: Unpack[DataKeywords],
) -> Fisher: ...


@overload
def estimate_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    structure: Sequence[str | Structure] | Mapping[str, str | Structure],
    kind: str | None = ...,
    *,
    data: DataOptions | None = ...,
    layers: LayerFilter = ...,
    rank: int = ...,
    side: str = ...,
    sharing: str = ...,
    probes: int = ...,
    basis: Fisher | None = ...,
    basis_examples: int | None = ...,
    share_inputs: bool = ...,
    dtype: torch.dtype | None = ...,
    progress: bool = ...,
    checkpoint: str | os.PathLike[str] | None = ...,
    checkpoint_every: int = ...,
    verify: bool = ...,
    **keywords: Unpack[DataKeywords],
) -> dict[str, Fisher]: ...


def estimate_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    structure: Structures = "sketch",
    kind: str | None = None,
    *,
    data: DataOptions | None = None,
    layers: LayerFilter = None,
    rank: int = 64,
    side: str = "output",
    sharing: str = "expand",
    probes: int = 0,
    basis: Fisher | None = None,
    basis_examples: int | None = None,
    share_inputs: bool = True,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 100,
    verify: bool = True,
    **keywords: Unpack[DataKeywords],
) -> Fisher | dict[str, Fisher]:
    r"""Estimates the Fisher of every chosen layer's weight in one pass, without forming a weight gradient.

    For example i let L_i be its own objective, the mean over its supervised tokens (or the sum, ``reduction``), D_i (T, p) the gradients of L_i
    with respect to the layer's outputs, A_i (T, q) the layer's inputs and G_i = D_iᵀ A_i, what
    ``model(**example).loss.backward()`` leaves in ``W.grad``. With N the number of examples:

    | structure | operator |
    | --- | --- |
    | gram | 1/N Σ G_i G_iᵀ (side output, (p, p)) or 1/N Σ G_iᵀ G_i (side input, (q, q)) |
    | sketch | the same, known through its ``rank`` leading eigenpairs; ``full_trace`` is exact |
    | diagonal | 1/N Σ G_i∘G_i, on vec(W) row-major |
    | kfac | kron(S, A), S = 1/N Σ_i D_iᵀ D_i, A = Σ_i A_iᵀ A_i / Σ_i T_i, T_i the positions that are not padding |
    | ekfac | kron(U, V) diag(1/N Σ (Uᵀ G_i V)∘(Uᵀ G_i V)) kron(U, V)ᵀ, U and V the eigenvectors of KFAC's S and A |
    | exact | 1/N Σ vec(G_i) vec(G_i)ᵀ, matrix-free; keeps every D_i and A_i |

    The KFAC scale: vec(G) vec(G)ᵀ = Σ_{t,t'} g_t g_t'ᵀ ⊗ a_t a_t'ᵀ; taking tokens as uncorrelated leaves the terms
    t = t', taking g and a as independent replaces a aᵀ by its mean (Eschenhagen et al. 2023, arXiv 2311.00636,
    "expand"; Martens and Grosse 2015). It is exact for one example of one token. ``sharing="reduce"`` (the same
    paper) takes g_i = Σ_t g_t and a_i = 1/T_i Σ_t a_t: S = 1/N Σ g_i g_iᵀ, A = 1/N Σ a_i a_iᵀ. The two agree for
    T = 1.

    EKFAC (George et al. 2018) reads the batches twice: once for the eigenbases, once for the moments. With
    ``basis_examples`` it reads them once, and with ``basis`` the bases are those of an earlier estimate.

    What an example's objective is, what a datum is and how much it counts say the :class:`fishergeo.DataOptions`.

    Args:
        model: any module; dict batches and Hugging Face outputs if ``loss`` is left out. Frozen parameters, any
            device, any float dtype, adapters from peft. It is run in eval mode and left exactly as it was.
        batches: iterable of batches of any sizes, padded on either side (``attention_mask`` says where).
        structure: name of the table; or several, all fed by the same pass: a list of names or of
            :class:`fishergeo.Structure`, or a mapping from names of your own to them.
        kind: whose labels an objective has, a field of :class:`fishergeo.DataOptions`; ``"empirical"`` by default.
        data: options of the data; by default those that ``kind`` and ``keywords`` make.
        layers: names, globs or a predicate ``(name, module) -> bool``; by default every nn.Linear and
            input projection of nn.MultiheadAttention except the output
            embedding and LoRA's halves, leaving out with a warning what is never called. ``"m.bias"`` is a bias, ``"m+bias"`` weight and bias, ``"m.experts.w.3"`` an
            expert; see "What can be captured" in the reference.
        rank: number of eigenpairs of a sketch, at least 1.
        side: ``"output"`` or ``"input"``, for gram and sketch.
        sharing: ``"expand"`` or ``"reduce"``, for kfac, kfac-sketch and ekfac.
        probes: number of columns that a sketch holds back to measure its error with, so that
            ``fisher[layer].error()`` bounds what it lacks; see :class:`fishergeo.SketchOperator`. Shards are then
            merged only if their seed is the same.
        basis: Fisher of structure kfac or ekfac whose eigenbases ekfac takes, so that shards can be merged.
        basis_examples: number of examples that fix ekfac's eigenbases in one sweep; see
            :class:`fishergeo.Structure`.
        share_inputs: whether KFAC holds one A for layers that read the same tensor (q, k, v).
        dtype: dtype of the sums, float32 or float64; by default float64 for float64 models, else float32.
        progress: whether a progress bar over batches is shown.
        checkpoint: file that keeps the state of the unfinished pass. If it is there, the pass goes on from it: the
            batches must come in the same order. A file of other options, another ``loss`` (its code), weights or ``basis``
            among them, is refused. It is deleted at the end.
        checkpoint_every: number of batches between two writes of it.
        verify: before anything is returned, hold the gradients captured on the first batch against autograd's own of
            the same weights, and one example alone against the same in its batch: one batch more, forward and
            backward, and again on the first batch of several examples and the first with padding, where those come later.
            Quantised and sharded weights are passed over. Before it, a model that gives a loss of its own is asked on a few
            examples whether it is the built-in one.
        **keywords: fields of :class:`fishergeo.DataOptions` (``unit``, ``loss``, ``seed``, ...), in place of ``data``.

    Returns:
        Fisher: a mapping from layer name to operator; for several structures a dict of them, under the names asked
        for.

    Raises:
        ValueError: for unknown choices, patterns that match nothing, batches without labels, no supervised token, or a
            field of the data options beside ``data``.
        TypeError: if batches cannot be read twice where two passes are needed, or for an unknown keyword.
        RuntimeError: if ``verify`` finds gradients that are not autograd's, naming the layers and likely causes.
        FloatingPointError: if a NaN or Inf appears, naming the batch and the layer.

    Examples:
        >>> model = torch.nn.Linear(3, 2)
        >>> batches = [(torch.eye(3), torch.zeros(3, 2))]
        >>> def loss(model, batch):
        ...     return (model(batch[0]) - batch[1]).square().sum(1)
        ...
        >>> fisher = fg.estimate_fisher(model, batches, structure="kfac", loss=loss)
        >>> fisher[""].shape  # a layer's name is its place in the model; here the model is the layer
        (6, 6)
        >>> several = fg.estimate_fisher(model, batches, structure=["gram", "diagonal"], loss=loss)
        >>> list(several)
        ['gram', 'diagonal']
    """
    options = chosen_options("estimate_fisher", data, kind, keywords)
    wanted = named_structures(
        structure, side=side, rank=rank, sharing=sharing, basis_examples=basis_examples, probes=probes
    )
    _check_options(wanted, options.unit, dtype, basis, basis_examples, probes)
    chosen = select_layers(model, layers)
    feeding = _Feeding(chosen, wanted, options, dtype, basis)
    if feeding.second and isinstance(batches, Iterator):
        raise TypeError(
            "structure='ekfac' reads the batches twice, and these can be read once; pass a list or a loader, or "
            "basis_examples= for a single sweep"
        )
    mark = fingerprint(model)
    keeper = None
    if checkpoint is not None:
        facts = {
            "structures": {key: asdict(one) for key, one in wanted.items()},
            "data": option_facts(options) | {"share_inputs": share_inputs, "dtype": str(dtype)},
            "basis": None if basis is None else content_mark({n: one.sums for n, one in basis.accumulators.items()}),
            "layers": {name: list(layer.shape) for name, layer in chosen.items()},
            "model": mark,
        }
        keeper = Checkpoint(checkpoint, checkpoint_every, json.loads(json.dumps(facts)))
    optional = layers is None
    sweeps = _run(model, chosen, batches, feeding, options, share_inputs, progress, keeper, verify, optional)
    header = FisherHeader(
        structure="",
        kind=options.kind,
        unit=options.unit,
        side=side,
        rank=rank,
        seed=options.seed,
        examples=sweeps[0].examples,
        tokens=sweeps[0].tokens,
        dtype="",
        shapes={name: layer.shape for name, layer in sweeps[0].layers.items()},
        fingerprint=mark,
        decay=options.decay,
        weighted=options.token_weights is not None or options.example_weights is not None,
        reduction=options.reduction,
    )
    fishers: dict[str, Fisher] = {}
    for key, one in wanted.items():
        accumulators = next(sweep.accumulators[key] for sweep in reversed(sweeps) if key in sweep.accumulators)
        how = "two-pass" if one.basis_examples is None else "one-sweep"
        fishers[key] = Fisher(
            replace(
                header,
                structure=one.name,
                side=one.side,
                rank=one.rank,
                sharing=one.sharing,
                probes=one.probes,
                dtype=str(next(iter(accumulators.values())).dtype).removeprefix("torch."),
                basis="" if one.name != "ekfac" else "given" if basis is not None else how,
            ),
            accumulators,
        )
    if keeper is not None:
        keeper.remove()
    return fishers[""] if isinstance(structure, str | Structure) else fishers


class _Feeding:
    """Which accumulators the first sweep feeds, which become EKFAC in its course, and which need a second sweep.

    Attributes:
        sums: structure's key -> layer -> accumulator of the first sweep, for what was asked for.
        bases: ``sharing`` -> layer -> KFAC that was not asked for, whose eigenbases the second sweep takes.
        turns: key -> examples after which its KFAC becomes EKFAC.
        second: key of an EKFAC of the second sweep -> (role, key) of the KFAC of its eigenbases in the first.
        layouts: role (``"sums"`` or ``"bases"``) -> key -> layer -> layout.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        wanted: Mapping[str, Structure],
        options: DataOptions,
        dtype: torch.dtype | None,
        basis: Fisher | None,
    ) -> None:
        self.sums: dict[str, dict[str, Accumulator]] = {}
        self.bases: dict[str, dict[str, Accumulator]] = {}
        self.turns: dict[str, int] = {}
        self.second: dict[str, tuple[str, str]] = {}
        self.layouts: dict[str, dict[str, dict[str, Layout]]] = {"sums": {}, "bases": {}}
        asked = {one.sharing: key for key, one in wanted.items() if one.name == "kfac"}
        for key, one in wanted.items():
            layouts = {
                name: Layout(
                    name, *layer.shape, options.unit, one.side, one.rank, one.sharing, options.seed, one.probes
                )
                for name, layer in layers.items()
            }

            def empty(kind: str, layouts: Mapping[str, Layout] = layouts) -> dict[str, Accumulator]:
                made = ACCUMULATORS[kind]
                return {name: made.empty(layout, *_home(layers[name], dtype)) for name, layout in layouts.items()}

            self.layouts["sums"][key] = layouts
            if one.name != "ekfac":
                self.sums[key] = empty(one.name)
            elif basis is not None:
                self.sums[key] = _given_bases(basis, layouts, layers, dtype)
            elif one.basis_examples is not None:
                self.turns[key] = one.basis_examples
                self.sums[key] = empty("kfac")
            elif one.sharing in asked:
                self.second[key] = "sums", asked[one.sharing]
            else:
                self.second[key] = "bases", one.sharing
                if one.sharing not in self.bases:
                    self.bases[one.sharing] = empty("kfac")
                    self.layouts["bases"][one.sharing] = layouts


def _home(layer: Layer, dtype: torch.dtype | None) -> tuple[torch.dtype, torch.device]:
    """The dtype and device of a layer's sums."""
    wide = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
    return dtype or wide, layer.weight.device


def _given_bases(
    basis: Fisher, layouts: Mapping[str, Layout], layers: Mapping[str, Layer], dtype: torch.dtype | None
) -> dict[str, Accumulator]:
    """Empty EKFAC sums in the bases of an earlier estimate, with its input groups."""
    source: dict[str, Accumulator] = {}
    for name, layout in layouts.items():
        if basis.header.shapes.get(name) != (layout.p, layout.q):
            raise ValueError(f"basis has no layer {name!r} of shape ({layout.p}, {layout.q})")
        source[name] = basis.accumulators[name]
    if basis.header.structure == "kfac":
        source = in_eigenbases(source)
    result: dict[str, Accumulator] = {}
    leaders: dict[str, Accumulator] = {}
    for name, layout in layouts.items():
        home, device = _home(layers[name], dtype)
        u, v = (source[name].sums[key].to(device, home) for key in ("output_basis", "input_basis"))
        result[name] = EkfacAccumulator.in_bases(layout, u, v)
        leader = leaders.setdefault(source[name].group, result[name])
        if leader is not result[name]:
            result[name].join(leader)
    return result


def _run(
    model: nn.Module,
    chosen: Mapping[str, Layer],
    batches: Iterable[Any],
    feeding: _Feeding,
    options: DataOptions,
    share_inputs: bool,
    progress: bool,
    keeper: Checkpoint | None,
    verify: bool,
    optional: bool,
) -> list[Sweep]:
    """The sweeps, finished; each begun where a checkpoint left it."""
    sweeps = [Sweep(model, chosen, feeding.sums, options, share_inputs, feeding.turns, feeding.bases, verify, optional)]
    saved = [] if keeper is None else keeper.load(sweeps[0].device)
    finished: list[SweepState] = []

    def after() -> None:
        if keeper is not None and sweeps[-1].number % keeper.every == 0:
            keeper.save([*finished, sweeps[-1].state()])

    if saved:
        sweeps[0].restore(saved[0], feeding.layouts)
        if len(saved) == 2:
            sweeps[0].layers = {name: layer for name, layer in chosen.items() if name in sweeps[0].seen}
    if len(saved) < 2:
        sweeps[0].run(batches, progress, after)
        for key in feeding.turns:
            one = next(iter(sweeps[0].accumulators[key].values()))
            if not isinstance(one, EkfacAccumulator) or not float(one.sums["units"]) > 0:
                raise ValueError(
                    f"basis_examples={feeding.turns[key]}: of {sweeps[0].examples:g} examples none was left for the "
                    "moments; take fewer, or None for two passes"
                )
    if feeding.second:
        finished = [sweeps[0].state()]
        second: dict[str, dict[str, Accumulator]] = {}
        if len(saved) < 2:
            first = {"sums": sweeps[0].accumulators, "bases": sweeps[0].bases}
            with Autocast().aside():
                second = {key: in_eigenbases(first[role][source]) for key, (role, source) in feeding.second.items()}
        sweeps.append(Sweep(model, sweeps[0].layers, second, options, share_inputs, verify=False))
        if len(saved) == 2:
            sweeps[1].restore(saved[1], feeding.layouts)
        sweeps[1].run(batches, progress, after)
    return sweeps


def _check_options(
    wanted: Mapping[str, Structure],
    unit: str,
    dtype: torch.dtype | None,
    basis: Fisher | None,
    basis_examples: int | None,
    probes: int,
) -> None:
    check_sums_dtype(dtype)
    rotated = [one for one in wanted.values() if one.name == "ekfac"]
    if unit == "token" and any(
        one.sharing == "reduce" for one in wanted.values() if one.name in ("kfac", "kfac-sketch", "ekfac")
    ):
        raise ValueError("sharing='reduce' sums over an example's tokens, which unit='token' takes one by one")
    if (basis is not None or basis_examples is not None) and not rotated:
        raise ValueError("basis= and basis_examples= are of use to structure='ekfac' only")
    if probes and all(one.name != "sketch" for one in wanted.values()):
        raise ValueError("probes= is of use to structure='sketch' only")
    if basis is None:
        return
    if any(one.basis_examples is not None for one in rotated):
        raise ValueError("ekfac takes its eigenbases from basis= or from basis_examples=, not from both")
    if basis.header.structure not in ("kfac", "ekfac"):
        raise ValueError(f"basis must be a Fisher of structure kfac or ekfac, got {basis.header.structure!r}")
