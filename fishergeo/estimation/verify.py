"""An estimate proves itself: what was captured on its first batch is held against autograd's own weight gradients.

So is what was captured on the first batch of several examples and on the first with padding, where those come later.

With G_i the gradient of example i's objective and Ω a fixed random matrix of few columns, Σ_i r_i G_i Ω is formed twice:
from the captured rows, and by autograd with respect to the weight itself. The r_i are ±1, ±2, ±½ and ±4, so that
rows put under the wrong example show as well as wrong rows do, and rounding is the same both times. Where the batch can be cut,
one example runs alone and without its padding, and the others without it: what an example contributes must not depend
on its company. Either way every example of the batch runs once more, and only once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fishergeo.capture import (
    Capture,
    Layer,
    Objective,
    Record,
    differentiate,
    is_encoder_decoder,
    padding_mask,
    provable,
    stand_ins,
    target_mask,
)
from fishergeo.estimation.cutting import Uncuttable, cut, padding, unpadded

Evaluate = Callable[[Any, Tensor | None, torch.Generator], Objective]
"""``(batch, token weights, generator) -> objective``."""

_COLUMNS = 8

_FLOOR = 1e-4

_ROUNDINGS = 100

_ROUGH = (torch.bfloat16, torch.float16)

_POWERS = (1.0, -1.0, 2.0, -2.0, 0.5, -0.5, 4.0, -4.0)

_TOGETHER = (
    "a module computes something else than its kind does, its output is changed in place or by a hook, rows or a mask "
    "are laid under the wrong examples, the loss differentiates inside, or the parameter is read by another module"
)

_APART = (
    "examples act on each other (statistics or losses over the batch), padding counts (supervised pads, positions "
    "counted from a padded edge, a mask that is not this layer's), or rows are laid under the wrong examples"
)


def faults_shown(padded: bool, examples: int) -> frozenset[str]:
    """Which faults a proof of a batch would find: wrong gradients, those of ``"several"`` examples, of ``"padding"``.

    Args:
        padded: something is padded.
        examples: number of examples that count; 0 where it is not known.
    """
    return frozenset({"gradients"} | ({"several"} if examples != 1 else set()) | ({"padding"} if padded else set()))


ALL_FAULTS = frozenset({"gradients", "several", "padding"})


class NeverCalled(ValueError):
    """Layers whose modules were not called while others were, so that nothing could be captured of them.

    Args:
        layers: their names.
        others: number of the layers that were called.

    Attributes:
        layers: their names, sorted.
        others: number of the layers that were called.
    """

    def __init__(self, layers: Iterable[str], others: int) -> None:
        self.layers, self.others = sorted(layers), others
        more = f" and {len(self.layers) - 4} more" if len(self.layers) > 4 else ""
        super().__init__(
            f"layers {self.layers[:4]}{more} received no gradient: never called, while {others} others were. The batches do not reach them, or "
            "something (a fused kernel) reads their weights in their place; switch that off, or leave them out"
        )


def never_called(capture: Capture, names: Iterable[str]) -> list[str]:
    """Those of the layers none of whose modules was called in any batch so far; experts, called or not, left out."""
    uses = {name: capture.layers[name] for name in names}
    return [
        name
        for name, layer in uses.items()
        if layer.expert is None and not any(use.path in capture.called for use in layer.uses)
    ]


@dataclass
class _Part:
    """What one layer contributes over some examples, times Ω.

    Attributes:
        product: (p, c).
        size: the square of what it would be like if its terms were uncorrelated.
    """

    product: Tensor
    size: Tensor


class Proof:
    """The proof of one batch: :meth:`begin` before it is differentiated, :meth:`take` in its course, :meth:`check` after.

    Args:
        capture: the one at work.
        evaluate: objective that is differentiated.
        batch: all of it.
        token_weights: (n, T) that stood in the batch, or None.
        generator: generator of sampled labels; only its state is read.
        builtin: the objective is the built-in one, so that padding is what ``attention_mask`` and −100 say.
        sampled: labels are drawn example by example; the one that runs alone is then the first.
        rough: the objective is computed under autocast.
        optional: a layer whose modules were not called may be read by others, and is noted in ``read_elsewhere``.
        moments: squares of the inputs count too, and must not hold padding.
        padded: something is padded.
        proven: faults that earlier batches were found free of. A batch that can show no other is not proven.
    """

    def __init__(
        self,
        capture: Capture,
        evaluate: Evaluate,
        batch: Any,
        token_weights: Tensor | None,
        generator: torch.Generator,
        *,
        builtin: bool,
        sampled: bool,
        rough: bool,
        optional: bool,
        moments: bool,
        padded: bool,
        proven: frozenset[str] = frozenset(),
    ) -> None:
        self.capture = capture
        self.evaluate = evaluate
        self.batch = batch
        self.token_weights = token_weights
        self.builtin = builtin
        self.sampled = sampled
        self.rough = rough or _rough(capture.model)
        self.optional = optional
        self.read_elsewhere: set[str] = set()
        self.moments = moments
        self.padded = padded
        self.proven = proven
        self._shown: frozenset[str] = frozenset()
        self._labels = generator.get_state()
        self._devices = sorted({p.device.index or 0 for p in capture.model.parameters() if p.device.type == "cuda"})
        self._random = self._random_states()
        self._provable = {name: provable(layer) for name, layer in capture.layers.items()}
        self._omegas: dict[str, Tensor] = {}
        self._one: dict[str, _Part] = {}
        self._others: dict[str, _Part] = {}
        self._inputs: dict[str, tuple[Tensor, Tensor]] = {}
        self._counted: list[bool] = []
        self._place = 0

    def begin(self, result: Objective, factors: Tensor) -> None:
        """Takes the objective, and the factor on the gradient of every example."""
        self._values, self._factors = result.values.detach(), factors.detach()
        self._counted = (result.counts > 0).tolist()
        if any(self._counted):
            self._shown = faults_shown(self.padded, sum(self._counted))
        if self._shown <= self.proven:
            return
        places = [place for place, counted in enumerate(self._counted) if counted]
        self._place = places[0]
        if self.builtin and not self.sampled:  # the one that has most to lose
            padded = padding(self.batch, is_encoder_decoder(self.capture.model), len(self._counted))
            self._place = max(places, key=lambda place: padded[place])
        powers = [_POWERS[(i + 3 * (i // len(_POWERS))) % len(_POWERS)] for i in range(len(self._counted))]
        self._powers = torch.tensor(powers, dtype=factors.dtype, device=factors.device)
        self._noisy = self._random_states() != self._random

    @torch.no_grad()
    def take(self, record: Record) -> None:
        """Takes what was captured of one layer."""
        name = record.name
        if self._shown <= self.proven or not self._provable[name]:
            return
        layer = self.capture.layers[name]
        dtype = _dtype(layer)
        omega = self._omegas[name] = _omega(layer.shape[1], dtype, record.inputs.device)
        rows, gradients = record.inputs.to(dtype) @ omega, record.gradients.to(dtype)
        powers = self._powers.to(gradients.device, dtype).clone()
        powers[self._place] = 0
        one = slice(self._place, self._place + 1)
        self._others[name] = _part(gradients * powers[:, None, None], rows)
        self._one[name] = _part(gradients[one], rows[one])
        if self.moments:
            self._inputs[name] = _moment(record, self._place)

    def _miss(self, layer: Layer) -> None:
        omega = self._omegas[layer.name] = _omega(layer.shape[1], _dtype(layer), layer.weight.device)
        nothing = _Part(omega.new_zeros(layer.shape[0], omega.shape[1]), omega.new_zeros(()))
        self._one[layer.name] = self._others[layer.name] = nothing

    def check(self) -> frozenset[str]:
        """Runs every example of the batch once more, and compares.

        Returns:
            The faults that have been looked for, of which there are none.

        Raises:
            NeverCalled: those that disagree are named by the caller and were never called.
            RuntimeError: naming the layers that disagree, and what may be the cause.
        """
        if self._shown <= self.proven or not any(self._provable.values()):
            return self._shown
        for name, layer in self.capture.layers.items():
            if self._provable[name] and name not in self._one:  # nothing came, and nothing should have
                self._miss(layer)
        with torch.random.fork_rng(devices=self._devices), torch.enable_grad(), _eagerly(self.capture.model):
            if not self.rough and not self._noisy and self._check_apart():
                return self._shown
            if self._noisy:
                self._set_random_states()
            power = float(self._powers[self._place])
            whole = {
                name: _Part(rest.product + power * self._one[name].product, rest.size + power**2 * self._one[name].size)
                for name, rest in self._others.items()
            }
            expected = self._run(self.batch, self.token_weights, self._generator(), list(range(len(self._counted))))
        # Kernels and shapes are the same, so are their roundings: only the last sum differs.
        self._compare(whole, expected, 0.06 if self.rough else 1e-3, _TOGETHER)
        return self._shown

    def _check_apart(self) -> bool:
        """One example alone, then the others; False if the batch cannot be cut."""
        others = [place for place in range(len(self._counted)) if place != self._place]
        try:
            count = len(self._counted)
            batch, weights = (cut(part, [self._place], count) for part in (self.batch, self.token_weights))
            rest, of_rest = (cut(part, others, count) for part in (self.batch, self.token_weights))
        except Uncuttable:
            return False
        if self.builtin:
            batch, weights = unpadded(batch, weights, is_encoder_decoder(self.capture.model))
        generator = self._generator()
        inputs: dict[str, tuple[Tensor, Tensor]] = {}
        try:
            value, expected = self._run_alone(batch, weights, generator, inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever a model says to a batch that was cut where it cannot be
            return False
        mine = float(self._values[self._place])
        same = abs(value - mine) <= 1e-4 * max(abs(value), abs(mine))
        cause = f"example {self._place} has the objective {mine:.6g} in its batch and {value:.6g} alone: {_APART}"
        cause = _TOGETHER if same else cause
        self._compare(self._one, expected, 1e-2, cause)
        self._compare_inputs(inputs)
        if any(self._counted[place] for place in others):
            self._compare(self._others, self._run(rest, of_rest, generator, others), 1e-2, _TOGETHER)
        return True

    def _run_alone(
        self, batch: Any, weights: Tensor | None, generator: torch.Generator, inputs: dict[str, tuple[Tensor, Tensor]]
    ) -> tuple[float, dict[str, Tensor]]:
        """The example's own objective and expected products; its inputs are captured in the same run."""
        place = self._place

        def objective() -> Objective:
            result = self.evaluate(batch, weights, generator)
            if len(result.values) != 1:
                raise Uncuttable("one example has several objectives")
            return result

        def read(record: Record) -> None:
            if self.moments and record.name in self._one:
                inputs[record.name] = _moment(record, 0)

        with self._expected() as (expected, leaves):
            mask = padding_mask(batch)
            result = self.capture.pass_over(
                objective,
                read,
                mask,
                lambda _: self._factors[place : place + 1],
                target_mask(self.capture.model, batch),
                leaves,
            )
        return float(result.values[0]), expected

    def _run(
        self, batch: Any, weights: Tensor | None, generator: torch.Generator, places: list[int]
    ) -> dict[str, Tensor]:
        """Expected products of several examples, times their powers."""
        with self.capture.deaf(), self._expected() as (expected, leaves):
            values = self.evaluate(batch, weights, generator).values
            root = (values * (self._factors * self._powers)[places]).sum()
            if root.requires_grad:
                differentiate(root, leaves)
        return expected

    def _compare(self, captured: Mapping[str, _Part], expected: Mapping[str, Tensor], most: float, cause: str) -> None:
        names = list(captured)
        errors, sizes = [], []
        for name, part in captured.items():
            norm = torch.linalg.vector_norm(expected[name])
            errors.append(torch.linalg.vector_norm(part.product - expected[name]).double().cpu())
            sizes.append(torch.maximum(norm, part.size.sqrt()).double().cpu())
        error, size = torch.stack(errors), torch.stack(sizes)
        # What vanishes but for rounding (attention to one key alone) is as small as the rounding of what does not.
        # So is that of an objective that does not change with a weight but for its own rounding.
        size = size + _FLOOR * size.max() + torch.stack([self._noise(name) for name in names])
        if bool((error <= most * size).all()):
            return
        wrong = torch.nonzero(~(error <= most * size))[:, 0].tolist()
        apart = set(never_called(self.capture, [names[i] for i in wrong]))
        if self.optional:
            self.read_elsewhere |= apart
            wrong = [i for i in wrong if names[i] not in apart]
            if not wrong:
                return
        if len(apart) == len(wrong):
            missed = never_called(self.capture, self.capture.layers)
            raise NeverCalled(missed, len(self.capture.layers) - len(missed))
        shown = ", ".join(f"{names[i]!r} ({float(error[i] / size[i]):.2g} of its size)" for i in wrong[:4])
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise RuntimeError(
            f"the captured gradients of {len(wrong)} of {len(names)} layers are not autograd's: {shown}{more}. "
            f"Likely causes: {cause}. Leave the layers out, or mend the cause; verify=False goes on with wrong numbers"
        )

    def _noise(self, name: str) -> Tensor:
        """The gradient that stands for a change of the objective by its rounding when a weight changes by its own size."""
        weight = self.capture.layers[name].weight
        rounding = _ROUNDINGS * torch.finfo(_dtype(self.capture.layers[name])).eps
        total = (self._values * self._factors).abs().sum().double().cpu()
        return rounding * total / max(1.0, float(torch.linalg.vector_norm(weight.detach())))

    def _compare_inputs(self, alone: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        for name, (tokens, squares) in alone.items():
            kinds = [use.kind for use in self.capture.layers[name].uses]
            if any(kind is not None and not kind.positions for kind in kinds):
                continue
            mine = self._inputs[name]
            if not bool(torch.isclose(mine[0], tokens)) or not bool(torch.isclose(mine[1], squares, rtol=1e-2)):
                raise RuntimeError(
                    f"layer {name!r} counts {float(mine[0]):g} positions of example {self._place} in its batch and "
                    f"{float(tokens):g} where it runs alone: the second moment of its inputs holds padding. Give every "
                    "sequence its mask, take batches of one example, or a structure without an input factor; "
                    "verify=False goes on with wrong numbers"
                )

    # What has to be left as it was.

    def _generator(self) -> torch.Generator:
        generator = torch.Generator()
        generator.set_state(self._labels)
        return generator

    def _random_states(self) -> list[bytes]:
        states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices)]
        return [state.numpy().tobytes() for state in states]

    def _set_random_states(self) -> None:
        cpu, *others = (torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in self._random)
        torch.set_rng_state(cpu)
        for device, state in zip(self._devices, others, strict=True):
            torch.cuda.set_rng_state(state, device)

    @contextlib.contextmanager
    def _expected(self) -> Iterator[tuple[dict[str, Tensor], list[Tensor]]]:
        """Within, a backward pass adds the gradient of every weight, times Ω, to the products; and its leaves."""
        layers = {name: self.capture.layers[name] for name in self._omegas}
        products = {
            name: torch.zeros(layers[name].shape[0], omega.shape[1], dtype=omega.dtype, device=omega.device)
            for name, omega in self._omegas.items()
        }

        def read(name: str, columns: slice, part: Tensor) -> None:
            products[name] += part.to(products[name].dtype) @ self._omegas[name][columns]

        with stand_ins(self.capture.model, layers, read) as leaves:
            yield products, leaves


def _dtype(layer: Layer) -> torch.dtype:
    return torch.float64 if layer.weight.dtype == torch.float64 else torch.float32


def _part(gradients: Tensor, rows: Tensor) -> _Part:
    """Of (n, T, p) gradients and (n, T, c) rows."""
    size = (gradients.square().sum(2) * rows.square().sum(2)).sum()
    return _Part(gradients.flatten(0, 1).mT @ rows.flatten(0, 1), size)


def _moment(record: Record, place: int) -> tuple[Tensor, Tensor]:
    """How many positions of an example count, and the sum of its inputs' squares."""
    a = record.inputs[place].double()
    counted = torch.full((), len(a), dtype=torch.float64, device=a.device)
    return counted if record.mask is None else record.mask[place].sum(dtype=torch.float64), a.square().sum()


def _omega(q: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(q, c): the identity where it is as small, else Gaussian; no default generator is touched."""
    if q <= _COLUMNS:
        return torch.eye(q, dtype=dtype, device=device)
    omega = torch.randn(q, _COLUMNS, generator=torch.Generator().manual_seed(q), dtype=torch.float64)
    return (omega / _COLUMNS**0.5).to(device, dtype)


def _rough(model: nn.Module) -> bool:
    """Whether some of the model computes in less than float32 or is quantised."""
    return any(t.dtype in _ROUGH or not t.is_floating_point() for t in model.parameters())


def _eagerly(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """No compilation for the sake of one batch."""
    compiled = any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
