"""ΔW of every guarded matrix, in factors or dense, read from the model; what cannot be read right is refused."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

import fishergeo as fg
from alignguard.loading import ROUTER, check_bare, moves_base
from alignguard.objective import beyond_text
from alignguard.updates.checks import check_parameters
from alignguard.updates.lora import (
    active_adapters,
    base_name,
    check_layer,
    check_start,
    layer_key,
    lora_factors,
    lora_layers,
    starts_at_base,
)
from alignguard.updates.matrices import (
    METHODS,
    Matrix,
    check_untied,
    is_any,
    is_conv1d,
    is_same,
    oriented,
    owners,
    plain_weight,
    turned,
    whole,
)
from fishergeo.capture import plain_name

DECOMPOSED = 1e-2  # share by which two decompositions of one matrix, cut off at a rank, may differ

BEYOND_TEXT = "alignment examples are text and do not pass through it"

OF_ADAPTER = re.compile(r"\.(lora_\w+|modules_to_save|trainable_tokens_\w+)\.")


class WeightUpdates:
    """Every trained weight matrix of a model with its ΔW, and every trained parameter that has none here.

    With a LoRA adapter ΔW = scaling·B·A (Hu et al. 2021), summed over the active adapters. Where B·A is not zero at the start
    (an adapter that was trained before, ``init_lora_weights=False``) or the start moved the base weights (PiSSA, OLoRA and
    their like), ΔW = scaling·(B·A − B0·A0) with the factors of the moment this object was made, of rank 2r: in any case ΔW
    is measured from the model of that moment, so make this before training. Of a model that takes images or sound too, the
    language model alone is guarded, as alignment examples are text. Modules that are trained whole
    (``modules_to_save``, and every Linear under ``method="full"``) have the dense ΔW = W − W0, with W0 copied in the
    model's own dtype.

    Args:
        model: a peft model, or any model for ``method="full"``.
        method: ``"lora"`` or ``"full"``.
        exclude: globs of plain names that are left out.
        include_router: guard routers of mixtures of experts too.
        offload: device of the copies W0; their weight's own if None.

    Attributes:
        matrices: name -> Matrix.
        skipped: trained parameter -> why it is not guarded.
        base_is_reference: whether the model with its adapters off is the model before training.

    Raises:
        TypeError: not a peft model, and ``method`` is not ``"full"``.
        ValueError: merged adapters, adapters that are not plain LoRA, with ``method="full"`` any adapter layers, tied
            weights, nothing to guard, or a glob of ``exclude`` that names nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str = "lora",
        exclude: Sequence[str] = (),
        include_router: bool = False,
        offload: str | torch.device | None = None,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, not {method!r}")
        check_parameters(model)
        self.model, self.exclude, self.include_router, self.offload = model, tuple(exclude), include_router, offload
        self.matrices: dict[str, Matrix] = {}
        self.skipped: dict[str, str] = {}
        self.base_is_reference = False
        self._may_be_base = False
        self._moving: list[str] = []
        self._references: dict[str, Tensor] = {}
        self._covered: set[int] = set()
        self._asked: set[str] = set()  # matrices that exclude might have named
        self._adapters: list[str] = []
        self._owners = owners(model)
        self._beyond_text = beyond_text(model)
        if method == "full":
            if isinstance(model, PeftModel):
                raise TypeError('method="full" trains the weights themselves; pass the model without its adapter')
            check_bare(model)
            self._add_dense(model, "", "W − W0")
        else:
            if not isinstance(model, PeftModel):
                raise TypeError(
                    f"expected a PeftModel with a LoRA adapter, found {type(model).__name__}; see peft.get_peft_model, "
                    'or train every weight with method="full"'
                )
            self._adapters = active_adapters(model)
            self._add_adapted(model)
        if not self.matrices:
            raise ValueError(
                f"nothing to guard: no trained weight matrix is understood ({self.skipped or 'none trains'})"
            )
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and id(parameter) not in self._covered and name not in self.skipped:
                words = "a vector" if parameter.ndim < 2 else "not a linear map that the Fisher is known of"
                beyond = id(model.get_submodule(name.rpartition(".")[0])) in self._beyond_text
                self.skipped[name] = BEYOND_TEXT if beyond else words
        self._check_exclude()

    def _check_exclude(self) -> None:
        """Refuse a glob that leaves nothing out, which is a name mistyped."""
        parameters = {plain_name(name) for name in self.skipped}
        known = self._asked | parameters | {name.rpartition(".")[0] for name in parameters}
        for pattern in self.exclude:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in known):
                raise ValueError(
                    f"exclude: nothing that trains is named {pattern!r}; names are those of the model without its adapter, such "
                    f"as {max(sorted(self._asked), key=lambda name: name.count('.'))!r}, or globs"
                )

    def check_active(self) -> None:
        """Refuse to read ΔW of other adapters.

        Raises:
            RuntimeError: other adapters are active than when the guard was made.
        """
        if self._adapters and list(self.model.active_adapters) != self._adapters:  # type: ignore[operator,arg-type]
            raise RuntimeError(
                f"adapters {list(self.model.active_adapters)} are active, the guard was made for {self._adapters}; "  # type: ignore[operator,arg-type]
                "make a new guard"
            )

    @torch.no_grad()
    def distance(self) -> float:
        """How far the guarded matrices are from where they began: the Frobenius norm of ΔW over all of them.

        Raises:
            RuntimeError: other adapters are active than when the guard was made.
        """
        self.check_active()
        squares = []
        for matrix in self.matrices.values():
            delta = matrix.read()
            squares.append(delta.square().sum() if isinstance(delta, Tensor) else delta.squared_norm())
        return float(torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt())

    def references(self) -> dict[str, Tensor]:
        """Copies that ΔW is measured from, by matrix and role; empty for LoRA that began at zero.

        Returns:
            ``name|weight`` -> W0 as the model keeps it, shape (p, q) or (q, p), in the model's dtype;
            ``name|adapter|left`` and ``name|adapter|right`` -> scaling·B0 (p, r) and A0 (r, q), with a dimension of experts
            before where they have it, float32 or better.
        """
        return dict(self._references)

    def restore(self, references: dict[str, Tensor], base_is_reference: bool) -> None:
        """Take the start of a run that is resumed, and refuse one that is not the start of this model.

        What the model said at its start is read from this model, so its start must be that of the run. Of a run that began
        with its adapter at zero the model with the adapter off is that start, whatever the adapter holds by now: some tools
        load it from the checkpoint before a guard is made.

        Args:
            references: what :meth:`references` returned in the run, with the same names and the same shape each.
            base_is_reference: what the attribute of that name was.

        Raises:
            ValueError: names or shapes differ, or the numbers: this was made on other weights than the run began at.
        """
        ours = dict(self._references)
        if self.base_is_reference and not base_is_reference:
            raise ValueError(
                "the run went on from an adapter that was trained before, and here the adapter is fresh; make the guard on the "
                "model with that adapter, and let the trainer load the checkpoint"
            )
        if base_is_reference:
            if not self._may_be_base:
                raise ValueError("the run began with its adapter at zero, and here the start moved the base weights")
            ours, references = (
                {key: tensor for key, tensor in of.items() if key.endswith("|weight")} for of in (ours, references)
            )
        shapes, theirs = ({k: tuple(t.shape) for k, t in of.items()} for of in (ours, references))
        if shapes != theirs:
            differ = sorted(k for k in shapes.keys() | theirs.keys() if shapes.get(k) != theirs.get(k))
            raise ValueError(f"the saved references are of another model: {differ[:3]} differ")
        if not base_is_reference and (moved := [key for key in references if not self._began_at(key, references)]):
            raise ValueError(
                f"this guard was made on other weights than the run began at: {moved[0]} differs; make it on the model, with "
                "the adapter and the seed, that the run began with, and let the trainer load the checkpoint"
            )
        for key, tensor in self._references.items():
            if key in references:
                tensor.copy_(references[key])
            else:
                tensor.zero_()  # B0·A0 of a run that began at zero
        self.base_is_reference = base_is_reference

    def _began_at(self, key: str, references: dict[str, Tensor]) -> bool:
        """Whether a saved reference is what this model began at."""
        name, *adapter, _ = key.split("|")
        if not set(adapter) & set(self._moving):
            return is_same(self._references[key], references[key])
        # A decomposition of the base weights, found anew: the same product but for rounding, of factors that need not be.
        sides = [f"{name}|{adapter[0]}|{side}" for side in ("left", "right")]
        ours = fg.LowRank(*(self._references[side] for side in sides))
        theirs = fg.LowRank(*(references[side].to(self._references[side]) for side in sides))
        return bool((theirs.change_from(ours).norm() <= DECOMPOSED * ours.norm()).all())

    # LoRA

    def _add_adapted(self, model: PeftModel) -> None:
        for adapter in self._adapters:
            kind = getattr(model.peft_config[adapter].peft_type, "value", model.peft_config[adapter].peft_type)
            if kind != "LORA":
                raise ValueError(f"adapter {adapter!r} is of kind {kind}: its ΔW is not scaling·B·A; use plain LoRA")
        self._moving = [adapter for adapter in self._adapters if moves_base(model, adapter)]
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        # A weight of the base that trains beside the adapter, a bias say, stays moved with the adapter off.
        self._may_be_base = not self._moving and all(OF_ADAPTER.search(name) for name in trained)
        self.base_is_reference = self._may_be_base and starts_at_base(model)
        for name, layer in lora_layers(model):
            holds = (layer.lora_A, layer.lora_embedding_A)
            adapters = [a for a in self._adapters if any(a in held for held in holds)]
            if not adapters:
                continue
            key = layer_key(name, layer)
            if self._left_out(key, layer, name):
                continue
            check_layer(key, layer, adapters, self._owners)
            for adapter in adapters:
                check_start(key, layer, model.peft_config[adapter])
            for adapter in adapters:
                self._covered |= {id(layer.lora_A[adapter].weight), id(layer.lora_B[adapter].weight)}
            self._add_layer(name, key, layer, adapters)
        for name, module in model.named_modules():
            if type(module).__name__ == "ModulesToSaveWrapper":
                for adapter in module.active_adapters:  # type: ignore[union-attr]
                    saved = module.modules_to_save[adapter]  # type: ignore[index,union-attr]
                    self._add_dense(saved, f"{name}.modules_to_save.{adapter}", "W − W0 (modules_to_save)")

    def _start(self, key: str, adapter: str, like: Tensor | None = None) -> fg.LowRank:
        """scaling·B0·A0, from now on where ``like`` is: trainers move the model after a guard is made on it."""
        sides = [f"{key}|{adapter}|{side}" for side in ("left", "right")]
        if like is not None:
            self._references.update({side: self._references[side].to(like) for side in sides})
        return fg.LowRank(*(self._references[side] for side in sides))

    def _add_layer(self, name: str, key: str, layer: Any, adapters: list[str]) -> None:
        moved = []
        for adapter in adapters:
            start = lora_factors(layer, adapter).detach()
            if adapter in self._moving or (is_any(start.left) and is_any(start.right)):
                moved.append(adapter)
                self._references[f"{key}|{adapter}|left"] = start.left.clone()
                self._references[f"{key}|{adapter}|right"] = start.right.clone()

        def part(adapter: str) -> fg.LowRank:
            now = lora_factors(layer, adapter)
            return now.change_from(self._start(key, adapter, now.left)) if adapter in moved else now

        def read() -> fg.LowRank:
            parts = [part(adapter) for adapter in adapters]
            return sum(parts[1:], parts[0])

        def weight(matrix: Tensor, *place: int) -> Tensor:
            # W0 is the base and what the adapter added to it at its start.
            return sum((self._start(key, a).to_dense()[place].to(matrix) for a in moved), matrix)

        now = read()
        kind = "s·(BA − B0A0)" if moved else "s·BA"
        if len(adapters) > 1:
            kind += f", {len(adapters)} adapters"
        if now.ndim == 2:
            base = layer.get_base_layer()
            self.matrices[key] = Matrix(
                key,
                base_name(name),
                kind,
                (now.shape[0], now.shape[1]),
                now.rank,
                read,
                lambda: weight(plain_weight(base)),
            )
            return
        inner, parameter = layer.get_base_layer(), layer.parameter_name
        module = next(n for n, m in self.model.named_modules() if m is inner)
        flip = not layer._did_swap_in_out_features
        for expert in range(now.shape[0]):
            self.matrices[f"{key}.{expert}"] = Matrix(
                f"{key}.{expert}",
                f"{module}.{parameter}.{expert}",
                f"{kind} of an expert",
                (now.shape[-2], now.shape[-1]),
                now.rank,
                lambda expert=expert: read()[expert],  # type: ignore[misc]
                lambda expert=expert: weight(turned(getattr(inner, parameter)[expert], flip), expert),  # type: ignore[misc]
            )

    def _left_out(self, key: str, layer: Any, path: str | None = None) -> bool:
        """Whether a layer is left unguarded, and if so noted as such; ``path`` is the module's where the key is another."""
        reason = self._reason(key, layer)
        if reason is None:
            return False
        for name, parameter in layer.named_parameters(prefix=path or key):
            if parameter.requires_grad:
                self.skipped[name] = reason
        return True

    def _reason(self, key: str, layer: Any) -> str | None:
        """Why a layer is left unguarded; None where it is not."""
        plain = plain_name(key)
        self._asked.add(plain)
        if any(fnmatch.fnmatchcase(plain, pattern) for pattern in self.exclude):
            return "excluded"
        if not self.include_router and ROUTER.search(plain):
            return "a router, which is guarded only if asked for (include_router)"
        return BEYOND_TEXT if id(layer) in self._beyond_text else None

    # dense

    def _add_dense(self, root: nn.Module, prefix: str, kind: str) -> None:
        head = None
        if not prefix and hasattr(root, "get_output_embeddings"):
            head = root.get_output_embeddings()  # type: ignore[operator]
        for inner, module in root.named_modules():
            name = ".".join(part for part in (prefix, inner) if part)
            if isinstance(module, nn.Linear) or is_conv1d(module):
                weight = module.weight
                if not weight.requires_grad or self._left_out(name, module):
                    continue
                if module is head:
                    self.skipped[f"{name}.weight"] = "the output embedding"
                    continue
                check_untied(name, weight, self._owners)
                self._add_matrix(name, module, weight, kind)
                continue
            for own, stack in module.named_parameters(recurse=False):
                if stack.ndim == 3 and stack.requires_grad and "experts" in name and not self._left_out(name, module):
                    if reason := self._reason(f"{name}.{own}", module):
                        self.skipped[f"{name}.{own}"] = reason
                        continue
                    flip = getattr(module, "is_transposed", False)
                    self._add_experts(f"{name}.{own}", module, own, flip, kind)

    def _add_matrix(self, name: str, module: nn.Module, weight: Tensor, kind: str) -> None:
        reference = self._keep(name, weight)
        rows, columns = oriented(module, reference).shape

        def read() -> Tensor:
            # asked of the module each time: fully_shard puts other parameters in the place of these
            now: Tensor = module.weight  # type: ignore[assignment]
            return oriented(module, whole(now) - whole(reference.to(now.device)))

        self.matrices[name] = Matrix(name, name, kind, (rows, columns), None, read, lambda: oriented(module, reference))

    def _add_experts(self, name: str, module: nn.Module, own: str, flip: bool, kind: str) -> None:
        stack = getattr(module, own)
        reference = self._keep(name, stack)

        def read(expert: int) -> Tensor:
            now = getattr(module, own)
            if hasattr(now, "full_tensor"):
                return turned((whole(now) - whole(reference))[expert], flip)
            return turned(whole(now[expert]) - whole(reference[expert].to(now.device)), flip)

        rows, columns = (stack.shape[2], stack.shape[1]) if flip else (stack.shape[1], stack.shape[2])
        for expert in range(len(stack)):
            self.matrices[f"{name}.{expert}"] = Matrix(
                f"{name}.{expert}",
                f"{name}.{expert}",
                f"{kind} of an expert",
                (rows, columns),
                None,
                lambda e=expert: read(e),  # type: ignore[misc]
                lambda e=expert: turned(reference[e], flip),  # type: ignore[misc]
            )

    def _keep(self, name: str, weight: Tensor) -> Tensor:
        self._covered.add(id(weight))
        kept = weight.detach().to(self.offload or weight.device, copy=True)
        self._references[f"{name}|weight"] = kept
        return kept
