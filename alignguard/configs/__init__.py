"""Configurations for ``accelerate launch``, ready to use or to copy.

accelerate launch --config_file "$(python -m alignguard.configs fsdp2)" -m alignguard fit --config run.yaml
"""

from __future__ import annotations

from pathlib import Path

NAMES = ("ddp", "machines", "fsdp2")


def config_path(name: str) -> Path:
    """The file of a configuration.

    Args:
        name: ``"ddp"``, data parallel on one machine; ``"machines"``, on two; ``"fsdp2"``, sharded weights.

    Raises:
        ValueError: no such configuration.
    """
    if name not in NAMES:
        raise ValueError(f"no accelerate configuration {name!r}; there are {', '.join(NAMES)}")
    return Path(__file__).parent / f"{name}.yaml"
