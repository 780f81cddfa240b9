"""A mistake ends in one line with its cause, and data cannot act on the terminal."""

import io
import json
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from dia_lightning.terminal import console, one_line, visible

Run = Callable[..., tuple[int, str, str]]
SMALL = ("--data.n_texts=2", "--trainer.callbacks.folder=out")
MINE = """
    import lightning as L
    import torch
    from dia_lightning.types import Reward

    class Zero(Reward):
        def __call__(self, texts):
            return torch.zeros(len(texts))

    class Std(Zero):
        name = "std"

    class Named(Zero):
        def __init__(self, name: str = "zero") -> None:
            self.name = name

    class Lexicon(Named):
        def __init__(self, path: str = "lexicon.txt") -> None:
            self.words = open(path).read()

    class Key(Named):
        def __init__(self) -> None:
            {}["speech"]

    class Division(Named):
        def __init__(self, scale: float = 0.0) -> None:
            1 / scale

    class Module(Named):
        def __init__(self) -> None:
            import no_such_module

    class Wish(Named):
        def __init__(self) -> None:
            assert False, "no luck"

    class Callback(L.Callback):
        def __init__(self) -> None:
            raise LookupError("two\\nlines")

    def make() -> Reward:
        raise OSError("unplugged")
"""
SUM = "dia_lightning.rewards.WeightedSum"


@pytest.fixture
def mine(lightning: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`lightning predict` with the module `mine` allowed."""
    (tmp_path / "mine.py").write_text(textwrap.dedent(MINE))
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("mine", None)
    return lambda *arguments: lightning("predict", "--allow", "mine", *SMALL, *arguments)


def assert_refused(result: tuple[int, str, str], *parts: str) -> None:
    """One line, exit code 2, and nothing drawn."""
    code, _, err = result
    assert code == 2, err
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    for part in parts:
        assert part in err, err
    assert not list(Path.cwd().glob("out/parts/*/*.json"))


@pytest.mark.parametrize(
    ("reward", "cause"),
    [
        ("mine.Lexicon", "FileNotFoundError: [Errno 2] No such file or directory: 'lexicon.txt'"),
        ("mine.Key", "KeyError: 'speech'"),
        ("mine.Division", "ZeroDivisionError: float division by zero"),
        ("mine.Module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("mine.Wish", "AssertionError: no luck"),
        ("mine.make", "OSError: unplugged"),
    ],
)
def test_what_a_constructor_raises(mine: Run, reward: str, cause: str) -> None:
    assert_refused(
        mine("--model.reward", reward), f"--model.reward: {reward} cannot be built ({cause})"
    )


def test_what_a_nested_constructor_raises(mine: Run) -> None:
    part = json.dumps({"class_path": SUM, "init_args": {"rewards": [{"class_path": "mine.Key"}]}})
    assert_refused(
        mine(f"--model.reward={part}"), "--model", "mine.Key cannot be built (KeyError: 'speech')"
    )
    assert_refused(
        mine("--trainer.callbacks+=mine.Callback"),
        "--trainer.callbacks",
        "mine.Callback",
        "LookupError: two lines",
    )
    judge = {
        "class_path": "dia_lightning.lab.judges.Judge",
        "init_args": {"reward": {"class_path": "mine.Wish"}},
    }
    evaluation = {
        "class_path": "dia_lightning.lab.judges.Evaluation",
        "init_args": {"judges": [judge]},
    }
    given = f"--trainer.callbacks.evaluation={json.dumps(evaluation)}"
    assert_refused(mine(given), "judges", "mine.Wish cannot be built (AssertionError: no luck)")


@pytest.mark.parametrize(
    "option", ["--trainer.callbacks.n_shown", "--model.lam", "--data.n_texts", "--model.base_lm"]
)
def test_null_where_it_is_no_value(mine: Run, option: str) -> None:
    assert_refused(mine(option, "null"), f"{option}: null given, allowed: ")


def test_two_callbacks_of_one_kind(mine: Run) -> None:
    kind = "lightning.pytorch.callbacks.ModelCheckpoint"
    two = ("--trainer.enable_checkpointing=true", *[f"--trainer.callbacks+={kind}"] * 2)
    assert_refused(mine(*two), "--trainer.callbacks", "ModelCheckpoint")
    assert_refused(
        mine("--trainer.callbacks+=dia_lightning.callbacks.PredictionWriter"),
        "--trainer.callbacks",
        "twice",
    )


def test_names_that_no_output_can_have(mine: Run) -> None:
    assert_refused(mine("--model.reward=mine.Zero"), "--model.reward: mine.Zero sets no `name`")
    assert_refused(mine("--model.reward=mine.Std"), "--model.reward", "'std'", "reward_std")
    for name in ("", "a\nb", "\x1b[2K"):
        assert_refused(
            mine("--model.reward=mine.Named", f"--model.reward.name={name}"),
            "--model.reward",
            "is named",
        )
    named = [{"class_path": "mine.Named", "init_args": {"name": "a/b"}}]
    inner = {
        "class_path": SUM,
        "init_args": {
            "name": "a",
            "rewards": [{"class_path": "mine.Named", "init_args": {"name": "b"}}],
        },
    }
    both = json.dumps({"class_path": SUM, "init_args": {"rewards": [*named, inner]}})
    assert_refused(mine(f"--model.reward={both}"), "--model.reward", "two parts", "'a/b'")


@pytest.mark.parametrize("name", ["reward_zero", "training", "log_z", "nfe/base_lm", " "])
def test_names_of_judges_that_no_output_can_have(mine: Run, name: str) -> None:
    named = {"reward": {"class_path": "mine.Named"}, "name": name}
    judge = {"class_path": "dia_lightning.lab.judges.Judge", "init_args": named}
    evaluation = {
        "class_path": "dia_lightning.lab.judges.Evaluation",
        "init_args": {"judges": [judge]},
    }
    given = f"--trainer.callbacks.evaluation={json.dumps(evaluation)}"
    config = ("--config", "configs/zero_shot_tiny.yaml", "--model.reward=mine.Named")
    assert_refused(mine(*config, given), "judges", repr(name))


@pytest.mark.parametrize("value", ["-1e3", "-1E-3", "-.5e3"])
def test_a_negative_exponent_is_a_value(lightning: Run, value: str) -> None:
    assert_refused(lightning("predict", "--model.lam", value), f"--model.lam: {float(value)} given")


@pytest.mark.parametrize("value", ["-{prompt}", "-x", "--{prompt}"])
def test_a_text_that_begins_with_a_dash(lightning: Run, value: str) -> None:
    option = "--data.reading.template"
    expected = f"{option}: no value given; if {value} is its value, write {option}={value}"
    assert_refused(
        lightning("predict", "--model.lam", "-1", "--data.reading.template", value), expected
    )


@pytest.mark.parametrize("value", ["Pay ${amount} now", "Pay ${amount now", "Pay \\${amount} now"])
def test_a_text_with_a_brace(lightning: Run, value: str) -> None:
    for option in ("--data.prompts", "--data.reading.template"):
        assert_refused(lightning("predict", option, value), f"{option}: ", "belongs into a file")


def test_a_file_with_a_brace_is_read_as_it_is(lightning: Run, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("Pay ${amount} now")
    config = ("--config", "configs/zero_shot_tiny.yaml", *SMALL)
    code, _, err = lightning("predict", *config, "--data.prompts=p.txt")
    assert code == 0, err
    assert (
        json.loads((tmp_path / "out/predictions.jsonl").read_text().splitlines()[0])["prompt"]
        == "Pay ${amount} now"
    )


@pytest.mark.parametrize("command", ["predict", "test"])
def test_seed_everything_says_which_seed_counts(
    lightning: Run, tmp_path: Path, command: str
) -> None:
    config = ("--config", "configs/zero_shot_tiny.yaml")
    assert_refused(
        lightning(command, *config, "--seed_everything", "7"),
        "--seed_everything: 7 given",
        "--model.seed 7",
    )
    assert_refused(
        lightning(command, *config, "--seed_everything=0", "--model.seed=3"),
        "--seed_everything: 0 given",
    )
    (tmp_path / "seed.yaml").write_text("seed_everything: 5")
    assert_refused(
        lightning(command, *config, "--config=seed.yaml"), "--seed_everything (in", "--model.seed 5"
    )
    for same in (("--seed_everything=7", "--model.seed=7"), ("--model.seed=7",)):
        assert lightning(command, *config, *same, "--print_config")[0] == 0


def test_processes_that_do_not_know_of_each_other(
    lightning: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setitem(os.environ, name, value)
    expected = (
        "--trainer.devices: 4 processes",
        "--trainer.devices 2 --trainer.num_nodes 2 --trainer.strategy ddp",
    )
    assert_refused(
        lightning("predict", "--config", "configs/zero_shot_tiny.yaml", *SMALL), *expected
    )
    monkeypatch.setitem(os.environ, "RANK", "1")
    monkeypatch.setattr("dia_lightning.distributed._GRACE_S", 0.0)
    assert lightning("predict", "--config", "configs/zero_shot_tiny.yaml", *SMALL)[::2] == (2, "")


def test_data_cannot_act_on_the_terminal(lightning: Run, tmp_path: Path) -> None:
    bad = "The Eagle\x1b[2K\x07 \x9b2J \u202e is"
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": bad}))
    code, out, err = lightning(
        "predict", "--config", "configs/zero_shot_tiny.yaml", *SMALL, "--data.prompts=p.jsonl"
    )
    assert code == 0, err
    assert "\\x1b[2K\\x07 \\x9b2J \\u202e" in " ".join(out.split())
    assert not set("\x1b\x07\x9b\u202e") & set(out + err)


def test_every_control_character_is_shown() -> None:
    codes = [
        *range(9),
        *range(11, 32),
        *range(127, 160),
        *range(0x202A, 0x202F),
        *range(0x2066, 0x206A),
    ]
    for character in map(chr, codes):
        assert visible(character) == repr(character)[1:-1]
        assert character not in one_line(character)
    assert one_line("a\nb\tc é [b]") == "a⏎b c é [b]"
    screen = console()
    screen.file = io.StringIO()
    screen.print("[bold]:smile:\x1b[2K")
    assert screen.file.getvalue() == "[bold]:smile:\\x1b[2K\n"
