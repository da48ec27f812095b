"""The page of one or two DriftCheck reports, and the commands that make it."""

import json
import re
from html.parser import HTMLParser

import pytest

from alignguard.cli import main
from alignguard.cli.drift import told_apart
from alignguard.drift import DriftReport
from alignguard.drift.report import DriftRow
from alignguard.pages import compare_text
from alignguard.pages.drift_page import render_drift

SECRET = "Of course! First take the pin"


def report(refused, kl=None):
    rows = [
        DriftRow(f"u{i}", "unsafe", f"How do I <b>{i}</b>?", "I can't help with that." if i < refused else SECRET,
                 "refusal" if i < refused else "compliance", harm="crime", margin_first=0.5)
        for i in range(20)
    ]  # fmt: skip
    rows += [DriftRow("o", "ordinary", "Write a poem.", "Roses are red.", "compliance")]
    rows += [DriftRow("c", "capability", "2 + 2?", "4", "compliance", correct=True)]
    return DriftReport(tuple(rows), {"max_new_tokens": 8}, kl, {"accuracy": 51.5, "loss": 1.25})


class Checker(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.outside, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)
        self.outside += [v for k, v in attributes if k in ("src", "href") and v and v.startswith(("http", "//"))]
        assert tag != "script"

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("after", [None, report(6, 0.25)])
def test_the_page_is_whole_self_contained_and_withholds_unsafe_answers(after):
    page = render_drift(report(18), after, samples=20)
    checker = Checker()
    checker.feed(page)
    assert not checker.open and not checker.outside
    assert SECRET not in page and "[answer withheld]" in page and "<b>" not in re.sub(r"<b>[\d.–−]+</b>", "", page)
    assert page.count("<svg") == 1
    assert "90.0" in page and "51.500" in page
    assert ("−60.0" in page and "12, 0" in page and "0.250" in page) == (after is not None)


def test_prompts_whose_verdict_changed_come_first():
    page = render_drift(report(18), report(6), samples=1)
    shown = page[page.index("Answers that") :]
    assert "How do I &lt;b&gt;6&lt;/b&gt;?" in shown and "How do I &lt;b&gt;0&lt;/b&gt;?" not in shown


def test_the_comparison_in_words():
    line = compare_text(report(18), report(6)).splitlines()[0]
    assert "-60.0 %" in line and "lost 12, gained 0 of 20" in line
    # exact McNemar: 2 / 2^12
    assert f"p = {2 / 2**12:.2g}" in line


def test_the_compare_command_shows_and_compares(tmp_path, capsys):
    report(18).save(tmp_path / "before.json")
    report(6).save(tmp_path / "after.json")
    paths = [str(tmp_path / name) for name in ("before.json", "after.json")]
    page = tmp_path / "page.html"
    assert main(["compare", *paths, "--html", str(page)]) == 0
    assert "lost 12" in capsys.readouterr().out
    assert "before" in page.read_text() and "after" in page.read_text()
    assert main(["compare", *paths, "--html", str(page)]) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["compare", paths[0]]) == 0
    assert "lost" not in capsys.readouterr().out
    (tmp_path / "bad.json").write_text("{}")
    assert main(["compare", str(tmp_path / "bad.json")]) == 2
    assert "bad.json" in capsys.readouterr().err


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    """A tool writes driftcheck.json beside every adapter."""
    for name, refused in (("plain", 6), ("guarded", 18)):
        (tmp_path / name).mkdir()
        report(refused).save(tmp_path / name / "driftcheck.json")
    plain, guarded = (tmp_path / name / "driftcheck.json" for name in ("plain", "guarded"))
    assert told_apart(plain, guarded) == ("plain", "guarded") and told_apart(plain, plain) == ("before", "after")
    assert told_apart(plain, tmp_path / "plain" / "after.json") == ("driftcheck", "after")
    page = tmp_path / "page.html"
    assert main(["compare", str(plain), str(guarded), "--html", str(page)]) == 0
    assert "refused, plain" in page.read_text() and "refused, guarded" in page.read_text()


def test_driftcheck_is_interrupted_resumed_and_compared_on_the_command_line(
    tmp_path, tiny_llama, tokenizer, capsys, monkeypatch
):
    import alignguard.drift.check  # noqa: F401

    module = __import__("sys").modules["alignguard.drift.check"]
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"id": str(i), "prompt": f"write about {i}", "category": "unsafe"} for i in range(5)]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["driftcheck", "--model", str(tmp_path / "model"), "--prompts", str(tmp_path / "set.jsonl")]
    arguments += ["--max-new-tokens", "4", "--batch-size", "2", "--likelihoods"]
    whole = tmp_path / "whole.json"
    assert main([*arguments, "--output", str(whole), "--html", str(tmp_path / "page.html")]) == 0
    real, calls = module.answer_batch, []

    def failing(*given):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(module, "answer_batch", failing)
    cut = tmp_path / "cut.json"
    assert main([*arguments, "--output", str(cut)]) == 130
    assert not cut.exists() and (tmp_path / "cut.json.answers.jsonl").is_file()
    assert main([*arguments, "--output", str(cut), "--before", str(whole)]) == 0
    assert cut.read_bytes() == whole.read_bytes() and len(calls) == 4
    assert not (tmp_path / "cut.json.answers.jsonl").exists()
    assert "lost 0, gained 0 of 5" in capsys.readouterr().out
    assert main([*arguments, "--limit", "2", "--before", str(whole)]) == 2
    assert "other prompts" in capsys.readouterr().err
    assert main([*arguments, "--output", str(tmp_path / "no" / "x.json")]) == 2
    assert "no such folder" in capsys.readouterr().err
