"""The guard in ms-swift: ``swift sft ... --external_plugins "$(python -m alignguard.integrations.ms_swift)"``.

What it is told stands in the YAML file that the environment variable ``ALIGNGUARD`` names: the options of
:class:`alignguard.integrations.options.Options`, all of which may be left out.
"""

from __future__ import annotations

import os
from typing import Any

from alignguard.integrations.options import Options
from alignguard.training import GuardMixin

VARIABLE = "ALIGNGUARD"


def guarded(base: type, options: Options) -> type:
    """A trainer class of ms-swift's with the guard before it.

    Args:
        base: the trainer's class.
        options: what the guard is told.
    """

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        GuardMixin.__init__(self, *args, guard=options.guard, **kwargs)
        self._probed = True  # its batches hold more than the model takes, and its losses keep the Trainer's rule
        if (callback := options.callback(self, self.processing_class)) is not None:
            self.add_callback(callback)

    return type(base.__name__, (GuardMixin, base), {"__init__": __init__})  # it asks for names


def register() -> None:
    """Have ms-swift's factory give guarded trainers, whichever it is asked for.

    Raises:
        TypeError, ValueError: bad options; named.
    """
    from swift.trainers.trainer_factory import TrainerFactory

    options = Options.read(os.environ.get(VARIABLE))
    plain = TrainerFactory.get_trainer_cls

    def get_trainer_cls(args: Any) -> type:
        return guarded(plain(args), options)

    TrainerFactory.get_trainer_cls = staticmethod(get_trainer_cls)
