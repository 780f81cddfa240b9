"""Every shipped configuration is read, says how to run it, and states only what its classes
have.
"""

import dataclasses
import inspect
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml

from dia_lightning import cli, samplers
from dia_lightning.diffusion import labels
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.sampling import positions
from dia_lightning.settings import parser
from dia_lightning.settings.once import TRAINER_DEFAULTS

ROOT = Path(cli.__file__).parents[1]
# Those of ablations/ and comparison/ are studies, see tests/lab/study.
CONFIGS = sorted(
    path
    for path in (ROOT / "configs").rglob("*.yaml")
    if path.parent.name not in ("ablations", "full", "comparison")
)
# Short names.
PARTS = {**vars(samplers), **vars(positions), **vars(labels)}
each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


def command_of(path: Path) -> list[str]:
    """The command in the file's first comment, as arguments."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = [
        line.removeprefix("#").strip()
        for line in lines[: next(i for i, x in enumerate(lines) if not x.startswith("#"))]
    ]
    command = next(line for line in comment if line.startswith("lightning "))
    return shlex.split(re.split(r"\s{2,}", command)[0])[1:]


def parts(value: Any) -> Iterator[tuple[type, dict[str, Any]]]:
    """Every class that is named, with its options."""
    if isinstance(value, list):
        for item in value:
            yield from parts(item)
    if not isinstance(value, dict):
        return
    if "class_path" in value:
        module, _, name = value["class_path"].rpartition(".")
        yield (
            getattr(import_module(module), name) if module else PARTS[name],
            value.get("init_args", {}),
        )
    for item in value.values():
        yield from parts(item)


def named_options(config: dict[str, Any]) -> Iterator[tuple[type, str, Any]]:
    for owner, options in [(L.Trainer, config.get("trainer", {})), *parts(config)]:
        for name, value in options.items():
            parameter = inspect.signature(owner).parameters.get(name)
            group = parameter and parameter.default
            if (
                dataclasses.is_dataclass(group)
                and isinstance(value, dict)
                and "class_path" not in value
            ):
                yield from ((owner, f"{name}.{inner}", each) for inner, each in value.items())
            else:
                yield owner, name, value


class Parsed(Exception):
    """Stops the program once the options are read."""


def parse(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the program makes of `arguments`, before any class is instantiated."""
    seen: list[Any] = []

    def stop(self: parser.DiaCLI) -> None:
        checked(self)
        seen.append(self.config[self.subcommand])
        raise Parsed

    checked = parser.DiaCLI.before_instantiate_classes
    monkeypatch.setattr(parser.DiaCLI, "before_instantiate_classes", stop)
    with pytest.raises(Parsed):
        parser.run(cli.prepare_arguments(arguments))
    return seen[0]


def test_there_are_configs() -> None:
    assert {
        "dia_tiny",
        "zero_shot_tiny",
        "ddpm_tiny",
        "critic_tiny",
        "lm_tiny",
        "dia_gpt2",
        "ddpm_gpt2",
        "critic_gpt2",
    } <= {path.stem for path in CONFIGS}


@each_config
def test_its_command_is_read_and_fits_its_classes(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = command_of(path)
    assert command[1:3] == ["--config", str(path.relative_to(ROOT))]
    overruled = {
        argument.partition("=")[0].rpartition(".")[2]
        for argument in command[3:]
        if argument.startswith("--")
    }
    monkeypatch.chdir(tmp_path)
    config = parse(command, monkeypatch)
    for section in ("model", "data"):
        for name, value in read(path)[section].get("init_args", {}).items():
            if name not in overruled and not isinstance(value, dict | list):
                found = config[section].init_args[name]
                found = getattr(found, "class_path", found)
                found = found.rpartition(".")[2] if name in ("sampler", "estimator") else found
                assert found == value, name
    for name, value in read(path).get("trainer", {}).items():
        assert name in ("logger", "callbacks") or config.trainer[name] == value, name


@each_config
def test_every_option_is_one_that_the_class_has_with_a_default_or_a_need(path: Path) -> None:
    options = list(named_options(read(path)))
    assert len(options) > 3
    for owner, name, _ in options:
        parameters = inspect.signature(owner).parameters
        name = name.partition(".")[0]
        assert name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()), (
            f"{owner.__name__}: {name}"
        )


@each_config
def test_our_classes_can_be_left_to_their_defaults(path: Path) -> None:
    """Defaults live in the constructor: an option may lack one only where none could be right."""
    for owner, _ in parts(read(path)):
        if owner.__module__.startswith("dia_lightning"):
            needed = {
                n
                for n, p in inspect.signature(owner).parameters.items()
                if p.default is p.empty and p.kind.value < 2
            }
            known = {
                "reward",
                "rewards",
                "path",
                "folder",
                "dataset",
                "edges",
                "pattern",
                "word",
                "words",
                "model",
                "label",
            }
            assert needed <= known, f"{owner.__name__}: {needed}"


@each_config
def test_runs_write_under_their_own_folder(path: Path) -> None:
    config = read(path)
    assert config["out"] == f"runs/{path.stem}"
    assert not {"default_root_dir", "folder", "save_dir"} & {n for _, n, _ in named_options(config)}


@each_config
def test_lengths_and_base_models_agree(path: Path) -> None:
    assert "base_lm" not in read(path)["data"].get("init_args", {})
    options = parser.options_of(cli.prepare_arguments(command_of(path)))
    model, data = options.model.init_args, options.data.init_args
    if "base_lm" in model and "base_lm" in data:
        assert data.base_lm == model.base_lm
    if "max_length" in model:
        assert data.max_length == model.max_length


def same(default: Any, value: Any) -> bool:
    """Whether a file that says `value` says no more than `default`.

    A list of parts may be repeated: only one that a file states takes `--sampler.moves+=Suffix`.
    """
    if isinstance(default, list | tuple):
        parts = any(map(dataclasses.is_dataclass, default))
        return not parts and list(default) == value
    named = {"class_path": value} if isinstance(value, str) else value
    if dataclasses.is_dataclass(default) and isinstance(named, dict) and "class_path" in named:
        short = named["class_path"].rpartition(".")[2]
        given = named.get("init_args", {})
        return short == type(default).__name__ and all(
            same(getattr(default, name), value) for name, value in given.items()
        )
    return type(default) is type(value) and bool(default == value)


def default_of(owner: type, name: str, command: str) -> Any:
    if owner is L.Trainer and name in TRAINER_DEFAULTS.get(command, {}):
        return TRAINER_DEFAULTS[command][name]
    name, _, inner = name.partition(".")
    parameter = inspect.signature(owner).parameters.get(name)
    if inner:
        return getattr(parameter.default, inner)
    if parameter is None or parameter.default is parameter.empty:
        return parameter
    if dataclasses.is_dataclass(owner):
        (field,) = (field for field in dataclasses.fields(owner) if field.name == name)
        if field.default_factory is not dataclasses.MISSING:
            return field.default_factory()
    return parameter.default


@each_config
def test_it_states_what_differs_from_the_defaults(path: Path) -> None:
    command = command_of(path)[0]
    repeated = [
        f"{owner.__name__}.{name}: {value}"
        for owner, name, value in named_options(read(path))
        if same(default_of(owner, name, command), value)
    ]
    assert not repeated


def test_what_repeats_a_default() -> None:
    annealed = samplers.Annealed
    for name, value, expected in (
        ("particles", 2, True),
        ("particles", 4, False),
        ("moves", None, True),
        ("moves", ["Suffix"], False),
    ):
        assert same(default_of(annealed, name, "predict"), value) is expected, (name, value)
    solver = default_of(samplers.Diffusion, "solver", "predict")
    assert same(solver, type(solver).__name__)
    assert same(solver, {"class_path": "PredictorCorrector", "init_args": {"eta": solver.eta}})
    assert not same(solver, {"class_path": "PredictorCorrector", "init_args": {"eta": 0.7}})
    assert not same(solver, "DPMpp2M")
    assert same(default_of(samplers.DenoiseAccept, "levels", "predict"), [1.0])
    assert same(default_of(L.Trainer, "logger", "predict"), False)
    assert not same(default_of(L.Trainer, "logger", "fit"), False)


def test_what_one_file_writes_the_next_one_reads() -> None:
    for kit in ("gpt2",):
        exported = {
            f"{read(ROOT / f'configs/{stem}_{kit}.yaml')['out']}/{name}"
            for stem, name in (("ddpm", "denoiser"), ("critic", "critic"))
        }
        sampler = read(ROOT / f"configs/dia_{kit}.yaml")["model"]["init_args"]
        assert {sampler["denoiser"], sampler["critic"]} == exported
        assert (
            read(ROOT / f"configs/critic_{kit}.yaml")["model"]["init_args"]["denoiser"]
            == sampler["denoiser"]
        )


@pytest.mark.parametrize(
    "path", [p for p in CONFIGS if p.stem.endswith("_tiny")], ids=lambda path: path.stem
)
def test_the_tiny_ones_instantiate(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All classes, from another folder and without a network; nothing runs."""
    monkeypatch.chdir(tmp_path)
    built: list[parser.DiaCLI] = []
    monkeypatch.setattr(parser.DiaCLI, "_run_subcommand", lambda self, command: built.append(self))
    parser.run(cli.prepare_arguments(command_of(path)))
    config = read(path)
    assert type(built[0].model).__name__ == config["model"]["class_path"].rpartition(".")[2]
    assert type(built[0].datamodule).__name__ == config["data"]["class_path"].rpartition(".")[2]
    if type(built[0].model).__name__ == "GuidedSamplerModule":
        assert isinstance(built[0].model.lm, BaseLM)
    assert not list(tmp_path.iterdir())
