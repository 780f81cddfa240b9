"""The key of a run: a hash of everything that determines its texts, so that only equal runs
share their batches.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from enum import Enum
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from dia_lightning import __version__
from dia_lightning.data.prompts import PromptData
from dia_lightning.data.samples import fingerprint
from dia_lightning.errors import UserError
from dia_lightning.samplers import GuidedSamplerModule
from dia_lightning.types import SCHEMA

# Of more texts the prompts are hashed once each, which with n_texts says as much.
_WRITTEN_OUT = 1_000_000


def run_key(trainer: L.Trainer, module: GuidedSamplerModule, data: PromptData) -> str:
    """16 hexadecimal digits made of the settings, the prompts themselves, all weights, precision
    and kind of device.

    Raises:
        UserError: if a part of the run does not keep one of its arguments, see `describe`.
    """
    checkpoint = str(trainer.ckpt_path or "")
    model = describe(module)
    prompts = list(data.texts if len(data.texts) <= _WRITTEN_OUT else data.texts.items)
    model.pop("shard_base_lm", None)  # how p_θ is kept decides no text
    settings = {
        "schema": SCHEMA,
        "version": __version__,
        "model": model,
        "data": {
            **describe(data),
            "prompts": prompts,
            "records": list({id(r): r for r in data.records.items}.values()),
        },
        "weights": fingerprint(module.lm, module.state_dict()),
        # Its weights replace the module's after this hash is made.
        "checkpoint": (
            _sha256(Path(checkpoint).read_bytes()) if Path(checkpoint).is_file() else checkpoint
        ),
        "precision": str(trainer.precision),
        "accelerator": type(trainer.accelerator).__name__,
    }
    return _sha256(json.dumps(settings, sort_keys=True, default=str).encode())[:16]


def describe(part: Any) -> Any:
    """What a value is, as JSON: of an object its class and its constructor's arguments, nested.

    An argument `x` is looked for in the attributes `x` and `_x`.

    Raises:
        UserError: if it is in neither, since two objects that differ in it would look equal.
    """
    if part is None or isinstance(part, str | int | float | bool):
        return part
    if isinstance(part, list | tuple):
        return [describe(item) for item in part]
    if isinstance(part, set | frozenset):
        return sorted((describe(item) for item in part), key=json.dumps)
    if isinstance(part, dict):
        return {"dict": [[describe(key), describe(value)] for key, value in part.items()]}
    if isinstance(part, Tensor):
        return {"tensor": part.tolist()}
    if isinstance(part, Path | Enum) or not hasattr(part, "__dict__"):
        return {"value": repr(part)}
    if isinstance(part, partial):
        return {"partial": [describe(part.func), describe(part.args), describe(part.keywords)]}
    if inspect.isroutine(part) or inspect.isclass(part):
        return _path_of(part)
    cls = type(part)
    arguments = {n: describe(_argument(part, n)) for n in _arguments(cls)}
    return {"class": f"{cls.__module__}.{cls.__qualname__}"} | _source(cls) | arguments


def _source(part: Any) -> dict[str, str]:
    """A hash of the file that defines a class or function of the user's: the code decides texts.

    Our own code is known by its version, and that of `__main__` changes between two calls.
    """
    if part.__module__.partition(".")[0] in ("dia_lightning", "__main__", "torch"):
        return {}
    file = Path(getattr(sys.modules.get(part.__module__), "__file__", None) or "")
    return {"source": _sha256(file.read_bytes())} if file.is_file() else {}


def _path_of(part: Any) -> Any:
    """The dotted path of a class or function; with its code where that path does not lead to it."""
    path = f"{part.__module__}.{part.__qualname__}"
    if isinstance(part, MethodType):
        return {"method": path, "of": describe(part.__self__)}
    if not isinstance(part, FunctionType) or ("<" not in path and part.__module__ != "__main__"):
        return {"path": path, **source} if (source := _source(part)) else path
    cells = zip(part.__code__.co_freevars, part.__closure__ or (), strict=True)
    known = {**part.__globals__, **{name: cell.cell_contents for name, cell in cells}}
    names = sorted({*_names(part.__code__), *part.__code__.co_freevars} & set(known))
    return {
        "function": path,
        "code": _code(part),
        "defaults": describe([part.__defaults__, part.__kwdefaults__]),
        "uses": {name: _used(path, name, known[name]) for name in names},
    }


def _used(path: str, name: str, value: Any) -> Any:
    if inspect.ismodule(value):
        return value.__name__
    if isinstance(value, FunctionType):
        return _code(value)
    if isinstance(value, Tensor):
        return _sha256(
            value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        )
    if isinstance(value, np.ndarray):
        return _sha256(np.ascontiguousarray(value).tobytes())
    try:
        if isinstance(value, nn.Module):
            raise UserError("its weights are none of its arguments")
        return describe(value)
    except UserError as error:
        raise UserError(
            f"reward: the function {path} uses {name}, a {type(value).__name__}, by which runs"
            " could not be told apart; make it a Reward that keeps its arguments"
        ) from error


def _code(function: FunctionType) -> str:
    def parts(code: CodeType) -> Any:
        return code.co_code, code.co_names, [constant(value) for value in code.co_consts]

    def constant(value: Any) -> Any:
        if isinstance(value, frozenset):  # in another order in each process
            return sorted(map(repr, value))
        return parts(value) if isinstance(value, CodeType) else repr(value)

    return _sha256(repr(parts(function.__code__)).encode())


def _names(code: CodeType) -> set[str]:
    """What a function looks up by name, those in it included."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)


def _arguments(cls: type) -> list[str]:
    """The names of the constructor's arguments, those that it passes on as `**kwargs` included."""
    names: list[str] = []
    for base in cls.__mro__:
        if "__init__" in vars(base):
            _, *parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
            names += [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return list(dict.fromkeys(names))


def _argument(part: Any, name: str) -> Any:
    for attribute in (name, f"_{name}"):
        if hasattr(part, attribute):
            return getattr(part, attribute)
    raise UserError(
        f"{type(part).__name__}: its argument {name!r} is not kept as an attribute of that name, so"
        f" that runs with different values could not be told apart; write `self.{name} = {name}` in"
        " its __init__"
    )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
