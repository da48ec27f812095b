"""LoRA adapters on a model: put there, loaded, checked, switched off."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, load_peft_weights
from peft.utils.other import AuxiliaryTrainingWrapper

from alignguard.files import readable
from alignguard.objective import model_kind

ROUTER = re.compile(r"(^|\.)(router|gate|shared_expert_gate)(\.|$)")

DEFAULT_LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}

TASK_TYPES = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "classification": "SEQ_CLS"}

STILL_INITS = {"gaussian", "orthogonal", "eva"}  # starts that leave the base weights where they were

MOVING_INITS = {"olora", "corda", "loftq", "lora_ga"}  # and those that move them; pissa comes with a suffix


def default_lora(model: Any) -> dict[str, Any]:
    """Fields of the LoRA that a model gets if nothing else is said: every Linear, and the experts of a mixture.

    Routers are left alone: training them is another task than keeping them.
    """
    fields: dict[str, Any] = {**DEFAULT_LORA, "task_type": TASK_TYPES[model_kind(model)]}
    experts = sorted(
        {
            f"{module_name.rsplit('.', 2)[-2]}.{module_name.rsplit('.', 1)[-1]}.{name}"
            for module_name, module in model.named_modules()
            if module_name.endswith("experts")
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.ndim == 3
        }
    )
    if experts:
        # "all-linear" would take the routers too, whatever exclude_modules says.
        head = model.get_output_embeddings()
        fields["target_modules"] = sorted(
            {
                name.rsplit(".", 1)[-1]
                for name, module in model.named_modules()
                if isinstance(module, torch.nn.Linear) and module is not head and not ROUTER.search(name)
            }
        )
        fields["target_parameters"] = experts
    return fields


def _fields(model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults with what was given in their place; whoever names targets names all of them."""
    fields = default_lora(model)
    if "target_modules" in given or "target_parameters" in given:
        for name in ("target_modules", "target_parameters"):
            fields.pop(name, None)
    return {**fields, **given}


def adapt(model: Any, lora: LoraConfig | Mapping[str, Any] | None = None) -> PeftModel:
    """The model with a fresh LoRA adapter, or as it is when it has one.

    Raises:
        TypeError, ValueError: fields for a model that has its adapter, fields that are no LoraConfig's, values out of range, or target modules that match
            nothing.
    """
    if isinstance(model, PeftModel):
        if lora:
            raise ValueError(
                f"lora: the model carries its adapter ({', '.join(model.peft_config)}) already; leave lora out, or pass the "
                "model below it"
            )
        return model
    return put_on(model, lora_config(model, lora))


def check_bare(model: Any) -> None:
    """Refuse a model inside which layers of an adapter stand: peft puts them there in place, and they stay.

    Another adapter would train together with them and be saved without them.

    Raises:
        ValueError: naming the first.
    """
    for name, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            raise ValueError(
                f"model: this object carries layers of an adapter already ({name}), which an earlier run or get_peft_model "
                "put there in place; load it anew, or pass what unload() of its PeftModel returns. To go on training that "
                "adapter, pass the PeftModel"
            )


def what_trains(model: Any) -> Callable[[], None]:
    """What makes those weights of a model train again, and those alone, that train now."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def put_back() -> None:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    return put_back


@contextmanager
def taken_off_again(adapted: Any, model: Any, put_back: Callable[[], None]) -> Iterator[None]:
    """Take a fresh adapter off where what follows fails, so that the model given can be given again.

    One whose start moved the base weights stays on, and :func:`check_bare` refuses that model: its weights are no longer
    what they were.

    Args:
        adapted: what :func:`adapt` or :func:`put_on` made.
        model: what it was made of, or the same object where nothing was put on.
        put_back: :func:`what_trains` of that model before: peft freezes it.
    """
    try:
        yield
    except BaseException:
        with suppress(ValueError):  # a start that is not known here may have moved them too
            if adapted is not model and not any(moves_base(adapted, name) for name in adapted.active_adapters):
                adapted.unload()
                put_back()
        raise


def lora_config(model: Any, lora: LoraConfig | Mapping[str, Any] | None = None) -> LoraConfig:
    """What is given, its fields checked, over the defaults of the model.

    Raises:
        TypeError, ValueError: fields that are no LoraConfig's, or values out of range.
    """
    if isinstance(lora, LoraConfig):
        return lora
    if lora is not None and not isinstance(lora, Mapping):
        raise TypeError(f"lora must be a peft.LoraConfig or its fields, not {lora!r}")
    if unknown := sorted(set(map(str, lora or {})) - set(LoraConfig.__dataclass_fields__)):
        raise ValueError(f"lora: unknown fields {unknown}; see peft.LoraConfig")
    _check_lora(lora or {})
    try:
        return LoraConfig(**_fields(model, lora or {}))
    except (ValueError, TypeError, ImportError, AttributeError) as error:
        raise ValueError(f"lora: peft.LoraConfig refuses these fields ({' '.join(str(error).split())})") from error


def put_on(model: Any, config: PeftConfig) -> PeftModel:
    """The model with a fresh adapter of any kind.

    Raises:
        ValueError: target modules that match nothing, or modules that are to be saved and are not there.
    """
    if getattr(config, "init_lora_weights", True) == "eva":
        raise ValueError(
            "lora: init_lora_weights='eva' takes its start from data, which is not read here; call peft's "
            "initialize_lora_eva_weights on a PeftModel and pass that, or leave it out"
        )
    paths = [f".{path}" for path, _ in model.named_modules()]
    if lacking := [
        name
        for name in getattr(config, "modules_to_save", None) or ()
        if not any(p.endswith(f".{name}") for p in paths)
    ]:
        raise ValueError(f"lora: the model has no module {lacking[0]!r} of modules_to_save")
    try:
        return get_peft_model(model, config)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # peft and the libraries below it have many kinds
        linears = sorted(
            {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        )
        targets = getattr(config, "target_modules", None)
        pattern = "; a string is a pattern of whole names, so give a list" if isinstance(targets, str) else ""
        raise ValueError(
            f"lora: target_modules={targets!r} cannot be adapted ({' '.join(str(error).split())[:300]}); the model's Linear "
            f"modules end in {linears}{pattern}"
        ) from error


def _check_lora(fields: Mapping[str, Any]) -> None:
    """Values that peft would take and fail on later, or train with as they are."""
    rank, alpha = fields.get("r", 1), fields.get("lora_alpha", 1)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"lora: r, the rank, must be a whole number of at least 1, not {rank!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < float("inf"):
        raise ValueError(f"lora: lora_alpha must be a finite number above 0, not {alpha!r}")
    drop = fields.get("lora_dropout", 0.0)
    if isinstance(drop, bool) or not isinstance(drop, (int, float)) or not 0 <= drop < 1:
        raise ValueError(f"lora: lora_dropout must lie in [0, 1), not {drop!r}")


def load_adapter(model: Any, folder: Path) -> PeftModel:
    """A saved adapter on its model, every weight of it found.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: damaged files, an adapter of another model, or one whose weights are not those of its configuration.
    """
    folder = folder.expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"adapter: no adapter_config.json in {folder}; give the folder that save_pretrained wrote"
        )
    with readable(f"adapter {folder}", "give an adapter that was trained on this model"):
        stored = load_peft_weights(str(folder), device="cpu")
        adapted = PeftModel.from_pretrained(model, str(folder))
    check_weights(folder, set(stored), adapted)
    if spoilt := [n for n, t in stored.items() if not (t.is_floating_point() and bool(torch.isfinite(t).all()))]:
        raise ValueError(f"adapter {folder}: {spoilt[0]} is not finite numbers; its run failed, so train it again")
    return adapted


def settle(folder: Path, active: list[str]) -> None:
    """Put what peft saved where it is looked for: the only active adapter in the folder itself, of several none there.

    peft puts an adapter named "default" there, trained or not, and any other into a folder of its name, where
    ``PeftModel.from_pretrained`` does not find it. Of several active adapters the sum is the model, and one alone another.

    Args:
        folder: what ``PeftModel.save_pretrained`` wrote.
        active: names of the model's active adapters.
    """
    of_default = [file for file in folder.glob("adapter_*") if file.is_file()]
    if len(active) > 1 and "default" in active:
        (folder / "default").mkdir()
        for file in of_default:
            file.rename(folder / "default" / file.name)
    elif len(active) == 1 and active != ["default"]:
        for file in of_default:
            file.unlink()
        for file in (folder / active[0]).iterdir():
            file.replace(folder / file.name)
        (folder / active[0]).rmdir()


def check_weights(folder: Path, stored: set[str], adapted: PeftModel) -> None:
    """Refuse an adapter's file that lacks weights or has others: peft loads what fits and leaves the rest at its start.

    Raises:
        ValueError: naming the first that differs.
    """
    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    # embeddings may be saved along with an adapter, and are no part of it
    if differ := sorted(expected - stored) or sorted(name for name in stored - expected if "lora_" in name):
        raise ValueError(
            f"adapter {folder}: its weights are not those of its configuration on this model ({differ[0]} stands in only "
            "one); give an adapter that was trained on this model"
        )


def moves_base(model: PeftModel, adapter: str) -> bool:
    """Whether an adapter's start took something out of the base weights.

    Raises:
        ValueError: a start that is not known here.
    """
    init = getattr(model.peft_config[adapter], "init_lora_weights", True)
    if not isinstance(init, str) or init in STILL_INITS:
        return False
    if init.lower() in MOVING_INITS or init.startswith("pissa"):
        return True
    raise ValueError(f"init_lora_weights={init!r}: it is not known here whether that start moves the base weights")


@contextmanager
def switched_off(model: Any) -> Iterator[None]:
    """A peft model with its adapter off. What trains is afterwards what trained before: peft's switch sets it anew."""
    put_back = what_trains(model)
    try:
        with model.disable_adapter():
            yield
    finally:
        put_back()


def adapter_off(model: Any) -> AbstractContextManager[None]:
    """The context in which a peft model computes as it did before its adapter was put on.

    Raises:
        ValueError: a model without an adapter, or one below which the model before training is no longer there: merged,
            begun by taking something out of the base weights (PiSSA and the like), or trained with the base's biases.
    """
    if not hasattr(model, "disable_adapter"):
        raise ValueError("base is needed: this model carries no peft adapter that could be switched off")
    if any(getattr(module, "merged", False) is True for module in model.modules()):
        raise ValueError("the model's adapter is merged into its weights; unmerge it, or pass the base model as base")
    for name in model.active_adapters:
        config = model.peft_config[name]
        why = None
        if moves_base(model, name):
            why = f"it began by moving the base weights (init_lora_weights={config.init_lora_weights!r})"
        elif getattr(config, "bias", "none") != "none":
            why = f"the base's biases were trained with it (bias={config.bias!r})"
        if why is not None:
            raise ValueError(
                f"base is needed: adapter {name!r} cannot be switched off to read the model before training, as {why}; "
                "give that model as base (--base)"
            )
    return switched_off(model)
