"""One forward and backward pass that hands every named layer's inputs and output gradients to a reader.

The only module that touches autograd hooks. No weight gradient is ever formed: every parameter is frozen for the
duration, and the first captured outputs become the leaves of the graph, so that back-propagation stops there.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fishergeo.losses import Objective

LayerFilter = str | Sequence[str] | Callable[[str, nn.Module], bool] | None


@dataclass(frozen=True)
class Record:
    """What one layer did on one batch.

    Attributes:
        name: of the module.
        inputs: (n, T, q), zero at padding; the model's dtype.
        gradients: (n, T, p), of the batch's summed objective with respect to the layer's outputs; zero at padding.
        mask: (n, T) bool, False at padding, or None where every position counts.
        source: equal for layers that read the very same input tensor in this batch, such as q, k and v.
    """

    name: str
    inputs: Tensor
    gradients: Tensor
    mask: Tensor | None
    source: int


def select_layers(model: nn.Module, layers: LayerFilter = None) -> dict[str, nn.Module]:
    """Modules by name, in the model's order.

    Args:
        model: any module.
        layers: names, globs (``"*.q_proj"``), one of either, or a predicate ``(name, module) -> bool``. None takes
            every ``nn.Linear`` except the output embedding (a p of vocabulary size) and the two halves of LoRA.

    Returns:
        name -> module, never empty.

    Raises:
        ValueError: if a pattern matches nothing, with the pattern and some of the names there are, or if a chosen
            module is of a kind that cannot be captured.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if isinstance(model, nn.Linear):
        modules = {"": model, **modules}
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    if layers is None:
        head = None
        with contextlib.suppress(Exception):
            head = model.get_output_embeddings()  # type: ignore[operator]
        chosen = [
            name
            for name in linear
            if modules[name] is not head and not any(part.startswith("lora_") for part in name.split("."))
        ]
        if not chosen:
            raise ValueError(f"layers=None: {type(model).__name__} has no nn.Linear; name the layers to capture")
    elif callable(layers):
        chosen = [name for name, module in modules.items() if layers(name, module)]
        if not chosen:
            raise ValueError(f"layers: the predicate accepts no module; there are {_some(linear)}")
    else:
        patterns = [layers] if isinstance(layers, str) else list(layers)
        if not patterns:
            raise ValueError(f"layers is empty; there are {_some(linear)}")
        wanted: set[str] = set()
        for pattern in patterns:
            if pattern in modules:
                wanted.add(pattern)
                continue
            hits = [name for name in modules if fnmatch.fnmatchcase(name, pattern) and _supported(modules[name])]
            if not hits:
                raise ValueError(
                    f"layers: {pattern!r} matches no layer that can be captured; there are {_some(linear)}"
                )
            wanted.update(hits)
        chosen = [name for name in modules if name in wanted]
    for name in chosen:
        if not _supported(modules[name]):
            kind = type(modules[name]).__name__
            raise ValueError(f"layers: {name!r} is a {kind}, whose curvature is not known here; take nn.Linear")
    return {name: modules[name] for name in chosen}


def _supported(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_transposed_linear(module)


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether a module is GPT-2's Conv1D: a linear map whose weight is stored (q, p)."""
    return type(module).__name__ == "Conv1D" and getattr(module, "weight", torch.empty(0)).ndim == 2


def layer_shape(module: nn.Module) -> tuple[int, int]:
    """(p, q), outputs and inputs, of a captured layer's weight."""
    rows, columns = module.weight.shape  # type: ignore[misc,union-attr]
    return (columns, rows) if is_transposed_linear(module) else (rows, columns)  # type: ignore[return-value]


def _some(names: Sequence[str], most: int = 6) -> str:
    shown = ", ".join(names[:most]) or "no nn.Linear at all"
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


@dataclass
class _Layer:
    """The calls of one layer in the present batch."""

    expected: int = 0
    arrived: list[tuple[Tensor, Tensor, int]] = field(default_factory=list)


class Capture:
    """Context in which :meth:`pass_over` may be called; on leaving it the model is exactly as it was.

    Inside, every parameter is frozen (no ``.grad`` is written), every module is in eval mode, and the default random
    generators are forked.

    Args:
        model: any module.
        layers: name -> module, from :func:`select_layers`.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self.model = model
        self.layers = dict(layers)
        self._stack = contextlib.ExitStack()
        self._calls: dict[str, _Layer] = {}
        self._sources: dict[int, tuple[Tensor, int]] = {}
        self._in_backward = False
        self._deliver: Callable[[str], None] = lambda name: None

    def __enter__(self) -> Capture:
        parameters = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        modes = [(module, module.training) for module in self.model.modules()]

        def restore() -> None:
            for parameter, flag in parameters:
                parameter.requires_grad_(flag)
            for module, mode in modes:
                module.training = mode

        self._stack.callback(restore)
        devices = sorted({p.device.index or 0 for p, _ in parameters if p.device.type == "cuda"})
        self._stack.enter_context(torch.random.fork_rng(devices=devices))
        self._stack.enter_context(torch.enable_grad())
        for parameter, _ in parameters:
            parameter.requires_grad_(False)
        self.model.eval()
        for name, module in self.layers.items():
            handle = module.register_forward_hook(self._forward_hook(name))
            self._stack.callback(handle.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._calls.clear()
        self._sources.clear()
        self._stack.close()

    def _forward_hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            state = self._calls.setdefault(name, _Layer())
            if not self._in_backward:
                state.expected += 1
            if not torch.is_grad_enabled():  # the first, graph-less run of a re-entrant checkpoint
                return None
            source = inputs[0]
            # The tensor is kept, so its id stays its own until the batch is done.
            self._sources.setdefault(id(source), (source, source._version))
            leaf = None if output.requires_grad else output.detach().requires_grad_(True)
            watched = output if leaf is None else leaf

            def gradient_hook(gradient: Tensor) -> None:
                kept, version = self._sources[id(source)]
                if kept._version != version:
                    raise RuntimeError(f"layer {name!r}: its input was modified in place after the layer read it")
                state.arrived.append((source.detach(), gradient.detach(), id(source)))
                if len(state.arrived) == state.expected:
                    self._deliver(name)

            watched.register_hook(gradient_hook)
            # A leaf may not be modified in place by what follows, a copy of it may.
            return None if leaf is None else leaf.clone()

        return hook

    def pass_over(
        self,
        objective: Callable[[], Objective],
        read: Callable[[Record], None],
        mask: Tensor | None = None,
        scale: Callable[[Objective], Tensor] | None = None,
    ) -> Objective:
        """Runs one batch forward and backward; hands each layer's record to ``read`` as soon as it is complete.

        Args:
            objective: runs the model, returns the n objectives.
            read: called once a layer, in the order in which gradients arrive.
            mask: (n, T) bool or None: positions that are not padding.
            scale: (n,) factors on the objectives' gradients; ones if None.

        Returns:
            The objective, detached.
        """
        self._calls = {}
        self._sources = {}
        try:
            result = objective()
            examples = len(result.values)
            counted = result.counts > 0
            if not bool(torch.isfinite(result.values).all()):
                raise FloatingPointError("the objective is not finite")

            def deliver(name: str) -> None:
                state = self._calls.pop(name)
                inputs, gradients, source = state.arrived[0]
                a, g = _by_example(name, inputs, examples, mask), _by_example(name, gradients, examples, mask)
                valid = None if mask is None or mask.shape != a.shape[:2] else mask
                if len(state.arrived) > 1:  # called several times: the gradients of the calls add up, so tokens join
                    a = torch.cat([_by_example(name, x, examples, mask) for x, _, _ in state.arrived], 1)
                    g = torch.cat([_by_example(name, y, examples, mask) for _, y, _ in state.arrived], 1)
                    valid = None if valid is None else torch.cat([valid] * len(state.arrived), 1)
                    source = -hash((name, source))
                if not bool(counted.all()):
                    valid = counted[:, None] & (
                        torch.ones_like(a[..., 0], dtype=torch.bool) if valid is None else valid
                    )
                if valid is not None:
                    # torch.where, not a product: what stands at padding may be NaN.
                    a = torch.where(valid[..., None], a, 0)
                    g = torch.where(valid[..., None], g, 0)
                read(Record(name, a, g, valid, source))

            self._deliver = deliver
            root = result.values if scale is None else result.values * scale(result)
            if not root.requires_grad:
                raise ValueError(
                    "the objective does not depend on any captured layer; were the layers run under torch.no_grad or "
                    "a re-entrant checkpoint? (use_reentrant=False works)"
                )
            self._in_backward = True
            root.sum().backward()
            for name in [name for name, state in self._calls.items() if state.arrived]:
                deliver(name)
            return Objective(result.values.detach(), result.counts)
        finally:
            self._in_backward = False
            self._calls = {}
            self._sources = {}


def _by_example(name: str, tensor: Tensor, examples: int, mask: Tensor | None) -> Tensor:
    """(n, T, width) whatever the layer's own leading shape."""
    width = tensor.shape[-1]
    if tensor.shape[0] == examples:
        return tensor.reshape(examples, -1, width)
    if tensor.ndim == 2 and mask is not None and tensor.shape[0] == mask.numel():
        return tensor.reshape(examples, -1, width)
    raise ValueError(
        f"layer {name!r} saw a tensor of shape {tuple(tensor.shape)} in a batch of {examples} examples: its rows "
        "cannot be told apart by example (a routed expert, perhaps); leave it out of layers"
    )


def padding_mask(batch: Any) -> Tensor | None:
    """(n, T) bool from a batch's two-dimensional ``attention_mask``, None where nothing is padded."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    mask = mask.bool()
    return None if bool(mask.all()) else mask


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on ``device``; mappings, lists and tuples are walked."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


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
