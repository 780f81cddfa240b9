"""Rewards and samplers in a Python file of the user's, named on the command line.

`--reward my_rewards.py:Cheer` imports that file. Only `cli.main` calls this, with the arguments
that were typed: a config file, a kit or a study cannot name code to run.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType

from dia_lightning.errors import UserError
from dia_lightning.settings.messages import TRUSTED

# Which kind of part each option takes.
_OPTIONS = {
    f"--{above}{kind}": kind
    for kind in ("reward", "sampler")
    for above in ("", "model.", "model.init_args.")
}
_FUNCTION = "dia_lightning.rewards.FunctionReward"


def load_files(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Import each file in `--reward FILE.py:NAME` and `--sampler FILE.py:NAME`.

    Returns:
        The arguments with the path of the class or function in place of the file's, and the
        modules that options may name.

    Raises:
        UserError: for a file that is missing or cannot be imported, and a name that it lacks.
    """
    rest: list[str] = []
    modules: list[str] = []
    given = iter(arguments)
    for argument in given:
        option, equals, value = argument.partition("=")
        rest.append(argument)
        if option not in _OPTIONS:
            continue
        if not equals:
            value = next(given, "")
            rest += [value] if value else []
        if found := re.fullmatch(r"(.+\.py)(?::(\w*))?", value):
            del rest[-1 if equals else -2 :]
            module = _imported(Path(found[1]).expanduser(), option)
            rest += _named(option, module, found[2] or "")
            modules.append(module.__name__)
    return rest, modules


def _named(option: str, module: ModuleType, name: str) -> list[str]:
    """The arguments that give what `module` calls `name`."""
    found, kind = getattr(module, name, None), _OPTIONS[option]
    own = [n for n, value in vars(module).items() if _fits(value, module.__name__, kind)]
    if name not in own:
        has = ", ".join(own) or f"no {kind}"
        wrong = f"has no {kind} {name}" if name else "given without a name"
        raise UserError(f"{option}: {module.__file__} {wrong}; write FILE.py:NAME, it has {has}")
    path = f"{module.__name__}.{name}"
    if inspect.isclass(found):
        return [f"{option}={path}"]
    return [f"{option}={_FUNCTION}", f"{option}.function={path}"]


def _fits(value: object, module: str, kind: str) -> bool:
    """Whether it is a class of that kind, or for a reward a function, that the file defines."""
    if getattr(value, "__module__", "") != module:
        return False
    if inspect.isclass(value):
        return any(base.__name__ == kind.capitalize() for base in value.__mro__[1:])
    return kind == "reward" and inspect.isfunction(value) and not value.__name__.startswith("_")


def _imported(file: Path, option: str) -> ModuleType:
    if not file.is_file():
        raise UserError(f"{option}: no such file: {file}")
    file = file.resolve()
    name = _module_name(file)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(file.parent) not in sys.path:  # for what it imports, after everything that is installed
        sys.path.append(str(file.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        if isinstance(error, UserError):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(file)]
        line = lines[-1] if lines else getattr(error, "lineno", None)
        where = f"{file}, line {line}" if line else str(file)
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200].removesuffix(": ")
        raise UserError(f"{option}: {where} cannot be imported ({reason})") from error
    return module


def _module_name(file: Path) -> str:
    """The file's own name, where no other module can be meant by it."""
    name = re.sub(r"\W", "_", file.stem)
    loaded = getattr(sys.modules.get(name), "__file__", None) or ""
    known = name in sys.modules and Path(loaded) != file
    taken = known or name in {*TRUSTED, *sys.stdlib_module_names, "jsonargparse"}
    return f"file_{name}" if taken or not name.isidentifier() else name
