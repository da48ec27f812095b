"""The uses of a Fisher beside their peers: the same numbers where definitions match, and the time and memory of each.

    pip install --no-deps kronfluence laplace-torch curvlinops-for-pytorch backpack-for-pytorch asdfghjkl torchmetrics traker \
        lightning-utilities linear_operator jaxtyping wadler-lindig opt_einsum einops einconv unfoldNd
    python benchmarks/uses.py --out benchmarks/results/uses.json

Influence: EKFAC and pairwise scores of the embedded model's decoder matrices, beside kronfluence. Laplace: KFAC of a small
classifier, its evidence and its predictive covariance, beside laplace-torch. Merging: two copies of the embedded model,
each trained on a task of its own, merged by every rule, and with ``--only 'merging elsewhere' --model FOLDER`` the same of
another model; MaTS' formula is written out, TIES is peft's. Pruning: two of four
weights of every matrix of the last block removed, by magnitude, by OBD and by OBS. Works that are timed beside
a peer's run in a process each, one thread, in float32, once; seconds are processor time, megabytes the growth of the
process's peak. A peer that cannot be imported is named in the result. Parts that ``--only`` leaves out stay in the file as they were.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import importlib.metadata
import io
import itertools
import json
import logging
import multiprocessing
import platform
import resource
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import scipy.stats
import torch
from torch import Tensor, nn

import fishergeo as fg
from alignguard.data import collate, encode_example, read_jsonl
from alignguard.embedded import data_path, model_path
from alignguard.files import write_text
from alignguard.loading import load_model
from alignguard.training import versions

PEERS = ("kronfluence", "laplace-torch", "curvlinops-for-pytorch", "peft", "traker")


def measured(work: Callable[[], Any]) -> dict[str, Any]:
    """What a work gives, its processor seconds and the megabytes it adds to the peak, in a process of its own."""
    here, there = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        try:
            value = work()
        except Exception as error:
            there.send({"error": f"{type(error).__name__}: {error}"[:400]})
            return
        seconds = time.process_time() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        written = io.BytesIO()
        torch.save(value, written)  # tensors go by value: shared memory would end with this process
        there.send({"value": written.getvalue(), "seconds": seconds, "megabytes": (peak - before) / 1024})

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    while not here.poll(0.2):
        if not process.is_alive() and not here.poll(0.2):
            raise RuntimeError("the process of a work ended without a result")
    found = here.recv()
    process.join()
    if "value" in found:
        found["value"] = torch.load(io.BytesIO(found["value"]))
    return found


def subject(path: Path | None = None) -> tuple[Any, Any, list[str]]:
    """A model, the embedded one by default, its tokenizer and the names of its linear layers but for the head."""
    model, tokenizer = load_model(path or model_path())
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    return model.float().eval(), tokenizer, layers


def rows_of(tokenizer: Any, name: str, wanted: Callable[[str], bool], count: int) -> list[Any]:
    rows = [r for r in read_jsonl(data_path(name)) if wanted(r["source"])]
    return [encode_example(tokenizer, r["prompt"], r["response"]) for r in rows[:count]]


def batched(rows: list[Any], size: int) -> list[dict[str, Tensor]]:
    return [collate(rows[i : i + size], 0) for i in range(0, len(rows), size)]


def summed_loss(model: Any, batch: Any) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


# Influence


def kronfluence_scores(model: Any, layers: list[str], trained: list[Any], asked: list[Any], size: int) -> Tensor:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Language(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Tensor:
            return summed_loss(model, batch)

        def compute_measurement(self, batch: Any, model: Any) -> Tensor:
            return summed_loss(model, batch)

        def get_influence_tracked_modules(self) -> list[str]:
            return layers

        def get_attention_mask(self, batch: Any) -> Tensor:
            return batch["attention_mask"]

    task = Language()
    width = max(len(row["input_ids"]) for row in trained + asked)
    whole = [_padded(rows, width) for rows in (trained, asked)]
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("uses", prepare_model(model, task), task, cpu=True, disable_tqdm=True, output_dir=folder)
        analyzer.fit_all_factors(
            "f", whole[0], size, factor_args=FactorArguments("ekfac", use_empirical_fisher=True, eigendecomposition_dtype=torch.float32)
        )  # fmt: skip
        analyzer.compute_pairwise_scores(
            "s", "f", whole[1], whole[0], len(asked), size, score_args=ScoreArguments(damping_factor=None)
        )
        return analyzer.load_pairwise_scores("s")["all_modules"]


def _padded(rows: list[Any], width: int) -> list[dict[str, Tensor]]:
    """Rows of one length, as a data set."""
    batch = collate([*rows, {k: [0] * width for k in rows[0]}], 0)
    return [{k: v[i] for k, v in batch.items()} for i in range(len(rows))]


def own_scores(model: Any, layers: list[str], trained: list[Any], asked: list[Any], size: int) -> Tensor:
    width = max(len(row["input_ids"]) for row in trained + asked)
    data, queries = (_padded(rows, width) for rows in (trained, asked))

    def stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {k: torch.stack([row[k] for row in rows]) for k in rows[0]}

    batches = [stack(data[i : i + size]) for i in range(0, len(data), size)]
    fisher = fg.estimate_fisher(model, batches, "ekfac", layers=layers, reduction="sum")
    return fg.influence(model, fisher, [stack(queries)], batches, reduction="sum").values


def influence(count: int, queries: int, size: int = 16) -> dict[str, Any]:
    model, tokenizer, layers = subject()
    trained, asked = (
        rows_of(tokenizer, n, lambda s: True, k) for n, k in (("task_train", count), ("task_test", queries))
    )
    ours = measured(lambda: own_scores(model, layers, trained, asked, size))
    theirs = measured(lambda: kronfluence_scores(model, layers, trained, asked, size))
    found: dict[str, Any] = {"examples": count, "queries": queries, "layers": len(layers), "batch": size}
    for name, one in (("fishergeo", ours), ("kronfluence", theirs)):
        found[name] = {key: value for key, value in one.items() if key != "value"}
    if "value" in ours and "value" in theirs:
        a, b = ours["value"].double(), theirs["value"].double()
        ranks = [scipy.stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
        found["agreement"] = {
            "least rank correlation of a query": float(min(ranks)),
            "relative difference": float((a - b).norm() / b.norm()),
        }
    return found


def datamodels(count: int = 120, models: int = 40, seed: int = 0) -> dict[str, Any]:
    """Rank correlation of predicted and actual losses of models trained on halves of the data (linear datamodelling score)."""
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(count + 30, 6, generator=generator), torch.randn(6, 3, generator=generator)
    y = (x @ w + torch.randn(count + 30, 3, generator=generator)).argmax(1)

    def trained(places: Tensor) -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
        optimizer = torch.optim.Adam(net.parameters(), lr=0.02, weight_decay=1e-3)
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[places]), y[places]).backward()
            optimizer.step()
        return net

    def losses(net: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(net(batch[0]), batch[1], reduction="none")

    halves = [torch.randperm(count, generator=generator)[: count // 2] for _ in range(models)]
    actual = torch.stack([losses(trained(half), (x[count:], y[count:])).detach() for half in halves])
    whole = trained(torch.arange(count))
    data, queries = [(x[:count], y[:count])], [(x[count:], y[count:])]
    found = {}
    names = ["0+bias", "2+bias"]
    for structure, damping in (("ekfac", None), ("kfac", None), ("diagonal", None), ("no curvature", 1e6)):
        fisher = fg.estimate_fisher(whole, data, "diagonal" if damping else structure, loss=losses, layers=names)
        scores = fg.influence(whole, fisher, queries, data, loss=losses, damping=damping).values
        predicted = torch.stack([-scores[:, half].sum(1) for half in halves])
        each = [scipy.stats.spearmanr(a, b).statistic for a, b in zip(actual.T, predicted.T, strict=True)]
        found[structure] = float(torch.tensor(each).mean())
    with contextlib.suppress(ImportError):
        for size, level in itertools.product((16, 64), (0.0, 1e-2, 1.0)):
            scores = trak_scores(whole, data[0], queries[0], size, level)
            predicted = torch.stack([-scores[:, half].sum(1) for half in halves])
            each = [scipy.stats.spearmanr(a, b).statistic for a, b in zip(actual.T, predicted.T, strict=True)]
            found[f"TRAK (traker), {size} dimensions, λ {level:g}"] = float(torch.tensor(each).mean())
    return {"examples": count, "models": models, "linear datamodelling score": found}


def trak_scores(net: nn.Module, data: Any, queries: Any, dimensions: int, damping: float) -> Tensor:
    """TRAK's scores (queries, examples) of one model, its gradients projected to some dimensions."""
    from trak import TRAKer
    from trak.projectors import BasicProjector, ProjectionType

    size = sum(p.numel() for p in net.parameters())
    with tempfile.TemporaryDirectory() as folder:

        def made() -> Any:  # for each phase anew: it frees its projection at the end of one
            projector = BasicProjector(size, dimensions, 0, ProjectionType.rademacher, torch.device("cpu"))
            return TRAKer(
                net, "image_classification", len(data[0]), folder, device="cpu", projector=projector, proj_dim=dimensions,
                use_half_precision=False, lambda_reg=damping, logging_level=logging.ERROR,
            )  # fmt: skip

        state = {name: value.detach().clone() for name, value in net.state_dict().items()}
        traker = made()
        traker.load_checkpoint(state, model_id=0)
        traker.featurize(data, num_samples=len(data[0]))
        traker.finalize_features()
        traker = made()
        traker.start_scoring_checkpoint("queries", state, model_id=0, num_targets=len(queries[0]))
        traker.score(queries, num_samples=len(queries[0]))
        return torch.from_numpy(traker.finalize_scores("queries")).float().T


# Laplace


class Named(nn.Module):
    """A classifier of vectors that answers as Hugging Face's do."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.net(x)}


def laplace(count: int, width: int = 64) -> dict[str, Any]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 5))
    x, tau = torch.randn(count, 20), 3.0
    y = (x @ torch.randn(20, 5)).argmax(1)
    asked = torch.randn(50, 20)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        fit = -float(nn.functional.cross_entropy(net(x), y, reduction="sum"))

    def ours() -> tuple[float, Tensor]:
        model = Named(net)
        batches = [{"x": x[i : i + 100], "labels": y[i : i + 100]} for i in range(0, count, 100)]
        layers = [f"net.{i}{part}" for i in (0, 2, 4) for part in ("", ".bias")]
        fisher = fg.estimate_fisher(model, batches, "kfac", "ggn", layers=layers)
        posterior = fg.Laplace(model, fisher, tau)
        covariance = posterior.predictive_covariance([asked], lambda model, x: model.net(x))
        return posterior.log_marginal_likelihood(fit), covariance

    def theirs() -> tuple[float, Tensor]:
        from laplace import Laplace
        from laplace.curvature import CurvlinopsGGN
        from torch.utils.data import DataLoader, TensorDataset

        posterior = Laplace(net, "classification", "all", "kron", prior_precision=tau, backend=CurvlinopsGGN)
        posterior.fit(DataLoader(TensorDataset(x, y), batch_size=100))
        _, covariance = posterior._glm_predictive_distribution(asked)
        return float(posterior.log_marginal_likelihood()), covariance.detach()

    found: dict[str, Any] = {"examples": count, "parameters": sum(p.numel() for p in net.parameters())}
    results = {"fishergeo": measured(ours), "laplace-torch": measured(theirs)}
    for name, one in results.items():
        found[name] = {key: value for key, value in one.items() if key != "value"}
        if "value" in one:
            found[name]["evidence"] = one["value"][0]
    if all("value" in one for one in results.values()):
        a, b = (one["value"][1].double() for one in results.values())
        found["agreement"] = {
            "relative difference of covariances": float((a - b).norm() / b.norm()),
            "difference of evidences, nats": found["fishergeo"]["evidence"] - found["laplace-torch"]["evidence"],
        }
    return found


# Merging


def trained_on(model: Any, batches: list[Any], epochs: int, rate: float) -> Any:
    torch.manual_seed(0)
    twin = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=rate)
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            twin(**batch).loss.backward()
            optimizer.step()
    return twin.eval()


@torch.no_grad()
def nll(model: Any, batches: list[Any]) -> float:
    tokens = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    losses = [float(model(**batch).loss) for batch in batches]
    return sum(a * b for a, b in zip(losses, tokens, strict=True)) / sum(tokens)


def mats(operators: list[Any], weights: list[Tensor], damping: float, steps: int = 2000) -> Tensor:
    """MaTS' linear system Σ (S_k W A_k + δW) = Σ (S_k W_k A_k + δW_k) by conjugate gradients, written out in float64."""
    factors = [tuple(part.double() for part in operator.factors()) for operator in operators]

    def act(w: Tensor) -> Tensor:
        return torch.stack([s @ w @ a + damping * w for s, a in factors]).sum(0)

    x = sum(w.double() for w in weights) / len(weights)
    r = sum(s @ w.double() @ a + damping * w.double() for (s, a), w in zip(factors, weights, strict=True)) - act(x)
    p, rr, floor = r, (r * r).sum(), 1e-20 * (r * r).sum()
    for _ in range(steps):
        if rr <= floor:
            break
        ap = act(p)
        alpha = rr / (p * ap).sum()
        x, r = x + alpha * p, r - alpha * ap
        rr, before = (r * r).sum(), rr
        p = r + rr / before * p
    return x


def merging(count: int, epochs: int, path: Path | None = None) -> dict[str, Any]:
    from peft.utils.merge_utils import ties

    base, tokenizer, layers = subject(path)
    tasks = {"banking": lambda s: s.startswith("b77"), "template": lambda s: not s.startswith("b77")}
    train = {n: batched(rows_of(tokenizer, "task_train", w, count), 16) for n, w in tasks.items()}
    test = {n: batched(rows_of(tokenizer, "task_test", w, 48), 16) for n, w in tasks.items()}
    rate = 3e-4 if path is None else 3e-5  # pretrained weights bear less
    models = [trained_on(base, batches, epochs, rate) for batches in train.values()]
    damping = 1e-7
    results: dict[str, Any] = {"examples a task": count, "epochs": epochs, "rate": rate, "damping": damping}

    def report(state: dict[str, Tensor]) -> dict[str, float]:
        model = copy.deepcopy(base)
        model.load_state_dict(state)
        return {name: nll(model, batches) for name, batches in test.items()}

    states = [model.state_dict() for model in [base, *models]]
    rows = {"base": report(states[0])} | {f"trained on {n}": report(s) for n, s in zip(tasks, states[1:], strict=True)}
    rows["average"] = report({n: (states[1][n] + states[2][n]) / 2 for n in states[0]})
    scale = torch.ones(2)
    rows["TIES (peft), density 0.5"] = report(
        {n: t + ties([s[n] - t for s in states[1:]], scale, density=0.5) for n, t in states[0].items()}
    )
    fishers = [
        fg.estimate_fisher(m, b, ["diagonal", "kfac"], layers=layers, reduction="sum")
        for m, b in zip(models, train.values(), strict=True)
    ]
    kinds: dict[str, list[Any]] = {name: [each[name] for each in fishers] for name in ("diagonal", "kfac")}
    kinds["input Grams (RegMean)"] = [fg.input_grams(each) for each in kinds["kfac"]]
    for name, curvature in kinds.items():
        level = damping if "Grams" not in name else 1e-4
        start = time.process_time()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = fg.merge_weights(models, curvature, damping=level, tolerance=1e-6, max_steps=60)
        seconds = time.process_time() - start
        rows[name] = report(found.state) | {
            "seconds": seconds,
            "most steps": max(found.steps.values()),
            "largest residual": max(found.residuals.values()),
            "averaged plainly": len(found.averaged),
            "warnings": len(told),
        }
    results["negative log-likelihood a token"] = rows
    name = layers[0]
    pair = [fisher["kfac"][name] for fisher in fishers]
    ours = fg.merge_weights(models, [{name: one} for one in pair], damping=1e-4, tolerance=1e-6).weights[name]
    theirs = mats(pair, [m.get_submodule(name).weight.detach() for m in models], 1e-4)
    results["difference from the formula of MaTS"] = float((ours - theirs).norm() / theirs.norm())
    return results


# Pruning


def pruning(count: int) -> dict[str, Any]:
    model, tokenizer, layers = subject()
    # Rows of the kind that the model was trained on: the quadratic form has no linear term, so it must be near an optimum.
    rows, held = (rows_of(tokenizer, name, lambda s: True, n) for name, n in (("alignment", count), ("validation", 48)))
    train, test = batched(rows, 16), batched(held, 16)
    layers = layers[-7:]
    fisher = fg.estimate_fisher(model, train, "kfac", layers=layers, reduction="sum")
    damping = {n: 1e-2 * float(fisher[n].trace()) / fisher[n].shape[0] for n in layers}
    weights = {n: model.get_submodule(n).weight.detach() for n in layers}
    found: dict[str, Any] = {"examples": count, "dense": nll(model, test)}

    def pruned(new: dict[str, Tensor]) -> float:
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for name, weight in new.items():
                twin.get_submodule(name).weight.copy_(weight)
        return nll(twin, test)

    masks = {"magnitude": {n: fg.n_of_m_mask(w.abs()) for n, w in weights.items()}}
    for method in ("obd", "obs"):
        scores = {n: fg.saliency({n: w}, {n: fisher[n]}, method, damping[n])[n] for n, w in weights.items()}
        masks[method] = {n: fg.n_of_m_mask(one) for n, one in scores.items()}
    for name, keep in masks.items():
        found[f"2:4 by {name}"] = pruned({n: w * keep[n] for n, w in weights.items()})
    start = time.process_time()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        steps = {
            n: fg.obs_step({n: w}, {n: fisher[n]}, {n: masks["obs"][n]}, damping[n], tolerance=1e-3)
            for n, w in weights.items()
        }
    found["2:4 by obs, the others moved"] = pruned({n: one.weights[n] for n, one in steps.items()})
    found["seconds of the step"] = time.process_time() - start
    found["most steps"] = max(one.steps[n] for n, one in steps.items())
    found["warnings"] = len(told)
    return found


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--out", type=Path, required=True)
    cli.add_argument("--examples", type=int, default=96)
    cli.add_argument("--queries", type=int, default=8)
    cli.add_argument("--epochs", type=int, default=3)
    cli.add_argument("--model", type=Path, help="folder of another model, of which 'merging elsewhere' is")
    cli.add_argument("--only", nargs="*", default=["influence", "datamodels", "laplace", "merging", "pruning"])
    args = cli.parse_args()
    if "merging elsewhere" in args.only and args.model is None:
        cli.error("merging elsewhere needs --model FOLDER")
    torch.set_num_threads(1)
    parts: dict[str, Callable[[], Any]] = {
        "influence": lambda: influence(args.examples, args.queries),
        "datamodels": datamodels,
        "laplace": lambda: {"small": laplace(1000), "wide": laplace(1000, 256)},
        "merging": lambda: merging(2 * args.examples, args.epochs),
        "merging elsewhere": lambda: {"model": args.model.name} | merging(args.examples, args.epochs, args.model),
        "pruning": lambda: pruning(args.examples),
    }
    peers = {}
    for module in ("kronfluence.analyzer", "laplace", "laplace.curvature"):  # before anything is timed
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    for name in PEERS:
        try:
            peers[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            peers[name] = "absent"
    command = f"python benchmarks/uses.py --examples {args.examples} --queries {args.queries} --epochs {args.epochs}"
    result = json.loads(args.out.read_text()) if args.out.is_file() else {}
    result |= {"machine": platform.processor() or platform.machine(), "threads": 1}
    for name in args.only:
        print(name, flush=True)
        told = {"command": f"{command} --only {name}", "versions": {**versions(), **peers}}
        result[name] = told | parts[name]()
        print(json.dumps(result[name], indent=1), flush=True)
        write_text(args.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
