"""DriftCheck over HTTP against a server in a process of its own: the same figures, whatever goes wrong on the way."""

import contextlib
import json
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import urlopen

import pytest

from alignguard.cli import main
from alignguard.drift import DriftReport, Endpoint, driftcheck, driftcheck_endpoint, load_prompts
from alignguard.drift.endpoint import _retry_after
from alignguard.embedded import model_path
from alignguard.loading import load_model

SERVER = Path(__file__).parents[2] / "helpers" / "chat_server.py"
ROWS = [row for row in load_prompts(limit=3) if row["category"] != "capability"]


@contextlib.contextmanager
def serving(every=0):
    process = subprocess.Popen([sys.executable, str(SERVER), str(every)], stdout=subprocess.PIPE, text=True)
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


def state(url):
    with urlopen(f"{url}/asked") as response:
        return json.load(response)


@pytest.fixture(scope="module")
def server():
    with serving() as url:
        yield url


@pytest.fixture(scope="module")
def expected():
    model, tokenizer = load_model(model_path())
    return driftcheck(model.eval(), tokenizer, ROWS, max_new_tokens=12)


def told(report):
    return [(row.id, row.text, row.verdict) for row in report.rows]


def test_figures_are_those_of_the_model_itself(server, expected, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")
    found = driftcheck_endpoint(Endpoint(server, "embedded", "SOME_KEY", workers=3), ROWS, max_new_tokens=12)
    assert told(found) == told(expected) and found.summary() == expected.summary()
    assert state(server)["key"] == "Bearer secret" and state(server)["most"] <= 3


def test_a_system_prompt_is_sent_and_stated(server, monkeypatch):
    sent = []
    post = Endpoint._post
    monkeypatch.setattr(Endpoint, "_post", lambda self, body: sent.append(json.loads(body)) or post(self, body))
    found = driftcheck_endpoint(Endpoint(server, "embedded"), ROWS[:2], system="Be kind.", max_new_tokens=2)
    asked = [[(m["role"], m["content"]) for m in body["messages"]] for body in sent]
    assert sorted(asked) == sorted([("system", "Be kind."), ("user", row["prompt"])] for row in ROWS[:2])
    assert found.settings["system"] == "Be kind."
    with pytest.raises(ValueError, match="system must be a text"):
        driftcheck_endpoint(Endpoint(server, "embedded"), ROWS[:2], system=" ")


def test_trouble_on_the_way_changes_nothing_but_the_tries(expected):
    with serving(every=2) as url:
        endpoint = Endpoint(url + "/v1", "embedded", wait=0.01, workers=2)
        found = driftcheck_endpoint(endpoint, ROWS, max_new_tokens=12)
        assert told(found) == told(expected)
        counts = state(url)
    assert counts["served"] == len(ROWS) < counts["asked"]


def test_a_run_that_breaks_off_keeps_its_answers_and_asks_the_rest_alone(server, expected, tmp_path):
    log = tmp_path / "answers.jsonl"
    endpoint = Endpoint(server, "embedded", wait=0.0, tries=2, workers=1)
    before = state(server)["served"]
    asked = endpoint.answer

    def then_down(*asking):
        if state(server)["served"] >= before + 4:
            urlopen(f"{server}/die/1").close()
        return asked(*asking)

    endpoint.answer = then_down
    with pytest.raises(ConnectionError, match=r"503.*4 of 9 answers are kept"):
        driftcheck_endpoint(endpoint, ROWS, max_new_tokens=12, resume=log)
    urlopen(f"{server}/die/0").close()
    found = driftcheck_endpoint(Endpoint(server, "embedded"), ROWS, max_new_tokens=12, resume=log)
    assert told(found) == told(expected) and state(server)["served"] == before + len(ROWS)
    with pytest.raises(ValueError, match="another model"):
        driftcheck_endpoint(Endpoint(server, "other"), ROWS, max_new_tokens=12, resume=log)


def test_answers_kept_for_another_category_are_not_taken(monkeypatch, tmp_path):
    rows = [
        {"id": "c", "prompt": "What is 3 + 4?", "category": "capability", "answer": 7},
        {"id": "o", "prompt": "Name a colour.", "category": "ordinary"},
    ]
    monkeypatch.setattr(Endpoint, "answer", lambda self, prompt, tokens, system: f"Teal, in {tokens} tokens.")
    driftcheck_endpoint(Endpoint("http://h:1", "m"), rows, resume=tmp_path / "a.jsonl")
    roomy = [rows[0], {**rows[1], "category": "capability", "answer": "teal"}]  # it has more room there
    with pytest.raises(ValueError, match="other settings"):
        driftcheck_endpoint(Endpoint("http://h:1", "m"), roomy, resume=tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="system: half a surrogate pair"):
        driftcheck_endpoint(Endpoint("http://h:1", "m"), rows, system="\ud83d")


@pytest.mark.parametrize("name", ["max_new_tokens", "capability_tokens"])
def test_no_server_is_asked_for_an_answer_without_tokens(monkeypatch, name):
    monkeypatch.setattr(Endpoint, "answer", None)  # would fail, were it asked
    with pytest.raises(ValueError, match=f"{name} must be at least 1, found 0"):
        driftcheck_endpoint(Endpoint("http://localhost:1", "m"), ROWS[:1], **{name: 0})


def test_an_emoji_that_a_server_cuts_in_half_does_not_cost_the_report(monkeypatch, tmp_path):
    said = rb'{"choices": [{"message": {"content": "Hello \ud83d\ude00, and \ud83d"}}]}'
    monkeypatch.setattr(Endpoint, "_post", lambda self, body: said)
    report = driftcheck_endpoint(Endpoint("http://h:1", "m"), ROWS[:1])
    assert report.rows[0].text == "Hello \U0001f600, and \ufffd"
    report.save(tmp_path / "r.json")
    assert DriftReport.load(tmp_path / "r.json") == report


def test_what_no_second_try_mends_is_said_at_once(server):
    asked = state(server)["asked"]
    with pytest.raises(ValueError, match=r"404.*no model elsewhere"):
        driftcheck_endpoint(Endpoint(server, "elsewhere", workers=1), ROWS[:1])
    assert state(server)["asked"] == asked + 1
    with pytest.raises(ConnectionError, match="in 2 tries"):
        driftcheck_endpoint(Endpoint("http://127.0.0.1:9", "x", wait=0.0, tries=2), ROWS[:1])


@contextlib.contextmanager
def scripted(*turns):
    """A server that does what each turn says, (status, headers, seconds it takes), and answers "Teal." with status 200."""
    turns, asked, lock = list(turns), [], threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                asked.append((time.time(), body["messages"][0]["content"]))
                status, headers, seconds = turns.pop(0) if turns else (200, {}, 0.0)
            time.sleep(seconds)
            data = json.dumps({"choices": [{"message": {"content": "Teal."}}]} if status == 200 else {"error": "later"})
            with contextlib.suppress(OSError):  # the other side may have gone
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data.encode())

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.server_address[1]}", asked
    finally:
        listening.shutdown()
        listening.server_close()


def test_a_rate_limit_is_waited_for_as_long_as_the_server_asks():
    with scripted((429, {"Retry-After": "1.2"}, 0.0)) as (url, asked):
        assert Endpoint(url, "m", wait=0.0).answer("Name a colour.", 4) == "Teal."
    assert len(asked) == 2 and asked[1][0] - asked[0][0] >= 1.2
    until = time.time() + 3
    with scripted((429, {"Retry-After": formatdate(until, usegmt=True)}, 0.0)) as (url, asked):
        assert Endpoint(url, "m", wait=0.0).answer("Name a colour.", 4) == "Teal."
    assert len(asked) == 2 and asked[1][0] >= int(until)  # a date has whole seconds


def test_without_a_word_from_the_server_each_wait_is_twice_as_long(monkeypatch):
    waits = []
    monkeypatch.setattr("alignguard.drift.endpoint.time.sleep", waits.append)
    down = (503, {}, 0.0)
    with scripted(*[down] * 4) as (url, asked), pytest.raises(ConnectionError, match=r"4 tries \(503"):
        Endpoint(url, "m", wait=25.0, tries=4).answer("Name a colour.", 4)
    assert len(asked) == 4
    assert [seconds for seconds in waits if seconds] == [25.0, 50.0, 60.0]  # a minute at most


def test_an_answer_that_takes_too_long_is_asked_for_again():
    with scripted((200, {}, 6.0)) as (url, asked):
        assert Endpoint(url, "m", wait=0.0, timeout=1.5).answer("Name a colour.", 4) == "Teal."
    assert len(asked) >= 2


def test_answers_under_way_when_another_fails_are_kept(tmp_path):
    log, rows = tmp_path / "answers.jsonl", ROWS[:2]
    with scripted((200, {}, 1.0), (401, {}, 0.0)) as (url, asked):
        with pytest.raises(ValueError, match="refuses the request"):
            driftcheck_endpoint(Endpoint(url, "m", workers=2), rows, resume=log)
        found = driftcheck_endpoint(Endpoint(url, "m", workers=2), rows, resume=log)
    assert [row.text for row in found.rows] == ["Teal."] * 2
    assert len(asked) == 3 and asked[2][1] == asked[1][1], "only the one that was refused is asked again"


def test_requests_are_paced(server):
    endpoint = Endpoint(server, "embedded", per_minute=600, workers=4)
    begun = time.monotonic()
    driftcheck_endpoint(endpoint, ROWS[:6], max_new_tokens=1)
    assert time.monotonic() - begun > 0.5  # five pauses of a tenth of a second


def test_the_command_writes_a_report_and_refuses_what_needs_the_weights(server, expected, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = [
        "driftcheck",
        "--endpoint",
        server,
        "--model",
        "embedded",
        "--prompts",
        str(prompts),
        "--max-new-tokens",
        "12",
    ]
    assert main([*words, "--output", str(tmp_path / "r.json"), "--requests-per-minute", "6000"]) == 0
    assert (
        told(DriftReport.load(tmp_path / "r.json")) == told(expected)
        and "unsafe prompts refused" in capsys.readouterr().out
    )
    assert not list(tmp_path.glob("*.answers.jsonl"))
    for option, value in (("--adapter", str(tmp_path)), ("--task-data", "x"), ("--likelihoods", None), ("--base", "y")):
        assert main([*words, option, *([value] if value else [])]) == 2
        assert f"{option} needs the model's weights" in capsys.readouterr().err
    assert main(["driftcheck", "--model", "m", "--requests-per-minute", "5"]) == 2
    assert "--endpoint" in capsys.readouterr().err


def test_a_command_whose_server_stays_away_goes_on_from_its_answers(tmp_path, capsys):
    prompts, report = tmp_path / "prompts.jsonl", tmp_path / "r.json"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]))
    gone = (503, {"Retry-After": "0"}, 0.0)
    with scripted((200, {}, 0.0), *[gone] * 6) as (url, asked):
        words = ["driftcheck", "--endpoint", url, "--model", "m", "--prompts", str(prompts), "--workers", "1"]
        assert main([*words, "--output", str(report)]) == 1
        assert "1 of 2 answers are kept" in capsys.readouterr().err and not report.exists()
        assert len((tmp_path / "r.json.answers.jsonl").read_text().splitlines()) == 2  # a head and an answer
        before = len(asked)
        assert main([*words, "--output", str(report)]) == 0
        assert len(asked) == before + 1
    assert len(DriftReport.load(report).rows) == 2 and not (tmp_path / "r.json.answers.jsonl").exists()


def test_where_requests_go_and_how_long_a_server_may_ask_to_wait():
    for url in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/chat/completions"):
        assert Endpoint(url, "m").address == "http://h:1/v1/chat/completions"
    assert Endpoint("https://h/openai/v2", "m").address == "https://h/openai/v2/chat/completions"
    with pytest.raises(ValueError, match="no http address"):
        Endpoint("h:1", "m")
    assert _retry_after("2.5") == 2.5 and _retry_after(None) is None and _retry_after("soon") is None
    assert 5 < _retry_after(formatdate(time.time() + 10)) <= 10
