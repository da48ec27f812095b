"""A language model of four small layers, made for loops over single examples, and its data."""

import itertools

import torch

VOCABULARY = 5
LAYERS = {"first": (7, 6), "twin": (7, 6), "second": (4, 7)}


class SmallLM(torch.nn.Module):
    """Two layers read the embedding, a causal mean mixes tokens; blind to padding on either side."""

    def __init__(self, seed=0, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = torch.nn.Embedding(VOCABULARY, 6)
        self.first, self.twin = torch.nn.Linear(6, 7), torch.nn.Linear(6, 7, bias=False)
        self.second, self.head = torch.nn.Linear(7, 4), torch.nn.Linear(4, VOCABULARY)
        self.to(dtype)

    def forward(self, input_ids, attention_mask=None):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = mask[..., None].to(self.head.weight.dtype)
        x = self.embed(input_ids)
        hidden = torch.tanh(self.first(x)) * self.twin(x) * mask
        mixed = hidden.cumsum(1) / mask.cumsum(1).clamp_min(1)
        return {"logits": self.head(torch.tanh(self.second(mixed)))}


def make_examples(lengths, seed=0):
    """(ids, labels): a prompt of at least one token, then at least one supervised token."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in lengths:
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator)
        labels = ids.clone()
        labels[: int(torch.randint(1, length, (1,), generator=generator))] = -100
        examples.append((ids, labels))
    return examples


def collate(examples, side="right", **extra):
    width = max(len(ids) for ids, _ in examples)
    batch = {
        "input_ids": torch.zeros(len(examples), width, dtype=torch.long),
        "attention_mask": torch.zeros(len(examples), width, dtype=torch.long),
        "labels": torch.full((len(examples), width), -100),
    }
    for row, (ids, labels) in enumerate(examples):
        place = slice(0, len(ids)) if side == "right" else slice(width - len(ids), width)
        batch["input_ids"][row, place] = ids
        batch["attention_mask"][row, place] = 1
        batch["labels"][row, place] = labels
    return batch | extra


def split(examples, cuts, side="right"):
    edges = [0, *sorted(cuts), len(examples)]
    return [collate(examples[a:b], side) for a, b in itertools.pairwise(edges)]


def assert_close(actual, expected, tolerance=1e-10):
    assert (actual - expected).norm() <= tolerance * expected.norm()


def atoms(model, examples, kind, names, seed=0):
    """The oracle: for every example the list of (weight, {layer: (G, D, A)}) whose weighted squares are its Fisher.

    Objectives are written out token by token, G is read from W.grad, D and A from plain hooks.
    """
    taken, result = {}, []
    generator = torch.Generator().manual_seed(seed)
    handles = []
    for name in names:

        def hook(module, inputs, output, name=name):
            taken[name] = [None, inputs[0].detach()[0]]
            output.register_hook(lambda g: taken[name].__setitem__(0, g[0]))

        handles.append(model.get_submodule(name).register_forward_hook(hook))

    def one(ids, objective):
        model.zero_grad(set_to_none=True)
        objective(model(input_ids=ids[None])["logits"][0]).backward()
        return {name: (model.get_submodule(name).weight.grad.clone(), *taken[name]) for name in names}

    for ids, labels in examples:
        places = [t for t in range(len(ids) - 1) if int(labels[t + 1]) != -100]
        count = len(places)

        def log_p(row, label):
            return row[label] - torch.log(torch.exp(row).sum())

        if kind in ("type2", "ggn"):
            p = model(input_ids=ids[None])["logits"][0].detach().softmax(1)
            power = 1 if kind == "type2" else 0.5
            result.append(
                [
                    (float(p[t, c]), one(ids, lambda z, t=t, c=c, m=count**power: -log_p(z[t], c) / m))
                    for t in places
                    for c in range(VOCABULARY)
                ]
            )
            continue
        targets = [int(labels[t + 1]) for t in places]
        if kind == "mc":
            p = model(input_ids=ids[None])["logits"][0].detach().softmax(1)
            draws = torch.rand(count, generator=generator, dtype=torch.float64)
            targets = [int((p[t].cumsum(0) <= u * p[t].sum()).sum()) for t, u in zip(places, draws, strict=True)]

        def objective(z, places=places, targets=targets):
            terms = []
            for t, y in zip(places, targets, strict=True):
                if kind == "margin":
                    others = torch.cat([z[t, :y], z[t, y + 1 :]])
                    terms.append(torch.log(torch.exp(others).sum()) - z[t, y])
                else:
                    terms.append(-log_p(z[t], y))
            return sum(terms) / len(terms)

        result.append([(1.0, one(ids, objective))])
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)
    return result
