"""Questions with a number for an answer: files of MetaMathQA's and GSM8K's form, what counts as right, generated sums."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from alignguard.data import read_jsonl

FORMS = {"MetaMathQA": ("query", "response"), "GSM8K": ("question", "answer")}  # columns of question and answer

# Words before the final answer; the first of them that a text holds decides.
MARKS = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")

LONGEST = 1300  # characters of a question and its response; longer rows are left out of training


def read_questions(path: str | Path, option: str) -> list[dict[str, str]]:
    """Rows of either form.

    Args:
        path: JSON objects, one a line or in one array, with ``query`` and ``response`` (MetaMathQA) or ``question`` and
            ``answer`` (GSM8K).
        option: what the path was given as, for errors.

    Returns:
        ``query`` and ``response`` of each row.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no rows, or a row without the columns; named by its number.
    """
    found = []
    for number, row in enumerate(read_jsonl(path), 1):
        held = next((names for names in FORMS.values() if all(isinstance(row.get(n), str) for n in names)), None)
        if held is None:
            forms = " or ".join(f"{' and '.join(names)} ({form})" for form, names in FORMS.items())
            raise ValueError(f"{option} {path}, row {number}: expected texts {forms}, found {sorted(row)}")
        found.append({"query": row[held[0]], "response": row[held[1]]})
    if not found:
        raise ValueError(f"{option} {path} holds no rows")
    return found


def short_enough(rows: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Rows of at most ``LONGEST`` characters, question, a space and response."""
    return [row for row in rows if len(row["query"]) + 1 + len(row["response"]) <= LONGEST]


def final_answer(text: str) -> str | None:
    """What stands after the last mark of the kind that decides, up to the line's end; None where there is no mark."""
    text = text.strip().rstrip(".!?")
    mark = next((mark for mark in MARKS if mark in text), None)
    if mark is None:
        return None
    told = text.rsplit(mark, 1)[1].strip()
    return told.split("\n", 1)[0].strip(" .!?$%")


def number(told: str) -> float | None:
    """The value of a decimal number or a fraction, None for anything else."""
    top, slash, bottom = told.partition("/")
    try:
        return float(Decimal(top.strip()) / Decimal(bottom.strip()) if slash else Decimal(top.strip()))
    except (ArithmeticError, ValueError):
        return None


def is_correct(prediction: str, response: str) -> bool:
    """Whether two texts end in the same number, or where they give none in the same words.

    Raises:
        ValueError: the response has no final answer.
    """
    right, told = final_answer(response), final_answer(prediction)
    if right is None:
        raise ValueError(f"a response without a final answer ({MARKS[0]!r}, {MARKS[-1]!r}): {response!r}")
    if told is None:
        return False
    ours, theirs = number(told), number(right)
    return told == right if ours is None and theirs is None else ours == theirs


NAMES = ("Ana", "Ben", "Eva", "Ivo", "Mia", "Tom")
THINGS = ("apples", "books", "cups", "eggs", "keys", "pens")


def sums(count: int, seed: int) -> list[dict[str, Any]]:
    """Short sums in words, made up by a generator, as rows of MetaMathQA's form.

    Args:
        count: of rows.
        seed: of what is drawn.

    Returns:
        ``query``, ``response``, ``original_question`` and ``type``.
    """
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        name, thing, a, b = draw.choice(NAMES), draw.choice(THINGS), draw.randint(1, 9), draw.randint(1, 9)
        if draw.random() < 0.5:
            asked = f"{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have?"
            answer, worked = a + b, f"{a} + {b} = {a + b}"
        else:
            asked = f"{name} has {a + b} {thing} and gives {b} away. How many {thing} are left?"
            answer, worked = a, f"{a + b} - {b} = {a}"
        response = f"{worked}.\n#### {answer}\nThe answer is: {answer}"
        rows.append({"query": asked, "response": response, "original_question": asked, "type": "generated"})
    return rows
