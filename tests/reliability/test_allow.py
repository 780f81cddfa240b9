"""Options name classes and functions of trusted modules alone; `--allow` names more, on the
command line and nowhere else.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dia_lightning import cli
from dia_lightning.errors import UserError
from dia_lightning.settings import parser
from dia_lightning.settings.messages import TRUSTED

# Whoever imports it leaves a file behind.
EVIL = """from pathlib import Path
Path("imported").touch()
import lightning as L
import torch
from dia_lightning.types import Reward


class Bad(Reward):
    name = "bad"

    def __call__(self, texts):
        return torch.zeros(len(texts))


class Watcher(L.Callback):
    pass


def function(*arguments):
    pass


watcher = Watcher()
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with modules `evil` and `package.evil`."""
    (tmp_path / "package").mkdir()
    for name in ("evil.py", "package/evil.py"):
        (tmp_path / name).write_text(EVIL, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("evil", "package", "package.evil"):
        sys.modules.pop(name, None)


def parse(*arguments: str) -> None:
    rest, modules = cli.split_allow(list(arguments))
    parser.run(cli.prepare_arguments(rest), options_only=True, allow=modules)


LAMBDA = "lightning.pytorch.callbacks.LambdaCallback"


@pytest.mark.parametrize(
    ("option", "value", "module"),
    [
        ("--model", "evil.Bad", "evil"),
        ("--model.help", "evil.Bad", "evil"),
        ("--data", "evil.Bad", "evil"),
        ("--model.reward", "evil.Bad", "evil"),
        ("--model.reward", "package.evil.Bad", "package.evil"),
        ("--model.reward", "{class_path: evil.Bad}", "evil"),
        ("--model.reward", "os.system", "os"),
        ("--model.reward", "torch.os.system", "posix"),
        (
            "--trainer.callbacks",
            "[{class_path: lightning.pytorch.callbacks.Timer}, {class_path: evil.Watcher}]",
            "evil",
        ),
        ("--trainer.callbacks+", "evil.Watcher", "evil"),
        ("--trainer.callbacks+", "evil.watcher", "evil"),
        (
            "--trainer.callbacks+",
            f"{{class_path: {LAMBDA}, init_args: {{on_fit_start: evil.function}}}}",
            "evil",
        ),
        (
            "--trainer.callbacks+",
            f"{{class_path: {LAMBDA}, init_args: {{on_fit_start: {{class_path: evil.Bad}}}}}}",
            "evil",
        ),
        ("--trainer.logger", "[{class_path: evil.Watcher}]", "evil"),
        ("--trainer.plugins", "[{class_path: evil.Watcher}]", "evil"),
        ("--optimizer", "evil.Bad", "evil"),
        ("--lr_scheduler", "evil.Bad", "evil"),
    ],
)
def test_a_class_of_another_module_is_refused_before_it_is_imported(
    here: Path, option: str, value: str, module: str
) -> None:
    command = (
        ["fit", "--config", "configs/critic_tiny.yaml"]
        if "e.help" in option or option[2] in "lo"
        else ["predict"]
    )
    with pytest.raises(UserError) as refused:
        parse(*command, f"{option}={value}")
    said = str(refused.value)
    assert said.startswith("--trainer.callbacks" if "callbacks" in option else f"{option}: ")
    assert all(name in said for name in TRUSTED)
    assert said.endswith(f"run it with --allow {module}")
    assert "\n" not in said
    assert not (here / "imported").exists()


@pytest.mark.parametrize("option", ["strategy", "profiler", "accelerator"])
def test_where_a_name_is_allowed_too_a_class_is_none(here: Path, option: str) -> None:
    """Such options are text or a class; refused as a class the value is text, which the trainer
    does not know.
    """
    for value in ("evil.Watcher", "{class_path: evil.Watcher}"):
        parse("predict", f"--trainer.{option}={value}")
        assert not (here / "imported").exists()


def test_in_a_file_and_in_a_file_that_is_named_in_it(here: Path) -> None:
    Path("inner.yaml").write_text("class_path: evil.Bad\n", encoding="utf-8")
    Path("outer.yaml").write_text("model: {init_args: {reward: inner.yaml}}\n", encoding="utf-8")
    Path("mine.yaml").write_text(
        "model: {init_args: {reward: {class_path: dia_lightning.rewards.WeightedSum, init_args:"
        " {rewards: [{class_path: dia_lightning.rewards.Hinge, init_args: {reward: {class_path:"
        " evil.Bad}}}]}}}}\n",
        encoding="utf-8",
    )
    for name in ("outer", "mine"):
        with pytest.raises(
            UserError,
            match=rf"^--model\.init_args\.reward.*{name}.yaml\): evil.Bad given.*--allow evil$",
        ):
            parse("predict", "--config", "configs/dia_tiny.yaml", "--config", f"{name}.yaml")
    assert not (here / "imported").exists()


def test_allow_names_modules_for_one_call(here: Path) -> None:
    """Also by a short name, once the module is there; what is defined elsewhere needs its own
    module.
    """
    reward = "--model.reward=package.evil.Bad"
    for option in (["--allow=package.evil"], ["--allow=evil", "--allow", "package"]):
        parse("predict", reward, *option)
        assert (here / "imported").exists()
        with pytest.raises(UserError, match=r"package.evil.Bad given.*--allow package.evil$"):
            parse("predict", reward)
    with pytest.raises(UserError, match=r"package.evil.Bad given.*--allow package.evil$"):
        parse("predict", "--model.reward=Bad")
    (here / "front.py").write_text("from package.evil import Bad\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"package.evil.Bad given.*--allow package.evil$"):
        parse("predict", "--model.reward=front.Bad", "--allow", "front")
    sys.modules.pop("front")


@pytest.mark.parametrize(
    "given", [[], [""], ["my-rewards"], ["jsonargparse"], ["jsonargparse.typing"], ["*"], ["a."]]
)
def test_what_cannot_be_allowed(given: list[str]) -> None:
    with pytest.raises(
        UserError,
        match=r"^--allow: .* given, allowed: the name of your module, as in --allow my_rewards",
    ):
        cli.split_allow(["predict", "--allow", *given])


def test_no_file_allows_anything(here: Path) -> None:
    """Not a kit's either, and not the options of a study."""
    (here / "kit").mkdir()
    for path in ("kit/dia.yaml", "plain.yaml"):
        Path(path).write_text(
            "allow: [evil]\nmodel: {init_args: {reward: {class_path: evil.Bad}}}\n",
            encoding="utf-8",
        )
    for name in ("kit", "plain.yaml"):
        with pytest.raises(
            UserError, match=r"^--config: \S+ sets allow; .* on the command line alone$"
        ):
            parse("predict", "--config", name)
    Path("small.yaml").write_text(
        "title: t\nquestion: q\nconfig: configs/zero_shot_tiny.yaml\nset: {allow: evil,"
        " model.reward: evil.Bad}\ngrid: {t: {model.sampler.temperature: [1.0]}}\n",
        encoding="utf-8",
    )
    from dia_lightning.lab.study import command

    with pytest.raises(UserError, match=r"^study small/t\S*: (--allow|.*--allow evil$)"):
        command.run_study(["small.yaml", "--out", "out"])
    with pytest.raises(UserError, match=r"^--allow: unknown option|^study small/\S+: --allow"):
        command.run_study(["small.yaml", "--out", "out", "--allow", "evil"])
    assert not (here / "out").exists()
