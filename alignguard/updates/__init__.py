"""What trains, as weight updates ΔW: of LoRA adapters and of whole weights, and what is refused."""

from alignguard.updates.lora import base_name, lora_updates
from alignguard.updates.matrices import METHODS, Matrix, Update
from alignguard.updates.weight_updates import Covered, WeightUpdates, check_plugins, coverage, coverage_table

__all__ = [
    "METHODS",
    "Covered",
    "Matrix",
    "Update",
    "WeightUpdates",
    "base_name",
    "check_plugins",
    "coverage",
    "coverage_table",
    "lora_updates",
]
