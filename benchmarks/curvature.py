"""What curvature costs: every estimator against a plain forward and backward with weight gradients.

    OMP_NUM_THREADS=1 python benchmarks/curvature.py --out benchmarks/results/curvature.json

A random LLaMA of hidden 256, ff 688, 4 layers, vocabulary 1024; N examples of 64 tokens in batches of 8; its 28 decoder
Linears; one thread. Every row runs interleaved with its baseline in this process: plain, row, plain, row, ...; the
figure is the median of the quotients of neighbours, in processor time of this process, so that a machine shared with
others changes it little. Beside it stands
the number of multiplications and additions that the row needs, over the baseline's, from the shapes alone: the Linears,
the output head and the attention products; no norms, softmax or eigensolver.

To add a row (a peer, say), write a function that takes a Bench and returns a Row, and name it in ROWS.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fishergeo as fg
from alignguard.files import write_text
from alignguard.training import versions

HIDDEN, FF, LAYERS, VOCABULARY, HEADS = 256, 688, 4, 1024, 4


@dataclass
class Row:
    """One line of the table.

    Attributes:
        work: what is computed.
        run: does it once.
        at_most: the target for the ratio.
        flops: of one run, from the shapes; None if not counted.
        baseline: what the ratio is to; the plain pass if None.
        per: what the ratio is divided by, such as the columns of a block.
        baseline_flops: of the baseline, where it is not the plain pass.
    """

    work: str
    run: Callable[[], Any]
    at_most: float | None = None
    flops: float | None = None
    baseline: Callable[[], Any] | None = None
    per: int = 1
    baseline_flops: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)


class Bench:
    """The model, the data, the baseline, and what they cost."""

    def __init__(self, examples: int = 64, tokens: int = 64, batch: int = 8) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=FF, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=256,
        )  # fmt: skip
        self.model = LlamaForCausalLM(config).eval()
        self.examples, self.tokens = examples, tokens
        ids = torch.randint(0, VOCABULARY, (examples, tokens))
        self.batches = [
            {"input_ids": ids[i : i + batch], "labels": ids[i : i + batch].clone()} for i in range(0, examples, batch)
        ]
        modules = dict(self.model.named_modules())
        self.layers = [n for n, m in modules.items() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
        self.shapes = {name: (modules[name].out_features, modules[name].in_features) for name in self.layers}
        # q, k, v read one tensor, gate and up another: (readers, width)
        self.inputs = [(3, HIDDEN), (1, HIDDEN), (2, HIDDEN), (1, FF)] * LAYERS
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name.removesuffix(".weight") in self.shapes)

    def plain(self) -> None:
        """Forward and backward with the weight gradients of the 28 Linears."""
        for batch in self.batches:
            self.model(**batch, use_cache=False).loss.backward()
            self.model.zero_grad(set_to_none=True)

    @property
    def rows_of_tokens(self) -> int:
        return self.examples * self.tokens

    @property
    def linear_flops(self) -> float:
        """2Tpq over all Linears and all data."""
        return 2.0 * self.rows_of_tokens * sum(p * q for p, q in self.shapes.values())

    @property
    def without_weight_gradients(self) -> float:
        """Forward, and backward to the inputs; attention as two products of (T, T, width), twice that backward."""
        head = 2.0 * self.rows_of_tokens * HIDDEN * VOCABULARY
        attention = 4.0 * self.rows_of_tokens * self.tokens * HIDDEN * LAYERS
        return 2 * self.linear_flops + 2 * head + 3 * attention

    @property
    def plain_flops(self) -> float:
        return self.without_weight_gradients + self.linear_flops


def kfac_flops(b: Bench) -> float:
    """Half of 2T·d² for every output factor and every distinct input factor."""
    outputs = sum(p * p for p, _ in b.shapes.values())
    return b.rows_of_tokens * (outputs + sum(q * q for _, q in b.inputs))


def rotated_flops(b: Bench, examples: float) -> float:
    """EKFAC's moments: rotations of D and of every distinct A, and their product."""
    rows = examples * b.tokens
    outputs = sum(p * p for p, _ in b.shapes.values())
    return 2 * rows * (outputs + sum(q * q for _, q in b.inputs) + sum(p * q for p, q in b.shapes.values()))


def estimate(b: Bench, structure: Any, **options: Any) -> Any:
    return fg.estimate_fisher(b.model, b.batches, structure=structure, layers=b.layers, **options)


def kfac(b: Bench) -> Row:
    return Row("KFAC, all layers", lambda: estimate(b, "kfac"), 1.20, b.without_weight_gradients + kfac_flops(b))


def ekfac_one_sweep(b: Bench) -> Row:
    leading = b.examples // 8
    flops = b.without_weight_gradients + kfac_flops(b) / 8 + rotated_flops(b, b.examples - leading)
    return Row("EKFAC, all layers, one sweep", lambda: estimate(b, "ekfac", basis_examples=leading), 2.5, flops)


def ekfac_two_passes(b: Bench) -> Row:
    flops = 2 * b.without_weight_gradients + kfac_flops(b) + rotated_flops(b, b.examples)
    return Row("EKFAC, all layers, exact in two passes", lambda: estimate(b, "ekfac"), None, flops)


def _product(b: Bench, columns: int) -> tuple[Callable[[], Any], float]:
    generator = torch.Generator().manual_seed(1)
    fisher = fg.StreamingFisher(b.model, b.batches, side="both", layers=b.layers)
    blocks = {name: torch.randn(p * q, columns, generator=generator) for name, (p, q) in b.shapes.items()}
    flops = b.without_weight_gradients + b.linear_flops * (1 + 2 * columns / b.tokens)
    return lambda: fisher.multi_matmul(blocks), flops


def product_with_a_vector(b: Bench) -> Row:
    run, flops = _product(b, 1)
    return Row("empirical-Fisher product, all layers, one vector each", run, 1.40, flops)


def product_with_a_block(b: Bench) -> Row:
    run, flops = _product(b, 32)
    return Row("the same, block of 32, per column", run, 0.80, flops, per=32)


def gram_flops(b: Bench) -> float:
    """Kernels of every distinct input, their products with D, and 10/16 of the product over the side."""
    n, t = b.rows_of_tokens, b.tokens
    kernels = sum(2 * n * t * q for _, q in b.inputs)
    outputs = sum(
        2 * n * t * p + (2 * n * p * p * 10 / 16 if p >= 192 else 2 * n * p * p) for p, _ in b.shapes.values()
    )
    return kernels + outputs


def gram(b: Bench) -> Row:
    return Row(
        "exact one-sided Gram, all layers",
        lambda: estimate(b, "gram"),
        None,
        b.without_weight_gradients + gram_flops(b),
    )


def _gram_with_eigh(b: Bench, k: int | None) -> Callable[[], Any]:
    return lambda: [operator.eigh(k) for operator in estimate(b, "gram").values()]


def gram_with_top(b: Bench) -> Row:
    flops = b.without_weight_gradients + gram_flops(b)
    return Row("exact one-sided Gram, all layers, with its top 32", _gram_with_eigh(b, 32), 1.50, flops)


def gram_with_eigh(b: Bench) -> Row:
    flops = b.without_weight_gradients + gram_flops(b)
    return Row("exact one-sided Gram, all layers, with every eigenpair", _gram_with_eigh(b, None), 1.50, flops)


def sketch(b: Bench) -> Row:
    columns, n, t = 64, b.rows_of_tokens, b.tokens
    kernels = sum(2 * n * t * q for _, q in b.inputs)
    # near @ Ω, kernel @ that, nearᵀ @ that; D Dᵀ for the trace
    outputs = sum(4 * n * p * columns + 2 * n * t * columns + 2 * n * t * p for p, _ in b.shapes.values())
    run = lambda: [op.eigh(32) for op in estimate(b, "sketch", rank=columns).values()]  # noqa: E731
    return Row(
        "top 32 of every layer's Gram, one-pass sketch of 64", run, 1.10, b.without_weight_gradients + kernels + outputs
    )


def sketch_of_more(b: Bench) -> Row:
    """Factorisations, a fixed number for each fourfold of the data, weigh less where there are more data."""
    more = Bench(4 * b.examples)
    row = sketch(more)
    row.work = f"the same, of {more.examples} examples"
    row.baseline, row.baseline_flops = more.plain, more.plain_flops
    return row


def several(b: Bench) -> Row:
    return Row(
        "KFAC, sketch, diagonal and Gram in one pass", lambda: estimate(b, ["kfac", "sketch", "diagonal", "gram"])
    )


def exact_dual(_: Bench) -> Row:
    short = Bench(examples=64, tokens=16)
    name = f"model.layers.{LAYERS - 1}.mlp.down_proj"
    for parameter in short.model.parameters():
        parameter.requires_grad_(False)
    short.model.get_submodule(name).weight.requires_grad_(True)

    def run() -> Any:
        fisher = fg.estimate_fisher(short.model, short.batches, structure="exact", layers=[name])
        return fisher[name].eigh(32)

    p, q, n = HIDDEN, FF, short.examples
    layer = 2.0 * short.rows_of_tokens * p * q
    dual = 2 * layer + 2.0 * n * n * p * q + 2.0 * n * 32 * p * q
    return Row(
        "top 32 of one layer's exact Fisher (down_proj, 16 tokens)", run, 3.0, None, short.plain,
        notes={"flops beyond the pass, of the layer's weight gradient": dual / layer},
    )  # fmt: skip


ROWS: list[Callable[[Bench], Row]] = [
    kfac,
    ekfac_one_sweep,
    ekfac_two_passes,
    product_with_a_vector,
    product_with_a_block,
    gram,
    gram_with_top,
    gram_with_eigh,
    sketch,
    sketch_of_more,
    several,
    exact_dual,
]


def measure(row: Row, bench: Bench, repeats: int) -> dict[str, Any]:
    """The medians of a row's interleaved quotients, of processor time (wall-clock time beside it)."""
    baseline = row.baseline or bench.plain
    baseline()
    row.run()
    clocks = (time.process_time, time.perf_counter)
    quotients: list[list[float]] = [[], []]
    base: list[float] = []
    for _ in range(repeats):
        start = [clock() for clock in clocks]
        baseline()
        middle = [clock() for clock in clocks]
        row.run()
        end = [clock() for clock in clocks]
        base.append(middle[0] - start[0])
        for kind, (a, b, c) in zip(quotients, zip(start, middle, end, strict=True), strict=True):
            kind.append((c - b) / (b - a) / row.per)
    flops = None if row.flops is None else row.flops / (row.baseline_flops or bench.plain_flops) / row.per
    return {
        "work": row.work,
        "ratio": statistics.median(quotients[0]),
        "wall_ratio": statistics.median(quotients[1]),
        "flops_ratio": flops,
        "at_most": row.at_most,
        "ratios": quotients[0],
        "wall_ratios": quotients[1],
        "baseline_seconds": statistics.median(base),
        "repeats": repeats,
        "notes": row.notes,
    }


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--out", type=Path)
    cli.add_argument("--examples", type=int, default=64)
    cli.add_argument("--repeats", type=int, default=7)
    cli.add_argument("--peers", action="store_true", help="measure peers too, in this process; see peers.py for them")
    cli.add_argument("--only", nargs="*", help="rows whose function name contains one of these")
    args = cli.parse_args()
    torch.set_num_threads(1)
    bench = Bench(args.examples)
    rows: dict[str, Any] = {}
    others: dict[str, Any] = {}
    if args.out and args.out.exists():  # rows measured before stay, each with its own repeats and baseline
        before = json.loads(args.out.read_text(encoding="utf-8"))
        rows, others = {row["name"]: row for row in before["rows"]}, before.get("peers", {})

    def save() -> None:
        model = {"hidden": HIDDEN, "ff": FF, "layers": LAYERS, "vocabulary": VOCABULARY, "tokens": bench.tokens}
        result = {
            "command": "OMP_NUM_THREADS=1 python benchmarks/curvature.py --peers --out benchmarks/results/curvature.json",
            "versions": versions(), "threads": 1, "examples": args.examples, "model": model,
            "rows": [rows[make.__name__] for make in ROWS if make.__name__ in rows], "peers": others,
        }  # fmt: skip
        if args.out:
            write_text(args.out, json.dumps(result, indent=1) + "\n")

    for make in ROWS:
        name = make.__name__
        if args.only and not any(part in name for part in args.only):
            continue
        r = rows[name] = {"name": name, **measure(make(bench), bench, args.repeats)}
        flops = "" if r["flops_ratio"] is None else f"   flops {r['flops_ratio']:.2f}"
        goal = "" if r["at_most"] is None else f"   at most {r['at_most']:.2f}"
        print(
            f"{r['work']:60s} {r['ratio']:6.3f} (wall {r['wall_ratio']:.2f}){flops}{goal}   "
            f"base {r['baseline_seconds']:.2f} s",
            flush=True,
        )
        save()
    if args.peers:
        import peers

        others = peers.measure_all(args.examples, args.repeats)
        save()


if __name__ == "__main__":
    main()
