"""Chat templates of several kinds: what is learned from, what is refused, and the model's own way to begin an answer."""

import pytest
from chat_tokenizer import CHATML, CONTENT_ALONE, ENDLESS, PARTS, THINKING, chat_tokenizer, learned
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from alignguard.data import DataSource, encode_source, instructed, render_prompt, shown_row

USER = {"role": "user", "content": "Weather?"}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "get_weather", "arguments": {"city": "Rome"}}}],
}
SUNNY = [USER, CALL, {"role": "tool", "content": "sunny"}, {"role": "assistant", "content": "Sunny."}]

TURNS = "{% for m in messages %}<{{ 'a' if m['role'] == 'assistant' else 'u' }}>{{ m['content'] }}{% endfor %}"
NAMED = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
DEAF = "{% for m in messages if m['role'] != 'system' %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + NAMED
OBLIGED = "{% for m in messages %}<{{ 'u' if m['role'] == 'user' else 'a' }}>{{ m['content'] }}{% endfor %}"


def encode(tokenizer, row, turns="all", **more):
    return encode_source(DataSource([row], turns=turns), "task", tokenizer, "causal", more.get("max_length", 600))[0]


def chat(*texts, **last):
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": [*messages[:-1], {**messages[-1], **last}]}


@pytest.mark.parametrize("template", [CHATML, THINKING, CONTENT_ALONE, PARTS])
def test_all_turns_or_the_last_are_learned_from_with_their_ends(template):
    tokenizer = chat_tokenizer(template)
    row = chat("a", "first", "b", "second", "c", "third")
    block = "<think>\n\n</think>\n\n" if template is THINKING else ""
    ends = ["first<|im_end|>\n", "second<|im_end|>\n", f"{block}third<|im_end|>\n"]
    assert learned(tokenizer, encode(tokenizer, row)) == ends
    assert learned(tokenizer, encode(tokenizer, row, "last")) == ends[2:]
    row["messages"][3]["weight"] = 0
    assert learned(tokenizer, encode(tokenizer, row)) == [ends[0], ends[2]]


def test_tools_calls_thoughts_and_template_arguments_are_rendered():
    tokenizer = chat_tokenizer(CHATML)
    row = encode(tokenizer, {"messages": SUNNY, "tools": TOOLS})
    text = tokenizer.decode(row["input_ids"])
    assert (
        '"parameters": {"type": "object"}' in text
        and '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}' in text
    )
    assert learned(tokenizer, row)[1] == "Sunny.<|im_end|>\n"
    row = encode(tokenizer, chat("2+2?", "4", reasoning_content="Add two and two."))
    assert learned(tokenizer, row) == ["<think>\nAdd two and two.\n</think>\n\n4<|im_end|>\n"]
    tokenizer.chat_template = THINKING
    silent = {**chat("2+2?", "4"), "chat_template_kwargs": {"enable_thinking": False}}
    assert learned(tokenizer, encode(tokenizer, silent)) == ["4<|im_end|>\n"]
    assert learned(tokenizer, encode(tokenizer, chat("2+2?", "4"))) == ["<think>\n\n</think>\n\n4<|im_end|>\n"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": SUNNY, "tools": TOOLS}, "leaves out the tool 'get_weather'"),
        ({"messages": SUNNY}, "leaves out the tool call 'get_weather' of message 2"),
        (chat("2+2?", "4", reasoning_content="Add."), "leaves out reasoning_content of message 2"),
        (chat("2+2?", "4", thinking="Add."), "leaves out thinking of message 2"),
        ({**chat("a", "b"), "chat_template_kwargs": {"enable_thinking": False}}, "knows no 'enable_thinking'"),
    ],
)
def test_what_a_template_leaves_out_is_refused(row, words):
    with pytest.raises(ValueError, match=words):
        encode(chat_tokenizer(CONTENT_ALONE), row)


def test_thoughts_of_an_earlier_answer_are_refused_where_they_are_to_be_learned():
    row = chat("a", "first", "b", "second")
    row["messages"][1]["reasoning_content"] = "Think."
    with pytest.raises(ValueError, match="reasoning_content of message 2"):
        encode(chat_tokenizer(CHATML), row)
    assert encode(chat_tokenizer(CHATML), row, "last")


def test_a_template_that_drops_a_response_or_a_role_is_refused():
    for template, words in (
        (PARTS.replace("part['text']", "''"), "leaves out its text of message 1"),
        (CONTENT_ALONE.replace("m in messages", "m in messages if m.role != 'system'"), r"of message 1 \(system\)"),
        (
            CONTENT_ALONE.replace("m.content", "'' if m.role == 'assistant' else m.content"),
            r"of message 3 \(assistant\)",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            encode(chat_tokenizer(template), {"system": "Be brief.", "prompt": "Name a colour.", "response": "Teal."})


@pytest.mark.parametrize("call", ["c.function.name", "c.function.name ~ c.function.arguments.keys() | list | tojson"])
def test_a_template_that_drops_what_a_tool_is_called_with_is_refused(call):
    tokenizer = chat_tokenizer(CHATML.replace("c.function | tojson", call))
    with pytest.raises(ValueError, match="leaves out arguments of the tool call 'get_weather' of message 2"):
        encode(tokenizer, {"messages": SUNNY, "tools": TOOLS})


@pytest.mark.parametrize(
    "call",
    [
        "c.function | tojson",
        "c.function.name ~ (c.function.arguments | tojson | tojson)",
        "c.function.name ~ c.function.arguments",
        "c.function.name }}{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v }}{% endfor %}{{ ''",
    ],
)
def test_what_a_tool_is_called_with_is_found_in_every_spelling(call):
    tokenizer = chat_tokenizer(CHATML.replace("c.function | tojson", call))
    told = {"city": 'Größe "XL"\n\\', "days": [1, 2.5, None], "more": {"wind": True, "of": {}}}
    messages = [USER, {**CALL, "tool_calls": [{"function": {"name": "get_weather", "arguments": told}}]}, *SUNNY[2:]]
    assert encode(tokenizer, {"messages": messages, "tools": TOOLS})


def test_a_prompt_reaches_a_template_that_reads_parts():
    tokenizer = chat_tokenizer(PARTS)
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a colour."}]
    system, user = "<|im_start|>system: Be brief.<|im_end|>\n", "<|im_start|>user: Name a colour.<|im_end|>\n"
    cue = "<|im_start|>assistant: "
    assert tokenizer.decode(render_prompt(tokenizer, asked)) == system + user + cue
    assert instructed(tokenizer, asked[1:], "Be brief.") == asked
    row = {"prompt": "Name a colour.", "response": "Teal."}
    (pair,) = encode_source([row], "task", tokenizer, "seq2seq", 200)
    assert tokenizer.decode(pair["input_ids"]) == user + cue


@pytest.mark.parametrize(
    ("template", "more", "words"),
    [
        (PARTS.replace("part['text']", "''"), {}, r"leaves out its text of message 1 \(user\)"),
        (DEAF, {"system": "Be brief."}, r"row 1: .*leaves out its text of message 1 \(system\)"),
        (NAMED, {"tools": TOOLS}, "leaves out the tool 'get_weather'"),
        (NAMED, {"chat_template_kwargs": {"enable_thinking": False}}, "knows no 'enable_thinking'"),
        (None, {"chat_template_kwargs": {"enable_thinking": False}}, "no chat template, which tools and chat_template"),
    ],
)
def test_what_a_template_leaves_out_of_a_prompt_is_refused(template, more, words):
    row = {"prompt": "Name a colour.", "response": "Teal.", **more}
    with pytest.raises(ValueError, match=words):
        encode_source([row], "task", chat_tokenizer(template), "seq2seq", 64)


def test_an_answer_that_says_nothing_is_not_learned():
    tokenizer = chat_tokenizer(CHATML)
    assert learned(tokenizer, encode(tokenizer, chat("a", "", "b", "second"))) == ["second<|im_end|>\n"]


@pytest.mark.parametrize("response", ["\nHello", "\n\n\nHello", " Hello", "\r\nHello"])
def test_a_response_that_begins_with_white_space_follows_the_very_cue_of_its_prompt(response):
    tokenizer = chat_tokenizer(CHATML)
    row = encode(tokenizer, {"prompt": "Hi", "response": response})
    cue = render_prompt(tokenizer, [{"role": "user", "content": "Hi"}])
    assert row["input_ids"][: len(cue)] == cue and set(row["labels"][: len(cue)]) == {-100}
    assert learned(tokenizer, row) == [f"{response}<|im_end|>\n"]


@settings(max_examples=60)
@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Co", "Cn"]), min_size=1, max_size=12),
        min_size=2,
        max_size=6,
    )
)
def test_the_learned_text_is_what_the_assistant_said(texts):
    texts = [text if text.strip() else "x" for text in texts[: len(texts) // 2 * 2]]
    tokenizer = TOKENIZER
    row = encode(tokenizer, chat(*texts))
    assert "".join(learned(tokenizer, row)) == "".join(f"{text}<|im_end|>\n" for text in texts[1::2])


TOKENIZER = chat_tokenizer(CHATML)


def test_a_template_without_an_end_is_noted_and_one_with_an_end_is_not():
    rows = [{"prompt": "Name a colour.", "response": "Teal."}]
    (note,) = encode_source(rows, "task", chat_tokenizer(ENDLESS), "causal", 64).notes
    assert "no response ends with an end-of-sequence token" in note
    assert encode_source(rows, "task", chat_tokenizer(CHATML), "causal", 64).notes == []


def test_no_end_of_sequence_stands_before_the_response(tokenizer):
    import copy

    ending = copy.deepcopy(tokenizer)
    ending.chat_template = None
    eos = ending.eos_token
    ending._tokenizer.post_processor = TemplateProcessing(
        single=f"$A {eos}", special_tokens=[(eos, ending.eos_token_id)]
    )
    row = encode(ending, {"prompt": "Hi", "response": "Hello"})
    assert ending.decode(row["input_ids"]) == f"Hi\nHello{eos}"
    asked = [{"role": "user", "content": "Hi"}]
    assert ending.eos_token_id not in render_prompt(ending, asked)
    assert render_prompt(ending, asked, encoder=True)[-1] == ending.eos_token_id  # which an encoder wants
    pair = encode_source([{"prompt": "Hi", "response": "Hello"}], "task", ending, "seq2seq", 64)[0]
    assert pair["input_ids"][-1] == ending.eos_token_id and ending.decode(pair["labels"]) == f"Hello{eos}"


@pytest.mark.parametrize(
    ("form", "labels"), [("{start} $A {eos}", "{start}Hello{eos}"), ("{start} $A", "Hello{eos}"), ("$A", "Hello{eos}")]
)
def test_a_decoders_target_begins_as_the_tokenizer_has_it(tokenizer, form, labels):
    """BART's begin with ``<s>`` and end with ``</s>``, T5's are ended alone; T5Gemma's tokenizer begins what is no target."""
    import copy

    own, eos, start = copy.deepcopy(tokenizer), tokenizer.eos_token, tokenizer.pad_token
    marks = {name: (getattr(own, f"{kind}_token"), getattr(own, f"{kind}_token_id")) for name, kind in
             (("start", "pad"), ("eos", "eos"))}  # fmt: skip
    own._tokenizer.post_processor = TemplateProcessing(
        single=form.format(start=start, eos=eos), special_tokens=list(marks.values())
    )
    pair = encode_source([{"prompt": "Hi", "response": "Hello"}], "task", own, "seq2seq", 64)[0]
    assert own.decode(pair["labels"]) == labels.format(start=start, eos=eos)
    cut = encode_source([{"prompt": "Hi", "response": "Hello " * 40}], "task", own, "seq2seq", 12)[0]["labels"]
    assert len(cut) == 12 and cut[-1] == own.eos_token_id and cut[0] == pair["labels"][0]


@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_tags_of_thoughts_are_text_like_any_other_where_the_assistant_does_not_speak(role):
    said = {"role": role, "content": "Reason between <think> and </think>, then answer."}
    messages = (
        [said] if role == "user" else [{"role": "user", "content": "Hi"}, said] if role == "tool" else [said, USER]
    )
    tokenizer = chat_tokenizer(CHATML)
    assert said["content"] in tokenizer.decode(render_prompt(tokenizer, messages))
    if role == "system":
        assert instructed(tokenizer, [USER], said["content"]) == messages


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<{{ m.role }}>{{ m.content.upper() if m.content is string else m.content }}{% endfor %}",
        "{% for m in messages %}<{{ m.role }}>{{ (m.content | tojson) if m.content is not string else 'x' }}{% endfor %}",
    ],
)
def test_content_in_parts_is_not_taken_from_a_template_that_prints_them(template):
    with pytest.raises(ValueError, match="leaves out its text of message 1"):
        render_prompt(chat_tokenizer(template), [{"role": "user", "content": "hi there"}])


@pytest.mark.parametrize(
    ("form", "labels"), [("$A {eos} {start}", "Hello{eos}{start}"), ("{start} $A {eos}", "{start}Hello{eos}")]
)
def test_a_target_may_end_with_its_language(tokenizer, form, labels):
    import copy

    own, eos, start = copy.deepcopy(tokenizer), tokenizer.eos_token, tokenizer.pad_token
    ids = [(eos, own.eos_token_id), (start, own.pad_token_id)]
    own._tokenizer.post_processor = TemplateProcessing(single=form.format(start=start, eos=eos), special_tokens=ids)
    pair = encode_source([{"prompt": "Hi", "response": "Hello"}], "task", own, "seq2seq", 64)[0]
    assert own.decode(pair["labels"]) == labels.format(start=start, eos=eos)
    cut = encode_source([{"prompt": "Hi", "response": "Hello " * 40}], "task", own, "seq2seq", 12)[0]["labels"]
    assert len(cut) == 12 and own.decode(cut).endswith(labels.format(start=start, eos=eos)[-4:])


def test_a_tokenizer_that_waits_for_a_language_says_so(tokenizer, monkeypatch):
    plain = type(tokenizer).__call__

    def call(self, *texts, text_target=None, **more):
        if text_target is not None:
            raise KeyError(None)
        return plain(self, *texts, **more)

    monkeypatch.setattr(type(tokenizer), "__call__", call)
    with pytest.raises(ValueError, match=r"task, row 1: .*knows the language \(None\); set its tgt_lang"):
        encode_source([{"prompt": "Hi", "response": "Hello"}], "task", tokenizer, "seq2seq", 64)


def test_without_a_template_turns_and_tools_are_refused(tokenizer):
    import copy

    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    with pytest.raises(ValueError, match="no chat template to tell several turns apart"):
        encode(plain, chat("a", "first", "b", "second"))
    assert learned(plain, encode(plain, chat("a", "first", "b", "second"), "last")) == [f"second{plain.eos_token}"]
    with pytest.raises(ValueError, match="no chat template, which tools"):
        encode(plain, {**chat("a", "b"), "tools": TOOLS})


def test_what_is_cut_is_counted_by_what_is_lost():
    tokenizer = chat_tokenizer(CHATML)
    short, long = {"prompt": "Hi", "response": "Hello"}, "bread " * 60
    rows = [short, {"prompt": "Hi", "response": long}, {"system": "SECRET " + long, "prompt": long, "response": long}]
    examples = encode_source(rows, "task_data", tokenizer, "causal", 64)
    (note,) = examples.notes
    assert note == (
        "task_data: 2 of 3 rows are longer than 64 tokens and cut: 2 lose the end of the response and its end-of-turn token, "
        "1 the start of the prompt, 1 of these the system prompt or its start"
    )
    assert max(len(row["input_ids"]) for row in examples) == 64
    pairs = encode_source(rows[:2], "task_data", tokenizer, "seq2seq", 16)
    assert pairs.notes == ["task_data: 1 of 2 rows are longer than 16 tokens and cut: 1 lose the end of the response"]
    labelled = [{"prompt": long, "label": 1}, {"prompt": "Hi", "label": 0}]
    assert encode_source(labelled, "task_data", tokenizer, "classification", 16).notes == [
        "task_data: 1 of 2 rows are longer than 16 tokens and lose their end"
    ]


def test_a_row_is_shown_with_what_is_learned_from_marked():
    tokenizer = chat_tokenizer(CHATML)
    rows = encode_source([chat("a", "first", "b", "second")], "task_data", tokenizer, "causal", 600)
    head, text = shown_row(tokenizer, rows, "task_data").split("\n", 1)
    learnt = sum(label != -100 for label in rows[0]["labels"])
    assert head == f"task_data, row 1: {len(rows[0]['input_ids'])} tokens, {learnt} learned from, between » and «"
    start, cue, end = "<|im_start|>", "<|im_start|>assistant\n", "<|im_end|>\n"
    assert text == f"{start}user\na{end}{cue}»first{end}«{start}user\nb{end}{cue}»second{end}«"
    long = encode_source([{"prompt": "bread " * 400, "response": "Yes."}], "task_data", tokenizer, "causal", 4000)
    assert len(shown_row(tokenizer, long, "task_data")) < 700 and "characters ..." in shown_row(
        tokenizer, long, "task_data"
    )
    pair = encode_source([{"prompt": "Hi", "response": "Hello"}], "task_data", tokenizer, "seq2seq", 64)
    assert shown_row(tokenizer, pair, "task_data", "seq2seq").endswith("\n»Hello</s>«")
    label = encode_source([{"prompt": "Hi", "label": 2}], "task_data", tokenizer, "classification", 64)
    assert shown_row(tokenizer, label, "task_data", "classification").endswith("Hi»class 2«")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (NAMED, "<system>Be kind.<user>Hello"),
        (TURNS, "<u>Be kind.\n\nHello"),  # it would be one more turn of the user
        (OBLIGED, "<u>Be kind.\n\nHello"),  # or of the assistant
        (DEAF, "<user>Be kind.\n\nHello"),
        (REFUSING, "<user>Be kind.\n\nHello"),
        (None, "Be kind.\nHello\n"),
    ],
)
def test_a_system_prompt_stands_where_the_template_has_a_place_for_it(template, expected):
    tokenizer = chat_tokenizer(template)
    asked = [{"role": "user", "content": "Hello"}]
    shown = tokenizer.decode(render_prompt(tokenizer, instructed(tokenizer, asked, "Be kind.")))
    assert shown.replace(tokenizer.bos_token or "\0", "") == expected
    assert asked == [{"role": "user", "content": "Hello"}]  # what is given stays as it is


def test_a_system_prompt_takes_the_place_of_a_rows_own():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert instructed(chat_tokenizer(NAMED), messages, "Be kind.") == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
    ]
    with pytest.raises(ValueError, match="system must be a text"):
        instructed(chat_tokenizer(NAMED), messages, " ")
