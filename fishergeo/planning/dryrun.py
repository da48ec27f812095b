"""Code run on tensors without storage, and what it would have taken: bytes alive at once and arithmetic.

Nothing is computed. Where a program asks a tensor for a value, the answer is the ordinary one: checks pass, LAPACK
reports success, a mask lets everything through.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


class Meter(TorchDispatchMode):
    """Counts bytes of storages born while it is on, and the arithmetic of products, convolutions and attention.

    Attributes:
        live: bytes alive now.
        peak: the most that were alive at once.
        flops: multiplications and additions. Decompositions (QR, Cholesky, eigh) are not counted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self.flops = 0
        self._born: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = {t.untyped_storage() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = _answer(func, args, kwargs)
        out = func(*args, **kwargs) if out is None else out
        self.flops += self._count(func, args, kwargs, out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in known and storage not in self._born:
                    self._born.add(storage)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._die, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _die(self, size: int) -> None:
        self.live -= size

    @staticmethod
    def _count(func: Any, args: Any, kwargs: Any, out: Any) -> int:
        packet = getattr(func, "_overloadpacket", None)
        name = str(packet)
        if name == "aten._scaled_dot_product_flash_attention_for_cpu":  # torch counts those of other devices only
            return sdpa_flop_count(*(t.shape for t in args[:3]))
        if name == "aten._scaled_dot_product_flash_attention_for_cpu_backward":
            return sdpa_backward_flop_count(*(t.shape for t in args[:4]))
        formula = flop_registry.get(packet)
        if formula is None and name.startswith("aten.") and name.endswith("_"):  # in place: its functional twin's
            formula = flop_registry.get(getattr(torch.ops.aten, name[5:-1], None))
        return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def _answer(func: Any, args: Any, kwargs: Any) -> Any:
    """The ordinary outcome of an operation whose outcome depends on values; None for any other operation."""
    if func is torch.ops.aten._local_scalar_dense.default:
        dtype = args[0].dtype
        if dtype == torch.bool:
            return True
        if dtype == torch.int32:
            return 0  # the error code of LAPACK
        return 1.0 if dtype.is_floating_point else 1
    if func is torch.ops.aten.bincount.default:
        return args[0].new_empty((kwargs or {}).get("minlength", args[2] if len(args) > 2 else 1))
    if func is torch.ops.aten.index.Tensor and len(args[1]) == 1 and args[1][0].dtype == torch.bool:
        return args[0].flatten(0, args[1][0].ndim - 1).clone()
    return None


class _Numpy(TorchFunctionMode):
    """NumPy copies of blank tensors are zeros."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "numpy":
            return np.zeros(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


class DryRun:
    """A copy of a model without storage, and a place to run code on it.

    Args:
        model: any module, on any device; one on the meta device is planned as if on the CPU. Not changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        memo: dict[int, Any] = {}  # by identity, as deepcopy asks for
        with self._mode:
            for tensor in [*model.parameters(), *model.buffers()]:
                blank = self.blank(tensor)
                is_parameter = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(blank, tensor.requires_grad) if is_parameter else blank
        # Parameters are found in the memo, so that only the modules around them are copied.
        self.model: nn.Module = copy.deepcopy(model, memo)

    def blank(self, tensor: Tensor) -> Tensor:
        """A tensor like this one without storage."""
        device = torch.device("cpu") if tensor.device.type == "meta" else tensor.device
        with self._mode:
            return torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device=device)

    @contextmanager
    def metered(self) -> Iterator[Meter]:
        """Code inside runs on blank tensors and is metered.

        Raises:
            ValueError: if the code's shapes depend on values in a way that is not known here.
        """
        meter = Meter()
        with ExitStack() as stack:
            # Cyclic garbage would die at a moment of Python's choosing, and the peak would be another at every call.
            if gc.isenabled():
                gc.disable()
                stack.callback(gc.enable)
            stack.enter_context(self._mode)
            stack.enter_context(_Numpy())
            stack.enter_context(meter)
            try:
                yield meter
            except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
                raise ValueError(
                    f"cannot plan this model or loss: its shapes or its course depend on values ({error}); "
                    "estimate on one batch and measure instead"
                ) from error


def walk(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The batch with every tensor in it changed; dicts, lists and tuples are walked."""
    if isinstance(batch, Tensor):
        return change(batch)
    if hasattr(batch, "items"):
        return {key: walk(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(walk(value, change) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(walk(value, change) for value in batch)
    return batch
