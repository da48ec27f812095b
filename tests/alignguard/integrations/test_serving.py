"""What ``fit`` writes is served by tools that know nothing of the guard, and DriftCheck finds the same behind each."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignguard import GuardConfig, fit
from alignguard.data import read_jsonl
from alignguard.drift import Endpoint, driftcheck, driftcheck_endpoint, load_prompts
from alignguard.embedded import data_path, model_path
from alignguard.loading import load_model

SERVER = Path(__file__).parents[2] / "helpers" / "chat_server.py"
ROWS = [row for row in load_prompts(limit=3) if row["category"] != "capability"]
PROMPT = "Name three colours of the rainbow."

PLAIN = f"""
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model, adapter, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), adapter).eval()
ids = tokenizer({PROMPT!r}, return_tensors="pt")
with torch.no_grad():
    logits = tuned(**ids).logits[0, -1].tolist()
tuned.merge_and_unload().save_pretrained(out)
tokenizer.save_pretrained(out)
assert not [name for name in sys.modules if name.startswith(("alignguard", "fishergeo"))]
print(json.dumps(logits))
"""


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """An adapter that ``fit`` wrote, what a process without this package saw of it, and the folder that it merged."""
    out = tmp_path_factory.mktemp("served")
    fit(
        str(model_path()), read_jsonl(data_path("task_train"))[:64], str(data_path("alignment")), GuardConfig(), out / "fit",
        training={"max_steps": 6, "learning_rate": 4e-3, "warmup_steps": 0, "per_device_train_batch_size": 8},
    )  # fmt: skip
    said = subprocess.run(
        [sys.executable, "-c", PLAIN, str(model_path()), str(out / "fit" / "adapter"), str(out / "merged")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return out, torch.tensor(json.loads(said.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def expected(tuned):
    """DriftCheck of the adapter on its base, which the tuned model must differ from for anything to be shown."""
    model, tokenizer = load_model(model_path())
    base = driftcheck(model.eval(), tokenizer, ROWS, max_new_tokens=12)
    report = driftcheck(
        PeftModel.from_pretrained(model, tuned[0] / "fit" / "adapter").eval(), tokenizer, ROWS, max_new_tokens=12
    )
    assert told(report) != told(base)
    return report


def told(report):
    return [(row.id, row.text, row.verdict) for row in report.rows]


def last_logits(model):
    ids = AutoTokenizer.from_pretrained(model_path())(PROMPT, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**ids).logits[0, -1]


def test_plain_peft_loads_and_merges_it_without_this_package(tuned, expected):
    out, logits = tuned
    model, tokenizer = load_model(out / "merged")
    assert torch.allclose(last_logits(model), logits, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    assert (last_logits(base) - logits).abs().max() > 0.1
    assert told(driftcheck(model.eval(), tokenizer, ROWS, max_new_tokens=12)) == told(expected)


def test_a_gguf_file_of_it_is_the_same_model(tuned, expected):
    pytest.importorskip("gguf")
    from gguf_file import write_gguf

    out, logits = tuned
    write_gguf(out / "tuned.gguf", AutoModelForCausalLM.from_pretrained(out / "merged"))
    model, tokenizer = load_model(out / "tuned.gguf", str(out / "merged"))
    assert torch.allclose(last_logits(model), logits, atol=1e-4)
    assert told(driftcheck(model.eval(), tokenizer, ROWS, max_new_tokens=12)) == told(expected)


def test_a_server_of_the_merged_model_gives_its_verdicts(tuned, expected):
    process = subprocess.Popen(
        [sys.executable, str(SERVER), "0", str(tuned[0] / "merged")], stdout=subprocess.PIPE, text=True
    )
    try:
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        found = driftcheck_endpoint(Endpoint(url, "embedded"), ROWS, max_new_tokens=12)
    finally:
        process.kill()
        process.wait()
    assert told(found) == told(expected) and found.summary() == expected.summary()
