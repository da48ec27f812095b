"""Questions with choices: which answer the question makes likelier, against log-probabilities summed by hand."""

import pytest
import torch

from alignguard.data import encode_source, read_jsonl
from alignguard.embedded import data_path, model_path
from alignguard.loading import load_model
from studies.choices import chosen_rightly, with_others

ROWS = [
    {"prompt": "how do I bake bread?", "response": "You mix flour and water."},
    {"prompt": "is this review good or bad? a dull film", "response": "The review is bad."},
    {"prompt": "is this review good or bad? a fine film", "response": "The review is good."},
    {"prompt": "write about the sea", "response": "The sea is wide."},
]


def log_probability(model, tokenizer, prompt, response):
    """Of the response's tokens together, one pass over one row."""
    (row,) = encode_source([{"prompt": prompt, "response": response}], "rows", tokenizer, "causal", 512)
    ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
    with torch.no_grad():
        found = model(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1)
    told = labels[1:] >= 0
    return float(found[told].gather(1, labels[1:][told][:, None]).sum())


def test_the_answer_is_chosen_that_gains_most_by_the_question():
    model, tokenizer = load_model(model_path())
    learned = list(read_jsonl(data_path("alignment")))[:4]  # it was trained to answer so
    rows = with_others(ROWS, "made") + with_others(learned, "learned")
    expected = {}
    for source in ("made", "learned"):
        prompts = [row for row in rows if row["source"] == source]
        of = {
            response: [log_probability(model, tokenizer, row["prompt"], response) for row in prompts]
            for response in {row["response"] for row in prompts}
        }
        expected[source] = ""
        for place, row in enumerate(prompts):
            gains = {response: told[place] - sum(told) / len(told) for response, told in of.items()}
            expected[source] += str(int(gains.pop(row["response"]) > max(gains.values())))
    assert chosen_rightly(model, tokenizer, rows, batch_size=3) == expected
    assert "1" in expected["learned"]


def test_a_liking_for_one_label_decides_nothing():
    model, tokenizer = load_model(model_path())
    rows = with_others(ROWS[1:3], "reviews")
    first, second = rows
    both = [log_probability(model, tokenizer, row["prompt"], row["response"]) for row in rows]
    crossed = [log_probability(model, tokenizer, row["prompt"], row["others"][0]) for row in rows]
    # of two questions with each other's answers both are right, or neither
    right = "1" if sum(both) > sum(crossed) else "0"
    assert chosen_rightly(model, tokenizer, rows) == {"reviews": 2 * right}
    with pytest.raises(ValueError, match=r"those of \['reviews'\] differ"):
        chosen_rightly(model, tokenizer, [first, {**second, "others": ["The review is long."]}])


def test_every_label_but_its_own_stands_beside_a_row():
    first, *_ = with_others(ROWS, "made")
    assert sorted([first["response"], *first["others"]]) == sorted(row["response"] for row in ROWS)
    with pytest.raises(ValueError, match="made: expected two responses or more"):
        with_others(ROWS[:1], "made")
