"""The aligned model that ships with the package, the data of its task, and the settings it is trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Fields of transformers.TrainingArguments; the rate: benchmarks/learning_rate.py and its results.
TRAINING: dict[str, Any] = {"learning_rate": 4e-3, "max_steps": 200, "per_device_train_batch_size": 16}

_HERE = Path(__file__).parent


def model_path() -> Path:
    """Folder for ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained``."""
    return _HERE / "model"


def data_path(name: str) -> Path:
    """A data file of the demo: ``task_train``, ``task_validation``, ``task_test``, ``alignment`` or ``validation``.

    Raises:
        FileNotFoundError: another name; the message lists the files there are.
    """
    path = _HERE / "data" / f"{name}.jsonl"
    if not path.is_file():
        names = sorted(p.stem for p in path.parent.glob("*.jsonl"))
        raise FileNotFoundError(f"no embedded data named {name!r}; there are {names}")
    return path
