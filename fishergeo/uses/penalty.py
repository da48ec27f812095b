"""Remembering earlier tasks: a quadratic penalty around the weights that each of them left."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from fishergeo import _storage
from fishergeo._checks import check_number
from fishergeo.capture import Layer, select_layers
from fishergeo.operators import SymmetricOperator, operator_from_tensors
from fishergeo.updates import LowRank
from fishergeo.uses.weights import Curvature, adapter_update, check_fits, effective, layers_of, wide_dtype


@dataclass(frozen=True, eq=False)
class _Task:
    """One task: its strength, and by layer its curvature and the weight that it left, whole or in an adapter's factors."""

    strength: float
    operators: Mapping[str, SymmetricOperator]
    anchors: Mapping[str, Mapping[str, Tensor]]


class QuadraticPenalty:
    r"""½ Σ_k s_k Σ_l tr(ΔW_klᵀ F_kl ΔW_kl), ΔW_kl how far layer l is from where task k left it.

    Elastic weight consolidation (Kirkpatrick et al. 2017) with a Fisher of any structure, for KFAC that of Ritter et al.
    (2018, arXiv 1805.07810). Every task keeps its own weights and Fisher (Huszár 2018, arXiv 1712.03847, on why their
    sum is what the posterior asks for). Weights of a frozen layer under LoRA are charged through the adapter's factors:
    nothing of the size of the weight is kept or formed.

    Args:
        model: any module, at the weights that the task left; adapters from peft too. It is read at each call.
        fisher: Fisher of the model as it is now, or a mapping from layers to operators; any structure.
        strength: factor s_1 of the first task, not negative.

    Attributes:
        model: the module whose weights are charged.

    Raises:
        ValueError: a negative strength, a Fisher of another model, or an operator that does not fit its layer.

    Examples:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> penalty = fg.QuadraticPenalty(model, {"": fg.DiagonalOperator(torch.tensor([[1.0, 3.0]]))}, strength=10.0)
        >>> _ = torch.nn.init.constant_(model.weight, 0.0)
        >>> penalty().item() == float(5 * (penalty.anchor(0, "").square() * torch.tensor([[1.0, 3.0]])).sum())
        True
    """

    def __init__(self, model: nn.Module, fisher: Curvature, strength: float = 1.0) -> None:
        self.model = model
        self._layers: dict[str, Layer] = {}
        self._tasks: list[_Task] = []
        self.add(fisher, strength)

    def __len__(self) -> int:
        return len(self._tasks)

    @torch.no_grad()
    def add(self, fisher: Curvature, strength: float = 1.0) -> None:
        """One task more, around the present weights.

        Args:
            fisher: Fisher of the model as it is now, of any layers and structure.
            strength: factor of this task, not negative.

        Raises:
            ValueError: a negative strength, a Fisher of another model, or an operator that does not fit its layer.
        """
        strength = check_number("strength", strength, low=0.0)
        layers = layers_of(self.model, fisher)
        anchors: dict[str, dict[str, Tensor]] = {}
        for name, layer in layers.items():
            factors = adapter_update(self.model, layer)
            if factors is None:
                anchors[name] = {"weight": effective(self.model, layer).detach().clone()}
            else:
                anchors[name] = {"left": factors.left.detach().clone(), "right": factors.right.detach().clone()}
        self._layers |= layers
        self._tasks.append(_Task(strength, {name: fisher[name].compact() for name in layers}, anchors))

    def anchor(self, task: int, layer: str) -> Tensor:
        """The weight (p, q) that a task left, or what the adapter added to it where that alone is charged.

        Raises:
            KeyError: if the task has no such layer.
            IndexError: if there is no such task.
        """
        kept = self._tasks[task].anchors[layer]
        return kept["weight"] if "weight" in kept else kept["left"] @ kept["right"]

    def __call__(self) -> Tensor:
        """The penalty at the present weights, a differentiable scalar of float32 or wider.

        Raises:
            ValueError: if a weight trains that was frozen under its adapter when a task was added, by name.
        """
        terms = []
        for task in self._tasks:
            for name, operator in task.operators.items():
                value = operator.quadratic(self._moved(name, task.anchors[name]))
                terms.append((0.5 * task.strength) * value)
        device = terms[0].device
        return torch.stack([term.to(device) for term in terms]).sum()

    def _moved(self, name: str, anchor: Mapping[str, Tensor]) -> Tensor | LowRank:
        """How far a layer is from where the task left it, in float32 or wider: an operator's dtype may not tell the two apart."""
        layer = self._layers[name]
        if "weight" not in anchor and layer.weight.requires_grad:
            raise ValueError(
                f"the weight of layer {name!r} trains now, and was frozen under its adapter when the task was added, of which "
                "nothing but the adapter is kept; add the task again, or freeze the weight"
            )
        if "weight" in anchor:
            weight = effective(self.model, layer)
            work = wide_dtype(weight.dtype, anchor["weight"].dtype)
            return weight.to(work) - anchor["weight"].to(work)
        now, before = adapter_update(self.model, layer), LowRank(anchor["left"], anchor["right"])
        if now is None:
            return -before
        work = wide_dtype(now.dtype, before.dtype)
        now, before = now.to(work), before.to(work)
        # Of other factors, as of another rank, the difference is one of large terms.
        alike = (now.left.shape, now.right.shape) == (before.left.shape, before.right.shape)
        return now.change_from(before) if alike else now - before

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes every task's strength, weights and operators as one safetensors file, atomically.

        Args:
            path: the file; one that is there is replaced.

        Raises:
            TypeError: if an operator is not made of tensors.
            OSError: if it cannot be written; nothing half-written stays.
        """
        tensors: dict[str, Tensor] = {}
        header = []
        for place, task in enumerate(self._tasks):
            layers = {}
            for name, operator in task.operators.items():
                parts = {"operator": operator.tensors(), "anchor": task.anchors[name]}
                tensors |= {
                    f"{place}|{name}|{part}|{key}": t for part, held in parts.items() for key, t in held.items()
                }
                layers[name] = [type(operator).__name__, operator.side, *(list(held) for held in parts.values())]
            header.append({"strength": task.strength, "layers": layers})
        _storage.write(path, tensors, {"penalty": header})

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module, device: str | torch.device = "cpu") -> Self:
        """The penalty of a file of :meth:`save`, on a model that may have moved since.

        Args:
            path: the file.
            model: the module whose weights are charged; its layers must have the names and shapes of those saved.
            device: device of the tensors.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged or something else, or the model lacks a layer or has it in another shape.
        """
        file = _storage.TensorFile(path)
        header = file.header.get("penalty")
        if not isinstance(header, list):
            raise ValueError(f"{path}: a {_storage.FORMAT} file, but not one of a penalty")
        made = cls.__new__(cls)
        made.model, made._tasks, made._layers = model, [], {}
        for place, held in enumerate(header):
            made._layers |= (layers := select_layers(model, list(held["layers"])))
            operators, anchors = {}, {}
            for name, (kind, side, keys, anchor) in held["layers"].items():
                read = _reader(file, f"{place}|{name}", device)
                operators[name] = operator_from_tensors(kind, {key: read("operator", key) for key in keys}, side)
                anchors[name] = {key: read("anchor", key) for key in anchor}
                check_fits(name, operators[name], layers[name].shape, str(path))
            made._tasks.append(_Task(float(held["strength"]), operators, anchors))
        return made


def _reader(file: _storage.TensorFile, prefix: str, device: Any) -> Callable[[str, str], Tensor]:
    return lambda part, key: file.tensor(f"{prefix}|{part}|{key}", device)
