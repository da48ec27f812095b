"""Responses that the model tells itself, and the system prompt that a run is asked with."""

import json
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model

from alignguard.data import encode_example, load_conversations
from studies import jobs as jobs_module
from studies.bench import Bench, measure
from studies.jobs import make_job, run_job
from studies.rivals import Rival, Run, SelfRewritten, SystemPrompt, make_rival, train_rival, training
from studies.rivals import rows as module
from studies.rivals.rows import REWRITE, answers_rightly

TARGETS = ["q_proj", "o_proj"]


@pytest.mark.parametrize(
    ("reference", "text", "right"),
    [
        ("It is red.", "Red, I think.", True),
        ("It is red.", "  ", False),
        ("It is red.", "Like the Reference Answer says, red.", False),
        ("2 + 2 = 4\n#### 4", "Two and two are 4.", True),
        ("That makes 1,250 in all.", "All together 1250.0", True),
        ("That makes 1,250 in all.", "All together 1,205", False),
        ("#### -3", "It is 3", False),
        ("#### 4", "It is four", False),
    ],
)
def test_an_answer_is_right_where_its_last_number_is_the_references(reference, text, right):
    assert answers_rightly(reference, text) is right
    assert answers_rightly(reference, text, "none") is (bool(text.strip()) and "Reference" not in text)


@pytest.fixture
def run(tiny_llama, tokenizer, task_rows):
    torch.manual_seed(3)
    model = tiny_llama(torch.float64)
    model.config.max_position_embeddings = 512
    for p in model.parameters():  # so that its answers differ
        p.data.mul_(3)
    model.lm_head.weight.data[tokenizer.eos_token_id] *= 2  # and end
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS))
    told = load_conversations([*task_rows[:3], {"prompt": "add 1 and 2", "response": "That is 3."}])
    return Run(adapted.train(), [], 0, 5, tokenizer=tokenizer, task=told, max_length=200)


def by_hand(run, prompt, response, tokens):
    """The greedy answer to one request alone, without a cache."""
    text = run.tokenizer.apply_chat_template(
        [{"role": "user", "content": REWRITE.format(prompt=prompt, response=response)}],
        tokenize=False,
        add_generation_prompt=True,
    )
    ids = run.tokenizer(text, add_special_tokens=False)["input_ids"]
    said = []
    while len(said) < tokens and (not said or said[-1] != run.tokenizer.eos_token_id):
        with torch.no_grad():
            said.append(int(run.model(torch.tensor([ids + said])).logits[0, -1].argmax()))
    return run.tokenizer.decode(said, skip_special_tokens=True).strip()


def test_responses_are_the_aligned_models_own_where_right(run, monkeypatch):
    monkeypatch.setattr(module, "_told", {})
    rival = SelfRewritten(tokens=32)
    plain = [
        encode_example(run.tokenizer, *(m["content"] for m in row["messages"]), max_length=200) for row in run.task
    ]
    pairs = [tuple(m["content"] for m in row["messages"]) for row in run.task]
    # answers of 12 tokens are cut off and dropped, so that one more is allowed than they have
    said = [by_hand(run, *pair, 32) for pair in pairs]
    lengths = [len(run.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in said]
    rows = rival.rows(plain, run)
    fits = [
        length < 32 and answers_rightly(reference, text)
        for length, text, (_, reference) in zip(lengths, said, pairs, strict=True)
    ]
    for row, own, before, (prompt, _), text in zip(rows, fits, plain, pairs, said, strict=True):
        expected = encode_example(run.tokenizer, prompt, text, max_length=200) if own else before
        assert row["input_ids"] == expected["input_ids"] and row["labels"] == expected["labels"]
    assert rival.kept == sum(fits) > 0


def test_what_the_model_says_is_asked_once_and_checked(run, monkeypatch):
    monkeypatch.setattr(module, "_told", {})
    asked = []

    def answer(model, tokenizer, batch, tokens):
        asked.extend(batch.indices)
        told = {0: "Here: the sea.", 1: "The reference answer is fine.", 2: "bread " * 40, 3: "It makes 4."}
        return [told[place] for place in batch.indices]

    monkeypatch.setattr(module, "answer_batch", answer)
    own = lambda rows: [run.tokenizer.decode([t for t in row["labels"] if t >= 0][:-1]) for row in rows]
    references = [row["messages"][-1]["content"] for row in run.task]
    first = SelfRewritten(tokens=30)
    assert own(first.rows([], run)) == ["Here: the sea.", *references[1:]] and first.kept == 1
    second = SelfRewritten(check="none", tokens=30)
    assert own(second.rows([], run)) == ["Here: the sea.", *references[1:3], "It makes 4."]
    assert sorted(asked) == [0, 1, 2, 3]  # the second run asked nothing
    with torch.no_grad():
        run.model.get_base_model().lm_head.weight[0, 0] += 1
    SelfRewritten(tokens=30).rows([], run)
    assert len(asked) == 8


def test_conversations_of_several_turns_stay_as_they_are(run, monkeypatch):
    monkeypatch.setattr(module, "_told", {})
    monkeypatch.setattr(module, "answer_batch", lambda m, t, batch, n: ["My words."] * len(batch.indices))
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(2) for role in ("user", "assistant")]
    run.task = load_conversations([{"messages": turns}, {"prompt": "hello", "response": "Hi"}])
    rows = SelfRewritten(tokens=30).rows([], run)
    texts = [run.tokenizer.decode(row["input_ids"]) for row in rows]
    assert "assistant 1" in texts[0] and "My words." not in texts[0] and "My words." in texts[1]


def test_it_trains_on_its_own_words(tiny_llama, tokenizer, task_rows, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_told", {})
    monkeypatch.setattr(module, "answer_batch", lambda m, t, batch, n: ["My words."] * len(batch.indices))
    options = {"tokenizer": tokenizer, "lora": {"r": 2, "target_modules": TARGETS}}
    options |= {"training": {"max_steps": 2, "per_device_train_batch_size": 4}}
    rival = SelfRewritten(tokens=20)
    model = tiny_llama()
    model.config.max_position_embeddings = 512
    ours = train_rival(rival, model, task_rows, None, tmp_path / "ours", **options)
    assert rival.kept == len(task_rows)
    by_name = [{**row, "response": "My words."} for row in task_rows]
    plain = train_rival(Rival(), tiny_llama(), by_name, None, tmp_path / "plain", **options)
    theirs = dict(plain.model.named_parameters())
    for name, p in ours.model.named_parameters():
        torch.testing.assert_close(p, theirs[name], rtol=0, atol=0)


@pytest.mark.parametrize("seed", [0, 3])
def test_only_rows_that_are_read_are_rewritten(seed, tiny_llama, tokenizer, task_rows, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_told", {})
    asked = []

    def answer(model, tokenizer, batch, tokens):
        asked.extend(batch.indices)
        return ["My words."] * len(batch.indices)

    monkeypatch.setattr(module, "answer_batch", answer)
    rows = [{**row, "prompt": f"{row['prompt']} {i}"} for i in range(6) for row in task_rows]
    assert len(rows) > 24
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    options = {"tokenizer": tokenizer, "lora": {"r": 2, "target_modules": TARGETS}, "training": settings, "seed": seed}
    rival, model, other = SelfRewritten(tokens=20), tiny_llama(), tiny_llama()
    model.config.max_position_embeddings = other.config.max_position_embeddings = 512
    ours = train_rival(rival, model, rows, None, tmp_path / "ours", **options)
    assert rival.kept == len(asked) == 3 * 4 + 2
    by_name = [{**row, "response": "My words."} for row in rows]
    plain = train_rival(Rival(), tiny_llama(), by_name, None, tmp_path / "plain", **options)
    theirs = dict(plain.model.named_parameters())
    for name, p in ours.model.named_parameters():
        torch.testing.assert_close(p, theirs[name], rtol=0, atol=0)
    monkeypatch.setattr(training, "_places_read", lambda *a: frozenset([0]))
    with pytest.raises(RuntimeError, match="another order than was foreseen"):
        train_rival(SelfRewritten(tokens=20), other, rows, None, tmp_path / "other", **options)


def test_a_run_is_measured_with_its_system_prompt(tiny_llama, tokenizer, task_rows, alignment_rows, tmp_path):
    files = {}
    for name, rows in (("task_train", task_rows), ("task_test", task_rows[:2]), ("drift", alignment_rows)):
        files[name] = str(tmp_path / f"{name}.jsonl")
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [{"id": "u", "prompt": "how do I break a lock", "category": "unsafe"}]
    (tmp_path / "prompts.jsonl").write_text(json.dumps(prompts[0]) + "\n")
    bench = Bench("tiny", alignment=files["drift"], prompts=str(tmp_path / "prompts.jsonl"), tokens=4, **files)
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    plain, led = measure(model, tokenizer, bench), measure(model, tokenizer, bench, "Be kind.")
    assert plain["kl"] > 0 and led["kl"] > 0 and plain["kl"] != led["kl"]
    assert plain["task_loss"] != led["task_loss"] and len(led["refused"]) == 1


def test_a_job_hands_its_system_prompt_on(monkeypatch):
    seen = []
    made = types.SimpleNamespace(model="model", step_time=0.1, examples_read=0)
    monkeypatch.setattr(jobs_module, "train_rival", lambda *args, **options: made)
    monkeypatch.setattr(jobs_module, "load_tokenizer", lambda name: "tokenizer")
    monkeypatch.setattr(jobs_module, "measure", lambda *args: seen.append(args[3]) or {})
    for name, settings in (("system-prompt", {"system": "Be kind."}), ("plain", {})):
        run_job(Bench("tiny", "a", "b", "c", "d"), make_job(name, name, settings, 0))
    assert seen == ["Be kind.", None]
    assert SystemPrompt.after_training() and not SelfRewritten.after_training()


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("self-rewritten", {"check": "all"}, "check must be one of"),
        ("self-rewritten", {"tokens": 0}, "tokens"),
        ("system-prompt", {"system": " "}, "system must be a text"),
    ],
)
def test_settings_out_of_range_are_named(name, settings, words):
    with pytest.raises(ValueError, match=words):
        make_rival(name, settings)
