"""Models and tokenizers as people name them."""

from __future__ import annotations

from collections.abc import Sequence
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
from alignguard.loading.adapters import check_bare
from alignguard.objective import base_model, model_kind, positions


def load_model(
    model: str | Path | PreTrainedModel | PeftModel, tokenizer: Any = None, trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """A model in float32 or its own precision on an accelerator, and its tokenizer.

    The checkpoint's own configuration decides between a causal LM, an encoder-decoder and a sequence classifier.

    Args:
        model: folder, GGUF file, hub name or loaded model.
        tokenizer: tokenizer of a loaded model, or in place of the model's own; a folder or hub name too.
        trust_remote_code: run Python that comes with model or tokenizer; nobody is asked.

    Raises:
        FileNotFoundError: a local path that is not there.
        ValueError: a model object without a tokenizer, files that are damaged, incomplete or of something else, or a model of
            another kind, such as a masked LM.
    """
    words = load_tokenizer(model, tokenizer, trust_remote_code)
    return load_weights(model, trust_remote_code), words


def load_tokenizer(model: Any, tokenizer: Any = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer given, or read from the folder or hub name given, or from the model's.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_model`.
    """
    if tokenizer is not None and not isinstance(tokenizer, (str, Path)):
        return tokenizer
    if tokenizer is None and not isinstance(model, (str, Path)):
        raise ValueError("give a tokenizer along with a model object")
    path, options = _place(model if tokenizer is None else tokenizer, "model" if tokenizer is None else "tokenizer")
    whose = f"of model {path}" if tokenizer is None else str(path)
    advice = f"give another with tokenizer (--tokenizer), save it there with tokenizer.save_pretrained{TRUST}"
    with readable(f"the tokenizer {whose}", advice):
        found = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **options)
        found("a")  # an empty vocabulary only shows when it is used
    return found


def positions_of(model: str | Path, trust_remote_code: bool = False) -> int | None:
    """:func:`alignguard.objective.positions` of a model's path or name.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_model`.
    """
    return positions(_configuration(model, trust_remote_code))


def kind_of(model: Any, trust_remote_code: bool = False) -> str:
    """:func:`alignguard.objective.model_kind`, from the configuration alone where the model is a path or a name.

    Raises:
        FileNotFoundError, TypeError, ValueError: as :func:`load_model`.
    """
    if isinstance(model, (str, Path)):
        return next(kind for kind, loader in LOADERS.items() if loader is _model_class(model, trust_remote_code))
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a path, a hub name or a loaded model, not {model!r:.80}")
    _check_heads("model", [type(base_model(model)).__name__])
    return model_kind(model)


def load_weights(model: Any, trust_remote_code: bool = False) -> Any:
    """The model itself, or read from its folder, GGUF file or hub name; one out of a GGUF file is an ordinary one.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_model`; or an object with an adapter's layers in it that is no PeftModel.
    """
    if not isinstance(model, (str, Path)):
        if not isinstance(model, PeftModel):
            check_bare(model)
        _check_heads("model", [type(base_model(model)).__name__])
        return _plain(model)
    path, options = _place(model)
    # half precision on a processor is slow and coarse; on an accelerator the checkpoint's own dtype stays
    dtype = "auto" if torch.cuda.is_available() else torch.float32
    loader = _model_class(model, trust_remote_code)
    with readable(f"model {path}", f"give a folder that save_pretrained wrote, or a hub name{TRUST}"):
        loaded, found = loader.from_pretrained(
            path, dtype=dtype, output_loading_info=True, trust_remote_code=trust_remote_code, **options
        )
    if lacking := sorted(found["missing_keys"]):
        raise ValueError(
            f"model {path} lacks the weights {', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''}, which would "
            f"start at random; give a whole checkpoint of a {type(loaded).__name__}"
        )
    return _plain(loaded)


def _plain(model: Any) -> Any:
    """A model without the mark of the GGUF file that its weights came from: they are floats, and may train."""
    inner = base_model(model)
    quantizer = getattr(inner, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.quant_method == "gguf":
        quantizer.remove_quantization_config(inner)
    return model


def _place(model: str | Path, what: str = "model") -> tuple[str, dict[str, Any]]:
    """A model's name as the libraries take it, and for a GGUF file its folder with the option that names the file.

    Raises:
        FileNotFoundError: a local path that is not there.
        NotADirectoryError: it is a file, and no GGUF file.
        ValueError: no name at all, or a folder with several GGUF files and nothing else.
    """
    path = str(model)
    if not path.strip() or "\0" in path:
        raise ValueError(f"{what}: {path!r} names nothing; give a folder or a hub name")
    try:
        local = Path(path).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(f"{what}: no such folder: {path} ({error})") from error
    if local.is_file():
        if local.suffix != ".gguf":
            raise NotADirectoryError(f"{what}: {path} is a file; give the folder that it stands in")
        return str(local.parent), {"gguf_file": local.name}
    if (path.startswith((".", "/", "~")) or isinstance(model, Path)) and not local.is_dir():
        raise FileNotFoundError(f"{what}: no such folder: {path}")
    if what == "model" and (local / "adapter_config.json").exists() and not (local / "config.json").exists():
        raise ValueError(
            f"{what}: {path} is the folder of an adapter; give its base model, which its adapter_config.json names, and the "
            "adapter to driftcheck with --adapter, or in Python PeftModel.from_pretrained(base, folder)"
        )
    if local.is_dir() and not (local / "config.json").exists() and (found := sorted(local.glob("*.gguf"))):
        if len(found) > 1:
            raise ValueError(f"{what}: {path} holds {len(found)} GGUF files; give one of them, as {found[0]}")
        return str(local), {"gguf_file": found[0].name}
    return str(local) if path.startswith("~") else path, {}


LOADERS = {
    "causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM,
    "classification": AutoModelForSequenceClassification,
}  # fmt: skip

# Heads that are not read: with another in its place, such a model would say what it was never trained to say.
UNREAD_HEADS = (
    "ForMaskedLM", "ForPreTraining", "ForNextSentencePrediction", "ForTokenClassification", "ForQuestionAnswering",
    "ForMultipleChoice", "ForImageClassification", "ForAudioClassification", "ForCTC",
)  # fmt: skip

TRUST = "; where it brings code of its own that you trust, allow it with trust_remote_code (--trust-remote-code)"


def _configuration(model: str | Path, trust_remote_code: bool) -> Any:
    path, options = _place(model)
    with readable(
        f"model {path}", f"give a folder with the config.json that save_pretrained wrote, or a hub name{TRUST}"
    ):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **options)
        config.architectures = [str(name) for name in config.architectures or ()]
        return config


def _model_class(model: str | Path, trust_remote_code: bool = False) -> Any:
    config = _configuration(model, trust_remote_code)
    names = config.architectures
    both = bool(getattr(config, "is_encoder_decoder", False))
    _check_heads(f"model {_place(model)[0]}", names)
    if any(name.endswith("ForSequenceClassification") for name in names):
        return LOADERS["classification"]
    return LOADERS["seq2seq" if both else "causal"]


def _check_heads(what: str, names: Sequence[str]) -> None:
    """Refuse a model none of whose classes is a causal LM, an encoder-decoder or a sequence classifier.

    Raises:
        ValueError: naming the first.
    """
    if names and all(name.endswith(UNREAD_HEADS) for name in names):
        raise ValueError(
            f"{what} is a {names[0]}; give a causal LM, an encoder-decoder that generates, or a sequence classifier"
        )


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
