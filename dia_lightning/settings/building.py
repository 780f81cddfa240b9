"""Builds the classes that the settings name; what a constructor raises becomes one line with the
option.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, _InstantiatorFn

from dia_lightning.errors import UserError, no_memory, root_user_error
from dia_lightning.rewards.base import name_fault
from dia_lightning.settings.messages import typed_option
from dia_lightning.settings.places import class_of, place
from dia_lightning.types import Reward


class _NotBuilt(BaseException):
    """Carries `error` through jsonargparse, which swallows an `Exception` to try the other types
    of a union.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


class BuildingCLI(LightningCLI):
    """LightningCLI that says which option names the class that cannot be built, and why it
    cannot.
    """

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self._arguments: list[str] = args
        super().parse_arguments(parser, args)

    def _add_instantiators(self) -> None:
        self.parser.add_instantiator(self._build, object)

    @contextmanager
    def building(self) -> Iterator[None]:
        """Raises what `_build` found wrong, and what the functions raise that options may name
        in place of classes.
        """
        try:
            yield
        except _NotBuilt as failed:
            error = failed.error
        except Exception as raised:
            found = [
                (path, made) for path, setting, made in self._named() if not inspect.isclass(made)
            ]
            if not found or root_user_error(raised) is not None:
                raise
            path, function = found[0]
            error = self._mistake(path, function, _innermost(raised))
        else:
            return
        raise error

    def _build(
        self, cls: type, *args: Any, applied_instantiation_links: dict[str, Any], **kwargs: Any
    ) -> Any:
        key = next(
            (
                k
                for k, base in (("model", L.LightningModule), ("data", L.LightningDataModule))
                if issubclass(cls, base)
            ),
            "",
        )
        path = self._path(cls, kwargs)
        try:
            self._refuse_null(path, cls, kwargs)
            # Lightning's own puts the settings into checkpoints.
            links = {"applied_instantiation_links": applied_instantiation_links}
            made = (
                _InstantiatorFn(self, key)(cls, *args, **links, **kwargs)
                if key
                else cls(*args, **kwargs)
            )
            if isinstance(made, Reward) and (fault := name_fault(made)):
                raise UserError(f"{self._option(path)}: {_path_of(cls)} {fault}")
        except UserError as error:
            self._place(error, path)
            raise _NotBuilt(error) from None
        except Exception as error:
            raise _NotBuilt(
                error if no_memory(error) else self._mistake(path, cls, error)
            ) from None
        return made

    @contextmanager
    def placing(self) -> Iterator[None]:
        """Says which options the arguments are that a mistake names."""
        try:
            yield
        except Exception as raised:
            if (error := root_user_error(raised)) is not None:
                self._place(error)
            raise

    def _place(self, error: UserError, built: Sequence[str] = ()) -> None:
        if error.argument == "out" and self._settings.get("out") is None:
            error.rename("trainer.default_root_dir")  # which places all in its stead
        place(error, self._settings, self._arguments, built)

    def _mistake(self, path: list[str], made: Any, error: BaseException) -> UserError:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300].removesuffix(": ")
        mistake = UserError(f"{self._option(path)}: {_path_of(made)} cannot be built ({reason})")
        mistake.__cause__ = error
        return mistake

    def _option(self, path: list[str]) -> str:
        return typed_option(path, self._arguments)[0]

    def _named(self) -> Iterator[tuple[list[str], Any, Any]]:
        """Of every class or function that the settings name: its option's path, its settings and
        itself.
        """
        yield from _named([], self._settings)

    @property
    def _settings(self) -> Namespace:
        return self.config[self.subcommand]

    def _path(self, cls: type, kwargs: dict[str, Any]) -> list[str]:
        """The option that names `cls`; of several the one whose plain settings are `kwargs`."""
        plain = {
            name: value
            for name, value in kwargs.items()
            if value is None or isinstance(value, str | int | float)
        }
        found = [
            (path, setting.get("init_args") or Namespace())
            for path, setting, made in self._named()
            if made is cls
        ]
        same = [
            path
            for path, given in found
            if all(given.get(name) == value for name, value in plain.items())
        ]
        paths = same or [path for path, _ in found] or [_group_of(cls, self._settings)]
        return paths[0] or [cls.__name__]

    def _refuse_null(self, path: list[str], cls: type, given: dict[str, Any]) -> None:
        """`null` passes jsonargparse for every type."""
        try:
            hints = get_type_hints(cls.__init__)  # type: ignore[misc]
            parameters = inspect.signature(cls).parameters
        except Exception:  # a name that only type checkers import, or no signature
            return
        for name, hint in hints.items():
            null = (
                name in parameters
                and given.get(name, "") is None
                and parameters[name].default is not None
            )
            if null and not _takes_null(hint):
                option = self._option([*path, "init_args", name])
                raise UserError(f"{option}: null given, allowed: {getattr(hint, '__name__', hint)}")


def _named(path: list[str], setting: Any) -> Iterator[tuple[list[str], Any, Any]]:
    if isinstance(setting, list):
        for item in setting:
            yield from _named(path, item)
    elif isinstance(setting, Namespace | dict):
        if (made := class_of(setting)) is not None:
            yield path, setting, made
        for key, value in (setting if isinstance(setting, dict) else vars(setting)).items():
            yield from _named([*path, key], value)


def _group_of(cls: type, settings: Any, path: tuple[str, ...] = ()) -> list[str]:
    """The path of the settings that make the dataclass `cls`, a group without a class path."""
    if not isinstance(settings, Namespace | dict) or not is_dataclass(cls):
        return []
    inside = settings if isinstance(settings, dict) else vars(settings)
    if set(inside) == {field.name for field in fields(cls)}:
        return list(path)
    found = (_group_of(cls, value, (*path, key)) for key, value in inside.items())
    return next(filter(None, found), [])


def leaves(name: str, setting: Any) -> Iterator[tuple[str, Any]]:
    """Every option under `setting` with its value; elements of a list have the list's name."""
    if isinstance(setting, Namespace | dict):
        for key, value in (setting if isinstance(setting, dict) else vars(setting)).items():
            yield from leaves(f"{name}.{key}" if name else f"--{key}", value)
    elif isinstance(setting, list):
        for value in setting:
            yield from leaves(name, value)
    else:
        yield name, setting


def spelled_out(value: Any) -> Any:
    """`value` with class paths and options in place of parts, as they stand in defaults."""
    if is_dataclass(value) and not isinstance(value, type):
        given = {field.name: spelled_out(getattr(value, field.name)) for field in fields(value)}
        path = f"{type(value).__module__.rpartition('.')[0]}.{type(value).__name__}"
        path = path if class_of({"class_path": path}) is type(value) else _path_of(type(value))
        return Namespace(class_path=path, init_args=Namespace(given))
    if isinstance(value, list | tuple):
        return type(value)(spelled_out(item) for item in value)
    if isinstance(value, Namespace):
        vars(value).update({name: spelled_out(item) for name, item in vars(value).items()})
    return value


def as_stated(part: Any) -> Any:
    """A default part with those of its options alone that are not its class's own defaults."""
    given = part.get("init_args") if isinstance(part, Namespace) else None
    if not given or not is_dataclass(cls := class_of(part)):
        return part
    for field in fields(cls):
        usual = field.default if field.default_factory is MISSING else field.default_factory()
        if field.name in given and _is(usual, given[field.name]):
            del given[field.name]
    return part


def _is(usual: Any, given: Any) -> bool:
    if isinstance(usual, list) and isinstance(given, list):
        return len(usual) == len(given) and all(map(_is, usual, given))
    if is_dataclass(usual) and isinstance(given, Namespace):
        return class_of(given) is type(usual) and not as_stated(given).get("init_args")
    return bool(usual == given)


def is_above(value: Any, error: OSError) -> bool:
    """Whether `value` is the path that `error` is about, or a folder above it."""
    if not isinstance(value, str) or not value or not isinstance(error.filename, str):
        return False
    path = Path(error.filename).absolute()
    return Path(value).absolute() in (path, *path.parents)


def _path_of(made: Any) -> str:
    return f"{made.__module__}.{made.__qualname__}"


def _takes_null(hint: Any) -> bool:
    if hint in (Any, object, None, NoneType):
        return True
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType, Annotated):
        return any(map(_takes_null, inner))
    return None in inner if origin is Literal else not inspect.isclass(origin or hint)


def _innermost(error: BaseException) -> BaseException:
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error
