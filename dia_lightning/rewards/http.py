"""One web service: its pace, and what is worth asking again."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, TypeVar

from dia_lightning import progress

Item = TypeVar("Item")

_MOST_THREADS = 16
_LONGEST_BACKOFF_S = 64.0
_LONGEST_WAIT_S = 600.0


class Reply(NamedTuple):
    """status: HTTP's, None where no answer came; content: the answer's JSON, None where it is none;
    reason: what went wrong on the way, in a word; tries: requests made; retry_after_s: how long the
    service asks to be left alone.
    """

    status: int | None
    content: Any = None
    reason: str = ""
    tries: int = 1
    retry_after_s: float = 0.0


class Stopped(Exception):
    """The batch that this request belongs to has failed already."""


class JsonService:
    """POSTs JSON to one address.

    All threads together make at most `requests_per_second`. No answer in `timeout_s`, a lost
    connection, an answer that breaks off, 408, 429 and 5xx are asked again up to `retries` times,
    after min(2^n, 64) s and up to 1 s more (Google's truncated exponential back-off), or later
    where Retry-After says so; who has to wait, all wait. A wait of more than ten
    minutes is not begun. Redirections are not followed: the headers may hold a key.
    """

    def __init__(
        self, url: str, timeout_s: float, retries: int, requests_per_second: float
    ) -> None:
        self.url, self.timeout_s, self.retries, self.requests_per_second = (
            url,
            timeout_s,
            retries,
            requests_per_second,
        )
        self.clock: Callable[[], float] = time.monotonic
        self._stop = threading.Event()
        self.sleep: Callable[[float], object] = self._stop.wait
        self._lock = threading.Lock()
        self._next_turn = -math.inf
        self._sessions = threading.local()

    def __reduce__(self) -> Any:  # locks are not copied
        return JsonService, (self.url, self.timeout_s, self.retries, self.requests_per_second)

    def in_threads(self, work: Callable[[Item], object], items: Sequence[Item]) -> None:
        """Call `work`, which posts, for every item; the first error ends what has not been begun
        and is raised.
        """
        self._stop.clear()
        threads = min(_MOST_THREADS, math.ceil(self.requests_per_second), len(items))
        pool = ThreadPoolExecutor(max(1, threads))
        try:
            waiting = [pool.submit(work, item) for item in items]
            for done in progress.bar("rewards", len(waiting), as_completed(waiting)):
                done.result()
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)
            self._stop.clear()

    def post(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Reply:
        """The answer, or the last of the failures."""
        for tries in range(1, self.retries + 2):
            self._wait_for_turn()
            reply = self._post_once(body, headers)._replace(tries=tries)
            if not _passes(reply) or reply.retry_after_s > _LONGEST_WAIT_S:
                break
            backoff = min(2.0 ** (tries - 1), _LONGEST_BACKOFF_S) + random.random()
            self._hold(max(backoff, reply.retry_after_s))
        return reply

    def _wait_for_turn(self) -> None:
        with self._lock:
            now = self.clock()
            turn = max(now, self._next_turn)
            self._next_turn = turn + 1 / self.requests_per_second
        if turn > now:
            self.sleep(turn - now)
        if self._stop.is_set():
            raise Stopped

    def _hold(self, seconds: float) -> None:
        with self._lock:
            self._next_turn = max(self._next_turn, self.clock() + seconds)

    def _post_once(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Reply:
        import requests

        if not hasattr(self._sessions, "value"):
            self._sessions.value = requests.Session()
        try:
            answer = self._sessions.value.post(
                self.url, json=body, headers=headers, timeout=self.timeout_s, allow_redirects=False
            )
        except requests.RequestException as error:
            return Reply(None, reason=type(error).__name__)  # its text may hold the headers
        try:
            content = answer.json()
        except (ValueError, RecursionError):
            content = None
        return Reply(
            answer.status_code,
            content,
            retry_after_s=_seconds(answer.headers.get("Retry-After", "")),
        )


def _passes(reply: Reply) -> bool:
    """Whether this failure may pass."""
    status = reply.status
    return (
        status is None
        or status in (408, 429)
        or status >= 500
        or (status == 200 and reply.content is None)
    )


def _seconds(retry_after: str) -> float:
    """Retry-After is a number of seconds or a date (RFC 9110, 10.2.3); anything else is 0."""
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        date = parsedate_to_datetime(retry_after)
    except ValueError:
        return 0.0
    return max(
        0.0,
        (
            date.replace(tzinfo=date.tzinfo or timezone.utc) - datetime.now(timezone.utc)
        ).total_seconds(),
    )
