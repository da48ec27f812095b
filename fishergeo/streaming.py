"""The one-sided Fisher of every layer as operators that re-read their data: one pass multiplies all layers' blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fishergeo._arguments import check_choice
from fishergeo.capture import Capture, LayerFilter, Record, indexed, layer_shape, padding_mask, select_layers, to_device
from fishergeo.losses import KINDS, LossFunction, Objective, example_objectives

Batches = Iterable[Any] | Callable[[], Iterable[Any]]


class StreamingFisher:
    """F = 1/N Σ G_i G_iᵀ (or Gᵀ G) of every layer, matrix-free: see :func:`fishergeo.estimate_fisher` for the terms.

    No (p, p) matrix is held. :meth:`multi_matmul` reads the batches once, forward and backward without weight
    gradients, and multiplies one block a layer: Σ D_iᵀ(A_i(A_iᵀ(D_i Ω))), by the cheapest order of multiplication.
    Give it to :func:`fishergeo.lanczos_layers`, whose passes are then passes over the data.

    Args:
        model: any module; left exactly as it was.
        batches: a re-iterable of batches (a list, a DataLoader that does not shuffle), or a function that returns a
            fresh iterable: they are read once a product, and must be the same each time.
        kind: where labels come from; ``"mc"`` draws the same labels in every pass.
        unit: ``"sequence"`` or ``"token"``.
        side: ``"output"`` or ``"input"``.
        layers: names, globs or a predicate; see :func:`fishergeo.estimate_fisher`.
        loss: ``(model, batch) -> (n,)``.
        seed: of sampled labels.

    Attributes:
        sizes: layer -> p, or q for ``side="input"``.
        passes: over the data, so far.
        traces: layer -> exact trace of F; filled by the first pass in which the layer takes part.
        examples: N, known after the first pass.
        tokens: supervised tokens, likewise.

    Raises:
        TypeError: if ``batches`` can be read only once.
        ValueError: for unknown choices or layers.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        kind: str = "empirical",
        unit: str = "sequence",
        side: str = "output",
        layers: LayerFilter = None,
        loss: LossFunction | None = None,
        seed: int = 0,
    ) -> None:
        check_choice("kind", kind, KINDS)
        self.unit = check_choice("unit", unit, ("sequence", "token"))
        self.side = check_choice("side", side, ("output", "input"))
        if isinstance(batches, Iterator):
            raise TypeError(
                "batches is an iterator, which can be read only once; pass a list, a DataLoader, or a function that "
                "returns a fresh iterable"
            )
        self.model, self.kind, self.loss, self.seed = model, kind, loss, seed
        self._batches = batches
        self._layers = select_layers(model, layers)
        weights = [cast(Tensor, module.weight) for module in self._layers.values()]
        self.dtype = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
        self.device = weights[0].device
        shapes = {name: layer_shape(module) for name, module in self._layers.items()}
        self.sizes: dict[str, int] = {name: p if side == "output" else q for name, (p, q) in shapes.items()}
        self.passes = 0
        self.traces: dict[str, float] = {}
        self.examples = 0
        self.tokens = 0

    @property
    def count(self) -> int:
        """What sums are divided by: examples or supervised tokens; 0 before the first pass."""
        return self.examples if self.unit == "sequence" else self.tokens

    def multi_matmul(self, blocks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One pass over the data: layer -> F @ block.

        Args:
            blocks: layer -> (size, c); layers that are left out are not computed.

        Returns:
            layer -> (size, c), float64 for float64 models, else float32, on the layer's device.

        Raises:
            KeyError: for a layer that is not there.
            ValueError: for a block of the wrong shape, or batches without a supervised token.
            RuntimeError: if the data are not those of the first pass, by their counts.
            FloatingPointError: naming the batch and the layer.
        """
        for name, block in blocks.items():
            if name not in self.sizes:
                raise KeyError(f"no layer {name!r} here; there are {', '.join(list(self.sizes)[:6])}")
            if block.ndim != 2 or len(block) != self.sizes[name]:
                raise ValueError(f"block of layer {name!r} must be ({self.sizes[name]}, c), got {tuple(block.shape)}")
        omegas = {n: b.to(cast(Tensor, self._layers[n].weight).device, self.dtype) for n, b in blocks.items()}
        sums = {name: torch.zeros_like(omega) for name, omega in omegas.items()}
        unknown = {name: omegas[name].new_zeros((), dtype=torch.float64) for name in omegas if name not in self.traces}
        examples, tokens = self._read(omegas, sums, unknown)
        if self.passes == 0:
            self.examples, self.tokens = examples, tokens
        elif (examples, tokens) != (self.examples, self.tokens):
            raise RuntimeError(
                f"batches changed between passes: {self.examples} examples of {self.tokens} tokens at first, "
                f"{examples} of {tokens} now; do not shuffle, sample or drop"
            )
        if self.count == 0:
            raise ValueError("batches held no example with a supervised token")
        self.passes += 1
        self.traces.update({name: float(total) / self.count for name, total in unknown.items()})
        return {name: total / self.count for name, total in sums.items()}

    def _read(
        self, omegas: Mapping[str, Tensor], sums: Mapping[str, Tensor], traces: Mapping[str, Tensor]
    ) -> tuple[int, int]:
        generator = torch.Generator().manual_seed(self.seed)
        examples = tokens = 0
        batches = (
            self._batches() if callable(self._batches) and not isinstance(self._batches, Iterable) else self._batches
        )
        # Only the layers that are asked for get hooks, so that back-propagation stops at the first of them.
        with Capture(self.model, {name: self._layers[name] for name in omegas}) as capture:
            for number, batch in indexed(batches):
                batch = to_device(batch, self.device)

                def read(record: Record, number: int = number) -> None:
                    name = record.name
                    a, d = record.inputs.to(self.dtype), record.gradients.to(self.dtype)
                    near, far = (d, a) if self.side == "output" else (a, d)
                    product = gram_product(near, far, omegas[name], self.unit)
                    if not bool(torch.isfinite(product.sum())):
                        raise FloatingPointError(f"layer {name!r}: NaN or Inf in the gradients or inputs")
                    sums[name].add_(product)
                    if name in traces:
                        traces[name].add_(gram_trace(near, far, self.unit))

                try:
                    result = capture.pass_over(
                        lambda batch=batch: example_objectives(self.model, batch, self.kind, self.loss, generator),  # type: ignore[misc]
                        read,
                        padding_mask(batch),
                        token_scale if self.unit == "token" else None,
                    )
                except FloatingPointError as error:
                    raise FloatingPointError(f"batch {number}: {error}") from error
                examples += int((result.counts > 0).sum())
                tokens += int(result.counts.sum())
        return examples, tokens


def token_scale(objective: Objective) -> Tensor:
    """(n,): turns means over an example's supervised tokens into sums."""
    return objective.counts.to(objective.values.dtype)


def gram_product(near: Tensor, far: Tensor, omega: Tensor, unit: str) -> Tensor:
    """Σ_i X_iᵀ (Y_i (Y_iᵀ (X_i Ω))) over a batch, by the cheapest of three orders; see the module.

    Args:
        near: X, (n, T, s), the factor on the operator's side.
        far: Y, (n, T, r), the other one.
        omega: (s, c).
        unit: with ``"token"`` every row is a datum of its own.

    Returns:
        (s, c).
    """
    n, t, s = near.shape
    r, c = far.shape[2], omega.shape[1]
    if unit == "token" or t == 1:
        flat = near.flatten(0, 1)
        return flat.T @ ((flat @ omega) * far.flatten(0, 1).square().sum(1, keepdim=True))
    through_kernel, through_factors, through_gradient = t * t * (r + c), 2 * t * r * c, t * r * s + 2 * c * r * s
    cheapest = min(through_kernel + 2 * t * s * c, through_factors + 2 * t * s * c, through_gradient)
    if cheapest == through_gradient:
        total = torch.zeros_like(omega)
        for one_near, one_far in zip(near, far, strict=True):
            gradient = one_near.T @ one_far
            total += gradient @ (gradient.T @ omega)
        return total
    inner = near @ omega
    if through_kernel <= through_factors:
        inner = torch.bmm(torch.bmm(far, far.mT), inner)
    else:
        inner = torch.bmm(far, torch.bmm(far.mT, inner))
    return near.flatten(0, 1).T @ inner.flatten(0, 1)


def gram_trace(near: Tensor, far: Tensor, unit: str) -> Tensor:
    """Σ_i ‖X_iᵀ Y_i‖_F² over a batch, scalar; arguments as in :func:`gram_product`."""
    t = near.shape[1]
    if unit == "token" or t == 1:
        return (near.square().sum(2) * far.square().sum(2)).sum()
    if t * (near.shape[2] + far.shape[2]) <= near.shape[2] * far.shape[2]:
        return (torch.bmm(near, near.mT) * torch.bmm(far, far.mT)).sum()
    return torch.stack([(x.T @ y).square().sum() for x, y in zip(near, far, strict=True)]).sum()
