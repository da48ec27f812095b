"""Where rows come from: files of every common kind, ``datasets`` objects, hub names, lists; and what their columns mean."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

TURNS = ("all", "last")

# Columns by which a row's form is told; where a mapping names a whole form, the others of them are not read.
FORM_FIELDS = (
    *("messages", "conversations", "prompt", "response", "completion", "instruction", "input", "context", "output"),
    "history",
)

# Question, what is added to it, answer: this project's own, TRL's, Alpaca's and Dolly's.
PAIRS = (
    ("prompt", None, "response"),
    ("prompt", None, "completion"),
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
)

FIELDS = (*FORM_FIELDS, "system", "tools", "chat_template_kwargs", "label")

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz")

HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class DataSource:
    """Rows with what must be said about them; wherever data are given, a path, a name or rows may stand in its place.

    Attributes:
        source: path of a JSON, JSONL, CSV, TSV, Parquet or Arrow file, gzipped or not; a folder that
            ``datasets`` saved or reads; a hub name; a ``datasets`` object; or an iterable of rows.
        split: split of a hub name, folder or ``DatasetDict`` with several.
        subset: configuration of a hub name.
        fields: name that is read -> the column that holds it, ``{"prompt": "question", "response": "answer"}`` say. Where it
            names a prompt alone, or an answer, the other is looked for under its own name.
        turns: which turns of the assistant are learned from where a chat has several: ``"all"`` that carry no weight of 0,
            or the ``"last"``.

    Raises:
        ValueError: an unknown field, or other turns.

    Examples:
        >>> from alignguard.data import DataSource, encode_source
        >>> from alignguard.embedded import model_path
        >>> from alignguard.loading import load_tokenizer
        >>> rows = [{"question": "2 + 2?", "answer": "4"}]
        >>> source = DataSource(rows, fields={"prompt": "question", "response": "answer"})
        >>> len(encode_source(source, "task_data", load_tokenizer(model_path()), "causal", 64))
        1
    """

    source: Any
    split: str | None = None
    subset: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    turns: str = "all"

    def __post_init__(self) -> None:
        if self.turns not in TURNS:
            raise ValueError(f"turns must be one of {TURNS}, not {self.turns!r}")
        if not isinstance(self.fields, Mapping) or not all(isinstance(column, str) for column in self.fields.values()):
            raise ValueError(f"fields must map names to columns, not {self.fields!r}")
        if unknown := sorted(set(map(str, self.fields)) - set(FIELDS)):
            raise ValueError(f"fields: nothing is read under {unknown}; there are {', '.join(FIELDS)}")

    def __str__(self) -> str:
        return str(self.source) if isinstance(self.source, (str, Path)) else "rows"


def _renamed(row: Row, fields: Mapping[str, str], where: str) -> Row:
    """A row under the names that are read."""
    if lacking := [column for column in fields.values() if column not in row]:
        raise ValueError(f"{where}: no column {lacking[0]!r} (found the fields {sorted(map(str, row))})")
    named = {name: row[column] for name, column in fields.items()}
    begun = [pair for pair in PAIRS if pair[0] in named or pair[2] in named]
    whole = any(question in named and (answer in named or "label" in named) for question, _, answer in begun)
    if whole or "messages" in named or "conversations" in named:
        return {**{name: value for name, value in row.items() if name not in FORM_FIELDS}, **named}
    # A mapping that names a part of a form leaves the other parts where they stand.
    rest = {name: row[name] for name in row if name not in FORM_FIELDS or name not in fields.values()}
    parts = {"input", "context", "history", *named, *(name for pair in begun for name in pair)}
    for name in FORM_FIELDS:
        if begun and name not in parts and rest.get(name) not in (None, "", []):
            raise ValueError(
                f"{where}: fields name {', '.join(named)}, and nothing would read the column {name!r} beside that; name the "
                "columns of prompt and response both"
            )
    return {**rest, **named}


Source = str | Path | Iterable[Row] | DataSource


def as_source(source: Source) -> DataSource:
    """The source itself, or one with every default."""
    return source if isinstance(source, DataSource) else DataSource(source)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name longer than the system takes, or with a NUL in it
        return False


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def read_text(path: str | Path) -> str:
    """A UTF-8 file's text, gzipped or not, with a byte order mark or not; line ends as they stand.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8, or damaged; the message names the file.
    """
    place = Path(path).expanduser()
    if not _is_file(place):
        raise FileNotFoundError(f"no such file: {path!s:.200}")
    content = place.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: a damaged gzip file ({error})") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Read JSON objects: one a line, or one array of them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what is no JSON object; the message names the file and the line, or the row of an array.
    """
    text = read_text(path)
    whole: Any = None
    if text.lstrip()[:1] in ("[", "{"):
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError):
            whole = None  # objects one a line, or damage that its line will name
    if isinstance(whole, dict):
        return [whole]
    if isinstance(whole, list):
        for number, row in enumerate(whole, 1):
            if not isinstance(row, dict):
                raise ValueError(f"{path}, row {number}: expected a JSON object, found {type(row).__name__}")
        return whole
    rows = []
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            words = getattr(error, "msg", None) or str(error)
            raise ValueError(f"{path}, line {number}: not valid JSON ({words}); give one object a line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
        rows.append(row)
    return rows


def _read_csv(path: Path, delimiter: str) -> list[Row]:
    """Rows of a table; what would drop or swallow cells is refused by its line."""
    lines = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    names: list[str] = []
    rows: list[Row] = []
    line = width = 0  # where a row ends, for text in quotes may go over several lines; how many cells it has
    try:
        for cells in lines:
            first, line = line + 1, lines.line_num
            if not names:
                names, width = cells, len(cells)
                while names and not names[-1]:  # spreadsheets leave columns without a name at the end
                    names = names[:-1]
                if twice := [name for place, name in enumerate(names) if name and name in names[:place]]:
                    raise ValueError(
                        f"{path}, line {first}: two columns are called {twice[0]!r}; rename or remove one of them"
                    )
            elif cells and (len(cells) != width or any(cells[len(names) :])):
                raise ValueError(
                    f"{path}, row {len(rows) + 1}, line {first}: {len(cells)} cells for {len(names)} "
                    f"columns; put text that holds {delimiter!r} or a line end in double quotes"
                )
            elif cells:
                rows.append(dict(zip(names, cells, strict=False)))
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {line + 1}: not a readable CSV file ({error}); end quotes that begin a cell, and write double "
            "quotes within them twice"
        ) from error
    return rows


def _read_file(path: Path) -> Iterable[Row]:
    """Rows of a file, by its first bytes where they tell, else by its name."""
    with path.open("rb") as file:
        head = file.read(6)
    if head[:4] == b"PAR1":
        return _filled(
            _loaded(path, lambda d: d.load_dataset("parquet", data_files=str(path), split="train", streaming=True))
        )
    if head == b"ARROW1" or path.suffix == ".arrow":
        return _filled(
            _loaded(path, lambda d: d.load_dataset("arrow", data_files=str(path), split="train", streaming=True))
        )
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind in (".csv", ".tsv"):
        return _read_csv(path, "," if kind == ".csv" else "\t")
    if kind in (".jsonl", ".json", ".ndjson"):
        return read_jsonl(path)
    if kind == ".parquet":
        raise ValueError(f"{path}: not a readable Parquet file; write it again")
    raise ValueError(
        f"{path}: unknown kind of file {kind!r}; give .jsonl, .json, .csv, .tsv, .parquet, or one of them .gz"
    )


def _loaded(what: Any, load: Any) -> Any:
    """What ``datasets`` reads, its errors named; its progress bars and prompts stay off."""
    import datasets

    try:
        found = load(datasets)
        return list(found) if isinstance(found, datasets.IterableDataset) else found
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # datasets, pyarrow and the hub have many kinds
        raise ValueError(f"{what}: datasets cannot read it ({' '.join(str(error).split())[:300]})") from error


def _one_split(found: Any, given: DataSource) -> Any:
    """A data set, or the split that was asked for of several.

    Raises:
        ValueError: no such split, or several and none was asked for.
    """
    if not isinstance(found, Mapping):
        if given.split is not None:
            raise ValueError(f"{given}: no splits to choose from, so split={given.split!r} means nothing; leave it out")
        return found
    names = ", ".join(map(str, found))
    if given.split is None and len(found) == 1:
        return next(iter(found.values()))
    if given.split not in found:
        raise ValueError(
            f"{given}: choose a split; there are {names}" + ("" if given.split is None else f", not {given.split}")
        )
    return found[given.split]


def _from_hub(given: DataSource) -> Any:
    try:
        found = _loaded(given, lambda d: d.load_dataset(str(given.source), given.subset))
    except ValueError as error:
        raise FileNotFoundError(
            f"no such file, and no data set of that name can be read from the hub: {error}"
        ) from error
    return _one_split(found, given)


def _open(given: DataSource) -> tuple[Iterable[Any], str]:
    """Rows of a source, and its name."""
    source = given.source
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        if _is_file(path):
            if given.split is not None or given.subset is not None:
                raise ValueError(f"{source}: a file has no splits or subsets; leave split and subset out")
            return _read_file(path), str(source)
        if _is_folder(path):
            saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
            try:
                found = _loaded(
                    source, lambda d: d.load_from_disk(str(path)) if saved else d.load_dataset(str(path), given.subset)
                )
            except ValueError as error:
                raise FileNotFoundError(f"no such file: {error}") from error
            return _filled(_one_split(found, given)), str(source)
        if (
            isinstance(source, str)
            and HUB_NAME.fullmatch(source)
            and not source.endswith(SUFFIXES)
            and len(source) < 97
        ):
            return _filled(_from_hub(given)), str(source)
        raise FileNotFoundError(f"no such file: {source!s:.200}")
    if isinstance(source, Mapping) and type(source).__name__ in ("DatasetDict", "IterableDatasetDict"):
        return _filled(_one_split(source, given)), "data"
    if isinstance(source, (Mapping, bytes)) or not isinstance(source, Iterable):
        raise TypeError(
            f"data must be a path, a hub name, a datasets.Dataset or an iterable of rows, not {type(source).__name__}; "
            "of several data sets, choose a split"
        )
    if type(source).__module__.partition(".")[0] == "pandas":
        raise TypeError('data must be rows, not a pandas table; give table.to_dict("records")')
    if given.split is not None or given.subset is not None:
        raise ValueError("split and subset choose from a hub name, a folder or a DatasetDict; leave them out")
    return (_filled(source) if hasattr(source, "features") else source), "data"


def _filled(rows: Iterable[Any]) -> Iterator[Any]:
    """Rows of Arrow tables without the None that stand in nested records for keys that a row does not have."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: cleaned(inner) for name, inner in value.items() if inner is not None}
        return [cleaned(inner) for inner in value] if isinstance(value, list) else value

    for row in rows:
        yield {name: cleaned(value) for name, value in row.items()} if isinstance(row, Mapping) else row


def read_rows(source: Source) -> Iterator[tuple[str, Row]]:
    """Every row of a source under the names that are read, with what an error should call it."""
    given = as_source(source)
    rows, name = _open(given)
    for number, row in enumerate(rows, 1):
        where = f"{name}, row {number}"
        if not isinstance(row, Mapping):
            raise TypeError(f"{where}: expected a mapping, found {type(row).__name__}")
        yield where, _renamed(row, given.fields, where) if given.fields else row
