"""A model while it is captured: frozen, in eval mode, on plain paths; and afterwards exactly as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_AUTOCAST_DEVICES = ("cpu", "cuda")


def check_runnable(model: nn.Module) -> None:
    """Refuses what no gradient can be had of, whatever the data.

    Raises:
        ValueError: for a model on the meta device, or of inference tensors.
        RuntimeError: under torch.inference_mode.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "called under torch.inference_mode, in which nothing has a gradient; call it outside (torch.no_grad is fine)"
        )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"parameter {name!r} is on the meta device and has no values; load the model first, or ask fishergeo.plan "
                "what an estimate will cost"
            )
        if parameter.is_inference():
            raise ValueError(
                f"parameter {name!r} was made under torch.inference_mode; make or load the model outside it"
            )


@contextlib.contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Within, every parameter is frozen and every module in eval mode; random states are forked.

    Modules with a ``train`` or ``eval`` of their own (LoRA that is merged by it) are put back by it, and their own
    parameters and buffers to the bit.
    """
    parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    acting = [module for module, _ in modes if _acts(module)]
    kept = [
        (store, name, tensor, tensor.detach().clone())
        for module in acting
        for store in (module._parameters, module._buffers)
        for name, tensor in store.items()
        if tensor is not None
    ]

    def restore() -> None:
        for parameter, flag in parameters:
            parameter.requires_grad_(flag)
        for module, mode in modes if acting else []:
            if module.training != mode and (_acts(module) or module is model):
                module.train(mode)
        for module, mode in modes:
            module.training = mode
        for store, name, tensor, values in kept:
            store[name] = tensor  # type: ignore[assignment]
            if not torch.equal(tensor, values):
                tensor.data.copy_(values)

    devices = sorted({p.device.index or 0 for p, _ in parameters if p.device.type == "cuda"})
    # Fast paths of attention call no layer of theirs and make nested tensors, which have no rows to capture.
    fast = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        stack.callback(restore)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(torch.random.fork_rng(devices=devices))
        for parameter, _ in parameters:
            parameter.requires_grad_(False)
        model.eval()
        yield


def _acts(module: nn.Module) -> bool:
    """Whether its train or eval do more than set the mode."""
    kind = type(module)
    return kind.train is not nn.Module.train or kind.eval is not nn.Module.eval


@contextlib.contextmanager
def unstepped(model: nn.Module) -> Iterator[None]:
    """Within, parametrised weights may be read: in training mode a spectral norm takes a step whenever one is."""
    modes = [
        (module, module.training)
        for each in model.modules()
        if isinstance(each, parametrize.ParametrizationList)
        for module in each.modules()
    ]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def differentiate(root: Tensor, leaves: Collection[Tensor]) -> None:
    """Back-propagates a scalar to these leaves; any other that it depends on keeps its ``.grad``, and its hooks are not called.

    ``backward(inputs=...)`` would do it, but that is closed to re-entrant checkpoints, and passes over outputs that hang on
    leaves of others alone.

    Args:
        root: scalar with a graph.
        leaves: those whose gradients are wanted.
    """
    wanted = {id(leaf) for leaf in leaves}
    others: list[Tensor] = []
    seen = {root.grad_fn}
    waiting = [root.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if isinstance(node, torch._C._functions.AccumulateGrad):  # type: ignore[attr-defined]
            if id(node.variable) not in wanted:
                others.append(node.variable)
            continue
        fresh = {after for after, _ in node.next_functions} - seen
        seen |= fresh
        waiting += fresh
    before = [tensor.grad for tensor in others]
    hooks = [each for t in others for each in (t._backward_hooks, t._post_accumulate_grad_hooks) if each]
    kept = [dict(each) for each in hooks]
    for each in hooks:
        each.clear()
    for tensor in others:
        tensor.grad = None
    # They go on requiring gradients, on which it hangs what a checkpoint saves when it runs again.
    handles = [tensor.register_post_accumulate_grad_hook(_drop) for tensor in others]
    try:
        root.backward()
    finally:
        for handle in handles:
            handle.remove()
        for tensor, gradient in zip(others, before, strict=True):
            tensor.grad = gradient
        for each, calls in zip(hooks, kept, strict=True):
            each.update(calls)


def _drop(leaf: Tensor) -> None:
    leaf.grad = None


class Autocast:
    """Autocast as it is where this is made: for the model it is, for sums it must not be.

    Attributes:
        on: whether it is on for some device.
    """

    def __init__(self) -> None:
        self._dtypes = {
            device: torch.get_autocast_dtype(device)
            for device in _AUTOCAST_DEVICES
            if torch.is_autocast_enabled(device)
        }
        self.on = bool(self._dtypes)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Within, it is off."""
        with contextlib.ExitStack() as stack:
            for device in self._dtypes:
                stack.enter_context(torch.autocast(device, enabled=False))
            yield

    @contextlib.contextmanager
    def resumed(self) -> Iterator[None]:
        """Within, it is as it was."""
        with contextlib.ExitStack() as stack:
            for device, dtype in self._dtypes.items():
                stack.enter_context(torch.autocast(device, dtype=dtype))
            yield


def unaliased(output: Tensor) -> Tensor:
    """The tensor of which an output is a mere reshape, itself if there is none.

    A change in place replaces the output's node in the graph by another, and a hook on it is lost; the base's node stays
    and has the same gradient, of what the layer gave before the change.
    """
    base = output._base
    plain = base is not None and base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous()
    return base if base is not None and plain and base.grad_fn is not None else output
