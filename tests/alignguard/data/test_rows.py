"""Rows as people have them: each common form becomes the same conversation, and what cannot be heeded is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignguard.data import DataSource, conversation, load_conversations, prompts_alone, read_rows

USER, ANSWER = {"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Teal."}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
WORDS = st.text(min_size=1, max_size=20).filter(
    lambda text: text.strip() and text.encode("utf-8", "ignore").decode() == text
)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Name a colour.", "response": "Teal."},
        {"prompt": "Name a colour.", "completion": "Teal."},
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": [USER], "completion": "Teal."},
        {"messages": [USER, ANSWER]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Name a colour."}]}, ANSWER]},
        {"conversations": [{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "Teal."}]},
        {"conversations": [USER, ANSWER], "id": "identity_0"},
        {"instruction": "Name a colour.", "input": "", "output": "Teal."},
        {"instruction": "Name a colour.", "output": "Teal.", "text": "Below is an instruction ..."},
        {"instruction": "Name a colour.", "context": "", "response": "Teal.", "category": "open_qa"},
        {"messages": None, "prompt": "Name a colour.", "response": "Teal.", "images": [], "label": True},
    ],
)
def test_every_form_of_a_row_is_the_same_conversation(row):
    messages = conversation(row)["messages"]
    assert [{"role": m["role"], "content": m["content"]} for m in messages] == [USER, ANSWER]
    assert messages[-1].get("weight", 1) == 1


@given(WORDS, WORDS, WORDS)
def test_input_and_context_follow_the_instruction(instruction, more, answer):
    alpaca = conversation({"instruction": instruction, "input": more, "output": answer})
    dolly = conversation({"instruction": instruction, "context": more, "response": answer})
    expected = {"role": "user", "content": f"{instruction}\n\n{more}" if more else instruction}
    assert alpaca == dolly == {"messages": [expected, {"role": "assistant", "content": answer}]}


def test_what_is_added_is_read_under_either_name():
    rows = [
        {"instruction": "Translate", "input": "dog", "response": "Hund"},
        {"instruction": "Translate", "context": "dog", "output": "Hund"},
    ]
    for row in rows:
        assert [m["content"] for m in conversation(row)["messages"]] == ["Translate\n\ndog", "Hund"]


def test_roles_in_capitals_are_the_same_roles():
    row = {"messages": [{**m, "role": m["role"].capitalize()} for m in CHAT]}
    assert conversation(row)["messages"] == CHAT


def test_a_system_column_comes_first_and_history_before_the_prompt():
    row = {"system": "Be brief.", "instruction": "b", "input": "", "output": "d", "history": [["x", "y"]]}
    found = [(m["role"], m["content"]) for m in conversation(row)["messages"]]
    assert found == [("system", "Be brief."), ("user", "x"), ("assistant", "y"), ("user", "b"), ("assistant", "d")]
    with pytest.raises(ValueError, match="'system' and a system message"):
        conversation({"system": "a", "messages": [{"role": "system", "content": "b"}, USER, ANSWER]})


CHAT = [USER, {**ANSWER, "content": "Grey."}, USER, ANSWER]


def weights(row, turns="all"):
    return [m.get("weight", 1) for m in conversation(row, turns=turns)["messages"] if m["role"] == "assistant"]


def test_the_turns_that_are_learned_from_are_all_the_last_or_those_with_weight():
    assert weights({"messages": CHAT}) == [1, 1]
    assert weights({"messages": CHAT}, "last") == [0, 1]
    assert weights({"messages": [USER, ANSWER, USER, {**ANSWER, "weight": 0}]}) == [1, 0]
    assert weights({"prompt": CHAT[:3], "completion": [ANSWER]}) == [0, 1]
    with pytest.raises(ValueError, match="nothing to learn from"):
        conversation({"messages": [USER, {**ANSWER, "weight": 0}]})
    with pytest.raises(ValueError, match="weight of a message must be 0 or 1"):
        conversation({"messages": [USER, {**ANSWER, "weight": 0.5}]})


@pytest.mark.parametrize("name", ["train", "training", "loss"])
def test_what_other_trainers_mark_as_not_learned_is_not_learned(name):
    row = {"messages": [USER, {**ANSWER, name: False}, USER, {**ANSWER, name: True}]}
    assert weights(row) == [0, 1] and all(name not in message for message in conversation(row)["messages"])
    assert weights({"messages": [USER, {**ANSWER, name: 0}, USER, {**ANSWER, name: 1}]}) == [0, 1]
    for odd in ("false", 0.37, [0]):
        with pytest.raises(ValueError, match=f"{name!r} of a message must be true or false"):
            conversation({"messages": [USER, {**ANSWER, name: odd}]})
    with pytest.raises(ValueError, match=f"{name!r} of a message says otherwise than its 'weight'"):
        conversation({"messages": [USER, {**ANSWER, name: False, "weight": 1}]})


def test_tool_calls_come_in_every_spelling():
    spellings = [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "tool_calls": [{"function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}]},
        {
            "role": "assistant",
            "content": None,
            "function_call": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
        },
        {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "Rome"}}'},
    ]
    for spelling in spellings:
        messages = [USER, spelling, {"from": "observation", "value": "sunny"}, ANSWER]
        row = conversation({"messages": messages, "tools": json.dumps([{"name": "get_weather"}])})
        assert row["messages"][1]["tool_calls"] == [CALL] and row["messages"][2]["role"] == "tool"
        assert row["tools"] == [{"name": "get_weather"}]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "2+2", "response": ""}, "'response' is empty"),
        ({"prompt": "2+2", "response": 4}, r"'response' must be text, found 4 \(int\)"),
        ({"prompt": "2+2", "response": None}, "no 'response'"),
        ({"instruction": "2+2", "output": 4}, "'output' must be text"),
        ({"instruction": "2+2"}, "no 'output'"),
        ({"text": "all in one"}, r"no 'prompt' \(found the fields \['text'\]\)"),
        ({"messages": [USER, ANSWER], "images": ["a.png"]}, "'images' cannot be read"),
        ({"messages": [USER, ANSWER], "functions": [{"name": "f"}]}, "'functions' cannot be read"),
        ({"prompt": "a", "completion": "b", "label": False}, "one to avoid"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}, ANSWER]}, "parts of a message"),
        ({"messages": [USER, ANSWER], "tools": "{"}, "'tools' is text that is no JSON"),
        ({"messages": [USER, ANSWER], "tools": {"name": "f"}}, "'tools' must be a list"),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": [1]}, "must be a mapping"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {}}]}]}, "name of a function"),
        ({"messages": [ANSWER]}, "nothing to learn from"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "end with a non-empty message of the assistant"),
        ({"instruction": "a", "output": "b", "history": ["x"]}, "'history' must be a list of"),
        ({"instruction": "a", "output": "b", "history": ["Hi", "Yo"]}, "'history' must be a list of"),
        ({"prompt": "a", "response": "b", "label": False}, "label False says .* one to avoid"),
        ({"prompt": "a", "completion": "b", "label": 0}, "one to avoid"),
        ({"messages": [USER, ANSWER], "label": "False"}, "one to avoid"),
        ({"instruction": "a", "output": "b", "label": "0"}, "one to avoid"),
        ({"prompt": "Translate", "input": "dog", "response": "Hund"}, "'input' would not be read beside 'prompt'"),
        ({"prompt": [USER], "context": "dog", "completion": [ANSWER]}, "'context' would not be read beside 'prompt'"),
        (
            {"instruction": "a", "input": "b", "context": "c", "output": "d"},
            "'context' would not be read beside 'input'",
        ),
        (
            {"messages": [USER, ANSWER, {"role": "critic", "content": "a"}, ANSWER]},
            "the role of a message must be system",
        ),
    ],
)
def test_what_cannot_be_heeded_is_named(row, words):
    with pytest.raises(ValueError, match=words):
        load_conversations([row], "task_data")


def test_columns_are_mapped_and_what_is_not_mapped_is_not_read():
    rows = [{"question": "2+2", "answer": "4", "response": "no", "messages": "junk", "system": "Count."}]
    source = DataSource(rows, fields={"prompt": "question", "response": "answer"})
    (row,) = load_conversations(source)
    assert [m["content"] for m in row["messages"]] == ["Count.", "2+2", "4"]
    labelled = DataSource([{"text": "a", "label": 1, "output": "x"}], fields={"prompt": "text", "label": "label"})
    assert [dict(row) for _, row in read_rows(labelled)] == [{"text": "a", "prompt": "a", "label": 1}]
    with pytest.raises(ValueError, match="row 1: no column 'questions'"):
        load_conversations(DataSource(rows, fields={"prompt": "questions", "response": "answer"}))
    with pytest.raises(ValueError, match=r"nothing is read under \['promt'\]"):
        DataSource(rows, fields={"promt": "question"})
    with pytest.raises(ValueError, match="turns must be one of"):
        DataSource(rows, turns="first")


def test_a_mapping_of_a_part_leaves_the_rest_of_the_form():
    row = {"question": "2+2", "response": "4", "history": [["1+1", "2"]]}
    source = DataSource([row], fields={"prompt": "question"})
    assert prompts_alone(source) is None
    assert [m["content"] for m in load_conversations(source)[0]["messages"]] == ["1+1", "2", "2+2", "4"]
    for fields in ({"system": "instruction"}, {"response": "output"}):
        row = {"prompt": "2+2", "response": "4", "instruction": "Count.", "output": "Four."}
        if "response" in fields:
            del row["response"], row["instruction"]
        (found,) = load_conversations(DataSource([row], fields=fields))
        assert [m["content"] for m in found["messages"]][-2:] == ["2+2", row.get("response", "Four.")]
    for column in ("messages", "output", "instruction"):
        with pytest.raises(
            ValueError, match=f"row 1: fields name prompt, and nothing would read the column '{column}'"
        ):
            prompts_alone(DataSource([{"question": "2+2", column: "4"}], fields={"prompt": "question"}))
