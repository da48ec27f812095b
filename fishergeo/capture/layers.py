"""Which parameters of a model can be captured, under which names, in which (p, q) view, and who else reads them.

A layer is named by its module (``"mlp.down_proj"``, its weight), by its bias (``"mlp.down_proj.bias"``), by both
together (``"mlp.down_proj+bias"``), by a projection of an nn.MultiheadAttention (``"attn.in_proj"``), or by
one expert of a three-dimensional parameter (``"mlp.experts.down_proj.3"``).
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, nn

from fishergeo.capture.at_rest import unstepped
from fishergeo.capture.kinds.attention import modules_of, parameters_of, projections
from fishergeo.capture.kinds.kind import Kind
from fishergeo.capture.kinds.known import kind_of
from fishergeo.capture.model_adapters import is_adapter_part, is_mere_storage, output_embedding

LayerFilter = str | Sequence[str] | Callable[[str, nn.Module], bool] | None

Part = Literal["weight", "bias", "weight+bias", "expert"]


@dataclass(frozen=True)
class Expert:
    """One matrix of a three-dimensional parameter.

    Attributes:
        parameter: its name in the module.
        index: number of the expert.
        transposed: stored (in, out).
    """

    parameter: str
    index: int
    transposed: bool


@dataclass(frozen=True, eq=False)
class Use:
    """A module whose call reads a layer's parameter.

    Attributes:
        path: path of the module.
        module: itself.
        kind: kind of module, None for experts.
        flipped: this module's view of the parameter is the transpose of the layer's (an embedding tied to a head).
    """

    path: str
    module: nn.Module
    kind: Kind | None
    flipped: bool = False


@dataclass(frozen=True, eq=False)
class Layer:
    """A parameter (or a part of one) seen as a matrix.

    Attributes:
        name: name under which it was selected.
        part: part of the module that is captured.
        weight: the parameter itself, for its dtype and device.
        shape: (p, q).
        uses: every module that reads the parameter; several where it is tied.
        expert: expert that it is, for part ``"expert"``.
    """

    name: str
    part: Part
    weight: Tensor
    shape: tuple[int, int]
    uses: tuple[Use, ...]
    expert: Expert | None = None


def selectable(model: nn.Module) -> list[str]:
    """The name of every layer that :func:`select_layers` can choose, in the model's order."""
    with unstepped(model):
        return list(_candidates(_modules(model)))


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in modules_of(model).items() if name or kind_of(module) is not None}


def select_layers(model: nn.Module, layers: LayerFilter = None) -> dict[str, Layer]:
    """Layers by name, in the model's order.

    Args:
        model: any module; on any device, meta included.
        layers: names, globs (``"*.q_proj"``), one of either, or a predicate ``(name, module) -> bool``. None takes
            every ``nn.Linear`` and input projection of ``nn.MultiheadAttention`` (``in_proj``, or ``q_proj``,
            ``k_proj`` and ``v_proj`` where they are apart) except the output embedding (a p of vocabulary size), the two
            halves of LoRA and, with a warning, those tied to another or to what cannot be captured. A glob matches biases only if it ends in
            ``bias`` (``"*.bias"``, or ``"*+bias"`` for weight and bias together); a predicate is asked about modules and experts, never about biases.

    Returns:
        name -> layer, never empty. A weight that several modules share is one layer, named by any one of them and
        summed over all of them.

    Raises:
        ValueError: if a pattern matches nothing, with the pattern and some of the names there are; if a chosen module
            is of a kind that cannot be captured; if two names mean one tied parameter.
    """
    with unstepped(model):
        return _selected(model, layers)


def _selected(model: nn.Module, layers: LayerFilter) -> dict[str, Layer]:
    everything = modules_of(model)
    modules = {name: module for name, module in everything.items() if name or kind_of(module) is not None}
    known = _candidates(modules)
    plain = [name for name, (_, part, _) in known.items() if part in ("weight", "expert")]
    if layers is None:
        head = output_embedding(model)
        of_head = set() if head is None else set(head.modules())
        chosen = [
            name
            for name, module in modules.items()
            if isinstance(module, nn.Linear)
            and module._parameters.get("weight", module) is not None
            and module not in of_head
            and not is_adapter_part(name)
        ]
        if not chosen:
            raise ValueError(f"layers=None: {type(model).__name__} has no nn.Linear; name the layers to capture")
    elif callable(layers):
        asked = {**modules, **{name: modules[known[name][0]] for name in plain}}
        chosen = [name for name, module in asked.items() if layers(name, module)]
        if not chosen:
            raise ValueError(f"layers: the predicate accepts no module; there are {_some(plain)}")
    else:
        patterns = [layers] if isinstance(layers, str) else list(layers)
        if not patterns:
            raise ValueError(f"layers is empty; there are {_some(plain)}")
        chosen = []
        for pattern in patterns:
            hits = [pattern] if pattern in modules or pattern in known else _matches(pattern, known)
            if not hits:
                raise ValueError(f"layers: {pattern!r} matches no layer that can be captured; there are {_some(plain)}")
            chosen += hits
    for name in chosen:
        if name not in known:
            raise ValueError(f"layers: {name!r} {_refusal(name, modules, known)}")
    wanted = set(chosen)
    owners: dict[Tensor, list[tuple[str, str]]] = {}
    for path, module in everything.items():
        for attribute, parameter in parameters_of(module).items():
            owners.setdefault(parameter, []).append((path, attribute))
    result: dict[str, Layer] = {}
    reasons: dict[str, str] = {}
    taken: dict[tuple[str, str, Expert | None], str] = {}
    for name in (name for name in known if name in wanted):
        try:
            layer = _layer(name, *known[name], everything, owners)
            key = (layer.uses[0].path, layer.part, layer.expert)  # the first of all modules that read the parameter
            if key in taken:  # counted twice
                raise ValueError(f"layers: {taken[key]!r} and {name!r} are one tied parameter; name one of them")
        except ValueError as error:
            if layers is not None or len(wanted) == len(reasons) + 1:
                raise
            reasons[name] = str(error).removeprefix("layers: ")
            continue
        taken[key] = name
        result[name] = layer
    if reasons:
        warnings.warn(f"layers=None: {len(reasons)} modules are left out: {'. '.join(reasons.values())}", stacklevel=3)
    return result


_Candidate = tuple[str, Part, Expert | None]


def _candidates(modules: dict[str, nn.Module]) -> dict[str, _Candidate]:
    """Every name that can be selected -> (module path, part, expert)."""
    found: dict[str, _Candidate] = {}
    for path, module in modules.items():
        kind = kind_of(module)
        if kind is not None and kind.refusal(module) is None and not is_mere_storage(path, modules):
            weighty = module._parameters.get("weight", module) is not None  # an attention's bias of three weights
            if weighty:
                found[path] = (path, "weight", None)
            if module._parameters.get("bias") is not None:
                found[f"{path}.bias" if path else "bias"] = (path, "bias", None)
                if kind.joint and weighty:
                    found[f"{path}+bias"] = (path, "weight+bias", None)
        elif kind is None:
            for parameter, expert in _experts(module):
                found[f"{path}.{parameter}.{expert.index}"] = (path, "expert", expert)
    return found


def _experts(module: nn.Module) -> list[tuple[str, Expert]]:
    """The experts of a module that holds them stacked: parameters (num_experts, ·, ·)."""
    count = getattr(module, "num_experts", None)
    transposed = bool(getattr(module, "is_transposed", False))
    return [
        (name, Expert(name, index, transposed))
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 3 and parameter.shape[0] == count
        for index in range(len(parameter))
    ]


def _matches(pattern: str, known: dict[str, _Candidate]) -> list[str]:
    """Names that a glob means."""
    asks = {
        "bias": pattern.endswith("bias") and "+" not in pattern,
        "weight+bias": pattern.endswith("+bias"),
    }
    return [name for name, (_, part, _) in known.items() if asks.get(part, True) and fnmatch.fnmatchcase(name, pattern)]


def _refusal(name: str, modules: dict[str, nn.Module], known: dict[str, _Candidate]) -> str:
    """Why a module cannot be captured."""
    module = modules[name]
    title = type(module).__name__
    kind = kind_of(module)
    if f"{name}.bias" in known and name not in known:
        return f"is no weight but the bias of three; name {name + '.bias'!r}"
    if kind is not None and is_mere_storage(name, modules):
        return "is read as a mere parameter by peft's target_parameters and never called, so it cannot be captured"
    if kind is not None:
        return f"is a {title} that {kind.refusal(module)}"
    within = [f"{name}.{role}" for role in projections(module)]
    if within:
        return f"is a {title}; name its projections, such as {within[0]!r} or {name + '.out_proj'!r}"
    stacked = [other for other, (path, part, _) in known.items() if path == name and part == "expert"]
    if stacked:
        return f"is a {title}; name its experts, such as {stacked[0]!r} or {stacked[0].rpartition('.')[0] + '.*'!r}"
    return (
        f"is a {title}, whose curvature is not known here; take nn.Linear, Conv1D, convolutions, nn.Embedding, "
        "LayerNorm, RMSNorm, BatchNorm, GroupNorm or one of stacked experts"
    )


def _layer(
    name: str,
    path: str,
    part: Part,
    expert: Expert | None,
    modules: dict[str, nn.Module],
    owners: dict[Tensor, list[tuple[str, str]]],
) -> Layer:
    module = modules[path]
    if expert is not None:
        weight = cast(Tensor, module._parameters[expert.parameter])
        _check_alone(name, weight, owners)
        rows, columns = weight.shape[1:]
        shape = (columns, rows) if expert.transposed else (rows, columns)
        return Layer(name, part, weight, shape, (Use(path, module, None),), expert)
    kind = cast(Kind, kind_of(module))
    attribute = "bias" if part == "bias" else "weight"
    # A quantised weight may be packed and a parametrised one computed: the attribute is what there is.
    weight = cast(Tensor, getattr(module, attribute))
    p, q = kind.shape(module)
    shape = {"weight": (p, q), "bias": (weight.numel(), 1), "weight+bias": (p, q + 1)}[part]
    if part == "weight+bias":
        _check_alone(name, weight, owners)
        _check_alone(name, cast(Tensor, module.bias), owners)
    uses = []
    for other_path, other_attribute in owners.get(weight, []) or [(path, attribute)]:
        other = modules[other_path]
        other_kind = kind_of(other)
        fits = (
            other_kind is not None
            and other_kind.refusal(other) is None
            and other_attribute == attribute
            and other_kind.mates == kind.mates
        )
        if not fits:
            raise ValueError(
                f"layers: {name!r} shares its {attribute} with {other_path!r} ({type(other).__name__}), whose calls "
                "cannot be captured with it; leave it out"
            )
        flipped = part == "weight" and cast(Kind, other_kind).transposed != kind.transposed
        uses.append(Use(other_path, other, other_kind, flipped))
    return Layer(name, part, weight, shape, tuple(uses))


def _check_alone(name: str, parameter: Tensor, owners: dict[Tensor, list[tuple[str, str]]]) -> None:
    holders = [path for path, _ in owners.get(parameter, [])]
    if len(holders) > 1:
        raise ValueError(f"layers: {name!r} has a parameter that is tied ({', '.join(holders)}); leave it out")


def _some(names: Sequence[str], most: int = 6) -> str:
    shown = ", ".join(name or "'' (the model itself)" for name in names[:most]) or "no nn.Linear at all"
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
