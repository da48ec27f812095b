#!/usr/bin/env bash
# ms-swift's own commands with the plugin on the embedded model. `swift sft` must log, step by step, the loss and the terms of
# `alignguard fit` on the same rows from the same adapter; `swift rlhf` (DPO, ORPO, KTO, GRPO) must begin with fit's terms.
# Wants an environment with ms-swift, msgspec (which its GRPO imports) and fishergeo. CI leaves it out.
set -euo pipefail
export HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=
OUT=$(mkdir -p "${1:-runs/ms_swift}" && cd "${1:-runs/ms_swift}" && pwd)
MODEL=$(python -c 'from alignguard.embedded import model_path; print(model_path())')
ALIGNMENT=$(python -c 'from alignguard.embedded import data_path; print(data_path("alignment"))')
rm -rf "$OUT"/{sft,dpo,orpo,kto,grpo}
cat > "$OUT/guard.yaml" <<YAML
alignment_data: $ALIGNMENT
preset: combined
config: {refresh_every: 2, refresh_examples: 4, kl_examples: 2, kl_every: 1, kl_memory: 0, lambda_kl: 40, lambda_alignment: 40}
drift_every: 3
limit: 8
YAML
python - "$OUT" <<'PYTHON'
"""An adapter that has begun to move, the task's rows as ms-swift reads them, and what fit logs of both."""

import json, sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import set_seed

from alignguard import fit
from alignguard.data import read_jsonl
from alignguard.embedded import data_path, model_path
from alignguard.integrations.options import Options
from alignguard.loading import adapt, load_model

out = Path(sys.argv[1])
rows = read_jsonl(data_path("task_train"))[:48]
messages = [
    [{"role": "user", "content": f"<|bos|><|user|>{row['prompt']}<|assistant|>"}, {"role": "assistant", "content": row["response"]}]
    for row in rows
]
task = [{"messages": turns} for turns in messages]
# The worse answer is that to the next prompt.
pairs = [{**row, "rejected_response": after["response"]} for row, after in zip(task, rows[1:] + rows[:1])]
judged = [
    {"messages": [prompt, {"role": "assistant", "content": after["response"]}] if i % 2 else [prompt, answer], "label": i % 2 == 0}
    for i, ((prompt, answer), after) in enumerate(zip(messages, rows[1:] + rows[:1]))
]
prompts = [{"messages": [prompt]} for prompt, _ in messages]
for name, lines in (("task", task), ("pairs", pairs), ("judged", judged), ("prompts", prompts)):
    (out / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

model, tokenizer = load_model(model_path())
set_seed(0)
adapted = adapt(model, {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"})
with torch.no_grad():
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.normal_(std=0.03)
adapted.save_pretrained(out / "start")
start = PeftModel.from_pretrained(load_model(model_path())[0], out / "start", is_trainable=True)
options = Options.read(out / "guard.yaml")
training = {
    "max_steps": 6, "per_device_train_batch_size": 8, "logging_steps": 1, "learning_rate": 2e-3, "warmup_steps": 0,
    "adam_beta2": 0.95, "train_sampling_strategy": "sequential",
}
fit(start, rows, options.alignment_data, options.guard_config(), out / "fit", tokenizer=tokenizer, training=training, overwrite=True)
PYTHON
train() { # NAME COMMAND...: so many steps on the rows in their order
  local name=$1
  shift
  ALIGNGUARD="$OUT/guard.yaml" "$@" --model "$MODEL" --model_type llama --template dummy --use_hf true \
    --adapters "$OUT/start" --tuner_type lora --torch_dtype float32 --fp16 false --max_length 256 \
    --dataset_shuffle false --train_dataloader_shuffle false --per_device_train_batch_size 8 --gradient_accumulation_steps 1 \
    --learning_rate 2e-3 --lr_scheduler_type linear --warmup_ratio 0 --weight_decay 0 --logging_steps 1 \
    --output_dir "$OUT/$name" --add_version false \
    --external_plugins "$(python -m alignguard.integrations.ms_swift)" 2>&1 | tee "$OUT/$name.log"
}
train sft swift sft --dataset "$OUT/task.jsonl" --max_steps 6
rlhf() { train "$1" swift rlhf --rlhf_type "$1" --dataset "$OUT/$2.jsonl" --max_steps 3 "${@:3}"; }
rlhf dpo pairs
rlhf orpo pairs
rlhf kto judged
rlhf grpo prompts --reward_funcs repetition --num_generations 2 --max_completion_length 16
python - "$OUT" <<'PYTHON'
import json, math, sys
from pathlib import Path

out = Path(sys.argv[1])
wanted = json.loads((out / "fit" / "history.json").read_text())
terms = ("alignguard/kl", "alignguard/alignment")
assert len(wanted) == 6 and min(step[name] for step in wanted for name in terms) > 1e-4
for kind, steps, names in (("sft", 6, ("loss", *terms)), *((kind, 1, terms) for kind in ("dpo", "orpo", "kto", "grpo"))):
    (state,) = (out / kind).glob("checkpoint-*/trainer_state.json")
    found = [entry for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
    assert len(found) >= max(steps, 3) and all(math.isfinite(entry[name]) for entry in found for name in ("loss", *terms))
    apart = {  # in parts of the run's largest: a KL of 1e-5 nats is not told to its fifth digit in float32
        name: max(abs(mine[name] - theirs[name]) for mine, theirs in zip(found[:steps], wanted))
        / max(theirs[name] for theirs in wanted[:steps])
        for name in names
    }
    print(f"{kind}: first {steps} of {len(found)} steps, apart from fit by", ", ".join(f"{n} {a:.1e}" for n, a in apart.items()))
    assert max(apart.values()) < 1e-5, (kind, found, wanted)
PYTHON
