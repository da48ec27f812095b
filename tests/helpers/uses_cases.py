"""A small classifier, its examples, and every structure's Fisher as a dense matrix, one example at a time by autograd."""

import torch

import fishergeo as fg

STRUCTURES = ("diagonal", "kfac", "ekfac", "exact")
LAYERS = ("0+bias", "2")


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def psd(size, seed=0, floor=0.1):
    factor = random(size, size, seed=seed)
    return factor @ factor.T + floor * torch.eye(size, dtype=torch.float64)


def classifier(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()


def examples(count=6, seed=0):
    x = random(count, 3, seed=seed)
    return x, torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(seed + 1))


def loss(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def batches(data, size=4):
    return [tuple(part[i : i + size] for part in data) for i in range(0, len(data[0]), size)]


def estimated(model, data, structure, **options):
    return fg.estimate_fisher(model, batches(data), structure, loss=loss, layers=list(LAYERS), **options)


def weights(model):
    """(p, q) by layer, written out for this very model."""
    first, second = model[0], model[2]
    return {"0+bias": torch.cat([first.weight, first.bias[:, None]], 1).detach(), "2": second.weight.detach().clone()}


def gradients(model, data, scalar=None):
    """Layer -> (N, p, q) by autograd, example by example, of the loss or of ``scalar(outputs, label)``."""
    found = {name: [] for name in LAYERS}
    for x, y in zip(*data, strict=True):
        out = model(x[None])
        value = torch.nn.functional.cross_entropy(out, y[None]) if scalar is None else scalar(out[0], y)
        w, b, v = torch.autograd.grad(value, [model[0].weight, model[0].bias, model[2].weight])
        found["0+bias"].append(torch.cat([w, b[:, None]], 1))
        found["2"].append(v)
    return {name: torch.stack(each) for name, each in found.items()}


def factors(model, data):
    """Layer -> (S, A) of KFAC, from inputs and output gradients written out by hand."""
    x, y = data
    hidden = torch.tanh(x @ model[0].weight.T + model[0].bias).detach()
    out = hidden @ model[2].weight.T + model[2].bias
    error = (torch.softmax(out, 1) - torch.nn.functional.one_hot(y, 3)).detach()
    inner = (error @ model[2].weight.detach()) * (1 - hidden.square())
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    n = len(x)
    return {"0+bias": (inner.T @ inner / n, ones.T @ ones / n), "2": (error.T @ error / n, hidden.T @ hidden / n)}


def dense_fisher(model, data, structure):
    """Layer -> (pq, pq), row-major."""
    found = {}
    for name, g in gradients(model, data).items():
        flat = g.flatten(1)
        s, a = factors(model, data)[name]
        if structure == "diagonal":
            found[name] = torch.diag(flat.square().mean(0))
        elif structure == "kfac":
            found[name] = torch.kron(s, a)
        elif structure == "exact":
            found[name] = flat.T @ flat / len(flat)
        else:
            basis = torch.kron(torch.linalg.eigh(s)[1], torch.linalg.eigh(a)[1])
            found[name] = basis @ torch.diag((flat @ basis).square().mean(0)) @ basis.T
    return found


@torch.no_grad()
def moved(model, size=0.1, seed=5):
    """The same model, every parameter pushed off its place."""
    for place, parameter in enumerate(model.parameters()):
        parameter += size * random(*parameter.shape, seed=seed + place)
    return model
