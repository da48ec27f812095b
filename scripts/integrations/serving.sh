#!/usr/bin/env bash
# A guarded adapter of the embedded model where people use it: plain peft, merged, GGUF, and two servers of OpenAI's chat
# completions (transformers', and llama.cpp's on the GGUF file), each asked by driftcheck. Every verdict must be that of the
# adapter itself. Wants an environment with fishergeo and transformers[serving]; for GGUF also gguf, xllamacpp and
# LLAMA_CPP, the folder of llama.cpp's sources. CI leaves it out.
set -euo pipefail
export HF_HUB_OFFLINE=1
OUT=$(mkdir -p "${1:-runs/serving}" && cd "${1:-runs/serving}" && pwd)
LIMIT=${LIMIT:-16}  # prompts of each category
MODEL=$(python -c 'from alignguard.embedded import model_path; print(model_path())')
DATA=$MODEL/../data
check() { alignguard driftcheck --limit "$LIMIT" --overwrite "$@"; }
port() { python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
serve() { # PORT COMMAND...: the server in the background, until it answers
  local port=$1
  shift
  "$@" > "$OUT/server.log" 2>&1 &
  SERVER=$!
  trap 'kill $SERVER 2> /dev/null || true' EXIT
  until python -c "from urllib.request import urlopen; urlopen('http://127.0.0.1:$port/health')" 2> /dev/null; do
    kill -0 $SERVER 2> /dev/null || { tail "$OUT/server.log"; exit 1; }
    sleep 1
  done
}
stop() { kill $SERVER && wait $SERVER || true; }

alignguard fit --model "$MODEL" --task-data "$DATA/task_train.jsonl" --alignment-data "$DATA/alignment.jsonl" \
  --max-steps "${STEPS:-20}" --learning-rate 0.004 --per-device-train-batch-size 16 --output-dir "$OUT/fit" --overwrite
check --model "$MODEL" --adapter "$OUT/fit/adapter" --output "$OUT/adapter.json"

python - "$MODEL" "$OUT" <<'PYTHON'
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), f"{out}/fit/adapter").eval()
ids = tokenizer("Name three colours of the rainbow.", return_tensors="pt")
with torch.no_grad():
    with tuned.disable_adapter():
        base = tuned(**ids).logits
    before = tuned(**ids).logits
    merged = tuned.merge_and_unload()
    after = merged(**ids).logits
assert not [name for name in sys.modules if name.startswith(("alignguard", "fishergeo"))]
print(f"plain peft: logits {float((before - base).abs().max()):.3g} from the base, {float((after - before).abs().max()):.2g} apart once merged")
merged.save_pretrained(f"{out}/merged")
tokenizer.save_pretrained(f"{out}/merged")
PYTHON
check --model "$OUT/merged" --output "$OUT/merged.json"

PORT=$(port)
serve "$PORT" transformers serve "$OUT/merged" --host 127.0.0.1 --port "$PORT" --device cpu --dtype float32
check --endpoint "http://127.0.0.1:$PORT" --model "$OUT/merged" --output "$OUT/transformers-serve.json"
stop

if [ -n "${LLAMA_CPP:-}" ]; then
  # The converter knows tokenizers by a hash over what they say; this one's words are its own, cut up as GPT-2 cuts.
  python - "$LLAMA_CPP" "$OUT/merged" --outfile "$OUT/tuned.gguf" --outtype f32 <<'PYTHON'
import runpy, sys

sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0])
from conversion.base import TextModel

TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
runpy.run_path(f"{sys.argv[0]}/convert_hf_to_gguf.py", run_name="__main__")
PYTHON
  python - "$OUT" <<'PYTHON'
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

out = sys.argv[1]
ids = AutoTokenizer.from_pretrained(f"{out}/merged")("Name three colours of the rainbow.", return_tensors="pt")
assert AutoTokenizer.from_pretrained(out, gguf_file="tuned.gguf")("Name three colours of the rainbow.").input_ids == ids.input_ids[0].tolist()
with torch.no_grad():
    merged, again = (AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **options).eval()(**ids).logits
                     for place, options in ((f"{out}/merged", {}), (out, {"gguf_file": "tuned.gguf"})))
print(f"GGUF read back by transformers: logits {float((merged - again).abs().max()):.2g} apart")
PYTHON
  check --model "$OUT/tuned.gguf" --output "$OUT/gguf.json"
  PORT=$(port)
  serve "$PORT" python -c '
import sys, threading
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_ctx, params.n_parallel = sys.argv[1], int(sys.argv[2]), 256, 1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
threading.Event().wait()' "$OUT/tuned.gguf" "$PORT"
  check --endpoint "http://127.0.0.1:$PORT" --model tuned --output "$OUT/llama-cpp.json"
  stop
fi

python - "$OUT" <<'PYTHON'
import sys
from pathlib import Path

from alignguard import DriftReport

out, apart = Path(sys.argv[1]), 0
wanted = {row.id: row for row in DriftReport.load(out / "adapter.json").rows}
for name in ("merged", "transformers-serve", "gguf", "llama-cpp"):
    if not (out / f"{name}.json").exists():
        continue
    report = DriftReport.load(out / f"{name}.json")
    verdicts = sum(row.verdict != wanted[row.id].verdict for row in report.rows)
    texts = sum(row.text != wanted[row.id].text for row in report.rows)
    print(f"{name}: {len(report.rows)} prompts, {verdicts} other verdicts and {texts} other answers than the adapter's")
    apart += verdicts
sys.exit(bool(apart))
PYTHON
