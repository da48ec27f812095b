"""Files, folders, hub names and data sets of every kind hold the same rows."""

import gzip
import json

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignguard.data import DataSource, read_jsonl, read_rows, read_text

ROWS = [{"prompt": "Name a colour.", "response": "Teal."}, {"prompt": "Und noch eine?", "response": "Grün, 灰色."}]


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(rows, delimiter):
    return "\n".join(
        delimiter.join(line) for line in (["prompt", "response"], *(row.values() for row in rows))
    ).replace("Grün, 灰色.", '"Grün, 灰色."' if delimiter == "," else "Grün, 灰色.")


FILES = {
    "rows.jsonl": lines(ROWS).encode(), "bom.jsonl": lines(ROWS).encode("utf-8-sig"), "rows.ndjson": lines(ROWS).encode(),
    "rows.json": json.dumps(ROWS, indent=2).encode(), "lines.json": lines(ROWS).encode(), "array.jsonl": json.dumps(ROWS).encode(),
    "rows.jsonl.gz": gzip.compress(lines(ROWS).encode()), "misnamed.jsonl": gzip.compress(lines(ROWS).encode()),
    "rows.csv": table(ROWS, ",").encode(), "bom.csv": table(ROWS, ",").encode("utf-8-sig"),
    "rows.csv.gz": gzip.compress(table(ROWS, ",").encode()), "rows.tsv": table(ROWS, "\t").encode(),
}  # fmt: skip


def read(source):
    return [dict(row) for _, row in read_rows(source)]


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_any_common_kind_is_read(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    assert read(tmp_path / name) == read(str(tmp_path / name)) == ROWS


def test_a_table_may_have_empty_lines_and_columns_without_a_name(tmp_path):
    (tmp_path / "a.csv").write_text('\n,prompt,response,,\r\n0,a,"b\n""c""",,\r\n\r\n1,d,,,\n')
    assert read(tmp_path / "a.csv") == [
        {"": "0", "prompt": "a", "response": 'b\n"c"'},
        {"": "1", "prompt": "d", "response": ""},
    ]


def test_parquet_and_arrow_are_read_whatever_their_name(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    data.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_bytes((tmp_path / "rows.parquet").read_bytes())
    data.save_to_disk(tmp_path / "saved")
    for place in ("rows.parquet", "rows.jsonl", "saved", "saved/data-00000-of-00001.arrow"):
        assert read(tmp_path / place) == ROWS, place


def test_data_sets_of_every_kind_are_read_and_splits_chosen(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    several = datasets.DatasetDict(train=data, test=data.select([1]))
    for source in (data, data.to_iterable_dataset(), iter(ROWS), datasets.DatasetDict(train=data)):
        assert read(source) == ROWS
    assert read(DataSource(several, split="test")) == ROWS[1:]
    streamed = datasets.IterableDatasetDict({name: part.to_iterable_dataset() for name, part in several.items()})
    assert read(DataSource(streamed, split="test")) == ROWS[1:]
    several.save_to_disk(tmp_path / "several")
    assert read(DataSource(tmp_path / "several", split="test")) == ROWS[1:]
    for source in (several, tmp_path / "several", DataSource(several, split="validation")):
        with pytest.raises(ValueError, match="choose a split; there are train, test"):
            read(source)
    for source in (data, ROWS):
        with pytest.raises(ValueError, match="split"):
            read(DataSource(source, split="train"))
    (tmp_path / "rows.jsonl").write_text(lines(ROWS))
    with pytest.raises(ValueError, match="a file has no splits"):
        read(DataSource(tmp_path / "rows.jsonl", split="train"))


def test_a_hub_name_is_asked_of_datasets_with_its_subset(monkeypatch):
    asked = []

    def load_dataset(*names):
        asked.append(names)
        return datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:1]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read(DataSource("someone/rows", split="test", subset="main")) == ROWS[:1] and asked == [
        ("someone/rows", "main")
    ]
    with pytest.raises(ValueError, match="someone/rows: choose a split; there are train, test"):
        read("someone/rows")


def test_a_name_that_is_neither_file_nor_data_set_is_named(tmp_path):
    for place in ("nobody/nothing", "gone.jsonl", "./gone", "~/gone.csv", "gone.csv.gz", tmp_path / "gone", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            read(place)


def test_keys_that_arrow_fills_with_none_are_not_there():
    tools = [[{"name": "f", "parameters": {"a": 1}}], [{"name": "g", "parameters": {"b": 2}}]]
    rows = [{"messages": [{"role": "user", "content": "x"}], "tools": tool} for tool in tools]
    assert read(datasets.Dataset.from_list(rows)) == rows
    said = [{"messages": [{"role": "user", "content": None}]}]
    assert read(said) == said  # rows of one's own stay as they are


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}', mtime=0)[:-9], "damaged gzip file"),
        ("a.parquet", b"PAR1 and no more", "datasets cannot read it"),
        ("a.parquet", b"hello", "not a readable Parquet file"),
        ("a.txt", b"hello", r"unknown kind of file '\.txt'"),
        ("a.json", b'[{"prompt": "a"}, 3]', "row 2: expected a JSON object, found int"),
        ("a.json", b'{"prompt": "a",\n "response": }', "line 1: not valid JSON"),
        ("a.jsonl", b"caf\xe9", "not UTF-8 text"),
        ("a.csv", b"prompt,response\na,b\n\nWhy?,Because light, mostly", "row 2, line 4: 3 cells for 2 columns"),
        ("a.csv", b"prompt,response,\nWhy?,Because light, mostly", "row 1, line 2: 3 cells for 2 columns"),
        ("a.tsv", b"prompt\tresponse\n'a\nb'\tc\n", "row 1, line 2: 1 cells for 2 columns"),
        ("a.csv", b'prompt,response\n"a\nb",c\nd,"e\nf,g\nh,i\n', r"line 4: not a readable CSV file \(unexpected end"),
        ("a.csv", b'prompt,response\na,"b"c\n', "line 2: not a readable CSV file"),
        ("a.csv", b"prompt,response,response\na,b,c\n", "line 1: two columns are called 'response'"),
    ],
)
def test_a_file_that_cannot_be_read_is_called_what_it_is(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        read(tmp_path / name)
    assert name in str(error.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(st.characters(codec="utf-8"), max_size=40).filter(lambda text: text[:1] != "\ufeff"),
    st.booleans(),
    st.booleans(),
)
def test_text_is_the_same_with_a_mark_and_gzipped(tmp_path, text, mark, zipped):
    content = text.encode("utf-8-sig" if mark else "utf-8")
    (tmp_path / "x").write_bytes(gzip.compress(content) if zipped else content)
    assert read_text(tmp_path / "x") == text


def test_home_is_one_place(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text(lines(ROWS))
    assert read("~/rows.jsonl") == read_jsonl("~/rows.jsonl") == ROWS


def test_a_table_of_another_kind_is_named_before_its_bytes_are_read(tmp_path):
    (tmp_path / "rows.xlsx").write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(ValueError, match=r"rows\.xlsx: unknown kind of file '\.xlsx'; give \.jsonl"):
        list(read_rows(tmp_path / "rows.xlsx"))


def test_a_pandas_table_is_asked_for_its_rows():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(ROWS)
    with pytest.raises(TypeError, match=r'give table\.to_dict\("records"\)'):
        list(read_rows(frame))
    assert [row for _, row in read_rows(frame.to_dict("records"))] == ROWS
