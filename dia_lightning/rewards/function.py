"""A plain function as a reward, and whatever else a caller in Python may give for one."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from dia_lightning.errors import UserError
from dia_lightning.types import Record, Reward

_ALLOWED = "a function of texts, a Reward, or the name of one, as 'VaderSentiment'"


class FunctionReward(Reward):
    """r(texts) of a function that takes a list of B texts and returns B numbers, larger is better.

    The numbers come as a list, tuple, NumPy array or tensor (B,) of any real type.

    Args:
        function: called as `function(texts)`; as `function(texts, records)` if its second
            argument is called `records`: the record of each text, with the field `prompt`.
        name: label in outputs; the function's own name by default, `reward` of a lambda.

    Raises:
        UserError: if `function` cannot be called in one of these ways.
    """

    def __init__(self, function: Callable[..., Any], name: str | None = None) -> None:
        own = getattr(function, "__name__", "")
        self.function, self.name = function, name or (own if own.isidentifier() else "reward")
        self.conditional = _takes_records(function, own or type(function).__name__)

    def __call__(self, texts: Sequence[str], records: Sequence[Record] = ()) -> Any:
        return self.function(texts, records) if self.conditional else self.function(texts)


def as_reward(given: Any) -> Reward:
    """`given` itself, a function as a reward, or the shipped reward of that name.

    Raises:
        UserError: if it is none of these.
    """
    if isinstance(given, Reward):
        return given
    if isinstance(given, str):
        return _named(given)
    if inspect.isclass(given) or not callable(given):
        kind = f"the class {given.__name__}" if inspect.isclass(given) else f"{given!r:.60}"
        raise UserError(f"reward: {kind} given, allowed: {_ALLOWED}")
    return FunctionReward(given)


def _takes_records(function: Callable[..., Any], name: str) -> bool:
    """Whether it is called with the records too."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # of C code, which tells no names
        return False
    placed = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p.name for p in placed if p.default is p.empty]
    more = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    takes_one = bool(placed) or any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if more or not takes_one or needed[1:] not in ([], ["records"]):
        shown = ", ".join([*needed, *more])
        raise UserError(f"reward: {name}({shown}) given, allowed: (texts) or (texts, records)")
    return needed[1:] == ["records"]


def _named(name: str) -> Reward:
    package = import_module("dia_lightning.rewards")
    shipped = {n: c for n in package.__all__ if _is_reward(c := getattr(package, n))}
    if name not in shipped:
        near = difflib.get_close_matches(name, shipped, 1, 0.6)
        hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(shipped)}"
        raise UserError(f"reward: {name!r} given, which no shipped reward is called; {hint}")
    parameters = inspect.signature(shipped[name]).parameters.values()
    if needed := [p.name for p in parameters if p.default is p.empty]:
        example = f"dia.rewards.{name}({', '.join(f'{n}=…' for n in needed)})"
        raise UserError(f"reward: {name!r} given, which needs arguments; give {example}")
    made: Reward = shipped[name]()
    return made


def _is_reward(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, Reward) and value.__name__ != "CachedReward"
