#!/usr/bin/env bash
# ms-swift's own command with the plugin on the embedded model; its log must hold the guard's terms.
# Wants an environment with ms-swift and fishergeo. CI leaves it out.
set -euo pipefail
export HF_HUB_OFFLINE=1
OUT=$(mkdir -p "${1:-runs/ms_swift}" && cd "${1:-runs/ms_swift}" && pwd)
MODEL=$(python -c 'from alignguard.embedded import model_path; print(model_path())')
ALIGNMENT=$(python -c 'from alignguard.embedded import data_path; print(data_path("alignment"))')
python - "$OUT" <<'PYTHON'
import json, sys
from pathlib import Path
from alignguard.data import read_jsonl
from alignguard.embedded import data_path

turns = ({"role": "user", "content": "prompt"}, {"role": "assistant", "content": "response"})
rows = [{"messages": [{**turn, "content": row[turn["content"]]} for turn in turns]} for row in read_jsonl(data_path("task_train"))[:64]]
(Path(sys.argv[1]) / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
PYTHON
printf 'alignment_data: %s\nconfig: {kl_every: 1, kl_memory: 0}\ndrift_every: 5\nlimit: 8\n' "$ALIGNMENT" > "$OUT/guard.yaml"
ALIGNGUARD="$OUT/guard.yaml" swift sft --model "$MODEL" --model_type llama --template dummy --use_hf true \
  --dataset "$OUT/task.jsonl" --tuner_type lora --lora_rank 8 --target_modules all-linear --torch_dtype float32 \
  --max_steps 10 --per_device_train_batch_size 8 --logging_steps 1 --max_length 128 --output_dir "$OUT/out" \
  --external_plugins "$(python -m alignguard.integrations.ms_swift)" 2>&1 | tee "$OUT/log.txt"
grep -q "alignguard/kl" "$OUT/log.txt"
