"""One sweep over the data: every batch forward and backward, every layer's record to every accumulator."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fishergeo.accumulators import (
    ACCUMULATORS,
    Accumulator,
    EkfacAccumulator,
    ExactAccumulator,
    KfacAccumulator,
    KfacSketchAccumulator,
    Layout,
    Owned,
    Shared,
)
from fishergeo.capture import (
    Alignment,
    Autocast,
    Capture,
    Layer,
    Objective,
    Record,
    check_own_loss,
    checked_example_weights,
    example_objectives,
    indexed,
    label_alignment,
    most_examples,
    padding_mask,
    sized,
    take_weights,
    target_mask,
    to_device,
)
from fishergeo.estimation.checkpoint import SweepState
from fishergeo.estimation.fisher import named_once
from fishergeo.estimation.options import DataOptions
from fishergeo.estimation.verify import ALL_FAULTS, NeverCalled, Proof, faults_shown, never_called

_WITH_INPUTS = (KfacAccumulator, KfacSketchAccumulator)


class Sweep:
    """Accumulators of several structures, fed by one pass over batches.

    Args:
        model: any module.
        layers: name -> layer, from :func:`fishergeo.capture.select_layers`.
        accumulators: structure's key -> layer -> accumulator, of what was asked for. A key may lack layers.
        options: data options: what is differentiated.
        share_inputs: whether KFAC holds one input factor for layers that read the same tensor.
        turns: key of a KFAC structure -> examples after which it becomes EKFAC in its eigenbases.
        bases: ``sharing`` -> layer -> KFAC that nobody asked for, whose eigenbases a second sweep takes.
        verify: hold the gradients captured on the first batch against autograd's own, and on the first that shows more.
        optional: layers that no gradient reaches are left out with a warning, not refused.

    Attributes:
        number: number of the next batch.
        examples: the weight of the examples so far.
        tokens: the weight of their supervised tokens.
        seen: layers that received a gradient.
        proven: what has been verified.
        read_elsewhere: layers that were not called in a batch that was proven, and whose weights had a gradient nevertheless.
        peaks: layer -> the largest product of an entry of g_t and one of a_t so far.
        half_peaks: layer -> the largest entry of g_t so far, where it came in float16.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        accumulators: dict[str, dict[str, Accumulator]],
        options: DataOptions,
        share_inputs: bool = True,
        turns: Mapping[str, int] | None = None,
        bases: Mapping[str, dict[str, Accumulator]] | None = None,
        verify: bool = True,
        optional: bool = False,
    ) -> None:
        self.model = model
        self.layers = dict(layers)
        self.accumulators = accumulators
        self.options = options
        self.share_inputs = share_inputs
        self.turns = dict(turns or {})
        self.bases = dict(bases or {})
        self.proven = frozenset[str]() if verify else ALL_FAULTS
        self.optional = optional
        self.read_elsewhere: set[str] = set()
        self.number = 0
        self.examples = 0.0
        self.tokens = 0.0
        self.seen: set[str] = set()
        self.peaks: dict[str, Tensor] = {}
        self.half_peaks: dict[str, Tensor] = {}
        self.alignment: Alignment | None = None
        self.autocast = Autocast()
        self.generator = torch.Generator().manual_seed(options.seed)
        self.device = next(iter(self.layers.values())).weight.device

    def run(self, batches: Iterable[Any], progress: bool = False, after: Callable[[], None] | None = None) -> None:
        """Reads the batches from number ``self.number`` on.

        Args:
            batches: any iterable; earlier batches are drawn and passed over.
            progress: a progress bar.
            after: called after every batch.

        Raises:
            FloatingPointError: if a NaN or Inf appears, naming the batch and the layer.
            RuntimeError: if what is captured are not the gradients, naming the layers.
            ValueError: if there was no supervised token, or a layer received no gradient (:class:`NeverCalled` if its
                modules were not called while others were).
        """
        with self.autocast.aside(), Capture(self.model, self.layers) as capture:
            for number, batch in tqdm(indexed(batches), total=sized(batches), desc="fisher", disable=not progress):
                if number < self.number:
                    continue
                try:
                    self._read(capture, number, to_device(batch, self.device))
                except FloatingPointError as error:
                    raise FloatingPointError(f"batch {number}: {error}") from error
                self.number = number + 1
                for key in [key for key, needed in self.turns.items() if self.examples >= needed]:
                    del self.turns[key]
                    self.accumulators[key] = in_eigenbases(self.accumulators[key])
                if after is not None:
                    after()
        with self.autocast.aside():
            self._finish(capture)

    def _finish(self, capture: Capture) -> None:
        """Checks the sums after the last batch, and leaves out layers that nobody named and nothing reached."""
        if self.examples == 0:
            raise ValueError("batches held no example with a supervised token")
        unseen = [name for name in self.layers if name not in self.seen]
        if unseen and (not self.optional or len(unseen) == len(self.layers)):
            missed = never_called(capture, unseen)
            if missed and len(unseen) < len(self.layers):
                raise NeverCalled(missed, len(self.layers) - len(unseen))
            raise ValueError(f"layers {unseen[:4]} received no gradient in any batch; leave them out")
        if both := sorted(self.read_elsewhere.intersection(self.seen)):
            raise RuntimeError(
                f"layers {both[:4]} were called in some batches and read otherwise in others; leave them out"
            )
        if unseen:
            warnings.warn(
                f"layers=None: {len(unseen)} modules are left out, which were never called or on which the objective does "
                f"not depend: {', '.join(unseen)}",
                stacklevel=2,
            )
            for group in (self.layers, *self._fed()):
                for name in unseen:
                    del group[name]  # type: ignore[attr-defined]
        self._check_half()
        for layers in self._fed():
            for name, accumulator in layers.items():
                accumulator.finish()
                # A sum is finite only if its terms are. Terms were; squares of numbers past 1e19 are not in float32.
                if not accumulator.finite():
                    raise FloatingPointError(f"layer {name!r}: a sum is not finite; pass dtype=torch.float64")
                peak = float(self.peaks.get(name, 0.0))
                if 0 < peak < torch.finfo(accumulator.dtype).tiny ** 0.5 and not isinstance(
                    accumulator, ExactAccumulator
                ):
                    raise FloatingPointError(
                        f"layer {name!r}: its gradients are about {peak:.1g}, whose squares {accumulator.dtype} does not "
                        "hold; pass dtype=torch.float64, or multiply the loss"
                    )

    def _check_half(self) -> None:
        """Refuses gradients that float16 could not hold, and warns where it held none at all."""
        advice = "multiply the loss, or load the model in bfloat16 or float32"
        found = {name: float(peak) for name, peak in self.half_peaks.items() if name in self.layers}
        for name, peak in found.items():
            if 0 < peak < torch.finfo(torch.float16).tiny / 16:  # 64 of the steps that are left there
                raise FloatingPointError(
                    f"layer {name!r}: its gradients reach {peak:.1g}, which float16 rounds to a few numbers or to zero; {advice}"
                )
        if none := [name for name, peak in found.items() if peak == 0]:
            warnings.warn(
                f"gradients of {len(none)} layers are zero in float16, as they are or because they are too small for it "
                f"({', '.join(none[:4])}{' ...' if len(none) > 4 else ''}); in the second case {advice}",
                stacklevel=2,
            )

    def _fed(self) -> list[dict[str, Accumulator]]:
        """Layer -> accumulator of every structure, asked for or not."""
        return [*self.accumulators.values(), *self.bases.values()]

    def _read(self, capture: Capture, number: int, batch: Any) -> None:
        o = self.options
        mask, targets = padding_mask(batch), target_mask(self.model, batch)
        batch, given = take_weights(batch, o.example_weights, "example_weights")
        of_tokens = None
        if isinstance(o.token_weights, str):
            batch, of_tokens = take_weights(batch, o.token_weights, "token_weights")
        if o.loss is None and self.alignment is None:
            with capture.deaf(), self.autocast.resumed():
                self.alignment = label_alignment(self.model, batch)
                if not self.examples and self.proven < ALL_FAULTS:
                    check_own_loss(self.model, batch, o.kind)
        draw, draws = 0, 1
        weights: Tensor | None = None
        groups: dict[tuple[int, int], list[KfacAccumulator]] = {}
        padded = mask is not None or targets is not None
        new = not faults_shown(padded, most_examples(batch)) <= self.proven
        proof = self._proof(capture, batch, of_tokens, padded) if new else None
        while draw < draws:
            shared = Shared(number, draw)
            totals: dict[str, Tensor] = {}

            def objective(draw: int = draw, shared: Shared = shared) -> Objective:
                nonlocal draws, weights
                result = self._objective(batch, of_tokens, self.generator, draw)
                draws = result.draws
                if draw == 0:
                    weights = self._count(result, given, shared)
                shared.weights = weights
                return result

            def scale(result: Objective, draw: int = draw) -> Tensor:
                factor = torch.ones_like(result.values)
                if o.unit == "token" or o.reduction == "sum":
                    tokens = result.counts if result.token_scale is None else result.token_scale
                    factor = factor * tokens.to(factor.dtype)
                factor = factor if weights is None else factor * weights.sqrt().to(factor.dtype)
                if proof is not None and draw == 0:
                    proof.begin(result, factor)
                return factor

            def read(record: Record, shared: Shared = shared, totals: dict[str, Tensor] = totals) -> None:
                self.seen.add(record.name)
                if proof is not None and shared.draw == 0:
                    proof.take(record)
                inputs = shared.get(record.source, "total", lambda: _total(record.inputs))
                totals[record.name] = inputs + _total(record.gradients)
                peak = _peak(record)
                self.peaks[record.name] = torch.maximum(self.peaks.get(record.name, peak), peak)
                if record.gradients.dtype == torch.float16:
                    half = record.gradients.abs().amax().double()
                    self.half_peaks[record.name] = torch.maximum(self.half_peaks.get(record.name, half), half)
                for place, layers in enumerate(self._fed()):
                    accumulator = layers.get(record.name)
                    if accumulator is None:
                        continue
                    if isinstance(accumulator, KfacAccumulator) and self.share_inputs and number == shared.draw == 0:
                        group = groups.setdefault((place, record.source), [])
                        if group:
                            accumulator.join(group[0])
                        group.append(accumulator)
                    accumulator.add(record, shared)

            counted = capture.pass_over(objective, read, mask, scale, targets).counts > 0
            for layers in self._fed():
                for name in layers.keys() - totals.keys():
                    layers[name].miss(counted, shared)
            if totals and not bool(torch.isfinite(torch.stack(list(totals.values()))).all()):
                name = next(name for name, total in totals.items() if not bool(torch.isfinite(total)))
                raise FloatingPointError(f"layer {name!r}: NaN or Inf in the gradients or inputs")
            if proof is not None and draw == 0:
                self.proven |= proof.check()
                self.read_elsewhere |= proof.read_elsewhere
            draw += 1
        order = list(self.layers)
        for group in groups.values():
            first = min((member.layout.name for member in group), key=order.index)
            for member in group:
                member.group = first

    def _objective(self, batch: Any, of_tokens: Tensor | None, generator: torch.Generator, draw: int = 0) -> Objective:
        """Of a batch, and the token weights that stood in it."""
        o = self.options
        weights = cast(Callable[[Any], Tensor] | None, o.token_weights) if of_tokens is None else lambda _: of_tokens
        with self.autocast.resumed():
            return example_objectives(
                self.model, batch, o.kind, o.loss, generator, weights, draw, o.max_draws, self.alignment
            )

    def _proof(self, capture: Capture, batch: Any, of_tokens: Tensor | None, padded: bool) -> Proof:
        groups = self.accumulators.values()
        return Proof(
            capture,
            self._objective,
            batch,
            of_tokens,
            self.generator,
            builtin=self.options.loss is None,
            sampled=self.options.kind == "mc",
            rough=self.autocast.on,
            optional=self.optional,
            moments=any(isinstance(one, _WITH_INPUTS) for group in groups for one in group.values()),
            padded=padded,
            proven=self.proven,
        )

    def _count(self, result: Objective, given: Tensor | None, shared: Shared) -> Tensor | None:
        """Counts a batch's examples and tokens, lets the earlier ones decay, and returns the examples' weights."""
        counted = result.counts > 0
        weights = None if given is None else checked_example_weights(given, len(counted)).to(counted.device)
        if self.options.decay < 1:
            place = counted.cumsum(0)
            by_age = self.options.decay ** (place[-1] - place).double()
            weights = by_age if weights is None else weights * by_age
            factor = self.options.decay ** int(place[-1])
            self.examples *= factor
            self.tokens *= factor
            for layers in self._fed():
                done: set[Owned] = set()
                for accumulator in layers.values():
                    accumulator.decay_(factor, done)
        each = counted.double() if weights is None else weights * counted
        examples, tokens = float(each.sum()), float((each * result.counts).sum())
        self.examples += examples
        self.tokens += tokens
        shared.units = examples if self.options.unit == "sequence" else tokens
        return weights

    def state(self) -> SweepState:
        """What :meth:`restore` needs to go on."""
        facts = {
            "number": self.number,
            "examples": self.examples,
            "tokens": self.tokens,
            "seen": sorted(self.seen),
            "turns": self.turns,
            "sums": {key: _facts(layers) for key, layers in self.accumulators.items()},
            "bases": {key: _facts(layers) for key, layers in self.bases.items()},
        }
        tensors, aliases = named_once(
            (f"{role}|{key}|", accumulator, accumulator.state())
            for role, structures in (("sums", self.accumulators), ("bases", self.bases))
            for key, layers in structures.items()
            for accumulator in layers.values()
        )
        return SweepState(facts, tensors | {"generator": self.generator.get_state().long()}, aliases)

    def restore(self, state: SweepState, layouts: Mapping[str, Mapping[str, Mapping[str, Layout]]]) -> None:
        """Goes on from :meth:`state`.

        Args:
            state: state of a sweep over the same model and batches.
            layouts: ``"sums"`` -> structure's key, ``"bases"`` -> ``sharing`` -> layer -> layout of its sums.
        """
        facts = state.facts
        self.number = facts["number"]
        self.examples, self.tokens = facts["examples"], facts["tokens"]
        self.seen = set(facts["seen"])
        self.turns = dict(facts["turns"])
        self.generator.set_state(state.tensors["generator"].cpu().to(torch.uint8))
        for role, structures in (("sums", self.accumulators), ("bases", self.bases)):
            structures.clear()
            for key, found in facts[role].items():
                kind, leaders = ACCUMULATORS[found["kind"]], dict[str, Accumulator]()
                structures[key] = {}
                for name, (group, parts) in found["layers"].items():
                    tensors = {part: state.tensors[f"{role}|{key}|{name}|{part}"] for part in parts}
                    accumulator = kind.restored(layouts[role][key][name], tensors)
                    if leaders.setdefault(group, accumulator) is not accumulator:
                        accumulator.join(leaders[group])
                    accumulator.group = group
                    structures[key][name] = accumulator


def in_eigenbases(kfac: Mapping[str, Accumulator]) -> dict[str, Accumulator]:
    """Empty EKFAC sums in the eigenbases of KFAC's factors; layers of one input group have one input basis."""
    result: dict[str, Accumulator] = {}
    leaders: dict[str, EkfacAccumulator] = {}
    for name, accumulator in kfac.items():
        assert isinstance(accumulator, KfacAccumulator)
        output, leader = accumulator.output_eigenvectors(), leaders.get(accumulator.group)
        inputs = accumulator.input_eigenvectors() if leader is None else leader.basis.vectors
        made = EkfacAccumulator.in_bases(accumulator.layout, output, inputs)
        if leader is None:
            leaders[accumulator.group] = made
        else:
            made.join(leader)
        result[name] = made
    return result


def _facts(layers: Mapping[str, Accumulator]) -> dict[str, Any]:
    """The kind of a structure's accumulators, and each one's input group and names of tensors."""
    one = type(next(iter(layers.values())))
    kind = next(name for name, known in ACCUMULATORS.items() if known is one)
    return {"kind": kind, "layers": {name: [each.group, list(each.state())] for name, each in layers.items()}}


def _peak(record: Record) -> Tensor:
    """The largest product of an entry of a row's gradient and one of its input, float64."""
    g, a = (torch.linalg.vector_norm(x, torch.inf, dim=2).double() for x in (record.gradients, record.inputs))
    return (g * a).max()


def _total(tensor: Tensor) -> Tensor:
    """A sum that is finite if, and barring overflow only if, every entry is."""
    return tensor.detach().sum(dtype=torch.float32 if tensor.element_size() < 4 else None)
