#!/usr/bin/env bash
# TRL's SFT with the guard on the embedded model, the adapter put on by TRL itself; the log must hold the guard's terms.
# Wants an environment with fishergeo[trl]. CI leaves it out.
set -euo pipefail
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
OUT=${1:-runs/trl}
mkdir -p "$OUT"
python - "$OUT" <<'PYTHON'
import sys
from functools import partial

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import alignguard
from alignguard.data import read_jsonl
from alignguard.embedded import data_path, model_path
from alignguard.loading import load_model


class GuardSFTTrainer(alignguard.GuardMixin, SFTTrainer):
    pass


model, tokenizer = load_model(model_path())
every_step = alignguard.GuardConfig(kl_every=1, kl_memory=0)  # so that ten steps show it
rows = read_jsonl(data_path("task_train"))[:64]
trainer = GuardSFTTrainer(
    model=model,
    args=SFTConfig(
        sys.argv[1], max_steps=10, per_device_train_batch_size=8, logging_steps=1, learning_rate=1e-3, use_cpu=True,
        bf16=False, report_to="none", save_strategy="no",
    ),
    train_dataset=Dataset.from_list([{"prompt": r["prompt"], "completion": r["response"]} for r in rows]),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    guard=partial(alignguard.make_guard, alignment_data=data_path("alignment"), config=every_step),
)
trainer.add_callback(alignguard.DriftCallback(every=5, limit=8, tokenizer=tokenizer, trainer=trainer))
trainer.train()
logged = [entry["alignguard/kl"] for entry in trainer.state.log_history if "alignguard/kl" in entry]
print("KL term, step by step:", [f"{value:.1e}" for value in logged])
assert len(logged) == 10 and max(logged) > 0
PYTHON
