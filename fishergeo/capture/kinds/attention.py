"""nn.MultiheadAttention by its own formula, so that its projections are calls of modules.

torch computes it in one function that reads every weight and calls nothing. Here the same formula calls its input
projections, made up as modules, and its own ``out_proj``; batches come first in both, whatever ``batch_first`` says.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fishergeo.capture.kinds.kind import tolerance

_WEIGHTS = {
    "in_proj": "in_proj_weight",
    "q_proj": "q_proj_weight",
    "k_proj": "k_proj_weight",
    "v_proj": "v_proj_weight",
}
_BIAS = "in_proj_bias"


class Projection(nn.Linear):
    """An input projection of an attention, which has no module for it.

    Its weight is None where it is the common bias of three weights, which it then gives for every position.

    Attributes:
        role: ``"in_proj"``, ``"q_proj"``, ``"k_proj"`` or ``"v_proj"``.
    """

    def __init__(self, attention: nn.MultiheadAttention, role: str) -> None:
        nn.Module.__init__(self)
        self.role = role
        self._owner = (attention,)  # in a tuple, so that it is no submodule
        self._attribute = _WEIGHTS[role]
        self.register_parameter("weight", attention._parameters.get(self._attribute))
        self.register_parameter("bias", attention._parameters.get(_BIAS) if role == "in_proj" else None)
        rows, columns = (3 * attention.embed_dim, 0) if self.weight is None else self.weight.shape
        self.out_features, self.in_features = rows, columns

    @property
    def attention(self) -> nn.MultiheadAttention:
        """The attention whose projection it is."""
        return self._owner[0]

    def forward(self, x: Tensor) -> Tensor:
        """(..., out), by the parameters that the attention has now."""
        weight = getattr(self.attention, self._attribute)
        bias = getattr(self.attention, _BIAS) if self.bias is not None else None
        if weight is None:
            return cast(Tensor, bias).expand(*x.shape[:-1], self.out_features)
        return functional.linear(x, weight, bias)


def projections(attention: nn.Module) -> dict[str, Projection]:
    """Role -> input projection; none for a module that is no attention, or computes something of its own."""
    if not isinstance(attention, nn.MultiheadAttention) or type(attention).forward is not nn.MultiheadAttention.forward:
        return {}
    stored = attention._parameters
    same = attention._qkv_same_embed_dim
    roles = ["in_proj"] if same else ["q_proj", "k_proj", "v_proj"]
    linear = type(attention.out_proj).forward is nn.Linear.forward
    if "forward" in attention.__dict__ or not linear or any(stored.get(_WEIGHTS[role]) is None for role in roles):
        return {}
    if not same and stored.get(_BIAS) is not None:
        roles.append("in_proj")
    return {role: Projection(attention, role) for role in roles}


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module of everything in a model, the input projections of its attentions before the ``out_proj``."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        found[path] = module
        found.update({f"{path}.{role}" if path else role: each for role, each in projections(module).items()})
    return found


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """Attribute -> parameter, without those that stand in the module's projections."""
    taken = {_BIAS, *_WEIGHTS.values()} if projections(module) else set()
    return {name: each for name, each in module._parameters.items() if each is not None and name not in taken}


@contextlib.contextmanager
def watched(
    path: str, attention: nn.MultiheadAttention, captured: Collection[nn.Module], deaf: Callable[[], bool]
) -> Iterator[None]:
    """Within, an attention calls these projections and its ``out_proj``.

    Args:
        path: its path, for errors.
        attention: itself.
        captured: modules, its projections among them.
        deaf: whether it shall compute as it always does.

    Raises:
        ValueError: in the forward, if its inputs have no batch or the formula's outputs are not its own, by name.
    """
    parts = projections(attention)
    parts.update({each.role: each for each in captured if isinstance(each, Projection) and each.attention is attention})
    original, seen = attention.forward, set()

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        inputs, masks = (query, key, value), (key_padding_mask, attn_mask)
        asked = (need_weights, average_attn_weights, is_causal)
        rest: tuple[Any, ...] = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if deaf():
            return original(*inputs, *rest)
        if any(x.is_nested or x.ndim != 3 for x in inputs):
            raise ValueError(
                f"layers: {path!r} is a MultiheadAttention that reads {query.ndim}-dimensional or nested inputs; only "
                "plain batches of sequences can be captured; leave its projections out of layers"
            )
        if attention.training and attention.dropout:
            raise ValueError(f"layers: {path!r} was put into training mode by the model, and drops out as it runs")
        output, weights = _attend(attention, parts, inputs, masks, asked)
        form = (*asked, query is key, key is value, *(None if m is None else (m.dtype, m.ndim) for m in masks))
        if form not in seen:
            with torch.no_grad():
                own = original(*inputs, *rest)
            if not _same(output, own[0]) or not _same(weights, own[1]):
                raise ValueError(
                    f"layers: {path!r} is a {type(attention).__name__} whose outputs are not those of the formula of "
                    "MultiheadAttention; leave its projections out of layers"
                )
            seen.add(form)
        return output, weights

    attention.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del attention.__dict__["forward"]


def _projected(
    attention: nn.MultiheadAttention, parts: Mapping[str, Projection], inputs: tuple[Tensor, ...]
) -> list[Tensor]:
    """Queries, keys and values (n, T, width). One call for each tensor that is read, with the rows of all projections."""
    width, calls = attention.embed_dim, dict[int, Tensor]()
    whole, result = parts.get("in_proj"), []
    for place, (role, x) in enumerate(zip(("q_proj", "k_proj", "v_proj"), inputs, strict=True)):
        if whole is not None and id(x) not in calls:
            calls[id(x)] = whole(x)
        common = None if whole is None else calls[id(x)][..., place * width : (place + 1) * width]
        one = parts[role](x) if role in parts else None
        result.append(cast(Tensor, common if one is None else one if common is None else one + common))
    return result


def _attend(
    attention: nn.MultiheadAttention,
    parts: Mapping[str, Projection],
    inputs: tuple[Tensor, ...],
    masks: tuple[Tensor | None, Tensor | None],
    asked: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor | None]:
    """The formula of torch, dropout off."""
    need_weights, average, causal = asked
    if not attention.batch_first:
        turned = {id(x): x.transpose(0, 1) for x in inputs}
        inputs = tuple(turned[id(x)] for x in inputs)
    q, k, v = _projected(attention, parts, inputs)
    n, length = q.shape[:2]
    padding, mask = (None if m is None else _added(m, q.dtype) for m in masks)
    if causal and mask is None:
        raise ValueError("Need attn_mask if specifying the is_causal hint.")
    causal = causal and padding is None and not need_weights
    if causal:
        mask = None
    if mask is not None:
        mask = mask[None, None] if mask.ndim == 2 else mask.reshape(n, -1, *mask.shape[1:])
    if padding is not None:
        mask = padding[:, None, None] if mask is None else mask + padding[:, None, None]
    more = []
    if attention.bias_k is not None:
        more.append((attention.bias_k.expand(n, -1, -1), cast(Tensor, attention.bias_v).expand(n, -1, -1)))
    if attention.add_zero_attn:
        more.append((k.new_zeros(n, 1, k.shape[2]), v.new_zeros(n, 1, v.shape[2])))
    for of_k, of_v in more:
        k, v = torch.cat([k, of_k], 1), torch.cat([v, of_v], 1)
        mask = None if mask is None else functional.pad(mask, (0, 1))
    q, k, v = (x.unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = None
    if need_weights:
        scores = (q * math.sqrt(1.0 / q.shape[-1])) @ k.mT
        weights = (scores if mask is None else scores + mask).softmax(-1)
        mixed = weights @ v
        weights = weights.mean(1) if average else weights
    else:
        mixed = functional.scaled_dot_product_attention(q, k, v, mask, 0.0, causal)
    output: Any = attention.out_proj(mixed.transpose(1, 2).reshape(n, length, -1))
    return (output if attention.batch_first else output.transpose(0, 1)), weights


def _same(mine: Tensor | None, theirs: Tensor | None) -> bool:
    if mine is None or theirs is None:
        return mine is theirs
    most = tolerance(mine)
    alike = mine.shape == theirs.shape and mine.dtype == theirs.dtype
    return alike and torch.allclose(mine, theirs, most, most, equal_nan=True)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores; True in a mask of booleans leaves out."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)
