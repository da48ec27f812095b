"""What a run is: written before it starts, compared before it is resumed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alignguard.data import rows_digest
from alignguard.files import OWN_ANSWERS, check_output, claim_output, write_text
from alignguard.objective import base_model
from alignguard.training.checkpoint import STAGING
from alignguard.updates import OF_ADAPTER
from fishergeo.capture import plain_name

if TYPE_CHECKING:
    from alignguard.guard import Guard

RECORD = "run.json"

TARGETS = {"lora": "adapter", "full": "model"}  # what a run of each method leaves

CARD = "## Training with alignguard"

WIDE_ENOUGH = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # for a norm in float64 to be taken of them

LENGTH = {"steps", "training.max_steps", "training.num_train_epochs"}  # what a longer run has otherwise


def _differences(there: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """What differs by its whole name, ``training.max_steps`` say, with both values; None where there is none."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in sorted(there.keys() | now.keys()):
        before, after = there.get(name), now.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found |= _differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found[prefix + name] = before, after
    return found


def record_of(*, model: Any, task: Sequence[Any], alignment: Sequence[Any], **rest: Any) -> dict[str, Any]:
    """A run as JSON: the model's name, digests of the encoded data, and settings as they are.

    Args:
        model: a path or name, or a loaded model, which is recorded by its own name.
        task: encoded task rows.
        alignment: encoded alignment rows.
        **rest: settings.
    """
    record = {"model": _named(model), "task_data": _digest(task), "alignment_data": _digest(alignment), **rest}
    return json.loads(json.dumps(record, default=_plain))


def _named(model: Any) -> str:
    return str(model) if isinstance(model, (str, Path)) else str(getattr(model, "name_or_path", type(model).__name__))


def weight_marks(model: Any) -> str:
    """A digest by which the weights below an adapter are told from those of another model of the same shape and name.

    Of each weight its two norms to six digits, which differ between models and not between devices or precisions.
    """
    digest = hashlib.sha256()
    for name, weight in base_model(model).named_parameters():
        if not weight.is_meta and not OF_ADAPTER.search(f".{name}"):
            values = weight.detach() if weight.dtype in WIDE_ENOUGH else weight.detach().double()
            norms = [float(torch.linalg.vector_norm(values, order, dtype=torch.float64)) for order in (1, 2)]
            digest.update(f"{plain_name(name)} {norms[0]:.6e} {norms[1]:.6e}".encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def _digest(rows: Sequence[Any]) -> dict[str, Any]:
    return {"rows": len(rows), "sha256": rows_digest(rows)}


def read_record(path: Path) -> dict[str, Any]:
    """The record of an earlier run.

    Raises:
        ValueError: damaged.
    """
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"resume: {path} is damaged ({error}); start anew in another folder") from error
    if not isinstance(there, dict):
        raise ValueError(f"resume: {path} is damaged (no mapping); start anew in another folder")
    return there


def never_began(output_dir: Path) -> bool:
    """Whether a run claimed the folder and left no work there: neither weights nor a checkpoint.

    Raises:
        NotADirectoryError, PermissionError, ValueError: as :func:`alignguard.files.check_output`.
    """
    check_output(output_dir, overwrite=True)
    if not (output_dir / RECORD).is_file():
        return False
    left = {path.name for path in output_dir.iterdir()} | {path.name for path in output_dir.glob("checkpoints/*")}
    return left <= {RECORD, "checkpoints", STAGING, OWN_ANSWERS}


def _left(output: Path, record: Mapping[str, Any]) -> list[Path]:
    """What another run left in the folder and must not stand under this one's record; other files are the user's.

    Raises:
        ValueError: the model of this run is among it.
    """
    left = [output / "checkpoints", output / "history.json"]
    if record.get("own_answers") is None:  # or they are this run's: a log of other prompts began anew
        left.append(output / OWN_ANSWERS)
    for method, name in TARGETS.items():
        card = output / name / "README.md"
        # A folder of that name that this run does not write may be the user's own; a run's has its card.
        if method == record.get("method") or (card.is_file() and CARD in card.read_text("utf-8", "replace")):
            left.append(output / name)
        left += output.glob(f".{name}.????????")  # of a run that was killed while it saved
    try:
        base = Path(record.get("model", "")).expanduser().resolve()
    except (OSError, ValueError, RuntimeError):  # no path that the system would take, so a name
        return left
    for path in left:
        if path.exists() and base.is_relative_to(path.resolve()):
            raise ValueError(
                f"model {record['model']}: overwriting output_dir {output} removes {path}; choose another folder, or move "
                "the model"
            )
    return left


def check_run(
    output_dir: Path, *, overwrite: bool = False, resume: bool = False, model: Any = None, method: str | None = None
) -> None:
    """What can be known of :func:`claim_run` before anything is loaded; nothing is touched.

    Raises:
        FileExistsError, NotADirectoryError, PermissionError, ValueError: as :func:`claim_run`.
    """
    output_dir = check_output(output_dir, overwrite=True)
    began = not never_began(output_dir)
    there = resume and (output_dir / RECORD).is_file()
    check_output(output_dir, overwrite or there or not began)
    if there:
        read_record(output_dir / RECORD)
    elif model is not None and output_dir.is_dir():
        _left(output_dir, {"model": _named(model), "method": method})


def claim_run(output_dir: str | Path, record: Mapping[str, Any], *, overwrite: bool, resume: bool) -> Path:
    """Make or take over the output folder of a run and write its record there.

    What an earlier run left there is removed first: whatever its moment, a kill leaves no weights under a record that is
    not theirs.

    Raises:
        FileExistsError: the folder holds something else, and ``overwrite`` is false.
        ValueError: ``resume``, and the folder holds another run; the settings that differ are named one by one with both
            values, and another base model of the same name by its weights. More steps than before are no difference: they
            extend the run. Or the model of this run is in what
            overwriting would remove.
        NotADirectoryError, PermissionError: as :func:`alignguard.files.claim_output`.
    """
    path = Path(output_dir) / RECORD
    if resume and path.is_file():
        there = read_record(path)
        differ = _differences(there, record)
        if "model_weights" not in there:  # of an earlier version
            differ.pop("model_weights", None)
        if differ and set(differ) <= LENGTH and record["steps"] >= there.get("steps", 0):
            write_text(claim_output(output_dir, overwrite=True) / RECORD, json.dumps(record, indent=1))
        elif "model_weights" in differ:
            raise ValueError(
                f"resume: the model's weights are not those that the run in {output_dir} began with: it is another model, or one "
                "that was trained since; give the model's name, or load it anew"
            )
        elif differ:
            shown = ", ".join(f"{name} ({old!s:.60} there, {new!s:.60} now)" for name, (old, new) in differ.items())
            raise ValueError(
                f"resume: {output_dir} holds a run with other settings: {shown}; resume it as it was, or with more steps"
            )
        return claim_output(output_dir, overwrite=True)
    output = claim_output(output_dir, overwrite or never_began(Path(output_dir)))
    for stale in _left(output, record):
        if stale.name == OWN_ANSWERS and not overwrite:
            continue  # answers given before a run began
        shutil.rmtree(stale) if stale.is_dir() and not stale.is_symlink() else stale.unlink(missing_ok=True)
    write_text(output / RECORD, json.dumps(record, indent=1))
    return output


VERSIONS = ("fishergeo", "torch", "transformers", "peft", "accelerate")


def card_section(record: Mapping[str, Any], guard: Guard | None) -> str:
    """Markdown: data, strengths or budget, drift, coverage, versions.

    Args:
        record: :func:`alignguard.training.record.record_of`.
        guard: after training, or None for a plain run.

    Returns:
        A section headed "Training with alignguard".
    """
    data = [
        f"{record[name]['rows']} rows (sha256 `{record[name]['sha256'][:16]}`)"
        for name in ("task_data", "alignment_data")
    ]
    lines = [CARD, "", f"- Base model: `{record['model']}`", f"- Method: {record['method']}"]
    lines += [f"- Task data: {data[0]}", f"- Seed: {record['seed']}"]
    if guard is None:
        lines.append("- Trained without a guard.")
    else:
        c = guard.config
        lines.append(f"- Alignment data: {data[1]}, {guard.examples_read} readings")
        if own := record.get("own_answers"):
            lines.append(
                f"- Its responses are the base model's own: {own['asked']} prompts asked, {own['refused']} of "
                f"{own['unsafe']} unsafe ones refused, and only those kept"
            )
        if guard.budget is not None:
            lines.append(
                f"- Drift budget: {c.max_drift:g} nats a response; last multiplier {guard.budget.multiplier:.3g} on "
                f"λ_A = {c.lambda_alignment:g}, λ_KL = {c.lambda_kl:g}"
            )
        else:
            lines.append(
                f"- Strengths: λ_A = {c.lambda_alignment:g}, λ_T = {c.lambda_task:g}, λ_NC = {c.lambda_collision:g}, λ_KL = {c.lambda_kl:g}"
            )
        if guard.uses_curvature:
            count = guard.alignment.at_once(c.refresh_examples)
            words = f"{c.structure}, {c.kind}, {guard.refreshes} estimates of {count} examples"
            lines.append(f"- Fisher: {words}")
        if c.lambda_kl:
            assert guard.kl is not None
            every, memory = guard.kl.schedule()
            words = f"{guard.alignment.at_once(c.kl_examples)} examples every {every} steps"
            words += f", {memory} readings remembered" if memory else ""
            words += f", the first {c.kl_tokens} tokens of a response" if c.kl_tokens is not None else ""
            lines.append(f"- KL to the base: {words}")
        drift = guard.measured_drift()
        measured = "not measurable" if drift is None else f"{drift:.4g}"
        lines.append(f"- Drift from the start on alignment responses, nats a response: 0 before, {measured} after")
        covered = guard.coverage()
        guarded, read = sum(x.guarded for x in covered), sum(x.by_kl for x in covered)
        through = f"; trained and charged by KL alone: {read}" if read else ""
        lines.append(
            f"- Matrices guarded: {guarded}{through}; trained but not guarded: {len(covered) - guarded - read}"
        )
    shown = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS)
    lines += [f"- Versions: {shown}", ""]
    lines.append(
        "The guard is meant against drift in benign fine-tuning. It is no defence against someone who holds the weights."
    )
    return "\n".join(lines) + "\n"


def add_card_section(folder: Path, section: str) -> None:
    """Append the section to ``README.md`` of a saved model, which is made if it is not there."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8").rstrip() + "\n\n" if card.is_file() else "# Fine-tuned model\n\n"
    card.write_text(text + section, encoding="utf-8")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("fishergeo", "torch", "transformers", "peft", "accelerate", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}
