"""Models and tokenizers as people name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
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
    try:
        local = Path(path).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(f"model: no such folder: {path} ({error})") from error
    if local.is_file():
        raise NotADirectoryError(f"model: {path} is a file; give the folder that it stands in")
    if (path.startswith((".", "/", "~")) or isinstance(model, Path)) and not local.is_dir():
        raise FileNotFoundError(f"model: no such folder: {path}")
    return str(local) if path.startswith("~") else path


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
