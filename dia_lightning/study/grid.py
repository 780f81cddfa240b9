"""A study file: which runs answer one question, as a list of cells.

    title: "λ, the weight of the reward"
    question: "How much reward does a larger λ buy, and what does it cost?"
    config: configs/dia_{kit}.yaml
    set: {model.compare_base: false, data.n_texts: 64}   # the stated default, on top of the config
    seeds: [0, 1, 2]
    seconds: 6                                           # of a cell, measured on one thread; for `--dry-run`
    grid:
      λ: {model.lam: [0, 2, 4, 8]}                       # an axis: its label, an option and its values
    baseline: {λ: 8}                                     # the stated default among them

An axis with several options sets them together: `{model.lam: [1, 2], model.sampler.rounds: [1, 4]}`
has two values. Several axes make the product. An axis may also name its values, each with what it
sets, a config of its own, and a training before it:

    grid:
      method:
        best-of-16: {config: configs/baselines/best_of_n_{kit}.yaml, set: {model.sampler.n: 16}}
        PPO:
          fit: {config: configs/baselines/ppo_{kit}.yaml, set: {model.beta: 0.125}}
          config: configs/zero_shot_{kit}.yaml
          set: {model.sampler.policy: "{fit}", model.sampler.label: ppo}

`command: test` runs `lightning test` in place of `predict`. In values `{seed}` is the cell's seed, `{cell}` its folder and
`{fit}` the folder that its training exports to; `{kit}` anywhere is what `--kit` says.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from dia_lightning import __version__
from dia_lightning.errors import UserError
from dia_lightning.files import read_yaml, require_path

_KINDS = {
    "title": str, "question": str, "command": str, "config": str, "set": dict, "seeds": list, "seconds": int | float,
    "grid": dict, "baseline": dict,
}  # fmt: skip
_NEEDED = ("title", "question", "grid")
_COMMANDS = ("predict", "test")
# Where runs write, and their seed.
_SAMPLING = {"trainer.default_root_dir": "{cell}", "trainer.callbacks.folder": "{cell}"}
_TRAINING = {"trainer.default_root_dir": "{cell}/fit", "trainer.callbacks.folder": "{fit}", "trainer.logger": False}
_SEEDS = {"seed_everything": "{seed}", "model.seed": "{seed}"}


@dataclass(frozen=True)
class Run:
    """One command of a cell. `options`: without dashes, `{cell}`, `{fit}` and `{seed}` still to be replaced."""

    command: str
    config: Path
    options: dict[str, Any]

    def arguments(self, cell: Path, seed: int) -> list[str]:
        """As the command line has them."""
        known = {"cell": str(cell), "fit": str(cell / "fit" / "export"), "seed": str(seed)}
        made = []
        for name, value in self.options.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for word, replacement in known.items() if isinstance(value, str) else ():
                text = text.replace(f"{{{word}}}", replacement)
            made.append(f"--{name}={text}")
        return [self.command, "--config", str(self.config), *made]

    def key(self, seed: int) -> str:
        """16 hexadecimal digits of what it does: arguments wherever the cell lies, the config's content, our version."""
        arguments = self.arguments(Path("{cell}"), seed)
        arguments[2] = self.config.read_text(encoding="utf-8")
        return hashlib.sha256(json.dumps([__version__, *arguments]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Cell:
    """One run of a study: a setting (label → value) at one seed; `name` is its folder's, STUDY/SETTING/seed=K."""

    study: str
    setting: dict[str, Any]
    seed: int
    name: str
    folder: Path
    run: Run
    fit: Run | None = None

    @property
    def key(self) -> str:
        """Of everything that it runs."""
        return "-".join(run.key(self.seed) for run in (self.fit, self.run) if run is not None)


@dataclass(frozen=True)
class StudyGrid:
    """A study file, read.

    axes: label → values. baseline: the stated default's setting, may be empty. seconds: of a cell, by the file, None where it
    does not say. text: the file itself.
    """

    name: str
    title: str
    question: str
    axes: dict[str, list[Any]]
    cells: list[Cell] = field(repr=False)
    baseline: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    text: str = field(default="", repr=False)


class _Point(NamedTuple):
    """A value of an axis and what it does."""

    value: Any
    name: str
    set: dict[str, Any]
    config: str | None = None
    fit: dict[str, Any] | None = None


def read_study(path: Path, out: Path, kit: str = "tiny", seeds: Sequence[int] | None = None) -> StudyGrid:
    """The cells of the study file `path`, which write under `out`; `seeds` in place of the file's.

    Raises:
        UserError: naming the file and what in it is not as it should be.
    """
    content = read_yaml(path, "study", kit=kit)
    _check_keys(f"{path}", content, _KINDS)
    for name in _NEEDED:
        if name not in content:
            raise UserError(f"{path}: {name}: missing, needed are {', '.join(_NEEDED)}")
    command = content.get("command", "predict")
    if command not in _COMMANDS:
        raise UserError(f"{path}: command: {command} given, allowed: {', '.join(_COMMANDS)}")
    seeds = content.get("seeds", [0, 1, 2]) if seeds is None else seeds
    if not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UserError(f"{path}: seeds: {seeds} given, allowed: different integers, 0 or more")
    axes = {str(label): _axis(f"{path}: grid: {label}", values) for label, values in content["grid"].items()}
    if not axes:
        raise UserError(f"{path}: grid: empty, an axis is needed")
    cells = []
    for points in product(*axes.values()):
        fit, run = _runs_of(str(path), command, content, points)
        setting = dict(zip(axes, (point.value for point in points), strict=True))
        for seed in seeds:
            name = f"{path.stem}/{','.join(point.name for point in points)}/seed={seed}"
            cells.append(Cell(path.stem, setting, seed, name, out / name, run, fit))
    values = {label: [point.value for point in points] for label, points in axes.items()}
    baseline = content.get("baseline", {})
    for label, value in baseline.items():
        if value not in values.get(label, []):
            raise UserError(f"{path}: baseline: {label} = {value} is not in the grid")
    return StudyGrid(
        path.stem, content["title"], content["question"], values, cells, baseline, content.get("seconds"),
        path.read_text(encoding="utf-8").replace("{kit}", kit),
    )  # fmt: skip


def _check_keys(where: str, content: Any, allowed: dict[str, Any]) -> None:
    if not isinstance(content, dict):
        raise UserError(f"{where}: {content!r:.40} given, allowed are options: {', '.join(allowed)}")
    for key, value in content.items():
        if key not in allowed:
            raise UserError(f"{where}: {key}: unknown, allowed are {', '.join(allowed)}")
        if not isinstance(value, allowed[key]) or isinstance(value, bool):
            expected = getattr(allowed[key], "__name__", "number")
            raise UserError(f"{where}: {key}: {value!r:.40} given, allowed: {expected}")


def _axis(where: str, content: Any) -> list[_Point]:
    """The values of an axis: options with lists, or names with what each does."""
    if not isinstance(content, dict) or not content:
        raise UserError(f"{where}: {content!r:.40} given, allowed: an option and its values, or named settings")
    if all(isinstance(value, dict) for value in content.values()):
        points = [_named(where, str(name), value) for name, value in content.items()]
    elif all(isinstance(value, list) for value in content.values()):
        if len({len(values) for values in content.values()}) > 1:
            raise UserError(f"{where}: options that are set together need as many values each")
        rows = [dict(zip(content, row, strict=True)) for row in zip(*content.values(), strict=True)]
        points = [_Point(_plain(next(iter(row.values()))), _folder_name(*next(iter(row.items()))), row) for row in rows]
    else:
        raise UserError(f"{where}: allowed: lists of values for options, or mappings for names, not both")
    if not points or len({point.name for point in points}) < len(points):
        raise UserError(f"{where}: values must be there and differ, also in the folders' names (letters and digits)")
    return points


def _named(where: str, name: str, content: dict[str, Any]) -> _Point:
    _check_keys(f"{where}: {name}", content, {"config": str, "set": dict, "fit": dict})
    fit = content.get("fit")
    if fit is not None:
        _check_keys(f"{where}: {name}: fit", fit, {"config": str, "set": dict})
        if "config" not in fit:
            raise UserError(f"{where}: {name}: fit: config: missing")
    return _Point(name, _slug(name), content.get("set", {}), content.get("config"), fit)


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _folder_name(option: str, value: Any) -> str:
    return _slug(f"{option.rpartition('.')[2]}={_plain(value)}")


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=+-]+", "_", text).strip("_.") or "_"


def _runs_of(where: str, command: str, content: dict[str, Any], points: Sequence[_Point]) -> tuple[Run | None, Run]:
    """What a setting runs: the training, if it has one, and the sampling."""
    config = next((point.config for point in reversed(points) if point.config), content.get("config"))
    if config is None:
        raise UserError(f"{where}: config: none given for {', '.join(str(point.value) for point in points)}")
    options = dict(content.get("set", {}))
    for point in points:
        options |= point.set
    fits = [point.fit for point in points if point.fit]
    if len(fits) > 1:
        raise UserError(f"{where}: grid: only one axis may have a fit")
    run = Run(command, require_path(config, f"{where}: config"), {**options, **_SAMPLING, **_SEEDS})
    if not fits:
        return None, run
    path = require_path(fits[0]["config"], f"{where}: fit: config")
    return Run("fit", path, {**fits[0].get("set", {}), **_TRAINING, **_SEEDS}), run
