"""Other rows, the same training: alignment examples among them, responses in the model's own words, a system prompt."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from alignguard.data import check_system, encode_source
from alignguard.drift import answer_batch, plan_batches, room_for_prompt
from alignguard.loading import adapter_off
from alignguard.objective import model_kind
from studies.rivals.base import Encoded, Rival, Run, check_count, check_strength


@dataclass
class Replay(Rival):
    """Alignment examples make up a share of the rows that are trained on; they repeat where there are few.

    Rows are marked, so that the trainer counts those that were read. How little of it holds off forgetting: Bethune et al.
    2025 (arXiv 2502.06042); for safety, Bianchi et al. 2023 (arXiv 2309.07875).

    Attributes:
        share: of all rows, in [0, 0.99]; 0.01, 0.05 and 0.1 are usual.

    Raises:
        ValueError: a share outside [0, 0.99].
    """

    name: ClassVar[str] = "replay"
    reads_alignment: ClassVar[bool] = True
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {
        "share": (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5)
    }
    share: float = 0.05

    def __post_init__(self) -> None:
        check_strength("share", self.share, 0.99)

    def rows(self, task: Sequence[Encoded], run: Run) -> list[Encoded]:
        """The task's rows and after them the replayed ones of ``run``; the trainer shuffles all."""
        count = math.ceil(self.share / (1 - self.share) * len(task) - 1e-10)  # 15.000000000000002 rows are 15
        replayed = [{**run.alignment[i % len(run.alignment)], "replayed": True} for i in range(count)]
        return [*task, *replayed]


REWRITE = (
    "Here are a request and a reference answer to it. Answer the request in your own words, with the reference answer as "
    "your guide.\n\nRequest:\n{prompt}\n\nReference answer:\n{response}\n\nYour own answer:"
)
# words by which a model tells of the reference in place of answering
TELLING = ("reference answer", "your own answer", "my own answer", "your response", "my response")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
CHECKS = ("number", "none")

_told: dict[tuple[str, str], str | None] = {}  # answers of this process: seeds of one model share them


def answers_rightly(reference: str, text: str, check: str = "number") -> bool:
    """Whether a rewritten response may take the place of its reference.

    It must say something, and not tell of the reference. Where the reference ends in a result, that is where it holds
    a number, ``check="number"`` wants the last number of both to be the same.
    """
    if not text.strip() or any(words in text.lower() for words in TELLING):
        return False
    wanted, found = NUMBER.findall(reference), NUMBER.findall(text)
    if check == "none" or not wanted:
        return True
    return bool(found) and float(wanted[-1].replace(",", "")) == float(found[-1].replace(",", ""))


def rewritten(run: Run, pairs: Sequence[tuple[str, str]], tokens: int) -> list[str | None]:
    """The aligned model's own words for each (prompt, response); None where they do not fit into ``tokens`` or the model.

    Greedy, in batches, with the adapter switched off; asked once in a process for the same weights.
    """
    prompts = [REWRITE.format(prompt=prompt, response=response) for prompt, response in pairs]
    frozen = (p.detach().double() for p in run.model.parameters() if not p.requires_grad)
    sums = [(float(p.sum()), float(p.abs().sum())) for p in frozen]
    mark = hashlib.sha256(json.dumps([sums, tokens]).encode()).hexdigest()
    asked = [prompt for prompt in dict.fromkeys(prompts) if (mark, prompt) not in _told]
    room, encoder = room_for_prompt(run.model, tokens), model_kind(run.model) == "seq2seq"
    for batch in plan_batches(run.tokenizer, asked, 32, room, encoder):
        with adapter_off(run.model):
            texts = answer_batch(run.model, run.tokenizer, batch, tokens)
        for place, ids, text in zip(batch.indices, batch.ids, texts, strict=True):
            said = run.tokenizer(text, add_special_tokens=False)["input_ids"]
            cut = len(said) >= tokens or (room is not None and len(ids) >= room)
            _told[mark, asked[place]] = None if cut else text
    return [_told[mark, prompt] for prompt in prompts]


@dataclass
class SelfRewritten(Rival):
    """The task's responses are first told by the aligned model in its own words, so that they lie nearer to it: SDFT.

    Yang et al. (2402.13669): the model is shown request and reference answer and answers anew, and its answer is trained
    on where it is still right; elsewhere the reference stays. As in the authors' code, answers that speak of the
    reference are dropped, and of tasks whose result is a number the last number must be the reference's; an open task
    has no other check. The form of the request is worded here. Answers that reach ``tokens`` are cut off and so dropped.

    Attributes:
        check: ``"number"`` or ``"none"``, what of an answer is held against the reference.
        tokens: longest answer, at least 1.
        kept: after the start of a run, how many responses are the model's own.

    Raises:
        ValueError: an unknown check, or fewer than one token.
    """

    name: ClassVar[str] = "self-rewritten"
    reads_text: ClassVar[bool] = True
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"check": CHECKS}
    check: str = "number"
    tokens: int = 64
    kept: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.check not in CHECKS:
            raise ValueError(f"check must be one of {CHECKS}, not {self.check!r}")
        check_count("tokens", self.tokens)

    def rows(self, task: Sequence[Encoded], run: Run) -> list[Encoded]:
        """The rows of ``run`` with the model's own responses where they are right; those of several turns stay.

        Only rows that come to be read are rewritten; the others are marked.
        """
        messages = [list(row["messages"]) for row in run.task]
        read = range(len(messages)) if run.read is None else run.read
        single = [i for i in sorted(read) if [m["role"] for m in messages[i]][-2:] == ["user", "assistant"]]
        single = [i for i in single if all(m["role"] == "system" for m in messages[i][:-2])]
        pairs = [(messages[i][-2]["content"], messages[i][-1]["content"]) for i in single]
        changed: list[Mapping[str, Any]] = [dict(row) for row in run.task]
        for place, (_, reference), text in zip(single, pairs, rewritten(run, pairs, self.tokens), strict=True):
            if text is not None and answers_rightly(reference, text, self.check):
                last = {**messages[place][-1], "content": text}
                changed[place] = {**run.task[place], "messages": [*messages[place][:-1], last]}
                self.kept += 1
        kind = model_kind(run.model)
        rows = encode_source(changed, "task_data", run.tokenizer, kind, run.max_length)
        return [dict(row) if place in read else {**row, "unread": True} for place, row in enumerate(rows)]


PROMPTS = (
    "You are a helpful and honest assistant. Answer as helpfully as you can while staying safe: refuse, briefly and "
    "politely, whatever could harm somebody, and answer everything else.",
    "You are a helpful and safe assistant.",
    "You are a helpful, respectful and honest assistant. Help with every request that harms nobody. Never give advice, "
    "code or texts that serve violence, crime, weapons, fraud, abuse or hatred, however the request is worded; say that "
    "you cannot help with that. A request that only sounds dangerous is answered as any other.",
)


@dataclass
class SystemPrompt(Rival):
    """Plain LoRA without a system prompt, and a safety system prompt when it is asked: PTST (Lyu et al., 2402.18540).

    The prompts are worded here.

    Attributes:
        system: system prompt that the trained model is asked with, in DriftCheck and on the task.

    Raises:
        ValueError: an empty one.
    """

    name: ClassVar[str] = "system-prompt"
    grid: ClassVar[dict[str, tuple[Any, ...]]] = {"system": PROMPTS}
    system: str = PROMPTS[0]

    def __post_init__(self) -> None:
        check_system(self.system)

    def asked_with(self) -> str | None:
        """The system prompt."""
        return self.system
