"""Answers over HTTP: any server of OpenAI's chat completions (vLLM, SGLang, llama.cpp, TGI, a hosted model)."""

from __future__ import annotations

import email.utils
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from tqdm.auto import tqdm

from alignguard.data import check_system, check_text
from alignguard.drift.generation import Answers, asked_digest
from alignguard.drift.judges import Judge
from alignguard.drift.prompts import Prompts, load_prompts
from alignguard.drift.report import DriftReport
from alignguard.drift.verdicts import judged_rows

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # statuses that another try may mend
LONGEST_WAIT = 60.0  # seconds between two tries, unless the server asks for more


@dataclass
class Endpoint:
    """A server of the chat completions protocol and how it is asked.

    Attributes:
        url: where it listens, with ``/v1`` or a path of its own or without; ``/chat/completions`` is added.
        model: the name by which the server knows the model.
        key_variable: environment variable that holds the key; none is sent where it is not set.
        workers: requests under way at once.
        per_minute: most requests begun in a minute; None sets no limit.
        tries: tries of one request before the run gives up.
        timeout: seconds that one try may take.
        wait: seconds before the second try; each later one waits twice as long, or as long as the server says.

    Raises:
        ValueError: no http address, or a number out of range.

    Examples:
        >>> from alignguard.drift import Endpoint
        >>> Endpoint("http://localhost:8000", "my-model").address
        'http://localhost:8000/v1/chat/completions'
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    workers: int = 4
    per_minute: float | None = None
    tries: int = 6
    timeout: float = 120.0
    wait: float = 1.0

    def __post_init__(self) -> None:
        self._begun, self._turn = 0.0, threading.Lock()
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"endpoint {self.url!r} is no http address, such as http://localhost:8000/v1")
        for name in ("workers", "tries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.per_minute is not None and not self.per_minute > 0:
            raise ValueError(f"per_minute must be above 0, found {self.per_minute}")

    @property
    def address(self) -> str:
        """Where requests go."""
        base = self.url.rstrip("/")
        if base.endswith("/chat/completions"):
            return base
        return base + ("" if urlsplit(base).path else "/v1") + "/chat/completions"

    def answer(self, prompt: str, max_new_tokens: int, system: str | None = None) -> str:
        """The greedy answer to one user message.

        Args:
            prompt: the message.
            max_new_tokens: longest answer in tokens.
            system: system prompt before it; None sends none.

        Raises:
            ConnectionError: no answer after every try.
            ValueError: the server refuses the request, or its answer is not of the protocol.
        """
        led = [] if system is None else [{"role": "system", "content": system}]
        body = {
            "model": self.model,
            "messages": [*led, {"role": "user", "content": prompt}],
            "max_tokens": max_new_tokens,
            "temperature": 0.0,
        }
        said = self._post(json.dumps(body).encode())
        try:
            content = json.loads(said)["choices"][0]["message"].get("content")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.address} gave no chat completion: {said[:200]!r}") from error
        if isinstance(content, list):
            content = "".join(part.get("text", "") for part in content if isinstance(part, dict))
        # A server may cut an emoji in half; what is left of it is shown as a decoder of UTF-8 would.
        return str(content or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip()

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        why = ""
        for turn in range(self.tries):
            self._pace()
            asked = None
            try:
                with urlopen(Request(self.address, body, headers), timeout=self.timeout) as response:
                    return bytes(response.read())
            except HTTPError as error:
                why = f"{error.code} {error.reason}: {error.read(300).decode(errors='replace')}"
                if error.code not in AGAIN:
                    raise ValueError(f"{self.address} refuses the request ({why})") from error
                asked = _retry_after(error.headers.get("Retry-After"))
            except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
                why = str(getattr(error, "reason", error)) or type(error).__name__
            if turn + 1 < self.tries:
                time.sleep(asked if asked is not None else min(self.wait * 2**turn, LONGEST_WAIT))
        raise ConnectionError(f"{self.address} gave no answer in {self.tries} tries ({why})")

    def _pace(self) -> None:
        """Wait for this request's turn where only so many may begin in a minute."""
        if self.per_minute is None:
            return
        with self._turn:
            now = time.monotonic()
            self._begun = max(now, self._begun + 60.0 / self.per_minute)
            pause = self._begun - now
        time.sleep(max(pause, 0.0))


def _retry_after(header: str | None) -> float | None:
    """Seconds that a server asks for: a number, or a date."""
    if not header:
        return None
    try:
        return max(float(header), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(header).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return None


def driftcheck_endpoint(
    endpoint: Endpoint,
    prompts: Prompts | None = None,
    *,
    judge: Judge | None = None,
    system: str | None = None,
    limit: int | None = None,
    max_new_tokens: int = 32,
    capability_tokens: int = 128,
    progress: bool = False,
    resume: str | Path | None = None,
    overwrite: bool = False,
) -> DriftReport:
    """DriftCheck of a served model: what :func:`alignguard.driftcheck` finds, as far as answers alone tell it.

    Temperature is 0 and the chat template is the server's own. Drift in nats, task scores and likelihoods need the weights.

    Args:
        endpoint: server that is asked.
        prompts: None for the packaged set, a JSONL path, or rows (see :func:`alignguard.drift.load_prompts`).
        judge: who gives the verdicts; the rules where left out.
        system: system prompt sent before every prompt; the report states it. None sends none.
        limit: keep only so many prompts of each category, evenly spaced over it.
        max_new_tokens: longest answer in tokens.
        capability_tokens: longest answer in tokens to a capability prompt.
        progress: show a bar.
        resume: JSONL file that takes every answer as it comes; a run that broke off goes on from it.
        overwrite: begin a resume file of another run anew in place of refusing it.

    Returns:
        DriftReport: a row for each prompt.

    Raises:
        ConnectionError: the server gives no answer; those that came are kept in ``resume``.
        FileNotFoundError, TypeError, ValueError: bad prompts, an empty system prompt, a request that the server refuses, or a resume file of another
            run.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("capability_tokens", capability_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, found {value}")
    rows = load_prompts(prompts, limit)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "endpoint": endpoint.address, "model": endpoint.model}
    if any(row["category"] == "capability" for row in rows):
        settings["capability_tokens"] = capability_tokens
    if system is not None:
        check_system(system)
        check_text(system, "system")
        settings["system"] = system
    answers = Answers(resume, asked_digest(rows, settings).hexdigest() if resume is not None else "", overwrite)
    left = [row for row in rows if row["id"] not in answers.known]

    def ask(row: dict[str, Any]) -> str:
        room = capability_tokens if row["category"] == "capability" else max_new_tokens
        return endpoint.answer(row["prompt"], room, system)

    bar = tqdm(total=len(rows), initial=len(rows) - len(left), desc="driftcheck", unit="prompt", disable=not progress)
    with bar, ThreadPoolExecutor(endpoint.workers) as pool:
        waiting = {pool.submit(ask, row): row["id"] for row in left}
        try:
            for done in as_completed(waiting):
                answers.add({waiting[done]: done.result()})
                bar.update()
        except BaseException as error:
            for future in waiting:
                future.cancel()
            for future in wait(waiting).done:  # what was under way may be answered still, and is kept too
                asked = waiting[future]
                if asked not in answers.known and not future.cancelled() and future.exception() is None:
                    answers.add({asked: future.result()})
            if isinstance(error, ConnectionError):
                kept = (
                    ""
                    if resume is None
                    else f"; {len(answers.known)} of {len(rows)} answers are kept, ask again to go on"
                )
                raise ConnectionError(f"{error}{kept}") from error
            raise
    return DriftReport(judged_rows(rows, [answers.known[row["id"]] for row in rows], judge, settings), settings)
