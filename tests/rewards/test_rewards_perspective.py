"""`Perspective` against a server on this machine that speaks the documented protocol and misbehaves
on demand.

Time is a number that `sleep` moves on, so that waits are checked exactly and cost nothing.
"""

from __future__ import annotations

import copy
import json
import logging
import multiprocessing
import pickle
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from dia_lightning.callbacks.run_key import describe
from dia_lightning.errors import UserError
from dia_lightning.rewards import Perspective, check_reward
from dia_lightning.rewards.base import RewardError
from dia_lightning.rewards.cache import ScoreCache

KEY = "AIzaSy-a-secret-that-nobody-may-see"
PATH = "/v1alpha1/comments:analyze"
Behaviour = Callable[["Handler", dict[str, Any]], None]


def score(text: str, attribute: str) -> float:
    """Any function of a text that tells texts and attributes apart."""
    return (sum(map(ord, text)) + 7 * len(attribute)) % 101 / 101


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        service: Service = self.server.service  # type: ignore[attr-defined]
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        service.requests.append((self.path, dict(self.headers), body))
        behave = service.plan.pop(0) if service.plan else answer
        behave(self, body)

    def reply(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Service:
    """The server, what it was asked, and how it is to answer the next requests."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.plan: list[Behaviour] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.service = self  # type: ignore[attr-defined]
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}{PATH}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def texts(self) -> list[str]:
        return [body["comment"]["text"] for _, _, body in self.requests]


def answer(handler: Handler, body: dict[str, Any]) -> None:
    """What the documentation shows for AnalyzeComment."""
    scores = {
        name: {
            "spanScores": [
                {"begin": 0, "end": 1, "score": {"value": 0.123, "type": "PROBABILITY"}}
            ],
            "summaryScore": {"value": score(body["comment"]["text"], name), "type": "PROBABILITY"},
        }
        for name in body["requestedAttributes"]
    }
    handler.reply(
        200,
        {"attributeScores": scores, "languages": body["languages"], "detectedLanguages": ["en"]},
    )


def says(
    status: int, message: str = "", headers: dict[str, str] | None = None, **detail: str
) -> Behaviour:
    content = {"error": {"code": status, "message": message, "status": "X", "details": [detail]}}
    return lambda handler, body: handler.reply(status, content, headers)


def sends(content: object) -> Behaviour:
    return lambda handler, body: handler.reply(200, content)


def drop(handler: Handler, body: dict[str, Any]) -> None:
    handler.close_connection = True
    handler.connection.close()


def break_off(handler: Handler, body: dict[str, Any]) -> None:
    handler.reply(200, b'{"attributeScores": {"TOX', {"Content-Length": "5000"})
    handler.close_connection = True


def hang(handler: Handler, body: dict[str, Any]) -> None:
    threading.Event().wait(1)
    handler.close_connection = True


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv("PERSPECTIVE_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "*")
    it = Service()
    yield it
    it.server.shutdown()
    it.server.server_close()


class Time:
    def __init__(self, reward: Perspective) -> None:
        self.now, self.waits = 0.0, []
        reward._service.clock, reward._service.sleep = lambda: self.now, self.sleep

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.waits.append(seconds)


def make(service: Service, tmp_path: Path, **options: Any) -> tuple[Perspective, Time]:
    reward = Perspective(
        **{"url": service.url, "cache": str(tmp_path / "cache.sqlite"), "timeout_s": 5.0, **options}
    )
    return reward, Time(reward)


def expected(texts: list[str], *attributes: str) -> torch.Tensor:
    return torch.tensor(
        [[score(text, name) for name in attributes] for text in texts], dtype=torch.float32
    )


def test_the_request_is_the_documented_one(service: Service, tmp_path: Path) -> None:
    reward, _ = make(service, tmp_path, attributes=["TOXICITY", "INSULT"], language="es")
    reward(["Hola, señor."])
    ((path, headers, body),) = service.requests
    assert path == PATH
    assert headers["X-Goog-Api-Key"] == KEY
    assert headers["Content-Type"] == "application/json"
    assert body == {
        "comment": {"text": "Hola, señor.", "type": "PLAIN_TEXT"},
        "requestedAttributes": {"TOXICITY": {}, "INSULT": {}}, "languages": ["es"],
        "doNotStore": True,
    }  # fmt: skip


def test_the_reward_is_the_signed_weighted_sum_of_the_scores(
    service: Service, tmp_path: Path
) -> None:
    texts = ["One text.", "Another.", "One text.", "", "  \n"]
    scores = expected(texts, "TOXICITY", "INSULT")
    scores[3:] = 0
    plain, _ = make(service, tmp_path)
    torch.testing.assert_close(plain(texts), -scores[:, 0], rtol=0, atol=1e-6)
    assert service.texts == ["One text.", "Another."]
    weighted, _ = make(service, tmp_path, attributes={"TOXICITY": 0.25, "INSULT": 2.0}, sign=1)
    torch.testing.assert_close(
        weighted(texts), 0.25 * scores[:, 0] + 2 * scores[:, 1], rtol=0, atol=1e-6
    )
    check_reward(plain)
    assert plain([]).shape == (0,)


def test_a_rerun_costs_nothing_and_needs_no_key(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dia_lightning.rewards.cache._AT_ONCE", 7)
    texts = [f"Text {i}." for i in range(20)]
    first, _ = make(service, tmp_path, requests_per_second=1e9)
    values = first(texts)
    assert len(service.requests) == 20
    monkeypatch.delenv("PERSPECTIVE_API_KEY")
    again, _ = make(service, tmp_path)
    torch.testing.assert_close(again(texts[::-1]).flip(0), values, rtol=0, atol=0)
    assert len(service.requests) == 20
    with pytest.raises(
        UserError, match="key_variable: the environment variable PERSPECTIVE_API_KEY is not set"
    ):
        again([*texts, "A new one."])


@pytest.mark.parametrize(
    "change",
    [{"language": "fr"}, {"attributes": ["INSULT"]}, {"attributes": ["TOXICITY", "INSULT"]}],
)
def test_the_cache_tells_apart_what_the_service_is_asked(
    service: Service, tmp_path: Path, change: dict[str, Any]
) -> None:
    make(service, tmp_path)[0](["A text."])
    make(service, tmp_path, **change)[0](["A text."])
    assert len(service.requests) == 2


def test_without_a_cache_nothing_is_written(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reward, _ = make(service, tmp_path, cache=None)
    assert torch.equal(reward(["A text."]), reward(["A text."]))
    assert len(service.requests) == 2
    assert list(tmp_path.iterdir()) == []


TRANSIENT = [
    says(429),
    says(500),
    says(503),
    says(408),
    drop,
    break_off,
    sends(b"<html>busy</html>"),
    sends(b""),
]


@pytest.mark.parametrize("fault", TRANSIENT)
def test_what_may_pass_is_asked_again(service: Service, tmp_path: Path, fault: Behaviour) -> None:
    reward, time = make(service, tmp_path, requests_per_second=1e9)
    service.plan = [fault, fault, fault]
    torch.testing.assert_close(reward(["A text."]), -expected(["A text."], "TOXICITY")[:, 0])
    assert len(service.requests) == 4
    # 2^n s and less than a second more.
    assert [int(wait) for wait in time.waits] == [1, 2, 4]


def test_a_slow_service_is_asked_again(service: Service, tmp_path: Path) -> None:
    reward, _ = make(service, tmp_path, timeout_s=0.1)
    service.plan = [hang]
    assert reward(["A text."]).shape == (1,)
    assert len(service.requests) == 2


@pytest.mark.parametrize("fault", [*TRANSIENT, hang])
def test_what_does_not_pass_is_an_error_and_never_a_score(
    service: Service, tmp_path: Path, fault: Behaviour
) -> None:
    reward, _ = make(service, tmp_path, retries=1, timeout_s=0.1 if fault is hang else 5.0)
    service.plan = [fault, fault]
    with pytest.raises(RewardError, match=r"^reward 'perspective': .* 2 tries") as caught:
        reward(["A text."])
    assert "\n" not in str(caught.value)
    assert len(service.requests) == 2


def test_the_pace_is_kept_and_waits_grow_no_longer_than_a_minute(
    service: Service, tmp_path: Path
) -> None:
    reward, time = make(service, tmp_path, requests_per_second=0.5)
    reward([f"Text {i}." for i in range(4)])
    assert time.waits == [2.0, 2.0, 2.0]
    slow, time = make(service, tmp_path, retries=9, requests_per_second=1e9)
    service.plan = [says(500)] * 9
    slow(["Another."])
    assert [int(wait) for wait in time.waits] == [1, 2, 4, 8, 16, 32, 64, 64, 64]


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_honoured(service: Service, tmp_path: Path, as_date: bool) -> None:
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=37.9), usegmt=True)
    reward, time = make(service, tmp_path)
    service.plan = [says(429, headers={"Retry-After": date if as_date else "37"})]
    reward(["A text."])
    (wait,) = time.waits
    assert 35 < wait <= 38


@pytest.mark.parametrize("header", ["soon", "-3", "", "Thu, 99 Foo 2020", "²", "0"])
def test_a_retry_after_that_says_nothing_is_passed_over(
    service: Service, tmp_path: Path, header: str
) -> None:
    reward, time = make(service, tmp_path)
    service.plan = [
        lambda handler, body: handler.reply(
            429, {}, {"Retry-After": header.encode().decode("latin-1")}
        )
    ]
    reward(["A text."])
    assert [int(wait) for wait in time.waits] == [1]


def test_a_service_that_asks_for_hours_is_not_waited_for(service: Service, tmp_path: Path) -> None:
    reward, time = make(service, tmp_path)
    service.plan = [says(429, "Quota exceeded for the day.", {"Retry-After": "7200"})]
    with pytest.raises(
        RewardError,
        match=r"quota is used up after 1 tries, asks to wait 7200 s.*Quota exceeded for the day",
    ):
        reward(["A text."])
    assert time.waits == []


ERRORS = [
    (says(400, "API key not valid. Please pass a valid API key.", reason="API_KEY_INVALID"),
     "refuses the key in PERSPECTIVE_API_KEY .HTTP 400: API key not valid"),
    (says(403, f"Permission denied: Consumer 'api_key:{KEY}' has been suspended."),
     r"refuses the key in PERSPECTIVE_API_KEY .HTTP 403: .*'api_key:\[key\]'"),
    (says(401), "refuses the key in PERSPECTIVE_API_KEY .HTTP 401"),
    (says(400, "Attribute TOXICITY does not support request languages: en",
      errorType="LANGUAGE_NOT_SUPPORTED_BY_ATTRIBUTE"),
     "the language 'en' is not supported .HTTP 400: Attribute TOXICITY"),
    (says(400, "Attribute TOXICITY does not support request languages: en"),
     "the language 'en' is not supported"),
    (says(400, "Unknown requested attribute: TOXICITY"),
     "failed in 1 tries .HTTP 400: Unknown requested"),
    (says(404), "no such service at 127.0.0.1"),
    (says(410, "Gone"), "no such service at 127.0.0.1"),
    (says(302, headers={"Location": "http://127.0.0.1:9/elsewhere"}), "HTTP 302"),
    (says(418, "line\nbreak\t\0"), "HTTP 418: line break"),
    (sends({}), "holds no score for TOXICITY"),
    (sends({"languages": ["en"]}), "holds no score for TOXICITY"),
    (sends({"attributeScores": {"INSULT": {}}}), "holds no score for TOXICITY"),
    (sends({"attributeScores": {"TOXICITY": {"summaryScore": None}}}),
     "holds no score for TOXICITY"),
    *((sends({"attributeScores": {"TOXICITY": {"summaryScore": {"value": value}}}}),
      r"no score in \[0, 1\] for TOXICITY")
      for value in (None, "0.5", True, -0.1, 1.5, float("nan"), [])),
    (sends(["a list"]), "no JSON object"),
    (lambda handler, body: handler.reply(400, ["a list"]), "HTTP 400"),
    (lambda handler, body: handler.reply(400, {"error": "a string"}), "HTTP 400"),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "message"), ERRORS)
def test_other_failures_are_told_in_one_line_at_once(
    service: Service,
    tmp_path: Path,
    fault: Behaviour,
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    reward, time = make(service, tmp_path)
    service.plan = [fault]
    with pytest.raises(RewardError, match=rf"^reward 'perspective': .*{message}[^\n]*$") as caught:
        reward(["A text."])
    assert len(service.requests) == 1
    assert time.waits == []
    assert KEY not in "".join(traceback.format_exception(caught.value))
    assert KEY not in caplog.text


def test_what_the_service_calls_empty_scores_zero(service: Service, tmp_path: Path) -> None:
    reward, _ = make(service, tmp_path)
    service.plan = [says(400, "Comment must be non-empty.", errorType="COMMENT_EMPTY")]
    assert reward(["\u200b"]).item() == 0
    assert reward(["\u200b"]).item() == 0
    assert len(service.requests) == 1


@pytest.mark.parametrize("threads", [1, 8])
def test_an_error_ends_the_batch_and_what_is_finished_stays(
    service: Service, tmp_path: Path, threads: int
) -> None:
    texts = [f"Text {i}." for i in range(40)]
    reward, _ = make(service, tmp_path, requests_per_second=threads)
    service.plan = [answer] * 10 + [says(400, "Bad.")]
    with pytest.raises(RewardError, match="Bad"):
        reward(texts)
    asked = len(service.requests)
    assert 11 <= asked < 30
    again, _ = make(service, tmp_path, requests_per_second=threads)
    torch.testing.assert_close(again(texts), -expected(texts, "TOXICITY")[:, 0], rtol=0, atol=1e-6)
    assert len(service.requests) == asked + 40 - (asked - 1)


def test_threads_share_the_pace(service: Service, tmp_path: Path) -> None:
    """With the clock stopped, the waits are each request's place in the line."""
    reward, _ = make(service, tmp_path, requests_per_second=8)
    turns: list[float] = []
    reward._service.sleep = turns.append
    reward([f"Text {i}." for i in range(32)])
    assert sorted(turns) == pytest.approx([i / 8 for i in range(1, 32)])


def test_an_error_wakes_those_that_wait_for_another_try(service: Service) -> None:
    """Time is real here: one thread is told to wait 500 s, then the other one's request is
    refused.
    """

    def busy(handler: Handler, body: dict[str, Any]) -> None:
        threading.Event().wait(0.1)
        handler.reply(429, {}, {"Retry-After": "500"})

    reward = Perspective(url=service.url, cache=None, requests_per_second=8)
    service.plan = [busy, says(400, "Bad.")]
    start = time.monotonic()
    with pytest.raises(RewardError, match="Bad"):
        reward(["One.", "Two."])
    assert time.monotonic() - start < 100
    assert len(service.requests) == 2


def test_the_key_is_nowhere_but_in_the_header(
    service: Service, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    reward, _ = make(service, tmp_path)
    service.plan = [says(429), answer]
    reward(["A text."])
    seen = [
        repr(reward),
        repr(vars(reward)),
        repr(vars(reward._service)),
        json.dumps(describe(reward)),
        caplog.text,
    ]
    data = [pickle.dumps(reward), *(path.read_bytes() for path in tmp_path.iterdir())]
    assert len(data) == 2
    assert all(KEY not in text for text in seen)
    assert all(KEY.encode() not in text for text in data)
    _, headers, body = service.requests[0]
    assert [name for name, value in headers.items() if KEY in value] == ["X-Goog-Api-Key"]
    assert KEY not in json.dumps(body)


def test_a_lost_connection_does_not_show_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERSPECTIVE_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "*")
    with Service().server as closed:
        url = f"http://127.0.0.1:{closed.server_address[1]}/"
        closed.shutdown()
    reward = Perspective(url=url, cache=None, retries=0)
    with pytest.raises(
        RewardError, match=r"no answer from 127.0.0.1 in 1 tries \(ConnectionError\)"
    ) as caught:
        reward(["A text."])
    assert KEY not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("key", ["", "  ", "two\nlines", "two words", "kéy"])
def test_a_key_that_cannot_be_one_is_refused_unseen(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("MY_KEY", key)
    with pytest.raises(UserError, match=r"^key_variable: .*MY_KEY") as caught:
        make(service, tmp_path, key_variable="MY_KEY")
    assert not key.strip() or key not in str(caught.value)
    assert service.requests == []


def test_a_reward_is_copied_and_pickled(service: Service, tmp_path: Path) -> None:
    reward, _ = make(service, tmp_path)
    reward(["A text."])
    for other in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):
        assert torch.equal(other(["A text."]), reward(["A text."]))
    assert len(service.requests) == 1


def fill(path: str, name: str) -> None:
    cache = ScoreCache(path)
    for i in range(40):
        cache.write(f"{name} {i}", {"TOXICITY": i / 40})
        cache.write(f"both {i}", {"TOXICITY": 0.5})


def test_two_processes_share_a_cache(tmp_path: Path) -> None:
    path, fork = str(tmp_path / "new" / "cache.sqlite"), multiprocessing.get_context("fork")
    processes = [fork.Process(target=fill, args=(path, name)) for name in ("one", "two")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    found = ScoreCache(path).read(
        [f"{name} {i}" for name in ("one", "two", "both", "none") for i in range(40)]
    )
    assert len(found) == 120
    assert found["two 30"] == {"TOXICITY": 0.75}


ODD = [
    "😀👍🏽",
    "\0\0",
    "Привет",
    "你好，世界",
    "مرحبا",
    "\ud800",
    "a\r\n\tb",
    '"quoted\\"',
    "é" * 10_240,
]


def test_odd_texts_arrive_as_they_are(service: Service, tmp_path: Path) -> None:
    reward, _ = make(service, tmp_path)
    torch.testing.assert_close(reward(ODD), -expected(ODD, "TOXICITY")[:, 0], rtol=0, atol=1e-6)
    assert service.texts == ODD
    assert torch.equal(reward(ODD), make(service, tmp_path)[0](ODD))
    assert len(service.requests) == len(ODD)


@pytest.mark.parametrize("text", ["a" * 100_000, "é" * 10_240 + "a"])
def test_a_text_over_the_limit_is_an_error_before_anything_is_asked(
    service: Service, tmp_path: Path, text: str
) -> None:
    reward, _ = make(service, tmp_path)
    with pytest.raises(
        RewardError,
        match=f"a text of {len(text.encode())} bytes is too long for the service, allowed: 20480",
    ):
        reward(["Short.", text])
    assert service.requests == []


@pytest.mark.parametrize(
    "broken", ["not a database, and long enough to be seen as such" * 40, None]
)
def test_a_cache_that_cannot_be_used_is_named(
    service: Service, tmp_path: Path, broken: str | None
) -> None:
    path = tmp_path / "cache.sqlite"
    path.mkdir() if broken is None else path.write_text(broken)
    reward, _ = make(service, tmp_path)
    with pytest.raises(UserError, match=r"^cache: .* cannot be used as a cache"):
        reward(["A text."])


@pytest.mark.parametrize(
    "options",
    [
        {"attributes": []}, {"attributes": ["TOXICITY", "TOXICITY"]}, {"attributes": [""]},
        {"attributes": {"TOXICITY": float("nan")}}, {"sign": 0.5}, {"language": ""},
        {"language": "e n"}, {"requests_per_second": 0}, {"requests_per_second": float("nan")},
        {"timeout_s": 0}, {"retries": -1}, {"key_variable": KEY}, {"key_variable": ""},
        {"url": "http://example.org/"}, {"url": f"https://example.org/?key={KEY}"},
        {"url": f"https://{KEY}@example.org/"}, {"url": "ftp://example.org"}, {"url": "https://"},
        {"url": "https://a:b/"}, {"url": ""},
    ],
)  # fmt: skip
def test_arguments_that_are_not_allowed(
    service: Service, tmp_path: Path, options: dict[str, Any]
) -> None:
    (name,) = options
    with pytest.raises(UserError, match=rf"^{name}: [^\n]*allowed: [^\n]*$") as caught:
        make(service, tmp_path, **options)
    assert KEY not in str(caught.value)
