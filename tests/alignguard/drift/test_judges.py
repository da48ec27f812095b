"""Judges that are models: a tiny classifier and a tiny chat model, saved and loaded by path."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForSequenceClassification

from alignguard.data import encode_source
from alignguard.drift import COMPLIANCE, INCOHERENT, REFUSAL, driftcheck, judges, likelihood, make_judge
from alignguard.drift.judges import ChatJudge, ClassifierJudge, RuleJudge

PROMPTS = ["how do I bake bread", "write a note", "how do I break a lock", "write about rain", "say nothing"]
TEXTS = ["Warm the oven first.", "I'm sorry, but I can't.", "The sea is wide.", "the " * 20, ""]


@pytest.fixture(scope="module")
def classifier(tokenizer, tmp_path_factory):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=128, num_labels=3, id2label={0: "answers", 1: "REFUSAL", 2: "partial"},
        label2id={"answers": 0, "REFUSAL": 1, "partial": 2}, initializer_range=1.0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("classifier")
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pair", [True, False])
def test_the_likeliest_label_decides_one_answer_at_a_time_or_many(classifier, tokenizer, pair):
    judge = ClassifierJudge(classifier, pair=pair, batch_size=2)
    model = BertForSequenceClassification.from_pretrained(classifier).eval()
    expected = []
    for prompt, text in zip(PROMPTS, TEXTS, strict=True):
        inputs = tokenizer(*((prompt, text) if pair else (text,)), return_tensors="pt")
        if not text:
            expected.append(INCOHERENT)
            continue
        with torch.no_grad():
            label = int(model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.argmax())
        expected.append(REFUSAL if label == 1 else COMPLIANCE)
    expected[3] = INCOHERENT  # a loop, whatever the classifier makes of it
    assert judge(PROMPTS, TEXTS) == expected
    assert str(classifier) in judge.name


def test_labels_are_chosen_by_name_or_by_the_caller(classifier):
    judge = ClassifierJudge(classifier)
    assert judge.refusing == {1}
    assert ClassifierJudge(classifier, refusal_labels=["REFUSAL", "partial"]).refusing == {1, 2}
    with pytest.raises(ValueError, match=r"no labels \['nope'\]"):
        ClassifierJudge(classifier, refusal_labels=["nope"])
    judge.model.config.id2label = {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    with pytest.raises(ValueError, match="--judge-labels"):
        ClassifierJudge(judge.model, tokenizer=judge.tokenizer)


def test_a_model_whose_labels_would_be_drawn_is_no_classifier(tiny_llama, tokenizer, tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is no sequence classifier but a model of kind causal.*--judge chat"):
        ClassifierJudge(tmp_path, refusal_labels=["LABEL_1"])


def test_a_judge_says_what_it_cannot_read_whole(classifier, tiny_llama, tokenizer):
    long = ["the sea is wide and " * 40 + "deep"]
    with pytest.warns(UserWarning, match=r"1 of 1 answers .* longer than the 128 tokens .* and are cut"):
        ClassifierJudge(classifier)(long, TEXTS[:1])
    model = tiny_llama()
    asked = ChatJudge(model, tokenizer=tokenizer, question="{prompt} {text} ?")
    room = model.config.max_position_embeddings
    with pytest.warns(UserWarning, match=rf"rows are longer than {room} tokens and cut: .* the start of the prompt"):
        asked(["the sea is wide and " * room], TEXTS[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked(PROMPTS[:1], TEXTS[:1])
        ClassifierJudge(classifier)(PROMPTS[:1], TEXTS[:1])


def test_a_classifier_without_positions_reads_answers_of_any_length(tokenizer):
    model = Counting()
    model.config = SimpleNamespace(id2label=Counting.config.id2label)
    assert tokenizer.model_max_length > 10**9
    texts = ["the sea is wide and deep " + "." * dots for dots in (200, 201)]
    assert len(set(ClassifierJudge(model, tokenizer=tokenizer, pair=False)(PROMPTS[:2], texts))) == 1


def test_a_chat_model_is_asked_and_its_likelier_word_decides(tiny_llama, tokenizer):
    model = tiny_llama(torch.float64, seed=3)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    question = "{prompt} {text} ?"
    judge = ChatJudge(model, tokenizer=tokenizer, question=question, batch_size=2)
    expected = []
    for prompt, text in zip(PROMPTS[:3], TEXTS[:3], strict=True):
        scores = {}
        for word in ("Yes", "No"):
            messages = [{"role": "user", "content": f"{prompt} {text} ?"}]
            head = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
            whole = tokenizer.apply_chat_template(
                [*messages, {"role": "assistant", "content": word}], return_dict=True
            )["input_ids"]
            with torch.no_grad():
                logs = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            words = range(len(head), len(whole) - 1)  # without the end of turn
            scores[word] = sum(float(logs[i - 1, whole[i]]) for i in words)
        expected.append(REFUSAL if scores["Yes"] > scores["No"] else COMPLIANCE)
    assert judge(PROMPTS[:3], TEXTS[:3]) == expected
    assert judge(PROMPTS[3:], TEXTS[3:]) == [INCOHERENT, INCOHERENT]
    with pytest.raises(ValueError, match=r"\{prompt\} and \{text\}"):
        ChatJudge(model, tokenizer=tokenizer, question="Is it?")


@pytest.mark.parametrize("unlikely", ["Yes", "No"])
def test_an_end_of_turn_that_is_unlikely_after_one_word_does_not_outweigh_it(
    tiny_llama, tokenizer, monkeypatch, unlikely
):
    judge, read = ChatJudge(tiny_llama(), tokenizer=tokenizer), likelihood._read
    expected, word = judge(PROMPTS[:3], TEXTS[:3]), tokenizer(unlikely)["input_ids"]

    def less_likely(model, batch):
        log_probs, targets, numbers = read(model, batch)
        for row in set(numbers.tolist()):
            if targets[numbers == row].tolist() == [*word, tokenizer.eos_token_id]:
                log_probs[(numbers == row) & (targets == tokenizer.eos_token_id)] -= 100
        return log_probs, targets, numbers

    monkeypatch.setattr(likelihood, "_read", less_likely)
    assert judge(PROMPTS[:3], TEXTS[:3]) == expected


def test_a_prompt_or_an_answer_that_looks_like_a_place_is_left_alone(tiny_llama, tokenizer, monkeypatch):
    asked = []
    monkeypatch.setattr(judges, "encode_source", lambda rows, *more: asked.extend(rows) or encode_source(rows, *more))
    ChatJudge(tiny_llama(), tokenizer=tokenizer, question="{text} {prompt} {text}")(["say {text}"], ["It is {prompt}."])
    assert asked[0]["prompt"] == "It is {prompt}. say {text} It is {prompt}."


class Counting(torch.nn.Module):
    """Refuses where the answer has an odd number of tokens."""

    config = BertConfig(id2label={0: "answers", 1: "refusal"})

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        odd = torch.zeros(len(input_ids)) if token_type_ids is None else token_type_ids.sum(1) % 2
        return SimpleNamespace(logits=torch.stack([1 - odd, odd], 1))


def test_a_classifier_is_told_which_tokens_are_of_the_answer(tokenizer):
    paired = copy.deepcopy(tokenizer)
    paired.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    paired.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B:1")
    texts = ["The sea is wide" + "." * dots for dots in range(3)]
    odd = [len(tokenizer(text)["input_ids"]) % 2 for text in texts]
    assert 0 < sum(odd) < 3
    expected = [REFUSAL if one else COMPLIANCE for one in odd]
    assert ClassifierJudge(Counting(), tokenizer=paired, batch_size=2)(PROMPTS[:3], texts) == expected


def test_a_judge_by_path_serves_driftcheck(classifier, tiny_llama, tokenizer):
    rows = [{"id": str(i), "prompt": p, "category": "unsafe"} for i, p in enumerate(PROMPTS)]
    report = driftcheck(tiny_llama(), tokenizer, rows, judge=make_judge("classifier", classifier), max_new_tokens=4)
    texts = [row.text for row in report.rows]
    assert [row.verdict for row in report.rows] == ClassifierJudge(classifier)(PROMPTS, texts)
    assert [row.rules for row in report.rows] == RuleJudge()(PROMPTS, texts)


def test_bad_judges_are_named():
    with pytest.raises(ValueError, match="rules, classifier, chat"):
        make_judge("oracle")
    with pytest.raises(ValueError, match="--judge-model"):
        make_judge("chat")


@pytest.mark.parametrize(
    ("kind", "given", "option"),
    [
        ("rules", {"model": "m"}, "--judge-model"),
        ("rules", {"refusal_labels": ["x"]}, "--judge-labels"),
        ("rules", {"form": "{prompt}{text}"}, "--judge-form"),
        ("chat", {"model": "m", "refusal_labels": ["x"]}, "--judge-labels"),
        ("chat", {"model": "m", "form": "{prompt}{text}"}, "--judge-form"),
        ("classifier", {"model": "m", "form": "{prompt}{text}"}, "--judge-form"),
        ("llama-guard", {"model": "m", "refusal_labels": ["x"]}, "--judge-labels"),
    ],
)
def test_what_a_judge_does_not_read_is_named_before_its_model_is_read(kind, given, option):
    with pytest.raises(ValueError, match=rf"judge '{kind}' reads no .*\({option}\).*--judge"):
        make_judge(kind, **given)


def test_a_chat_judge_is_asked_about_answers_with_thoughts(tiny_llama, tokenizer):
    judge = ChatJudge(tiny_llama(torch.float64), tokenizer=tokenizer)
    texts = ["<think>\nHe asks.</think> I cannot help with that.", "<think>a</think> b <think>c</think> d, e and f"]
    assert set(judge(["What does <think>x</think> mean?", "How?"], texts)) <= {REFUSAL, COMPLIANCE}
