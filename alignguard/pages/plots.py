"""Plots of a run's history, spectra and answers, for its report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from alignguard.pages.figures import DIM, INK, MODELS, PALETTE, draw_svg


def finite(value: Any) -> bool:
    """Whether a value is a number that can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def interval(entry: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    """The ends of ``<key>_ci``, where they are two numbers."""
    ends = entry.get(f"{key}_ci")
    if isinstance(ends, Sequence) and len(ends) == 2 and all(finite(e) for e in ends):
        return float(ends[0]), float(ends[1])
    return None


def shares(
    result: Mapping[str, Any], measures: Sequence[tuple[str, str]], names: Mapping[str, str] | None = None
) -> str | None:
    """Bars of shares in percent with their intervals, a group for each measure and a bar for each model.

    Args:
        result: holds ``base``, ``plain`` and ``guarded``, each a mapping with the measures and ``<measure>_ci``.
        measures: key and title of each group.
        names: what the models are called in the plot, where not by their own names.
    """
    called = {name: (names or {}).get(name, name) for name in MODELS}
    models = [name for name in MODELS if isinstance(result.get(name), Mapping)]
    shown = [(key, title) for key, title in measures if any(finite(result[m].get(key)) for m in models)]
    if not shown:
        return None
    words = []

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        step = 0.8 / len(models)
        for group, (key, title) in enumerate(shown):
            for place, model in enumerate(models):
                value = result[model].get(key)
                if not finite(value):
                    continue
                y = group + (place - (len(models) - 1) / 2) * step
                axes.barh(
                    y, value, height=step * 0.82, color=MODELS[model], label=called[model] if group == 0 else None
                )
                ends = interval(result[model], key)
                if ends:
                    axes.plot(ends, (y, y), color=INK, linewidth=1.1, solid_capstyle="butt")
                    axes.plot(ends, (y, y), color=INK, linestyle="none", marker="|", markersize=4.5)
                right = max(value, ends[1] if ends else value)
                axes.annotate(
                    f"{value:.1f}", (right, y), (5, 0), textcoords="offset points", va="center", fontsize=9, color=INK
                )
                words.append(f"{title}, {called[model]}: {value:.1f} %")
        axes.set_yticks(range(len(shown)), [title for _, title in shown])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_xlim(0, 112)
        axes.set_xticks(range(0, 101, 25))
        axes.set_xlabel("percent of prompts")
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        figure.legend(loc="outside upper left", ncols=len(models), handlelength=1.0, columnspacing=1.3)

    # The words are gathered while drawing, so the text is put in afterwards.
    svg = draw_svg(draw, "shares", "@alt@", 4.9, 0.55 + 0.29 * len(models) * len(shown) + 0.5)
    return svg.replace("@alt@", escape("; ".join(words)))


def series(history: Mapping[str, Any], run: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one logged quantity of one run; entries without it, or not finite, are left out."""
    entries = [e for e in history.get(run) or [] if isinstance(e, Mapping) and finite(e.get(key))]
    steps = [e["step"] if finite(e.get("step")) else i + 1 for i, e in enumerate(entries)]
    return np.array(steps, dtype=float), np.array([e[key] for e in entries], dtype=float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over a twelfth of the run; short runs stay as they are."""
    window = max(1, len(values) // 12) | 1
    if window == 1:
        return values
    padded = np.pad(values, window // 2, mode="edge")
    return np.convolve(padded, np.ones(window) / window, mode="valid")


def curve(history: Mapping[str, Any], key: str, title: str, name: str) -> str | None:
    """One logged quantity over the steps, a line a run: faint as logged, strong as its running mean."""
    runs = {run: series(history, run, key) for run in ("plain", "guarded")}
    runs = {run: both for run, both in runs.items() if len(both[0])}
    if not runs:
        return None
    words = [f"{run}: {values[0]:.3g} at first, {values[-1]:.3g} at last" for run, (_, values) in runs.items()]

    def draw(figure: Figure) -> None:
        axes: Axes = figure.add_subplot(title=title)
        for run, (steps, values) in runs.items():
            smooth = _smooth(values)
            if smooth is not values:
                axes.plot(steps, values, color=MODELS[run], linewidth=0.8, alpha=0.3)
            axes.plot(
                steps, smooth, color=MODELS[run], label=run, marker="o" if len(steps) == 1 else None, markersize=4
            )
        everything = np.concatenate([values for _, values in runs.values()])
        positive = everything[everything > 0]
        if len(positive) == len(everything) and positive.max() > 300 * positive.min():
            axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if len(runs) > 1:
            axes.legend(loc="best", handlelength=1.2)

    return draw_svg(draw, name, f"{title} over training; {'; '.join(words)}", 3.7, 2.4)


def _clean(spectra: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Layers with at least one finite eigenvalue; energy from the entry, or from values, rank and total."""
    layers = {}
    for name, entry in spectra.items():
        if not isinstance(entry, Mapping):
            continue
        values = np.array([v for v in entry.get("values") or [] if finite(v)], dtype=float)
        if not len(values):
            continue
        total = entry.get("total") if finite(entry.get("total")) and entry["total"] > 0 else float(values.sum())
        rank, energy = entry.get("rank"), entry.get("energy")
        if not finite(energy):
            energy = float(values[:rank].sum() / total) if isinstance(rank, int) and total else None
        layers[name] = {"values": values, "total": total, "rank": rank, "energy": energy}
    return layers


def _short(names: Sequence[str]) -> dict[str, str]:
    """Layer names without what they all share in front and without the words that say nothing."""
    drop = {"base_model", "model", "layers", "self_attn", "mlp", "h", "transformer", "decoder", "block"}
    short = {name: ".".join(part for part in name.split(".") if part not in drop) or name for name in names}
    return short if len(set(short.values())) == len(names) else {name: name for name in names}


def spectrum(spectra: Mapping[str, Any]) -> str | None:
    """Every layer's eigenvalues as shares of its trace, coloured by the kind of layer, the protected rank marked."""
    layers = _clean(spectra)
    if not layers:
        return None
    kinds = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in layers))

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot(title="Fisher spectrum, each layer's eigenvalues over its trace")
        seen = set()
        for name, layer in layers.items():
            kind = name.rsplit(".", 1)[-1]
            colour = PALETTE[kinds.index(kind) % len(PALETTE)]
            share = layer["values"] / layer["total"]
            place = np.arange(1, len(share) + 1)
            keep = share > 0
            axes.plot(
                place[keep],
                share[keep],
                color=colour,
                linewidth=1.1,
                alpha=0.75,
                label=kind if kind not in seen else None,
            )
            seen.add(kind)
            rank = layer["rank"]
            if isinstance(rank, int) and 1 <= rank <= len(share) and share[rank - 1] > 0:
                axes.plot(rank, share[rank - 1], marker="o", markersize=3.6, color=colour)
        axes.set_yscale("log")
        axes.set_xlabel("eigenvalue number (dot: protected rank)")
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        figure.legend(loc="outside lower left", ncols=4, handlelength=1.1, columnspacing=1.2)

    rows = -(-len(kinds) // 4)
    ranks = [layer["rank"] for layer in layers.values() if isinstance(layer["rank"], int)]
    alt = f"Eigenvalue spectra of {len(layers)} layers" + (
        f", protected ranks {min(ranks)} to {max(ranks)}" if ranks else ""
    )
    return draw_svg(draw, "spectrum", alt, 4.6, 3.1 + 0.22 * rows)


def energy(spectra: Mapping[str, Any]) -> str | None:
    """Captured energy of every layer: the share of the Fisher's trace in the protected directions."""
    layers = {name: layer for name, layer in _clean(spectra).items() if layer["energy"] is not None}
    if not layers:
        return None
    short = _short(list(layers))
    kinds = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in layers))

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot(title="Captured energy, percent of the trace")
        for place, (name, layer) in enumerate(layers.items()):
            value = 100 * layer["energy"]
            colour = PALETTE[kinds.index(name.rsplit(".", 1)[-1]) % len(PALETTE)]
            axes.plot((0, value), (place, place), color=colour, linewidth=1.6, alpha=0.55)
            axes.plot(value, place, marker="o", markersize=4.5, color=colour)
            rank = f", m = {layer['rank']}" if isinstance(layer["rank"], int) else ""
            axes.text(104, place, f"{value:.0f} %{rank}", va="center", fontsize=8, color=DIM)
        axes.axvline(80, color=DIM, linewidth=0.9, linestyle=(0, (3, 3)))
        axes.set_yticks(range(len(layers)), [short[name] for name in layers], fontsize=8)
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, 132)
        axes.set_xticks(range(0, 101, 20))
        axes.set_ylim(len(layers) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)

    least = min(layers, key=lambda name: layers[name]["energy"])
    mean = 100 * float(np.mean([layer["energy"] for layer in layers.values()]))
    lowest = 100 * layers[least]["energy"]
    alt = f"Captured energy of {len(layers)} layers: mean {mean:.0f} %, least {lowest:.0f} % in {least}"
    return draw_svg(draw, "energy", alt, 4.6, 0.9 + 0.18 * len(layers))
