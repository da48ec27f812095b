"""Models as people name them, and the adapter put on them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, load_peft_weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from alignguard.files import readable
from alignguard.objective import model_kind

ROUTER = re.compile(r"(^|\.)(router|gate|shared_expert_gate)(\.|$)")

DEFAULT_LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}

TASK_TYPES = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "classification": "SEQ_CLS"}


def load_model(model: str | Path | PreTrainedModel | PeftModel, tokenizer: Any = None) -> tuple[Any, Any]:
    """A model in float32 or its own precision on an accelerator, and its tokenizer.

    The checkpoint's own configuration decides between a causal LM, an encoder-decoder and a sequence classifier.

    Raises:
        FileNotFoundError: a local path that is not there.
        ValueError: a model object without a tokenizer, or files that are damaged, incomplete or of something else.
    """
    words = load_tokenizer(model, tokenizer)
    return load_weights(model), words


def load_tokenizer(model: Any, tokenizer: Any = None) -> Any:
    """The tokenizer given, or that of a model's folder or hub name.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_model`.
    """
    if tokenizer is not None:
        return tokenizer
    if not isinstance(model, (str, Path)):
        raise ValueError("give a tokenizer along with a model object")
    path = _place(model)
    with readable(f"the tokenizer of model {path}", "save the tokenizer there, as tokenizer.save_pretrained does"):
        found = AutoTokenizer.from_pretrained(path)
        found("a")  # an empty vocabulary only shows when it is used
    return found


def kind_of(model: Any) -> str:
    """:func:`alignguard.objective.model_kind`, from the configuration alone where the model is a path or a name.

    Raises:
        FileNotFoundError, TypeError, ValueError: as :func:`load_model`.
    """
    if isinstance(model, (str, Path)):
        return next(kind for kind, loader in LOADERS.items() if loader is _model_class(_place(model)))
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a path, a hub name or a loaded model, not {model!r:.80}")
    return model_kind(model)


def load_weights(model: Any) -> Any:
    """The model itself, or read from its folder or hub name.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_model`.
    """
    if not isinstance(model, (str, Path)):
        return model
    path = _place(model)
    # half precision on a processor is slow and coarse; on an accelerator the checkpoint's own dtype stays
    dtype = "auto" if torch.cuda.is_available() else torch.float32
    loader = _model_class(path)
    with readable(f"model {path}", "give a folder that save_pretrained wrote, or a hub name"):
        loaded, found = loader.from_pretrained(path, dtype=dtype, output_loading_info=True)
    if lacking := sorted(found["missing_keys"]):
        raise ValueError(
            f"model {path} lacks the weights {', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''}, which would "
            f"start at random; give a whole checkpoint of a {type(loaded).__name__}"
        )
    return loaded


def _place(model: str | Path) -> str:
    """A model's name as the libraries take it.

    Raises:
        FileNotFoundError: a local path that is not there.
        NotADirectoryError: it is a file.
        ValueError: no name at all.
    """
    path = str(model)
    if not path.strip() or "\0" in path:
        raise ValueError(f"model: {path!r} names nothing; give a folder or a hub name")
    local = Path(path).expanduser()
    if local.is_file():
        raise NotADirectoryError(f"model: {path} is a file; give the folder that it stands in")
    if (path.startswith((".", "/", "~")) or isinstance(model, Path)) and not local.is_dir():
        raise FileNotFoundError(f"model: no such folder: {path}")
    return path


LOADERS = {
    "causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM,
    "classification": AutoModelForSequenceClassification,
}  # fmt: skip


def _model_class(path: str) -> Any:
    with readable(f"model {path}", "give a folder with the config.json that save_pretrained wrote, or a hub name"):
        config = AutoConfig.from_pretrained(path)
        names = [str(name) for name in config.architectures or ()]
        both = bool(getattr(config, "is_encoder_decoder", False))
    if any(name.endswith("ForSequenceClassification") for name in names):
        return LOADERS["classification"]
    return LOADERS["seq2seq" if both else "causal"]


def check_device(name: str, device: Any) -> None:
    """Refuse a device that torch does not have here.

    Raises:
        ValueError: naming the option.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        words = str(error).splitlines()[0]
        raise ValueError(f'{name}={device!r} is no device of this machine ({words}); "cpu" is one') from error


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
        TypeError, ValueError: fields that are no LoraConfig's, values out of range, or target modules that match
            nothing.
    """
    if isinstance(model, PeftModel):
        return model
    if not isinstance(lora, LoraConfig):
        if lora is not None and not isinstance(lora, Mapping):
            raise TypeError(f"lora must be a peft.LoraConfig or its fields, not {lora!r}")
        if unknown := sorted(set(map(str, lora or {})) - set(LoraConfig.__dataclass_fields__)):
            raise ValueError(f"lora: unknown fields {unknown}; see peft.LoraConfig")
        _check_lora(lora or {})
        try:
            lora = LoraConfig(**_fields(model, lora or {}))
        except (ValueError, TypeError, ImportError, AttributeError) as error:
            raise ValueError(f"lora: peft.LoraConfig refuses these fields ({' '.join(str(error).split())})") from error
    paths = [f".{path}" for path, _ in model.named_modules()]
    if lacking := [name for name in lora.modules_to_save or () if not any(p.endswith(f".{name}") for p in paths)]:
        raise ValueError(f"lora: the model has no module {lacking[0]!r} of modules_to_save")
    try:
        return get_peft_model(model, lora)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # peft and the libraries below it have many kinds
        linears = sorted(
            {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        )
        raise ValueError(
            f"lora: target_modules={lora.target_modules!r} cannot be adapted ({' '.join(str(error).split())[:300]}); the "
            f"model's Linear modules end in {linears}"
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
