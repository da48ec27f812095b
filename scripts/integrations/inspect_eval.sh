#!/usr/bin/env bash
# inspect_ai's own command on the embedded model, and DriftCheck's beside it: the two must give the same shares.
# Wants an environment with fishergeo[inspect]; LIMIT asks only so many prompts of each category. CI leaves it out.
set -euo pipefail
export HF_HUB_OFFLINE=1
MODEL=$(python -c 'from alignguard.embedded import model_path; print(model_path())')
OUT=${1:-runs/inspect}
mkdir -p "$OUT"
for category in unsafe borderline ordinary; do
  inspect eval "alignguard/driftcheck_$category" --model hf/local -M model_path="$MODEL" -M do_sample=false -M dtype=float32 \
    --log-dir "$OUT/logs" --display none --no-fail-on-error ${LIMIT:+--limit "$LIMIT"}
done
alignguard driftcheck --model "$MODEL" --output "$OUT/driftcheck.json" --overwrite ${LIMIT:+--limit "$LIMIT"}
python - "$OUT" <<'PYTHON'
import json, sys
from pathlib import Path
from inspect_ai.log import list_eval_logs, read_eval_log

out = Path(sys.argv[1])
rows = {row["id"]: row for row in json.loads((out / "driftcheck.json").read_text())["rows"]}
asked = differ = 0
for info in list_eval_logs(str(out / "logs")):
    log = read_eval_log(info)
    means = {score.name: score.metrics["mean"].value for score in log.results.scores}
    print(log.eval.task, {name: round(value, 4) for name, value in means.items()})
    for sample in log.samples:
        score, row = sample.scores["driftcheck_judge"], rows[sample.id]
        asked += 1
        differ += (score.answer, score.explanation) != (row["text"], row["verdict"])
print(f"{asked} prompts, {differ} judged or answered otherwise than by driftcheck")
sys.exit(bool(differ) or not asked)
PYTHON
