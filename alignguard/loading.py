"""Models as people name them, and the adapter put on them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from alignguard.adapters import ROUTER
from alignguard.objective import model_kind

DEFAULT_LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
TASK_TYPES = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "classification": "SEQ_CLS"}


def load_model(model: str | Path | PreTrainedModel | PeftModel, tokenizer: Any = None) -> tuple[Any, Any]:
    """A model in float32 or its own precision on an accelerator, and its tokenizer.

    The checkpoint's own configuration decides between a causal LM, an encoder-decoder and a sequence classifier.

    Raises:
        FileNotFoundError: a local path that is not there.
        ValueError: a model object without a tokenizer.
    """
    if isinstance(model, (str, Path)):
        path = str(model)
        if (path.startswith((".", "/", "~")) or isinstance(model, Path)) and not Path(path).expanduser().is_dir():
            raise FileNotFoundError(f"model: no such folder: {path}")
        # half precision on a processor is slow and coarse; on an accelerator the checkpoint's own dtype stays
        dtype = "auto" if torch.cuda.is_available() else torch.float32
        loaded = _model_class(path).from_pretrained(path, dtype=dtype)
        return loaded, tokenizer if tokenizer is not None else AutoTokenizer.from_pretrained(path)
    if tokenizer is None:
        raise ValueError("give a tokenizer along with a model object")
    return model, tokenizer


def _model_class(path: str) -> Any:
    config = AutoConfig.from_pretrained(path)
    if any(str(name).endswith("ForSequenceClassification") for name in config.architectures or ()):
        return AutoModelForSequenceClassification
    return AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else AutoModelForCausalLM


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
        ValueError: target modules that match nothing.
    """
    if isinstance(model, PeftModel):
        return model
    config = lora if isinstance(lora, LoraConfig) else LoraConfig(**_fields(model, lora or {}))
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        linears = sorted(
            {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        )
        raise ValueError(
            f"target_modules={config.target_modules!r} cannot be adapted ({error}); the model's Linear modules end in {linears}"
        ) from error
