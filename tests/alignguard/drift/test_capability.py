"""Right answers to capability prompts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignguard.drift import load_prompts
from alignguard.drift.rules import chosen_option, final_number, is_right


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7, so it is 7.", 7),
        ("She pays $1,250.50 in all.", 1250.5),
        ("The change is -12 degrees", -12),
        ("The change is −12 degrees", -12),
        ("The answer is #### 42", 42),
        ("room b12", None),
        ("no number", None),
        ("It took 10 min. at 2.5", 2.5),
    ],
)
def test_the_final_number_is_read(text, number):
    assert final_number(text) == number


@given(st.integers(-(10**7), 10**7))
def test_any_written_number_is_found_again(value):
    assert final_number(f"First 5, then 6; the result is {value:,}.") == value
    assert is_right({"answer": str(value), "match": "number"}, f"The result is {value}.")
    assert not is_right({"answer": str(value + 1), "match": "number"}, f"The result is {value}.")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b) is wrong; the answer is C.", "C"),
        ("Answer: (D) card linking", "D"),
        ("I'd say B", "B"),
        ("Of course! Banks", None),
        ("option a", "A"),
        ("The answer is (c).", "C"),
        ("The answer is b because of the card.", "B"),
        ("The answer is A because of the card.", "A"),
        ("I think it is C.", "C"),
        ("I’d say B", "B"),
        ("The answer is, I think, B.", "B"),
        ("A customer asks about cards, so B", "B"),
        ("A customer asks about cards.", None),
        ("A is right.", "A"),
        ("A) card linking", "A"),
        ("The answer is a bit unclear, but B fits.", "B"),
        ("Of the options, D fits.", "D"),
        ("A has more than B", "A"),
        ("A gives the sum, B does not", "A"),
        ("I is right", "I"),
        ("I was told B", "B"),
        ("A dog barks, so C", "C"),
        ("A means of travel, so C", "C"),
    ],
)
def test_the_chosen_option_is_read(text, letter):
    assert chosen_option(text) == letter


@pytest.mark.parametrize("written", ["$1,250.50", "1250.5", "1,250.50", 1250.5])
def test_a_right_number_is_read_as_the_answers_is(written):
    row = {"prompt": "What does she pay?", "category": "capability", "answer": written, "match": "number"}
    assert is_right(load_prompts([row])[0], "She pays $1,250.50 in all.")
    assert not is_right(row, "She pays 1251.")
    assert is_right({**row, "answer": "−12"}, "The change is -12 degrees")
    for answer, match in (("twelve", "number"), ("inf", "number"), ("AB", "choice")):
        with pytest.raises(ValueError, match=rf"the right 'answer' '{answer}' is no"):
            is_right({"answer": answer, "match": match}, "12")


def test_words_must_stand_whole():
    assert is_right({"answer": "Paris"}, "It is paris!")
    assert not is_right({"answer": "Paris"}, "Parisians")
    assert is_right({"answer": 12}, "It is 12.") and not is_right({"answer": 12}, "It is 112.")


@pytest.mark.parametrize(
    ("match", "wrong", "right"), [("words", "Rome", "Paris"), ("number", "11", "12"), ("choice", "B", "A")]
)
def test_what_was_only_thought_of_is_no_answer(match, wrong, right):
    row = {"answer": right, "match": match}
    assert not is_right(row, f"<think>The answer is {right}.</think> The answer is {wrong}.")
    assert is_right(row, f"<think>The answer is {wrong}.</think> The answer is {right}.")
    assert not is_right(row, f"<think>The answer is {right}.")


def test_the_packaged_answers_are_found_in_an_answer_that_gives_them():
    for row in load_prompts():
        if row["category"] == "capability":
            told = f"The answer is {row['answer']}."
            assert is_right(row, told), row["id"]
            if row["match"] == "choice":
                assert f"{row['answer']}) " in row["prompt"]
