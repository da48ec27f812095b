"""One sweep over the data: every batch forward and backward, every layer's record to every accumulator."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fishergeo import _storage
from fishergeo.accumulators import ACCUMULATORS, Accumulator, EkfacAccumulator, KfacAccumulator, Layout, Shared
from fishergeo.capture import (
    Capture,
    Layer,
    LossFunction,
    Objective,
    Record,
    WeightSource,
    checked_example_weights,
    example_objectives,
    indexed,
    padding_mask,
    sized,
    take_weights,
    to_device,
)


@dataclass(frozen=True)
class DataOptions:
    """What is differentiated on the data, and how much each datum counts.

    Attributes:
        kind: see :func:`fishergeo.capture.example_objectives`.
        unit: ``"sequence"`` or ``"token"``.
        loss: of the user, or None.
        token_weights: key or callable.
        example_weights: key or callable.
        decay: what an example multiplies the weight of all earlier ones by.
        max_draws: the most passes over one batch.
        seed: of sampled labels.
        reduction: ``"mean"`` or ``"sum"`` over an example's supervised tokens; units that are tokens take the sum.
    """

    kind: str = "empirical"
    unit: str = "sequence"
    loss: LossFunction | None = None
    token_weights: WeightSource = None
    example_weights: WeightSource = None
    decay: float = 1.0
    max_draws: int = 256
    seed: int = 0
    reduction: str = "mean"


class Sweep:
    """Accumulators of several structures, fed by one pass over batches.

    Args:
        model: any module.
        layers: name -> layer, from :func:`fishergeo.capture.select_layers`.
        accumulators: structure's key -> layer -> accumulator. A key may lack layers.
        options: what is differentiated.
        share_inputs: whether KFAC holds one input factor for layers that read the same tensor.
        turns: key of a KFAC structure -> examples after which it becomes EKFAC in its eigenbases.

    Attributes:
        number: of the next batch.
        examples: the weight of the examples so far.
        tokens: the weight of their supervised tokens.
        seen: layers that received a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        accumulators: dict[str, dict[str, Accumulator]],
        options: DataOptions,
        share_inputs: bool = True,
        turns: Mapping[str, int] | None = None,
    ) -> None:
        self.model = model
        self.layers = dict(layers)
        self.accumulators = accumulators
        self.options = options
        self.share_inputs = share_inputs
        self.turns = dict(turns or {})
        self.number = 0
        self.examples = 0.0
        self.tokens = 0.0
        self.seen: set[str] = set()
        self.generator = torch.Generator().manual_seed(options.seed)
        self.device = cast(Tensor, next(iter(self.layers.values())).weight).device

    def run(self, batches: Iterable[Any], progress: bool = False, after: Callable[[], None] | None = None) -> None:
        """Reads the batches from number ``self.number`` on.

        Args:
            batches: any iterable; earlier batches are drawn and passed over.
            progress: a progress bar.
            after: called after every batch.

        Raises:
            FloatingPointError: if a NaN or Inf appears, naming the batch and the layer.
            ValueError: if there was no supervised token, or a layer received no gradient.
        """
        with Capture(self.model, self.layers) as capture:
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
        if self.examples == 0:
            raise ValueError("batches held no example with a supervised token")
        unseen = [name for name in self.layers if name not in self.seen]
        if unseen:
            raise ValueError(f"layers {unseen[:4]} received no gradient in any batch; leave them out")
        for group in self.accumulators.values():
            for name, accumulator in group.items():
                accumulator.finish()
                # A sum is finite only if its terms are. Terms were; squares of numbers past 1e19 are not in float32.
                if not accumulator.finite():
                    raise FloatingPointError(f"layer {name!r}: a sum is not finite; pass dtype=torch.float64")

    def _read(self, capture: Capture, number: int, batch: Any) -> None:
        o = self.options
        mask = padding_mask(batch)
        batch, given = take_weights(batch, o.example_weights, "example_weights")
        token_weights = o.token_weights
        if isinstance(token_weights, str):
            batch, of_tokens = take_weights(batch, token_weights, "token_weights")
            token_weights = lambda _: cast(Tensor, of_tokens)  # noqa: E731
        draw, draws = 0, 1
        weights: Tensor | None = None
        groups: dict[tuple[str, int], KfacAccumulator] = {}
        while draw < draws:
            shared = Shared(number, draw)
            totals: dict[str, Tensor] = {}

            def objective(draw: int = draw, shared: Shared = shared) -> Objective:
                nonlocal draws, weights
                result = example_objectives(
                    self.model, batch, o.kind, o.loss, self.generator, token_weights, draw, o.max_draws
                )
                draws = result.draws
                if draw == 0:
                    weights = self._count(result, given, shared)
                shared.weights = weights
                return result

            def scale(result: Objective) -> Tensor:
                factor = torch.ones_like(result.values)
                if o.unit == "token" or o.reduction == "sum":
                    tokens = result.counts if result.token_scale is None else result.token_scale
                    factor = factor * tokens.to(factor.dtype)
                return factor if weights is None else factor * weights.sqrt().to(factor.dtype)

            def read(record: Record, shared: Shared = shared, totals: dict[str, Tensor] = totals) -> None:
                self.seen.add(record.name)
                inputs = shared.get(record.source, "total", lambda: _total(record.inputs))
                totals[record.name] = inputs + _total(record.gradients)
                for key, group in self.accumulators.items():
                    accumulator = group.get(record.name)
                    if accumulator is None:
                        continue
                    if isinstance(accumulator, KfacAccumulator) and self.share_inputs and number == shared.draw == 0:
                        first = groups.setdefault((key, record.source), accumulator)
                        if first is not accumulator:
                            accumulator.join(first)
                    accumulator.add(record, shared)

            capture.pass_over(objective, read, mask, scale)
            if totals and not bool(torch.isfinite(torch.stack(list(totals.values()))).all()):
                name = next(name for name, total in totals.items() if not bool(torch.isfinite(total)))
                raise FloatingPointError(f"layer {name!r}: NaN or Inf in the gradients or inputs")
            draw += 1

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
            done: set[int] = set()
            for group in self.accumulators.values():
                for accumulator in group.values():
                    accumulator.decay_(factor, done)
        each = counted.double() if weights is None else weights * counted
        examples, tokens = float(each.sum()), float((each * result.counts).sum())
        self.examples += examples
        self.tokens += tokens
        shared.units = examples if self.options.unit == "sequence" else tokens
        return weights

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What :meth:`restore` needs to go on: JSON-able facts, and tensors by ``key|layer|name``."""
        states = {(k, name): a.state() for k, group in self.accumulators.items() for name, a in group.items()}
        facts = {
            "number": self.number,
            "examples": self.examples,
            "tokens": self.tokens,
            "seen": sorted(self.seen),
            "turns": self.turns,
            "kinds": {k: _kind(group) for k, group in self.accumulators.items()},
            "names": [[k, name, list(state)] for (k, name), state in states.items()],
        }
        tensors = {f"{k}|{name}|{part}": t for (k, name), state in states.items() for part, t in state.items()}
        return facts, tensors | {"generator": self.generator.get_state().long()}

    def restore(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], layouts: Mapping[str, Layout]) -> None:
        """Goes on from :meth:`state`; ``layouts`` maps ``key|layer`` to the layout of its sums."""
        self.number = facts["number"]
        self.examples, self.tokens = facts["examples"], facts["tokens"]
        self.seen = set(facts["seen"])
        self.turns = dict(facts["turns"])
        self.generator.set_state(tensors["generator"].cpu().to(torch.uint8))
        self.accumulators = {key: {} for key in facts["kinds"]}
        sharing: dict[int, KfacAccumulator] = {}
        for key, name, parts in facts["names"]:
            state = {part: tensors[f"{key}|{name}|{part}"] for part in parts}
            accumulator = ACCUMULATORS[facts["kinds"][key]].restored(layouts[f"{key}|{name}"], state)
            if isinstance(accumulator, KfacAccumulator):
                first = sharing.setdefault(id(state["input"]), accumulator)
                if first is not accumulator:
                    accumulator.join(first)
            self.accumulators[key][name] = accumulator


def in_eigenbases(kfac: Mapping[str, Accumulator], dtype: torch.dtype | None = None) -> dict[str, Accumulator]:
    """Empty EKFAC sums in the eigenbases of KFAC's factors; layers that share an input factor share its basis."""
    result: dict[str, Accumulator] = {}
    shared: dict[int, Tensor] = {}
    for name, accumulator in kfac.items():
        assert isinstance(accumulator, KfacAccumulator)
        output, inputs = accumulator.eigenbases()
        inputs = shared.setdefault(id(accumulator.sums["input"]), inputs)
        result[name] = EkfacAccumulator.in_bases(accumulator.layout, output, inputs)
    return result


def _kind(group: Mapping[str, Accumulator]) -> str:
    one = type(next(iter(group.values())))
    return next(name for name, kind in ACCUMULATORS.items() if kind is one)


def _total(tensor: Tensor) -> Tensor:
    """A sum that is finite if, and barring overflow only if, every entry is."""
    return tensor.detach().sum(dtype=torch.float32 if tensor.element_size() < 4 else None)


class Checkpoint:
    """One safetensors file, replaced whole every so many batches.

    Args:
        path: of the file.
        every: batches between two writes, at least 1.
        identity: JSON-able facts that must be the same when the estimate goes on.

    Raises:
        ValueError: if ``every`` is less than 1.
    """

    def __init__(self, path: str | os.PathLike[str], every: int, identity: Mapping[str, Any]) -> None:
        if every < 1:
            raise ValueError(f"checkpoint_every={every} must be at least 1")
        self.path = Path(path)
        self.every = every
        self.identity = dict(identity)

    def save(self, sweeps: list[tuple[dict[str, Any], dict[str, Tensor]]]) -> None:
        """Writes the states of all sweeps begun so far."""
        tensors = {f"{i}|{key}": tensor for i, (_, state) in enumerate(sweeps) for key, tensor in state.items()}
        header = {"unfinished": self.identity, "sweeps": [facts for facts, _ in sweeps], "keys": list(tensors)}
        _storage.write(self.path, tensors, header)

    def load(self, device: torch.device) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
        """The states that were saved; nothing if there is no file.

        Raises:
            ValueError: if the file is damaged, or of another estimate than this one.
        """
        if not self.path.is_file():
            return []
        file = _storage.TensorFile(self.path)
        header = file.header
        try:
            found: dict[str, Any] = header["unfinished"]
            sweeps: list[dict[str, Any]] = header["sweeps"]
            keys: list[str] = header["keys"]
        except KeyError as error:
            raise ValueError(f"{self.path}: not the checkpoint of an estimate (no {error})") from error
        for key, mine in self.identity.items():
            if found.get(key) != mine:
                raise ValueError(
                    f"{self.path}: the checkpoint is of another estimate: {key} is {found.get(key)!r} there and "
                    f"{mine!r} here; delete it to start anew, or name another file"
                )
        states: list[dict[str, Tensor]] = [{} for _ in sweeps]
        for key in keys:
            stage, _, rest = key.partition("|")
            states[int(stage)][rest] = file.tensor(key, device)
        return list(zip(sweeps, states, strict=True))

    def remove(self) -> None:
        """Deletes the file: the estimate is whole."""
        self.path.unlink(missing_ok=True)
