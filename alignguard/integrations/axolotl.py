"""The guard as a plugin of axolotl: ``plugins: [alignguard.integrations.axolotl.AlignGuardPlugin]``."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, Field, field_validator

from alignguard.drift import driftcheck
from alignguard.integrations.options import Options
from alignguard.training import GuardMixin

logger = logging.getLogger(f"axolotl.{__name__}")  # axolotl shows what is logged under its own name

KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


class AlignGuardArgs(BaseModel):
    """What the plugin adds to axolotl's configuration."""

    alignguard: dict[str, Any] | None = Field(default=None, description="alignguard.integrations.options.Options")

    @field_validator("alignguard")
    @classmethod
    def known(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        """Refuse what the guard does not know, before anything is loaded."""
        try:
            Options.read(given)
        except TypeError as error:  # pydantic hands on ValueError alone
            raise ValueError(str(error)) from error
        return given


def options_of(cfg: Any) -> Options:
    """The block ``alignguard:`` of a configuration.

    Raises:
        ValueError: an unknown option, or settings of axolotl under which the guard would not see what trains.
    """
    block = cfg.get("alignguard")
    options = Options.read(None if block is None else dict(block))
    on = [name for name in KERNELS if cfg.get(name)]
    if on and options.guard_config().reads_fisher:
        raise ValueError(
            f"alignguard: the Fisher cannot see layers that a fused kernel computes; set {', '.join(on)} to false, or take "
            "the default guard, which charges KL alone"
        )
    if cfg.get("rl"):
        raise ValueError(
            f"alignguard: axolotl gives a plugin no way into its {cfg.get('rl')} trainer; guard TRL's trainer directly"
        )
    return options


def guarded(base: type, options: Options) -> type:
    """A trainer class of axolotl's with the guard before it."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        GuardMixin.__init__(self, *args, guard=options.guard, **kwargs)

    return type(f"Guarded{base.__name__}", (GuardMixin, base), {"__init__": __init__})


class AlignGuardPlugin(BasePlugin):
    """Guards axolotl's trainer, reads DriftCheck while it trains, and writes its report afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self._tokenizer: Any = None

    def get_input_args(self) -> str:
        """Where the configuration's new block is declared."""
        return f"{__name__}.AlignGuardArgs"

    def get_trainer_cls(self, cfg: Any) -> type:
        """The trainer of axolotl with the guard before it."""
        options = options_of(cfg)
        from axolotl.core.trainers import AxolotlTrainer

        return guarded(AxolotlTrainer, options)

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """DriftCheck while training, where it is asked for."""
        self._tokenizer = trainer.processing_class
        callback = options_of(cfg).callback(trainer, trainer.processing_class)
        return [] if callback is None else [callback]

    def post_train(self, cfg: Any, model: Any) -> None:
        """Write DriftCheck's report beside the adapter, once for each trainer: axolotl calls twice."""
        options = options_of(cfg)
        tokenizer, self._tokenizer = self._tokenizer, None
        if not options.driftcheck or tokenizer is None or int(os.environ.get("RANK", "0")) != 0:
            return
        report = driftcheck(model, getattr(tokenizer, "tokenizer", tokenizer), limit=options.limit)
        path = Path(cfg["output_dir"]) / "driftcheck.json"
        report.save(path)
        logger.info("DriftCheck, written to %s:\n%s", path, report.table())
