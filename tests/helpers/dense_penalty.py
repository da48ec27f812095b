"""The guard's penalty written out on dense matrices, and the comparison with it."""

import torch
from architectures import merged_weights, move, weight_of

import fishergeo as fg
from alignguard.guard import GuardConfig

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


CONFIG = GuardConfig.curvature(
    structure="gram",
    lambda_alignment=0.7,
    lambda_task=0.3,
    lambda_collision=0.2,
    alpha=0.4,
    energy=0.6,
    whole_update=False,
)


ROWS = {
    "t5": [{"input_ids": [5, 6, 7, 8], "labels": [9, 10]}, {"input_ids": [11, 12], "labels": [13, 14, 2]}],
    "classifier": [{"input_ids": [5, 6, 7], "labels": 1}, {"input_ids": [8, 9], "labels": 2}],
    None: [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, {"input_ids": [9, 10], "labels": [-100, 10]}],
}


def random_fisher(guard, dtype, structure="gram"):
    generator = torch.Generator().manual_seed(2)

    def psd(size):
        factor = torch.randn(size, size, generator=generator, dtype=torch.float64)
        return (factor @ factor.mT / size).to(dtype)

    def operator(p, q):
        return fg.DenseOperator(psd(p)) if structure == "gram" else fg.KroneckerOperator(psd(p), psd(q))

    return {m.layer: operator(*m.shape) for m in guard.updates.matrices.values()}


def projector(outputs, energy, projection):
    """On the fewest leading eigenvectors of a matrix (p, p) that hold a share of its trace, hard or soft, (p, p)."""
    values, vectors = (found.flip(-1) for found in torch.linalg.eigh(outputs.double()))
    values = values.clamp_min(0)
    m = int((values.cumsum(0) < energy * values.sum()).sum()) + 1
    weights = values / (values + values[m - 1]) if projection == "soft" else (torch.arange(len(values)) < m).double()
    return ((vectors * weights) @ vectors.mT).to(outputs.dtype)


def dense_penalty(guard, deltas, config):
    """The paper's terms on matrices, written out."""
    total = 0.0
    for name, delta in deltas.items():
        operator = guard.layers[name].operator
        kronecker = isinstance(operator, fg.KroneckerOperator)
        outputs = operator.output_factor if kronecker else operator.matrix
        part = projector(outputs, config.energy, config.projection) @ delta
        rest = delta - part
        charged = outputs @ part @ operator.input_factor if kronecker else outputs @ part
        total = total + config.lambda_alignment * (part * charged).sum()
        a, t = part.mT @ part, rest.mT @ rest
        eta = 1 + config.beta * torch.sigmoid(delta.abs() - config.tau)
        collision = config.alpha * (eta * (part * rest).abs()).sum() + (1 - config.alpha) * (a * t).sum() / (
            a.norm() * t.norm()
        )
        total = total + config.lambda_task * rest.square().sum() + config.lambda_collision * collision
    return total


def check(model, guard, start, config, dtype, estimate=False):
    """Guard's value and gradient against the dense ones, after some movement."""
    move(model)
    if estimate:
        guard.refresh()
    else:
        guard.use_fisher(random_fisher(guard, dtype, config.structure))
    compare(model, guard, start, config, dtype)


def compare(model, guard, before, config, dtype):
    """Guard's value and gradient against the dense ones, the chain rule through peft's own ΔW."""
    now = merged_weights(model)
    deltas = {
        m.name: (weight_of(now, m.plain) - weight_of(before, m.plain)).requires_grad_(True)
        for m in guard.updates.matrices.values()
    }
    expected = dense_penalty(guard, deltas, config)
    expected.backward()
    penalty = guard.penalty()
    penalty.backward()
    tolerance = TOLERANCE[dtype]
    assert abs(float(penalty.detach()) - float(expected.detach())) <= tolerance * abs(float(expected.detach()))
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert set(ours) == {n for n, p in model.named_parameters() if p.requires_grad} - set(guard.updates.skipped)
    model.zero_grad()
    surrogate = 0.0
    for name, layer in model.named_modules():
        for adapter in model.active_adapters:
            if hasattr(layer, "get_delta_weight") and adapter in layer.lora_A:
                stored = layer.get_delta_weight(adapter)
                key = name.replace(".base_layer", "") + (f".{layer.parameter_name}" if stored.ndim == 3 else "")
                if key not in deltas and f"{key}.0" not in deltas:
                    continue  # a router
                if stored.ndim == 3:
                    gradient = torch.stack([deltas[f"{key}.{e}"].grad for e in range(len(stored))])
                else:
                    gradient = deltas[key].grad.mT if layer.fan_in_fan_out else deltas[key].grad
                surrogate = surrogate + (stored * gradient).sum()
    surrogate.backward()
    for name, p in model.named_parameters():
        if name.removesuffix(".weight") in deltas and p.grad is None and p.requires_grad:  # modules_to_save
            gradient = deltas[name.removesuffix(".weight")].grad
            p.grad = gradient.mT.contiguous() if ".c_" in name else gradient  # GPT-2's Conv1D
        if name in ours:
            assert (ours[name] - p.grad).norm() <= 10 * tolerance * p.grad.norm(), name
