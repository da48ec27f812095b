"""DriftCheck as tasks of lm-evaluation-harness: what a model refuses and what it answers, in one folder of task files.

``lm_eval --include_path "$(python -m alignguard.integrations.lm_eval_tasks)" --tasks driftcheck --model hf \\
--model_args pretrained=DIR --apply_chat_template``
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
