"""Rows in, labels on the response alone, and errors that name the row."""

import csv
import json
import pickle

import datasets
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaForSequenceClassification

from alignguard.data import (
    Examples,
    check_fits,
    collate,
    collator,
    encode_example,
    encode_messages,
    encode_source,
    load_conversations,
    read_jsonl,
)
from alignguard.objective import IGNORED

PAIR = {"prompt": "how do I bake bread", "response": "Of course! Here it is."}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_a_collator_goes_to_workers_that_are_not_forked(kind):
    rows = [{"input_ids": [3, 4, 5], "labels": [IGNORED, 4, 5]}, {"input_ids": [6], "labels": [6]}]
    ours, theirs = (make(rows) for make in (collator(0, kind), pickle.loads(pickle.dumps(collator(0, kind)))))
    assert ours["input_ids"].tolist() == [[3, 4, 5], [6, 0, 0]]
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_every_source_gives_the_same_conversations(tmp_path):
    rows = [PAIR, {"prompt": "write a note, please", "response": "A note."}]
    jsonl = write_rows(tmp_path / "d.jsonl", rows)
    with (tmp_path / "d.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "response"])
        writer.writeheader()
        writer.writerows(rows)
    chats = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["response"]}]}
        for r in rows
    ]
    expected = load_conversations(rows)
    for source in (jsonl, str(jsonl), tmp_path / "d.csv", datasets.Dataset.from_list(rows), iter(rows), chats):
        assert load_conversations(source) == expected


def test_a_line_separator_inside_text_is_no_end_of_line(tmp_path):
    rows = [{"prompt": "one\u2028two", "response": "three"}]
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(rows[0], ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_jsonl(path) == rows


def test_only_the_response_is_labelled(tokenizer):
    row = encode_example(tokenizer, **PAIR)
    supervised = [i for i, label in enumerate(row["labels"]) if label != IGNORED]
    assert [row["input_ids"][i] for i in supervised] == [row["labels"][i] for i in supervised]
    text = tokenizer.decode([row["labels"][i] for i in supervised])
    assert text == PAIR["response"] + tokenizer.eos_token
    assert tokenizer.decode(row["input_ids"][: supervised[0]]) == f"<s><u>{PAIR['prompt']}<a>"


def test_every_answer_of_a_chat_is_labelled_but_for_those_of_no_weight(tokenizer):
    messages = [
        {"role": "user", "content": "how"},
        {"role": "assistant", "content": "sea"},
        {"role": "user", "content": "write"},
        {"role": "assistant", "content": "bread"},
    ]
    row = encode_messages(tokenizer, messages)
    assert tokenizer.decode([x for x in row["labels"] if x != IGNORED]) == "sea</s>bread</s>"
    messages[1]["weight"] = 0
    row = encode_messages(tokenizer, messages)
    assert tokenizer.decode([x for x in row["labels"] if x != IGNORED]) == "bread</s>"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(limit=st.integers(2, 40))
def test_truncation_keeps_the_limit_and_some_of_the_response(tokenizer, limit):
    row = encode_example(tokenizer, "write " * 30, "bread " * 30, max_length=limit)
    assert len(row["input_ids"]) == len(row["labels"]) <= limit
    supervised = [x for x in row["labels"] if x != IGNORED]
    assert 1 <= len(supervised) < limit
    assert row["input_ids"][-len(supervised) - 1] == tokenizer.convert_tokens_to_ids("<a>")


def test_a_tokenizer_without_template_works_too(tokenizer):
    import copy

    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    row = encode_example(plain, **PAIR)
    assert plain.decode([x for x in row["labels"] if x != IGNORED]) == PAIR["response"] + plain.eos_token


@pytest.mark.parametrize(("side", "lost"), [("right", "end"), ("left", "start")])
def test_a_labelled_text_that_is_cut_keeps_its_closing_token(tokenizer, side, lost):
    import copy

    closing = copy.deepcopy(tokenizer)
    closing.truncation_side = side
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    closing._tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    rows = encode_source([{"prompt": "bread " * 30, "label": 0}], "task", closing, "classification", 5)
    (ids,) = [row["input_ids"] for row in rows]
    assert len(ids) == 5 and [ids[0], ids[-1]] == [place for _, place in ends]
    assert rows.notes == [f"task: 1 of 1 rows are longer than 5 tokens and lose their {lost}"]


@pytest.mark.parametrize("kind", ["causal", "seq2seq", "classification"])
def test_a_row_has_room_for_two_tokens(tokenizer, kind):
    with pytest.raises(ValueError, match="max_length must be a whole number of tokens, at least 2, not 1"):
        encode_source([{**PAIR, "label": 1}], "task", tokenizer, kind, 1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_masked_and_unlabelled(side):
    rows = [{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = collate(rows, 0, side)
    assert batch["attention_mask"].sum(1).tolist() == [3, 1]
    assert torch.all(batch["labels"][batch["attention_mask"] == 0] == IGNORED)
    assert batch["input_ids"][1].tolist() == ([0, 0, 8] if side == "left" else [8, 0, 0])


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "empty"),
        ([{"prompt": "a"}], "no 'response'"),
        ([{"prompt": "a", "response": "  "}], "'response' is empty"),
        ([{"response": "a"}], "no 'prompt'"),
        ([PAIR, {"prompt": "a", "response": 3}], "row 2"),
        ([{"messages": []}], "messages"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "assistant"),
        ([{"messages": [{"role": "user"}]}], "content"),
        ([{"messages": [{"role": "assistant", "content": 4}]}], "text"),
    ],
)
def test_a_bad_row_is_named(rows, words):
    with pytest.raises(ValueError, match=words):
        load_conversations(rows, "task_data")


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl"):
        load_conversations(tmp_path / "missing.jsonl")
    (tmp_path / "d.txt").write_text("x")
    with pytest.raises(ValueError, match=r"d\.txt"):
        load_conversations(tmp_path / "d.txt")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "response": "b"}\n{oops\n')
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 2"):
        load_conversations(tmp_path / "broken.jsonl")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match="JSON object"):
        load_conversations(tmp_path / "list.jsonl")
    with pytest.raises(TypeError, match="iterable of rows"):
        load_conversations(3)
    with pytest.raises(TypeError, match="row 1"):
        load_conversations(["text"])


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["wte"]},
        {"target_modules": ["wpe"]},
        {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [1]}},
        {"target_modules": ["c_attn"], "modules_to_save": ["wte", "wpe"]},
    ],
    ids=["wte", "wpe", "tokens", "saved"],
)
def test_what_reaches_beyond_a_table_is_refused_whatever_adapter_stands_in_its_place(options):
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 16, "n_positions": 6}
    model = get_peft_model(GPT2LMHeadModel(GPT2Config(**sizes)), LoraConfig(r=2, task_type="CAUSAL_LM", **options))
    check_fits(model, [{"input_ids": [15] * 6, "labels": [15] * 6}], "rows")
    with pytest.raises(ValueError, match="token 16 is beyond the model's vocabulary of 16"):
        check_fits(model, [{"input_ids": [16], "labels": [16]}], "rows")
    for name, option in (("task_data", "--task-max-length"), ("alignment_data", "--max-length")):
        with pytest.raises(
            ValueError, match=rf"longer than the model's 6 positions; .* max_length.* \({option}\) of at most 6"
        ):
            check_fits(model, [{"input_ids": [1] * 7, "labels": [1] * 7}], name)


def test_positions_that_are_counted_from_behind_the_paddings_are_fewer():
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "vocab_size": 16,
    }
    model = RobertaForSequenceClassification(RobertaConfig(**sizes, max_position_embeddings=18, pad_token_id=1))
    check_fits(model, [{"input_ids": [3] * 16, "labels": 0}], "rows")
    model(input_ids=torch.full((1, 16), 3))
    with pytest.raises(ValueError, match="longer than the model's 16 positions"):
        check_fits(model, [{"input_ids": [3] * 17, "labels": 0}], "rows")
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 17), 3))


def test_a_pad_token_beyond_the_vocabulary_is_refused(tiny_llama):
    model = tiny_llama()
    check_fits(model, [], "rows", pad=model.config.vocab_size - 1)
    with pytest.raises(ValueError, match=r"rows: the pad token \d+ is beyond the model's vocabulary"):
        check_fits(model, [], "rows", pad=model.config.vocab_size)


def test_rows_beyond_positions_that_are_computed_are_noted(tiny_llama):
    model = tiny_llama()
    model.config.max_position_embeddings = 6
    rows = Examples({"input_ids": [1] * n, "labels": [1] * n} for n in (6, 7, 8))
    check_fits(model, rows, "rows")
    (note,) = rows.notes
    assert note.startswith("rows: 2 of 3 rows are longer than the 6 positions of the model's configuration")
