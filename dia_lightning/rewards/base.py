"""How a reward is called, cached and checked; the class to subclass is
`dia_lightning.types.Reward`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from copy import deepcopy
from itertools import islice, zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dia_lightning.errors import UserError
from dia_lightning.numerics import NotFinite, float32_default
from dia_lightning.terminal import one_line
from dia_lightning.types import Record, Reward


class RewardError(UserError):
    """A reward broke one of its laws; the message names the reward, the law and the first text
    that shows it.
    """


class RewardNotFinite(RewardError, NotFinite):
    """The broken law is 'finite'."""


def name_fault(reward: Reward) -> str:
    """What is wrong with the reward's name; "" where nothing is."""
    name = getattr(reward, "name", None)
    if not isinstance(name, str):
        return "sets no `name`, a text that labels its values in every output"
    if not name.strip() or one_line(name) != name:
        return f"is named {name!r}, allowed: visible characters in one line"
    return ""


def reported_names(reward: Reward) -> list[str]:
    """The names under which a run reports the reward: those of its parts, if it has any.

    Raises:
        UserError: if one is no name, two are equal, or one would stand where another figure does.
    """
    part_names: Any = getattr(reward, "part_names", None)
    names = [reward.name] if part_names is None else list(part_names())
    if fault := name_fault(reward):
        raise UserError(f"reward: {type(reward).__name__} {fault}")
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"reward: two parts are reported as {name!r}; rename one")
        if name == "std":
            raise UserError(
                f"reward: the name {name!r} given, allowed: any other; reward_{name} is another"
                " figure"
            )
    return names


def call_reward(
    reward: Reward, texts: Sequence[str], records: Sequence[Record] | None = None
) -> Tensor:
    """`reward(texts)`, (B,) float32 on the CPU, after a look at its type, device, shape and values.

    The reward gets a list of its own, and the texts' records where it is `conditional`. Float32 is
    torch's default meanwhile, whatever the trainer's precision. It may return a tensor or array of
    any type of numbers on any device, or a list or tuple of numbers.

    Raises:
        RewardError: if it raises (naming the first text on which it does so alone), or one of the
            laws 'texts unchanged', 'real numbers', 'one value a text' and 'finite' (as float32) is
            broken.
    """
    given, own = list(texts), [{}] * len(texts) if records is None else list(records)
    try:
        values = _ask(reward, given, own)
    except UserError:
        raise
    except Exception as error:
        raise RewardError(
            f"reward {reward.name!r} failed on {_culprit(reward, texts, own)}: {_reason(error)}"
        ) from error
    _require_unchanged(reward, texts, given)
    given_values = _tensor(reward, values, texts)
    values = given_values.float()
    if values.shape != (len(texts),):
        raise _broken(
            reward,
            "one value a text",
            _batch(texts),
            f"returned shape {tuple(values.shape)}, needed ({len(texts)},)",
        )
    for i in (~torch.isfinite(values)).nonzero()[:1, 0].tolist():
        got = given_values[i].item()
        beyond = ", beyond what float32 holds" if math.isfinite(got) else ""
        raise RewardNotFinite(
            *_broken(reward, "finite", _text(texts[i]), f"returned {got}{beyond}").args
        )
    return values


def _tensor(reward: Reward, values: Any, texts: Sequence[str]) -> Tensor:
    """What the reward returned as a tensor of real numbers on the CPU."""
    try:
        if isinstance(values, list | tuple):
            values = torch.tensor([_number(value) for value in values], dtype=torch.float64)
        elif isinstance(values, np.ndarray) and values.dtype.kind in "biuf":
            values = torch.from_numpy(values.astype(np.float64))
        if isinstance(values, Tensor) and not values.is_complex():
            return values.detach().to("cpu")
        got = f"{type(values).__name__} {getattr(values, 'dtype', '')}".strip()
    except (TypeError, ValueError, OverflowError, RuntimeError, NotImplementedError) as error:
        got = f"{type(values).__name__}, {_reason(error)}"
    raise _broken(reward, "real numbers", _batch(texts), f"returned {got}")


def _number(value: Any) -> float:
    if isinstance(value, str | bytes):
        raise TypeError(f"{value!r:.40} is no number")
    if isinstance(value, Tensor | np.ndarray) and value.ndim:
        raise TypeError(f"an element of shape {tuple(value.shape)} is no number")
    return float(value)


def _ask(reward: Any, texts: list[str], records: Sequence[Record]) -> Any:
    with float32_default():
        return reward(texts, records) if reward.conditional else reward(texts)


def _culprit(reward: Reward, texts: Sequence[str], records: Sequence[Record]) -> str:
    """The first text on which the reward fails alone, or the whole batch."""
    for text, record in zip(texts, records, strict=True):
        try:
            _ask(reward, [text], [record])
        except Exception:
            return _text(text)
    return _batch(texts)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.160}"


def field_of(record: Record, field: str, reward: Reward) -> str:
    """The text in `field` of a record, as a conditional reward reads it.

    Raises:
        RewardError: if the record has no such field or it holds no string.
    """
    value = record.get(field)
    if not isinstance(value, str):
        has = ", ".join(record) or "none"
        raise RewardError(
            f"reward {reward.name!r} needs the field {field!r}, a text, for every prompt (fields"
            f" there: {has})"
        )
    return value


def written_out(records: Sequence[Record]) -> list[str]:
    """Each record as text, equal for equal records; one that several texts share is written
    once.
    """
    written = {id(record): json.dumps(record, sort_keys=True, default=str) for record in records}
    return [written[id(record)] for record in records]


# Different texts that a cache remembers; a sampler that asks for unfinished ones would fill memory.
_MOST_KNOWN = 1 << 18


class CachedReward(Reward):
    """Asks `reward` for each text once in a run, or once in 262,144 different texts; `check_reward`
    belongs on `reward` itself, since a cache hides faults.

    `n_asked`: texts that it was asked for so far, known ones included.

    Args:
        reward: Reward to ask, once for each different text.
    """

    def __init__(self, reward: Reward) -> None:
        self.reward, self.name, self.conditional = reward, reward.name, reward.conditional
        self.on_prefix = reward.on_prefix
        self._known: dict[tuple[str, str], float] = {}
        self.n_asked = 0

    def __call__(self, texts: Sequence[str], records: Sequence[Record] | None = None) -> Tensor:
        self.n_asked += len(texts)
        given = [{}] * len(texts) if records is None or not self.conditional else records
        keys = list(zip(texts, written_out(given), strict=True))
        new = {
            key: record for key, record in zip(keys, given, strict=True) if key not in self._known
        }
        if new:
            values = call_reward(self.reward, [text for text, _ in new], list(new.values()))
            self._known.update(zip(new, values.tolist(), strict=True))
        found = torch.tensor([self._known[key] for key in keys], dtype=torch.float32)
        for key in [*islice(self._known, max(0, len(self._known) - _MOST_KNOWN))]:
            del self._known[key]
        return found


_TEXTS = (
    "The food was lovely.",
    "The food was terrible!",
    "Cheap Italian food near the river.",
    "ΩMEGA, 1 + 1 = 2",
)


def check_reward(
    reward: Reward, texts: Sequence[str] = _TEXTS, records: Sequence[Record] | None = None
) -> None:
    """Run `reward` through the laws that samplers rely on; returns if all hold.

    The laws: those of `call_reward`; 'empty string' and 'empty batch' (shape (0,)) are accepted;
    'records unchanged'; 'deterministic', the same twice; 'any order' of the batch; 'batch = one by
    one'. Equal means to 1e-5, relative where |r| > 1. A reward with `deterministic = False` is
    excused from the last three. One with `on_prefix = True` is asked for beginnings of the texts
    too. A conditional reward is also asked for the first text beside the
    last record, so that one that takes equal texts for one, or another's record, is found.

    Args:
        reward: what to check.
        texts: at least two different ones that are not empty, better some of each kind that the
            reward tells apart.
        records: for a conditional reward the record of each text, at least two different ones.

    Raises:
        RewardError: naming the law and the first text that breaks it.
        ValueError: if there are too few texts or records to tell.
    """
    if not isinstance(reward, Reward) or not isinstance(getattr(reward, "name", None), str):
        raise RewardError(
            f"{type(reward).__name__}: must be a subclass of dia_lightning.types.Reward that sets"
            " `name`"
        )
    records = _records_to_tell(reward, texts, records)
    pairs = [(text, record) for text, record in zip(texts, records, strict=True) if text]
    if len({text for text, _ in pairs}) < 2:
        raise ValueError(
            f"check_reward: at least two different texts that are not empty are needed, got {texts}"
        )
    before = deepcopy(records)
    call_reward(reward, [text for text, _ in pairs], [record for _, record in pairs])
    _require_accepted(reward, [""], "empty string", [records[0]])
    _require_accepted(reward, [], "empty batch", [])
    _check_prefixes(reward, pairs)
    if reward.deterministic:
        _check_equalities(reward, [*pairs, ("", records[0]), (pairs[0][0], pairs[-1][1])])
    for text, record, copy in zip(texts, records, before, strict=True):
        if record != copy:
            raise _broken(
                reward, "records unchanged", _text(text), "the record beside it has changed"
            )


def _check_prefixes(reward: Reward, pairs: list[tuple[str, Record]]) -> None:
    """A declaration that is one, and where it says so beginnings of the texts are accepted."""
    if reward.on_prefix not in (None, True, False):
        raise RewardError(
            f"reward {reward.name!r}: on_prefix = {reward.on_prefix!r}, allowed: True, False, None"
        )
    if reward.on_prefix:
        cut = [(text[: k * len(text) // 4], record) for text, record in pairs for k in (1, 2, 3)]
        texts, records = [text for text, _ in cut], [record for _, record in cut]
        _require_accepted(reward, texts, "unfinished texts", records)


def _records_to_tell(
    reward: Reward, texts: Sequence[str], records: Sequence[Record] | None
) -> list[Record]:
    if not reward.conditional:
        return [{}] * len(texts)
    if (
        records is None
        or len(records) != len(texts)
        or all(record == records[0] for record in records)
    ):
        given = "none" if records is None else f"{len(records)} for {len(texts)} texts"
        raise ValueError(
            f"check_reward: {reward.name!r} needs a record a text, two of them different; given"
            f" {given}"
        )
    return list(records)


def _check_equalities(reward: Reward, pairs: list[tuple[str, Record]]) -> None:
    """The laws that compare two calls, from the weakest to the strongest, so that the message
    names the fault itself.
    """
    texts, records = [text for text, _ in pairs], [record for _, record in pairs]
    values = call_reward(reward, texts, records)
    _require_equal(reward, "deterministic", texts, values, call_reward(reward, texts, records))
    _require_equal(
        reward, "any order", texts, values, call_reward(reward, texts[::-1], records[::-1]).flip(0)
    )
    singles = torch.cat([call_reward(reward, [text], [record]) for text, record in pairs])
    _require_equal(reward, "batch = one by one", texts, values, singles)


def _require_equal(
    reward: Reward, law: str, texts: list[str], values: Tensor, other: Tensor
) -> None:
    wrong = (values - other).abs() > 1e-5 * values.abs().clamp_min(1)
    for i in wrong.nonzero()[:1, 0].tolist():
        raise _broken(reward, law, _text(texts[i]), f"{values[i].item():g} and {other[i].item():g}")


def _require_accepted(reward: Reward, texts: list[str], law: str, records: list[Record]) -> None:
    try:
        call_reward(reward, texts, records)
    except Exception as error:
        raise _broken(reward, law, _batch(texts), f"{type(error).__name__}: {error}") from error


def _require_unchanged(reward: Reward, texts: Sequence[str], given: list[str]) -> None:
    for before, after in zip_longest(texts, given):
        if before != after:
            where = _text(after if before is None else before)
            raise _broken(
                reward, "texts unchanged", where, "the list that it was given has changed here"
            )


def _broken(reward: Reward, law: str, where: str, found: str) -> RewardError:
    name = getattr(reward, "name", type(reward).__name__)
    return RewardError(f"reward {name!r} breaks the law {law!r} on {where}: {found}")


def _text(text: str) -> str:
    return f"the text {text!r}" if len(text) <= 80 else f"the text {text[:80]!r}…"


def _batch(texts: Sequence[str]) -> str:
    return (
        f"a batch of {len(texts)} that begins with {_text(texts[0])}"
        if len(texts)
        else "the empty batch"
    )
