#!/usr/bin/env bash
# axolotl's own command with the plugin on the embedded model; the log must hold the guard's terms, and DriftCheck's report.
# Wants an environment with fishergeo[axolotl], installed by uv: pip alone took more than six minutes. CI leaves it out.
set -euo pipefail
export HF_HUB_OFFLINE=1 AXOLOTL_DO_NOT_TRACK=1
HERE=$(cd "$(dirname "$0")" && pwd)
OUT=$(mkdir -p "${1:-runs/axolotl}" && cd "${1:-runs/axolotl}" && pwd)
MODEL=$(python -c 'from alignguard.embedded import model_path; print(model_path())')
head -n 64 "$(python -c 'from alignguard.embedded import data_path; print(data_path("task_train"))')" > "$OUT/task.jsonl"
head -n 16 "$(python -c 'from alignguard.embedded import data_path; print(data_path("alignment"))')" > "$OUT/keep.jsonl"
sed -e "s|MODEL|$MODEL|" -e "s|DATA|$OUT|" -e "s|OUT|$OUT/out|" "$HERE/axolotl.yaml" > "$OUT/run.yaml"
axolotl train "$OUT/run.yaml" --launcher python 2>&1 | tee "$OUT/log.txt"
grep -q "alignguard/kl" "$OUT/log.txt"
test -s "$OUT/out/driftcheck.json"
test "$(grep -c "DriftCheck, written to" "$OUT/log.txt")" = 1  # axolotl ends a run twice
alignguard driftcheck --model "$MODEL" --adapter "$OUT/out" --limit 8 --output "$OUT/again.json" --overwrite
python - "$OUT" <<'PYTHON'
import sys
from pathlib import Path
from alignguard import DriftReport

out = Path(sys.argv[1])
told, again = (DriftReport.load(path).rows for path in (out / "out" / "driftcheck.json", out / "again.json"))
assert [(row.id, row.text, row.verdict) for row in told] == [(row.id, row.text, row.verdict) for row in again]
print(f"{len(again)} prompts, the adapter as axolotl wrote it answers as it did in training")
PYTHON
