"""What is said once: the base model, and the folder of all that a run writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dia_lightning.callbacks import PredictionWriter
from dia_lightning.data import ModelSamples, PromptData, TextFiles
from dia_lightning.errors import UserError
from dia_lightning.settings import parser

Run = Callable[..., tuple[int, str, str]]
FEW = ["--n=2", "--data.batch_size=2", "--data.max_length=8", "--sampler=BestOfN", "--sampler.n=2"]
OLD = """
trainer:
  default_root_dir: runs/old
  callbacks: [{class_path: dia_lightning.callbacks.PredictionWriter, init_args: {folder: runs/t}}]
model: {class_path: dia_lightning.GuidedSamplerModule, init_args: {reward: VaderSentiment}}
data: {class_path: dia_lightning.data.PromptData}
"""
FIT = """
trainer:
  max_steps: 1
  limit_val_batches: 0
  enable_progress_bar: false
  callbacks: [{class_path: dia_lightning.callbacks.Export}]
model: {class_path: dia_lightning.training.DenoiserModule}
data:
  class_path: dia_lightning.data.ModelSamples
  init_args: {n_texts: 4, n_val: 4, shard_size: 4, batch_size: 2, cache: cache}
"""


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def options(*arguments: str) -> Any:
    return parser.options_of(["predict", *arguments])


# The folder


def test_out_is_the_folder_of_all_that_predict_and_test_write(
    lightning: Run, tmp_path: Path
) -> None:
    assert lightning("predict", *FEW, "--out", "a")[0] == 0
    assert files(tmp_path) == {"a"}
    written = {"config.yaml", "predictions.jsonl", "metrics.json", "parts", "tensorboard"}
    assert files(tmp_path / "a") == written | {"base_predictions.jsonl"}
    code, out, err = lightning("predict", *FEW, "--out=a", "--seed=0")
    assert (code, err) == (0, "")
    assert "1 of 1 batches were there" in out
    config = ["--config", "configs/dia_tiny.yaml"]
    assert lightning("test", *config, *FEW, "--out", "b/c", "--seed=1")[0] == 0
    assert files(tmp_path) == {"a", "b"}
    assert files(tmp_path / "b/c") > written | {"report.html"}
    code, _, err = lightning("test", "--config", "b/c/config.yaml", "--out=d")
    assert code == 0, err
    assert files(tmp_path / "d") >= written
    lines = [(tmp_path / name / "predictions.jsonl").read_text("utf-8") for name in ("b/c", "d")]
    assert lines[0] == lines[1]


def test_out_is_the_folder_of_all_that_fit_writes(lightning: Run, tmp_path: Path) -> None:
    Path("fit.yaml").write_text(FIT, encoding="utf-8")
    small = ["--config", "fit.yaml"]
    code, _, err = lightning("fit", *small, "--out", "a")
    assert code == 0, err
    assert files(tmp_path) == {"a", "cache", "fit.yaml"}
    assert files(tmp_path / "a") == {"denoiser", "version_0", ".fit.lock"}
    assert files(tmp_path / "a/denoiser") == {"config.json", "model.safetensors", "costs.json"}
    logs = files(tmp_path / "a/version_0")
    assert {"config.yaml", "checkpoints"} < logs
    assert any(name.startswith("events.out") for name in logs)
    named = "--trainer.callbacks.folder=net"
    assert lightning("fit", *small, "--out", "b", "--trainer.logger=false", named)[0] == 0
    assert files(tmp_path / "b") == {"checkpoints", "config.yaml", ".fit.lock"}
    assert "model.safetensors" in files(tmp_path / "net")


@pytest.mark.parametrize(
    ("arguments", "root", "folder"),
    [
        ([], "runs/old", "runs/t"),
        (["--out=o"], "o", None),
        (["--out", "o", "--trainer.callbacks.folder=f"], "o", "f"),
        (["--trainer.callbacks.init_args.folder=f", "--out=o"], "o", "f"),
        (["--out=o", "--trainer.default_root_dir=d"], "d", None),
        (["--trainer.callbacks.folder=f"], "runs/old", "f"),
    ],
)
def test_the_command_line_wins_over_files_and_the_special_over_the_general(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], root: str, folder: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("old.yaml").write_text(OLD, encoding="utf-8")
    found = options("--config=old.yaml", *arguments).trainer
    assert found.default_root_dir == root
    assert found.callbacks[0].init_args.folder == folder


def test_out_in_a_file_and_without_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = OLD[OLD.index("model:") :]
    Path("plain.yaml").write_text(text, encoding="utf-8")
    Path("placed.yaml").write_text(f"out: here\n{text}", encoding="utf-8")
    assert options("--config=plain.yaml").trainer.default_root_dir == "runs/predict"
    assert options("--config=placed.yaml").trainer.default_root_dir == "here"
    assert options("--config=placed.yaml", "--out=there").trainer.default_root_dir == "there"
    with pytest.raises(UserError, match=r"^--out: an empty name given"):
        options("--config=plain.yaml", "--out=")


@pytest.mark.parametrize("arguments", [["--out=file"], ["--out", "file/x"], ["--out=file/x/y"]])
def test_an_out_that_cannot_be_written(
    lightning: Run, tmp_path: Path, arguments: list[str]
) -> None:
    (tmp_path / "file").touch()
    code, _, err = lightning("predict", *FEW, *arguments)
    assert code == 2
    assert err.startswith("error: --out: ")
    assert err.count("\n") == 1


def test_the_writer_follows_the_trainer() -> None:
    assert PredictionWriter().folder == Path(".")
    assert PredictionWriter("there").folder == Path("there")


# The base model


@pytest.mark.parametrize(
    "arguments",
    [
        ["--data.base_lm=other"],
        ["--data.init_args.base_lm", "other"],
        ["--base_lm=other", "--data.base_lm=checkpoints/tiny/lm"],
    ],
)
def test_another_base_model_for_the_data_is_refused(lightning: Run, arguments: list[str]) -> None:
    code, _, err = lightning("predict", *FEW, *arguments)
    assert code == 2
    assert err.startswith(f"error: {next(a for a in arguments if 'data' in a).partition('=')[0]}: ")
    assert "leave it out" in err
    assert err.count("\n") == 1


def test_the_data_takes_the_models(lm_folder: Path) -> None:
    config = ["--config", "configs/dia_tiny.yaml"]
    from dia_lightning import cli

    for command, file in (
        ("predict", "dia_tiny"), ("test", "tasks/safety_tiny"), ("fit", "ddpm_tiny"),
        ("validate", "critic_tiny"), ("fit", "baselines/ppo_tiny"),
    ):  # fmt: skip
        config = [command, "--config", f"configs/{file}.yaml", "--base_lm", str(lm_folder)]
        found = parser.options_of(cli.prepare_arguments(config))
        assert found.data.init_args.base_lm == found.model.init_args.base_lm == str(lm_folder)
        again = [*config, f"--data.base_lm={lm_folder}"]
        assert parser.options_of(cli.prepare_arguments(again)).data.init_args.base_lm


def test_in_python_too(lm_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the food\nthe pub\n", encoding="utf-8")
    for data in (PromptData(), ModelSamples(), TextFiles(str(tmp_path / "a.txt"))):
        with pytest.raises(
            UserError, match=r"^(base_lm|tokenizer): none given, and the model has no"
        ):
            data.setup("fit")
        name = "base_lm_name" if isinstance(data, TextFiles) else "base_lm"
        module = type("Module", (), {name: str(lm_folder)})()
        data.trainer = type("Trainer", (), {"lightning_module": module})()  # type: ignore[assignment]
        if isinstance(data, TextFiles):
            data.prepare_data()
            data.setup("fit")
            assert len(data.tokenizer) == 280
        elif isinstance(data, PromptData):
            data.max_length = 8
            data.setup("predict")
            data.base_lm = "another"
            with pytest.raises(UserError, match=r"base_lm: another given, allowed: the model's"):
                data.setup("predict")
        else:
            assert len(data.lm.tokenizer) == 280


def test_the_saved_settings_say_it_once_more(lightning: Run, tmp_path: Path) -> None:
    """A run's own config.yaml has the data's base_lm, and gives the same run again."""
    assert lightning("predict", *FEW, "--out=a")[0] == 0
    saved = yaml.safe_load((tmp_path / "a/config.yaml").read_text(encoding="utf-8"))
    assert saved["data"]["init_args"]["base_lm"] == saved["model"]["init_args"]["base_lm"]
    assert saved["out"] == saved["trainer"]["default_root_dir"] == "a"
    before = json.loads((tmp_path / "a/metrics.json").read_text(encoding="utf-8"))
    code, out, err = lightning("predict", "--config=a/config.yaml")
    assert code == 0, err
    assert "1 of 1 batches were there" in out
    after = json.loads((tmp_path / "a/metrics.json").read_text(encoding="utf-8"))
    assert after["config_hash"] == before["config_hash"]


def test_parts_that_are_defaults_are_spelled_out(lightning: Run, tmp_path: Path) -> None:
    """In config.yaml and --print_config, from which the same run comes again."""
    mine = ["--data.n_texts=2", "--data.batch_size=2", "--data.max_length=8", "--reward=Coverage"]
    plain = "model: {class_path: dia_lightning.GuidedSamplerModule, init_args: {sampler: Chains}}\n"
    text = f"{plain}data: {{class_path: dia_lightning.data.PromptData}}\n"
    Path("plain.yaml").write_text(text, encoding="utf-8")
    given = ["predict", "--config=plain.yaml", *mine]
    for sampler in ("Annealed", "Chains", "Diffusion"):
        code, out, err = lightning(*given, f"--sampler={sampler}", "--print_config")
        assert (code, err) == (0, "")
        assert "Unable to serialize" not in out
        Path("again.yaml").write_text(out, encoding="utf-8")
        first = parser.options_of([*given, f"--sampler={sampler}"])
        again = parser.options_of(["predict", "--config=again.yaml"])
        plain = [json.dumps(found.model.as_dict()) for found in (again, first)]
        assert plain[0] == plain[1]
        if sampler == "Chains":
            assert first.model.init_args.sampler.init_args.moves[0].class_path.endswith("Suffix")
        if sampler == "Annealed":
            assert first.model.init_args.sampler.init_args.start.class_path.endswith("BaseModel")
