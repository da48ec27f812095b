"""One forward and backward pass that hands every chosen layer's inputs and output gradients to a reader.

The only module that touches autograd hooks. No weight gradient is ever formed: every parameter is frozen for the
duration, and the first captured outputs become the leaves of the graph, so that back-propagation stops there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fishergeo.capture.at_rest import at_rest, check_runnable, differentiate, unaliased
from fishergeo.capture.batches import lengths_of
from fishergeo.capture.kinds import attention
from fishergeo.capture.kinds.experts import watched
from fishergeo.capture.kinds.kind import Call, first_input
from fishergeo.capture.kinds.known import Embedding
from fishergeo.capture.layers import Layer, Use
from fishergeo.capture.objectives.by_kind import Objective
from fishergeo.capture.records import Arrived, BatchShape, Record, Sources, record_of


@dataclass
class _Site:
    """A module (or one expert of it) and its calls in the present batch."""

    name: str
    use: Use  # of the first layer that reads it; which way round is each layer's own
    layers: list[Layer] = field(default_factory=list)
    expected: int = 0
    graphless: int = 0
    waiting: int = 0
    arrived: list[Arrived] = field(default_factory=list)

    def clear(self) -> None:
        self.expected = self.graphless = 0
        self.waiting = len(self.layers)
        self.arrived = []

    @property
    def names(self) -> set[str]:
        return {layer.name for layer in self.layers}

    def complete(self) -> bool:
        return len(self.arrived) >= self.expected


class Capture:
    """Context in which :meth:`pass_over` may be called; on leaving it the model is exactly as it was.

    Inside, every parameter is frozen (no ``.grad`` is written), every module is in eval mode, and the default random
    generators are forked. Activation checkpointing, bfloat16 and FSDP2 (``fully_shard``) need nothing special: only
    activations and their gradients are read. The inputs of the chosen layers are held until their gradients come, so
    a checkpoint that is not re-entrant saves the memory of other activations only.

    A parameter that some module reads without being called (``functional.linear(x, self.other.weight)``) is seen only
    where its own modules are called.

    Args:
        model: any module.
        layers: name -> layer, from :func:`select_layers`.

    Attributes:
        called: paths of the modules that were called in any batch so far.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, Layer]) -> None:
        self.model = model
        self.layers = dict(layers)
        self._stack = contextlib.ExitStack()
        self._sites: dict[tuple[Any, ...], _Site] = {}
        self._sites_of: dict[str, list[_Site]] = {}
        for name, layer in self.layers.items():
            self._sites_of[name] = []
            for use in layer.uses:
                expert = layer.expert
                key = (use.path,) if expert is None else (use.path, expert.parameter, expert.index)
                site = self._sites.setdefault(key, _Site(".".join(map(str, key)), use))
                site.layers.append(layer)
                self._sites_of[name].append(site)
        self._notes: dict[str, Any] = {}
        self._sources = Sources()
        self._leaves: list[Tensor] = []
        self._lengths: set[tuple[int, int]] = set()
        self._ran: dict[str, int] = {}  # modules of experts -> the tokens that they chose for
        self._delivered: set[str] = set()
        self.called: set[str] = set()
        self._shared: dict[str, bool] = {}  # embeddings of ids (T,) or (n,), of which they are known to be
        self._in_backward = False
        self._deaf = False
        self._deliver: Callable[[Layer], None] | None = None

    def __enter__(self) -> Capture:
        check_runnable(self.model)
        for module in self.model.modules():
            # FSDP2 sets itself up at its first forward, from the parameters that are trainable then, and after a
            # forward without a backward it may be left gathered: both must happen before anything is frozen.
            unshard, reshard = getattr(module, "unshard", None), getattr(module, "reshard", None)
            if callable(unshard) and callable(reshard):
                unshard()
                reshard()
        self._stack.enter_context(at_rest(self.model))
        self._stack.enter_context(torch.enable_grad())
        captured = {site.use.module for site in self._sites.values()}
        for path, module in list(self.model.named_modules()):
            parts = attention.projections(module)
            own = {module.out_proj, *(p for p in captured if getattr(p, "attention", None) is module)} if parts else ()
            if not captured.isdisjoint(own):
                self._stack.enter_context(attention.watched(path, module, captured, lambda: self._deaf))
        handles = [self.model.register_forward_pre_hook(self._note_lengths, with_kwargs=True)]
        for key, site in self._sites.items():
            if len(key) == 1:
                # Before the user's own hooks, which may give the output another value.
                hook = self._forward_hook(site)
                handles.append(site.use.module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        for handle in handles:
            self._stack.callback(handle.remove)
        for path in dict.fromkeys(key[0] for key in self._sites if len(key) == 3):
            names = dict.fromkeys(key[1] for key in self._sites if len(key) == 3 and key[0] == path)
            module = self._sites[next(key for key in self._sites if len(key) == 3 and key[0] == path)].use.module
            self._stack.enter_context(watched(path, module, list(names), self._expert_observer(path)))
        return self

    def __exit__(self, *error: object) -> None:
        self._forget()
        self._stack.close()

    @contextlib.contextmanager
    def deaf(self) -> Iterator[None]:
        """Within, the model may be run and differentiated without anything being captured."""
        self._deaf = True
        try:
            yield
        finally:
            self._deaf = False

    def _forget(self) -> None:
        for site in self._sites.values():
            site.clear()
        self._sources = Sources()
        self._leaves.clear()
        self._lengths.clear()
        self._ran.clear()
        self._delivered.clear()
        self._in_backward = False
        # It refers back to this object and to what reads the records: a cycle, which would keep their sums in memory
        # until the garbage collector happens to come.
        self._deliver = None

    def _note_lengths(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._lengths |= lengths_of(args, kwargs)

    def _layout(self, examples: int, mask: Tensor | None, targets: Tensor | None, counted: Tensor | None) -> BatchShape:
        lengths = {length for first, length in self._lengths if first == examples}
        known = {each.shape[1] for each in (mask, targets) if each is not None}
        return BatchShape(examples, mask, targets, counted, frozenset(lengths | known))

    def _forward_hook(self, site: _Site) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            kind = site.use.kind
            assert kind is not None
            if self._deaf:
                return output
            if torch._C._functorch.maybe_current_level() is not None:
                raise ValueError(
                    f"layer {site.name!r} runs under torch.func (vmap, grad or the like), where its gradient cannot be "
                    "read; write the loss without it, or leave the layer out"
                )
            self.called.add(site.use.path)
            if not isinstance(output, Tensor):
                raise ValueError(
                    f"layers: {site.use.path!r} is a {type(module).__name__} that gives a {type(output).__name__}, not a "
                    "tensor; leave it out of layers"
                )
            if site.use.path not in self._notes:
                self._notes[site.use.path] = kind.examine(site.use.path, module, args, kwargs)
            source = self._sources.of(first_input(args, kwargs), type(kind).__name__, *kind.geometry(module))
            note = self._notes[site.use.path]
            if isinstance(kind, Embedding):
                output = self._each_its_own(site.use.path, first_input(args, kwargs), output)
            return self._observe(
                site,
                output,
                args,
                kwargs,
                lambda gradient: Arrived(site.use.path, Call(args, kwargs, gradient, note), source),
            )

        return hook

    def _each_its_own(self, path: str, ids: Tensor, output: Tensor) -> Tensor:
        """An embedding of positions (T,) or (1, T) that all examples share, repeated for each of them.

        The model broadcasts it in any case; done here, every example has a gradient of its own.
        """
        examples = {first for first, _ in self._lengths} - {1}
        if len(examples) != 1:
            return output
        (n,) = examples
        known = {length for first, length in self._lengths if first == n}
        shared = ids.ndim == 2 and len(ids) == 1 and ids.shape[1] in known
        if ids.ndim == 1 and len(ids) in {n, *known}:
            if len(ids) != n or n not in known:
                self._shared[path] = len(ids) != n
            elif path not in self._shared and torch.equal(ids, torch.arange(n, device=ids.device)):
                raise ValueError(
                    f"layer {path!r} reads the ids 0 to {n - 1} in a batch of {n} examples of {n} positions, which may stand "
                    "for either; begin with a batch of other sizes, or give it ids of shape (1, T)"
                )
            shared = self._shared.get(path, False)
        return output.expand(n, *output.shape[-2:]) if shared else output

    def _expert_observer(self, path: str) -> Callable[[str, int, Tensor, Tensor, int, Tensor], Tensor]:
        def observe(parameter: str, expert: int, rows: Tensor, tokens: Tensor, total: int, output: Tensor) -> Tensor:
            self._ran[path] = total
            site = self._sites.get((path, parameter, expert))
            if site is None or self._deaf:
                return output
            source = self._sources.fresh()
            return self._observe(
                site,
                output,
                (rows,),
                {},
                lambda gradient: Arrived(site.use.path, Call((rows,), {}, gradient), source, tokens, total),
            )

        return observe

    def _observe(
        self,
        site: _Site,
        output: Tensor,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        arrive: Callable[[Tensor], Arrived],
    ) -> Tensor:
        """Waits for the gradient of one call's output; returns the output to go on with."""
        if not self._in_backward:
            site.expected += 1
        if not torch.is_grad_enabled():  # the first, graph-less run of a re-entrant checkpoint
            site.graphless += not self._in_backward
            return output
        leaf = None if output.requires_grad else output.detach().requires_grad_(True)
        # In backward a checkpoint runs the module again. A re-entrant one differentiates that run; the other kind
        # only takes saved tensors from it, and the gradient comes to the output of the first run.
        replay = self._in_backward and site.graphless == 0
        if not replay:
            site.graphless -= self._in_backward
            shape = output.shape
            inputs = [(x, x._version) for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]

            def gradient_hook(gradient: Tensor) -> None:
                if not self._in_backward:
                    raise RuntimeError(
                        f"layer {site.name!r}: the loss differentiates inside (torch.autograd.grad or backward), before the "
                        "pass that is captured; its gradient by this layer has a part that no output's gradient shows. "
                        "Leave the layer out, or write the derivative in the loss by hand"
                    )
                if any(x._version != version for x, version in inputs):
                    raise RuntimeError(f"layer {site.name!r}: its input was modified in place after the layer read it")
                site.arrived.append(arrive(gradient.detach().reshape(shape)))
                if site.complete():
                    for layer in site.layers:
                        if all(other.complete() for other in self._sites_of[layer.name]):
                            assert self._deliver is not None
                            self._deliver(layer)

            (unaliased(output) if leaf is None else leaf).register_hook(gradient_hook)
        if leaf is not None and not self._in_backward:
            self._leaves.append(leaf)
        # A leaf may not be modified in place by what follows, a copy of it may.
        return output if leaf is None else leaf.clone()

    def pass_over(
        self,
        objective: Callable[[], Objective],
        read: Callable[[Record], None],
        mask: Tensor | None = None,
        scale: Callable[[Objective], Tensor] | None = None,
        targets: Tensor | None = None,
        leaves: Collection[Tensor] = (),
    ) -> Objective:
        """Runs one batch forward and backward; hands each layer's record to ``read`` as soon as it is complete.

        Args:
            objective: runs the model, returns the n objectives.
            read: called once a layer, in the order in which gradients arrive; experts that no token chose come last,
                with records of zeros.
            mask: (n, T) bool or None: positions that are not padding.
            scale: (n,) factors on the objectives' gradients; ones if None.
            targets: (n, T) bool or None: positions of a decoder beside an encoder that are not padding.
            leaves: further tensors whose ``.grad`` is wanted; nothing else has one written.

        Returns:
            The objective, detached.

        Raises:
            FloatingPointError: if the objective is not finite.
            ValueError: if it depends on no chosen layer, or a layer's rows cannot be told apart by example.
            RuntimeError: if a layer's input was modified in place, or a layer ran without a graph.
        """
        self._forget()
        try:
            result = objective()
            if not bool(torch.isfinite(result.values).all()):
                raise FloatingPointError("the objective is not finite")
            counted = result.counts > 0
            layout = self._layout(len(result.values), mask, targets, None if bool(counted.all()) else counted)

            @torch.no_grad()
            def deliver(layer: Layer) -> None:
                self._delivered.add(layer.name)
                arrivals = [one for site in self._sites_of[layer.name] for one in site.arrived]
                routed = max(self._ran.get(use.path, 0) for use in layer.uses)
                read(record_of(layer, arrivals, layout, self._sources, routed))
                for site in self._sites_of[layer.name]:
                    site.waiting -= 1
                    if site.waiting == 0:  # the last layer that reads them
                        site.arrived.clear()

            self._deliver = deliver
            root = result.values if scale is None else result.values * scale(result)
            if not root.requires_grad and not self._ran:  # of experts, perhaps none that is captured was chosen
                raise ValueError(
                    "the objective does not depend on any captured layer; were the layers run under torch.no_grad or "
                    "a re-entrant checkpoint? (use_reentrant=False works)"
                )
            self._in_backward = True
            if root.requires_grad:
                differentiate(root.sum(), [*self._leaves, *leaves])
            for site in self._sites.values():
                if site.graphless > 0 and not site.arrived and not self._delivered.intersection(site.names):
                    raise RuntimeError(
                        f"layer {site.name!r} ran without a graph: under torch.no_grad, or in a re-entrant checkpoint "
                        "none of whose inputs needs a gradient (use_reentrant=False works)"
                    )
            for layer in self.layers.values():
                if layer.name not in self._delivered and (
                    any(site.arrived for site in self._sites_of[layer.name])
                    or (layer.expert is not None and layer.uses[0].path in self._ran)
                ):
                    deliver(layer)
            return Objective(result.values.detach(), result.counts)
        finally:
            self._forget()
