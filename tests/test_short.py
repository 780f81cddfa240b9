"""Short names of the everyday options: the same run, and the same short names in messages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dia_lightning import cli
from dia_lightning.settings import parser
from dia_lightning.settings.short import SHORT, as_typed, expand

Run = Callable[..., tuple[int, str, str]]
VALUES = {
    "lam": "3", "reward": "dia_lightning.rewards.Length", 
    "prompts": "p.txt", "n": "5", "sampler": "BestOfN",
    "base_lm": "mine", "seed": "7",
}  # fmt: skip


def options(*arguments: str) -> Any:
    found = parser.options_of(cli.prepare_arguments(list(arguments)))
    found.pop("config")
    return found


def test_each_is_its_long_one() -> None:
    assert VALUES.keys() == SHORT.keys()
    short = [f"--{name}={value}" for name, value in VALUES.items()] + ["--reward.target=9"]
    long = [f"--{SHORT[name]}={value}" for name, value in VALUES.items()]
    long += ["--model.reward.target=9"]
    spaced = [word for argument in short for word in argument.split("=")]
    first, *others = [options("predict", *given) for given in (short, long, spaced)]
    assert all(other == first for other in others)
    model, data = first.model.init_args, first.data.init_args
    assert (model.lam, model.seed, model.base_lm) == (3, 7, "mine")
    assert (data.n_texts, data.prompts, data.base_lm) == (5, "p.txt", "mine")
    assert model.sampler.class_path.endswith(".BestOfN")
    assert model.reward.init_args.target == 9


def test_in_a_training() -> None:
    found = options(
        "fit", "--config", "configs/critic_tiny.yaml", "--seed=5", "--n=9", "--reward=Coverage"
    )
    assert (found.seed_everything, found.data.init_args.n_texts) == (5, 9)
    assert found.model.init_args.reward.class_path == "dia_lightning.rewards.Coverage"


def test_what_is_no_short_name_stays() -> None:
    stays = ["predict", "--model.lam=3", "--lambda=3", "--n_texts=4", "--trainer.n=3", "-n", "lam"]
    assert expand(stays) == stays
    assert expand(["--n", "--n.a", "--reward+=x"]) == [
        "--data.n_texts", "--data.n_texts.a", "--model.reward+=x",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("--lamb=3", ["--lamb: unknown option; did you mean --lam (--model.lam)?"]),
        ("--promts=3", ["--promts: unknown option; did you mean --prompts (--data.prompts)?"]),
        ("--sampller=3", ["did you mean --sampler (--model.sampler)?"]),
        ("--model.lamda=3", ["--model.lamda: ", "did you mean lam? (--lam for short)"]),
        ("--data.promts=x", ["did you mean prompts? (--prompts for short)"]),
        ("--data.n_text=3", ["did you mean n_texts? (--n for short)"]),
        ("--batchsize=3", ["did you mean --data.batch_size?"]),
        ("--n_texts=3", ["did you mean --data.n_texts?"]),
        ("--sampler.partikles=3", ["--sampler.partikles: unknown", "did you mean particles?"]),
        ("--lam=-1", ["--lam: -1.0 given, allowed: 0 or more"]),
        ("--lam=x", ["--lam: x given, allowed: float"]),
        ("--n=0", ["--n: 0 given, allowed: 1 or more"]),
        ("--seed=-4", ["--seed: -4 given, allowed: 0 to 4294967295"]),
        ("--reward=Nope", ["--reward: Nope given"]),
        ("--prompts=nope.txt", ["--prompts: no such file"]),
        ("--n", ["--n: no value given"]),
    ],
)
def test_messages_have_the_name_that_was_typed(lightning: Run, given: str, says: list[str]) -> None:
    code, _, err = lightning("predict", given)
    assert code == 2
    assert err.count("\n") == 1
    assert all(part in err for part in says), err


def test_an_option_that_a_later_one_replaces(lightning: Run) -> None:
    code, _, err = lightning("predict", "--sampler.n=4", "--sampler=BestOfN")
    assert code == 2
    assert err == (
        "error: --sampler.n: given before --sampler, which replaces the part; write --sampler"
        " first\n"
    )


def test_only_what_was_typed_short_is_shown_short() -> None:
    long = "--model.init_args.lam: 3; --model.lambda; --data.n_texts"
    assert as_typed(long, ["predict", "--n", "3"]) == long.replace("--data.n_texts", "--n")
    assert as_typed(long, ["predict", "--lam=3"]) == "--lam: 3; --model.lambda; --data.n_texts"
    assert as_typed(long, ["predict", "--model.lam=3"]) == long


def test_they_come_first_in_the_help() -> None:
    for command in ("predict", "test"):
        text = cli.command_help(command)
        places = [text.index(f"  --{name} ") for name in (*SHORT, "out")]
        assert max(places) < text.index("--model.denoiser")
        assert max(places) < text.index("--config FILE  ")


def test_a_study_may_use_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = parser.options_of(["predict", "--config=" + str(shipped("dia_tiny")), "--lam=2"])
    assert found.model.init_args.lam == 2


def shipped(name: str) -> Path:
    return Path(cli.__file__).parents[1] / f"configs/{name}.yaml"
