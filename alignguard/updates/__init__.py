"""What trains, as weight updates ΔW: of LoRA adapters and of whole weights, and what is refused."""

from alignguard.updates.checks import check_plugins, check_trained
from alignguard.updates.covered import Covered, coverage, coverage_table
from alignguard.updates.lora import base_name, lora_updates, starts_at_base
from alignguard.updates.matrices import METHODS, Matrix, Update
from alignguard.updates.weight_updates import OF_ADAPTER, WeightUpdates

__all__ = [
    "METHODS",
    "OF_ADAPTER",
    "Covered",
    "Matrix",
    "Update",
    "WeightUpdates",
    "base_name",
    "check_plugins",
    "check_trained",
    "coverage",
    "coverage_table",
    "lora_updates",
    "starts_at_base",
]
