"""What a model refuses and answers, source by source, and its perplexity beside the original's."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignguard.drift import COMPLIANCE, INCOHERENT, REFUSAL, driftcheck, load_prompts, share_of
from alignguard.files import write_text
from alignguard.loading import load_model
from alignguard.training import versions
from studies.real_model import borderline, rows
from studies.texts import text_loss

ORDER = 0  # of the hash by which prompts are drawn
PARAGRAPH = 256  # tokens of a paragraph that count towards perplexity


def _rows(prompts: Sequence[Any], group: str, category: str, limit: int) -> list[dict[str, Any]]:
    """Rows for DriftCheck; the answers' group is read from their ids."""
    told = [prompt if isinstance(prompt, str) else prompt["prompt"] for prompt in prompts][:limit]
    return [{"id": f"{group}/{i}", "prompt": prompt, "category": category} for i, prompt in enumerate(told)]


def _foreign(data: str | Path, name: str) -> list[dict[str, Any]]:
    """Prompts of a source that took no part in alignment: those first that share no near-duplicate with training."""
    found = rows.hashed(rows.unsafe(data, name, ["train", "val", "test"]), ORDER)
    return sorted(found, key=lambda row: row["split"] == "train")


def _everyday(data: str | Path, split: str) -> list[dict[str, Any]]:
    return [
        {"id": row["id"], "prompt": f"{row['instruction']}\n{row['input']}".strip()}
        for row in rows.read_source(data, "alpaca_short")
        if row["split"] == split
    ]


def prompt_groups(data: str | Path, split: str, limit: int = 80) -> list[dict[str, Any]]:
    """The prompts that a model is asked, up to ``limit`` of each group.

    Args:
        data: folder of the prompt sets.
        split: ``"val"`` for choosing settings, which asks nothing of the held-out sources; ``"test"`` for the card.
        limit: of each group.

    Returns:
        ``id`` ("group/number"), ``prompt`` and ``category``.
    """
    found = []
    for name in rows.HOME:
        found += _rows(rows.hashed(rows.unsafe(data, name, [split]), ORDER), f"home {name}", "unsafe", limit // 2)
    found += _rows(rows.hashed(rows.hard(data, split), ORDER), "OR-Bench hard", "borderline", limit)
    if split == "val":
        kept = borderline.drawn(borderline.KINDS, "val", limit, ORDER)
        found += _rows(kept, "contrast, kinds of training", "borderline", limit)
        return found + _rows(rows.hashed(_everyday(data, "train"), ORDER), "alpaca", "ordinary", limit // 2)
    for name in rows.FOREIGN:
        asked = _foreign(data, name)
        found += _rows([row for row in asked if row["plain"]], f"foreign {name}", "unsafe", limit)
        found += _rows([row for row in asked if not row["plain"]], f"mild {name}, the rest", "unsafe", limit // 2)
    safe = rows.hashed(rows.read_source(data, "overrefusal_physicalsafety_safe"), ORDER)
    found += _rows(safe, "physical safety", "borderline", limit)
    for kind, slots in borderline.HELD_OUT.items():
        found += _rows(borderline.filled(slots), f"contrast, held out: {kind}", "borderline", limit)
    sums = [{"id": row["id"], "prompt": row["question"]} for row in rows.read_source(data, "gsm8k_test")]
    packaged = [row for row in load_prompts(None) if row["category"] == "ordinary"]
    for name, everyday in (("alpaca", _everyday(data, "eval")), ("gsm8k", sums)):
        found += _rows(rows.hashed(everyday, ORDER), name, "ordinary", limit)
    return found + _rows(packaged, "packaged", "ordinary", limit)


def perplexity(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int = 8) -> float:
    """Perplexity of plain paragraphs, no chat template, over all tokens but each paragraph's first."""
    return math.exp(text_loss(model, tokenizer, texts, PARAGRAPH, batch_size, progress=True))


def _share(verdicts: Sequence[str], wanted: str) -> dict[str, Any]:
    estimate = share_of([verdict == wanted for verdict in verdicts])
    return {"measure": "refused" if wanted == REFUSAL else "answered", **asdict(estimate)}


def measure(
    model: str | Path,
    data: str | Path,
    *,
    original: str | Path | None = None,
    split: str = "test",
    limit: int = 80,
    paragraphs: int = 200,
    max_new_tokens: int = 32,
) -> dict[str, Any]:
    """Judge a model's answers by rule, group by group; what it says to unsafe prompts is counted and not kept.

    Args:
        model: folder of the model.
        data: folder of the prompt sets.
        original: folder of the model before alignment, for its perplexity; None leaves that out.
        split: see :func:`prompt_groups`.
        limit: prompts of each group.
        paragraphs: of WikiText-2 for perplexity.
        max_new_tokens: longest answer; a refusal shows in its first words.

    Returns:
        ``groups``: the share refused (unsafe prompts) or answered (others) of each, with its interval;
        ``categories``: the same, pooled; ``perplexity``; ``incoherent``: the share of all answers; ``versions``.

    Raises:
        FileNotFoundError, ValueError: no model or no data there.
    """
    asked = prompt_groups(data, split, limit)
    learner, tokenizer = load_model(model)
    report = driftcheck(learner, tokenizer, asked, batch_size=64, max_new_tokens=max_new_tokens, progress=True)
    groups: dict[str, list[Any]] = {}
    for row in report.rows:
        group = row.id.rsplit("/", 1)[0]
        groups.setdefault(group, []).append(row)
        pooled = {"unsafe": f"unsafe, {group.split()[0]}", "borderline": "borderline"}.get(row.category, "ordinary")
        groups.setdefault(f"all {pooled}", []).append(row)
        if group.startswith("contrast, held out"):
            groups.setdefault("all contrast, held out", []).append(row)
    shares = {
        name: _share([row.verdict for row in found], REFUSAL if found[0].category == "unsafe" else COMPLIANCE)
        for name, found in groups.items()
    }
    texts = rows.paragraphs(data, "test" if split == "test" else "train")[:paragraphs]
    read = {"model": perplexity(learner, tokenizer, texts)}
    if original is not None:
        read["original"] = perplexity(*load_model(original), texts)
        read["ratio"] = read["model"] / read["original"]
    return {
        "split": split,
        "settings": {"limit": limit, "paragraphs": len(texts), "max_new_tokens": max_new_tokens, "judge": "rules"},
        "groups": {name: share for name, share in shares.items() if not name.startswith("all ")},
        "pooled": {name.removeprefix("all "): share for name, share in shares.items() if name.startswith("all ")},
        "perplexity": read,
        "incoherent": sum(row.verdict == INCOHERENT for row in report.rows) / len(report.rows),
        "versions": versions(),
    }


def table(card: dict[str, Any]) -> str:
    """The shares of a card as a table of Markdown."""
    lines = ["| prompts | n | measure | share | 95 % interval |", "| --- | ---: | --- | ---: | --- |"]
    for name, share in {**card["groups"], **{f"**{name}**": s for name, s in card["pooled"].items()}}.items():
        value, low, high = (f"{100 * share[key]:.0f} %" for key in ("value", "low", "high"))
        lines.append(f"| {name} | {share['n']} | {share['measure']} | {value} | {low} – {high} |")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of :func:`measure`."""
    parser.description = "what a model refuses and answers"
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--data", type=Path, required=True, help="folder of the prompt sets")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--original", type=Path, default=None, help="folder of the model before, for its perplexity")
    parser.add_argument("--split", choices=["val", "test"], default="test", help="val chooses settings (default: test)")
    parser.add_argument("--limit", type=int, default=80, help="prompts of each group (default: 80)")
    parser.add_argument("--paragraphs", type=int, default=200, help="of WikiText-2, for perplexity (default: 200)")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer (default: 32)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    named = {name: getattr(args, name) for name in ("original", "split", "limit", "paragraphs", "max_new_tokens")}
    card = measure(args.model, args.data, **named)
    write_text(args.out, json.dumps(card, indent=1) + "\n")
    print(table(card))
    print(f"perplexity {card['perplexity']}; incoherent {100 * card['incoherent']:.1f} %\nwrote {args.out}")
