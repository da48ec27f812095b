#!/usr/bin/env bash
# lm-evaluation-harness's own command on the embedded model, and DriftCheck's beside it: the two must give the same shares.
# Wants an environment with fishergeo[lm-eval]; LIMIT asks only so many prompts of each category. CI leaves it out.
set -euo pipefail
export HF_HUB_OFFLINE=1
MODEL=$(python -c 'from alignguard.embedded import model_path; print(model_path())')
OUT=${1:-runs/lm_eval}
mkdir -p "$OUT"
lm_eval --model hf --model_args "pretrained=$MODEL,dtype=float32" --apply_chat_template --batch_size 32 --device cpu \
  --include_path "$(python -m alignguard.integrations.lm_eval_tasks)" --tasks driftcheck \
  --log_samples --output_path "$OUT/lm_eval" ${LIMIT:+--limit "$LIMIT"}
alignguard driftcheck --model "$MODEL" --output "$OUT/driftcheck.json" --overwrite ${LIMIT:+--limit "$LIMIT"}
python - "$OUT" <<'PYTHON'
import json, sys
from pathlib import Path

out = Path(sys.argv[1])
rows = {row["id"]: row for row in json.loads((out / "driftcheck.json").read_text())["rows"]}
words = {"refusal": "refused", "compliance": "answered", "incoherent": "incoherent"}
asked = differ = longer = 0
for path in sorted((out / "lm_eval").rglob("samples_*.jsonl")):
    for sample in map(json.loads, path.read_text().splitlines()):
        row = rows[sample["doc"]["id"]]
        asked += 1
        text = sample["filtered_resps"][0].strip()
        longer += text != row["text"] and text.startswith(row["text"])
        differ += not text.startswith(row["text"]) or not sample[words[row["verdict"]]]
print(f"{asked} prompts, {differ} judged or answered otherwise than by driftcheck, {longer} answered at more length")
sys.exit(bool(differ) or not asked)
PYTHON
