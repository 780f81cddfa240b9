"""The options of the arguments that a message of the library names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from importlib import import_module
from inspect import signature
from traceback import walk_tb
from typing import Any, NamedTuple

import lightning as L
from jsonargparse import Namespace

from dia_lightning.errors import OTHERS, UserError
from dia_lightning.settings.messages import typed_option


class Argument(NamedTuple):
    """An argument that the settings give: its option's path, its value, and the class that takes
    it (None for those of the trainer and the command).
    """

    path: list[str]
    value: Any
    owner: Any


def class_of(setting: Any) -> Any:
    """What a `class_path` names; None where there is none."""
    module, _, name = str(setting.get("class_path", "")).rpartition(".")
    try:
        return getattr(import_module(module), name, None) if module else None
    except ImportError:
        return None


def arguments_in(path: list[str], setting: Any, owner: Any = None) -> Iterator[Argument]:
    """Every argument under `setting`; elements of a list have the list's path."""
    if isinstance(setting, list):
        for item in setting:
            yield from arguments_in(path, item)
    elif is_dataclass(setting):  # a default
        values = {field.name: getattr(setting, field.name) for field in fields(setting)}
        yield from arguments_in([*path, "init_args"], values, type(setting))
    elif isinstance(setting, Namespace | dict):
        for name, value in (setting if isinstance(setting, dict) else vars(setting)).items():
            if name == "init_args":
                yield from arguments_in([*path, name], value, class_of(setting))
            elif name != "class_path":
                yield Argument([*path, name], value, owner)
                yield from arguments_in([*path, name], value)


def place(
    error: UserError, settings: Namespace, arguments: Sequence[str], built: Sequence[str] = ()
) -> None:
    """Put options in place of the argument that `error` begins with and of those in its text.

    Of several arguments with one name it is, in this order: that of the class that is being built,
    whose option has the path `built`; that of the innermost object in whose methods the error was
    raised; the one with the value that the message says was given; the first.
    """
    known = list(arguments_in([], settings))
    names, made_by = error.argument.split("."), _raised_in(error)
    given = str(error)[len(error.argument) :].removeprefix(": ").partition(" given")[0]

    def distance(argument: Argument) -> tuple[bool, int, bool]:
        owner = argument.owner
        near = (i for i, each in enumerate(made_by) if owner and isinstance(each, owner))
        return (
            argument.path[:-1] != [*built, "init_args"],
            next(near, len(made_by)),
            given not in (str(argument.value), repr(argument.value)),
        )

    found = [argument for argument in known if _bare(argument.path)[-len(names) :] == names]
    options = {".".join(_bare(argument.path)): argument.path for argument in reversed(known)}

    def option(name: re.Match[str]) -> str:
        path = options.get(name[0])
        return typed_option(path, arguments)[0].partition(" (in ")[0] if path else name[0]

    text = OTHERS.sub(option, str(error)[len(error.argument) :])
    error.args = (error.argument + text,)
    if found:
        nearest = min(found, key=distance)
        named = typed_option(nearest.path, arguments)[0]
        error.rename(named.partition(" (in ")[0] if _is_default(nearest) else named)


def _is_default(argument: Argument) -> bool:
    """Whether no file needs to have set it."""
    owner = L.Trainer if argument.path[0] == "trainer" else None
    try:
        parameters = signature(argument.owner or owner).parameters  # type: ignore[arg-type]
        return bool(parameters[argument.path[-1]].default == argument.value)
    except (TypeError, ValueError, KeyError):
        return False


def _bare(path: list[str]) -> list[str]:
    return [name for name in path if name != "init_args"]


def _raised_in(error: BaseException) -> list[Any]:
    """The objects in whose methods the error was raised, the innermost first."""
    frames = [frame.f_locals for frame, _ in walk_tb(error.__traceback__)]
    return [names["self"] for names in reversed(frames) if "self" in names]
