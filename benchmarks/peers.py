"""What peers take for KFAC, EKFAC, an empirical-Fisher product and a layer's leading eigenpairs.

    pip install --no-deps curvlinops-for-pytorch backpack-for-pytorch einops einconv linear_operator jaxtyping
    pip install --no-deps git+https://github.com/tfjgeorge/nngeometry@c04b984
    python benchmarks/curvature.py --peers --out benchmarks/results/curvature.json

One process measures these and our own rows.

The model is a random LLaMA (hidden 256, ff 688, 4 layers, vocabulary 1024) on sequences of 64 tokens, 8 a batch, and
its 28 decoder Linears; one thread. Every figure is a ratio to one plain forward and backward with the weight gradients
of those layers over the same batches, in the same process, interleaved with the work; medians. Times are CPU seconds
of this process, so that other work on the machine counts less; ratios of wall-clock seconds stand beside them.
nngeometry is its development version: release 0.4 fails on the three-dimensional inputs of a language model's Linears.
"""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

SEQUENCE, BATCH = 64, 8
Work = Callable[[], Any]


def build(
    seed: int = 0, examples: int = 64, sequence: int = SEQUENCE
) -> tuple[nn.Module, list[dict[str, Tensor]], list[str]]:
    """(model, batches, layer names); only the layers' weights ask for a gradient."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2 * SEQUENCE,
        attn_implementation="eager",  # forward-mode differentiation, which curvlinops needs, knows no fused attention
    )
    model = LlamaForCausalLM(config).eval()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in names:
        model.get_submodule(name).weight.requires_grad_(True)
    ids = torch.randint(0, 1024, (examples, sequence))
    return model, [{"input_ids": part, "labels": part} for part in ids.split(BATCH)], names


def plain(model: nn.Module, batches: list[dict[str, Tensor]], names: list[str]) -> Work:
    """One forward and backward over everything, with weight gradients."""
    weights = [model.get_submodule(name).weight for name in names]

    def run() -> None:
        for batch in batches:
            torch.autograd.grad(model(**batch).loss, weights)

    return run


class NextToken(nn.Module):
    """Logits that predict the next token: (n, classes, tokens), or one row a token for ``flat``."""

    def __init__(self, model: nn.Module, flat: bool = False) -> None:
        super().__init__()
        self.model = model
        self.flat = flat

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        logits = self.model(input_ids=x["input_ids"], use_cache=False).logits[:, :-1]
        return logits.flatten(0, 1) if self.flat else logits.mT


def _curvlinops_data(batches: list[dict[str, Tensor]], flat: bool = False) -> list[tuple[dict[str, Tensor], Tensor]]:
    targets = [batch["labels"][:, 1:] for batch in batches]
    return [({"input_ids": b["input_ids"]}, y.flatten() if flat else y) for b, y in zip(batches, targets, strict=True)]


def _curvlinops(kind: str, model: nn.Module, batches: list[dict[str, Tensor]], names: list[str], **options: Any) -> Any:
    import curvlinops

    flat = kind == "EKFACLinearOperator"  # it takes outputs of two dimensions only
    return getattr(curvlinops, kind)(
        NextToken(model, flat),
        nn.CrossEntropyLoss(reduction="sum"),
        [model.get_submodule(name).weight for name in names],
        _curvlinops_data(batches, flat),
        check_deterministic=False,
        batch_size_fn=lambda x: len(x["input_ids"]),
        num_data=sum(len(batch["input_ids"]) for batch in batches),
        **options,
    )


def curvlinops_kfac(model: nn.Module, batches: list[dict[str, Tensor]], names: list[str]) -> Work:
    """Factors of the empirical Fisher, "expand"."""

    def run() -> Any:
        terms = batches[0]["labels"][0, 1:].numel()
        operator = _curvlinops(
            "KFACLinearOperator", model, batches, names, fisher_type="empirical", num_per_example_loss_terms=terms
        )
        operator.compute_kronecker_factors()
        return operator

    return run


def curvlinops_ekfac(model: nn.Module, batches: list[dict[str, Tensor]], names: list[str]) -> Work:
    """Factors, their eigenbases, and second moments in them."""

    def run() -> Any:
        terms = batches[0]["labels"][0, 1:].numel()
        operator = _curvlinops(
            "EKFACLinearOperator", model, batches, names, fisher_type="empirical", num_per_example_loss_terms=terms
        )
        operator.compute_kronecker_factors()
        operator.compute_eigenvalue_correction()
        return operator

    return run


def curvlinops_ef_product(model: nn.Module, batches: list[dict[str, Tensor]], names: list[str]) -> Work:
    """One vector; a datum is a token."""
    operator = _curvlinops("EFLinearOperator", model, batches, names)
    vector = [torch.randn_like(model.get_submodule(name).weight) for name in names]
    return lambda: operator @ vector


def _nngeometry(model: nn.Module, batches: list[dict[str, Tensor]], names: list[str]) -> tuple[Any, Any, Any]:
    """(layers, generator, loader): the empirical Fisher through a function of its own, a datum is a sequence."""
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection

    layers = LayerCollection()
    for name in names:
        layers.add_layer_from_model(model, model.get_submodule(name))
    ids = torch.cat([batch["input_ids"] for batch in batches])
    embedded = model.get_input_embeddings()(ids).detach()  # type: ignore[operator]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(embedded, ids), batch_size=BATCH)

    def losses(inputs: Tensor, labels: Tensor) -> Tensor:
        logits = model(inputs_embeds=inputs, use_cache=False).logits[:, :-1]
        per_token = nn.functional.cross_entropy(logits.mT, labels[:, 1:], reduction="none")
        return per_token.mean(1, keepdim=True)

    generator = TorchHooksJacobianBackend(model=model, function=losses)
    return layers, generator, loader


def nngeometry_kfac(model: nn.Module, batches: list[dict[str, Tensor]], names: list[str]) -> Work:
    """Factors of the empirical Fisher."""
    from nngeometry.object import PMatKFAC

    layers, generator, loader = _nngeometry(model, batches, names)
    return lambda: PMatKFAC(layers, generator, examples=loader)


def nngeometry_ekfac(model: nn.Module, batches: list[dict[str, Tensor]], names: list[str]) -> Work:
    """Factors, their eigenbases, and second moments in them."""
    from nngeometry.object import PMatEKFAC

    layers, generator, loader = _nngeometry(model, batches, names)

    def run() -> Any:
        matrix = PMatEKFAC(layers, generator, examples=loader)
        matrix.update_diag(loader)
        return matrix

    return run


def nngeometry_ef_product(model: nn.Module, batches: list[dict[str, Tensor]], names: list[str]) -> Work:
    """One vector; a datum is a sequence."""
    from nngeometry.object import PMatImplicit
    from nngeometry.object.vector import random_pvector

    layers, generator, loader = _nngeometry(model, batches, names)
    matrix = PMatImplicit(layers, generator, examples=loader)
    vector = random_pvector(layers, device="cpu", dtype=torch.float32)
    return lambda: matrix.mv(vector)


def scipy_top_32(model: nn.Module, batches: list[dict[str, Tensor]], names: list[str]) -> Work:
    """32 leading eigenpairs of the last layer's empirical Fisher by ARPACK on curvlinops; returns the products."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    operator = _curvlinops("EFLinearOperator", model, batches, names[-1:]).to_scipy()

    def run() -> int:
        products = 0

        def product(vector: Any) -> Any:
            nonlocal products
            products += 1
            return operator @ vector

        counted = LinearOperator(operator.shape, matvec=product, dtype=operator.dtype)
        eigsh(counted, k=32, tol=1e-3)
        return products

    return run


WORK: dict[str, Callable[[nn.Module, list[dict[str, Tensor]], list[str]], Work]] = {
    "kfac: nngeometry": nngeometry_kfac,
    "kfac: curvlinops": curvlinops_kfac,
    "ekfac: nngeometry": nngeometry_ekfac,
    "ekfac: curvlinops": curvlinops_ekfac,
    "empirical-Fisher product: nngeometry": nngeometry_ef_product,
    "empirical-Fisher product: curvlinops": curvlinops_ef_product,
}


def interleaved(base: Work, work: Work, repeats: int) -> dict[str, Any]:
    """Ratios of ``work`` to ``base``, each pair run side by side, after one warm-up of the base."""
    base()
    cpu, wall, result = [], [], None
    for _ in range(repeats):
        marks = [(time.process_time(), time.perf_counter())]
        base()
        marks.append((time.process_time(), time.perf_counter()))
        result = work()
        marks.append((time.process_time(), time.perf_counter()))
        (c0, w0), (c1, w1), (c2, w2) = marks
        cpu.append((c2 - c1) / (c1 - c0))
        wall.append((w2 - w1) / (w1 - w0))
    row = {"ratio": statistics.median(cpu), "ratios": cpu, "wall_ratio": statistics.median(wall)}
    return {**row, "products": result} if isinstance(result, int) else row


def environment() -> dict[str, Any]:
    names = ("torch", "transformers", "scipy", "numpy", "curvlinops-for-pytorch", "nngeometry")
    return {"python": platform.python_version(), "processor": platform.processor() or platform.machine()} | {
        name: importlib.metadata.version(name) for name in names
    }


def measure_all(examples: int, repeats: int, eigsh_tokens: int = 16) -> dict[str, Any]:
    """Every row; printed as it comes."""
    model, batches, names = build(examples=examples)
    base = plain(model, batches, names)
    rows = {}
    for name, prepare in WORK.items():
        rows[name] = interleaved(base, prepare(model, batches, names), repeats)
        print(f"{name:<60} {rows[name]['ratio']:8.2f}", flush=True)
    if eigsh_tokens:
        name = "top 32: one layer's empirical Fisher: SciPy eigsh on curvlinops"
        model, batches, names = build(examples=examples, sequence=eigsh_tokens)
        # One repeat: it takes hundreds of passes. The base is the gradient of that layer alone.
        rows[name] = interleaved(plain(model, batches, names[-1:]), scipy_top_32(model, batches, names), 1)
        print(f"{name:<60} {rows[name]['ratio']:8.2f}", flush=True)
    return {"environment": environment(), "examples": examples, "rows": rows}
