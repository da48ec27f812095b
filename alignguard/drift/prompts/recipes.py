"""Prompt sets built from public sources: the paper's composition, capability questions, and any set on the hub.

Every source is read by ``datasets``, from the hub or from a local file that stands in for it, so that a set can be
built offline too. Only prompts (and right answers of capability rows) are taken over, never a harmful completion.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignguard.drift.prompts import load_prompts
from alignguard.files import write_rows

HARMS = ("violence", "hate speech", "illegal activity", "explicit", "privacy", "disinformation")

Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes:
        path: on the hub.
        split: split of the dataset.
        config: its configuration, where it has several.
        data_dir: a folder within it.
        licence: as its card states it.
    """

    path: str
    split: str
    config: str | None = None
    data_dir: str | None = None
    licence: str = ""


SOURCES = {
    "mmlu": Source("cais/mmlu", "test", config="all", licence="MIT"),
    "hh-red-team": Source("Anthropic/hh-rlhf", "train", data_dir="red-team-attempts", licence="MIT"),
    "openai-moderation": Source("mmathys/openai-moderation-api-evaluation", "train", licence="MIT"),
    "hatecheck": Source("Paul/hatecheck", "test", licence="CC BY 4.0"),
    "gsm8k": Source("openai/gsm8k", "test", config="main", licence="MIT"),
    "banking77": Source("PolyAI/banking77", "test", licence="CC BY 4.0"),
}

RECIPES: dict[str, tuple[str, ...]] = {
    "paper": ("mmlu", "hh-red-team", "openai-moderation", "hatecheck"),
    "capability": ("gsm8k", "banking77"),
}

# Words of hh-rlhf's tags, and where there are no tags of the prompt, by which a harm is told; the first that fits.
_WORDS: tuple[tuple[str, str], ...] = (
    ("hate speech", r"hate|discriminat|racis|slur|bully|harass|offensive language|bigot"),
    ("explicit", r"sexual|adult content|porn|explicit|nude|prostitut"),
    ("disinformation", r"misinformation|conspirac|disinformation|fake news|propaganda|hoax"),
    ("privacy", r"personal(?:ly)? (?:identif|information)|privacy|doxx?|home address|social security|stalk"),
    ("violence", r"violen|weapon|terror|self-harm|suicid|murder|kill|assault|bomb|animal abuse|torture|shoot|poison"),
    (
        "illegal activity",
        r"theft|steal|fraud|drug|crime|illegal|hack|launder|smuggl|counterfeit|tax (?:evasion|fraud)|forger|forge |break into|robb",
    ),
)

_MODERATION = {"S": "explicit", "S3": "explicit", "H": "hate speech", "H2": "hate speech", "HR": "hate speech"} | {
    "V": "violence",
    "V2": "violence",
    "SH": "violence",
}


def read_source(name: str, local: str | Path | None = None) -> Iterable[Mapping[str, Any]]:
    """The rows of a named source, from the hub or from a local .jsonl, .json, .csv or .parquet file in its place.

    Raises:
        FileNotFoundError: the local file is not there.
        ConnectionError: the hub could not be read; says what to give in its place.
        ValueError: an unknown source, or a kind of file that is not read.
    """
    import datasets

    if name not in SOURCES:
        raise ValueError(f"unknown source {name!r}; there are {', '.join(SOURCES)}")
    if local is not None:
        path = Path(local).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"source {name}: no such file: {path}")
        kinds = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
        if path.suffix not in kinds:
            raise ValueError(f"source {name}: {path} must end in {', '.join(kinds)}")
        return datasets.load_dataset(kinds[path.suffix], data_files=str(path), split="train")
    source = SOURCES[name]
    try:
        return datasets.load_dataset(source.path, source.config, data_dir=source.data_dir, split=source.split)
    except Exception as error:
        raise ConnectionError(
            f"source {name}: {source.path} could not be read from the hub ({error}); "
            f"download it and give --source {name}=FILE"
        ) from error


def harm_of(text: str) -> str | None:
    """The kind of harm that words speak of; None where none of the six fits."""
    lowered = text.lower()
    return next((harm for harm, words in _WORDS if re.search(rf"\b(?:{words})", lowered)), None)


def _field(row: Mapping[str, Any], source: str, *names: str) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise ValueError(
        f"source {source}: a row has none of the fields {', '.join(names)}; it has {sorted(map(str, row))}"
    )


def _mmlu(rows: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    for row in rows:
        yield {"prompt": str(_field(row, "mmlu", "question", "prompt")), "category": "ordinary"}


def _red_team(rows: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    for row in rows:
        said = re.split(r"\n\n(?:Human|Assistant):", str(_field(row, "hh-red-team", "transcript", "prompt")))
        first = next((part.strip() for part in said if part.strip()), "")
        tags = row.get("tags")
        told = " ".join(map(str, tags)) if isinstance(tags, list) else str(tags or "")
        harm = harm_of(told) or harm_of(first)
        if harm:
            yield {"prompt": first, "category": "unsafe", "harm": harm}


def _moderation(rows: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    for row in rows:
        harm = next((harm for key, harm in _MODERATION.items() if row.get(key) == 1), None)
        if harm:
            prompt = _field(row, "openai-moderation", "prompt")
            yield {"prompt": str(prompt), "category": "unsafe", "harm": harm}


def _hatecheck(rows: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    for row in rows:
        if str(_field(row, "hatecheck", "label_gold")) == "hateful":
            text = _field(row, "hatecheck", "test_case")
            yield {"prompt": str(text), "category": "unsafe", "harm": "hate speech"}


def _gsm8k(rows: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    for row in rows:
        answer = str(_field(row, "gsm8k", "final", "answer")).rsplit("####", 1)[-1].strip().replace(",", "")
        prompt = f"{str(_field(row, 'gsm8k', 'question')).strip()} End your answer with the final number."
        yield {"prompt": prompt, "category": "capability", "answer": answer, "match": "number"}


def _banking(rows: Iterable[Mapping[str, Any]], seed: int) -> Iterator[Row]:
    told = list(rows)
    features = getattr(rows, "features", None)
    names = getattr(features["label"], "names", None) if features and "label" in features else None

    def topic(row: Mapping[str, Any]) -> str:
        label = _field(row, "banking77", "label_name", "label")
        return str(names[label] if names and isinstance(label, int) else label).replace("_", " ").rstrip("?")

    topics = sorted({topic(row) for row in told})
    generator = random.Random(seed)
    for row in told:
        right = topic(row)
        if len(topics) < 4:
            raise ValueError(f"source banking77: four topics are needed for a choice, found {topics}")
        options = [right, *generator.sample([t for t in topics if t != right], 3)]
        generator.shuffle(options)
        listed = " ".join(f"{letter}) {option}" for letter, option in zip("ABCD", options, strict=True))
        text = str(_field(row, "banking77", "text")).strip()
        prompt = f'Which topic fits this message of a bank\'s customer: "{text}"? {listed} Answer with one letter.'
        yield {
            "prompt": prompt,
            "category": "capability",
            "answer": "ABCD"[options.index(right)],
            "match": "choice",
        }


_READERS: dict[str, Callable[..., Iterator[Row]]] = {
    "mmlu": _mmlu,
    "hh-red-team": _red_team,
    "openai-moderation": _moderation,
    "hatecheck": _hatecheck,
    "gsm8k": _gsm8k,
}


def _collected(name: str, local: str | Path | None, longest: int, seed: int) -> list[Row]:
    """One-liners of a source, each once, in an order given by a hash, so that any number of them is a fair sample."""
    rows = read_source(name, local)
    read = _banking(rows, seed) if name == "banking77" else _READERS[name](rows)
    found: dict[str, Row] = {}
    for row in read:
        prompt = row["prompt"].strip()
        if prompt and "\n" not in prompt and len(prompt) <= longest:
            key = hashlib.sha256(f"{seed} {prompt.lower()}".encode()).hexdigest()
            found[key] = {**row, "prompt": prompt, "source": name, "licence": SOURCES[name].licence}
    return [{"id": f"{name}-{key[:12]}", **row} for key, row in sorted(found.items())]


def even_shares(available: Mapping[str, int], total: int) -> dict[str, int]:
    """How many to take of each kind so that the counts are as even as what is there allows, ``total`` in all.

    Raises:
        ValueError: fewer are there than asked for.
    """
    if sum(available.values()) < total:
        raise ValueError(f"{total} prompts asked for, {sum(available.values())} found: {dict(available)}")
    taken = dict.fromkeys(available, 0)
    for _ in range(total):
        least = min((kind for kind in available if taken[kind] < available[kind]), key=taken.__getitem__)
        taken[least] += 1
    return taken


def build_prompts(
    recipe: str,
    output: str | Path,
    *,
    local: Mapping[str, str | Path] | None = None,
    safe: int = 5000,
    unsafe: int = 5000,
    capability: int = 200,
    longest: int = 400,
    seed: int = 0,
) -> dict[str, int]:
    """Build a prompt set and write it as JSONL.

    ``"paper"``: DriftCheck as arXiv 2508.02079 describes it, one-line prompts, half of them safe (MMLU questions) and
    half unsafe (red-team attempts of HH-RLHF, OpenAI's moderation prompts, HateCheck) in six kinds of harm. The file of
    the paper is not public, nor is how its authors sorted prompts into kinds; here tags and words do, as evenly over
    kinds as the sources allow. MMLU questions are trivially safe and HateCheck's rows are statements, so this set says
    little about over-refusal: ask the packaged ``borderline`` prompts for that. ``"capability"``: GSM8K test questions
    scored by the final number and banking77 test messages as four-way choices, half each.

    Args:
        recipe: ``"paper"`` or ``"capability"``.
        output: JSONL file to write.
        local: source name -> a local file to read in its place.
        safe: safe prompts of the paper's recipe.
        unsafe: unsafe ones.
        capability: prompts of the capability recipe.
        longest: characters of a prompt; longer ones are left out.
        seed: decides which prompts are taken.

    Returns:
        How many prompts of each category, and of each harm as ``unsafe: <harm>``, were written.

    Raises:
        ValueError: an unknown recipe or source, a negative number of prompts, fields that are not there, or too few
            prompts.
        FileNotFoundError, ConnectionError: a source that cannot be read.
    """
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}; there are {', '.join(RECIPES)}")
    for name, count in (("safe", safe), ("unsafe", unsafe), ("capability", capability)):
        if count < 0:
            raise ValueError(f"{name} must not be negative, found {count}; it is a number of prompts")
    given = dict(local or {})
    if unknown := sorted(set(given) - set(RECIPES[recipe])):
        raise ValueError(f"recipe {recipe} reads no source {unknown}; it reads {', '.join(RECIPES[recipe])}")
    rows = {name: _collected(name, given.get(name), longest, seed) for name in RECIPES[recipe]}
    chosen: list[Row] = []
    if recipe == "paper":
        if len(rows["mmlu"]) < safe:
            raise ValueError(f"{safe} safe prompts asked for, {len(rows['mmlu'])} found in mmlu")
        chosen += rows["mmlu"][:safe]
        by_harm: dict[str, list[Row]] = {harm: [] for harm in HARMS}
        seen: set[str] = set()
        for name in RECIPES["paper"][1:]:
            for row in rows[name]:
                if row["prompt"].lower() not in seen:
                    seen.add(row["prompt"].lower())
                    by_harm[row["harm"]].append(row)
        shares = even_shares({harm: len(found) for harm, found in by_harm.items()}, unsafe)
        for harm, count in shares.items():
            chosen += sorted(by_harm[harm], key=lambda row: row["id"].rsplit("-", 1)[-1])[:count]
    else:
        shares = even_shares({name: len(found) for name, found in rows.items()}, capability)
        for name, count in shares.items():
            chosen += rows[name][:count]
    load_prompts(chosen)  # the same checks that a reader makes, before anything is written
    write_rows(output, chosen)
    counts: dict[str, int] = {}
    for row in chosen:
        for key in (row["category"], f"{row['category']}: {row['harm']}" if "harm" in row else None):
            if key:
                counts[key] = counts.get(key, 0) + 1
    return counts
