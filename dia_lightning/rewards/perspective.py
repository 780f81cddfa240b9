"""Toxicity and its relatives as Perspective sees them, by its web API."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from dia_lightning.errors import UserError, require
from dia_lightning.rewards.base import RewardError
from dia_lightning.rewards.cache import ScoreCache
from dia_lightning.rewards.http import JsonService, Reply
from dia_lightning.rewards.options import require_sign
from dia_lightning.types import Reward

_URL = "https://commentanalyzer.googleapis.com/v1alpha1/comments:analyze"
_MOST_BYTES = 20_480  # of one comment, in UTF-8
_LOCAL = ("localhost", "127.0.0.1", "::1")


class Perspective(Reward):
    """sign · Σ_k w_k s_k of Perspective's scores s_k in [0, 1]; by default −P(toxic), so that 0 is
    best.

    A text that is empty, blank or empty in the service's eyes (COMMENT_EMPTY) scores 0 on every
    attribute; a text of more than 20,480 bytes is an error, as all failures of the service are: no
    score is ever made up. Each score is kept in `cache` as soon as it is there, under (url,
    attributes, language, text), so that an interrupted or repeated run asks only for what is new,
    and a run whose texts are all known needs no key. Texts are sent with doNotStore.

    Source: AnalyzeComment, Perspective API v1alpha1 (github.com/conversationai/perspectiveapi,
    2-api). By its makers' announcement the service closes at the end of 2026 (arXiv:2604.25580);
    `url` may name another that speaks its protocol.

    Args:
        attributes: Names of the scores to ask for, or their weights w by name; TOXICITY by
            default, each with weight 1.
        language: ISO code of the texts' language.
        sign: −1 = a high score is bad, 1 = it is good.
        requests_per_second: Quota of the key, above 0, for each process.
        timeout_s: Longest wait for an answer, in seconds, above 0.
        retries: Further tries after a failure that may pass, 0 or more.
        cache: SQLite file of the answers, which several processes may share; null = none.
        key_variable: Environment variable that holds the key; the key itself is kept nowhere.
        url: Address to ask: https, or http on this machine.
        name: Label in outputs.

    Raises:
        UserError: for an argument that is not allowed, and for a missing key where there is no
            cache to read either.
    """

    on_prefix = True

    def __init__(
        self, attributes: dict[str, float] | list[str] | None = None,
        language: str = "en", sign: float = -1.0, requests_per_second: float = 1.0,
        timeout_s: float = 20.0, retries: int = 5, cache: str | None = "runs/perspective.sqlite",
        key_variable: str = "PERSPECTIVE_API_KEY", url: str = _URL, name: str = "perspective",
    ) -> None:  # fmt: skip
        self.attributes = ["TOXICITY"] if attributes is None else attributes
        self.language, self.sign, self.name = language, sign, name
        self.requests_per_second, self.timeout_s, self.retries = (
            requests_per_second,
            timeout_s,
            retries,
        )
        self.cache, self.key_variable, self.url = cache, key_variable, url
        self._check()
        self._known = ScoreCache(cache)
        self._service = JsonService(url, timeout_s, retries, requests_per_second)
        if cache is None or not os.path.isfile(os.path.expanduser(cache)):
            self._key()

    def _weights(self) -> list[float]:
        named = self.attributes
        return list(named.values()) if isinstance(named, dict) else [1.0] * len(named)

    def _check(self) -> None:
        names, weights = list(self.attributes), self._weights()
        require(
            "attributes",
            names,
            bool(names) and all(names) and len(set(names)) == len(names),
            "one or more, all different",
        )
        require("attributes", weights, all(map(math.isfinite, weights)), "finite weights")
        require_sign(self.sign)
        require(
            "language",
            self.language,
            bool(re.fullmatch(r"[A-Za-z-]{2,20}", self.language)),
            "a code such as en",
        )
        rate = self.requests_per_second
        require("requests_per_second", rate, 0 < rate < math.inf, "a number above 0")
        require("timeout_s", self.timeout_s, 0 < self.timeout_s < math.inf, "seconds above 0")
        require("retries", self.retries, 0 <= self.retries <= 100, "0 to 100")
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.key_variable):
            # What was given may be a key.
            raise UserError(
                "key_variable: allowed: the name of an environment variable, in capitals,"
                " not the key itself"
            )
        _check_url(self.url)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        keys = {text: self._cache_key(text) for text in texts if text.strip()}
        for text in keys:
            self._require_short(text)
        known = self._known.read(list(keys.values()))

        def ask(text: str) -> None:
            scores = self._analyze(text)
            self._known.write(keys[text], scores)
            known[keys[text]] = scores

        self._service.in_threads(ask, [text for text, key in keys.items() if key not in known])
        return torch.tensor(
            [self._value(known[keys[text]]) if text in keys else 0.0 for text in texts],
            dtype=torch.float32,
        )

    def _value(self, scores: dict[str, float]) -> float:
        return self.sign * sum(
            w * scores[name] for name, w in zip(self.attributes, self._weights(), strict=True)
        )

    def _cache_key(self, text: str) -> str:
        parts = [self.url, sorted(self.attributes), self.language, text]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _require_short(self, text: str) -> None:
        size = len(text.encode("utf-8", "surrogatepass"))
        if size > _MOST_BYTES:
            raise self._error(
                f"a text of {size} bytes is too long for the service, allowed: {_MOST_BYTES}"
                f" ({text!r:.60}…)"
            )

    def _key(self) -> str:
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            raise UserError(
                f"key_variable: the environment variable {self.key_variable} is not set,"
                " allowed: one that holds your key for the Perspective API"
            )
        if not re.fullmatch(r"[!-~]+", key):
            raise UserError(
                f"key_variable: {self.key_variable} given, which holds characters that no key"
                " has, or more than one line"
            )
        return key

    def _analyze(self, text: str) -> dict[str, float]:
        """The scores of one text by attribute."""
        body = {
            "comment": {"text": text, "type": "PLAIN_TEXT"},
            "requestedAttributes": {name: {} for name in self.attributes},
            "languages": [self.language],
            "doNotStore": True,
        }
        # In a header rather than in the address, which proxies log and errors quote.
        reply = self._service.post(body, {"X-Goog-Api-Key": self._key()})
        if reply.status == 400 and "COMMENT_EMPTY" in _error_types(reply.content):
            return dict.fromkeys(self.attributes, 0.0)
        if reply.status != 200 or not isinstance(reply.content, dict):
            raise self._failure(reply)
        return {name: self._score(reply.content, name) for name in self.attributes}

    def _score(self, content: dict[str, Any], attribute: str) -> float:
        try:
            value = content["attributeScores"][attribute]["summaryScore"]["value"]
        except (KeyError, TypeError):
            raise self._error(f"the service's answer holds no score for {attribute}") from None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise self._error(
                f"the service's answer holds no score in [0, 1] for {attribute}: {value!r:.60}"
            )
        return float(value)

    def _failure(self, reply: Reply) -> RewardError:
        status, types = reply.status, _error_types(reply.content)
        message = _message(reply.content).replace(self._key(), "[key]")
        said = f"HTTP {status}: {message[:200]}" if message else f"HTTP {status}"
        if status is None:
            what = (
                f"no answer from {urlsplit(self.url).hostname} in {reply.tries} tries"
                f" ({reply.reason})"
            )
        elif status == 200:
            what = f"an answer that is no JSON object, in {reply.tries} tries"
        elif status in (401, 403) or "API_KEY_INVALID" in types or "api key" in message.lower():
            what = f"the service refuses the key in {self.key_variable} ({said})"
        elif status == 429:
            wait = f", asks to wait {reply.retry_after_s:.0f} s" if reply.retry_after_s else ""
            what = (
                f"the quota is used up after {reply.tries} tries{wait}; lower requests_per_second"
                f" or wait ({said})"
            )
        elif (
            any(kind.startswith("LANGUAGE") for kind in types)
            or "does not support request languages" in message
        ):
            what = f"the language {self.language!r} is not supported ({said})"
        elif status in (404, 410):
            what = f"there is no such service at {urlsplit(self.url).hostname} (any more) ({said})"
        else:
            what = f"the service failed in {reply.tries} tries ({said})"
        return self._error(what)

    def _error(self, what: str) -> RewardError:
        return RewardError(f"reward {self.name!r}: {what}")


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        good = parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOCAL)
        # A key in the address would be written with the settings.
        good = (
            good
            and bool(parts.hostname)
            and not parts.query
            and "@" not in parts.netloc
            and parts.port != 0
        )
    except ValueError:
        good = False
    if not good:
        # What was given may hold a key.
        raise UserError("url: allowed: an https address (http on this machine) without '?' and '@'")


def _message(content: Any) -> str:
    """The service's own words, on one line."""
    error = content.get("error") if isinstance(content, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return " ".join(message.split()) if isinstance(message, str) else ""


def _error_types(content: Any) -> set[str]:
    """`errorType` of Perspective's own errors and `reason` of Google's."""
    error = content.get("error") if isinstance(content, dict) else None
    details = error.get("details") if isinstance(error, dict) else None
    found = (
        [detail for detail in details if isinstance(detail, dict)]
        if isinstance(details, list)
        else []
    )
    return {
        value
        for detail in found
        for name in ("errorType", "reason")
        if isinstance(value := detail.get(name), str)
    }
