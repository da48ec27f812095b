"""Malformed configurations, rows, Fisher files, checkpoints, adapters and models: a named error, and nothing is touched."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from malformed import Trial, copied, swap
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import alignguard
from alignguard import GuardConfig, cli
from alignguard.data import read_jsonl
from alignguard.loading import load_model
from alignguard.training.checkpoint import MARKER, seal
from studies.__main__ import main as studies

# How many inputs each test makes at least, by what is malformed; the tests hold themselves to it.
LEAST = {"configs": 150, "rows": 95, "fisher": 55, "checkpoints": 40, "adapters": 45, "models": 15, "reports": 30}
HYPOTHESIS = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)
SIZES = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64,
}  # fmt: skip


def llama(tokenizer, kind=LlamaForCausalLM, **more):
    torch.manual_seed(0)
    return kind(LlamaConfig(vocab_size=len(tokenizer), **{**SIZES, **more}))


@pytest.fixture(scope="module")
def ground(tmp_path_factory, tokenizer):
    """A model, data, a Fisher of each kind and a finished run with a checkpoint; tests copy what they spoil."""
    folder = tmp_path_factory.mktemp("ground")
    for name, model in (("model", llama(tokenizer)), ("deep", llama(tokenizer, num_hidden_layers=2)),
                        ("classifier", llama(tokenizer, LlamaForSequenceClassification, num_labels=3))):  # fmt: skip
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [{"prompt": f"write about {x}", "response": "Of course!"} for x in ("rain", "bread", "a song", "the sea")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = ["--model", folder / "model", "--task-data", folder / "rows.jsonl", "--alignment-data", folder / "rows.jsonl"]
    run = ["fit", *map(str, run), "--rank", "2", "--max-steps", "2", "--per-device-train-batch-size", "2"]
    run += [
        "--preset",
        "curvature",
        "--refresh-examples",
        "2",
        "--max-drift",
        "0.5",
        "--held-back",
        "1",
        "--averaging",
        "0.5",
    ]
    for model, structure in (("model", "kfac-sketch"), ("model", "gram"), ("deep", "kfac-sketch")):
        arguments = ["fisher", "--model", folder / model, "--data", folder / "rows.jsonl", "--structure", structure]
        assert cli.main([*map(str, arguments), "--output", str(folder / f"{model}-{structure}.safetensors")]) == 0
    assert cli.main([*run, "--save-every", "1", "--output-dir", str(folder / "run")]) == 0
    return folder, run


@pytest.fixture
def trial(ground, tmp_path):
    folder, run = ground
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("keep me")
    trial = Trial(tmp_path)
    trial.ground, trial.run = folder, [*run, "--output-dir", str(tmp_path / "new")]
    return trial


def with_option(argv, **options):
    """The arguments with some options in the place of their own."""
    argv = list(argv)
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if flag in argv:
            argv[argv.index(flag) + 1] = value
        else:
            argv += [flag, value]
    return argv


# configurations

CHOICES = ("structure", "kind", "metric", "projection")
STRENGTHS = ("lambda_alignment", "lambda_task", "lambda_collision", "lambda_kl", "beta", "refresh_tolerance")
SHARES = ("alpha", "energy", "refresh_budget", "averaging")
COUNTS = ("sketch_rank", "refresh_every", "refresh_examples", "kl_examples", "kl_every", "batch_size", "max_length",
          "held_back", "measure_every", "kl_cache_mb", "max_rank")  # fmt: skip
SWITCHES = ("whole_update", "scale_free", "adaptive", "include_router")


def bad_fields():
    for name in CHOICES:
        yield from ((name, value) for value in ("hessian", "", None, 3, ["kfac"]))
    for name in STRENGTHS:
        yield from ((name, value) for value in (-1.0, math.nan, math.inf, "three", True, [1.0]))
    for name in SHARES:
        yield from ((name, value) for value in (-0.1, 1.5, math.nan, "half"))
    for name in COUNTS:
        yield from ((name, value) for value in (0, -3, 1.5, True, "many"))
    for name in SWITCHES:
        yield from ((name, value) for value in ("yes", 1, None))
    yield from (("max_drift", value) for value in (0.0, -1.0, math.inf, "much", True))
    yield from (("exclude", value) for value in ("*.k_proj", 3, [1], None))
    yield from (("tau", value) for value in (math.inf, "small", None))
    yield from (("seed", value) for value in (-1, 2**32, 0.5, "x", True))
    yield ("lambda_alignment", 10**400)


def test_malformed_configurations(trial, tmp_path):
    data = trial.ground / "rows.jsonl"

    def fit(**options):
        given = {
            "model": trial.ground / "model",
            "task_data": data,
            "alignment_data": data,
            "output_dir": tmp_path / "new",
        }
        return lambda: alignguard.fit(**{**given, **options})

    for name, value in bad_fields():
        trial.call(f"GuardConfig {name}={str(value)[:9]!r} {type(value)}",
                    lambda n=name, v=value: fit(config=GuardConfig.curvature(**{n: v}))(), name)  # fmt: skip
    trial.call(
        "GuardConfig budget of nothing", lambda: GuardConfig.curvature(lambda_alignment=0.0, max_drift=1.0), "max_drift"
    )
    for options, word in (
        ({"config": {"energy": 0.5}}, "GuardConfig"), ({"training": [1]}, "training"),
        ({"training": {"learning_rat": 1}}, "learning_rat"), ({"training": {"learning_rate": "fast"}}, "learning_rate"),
        ({"training": {"learning_rate": -1.0}}, "learning_rate"), ({"training": {"max_steps": 0}}, "max_steps"),
        ({"training": {"num_train_epochs": 0}}, "num_train_epochs"), ({"training": {"seed": 3}}, "seed="),
        ({"training": {"output_dir": "x"}}, "output_dir"), ({"training": {"logging_steps": 0}}, "logging_steps"),
        ({"training": {"lr_scheduler_type": "steep"}}, "steep"), ({"training": {"optim": "sgdd"}}, "sgdd"),
        ({"training": {"per_device_train_batch_size": 0}}, "per_device_train_batch_size"),
        ({"training": {"gradient_accumulation_steps": 1.5}}, "gradient_accumulation_steps"),
        ({"training": {"report_to": "nowhere"}}, "nowhere"),
        ({"method": "partial"}, "partial"), ({"method": "partial", "guarded": False}, "partial"),
        ({"method": "full", "lora": {"r": 2}}, "lora"), ({"offload": "attic"}, "attic"), ({"offload": "cuda:9"}, "cuda:9"),
        ({"save_every": 0}, "save_every"), ({"save_every": 1.5}, "save_every"), ({"max_length": 0}, "max_length"),
        ({"max_length": "long"}, "max_length"), ({"seed": -1}, "seed"), ({"seed": "x"}, "seed"),
        ({"fisher": data, "guarded": False}, "fisher"), ({"fisher": data, "config": GuardConfig.curvature(noise_edge=True)}, "noise_edge"), ({"output_dir": tmp_path / "out"}, "not empty"),
        ({"output_dir": data}, "is a file"), ({"output_dir": data / "below"}, "is a file"), ({"output_dir": "n" * 300}, "nnn"),
        ({"output_dir": tmp_path / "out", "resume": True}, "not empty"), ({"alignment_data": None}, "alignment_data"),
    ):  # fmt: skip
        trial.call(f"fit {options}", fit(**options), word)

    for flags, word in (
        (["--structure", "hessian"], "structure"), (["--energy", "2"], "energy"), (["--rank", "many"], "rank"),
        (["--rank", "0"], "rank"), (["--lora-alpha", "nan"], "lora_alpha"), (["--lora-alpha", "-1"], "lora_alpha"),
        (["--refresh-every", "0"], "refresh_every"), (["--max-drift", "-1"], "max_drift"), (["--max-rank", "0"], "max_rank"),
        (["--lambda-kl", "inf"], "lambda_kl"), (["--seed", "-1"], "seed"), (["--max-steps", "-7"], "max_steps"),
        (["--learning-rate", "nan"], "learning_rate"), (["--num-train-epochs", "-1"], "num_train_epochs"),
        (["--per-device-train-batch-size", "0"], "batch_size"), (["--gradient-accumulation-steps", "0"], "accumulation"),
        (["--save-every", "0"], "save_every"), (["--task-max-length", "0"], "max_length"), (["--method", "half"], "method"),
        (["--offload", "attic"], "attic"), (["--task-max-length", "4.5"], "task-max-length"), (["--bogus", "1"], "--bogus"),
        (["--model", ""], "model"), (["--output-dir", str(tmp_path / "out")], "not empty"), (["--refresh-e", "x"], "x"),
        (["--fisher", "gone.safetensors"], "gone"), (["--plain", "--fisher", "gone"], "fisher"),
    ):  # fmt: skip
        trial.command(f"flags {flags}", [*trial.run, *flags], word)

    bad = tmp_path / "bad.yaml"
    for text, word in (
        ("", "options and values"), ("- a\n", "options and values"), ("just words\n", "options and values"), ("3\n", "options"),
        ("a: [", "YAML"), ("\t- x: y:\n", "YAML"), ("when: 2020-13-45\n", "YAML"), ("? [a, b]\n: 1\n", "bad.yaml"),
        ("a: &x [*x]\n", "bad.yaml"), ("&a [*a]\n", "bad.yaml"), ("!!python/object:os.system x\n", "YAML"), ("[" * 4000, "YAML"),
        ("lambda_aligment: 3\n", "lambda_aligment"), ("rank: many\n", "rank"), ("rank: [2]\n", "rank"), ("rank: true\n", "rank"),
        ("rank: 2.5\n", "rank"), ("rank: .nan\n", "rank"), ("rank: 0\n", "rank"), ("energy: {a: 1}\n", "energy"), ("plain: 3\n", "plain"),
        ("exclude: '*.k'\n", "exclude"), ("exclude: [[a]]\n", "exclude"), ("method: partial\n", "method"),
        ("max_drift: [1]\n", "max_drift"), ("max_drift: -1\n", "max_drift"), ("max_steps: .inf\n", "max_steps"),
        ("structure: 3\n", "structure"), ("scale_free: maybe\n", "scale_free"), ("adaptive: 1\n", "adaptive"),
        ("overwrite: 'no'\n", "overwrite"), ("config: other.yaml\n", "config"), ("help: true\n", "help"), ("1: 2\n", "unknown"),
        ("null: 2\n", "unknown"), ("seed: -1\n", "seed"), ("averaging: 1\n", "averaging"), ("lambda_kl: null\n", "lambda_kl"),
        ("adaptive: null\n", "adaptive"), ("exclude: ~\n", "exclude"), ("structure:\n", "structure"), ("seed: null\n", "seed"),
        ("method: null\n", "method"), ("plain: null\n", "plain"), ("lambda_kl: none\n", "lambda_kl"), ("target_modules: []\n", "target_modules"),
        ("target_modules: [null]\n", "target_modules"), ("offload: off\n", "offload"), ("kl-tokens: 3\nkl_tokens: 4\n", "kl_tokens"),
    ):  # fmt: skip
        bad.write_text(text)
        trial.command(f"yaml {text[:40]}", [*strip(trial.run, text), "--config", bad], word)
    for name, content in (("latin", b"model: caf\xe9\n"), ("nul", b"a\0b"), ("utf16", "model: x".encode("utf-16"))):
        bad.write_bytes(content)
        trial.command(f"yaml {name}", [*trial.run, "--config", bad], "bad.yaml")
    trial.command("yaml that is a folder", [*trial.run, "--config", tmp_path], "no such file")
    trial.command("yaml of a long name", [*trial.run, "--config", "n" * 300], "no such file")

    for lacking, word in (
        ("--model", "--model"),
        ("--task-data", "--task-data"),
        ("--alignment-data", "refuses none of"),
    ):
        place = trial.run.index(
            lacking
        )  # without alignment data this model, which refuses nothing, has nothing to keep
        trial.command(f"without {lacking}", [*trial.run[:place], *trial.run[place + 2 :]], word)
    for flags, word in (
        (["--set", "energy"], "energy"), (["--set", "enrgy=1"], "enrgy"), (["--vary", "energy=2"], "energy"),
        (["--set", "energy=2"], "energy"), (["--model", "x"], "--task-data"), (["--study", "all"], "study"),
        (["--alignment-data", "gone.jsonl"], "gone.jsonl"), (["--seeds", "x"], "seeds"), (["--processes", "0"], "processes"),
    ):  # fmt: skip
        command = ["ablate", "--output-dir", tmp_path / "new", *flags]
        trial.command(f"ablate {flags}", command, word, program=studies)
    trial.end(LEAST["configs"])


def strip(argv, text):
    """The arguments without the option that a YAML file gives: what stands on the command line would win."""
    flag = f"--{text.split(':')[0].replace('_', '-')}"
    return [*argv[: argv.index(flag)], *argv[argv.index(flag) + 2 :]] if flag in argv else argv


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)


def test_malformed_configurations_by_hypothesis(trial, tmp_path):
    """Junk in the place of a number: what is no option's value is named, whatever it is."""
    bad = tmp_path / "bad.yaml"

    def number(value):
        try:
            return math.isfinite(float(value)) and float(value) >= 0
        except (TypeError, ValueError, OverflowError):
            return value is None or str(value).strip().lower() == "none"

    @HYPOTHESIS
    @given(st.sampled_from([*STRENGTHS, "tau", "max_drift"]), JUNK.filter(lambda v: not number(v)))
    def spoil(name, value):
        text = yaml.safe_dump({name: value})
        if f"yaml {text}" in trial.made or (name == "tau" and isinstance(value, (int, float)) and value > -math.inf):
            return
        bad.write_text(text)
        try:
            trial.command(f"yaml {text}", [*strip(trial.run, text), "--config", bad], name)
        finally:
            bad.unlink()

    spoil()
    trial.end(12)


# rows

GOOD = '{"prompt": "a", "response": "b"}\n'
BAD_ROWS = {
    "nothing": ("", "empty"), "blank lines": ("\n \n", "empty"), "words": ("hello\n", "line 1"), "torn": ('{"prompt": "a"', "line 1"),
    "torn second": (GOOD + '{"prompt": "a"', "line 2"), "array": ("[1]\n", "JSON object"), "string": ('"x"\n', "JSON object"),
    "number": ("3\n", "JSON object"), "null": ("null\n", "JSON object"), "true": ("true\n", "JSON object"),
    "deep": ("[" * 100_000, "line 1"), "single quotes": ("{'prompt': 'a'}\n", "line 1"), "trailing comma": ('{"prompt": "a",}\n', "line 1"),
    "two on a line": (GOOD.strip() + GOOD, "line 1"), "an array of numbers": ("[1, 2]", "JSON object"), "no fields": ("{}\n", "prompt"),
    "no response": ('{"prompt": "a"}\n', "response"), "no prompt": ('{"response": "a"}\n', "prompt"),
    "null prompt": ('{"prompt": null, "response": "b"}\n', "prompt"), "number prompt": ('{"prompt": 3, "response": "b"}\n', "prompt"),
    "list prompt": ('{"prompt": ["a"], "response": "b"}\n', "prompt"), "blank prompt": ('{"prompt": " ", "response": "b"}\n', "prompt"),
    "blank response": ('{"prompt": "a", "response": "\\n"}\n', "response"), "other names": ('{"question": "a", "answer": "b"}\n', "question"),
    "third row": (GOOD * 2 + '{"prompt": "a"}\n', "row 3"), "surrogate": ('{"prompt": "\\ud800", "response": "b"}\n', "surrogate"),
    "surrogate answer": ('{"prompt": "a", "response": "x\\udfff"}\n', "surrogate"), "messages text": ('{"messages": "hi"}\n', "messages"),
    "no messages": ('{"messages": []}\n', "messages"), "messages object": ('{"messages": {"role": "user"}}\n', "messages"),
    "message number": ('{"messages": [1]}\n', "message"), "message without content": ('{"messages": [{"role": "user"}]}\n', "content"),
    "message without role": ('{"messages": [{"content": "a"}]}\n', "role"),
    "content null": ('{"messages": [{"role": "assistant", "content": null}]}\n', "content"),
    "content parts": ('{"messages": [{"role": "assistant", "content": [{"text": "a"}]}]}\n', "content"),
    "role number": ('{"messages": [{"role": 1, "content": "a"}, {"role": "assistant", "content": "b"}]}\n', "role"),
    "user last": ('{"messages": [{"role": "user", "content": "a"}]}\n', "assistant"),
    "empty answer": ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}\n', "assistant"),
    "surrogate message": ('{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "b"}]}\n', "surrogate"),
}  # fmt: skip
BAD_BYTES = {
    "latin": b'{"prompt": "caf\xe9", "response": "b"}\n', "utf16": GOOD.encode("utf-16"), "noise": bytes(range(256)) * 4,
    "zip": b"PK\x03\x04" + bytes(40), "nul": b"\0" * 20, "two marks": b"\xef\xbb\xbf" * 2 + GOOD.encode(),
    "half a gzip": b"\x1f\x8b\x08\0", "parquet in name": b"PAR1" + bytes(9),
}  # fmt: skip


def test_malformed_rows(trial, tmp_path):
    for name, (text, word) in BAD_ROWS.items():
        path = tmp_path / "bad.jsonl"
        for option in ("task_data", "alignment_data"):
            argv = with_option(trial.run, **{option: str(path)})
            # Prompts alone are the model's to answer, and this one refuses nothing; measuring drift takes two.
            alone = name == "no response" and option == "alignment_data"
            path.write_text(text.rstrip() + "\n" + text if alone else text)
            trial.command(
                f"{option}: {name}", argv, option, *(("refuses none of 2",) if alone else ("bad.jsonl", word))
            )
        path.unlink()
    for name, content in BAD_BYTES.items():
        path = tmp_path / "bad.jsonl"
        path.write_bytes(content)
        trial.command(f"bytes: {name}", with_option(trial.run, task_data=str(path)), "bad.jsonl")
        path.unlink()
    for name, content, word in (
        ("no columns", b"", "empty"), ("head alone", b"prompt,response\n", "empty"), ("other columns", b"a,b\n1,2\n", "'prompt'"),
        ("short row", b"prompt,response\na\n", "row 1"), ("noise", bytes(range(256)), "bad.csv"),
        ("huge field", b'prompt,response\n"' + b"x" * 200_000 + b'",b\n', "bad.csv"), ("long row", b"prompt,response\n,b,c\n", "row 1"),
    ):  # fmt: skip
        path = tmp_path / "bad.csv"
        path.write_bytes(content)
        trial.command(f"csv: {name}", with_option(trial.run, task_data=str(path)), "task_data", word)
        path.unlink()
    for place, word in (("gone.jsonl", "gone.jsonl"), (str(tmp_path), "'prompt'"), (f"{'n' * 300}.jsonl", "no such file"),
                        (str(trial.ground / "model" / "config.json"), "'prompt'"), ("a\0b.jsonl", "no such file"),
                        (str(trial.ground / "model" / "model.safetensors"), "unknown kind of file")):  # fmt: skip
        trial.command(f"place: {place}", with_option(trial.run, task_data=place), word)

    model, rows = trial.ground / "model", read_jsonl(trial.ground / "rows.jsonl")
    for name, value, word in (
        ("a number", 3, "int"), ("a mapping", {"train": rows}, "split"), ("nothing", [], "empty"), ("words", ["a"], "row 1"),
        ("bytes", b"abc", "bytes"), ("numbers", [1, 2], "row 1"), ("None in it", [*rows, None], "row 5"),
    ):  # fmt: skip
        for option in ("task_data", "alignment_data"):
            given = {"task_data": rows, "alignment_data": rows, option: value}
            trial.call(
                f"{option} is {name}",
                lambda g=given: alignguard.fit(model, output_dir=tmp_path / "new", **g),
                word,
            )

    # what only this model cannot take
    labels, kept = tmp_path / "labels.jsonl", str(tmp_path / "kept.jsonl")
    (tmp_path / "kept.jsonl").write_text('{"prompt": "a", "label": 1}\n' * 4)
    for value in (-1, 3, "two", None, 1.5, True, [0]):
        labels.write_text(json.dumps({"prompt": "a", "label": value}) + "\n")
        argv = with_option(
            trial.run, model=str(trial.ground / "classifier"), task_data=str(labels), alignment_data=kept
        )
        trial.command(f"label {value!r}", argv, "task_data", "label")
    labels.unlink()
    narrow = tmp_path / "narrow"
    base, words = load_model(model)
    base.resize_token_embeddings(50)
    base.save_pretrained(narrow)
    words.save_pretrained(narrow)
    trial.command(
        "another tokenizer", with_option(trial.run, model=str(narrow)), "task_data, row 1", "vocabulary of 50"
    )
    for template, word in (("{{ raise_exception('no system') }}", "no system"), ("{{ messages[9].content }}", "row 1"), ("{% if %}", "row 1"),
                           ("{{ messages | length }}{{ messages[0].content }}", "renders the prompt differently")):  # fmt: skip
        words.chat_template = template
        trial.call(
            f"template {template}",
            lambda: alignguard.fit(base, rows, rows, tokenizer=words, output_dir=tmp_path / "new"),
            word,
        )
    trial.end(LEAST["rows"])


def test_malformed_rows_by_hypothesis(trial, tmp_path):
    path = tmp_path / "bad.jsonl"
    base, words = load_model(trial.ground / "model")

    def fit(rows):
        alignguard.fit(base, rows, None, guarded=False, tokenizer=words, output_dir=tmp_path / "new")

    @HYPOTHESIS
    @given(st.binary(max_size=60).filter(lambda content: content.strip()))
    def bytes_of_any_kind(content):
        if f"bytes {content}" in trial.made:
            return
        path.write_bytes(content)
        try:
            trial.call(f"bytes {content}", lambda: fit(path), "bad.jsonl")
        finally:
            path.unlink()

    @HYPOTHESIS
    @given(st.dictionaries(st.sampled_from(["prompt", "response", "messages", "x"]), JUNK, max_size=3))
    def rows_of_any_kind(row):
        whole = all(isinstance(row.get(name), str) and row[name].strip() for name in ("prompt", "response"))
        if f"row {row}" not in trial.made and not (whole and row.get("messages") is None):
            trial.call(f"row {row}", lambda: fit([row]), "task_data", "row 1")

    bytes_of_any_kind()
    rows_of_any_kind()
    trial.end(25)


# Fisher files


def test_malformed_fisher_files(trial, tmp_path):
    path, whole = tmp_path / "f.safetensors", trial.ground / "model-kfac-sketch.safetensors"
    content = whole.read_bytes()
    argv = with_option(trial.run, fisher=str(path))

    def attempt(label, spoilt, *words):
        path.write_bytes(spoilt)
        trial.command(label, argv, *words)
        path.unlink()

    size = int.from_bytes(content[:8], "little")
    for cut in (0, 1, 7, 8, 9, size // 2, size + 7, size + 8, size + 100, len(content) - 1):
        attempt(f"cut at {cut}", content[:cut], "f.safetensors")
    for name, spoilt in (
        ("too long", content + b"x"), ("words", b"hello"), ("a JSON header of nothing", (2).to_bytes(8, "little") + b"{}"),
        ("a huge header", (2**40).to_bytes(8, "little") + content[8:]), ("not a JSON header", content[:8] + b"x" * size),
        ("a pickle", b"\x80\x02}q\x00."), ("swapped ends", content[::-1]),
        ("an adapter", (trial.ground / "run" / "adapter" / "adapter_model.safetensors").read_bytes()),
        ("a model", (trial.ground / "model" / "model.safetensors").read_bytes()),
    ):  # fmt: skip
        attempt(name, spoilt, "f.safetensors")
    attempt("another structure", (trial.ground / "model-gram.safetensors").read_bytes(), "f.safetensors", "structure")
    attempt(
        "another model", (trial.ground / "deep-kfac-sketch.safetensors").read_bytes(), "f.safetensors", "another model"
    )
    trial.command("no file", argv, "f.safetensors")
    trial.command("a folder", with_option(trial.run, fisher=str(tmp_path)), "no such file")

    from safetensors import safe_open

    from fishergeo import _storage
    from fishergeo.estimation import FisherHeader

    with safe_open(whole, "pt") as file:
        metadata = file.metadata()
    inner = json.loads(metadata["header"])
    opened = _storage.TensorFile(whole)
    tensors = {name: opened.tensor(name) for name in (*inner["tensors"], *inner["aliases"])}

    def rewritten(label, header, words, change=None, **fields):
        """A file whose checksums are right, of content that is not."""
        changed = {id(t): change(t) if change else t for t in tensors.values()}  # what was shared stays shared
        held = {name: changed[id(t)] for name, t in tensors.items()}
        _storage.write(path, held, header)
        trial.command(label, argv, "f.safetensors", *words)
        path.unlink()

    clean = {key: value for key, value in inner.items() if key not in ("aliases", "tensors")}
    rewritten("NaN inside", clean, ["finite"], lambda t: torch.full_like(t, math.nan))
    rewritten("infinity inside", clean, ["finite"], lambda t: torch.full_like(t, math.inf))
    rewritten("negative curvature", clean, ["negative"], lambda t: -t)
    rewritten("no header of ours", {}, [])
    rewritten("no sums", {**clean, "sums": 3}, [])
    rewritten("sums of nothing", {**clean, "sums": {}}, [])
    needed = {f.name for f in dataclasses.fields(FisherHeader) if f.default is dataclasses.MISSING}
    for name in sorted(needed & set(clean["fisher"])):
        rewritten(
            f"header without {name}", {**clean, "fisher": {k: v for k, v in clean["fisher"].items() if k != name}}, []
        )
    for name, value in (("structure", "x"), ("side", "left"), ("examples", -1), ("examples", "x"), ("shapes", 3), ("unit", "word"),
                        ("examples", math.nan), ("examples", 0)):  # fmt: skip
        rewritten(f"header {name}={value}", {**clean, "fisher": {**clean["fisher"], name: value}}, [])
    for key, value in (
        ("format", "other"),
        ("version", "x"),
        ("version", "99"),
        ("version", "1"),
        ("checksum", "0"),
        ("header", "{"),
    ):
        save_file(load_file(whole), path, metadata={**metadata, key: value})
        trial.command(f"metadata {key}={value}", argv, "f.safetensors")
        path.unlink()

    @HYPOTHESIS
    @given(st.integers(8 + size, len(content) - 1), st.integers(1, 255))
    def flipped(place, mask):
        label = f"byte {place} by {mask}"
        if label not in trial.made:
            attempt(label, content[:place] + bytes([content[place] ^ mask]) + content[place + 1 :], "f.safetensors")

    @HYPOTHESIS
    @given(st.integers(0, 7 + size), st.integers(1, 255))
    def flipped_in_the_header(place, mask):
        label = f"byte {place} by {mask}"
        if label not in trial.made:
            attempt(label, content[:place] + bytes([content[place] ^ mask]) + content[place + 1 :], "f.safetensors")

    flipped()
    flipped_in_the_header()
    trial.end(LEAST["fisher"])


# checkpoints


def test_malformed_checkpoints(trial, tmp_path):
    """A run that is resumed from one checkpoint, spoilt: as it was found, and with a marker that agrees to it."""
    out = tmp_path / "new"
    argv = [*trial.run, "--save-every", "1", "--resume"]
    run = trial.ground / "run"
    step = run / "checkpoints" / "checkpoint-1"

    def fresh():
        copied(run, out)
        for path in (out / "checkpoints").iterdir():
            if path.name != step.name:
                shutil.rmtree(path)
        return out / "checkpoints" / step.name

    for name, text in (
        ("cut", "{"),
        ("empty", ""),
        ("a list", "[]"),
        ("a number", "3"),
        ("another run", '{"seed": 5}'),
        ("deep", "[" * 100_000),
    ):
        fresh()
        (out / "run.json").write_text(text)
        trial.command(f"run.json {name}", argv, "resume", "new")
    fresh()
    (out / "run.json").write_bytes(b"\xff\xfe")
    trial.command("run.json bytes", argv, "run.json")
    fresh()
    (out / "run.json").unlink()
    trial.command("run.json is gone", argv, "not empty")

    names = sorted(
        path.relative_to(step).as_posix() for path in step.rglob("*") if path.is_file() and path.name != MARKER
    )
    for name in names:
        for how, change in (
            ("cut", lambda b: b[: len(b) // 2]),
            ("flipped", lambda b: b[:-1] + bytes([b[-1] ^ 1])),
            ("gone", None),
        ):
            spoilt = fresh() / name
            spoilt.unlink() if change is None else swap(spoilt, change)
            trial.command(f"{name} {how}", argv, "checkpoint-1", name)
    read = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
            "alignguard_guard.json", "alignguard_guard.safetensors")  # fmt: skip
    for name in read:
        for how, content in (("empty", b""), ("words", b"hello"), ("object", b"{}")):
            place = fresh()
            (place / name).write_bytes(content)
            (place / MARKER).unlink()
            seal(place, place)
            trial.command(f"{name} {how}, sealed", argv, "checkpoint-1")
    changes = {
        "trainer_state.json": [("global_step", "x"), ("max_steps", None), ("log_history", 3), ("global_step", 1.5)],
        "alignguard_guard.json": [
            ("guard", None),
            ("extra", {}),
            ("extra", None),
            ("format", 99),
            ("guard", {}),
            ("extra", [1]),
        ],
    }
    for name, pairs in changes.items():
        for key, value in pairs:
            place = fresh()
            content = json.loads((place / name).read_text())
            (place / name).write_text(json.dumps({**content, key: value}))
            (place / MARKER).unlink()
            seal(place, place)
            trial.command(f"{name} {key}={value}, sealed", argv, "checkpoint-1")
    for key, change in (
        ("a tensor less", lambda t: dict(list(t.items())[1:])), ("a tensor more", lambda t: {**t, "base_model.model.x.lora_A.weight": torch.zeros(2)}),
        ("other shapes", lambda t: {name: tensor[:1].contiguous() if tensor.ndim else tensor for name, tensor in t.items()}),
    ):  # fmt: skip
        for name in ("adapter_model.safetensors", "alignguard_guard.safetensors"):
            if key == "a tensor more" and name != "adapter_model.safetensors":
                continue
            place = fresh()
            save_file(change(load_file(place / name)), place / name, metadata={"format": "pt"})
            (place / MARKER).unlink()
            seal(place, place)
            trial.command(f"{name} with {key}, sealed", argv, "checkpoint-1")
    for text in ("", "{}", "3", '{"files": 3}', '{"files": {"gone": [1, 2]}}'):
        (fresh() / MARKER).write_text(text)
        trial.command(f"marker {text}", argv, "checkpoint-1")
    trial.end(LEAST["checkpoints"])


def test_an_unfinished_checkpoint_is_passed_over_and_the_run_starts(trial, tmp_path):
    """What a kill leaves is no malformed input: nothing was finished, so there is nothing to lose."""
    copied(trial.ground / "run", tmp_path / "new")
    for path in (tmp_path / "new" / "checkpoints").iterdir():
        (path / MARKER).unlink()
    shutil.rmtree(tmp_path / "new" / "adapter")  # which a finished run alone has
    assert cli.main([*trial.run, "--save-every", "1", "--resume"]) == 0


# adapters


def test_malformed_adapters(trial, tmp_path, tokenizer):
    good = trial.ground / "run" / "adapter"
    folder, prompts = tmp_path / "adapter", tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "how do I bake bread", "category": "ordinary"}\n')
    argv = [
        "driftcheck",
        "--model",
        trial.ground / "model",
        "--prompts",
        prompts,
        "--adapter",
        folder,
        "--output",
        tmp_path / "r.json",
    ]
    weights, config = "adapter_model.safetensors", "adapter_config.json"
    fields, tensors = json.loads((good / config).read_text()), load_file(good / weights)

    def attempt(label, change, *words):
        copied(good, folder)
        change()
        trial.command(label, argv, "adapter", folder, *words)

    for name, text in (
        ("gone", None),
        ("empty", ""),
        ("cut", "{"),
        ("a list", "[]"),
        ("an empty object", "{}"),
        ("words", "hello"),
    ):
        attempt(
            f"configuration {name}",
            lambda t=text: (folder / config).unlink() if t is None else (folder / config).write_text(t),
        )
    for key, value in (
        ("peft_type", "MAGIC"), ("peft_type", None), ("peft_type", 3), ("r", 0), ("r", "two"), ("r", -1), ("r", 3), ("target_modules", ["z_proj"]),
        ("target_modules", []), ("target_modules", 3), ("target_modules", None), ("target_modules", ["q_proj"]), ("task_type", "POETRY"),
        ("lora_alpha", "x"), ("lora_dropout", 2.0), ("lora_dropout", "x"), ("use_dora", True), ("rank_pattern", 3),
        ("rank_pattern", {"q_proj": 1}), ("bias", "some"), ("init_lora_weights", "magic"),
    ):  # fmt: skip
        attempt(
            f"configuration {key}={value}",
            lambda k=key, v=value: (folder / config).write_text(json.dumps({**fields, k: v})),
        )
    for name, content in (("gone", None), ("empty", b""), ("words", b"hello"), ("cut", (good / weights).read_bytes()[:-9]),
                          ("cut head", (good / weights).read_bytes()[:40]), ("a pickle", b"\x80\x02}q\x00."), ("longer", (good / weights).read_bytes() + b"x")):  # fmt: skip
        attempt(
            f"weights {name}",
            lambda c=content: (folder / weights).unlink() if c is None else (folder / weights).write_bytes(c),
        )
    first = next(iter(tensors))
    for name, held in (
        ("of nothing", {}), ("one less", {k: v for k, v in tensors.items() if k != first}), ("transposed", {k: v.mT.contiguous() for k, v in tensors.items()}),
        ("of other names", {k.replace("layers.0", "layers.7"): v for k, v in tensors.items()}), ("flat", {k: v.flatten() for k, v in tensors.items()}),
        ("NaN", {k: torch.full_like(v, math.nan) for k, v in tensors.items()}), ("infinite", {k: torch.full_like(v, math.inf) for k, v in tensors.items()}),
        ("integers", {k: v.long() for k, v in tensors.items()}),
    ):  # fmt: skip
        attempt(f"weights {name}", lambda h=held: save_file(h, folder / weights))
    deep, _ = load_model(trial.ground / "deep")
    get_peft_model(deep, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "other")
    attempt("of a deeper model", lambda: copied(tmp_path / "other", folder))
    trial.command("a file", [*argv[:6], prompts, *argv[7:]], "adapter")
    trial.command("nowhere", [*argv[:6], tmp_path / "gone", *argv[7:]], "adapter")

    rows = read_jsonl(trial.ground / "rows.jsonl")

    def fit(model, lora=None, **more):
        more = {"guarded": True, **more}
        return lambda: alignguard.fit(
            model, rows, rows, tokenizer=tokenizer, lora=lora, output_dir=tmp_path / "new", **more
        )

    for lora, word in (
        ({"r": 0}, "r"), ({"r": -1}, "r"), ({"r": True}, "r"), ({"r": "x"}, "r"), ({"lora_alpha": 0}, "lora_alpha"), ({"lora_alpha": math.nan}, "lora_alpha"),
        ({"lora_dropout": 1.5}, "lora_dropout"), ({"rnk": 2}, "rnk"), ([2], "lora"), ({"target_modules": ["z_proj"]}, "z_proj"),
        ({"target_modules": []}, "target_modules"), ({"target_modules": "["}, "target_modules"), ({"use_dora": True}, "Dora"), ({"bias": "some"}, "lora"),
        ({"init_lora_weights": "magic"}, "magic"), ({"target_modules": ["embed_tokens"]}, "Embedding"), ({"layers_to_transform": [7]}, "lora"),
        ({"rank_pattern": {"q_proj": 0}}, "lora"), ({"modules_to_save": ["attic"]}, "attic"), ({"task_type": "POETRY"}, "lora"),
    ):  # fmt: skip
        trial.call(f"lora {lora}", fit(llama(tokenizer), lora), word)
    for config, word in (
        (AdaLoraConfig(target_modules=["q_proj"], total_step=10), "ADALORA"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "IA3"),
    ):
        trial.call(f"adapter {word}", fit(get_peft_model(llama(tokenizer), config)), word)
    merged = get_peft_model(llama(tokenizer), LoraConfig(r=2, target_modules=["q_proj"]))
    merged.merge_adapter()
    trial.call("merged", fit(merged), "merged")
    tied = get_peft_model(llama(tokenizer, tie_word_embeddings=True), LoraConfig(r=2, target_modules=["lm_head"]))
    trial.call("tied", fit(tied), "tied")
    trial.call(
        "an adapter in a full run",
        fit(PeftModel(llama(tokenizer), LoraConfig(target_modules=["q_proj"])), method="full"),
        "full",
    )
    trial.call(
        "the same, unguarded",
        fit(PeftModel(llama(tokenizer), LoraConfig(target_modules=["q_proj"])), method="full", guarded=False),
        "full",
    )
    trial.end(LEAST["adapters"])


# models


def test_malformed_models(trial, tmp_path):
    good, folder = trial.ground / "model", tmp_path / "model"
    argv = with_option(trial.run, model=str(folder))

    def attempt(label, change):
        copied(good, folder)
        change()
        trial.command(label, argv, str(folder))

    config = json.loads((good / "config.json").read_text())
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        for how, content in (("empty", b""), ("words", b"hello"), ("a list", b"[]"), ("bytes", b"\xff\xfe\x00")):
            attempt(f"{name} {how}", lambda n=name, c=content: (folder / n).write_bytes(c))
    for name in ("config.json", "model.safetensors"):
        attempt(f"{name} is gone", lambda n=name: (folder / n).unlink())
    for key, value in (("model_type", "poem"), ("model_type", None), ("hidden_size", "wide"), ("hidden_size", 32), ("num_hidden_layers", 2),
                       ("vocab_size", 7), ("num_attention_heads", 0), ("hidden_act", "grin")):  # fmt: skip
        attempt(
            f"configuration {key}={value}",
            lambda k=key, v=value: (folder / "config.json").write_text(json.dumps({**config, k: v})),
        )
    attempt("weights cut", lambda: swap(folder / "model.safetensors", lambda b: b[:-9]))
    tensors = load_file(good / "model.safetensors")
    first = next(iter(tensors))
    attempt(
        "a weight less",
        lambda: save_file(
            {k: v for k, v in tensors.items() if k != first}, folder / "model.safetensors", {"format": "pt"}
        ),
    )
    attempt(
        "a weight of another shape",
        lambda: save_file({**tensors, first: torch.zeros(3)}, folder / "model.safetensors", {"format": "pt"}),
    )
    for place, word in ((str(good / "config.json"), "is a file"), (str(tmp_path / "gone"), "gone"), ("./gone", "gone"), ("no such/name/at all", "at all"),
                        ("~/nowhere-at-all", "nowhere"), ("   ", "names nothing")):  # fmt: skip
        trial.command(f"place {place}", with_option(trial.run, model=place), word)
    rows = [{"prompt": "a", "response": "b"}]
    for value, word in ((3, "model"), (None, "model"), ([good], "model")):
        trial.call(
            f"model={value}",
            lambda v=value: alignguard.fit(v, rows, rows, tokenizer=object(), output_dir=tmp_path / "new"),
            word,
        )
    trial.end(LEAST["models"])


# reports and prompts


def test_malformed_reports_and_prompts(trial, tmp_path):
    bad = tmp_path / "bad.json"
    row = {"id": "a", "category": "ordinary", "prompt": "p", "text": "t", "verdict": "compliance"}
    whole = {"format": 1, "settings": {}, "kl": None, "task": None, "rows": [row]}
    texts = ["", "{", "[]", "3", "null", "{}", "[" * 100_000, *(json.dumps({**whole, k: v}) for k, v in (
        ("format", 99), ("format", None), ("settings", 3), ("kl", "x"), ("task", {}), ("task", 3), ("rows", []), ("rows", 3), ("rows", [3]),
        ("rows", [row, row]), ("rows", [{"id": "a"}]),
    )), *(json.dumps({**whole, "rows": [{**row, k: v}]}) for k, v in (
        ("id", 3), ("category", None), ("prompt", 3), ("text", []), ("verdict", "maybe"), ("correct", "yes"), ("margin_first", "x"), ("harm", 3),
    ))]  # fmt: skip
    for text in texts:
        bad.write_text(text)
        trial.command(f"report {text[:400]}", ["compare", bad], "bad.json")
    bad.write_bytes(b"\xff\xfe{")
    trial.command("report of bytes", ["compare", bad], "bad.json")
    trial.command("no report", ["compare", tmp_path / "gone.json"], "gone.json")
    bad.unlink()
    prompts = tmp_path / "bad.jsonl"
    argv = ["driftcheck", "--model", trial.ground / "model", "--prompts", prompts, "--output", tmp_path / "r.json"]
    for line in ("", "x", "[]", "{}", '{"prompt": "a"}', '{"prompt": "a", "category": "rude"}', '{"prompt": "", "category": "unsafe"}', '{"prompt": "a", "category": []}',
                 '{"prompt": "a", "category": "capability"}', '{"prompt": "a", "category": "capability", "answer": "3", "match": "x"}',
                 '{"prompt": "a", "category": "unsafe", "id": 1}\n{"prompt": "b", "category": "unsafe", "id": 1}',
                 '{"prompt": "\\ud800", "category": "unsafe"}', '{"prompt": "a", "category": "capability", "answer": "3", "match": []}'):  # fmt: skip
        prompts.write_text(line + "\n")
        trial.command(f"prompts {line}", argv, "bad.jsonl")
    prompts.write_text('{"prompt": "a", "category": "unsafe"}\n')
    for flags, word in ((["--limit", "0"], "limit"), (["--batch-size", "0"], "batch_size"), (["--max-new-tokens", "0"], "max_new_tokens"),
                        (["--max-new-tokens", "64"], "max_new_tokens"), (["--capability-tokens", "0"], "capability_tokens"), (["--judge", "chat"], "judge-model"),
                        (["--judge", "oracle"], "judge"), (["--task-data", tmp_path / "out"], "task"), (["--alignment-data", trial.ground / "rows.jsonl"], "base"), (["--before", tmp_path / "gone"], "gone"), (["--base", tmp_path / "gone"], "gone"),
                        (["--output", tmp_path / "no" / "r.json"], "no such folder"), (["--html", tmp_path / "out"], "exists"),
                        (["--html", tmp_path / "out", "--overwrite"], "folder"), (["--html", tmp_path / "r.json"], "--html"),
                        (["--html", tmp_path / "out" / ".." / "r.json.answers.jsonl"], "--html"), (["--judge-model", tmp_path / "gone"], "--judge-model"),
                        (["--judge-labels", "x"], "--judge-labels"), (["--judge-form", prompts], "--judge-form"),
                        (["--judge", "chat", "--judge-model", trial.ground / "model", "--judge-labels", "x"], "--judge-labels")):  # fmt: skip
        trial.command(f"driftcheck {flags}", [*argv, *flags], word)
    trial.end(LEAST["reports"])
