"""What is refused of a model before its ΔW is read: parameters that are not there, and parameters that do not train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from alignguard.updates.matrices import Matrix

ADVICE = "take data parallel (DDP, ZeRO-2), or shard with FSDP2 (fsdp_version: 2)"


def check_parameters(model: nn.Module) -> None:
    """Refuse a model whose parameters are placeholders outside its forward pass.

    Raises:
        ValueError: FSDP1, whose flat parameters hold no matrices, or ZeRO-3, whose gather has no gradient.
    """
    for name, module in model.named_modules():
        if _is_fsdp1(module):
            raise ValueError(
                f"{name or 'the model'} is wrapped by FSDP1: outside its forward pass its weights are pieces of a flat "
                f"tensor, from which no ΔW can be read with a gradient; {ADVICE}"
            )
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise ValueError(
                f"{name} is partitioned by DeepSpeed ZeRO-3: outside the forward pass it is empty, and gathering it has "
                f"no gradient, so the penalty cannot be charged; {ADVICE}"
            )


def _is_fsdp1(module: nn.Module) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel

    return isinstance(module, FullyShardedDataParallel)


def check_plugins(state: Any) -> None:
    """Refuse an accelerate configuration that would spread the parameters so, before the model is wrapped.

    Args:
        state: ``accelerator.state``.

    Raises:
        ValueError: as :func:`check_parameters`.
    """
    sharded = getattr(state, "fsdp_plugin", None)
    if sharded is not None and sharded.fsdp_version == 1:
        raise ValueError(
            "the guard does not run under FSDP1 (fsdp_version: 1): outside the forward pass weights are pieces of a flat "
            f"tensor, from which no ΔW can be read with a gradient; {ADVICE}"
        )
    zero = getattr(state, "deepspeed_plugin", None)
    if zero is not None and int(zero.zero_stage) == 3:
        raise ValueError(
            "the guard does not run under DeepSpeed ZeRO-3: outside the forward pass parameters are empty, and gathering "
            f"them has no gradient, so the penalty cannot be charged; {ADVICE}"
        )


def check_trained(matrices: Iterable[Matrix], model: nn.Module) -> None:
    """Refuse a guard whose ΔW is not made of the weights that a trainer trains: it would read zero to the end.

    Parameters are compared, not models, so that one model in several wrappers passes and a copy does not.

    Args:
        matrices: guarded by the guard.
        model: whose parameters the trainer gives its optimizer.

    Raises:
        ValueError: ΔW of no matrix depends on what trains, or that of some matrix on weights that do not.
    """
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    for matrix in matrices:
        read = {id(leaf) for leaf in _leaves(matrix.read())}
        if not read:
            raise ValueError(
                f"the guard charges {matrix.name}, whose weights are frozen, so nothing there would train; load an "
                "adapter with PeftModel.from_pretrained(..., is_trainable=True), or call model.set_adapter(name)"
            )
        if not read <= trained:
            raise ValueError(
                f"the guard was made on another model than the trainer trains: {matrix.name} is not among its trained "
                "weights, and the penalty would stay zero; make the guard on the very model that the trainer is given "
                "(with model_init, one that returns that model; with peft_config, call get_peft_model first)"
            )


def _leaves(update: Any) -> Iterator[Tensor]:
    """The parameters that an update is computed from."""
    tensors = [update] if isinstance(update, Tensor) else [update.left, update.right]
    nodes = [tensor.grad_fn for tensor in tensors]
    yield from (tensor for tensor in tensors if tensor.grad_fn is None and tensor.requires_grad)
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        nodes += [parent for parent, _ in node.next_functions]
