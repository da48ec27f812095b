"""A model's folder, written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def save_folder(out: Path, model: Any, tokenizer: Any, check: Callable[[Path], None] = lambda draft: None) -> None:
    """Save a model and its tokenizer beside ``out``, check the copy, and rename it to ``out``.

    Args:
        out: folder to write, which must not exist yet.
        model: a Hugging Face model; saved as safetensors.
        tokenizer: its tokenizer, saved with its chat template.
        check: called with the draft; what it raises leaves nothing behind.

    Raises:
        OSError: the folder cannot be written.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        check(draft)
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
