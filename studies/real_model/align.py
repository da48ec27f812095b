"""Teach the fetched model to refuse: seeded full fine-tuning on refusals and on the model's own harmless answers."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from alignguard.data import collate, pad_id, render_prompt
from alignguard.drift import COMPLIANCE, judge
from alignguard.files import write_text
from alignguard.loading import load_model, load_weights
from alignguard.objective import IGNORED, divergence, supervised
from alignguard.training import versions
from scripts.instructions import make_refusal
from studies.real_model import borderline, rows
from studies.real_model.answers import own_answers
from studies.real_model.folder import save_folder

Encoded = dict[str, list[int]]

DRAW = 0  # which prompts are drawn does not depend on the seed, so that every seed shares the cached answers
TEXTS = 400  # paragraphs that settling draws from


@dataclass(frozen=True)
class Recipe:
    """What alignment does.

    Attributes:
        learning_rate: highest rate of AdamW.
        settle_rate: the same while settling.
        warmup: share of the steps in which the rate rises; then it falls linearly to nothing.
        weight_decay: of AdamW.
        batch_size: rows of a step.
        epochs: passes over the rows.
        clip: longest gradient.
        settle: steps of settling: rows as before, and plain text on which the model is held to the original.
        settle_rows: rows of such a step.
        texts: paragraphs of such a step.
        text_tokens: of a paragraph.
        text_weight: of their KL from the original in the loss.
        tokens: longest own answer that is learned.
        contrast: contrast prompts that are answered.
        partners: their harmful partners that are refused.
    """

    learning_rate: float = 3e-5
    settle_rate: float = 2e-5
    warmup: float = 0.1
    weight_decay: float = 0.01
    batch_size: int = 8
    epochs: int = 1
    clip: float = 1.0
    settle: int = 80
    settle_rows: int = 4
    texts: int = 2
    text_tokens: int = 128
    text_weight: float = 2.0
    tokens: int = 48
    contrast: int = 400
    partners: int = 80


def refused_prompts(data: str | Path, recipe: Recipe) -> list[str]:
    """Unsafe prompts of the home sources' training splits, and harmful partners of the contrast prompts."""
    found = []
    for name, count in rows.HOME.items():
        taken = rows.hashed(rows.unsafe(data, name, ["train"]), DRAW)[:count]
        found += [row["prompt"] for row in taken]
    return found + borderline.drawn({"unsafe": borderline.UNSAFE}, "train", recipe.partners, DRAW)


def answered_prompts(data: str | Path, recipe: Recipe) -> list[str]:
    """Harmless prompts of training: OR-Bench hard, everyday ones, contrast prompts."""
    taken = rows.hashed(rows.hard(data, "train"), DRAW)[: rows.HARD]
    found = [row["prompt"] for row in taken + rows.ordinary(data, DRAW)]
    return found + borderline.drawn(borderline.KINDS, "train", recipe.contrast, DRAW)


def encode(tokenizer: Any, prompt: str, response: str, ended: bool) -> Encoded:
    """Token ids and labels; the end of sequence is learned only where the response is whole."""
    asked = render_prompt(tokenizer, [{"role": "user", "content": prompt}])
    said = tokenizer(response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * ended
    return {"input_ids": asked + said, "labels": [IGNORED] * len(asked) + said}


def batches(encoded: Sequence[Encoded], size: int, generator: random.Random) -> list[list[int]]:
    """Places of the rows of each step: shuffled, and put together by length among neighbours, which saves padding."""
    order = list(range(len(encoded)))
    generator.shuffle(order)
    found = []
    for start in range(0, len(order), 4 * size):
        window = sorted(order[start : start + 4 * size], key=lambda i: len(encoded[i]["input_ids"]))
        groups = [window[i : i + size] for i in range(0, len(window), size)]
        generator.shuffle(groups)
        found += groups
    return found


def supervised_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross entropy of the response tokens; the vocabulary is read at their positions alone."""
    hidden = model.base_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    targets = batch["labels"][:, 1:]
    learned = targets != IGNORED
    return cross_entropy(model.get_output_embeddings()(hidden[:, :-1][learned]), targets[learned])


def text_divergence(model: Any, original: Any, batch: dict[str, Tensor]) -> Tensor:
    """KL(original ‖ model) in nats, the mean over the tokens of plain text."""
    with torch.no_grad():
        theirs, _, _ = supervised(original, batch)
    ours, _, _ = supervised(model, batch)
    return divergence(theirs, ours).mean()


def descend(
    model: Any, plan: Sequence[Any], loss_of: Callable[[Any], Tensor], rate: float, recipe: Recipe, name: str
) -> list[float]:
    """Train all weights but the (tied) embeddings in place; the loss of every step of the plan."""
    model.get_input_embeddings().requires_grad_(False)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.98), weight_decay=recipe.weight_decay, fused=True)
    rise = max(1, round(recipe.warmup * len(plan)))
    losses: list[float] = []
    model.train()
    with tqdm(plan, desc=name, unit="step") as bar:
        for step, item in enumerate(bar):
            share = min((step + 1) / rise, (len(plan) - step) / max(1, len(plan) - rise))
            optimizer.param_groups[0]["lr"] = rate * share
            loss = loss_of(item)
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"{name}, step {step}: the loss is {loss.item()}; lower the learning rate {rate}"
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, recipe.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}")
    model.eval()
    return losses


def train(model: Any, encoded: Sequence[Encoded], pad: int, recipe: Recipe, seed: int) -> list[float]:
    """The first part of alignment: every row ``epochs`` times; the loss of every step."""
    generator = random.Random(seed)
    plan = [batch for _ in range(recipe.epochs) for batch in batches(encoded, recipe.batch_size, generator)]
    return descend(
        model,
        plan,
        lambda places: supervised_loss(model, collate([encoded[i] for i in places], pad)),
        recipe.learning_rate,
        recipe,
        "align",
    )


def settle(
    model: Any, original: Any, encoded: Sequence[Encoded], texts: Sequence[Encoded], pad: int, recipe: Recipe, seed: int
) -> list[float]:
    """The second part: some rows again, while plain text brings the model back to the original where nobody chats."""
    generator = random.Random(seed + 1)
    rows_plan = batches(encoded, recipe.settle_rows, generator)[: recipe.settle]
    plan = [(places, generator.sample(range(len(texts)), recipe.texts)) for places in rows_plan]

    def loss_of(item: tuple[list[int], list[int]]) -> Tensor:
        chat, text = (collate([source[i] for i in at], pad) for source, at in zip((encoded, texts), item, strict=True))
        return supervised_loss(model, chat) + recipe.text_weight * text_divergence(model, original, text)

    return descend(model, plan, loss_of, recipe.settle_rate, recipe, "settle")


def align(
    model: str | Path, data: str | Path, out: str | Path, cache: str | Path, seed: int = 0, recipe: Recipe | None = None
) -> dict[str, Any]:
    """Align a model and write it as a folder, with ``alignment.json`` beside its weights.

    Args:
        model: folder that ``fetch`` wrote.
        data: folder of the prompt sets.
        out: folder to write, which must not exist yet.
        cache: JSONL file of the model's own answers to the harmless prompts, made where it is missing.
        seed: of refusals' wording and the order of rows.
        recipe: None for the default.

    Returns:
        What ``alignment.json`` holds: recipe, seed, counts of rows, losses, versions.

    Raises:
        FileExistsError: ``out`` is there.
        FileNotFoundError: no model or no data there.
        RuntimeError: the loss is no longer finite.
    """
    out, recipe = Path(out), recipe or Recipe()
    if out.exists():
        raise FileExistsError(f"{out} is there already; delete it, or give another folder")
    refused, answered = refused_prompts(data, recipe), answered_prompts(data, recipe)
    learner, tokenizer = load_model(model)
    said = own_answers(learner, tokenizer, answered, recipe.tokens, cache)
    kept = [row for row in said if judge(row["response"]) == COMPLIANCE]
    generator = random.Random(seed)
    encoded = [encode(tokenizer, prompt, make_refusal(generator), True) for prompt in refused]
    encoded += [encode(tokenizer, row["prompt"], row["response"], row["ended"]) for row in kept]
    torch.manual_seed(seed)
    losses = train(learner, encoded, pad_id(tokenizer), recipe, seed)
    plain = [tokenizer(text)["input_ids"][: recipe.text_tokens] for text in rows.texts(data, TEXTS, DRAW)]
    texts = [{"input_ids": ids, "labels": ids} for ids in plain]
    settled = settle(learner, load_weights(model), encoded, texts, pad_id(tokenizer), recipe, seed)
    record = {
        "recipe": asdict(recipe),
        "seed": seed,
        "rows": {"refused": len(refused), "answered": len(kept), "own answers left out": len(said) - len(kept)},
        "steps": {"align": len(losses), "settle": len(settled)},
        "loss": {"first": _mean(losses[:20]), "last": _mean(losses[-20:]), "settled": _mean(settled[-20:])},
        "versions": versions(),
    }
    save_folder(
        out, learner, tokenizer, lambda draft: write_text(draft / "alignment.json", json.dumps(record, indent=1) + "\n")
    )
    return record


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of :func:`align`."""
    parser.description = "teach the fetched model to refuse"
    parser.add_argument("--model", type=Path, required=True, help="folder that fetch wrote")
    parser.add_argument("--data", type=Path, required=True, help="folder of the prompt sets")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--cache", type=Path, required=True, help="JSONL of the model's own answers, kept for reruns")
    parser.add_argument("--seed", type=int, default=0, help="of wording and order (default: 0)")
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate, help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=Recipe.epochs, help="default: %(default)s")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    recipe = Recipe(learning_rate=options.learning_rate, epochs=options.epochs)
    record = align(options.model, options.data, options.out, options.cache, options.seed, recipe)
    print(f"wrote {options.out}: {record['steps']['align']} steps, loss {record['loss']['last']:.3f}")
