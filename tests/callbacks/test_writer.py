"""What `predict` leaves in its folder: which parts a rerun may take, early ends, two processes."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from dia_lightning import cli
from dia_lightning.callbacks import PredictionWriter
from dia_lightning.callbacks.batch_files import from_json, records, to_json
from dia_lightning.callbacks.run_key import describe, run_key
from dia_lightning.data import PromptData
from dia_lightning.errors import UserError
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.rewards import Keyword, Regex
from dia_lightning.samplers import Annealed, BaseModel, GuidedSamplerModule
from dia_lightning.settings import parser
from dia_lightning.types import Batch, Cost, Generations, Reward


class Length(Reward):
    """Characters; from the call `fails_at` on it raises, as a service that goes down."""

    name = "length"

    def __init__(self, fails_at: int = 1 << 30) -> None:
        self.fails_at, self.n_calls = fails_at, 0

    def __call__(self, texts: Sequence[str]) -> Tensor:
        self.n_calls += 1
        if self.n_calls > self.fails_at:
            raise ConnectionError("the service is down")
        return torch.tensor([float(len(text)) for text in texts])


def trainer_for(folder: Path, **options: Any) -> L.Trainer:
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    writer = PredictionWriter(str(folder))
    return L.Trainer(
        default_root_dir=folder, callbacks=[writer], enable_checkpointing=False, **quiet, **options
    )


def predict(
    folder: Path, lm: Path, prompts: Any = None, n: int = 6, batch_size: int = 2,
    reward: Reward | None = None, compare_base: bool = False, **options: Any,
) -> None:  # fmt: skip
    """`n` texts a prompt; with `compare_base` of p_θ twice, as a method and as its base line."""
    data = PromptData(str(lm), prompts, n_texts=n, batch_size=batch_size, max_length=12)
    module = GuidedSamplerModule(
        reward or Length(), BaseModel(), str(lm), compare_base=compare_base
    )
    trainer_for(folder, **options).predict(module, datamodule=data, return_predictions=False)


def lines(folder: Path, name: str = "predictions.jsonl") -> list[dict[str, Any]]:
    return [
        json.loads(line, parse_constant=pytest.fail)
        for line in (folder / name).read_text(encoding="utf-8").splitlines()
    ]


def metrics(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (folder / "metrics.json").read_text(encoding="utf-8"), parse_constant=pytest.fail
    )
    return found


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("parts/*/*.json"))


# Which parts a rerun may take


def test_a_rerun_draws_nothing_again(
    lm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict(tmp_path, lm_folder)
    before, texts = {path: path.stat().st_mtime_ns for path in parts(tmp_path)}, lines(tmp_path)
    assert len(before) == 3
    predict(tmp_path, lm_folder)
    assert {path: path.stat().st_mtime_ns for path in parts(tmp_path)} == before
    assert lines(tmp_path) == texts
    assert "3 of 3 batches were there" in capsys.readouterr().out


def test_an_edited_prompt_file_is_another_run(lm_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("the good food\n", encoding="utf-8")
    predict(tmp_path / "out", lm_folder, str(file), n=2)
    file.write_text("the bad food\n", encoding="utf-8")
    predict(tmp_path / "out", lm_folder, str(file), n=2)
    assert {line["prompt"] for line in lines(tmp_path / "out")} == {"the bad food"}


def test_other_weights_in_the_same_folder_are_another_run(lm_folder: Path, tmp_path: Path) -> None:
    lm = BaseLM.load(str(lm_folder))
    copy = tmp_path / "lm"
    lm.tokenizer.save_pretrained(copy)
    lm.model.save_pretrained(copy)
    predict(tmp_path / "out", copy, n=2)
    first = lines(tmp_path / "out")
    with torch.no_grad():
        lm.model.transformer.ln_f.weight.mul_(0.5)
    lm.model.save_pretrained(copy)
    predict(tmp_path / "out", copy, n=2)
    assert [line["log_p"] for line in lines(tmp_path / "out")] != [line["log_p"] for line in first]


def test_the_key_holds_precision_and_every_network(lm_folder: Path, tmp_path: Path) -> None:
    def key(add: float = 0.0, **options: Any) -> str:
        module = GuidedSamplerModule(Length(), BaseModel(), str(lm_folder), compare_base=False)
        module.critic_network = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(module.critic_network.weight, 1 + add)
        torch.nn.init.zeros_(module.critic_network.bias)
        data = PromptData(str(lm_folder), max_length=12)
        data.setup("predict")
        return run_key(trainer_for(tmp_path, **options), module, data)

    assert key() == key()
    assert len({key(), key(add=1e-6), key(precision="bf16-mixed")}) == 3


# What an object is


class Colour(Enum):
    RED, BLUE = 1, 2


@dataclass
class Pair:
    a: Any
    b: Any = 0


class Hidden:
    def __init__(self, w: float) -> None:
        self._w = w


class Dropped(Hidden):
    def __init__(self, w: float) -> None:
        self.other = w


class PassesOn(Hidden):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, {"b": 1}),
        (Path("a"), Path("b")),
        (Pair({"x": Path("a")}), Pair({"x": Path("b")})),
        (Hidden(1.0), Hidden(2.0)),
        (PassesOn(w=1.0), PassesOn(w=2.0)),
        (Hidden(1.0), PassesOn(w=1.0)),
        (Colour.RED, Colour.BLUE),
        ({1, 2}, {1, 3}),
        (torch.zeros(2), torch.ones(2)),
        (torch.float32, torch.bfloat16),
        (Keyword(["a"]), Keyword(["b"])),
        (Regex("a"), Regex("a", ignore_case=False)),
        (len, max),
        (None, False),
    ],
)
def test_what_differs_is_described_differently(one: Any, other: Any) -> None:
    assert json.dumps(describe(one)) != json.dumps(describe(other))
    assert describe(one) == describe(one)


def test_one_name_in_two_modules_is_two_classes() -> None:
    twin = type(
        "Length", (Length,), {"__module__": "elsewhere", "__qualname__": Length.__qualname__}
    )
    assert describe(twin()) != describe(Length())


def test_an_argument_that_cannot_be_found_is_an_error() -> None:
    with pytest.raises(UserError, match=r"Dropped: its argument 'w' .* `self.w = w`"):
        describe(Pair([Dropped(1.0)]))


# Files


def batch(**changes: Any) -> Generations:
    fields: dict[str, Any] = {
        "index": 3, "ids": [6, 7], "prompts": ["the", ""], "texts": ["a “b”", "😀 c"],
        "tokens": torch.tensor([[1, 2], [3, 0]]),
        "log_p": torch.tensor([-1 / 3, -2e-17], dtype=torch.float64),
        "n_tokens": torch.tensor([2, 1]), "rewards": {"x": torch.tensor([0.1, 0.2])},
        "reward": torch.tensor([0.1, 0.2]), "method": "m", "seed": 5, "latency_s": 0.5,
        "costs": {"base_lm": Cost(2, 6, 1e9)}, "peak_memory_mib": 1.5,
        "accept_rate": torch.tensor([0.25, 1.0]),
        "diagnostics": {"r_hat": torch.tensor([torch.nan, 1.5])}, "warm": False,
    }  # fmt: skip
    return Generations(**{**fields, **changes})


@pytest.mark.parametrize("given", [batch(), batch(accept_rate=None, diagnostics={}, warm=True)])
def test_a_part_comes_back_as_it_was(given: Generations) -> None:
    back = from_json(json.loads(json.dumps(to_json(given))))
    assert vars(back).keys() == vars(given).keys()
    for name, value in vars(given).items():
        if isinstance(value, Tensor) or name in ("rewards", "diagnostics"):
            torch.testing.assert_close(getattr(back, name), value, rtol=0, atol=0, equal_nan=True)
        else:
            assert getattr(back, name) == value
    assert records(back)[0]["log_p"] == -1 / 3


def test_base_texts_of_an_earlier_run_do_not_stay(lm_folder: Path, tmp_path: Path) -> None:
    predict(tmp_path, lm_folder, compare_base=True)
    assert len(lines(tmp_path, "base_predictions.jsonl")) == 6
    assert metrics(tmp_path)["base"]["n"] == 6
    predict(tmp_path, lm_folder)
    assert not (tmp_path / "base_predictions.jsonl").exists()
    assert "base" not in metrics(tmp_path)


def test_figures_that_need_more_texts_are_null(
    lm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict(tmp_path, lm_folder, n=1)
    found = metrics(tmp_path)
    assert found["complete"] is True
    assert found["reward_std"] is None
    assert found["self_bleu"] is None
    assert found["reward"] == lines(tmp_path)[0]["reward"]
    out = capsys.readouterr().out
    assert "nan" not in out
    assert any("std over texts" in line and "–" in line for line in out.splitlines())


def test_texts_that_are_the_same_are_told(
    lm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One particle of 48 carries the weight at λ = 1000 and is all texts; p_θ's own differ. The
    figures by prompt are those of the lines.
    """
    data = PromptData(str(lm_folder), ["the", "a"], n_texts=6, batch_size=6, max_length=12)
    sampler = Annealed([], particles=8)
    module = GuidedSamplerModule(Length(), sampler, str(lm_folder), lam=1000.0)
    trainer_for(tmp_path).predict(module, datamodule=data, return_predictions=False)
    warned = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert warned == [
        f"warning: prompt {i}: 6 of 6 texts are the same; raise particles (8)" for i in (1, 2)
    ]
    figures = metrics(tmp_path)
    for name, found in (
        ("predictions.jsonl", figures),
        ("base_predictions.jsonl", figures["base"]),
    ):
        told = lines(tmp_path, name)
        for number, prompt in enumerate(("the", "a")):
            own = [line for line in told if line["prompt"] == prompt]
            unique = len({line["text"] for line in own}) / 6
            assert [line["unique_texts"] for line in own] == pytest.approx([unique] * 6)
            row = found["by_prompt"][number]
            assert (row["prompt"], row["n"], row["unique_texts"]) == (
                prompt, 6, pytest.approx(unique),
            )  # fmt: skip
            for column in ("ess", "roots"):
                assert ((column in own[0]), (column in row)) == (found is figures,) * 2
        mean = sum(line["unique_texts"] for line in told) / 12
        assert found["unique_texts"] == pytest.approx(mean)
    assert figures["unique_texts"] == pytest.approx(1 / 6)
    assert figures["base"]["unique_texts"] > 0.5
    assert figures["roots"] == pytest.approx(1 / 48)
    assert 0 < figures["ess"] < 0.6
    for number, row in enumerate(figures["by_prompt"], 1):
        events = EventAccumulator(str(tmp_path / "tensorboard" / "annealed")).Reload()
        assert events.Scalars("prompts/roots")[number - 1].step == number
        value = events.Scalars("prompts/roots")[number - 1].value
        assert value == pytest.approx(row["roots"])
    predict(tmp_path / "base", lm_folder, compare_base=True)
    assert "the same" not in capsys.readouterr().err


def test_a_limit_on_batches_leaves_texts_without_figures(
    lm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict(tmp_path, lm_folder, limit_predict_batches=1)
    assert [line["id"] for line in lines(tmp_path)] == [0, 1]
    found = metrics(tmp_path)
    assert (found["complete"], found["n"], found["method"]) == (False, 2, "zero_shot")
    assert "reward" not in found
    assert "1 of 3 batches are finished, 2 are missing" in capsys.readouterr().out
    predict(tmp_path, lm_folder)
    assert [line["id"] for line in lines(tmp_path)] == list(range(6))
    assert metrics(tmp_path)["complete"] is True


def test_an_error_leaves_the_finished_batches_readable(lm_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the service is down"):
        predict(tmp_path, lm_folder, reward=Length(fails_at=2))
    assert [line["id"] for line in lines(tmp_path)] == [0, 1, 2, 3]
    assert metrics(tmp_path)["complete"] is False


def test_the_first_batch_of_every_process_is_cold(lm_folder: Path, tmp_path: Path) -> None:
    def warm() -> list[bool]:
        return [json.loads(path.read_text(encoding="utf-8"))[0]["warm"] for path in parts(tmp_path)]

    predict(tmp_path, lm_folder)
    assert warm() == [False, True, True]
    parts(tmp_path)[1].unlink()
    predict(tmp_path, lm_folder)
    assert warm() == [False, False, True]


def test_zero_shot_draws_in_the_base_models_own_precision(lm_folder: Path, tmp_path: Path) -> None:
    predict(tmp_path / "a", lm_folder, n=64, batch_size=64)
    predict(tmp_path / "b", lm_folder, n=64, batch_size=64, precision="bf16-mixed")
    assert [line["tokens"] for line in lines(tmp_path / "a")] == [
        line["tokens"] for line in lines(tmp_path / "b")
    ]


class Fragile(Length):
    """Raises, or answers NaN, on the texts of one prompt."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        values = super().__call__(texts)
        for i, text in enumerate(texts):
            if text.startswith("good"):
                if self.fault == "raises":
                    raise KeyError("good")
                values[i] = float("nan")
        return values


@pytest.mark.parametrize(
    ("fault", "message"), [("raises", "failed on the text 'good"), ("nan", "the law 'finite'")]
)
def test_a_reward_that_fails_on_one_text_costs_no_finished_batch(
    lm_folder: Path, tmp_path: Path, fault: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        predict(tmp_path, lm_folder, prompts=["the", "good"], n=2, reward=Fragile(fault))
    assert [line["prompt"] for line in lines(tmp_path)] == ["the", "the"]
    assert metrics(tmp_path)["complete"] is False


def test_every_prompt_is_checked_before_the_first_batch(lm_folder: Path) -> None:
    data = PromptData(
        str(lm_folder), ["the"] * 5 + ["the " * 30], n_texts=1, batch_size=2, max_length=12
    )
    with pytest.raises(UserError, match="allowed: at most 11"):
        data.setup("predict")


# Two processes


TWO = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu"]
# Both processes run this; Lightning starts the second one in the first run.
SCRIPT = """
import os, pathlib
from dia_lightning import cli
from dia_lightning.settings import parser
def run(*arguments):
    parser.run(cli.prepare_arguments(["predict", *arguments]))
common, aligned, two = {common}, {aligned}, {two}
run(*common, *two, "--trainer.callbacks.folder=two", "--data.n_texts=5")
if os.environ["LOCAL_RANK"] == "0":
    sorted(pathlib.Path("two").glob("parts/*/*.json"))[1].unlink()
run(*common, *two, "--trainer.callbacks.folder=two", "--data.n_texts=5")
run(*common, *two, "--trainer.callbacks.folder=single", "--data.n_texts=2")
run(*aligned, *two, "--trainer.callbacks.folder=aligned", "--data.n_texts=5")
"""


def test_two_processes_draw_every_text_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five texts in three batches; the same with one batch missing; one batch, which leaves a
    process without work; and the default sampler, with p_θ's texts beside its own."""
    (tmp_path / "p.txt").write_text("The Eagle\nCheap food\n", encoding="utf-8")
    few = ["--data.prompts=p.txt", "--data.batch_size=4", "--data.max_length=12"]
    common, aligned = (
        ["--config", f"configs/{name}_tiny.yaml", *few] for name in ("zero_shot", "dia")
    )
    script = tmp_path / "two.py"
    script.write_text(SCRIPT.format(common=common, aligned=aligned, two=TWO), encoding="utf-8")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(cli.__file__).parents[1]),
    }
    command = [sys.executable, str(script)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "2 of 3 batches were there" in done.stdout
    monkeypatch.chdir(tmp_path)
    for folder, n, options in (("two", 5, common), ("single", 2, common), ("aligned", 5, aligned)):
        one = [
            "predict",
            *options,
            f"--data.n_texts={n}",
            f"--trainer.callbacks.folder={folder}_one",
        ]
        parser.run(cli.prepare_arguments(one))
        assert lines(tmp_path / folder) == lines(tmp_path / f"{folder}_one")
        assert [line["id"] for line in lines(tmp_path / folder)] == list(range(2 * n))
        assert [line["prompt"] for line in lines(tmp_path / folder)] == ["The Eagle"] * n + [
            "Cheap food"
        ] * n
        assert (
            metrics(tmp_path / folder)["config_hash"]
            == metrics(tmp_path / f"{folder}_one")["config_hash"]
        )
        assert metrics(tmp_path / folder)["complete"] is True


def test_a_process_without_work_has_no_batches(lm_folder: Path) -> None:
    data = PromptData(str(lm_folder), n_texts=10, batch_size=2, max_length=12)
    data.setup("predict")
    data.skip({1})

    def share(rank: int, world: int) -> list[Batch]:
        data.trainer = type("", (), {"world_size": world, "global_rank": rank})()
        return list(data.predict_dataloader())

    assert [[b.index for b in share(rank, 3)] for rank in range(3)] == [[0, 4], [2], [3]]
    assert [len(share(rank, 6)) for rank in range(6)] == [1, 1, 1, 1, 0, 0]
