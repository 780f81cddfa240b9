"""SIGKILL at random moments: each run is killed 20 times, goes on from what is there, and ends
as one that was left alone.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dia_lightning import cli
from tests.lab.study.test_run import STUDY

pytestmark = pytest.mark.slow
ROOT, N_KILLS = Path(cli.__file__).parents[1], 20
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands run in the folder `killed` of an empty one; what they leave in `whole` is the
    reference.
    """
    (tmp_path / "killed").mkdir()
    (tmp_path / "whole").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(arguments: list[str], folder: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "dia_lightning", *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(running: "subprocess.Popen[str]") -> None:
    _, err = running.communicate(timeout=600)
    assert running.returncode == 0, err


def kill_often(arguments: Callable[[], list[str]], check: Callable[[], None]) -> None:
    """Run in `whole` to the end; in `killed` kill 20 times and go on; `check` whenever a run there
    has come to its end.

    The first quarter of a run is Python's imports, and is left out of the moments.
    """
    begin = time.monotonic()
    finish(start(arguments(), "whole"))
    seconds, moments, kills, ends = time.monotonic() - begin, random.Random(0), 0, 0
    while kills < N_KILLS:
        running = start(arguments(), "killed")
        try:
            running.wait(moments.uniform(0.25, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            running.send_signal(
                signal.SIGKILL
            )  # the one process: those that it started have to notice
            running.communicate()
            kills += 1
            continue
        finish(running)
        check()
        ends += 1
        rmtree("killed")
        Path("killed").mkdir()
    finish(start(arguments(), "killed"))
    check()
    print(f"{kills} kills within {seconds:.0f} s, {ends + 1} runs to the end")


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def assert_same_texts(found: Path, whole: Path) -> None:
    for name in ("predictions.jsonl", "base_predictions.jsonl"):
        if (whole / name).exists():
            assert (found / name).read_bytes() == (whole / name).read_bytes()
    figures = [
        json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        for folder in (found, whole)
    ]
    for name in (
        "complete",
        "n",
        "reward",
        "reward_std",
        "perplexity",
        "self_bleu",
        "distinct_2",
        "config_hash",
    ):
        assert figures[0][name] == figures[1][name]


def test_predict(here: Path) -> None:
    size = [
        "--data.n_texts=24",
        "--data.batch_size=2",
        "--data.max_length=24",
        "--trainer.callbacks.folder=out",
    ]

    def check() -> None:
        assert_same_texts(Path("killed/out"), Path("whole/out"))
        parts = sorted(path.name for path in Path("killed/out/parts").rglob("*.json"))
        assert parts == [f"{i:06d}.json" for i in range(12)]

    kill_often(lambda: ["predict", *size], check)


def test_sampling_data(here: Path, lm_folder: Path) -> None:
    fit = [
        "fit",
        "--config",
        "configs/ddpm_tiny.yaml",
        "--model.network.width=16",
        "--model.network.layers=1",
        "--model.network.heads=2",
    ]
    base = [
        "--model.base_lm=checkpoints/tiny/lm",
        "--model.init_from=random",
        "--data.base_lm=checkpoints/tiny/lm",
    ]
    size = ["--data.n_texts=2000", "--data.n_val=48", "--data.shard_size=64", "--data.batch_size=8"]
    short = [
        "--trainer.max_steps=-1",
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=1",
        "--trainer.limit_val_batches=0",
    ]

    def check() -> None:
        found, whole = (
            {path.name: path for path in Path(folder).glob("runs/samples/*/*")}
            for folder in ("killed", "whole")
        )
        assert len(whole) == 32
        assert found.keys() == whole.keys()  # no piece of a file either
        for name, path in whole.items():
            # Each also notes the seconds that it took.
            assert all(
                torch.equal(rows, load_file(path)[key])
                for key, rows in load_file(found[name]).items()
            )

    kill_often(lambda: [*fit, *base, *size, *short], check)


def test_fit(here: Path, lm_folder: Path) -> None:
    (here / "often.yaml").write_text(
        "trainer:\n  log_every_n_steps: 5\n  val_check_interval: 50\n  max_steps: 300\n "
        " callbacks:\n  - class_path: lightning.pytorch.callbacks.ModelCheckpoint\n    init_args:"
        " {save_last: true, every_n_train_steps: 10}\n  - class_path:"
        " dia_lightning.callbacks.WeightEMA\n    init_args: {decay: 0.9}\n  - class_path:"
        " dia_lightning.callbacks.Export\n    init_args: {folder: denoiser}\n",
        encoding="utf-8",
    )
    base = [
        f"--model.base_lm={lm_folder}",
        f"--data.base_lm={lm_folder}",
        "--model.init_from=random",
        "--model.time_warp=20",
    ]
    size = [
        "--model.network.width=64",
        "--model.network.layers=2",
        "--model.network.heads=2",
        "--model.network.max_length=16",
        "--data.max_length=16",
    ]
    data = [
        "--data.n_texts=400",
        "--data.n_val=32",
        "--data.shard_size=216",
        "--data.batch_size=32",
        "--model.optimizer.warmup_steps=20",
    ]

    def arguments() -> list[str]:
        last = sorted(Path("killed").rglob("last.ckpt"), key=lambda path: path.stat().st_mtime_ns)
        # In `whole` there is none before it ends.
        goes_on = [f"--ckpt_path={last[-1].resolve()}"] if last else []
        return [
            "fit",
            "--config",
            "configs/ddpm_tiny.yaml",
            "--config",
            str(here / "often.yaml"),
            *base,
            *size,
            *data,
            *goes_on,
        ]

    def check() -> None:
        found, whole = (
            load_file(Path(folder) / "denoiser/model.safetensors") for folder in ("killed", "whole")
        )
        assert found.keys() == whole.keys()
        for name, weight in whole.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-7)
        assert_same_losses()

    kill_often(arguments, check)


def assert_same_losses() -> None:
    """Of every step that any of the runs noted; the whole run noted them all."""
    (whole,) = losses("whole")
    assert len(whole["train/loss"]) == 60
    assert len(whole["val/loss"]) == 6
    runs = losses("killed")
    for run in runs:
        for name, values in run.items():
            for step, value in values.items():
                assert value == pytest.approx(whole[name][step], rel=1e-5), (name, step)
    assert max(max(run["train/loss"]) for run in runs if run["train/loss"]) == 299


def losses(folder: str) -> list[dict[str, dict[int, float]]]:
    """By name and step, of each run."""
    found = []
    for events in sorted(Path(folder).rglob("events.out.tfevents.*")):
        run = EventAccumulator(str(events), size_guidance={"scalars": 0})
        run.Reload()
        known = set(run.Tags()["scalars"])
        names = ("train/loss", "val/loss")
        found.append(
            {
                name: {e.step: e.value for e in run.Scalars(name)} if name in known else {}
                for name in names
            }
        )
    return found


def test_ablations(here: Path) -> None:
    (here / "small.yaml").write_text(STUDY.replace("n_texts: 6", "n_texts: 60"), encoding="utf-8")

    def check() -> None:
        cells = sorted(
            path.parent.relative_to("whole") for path in Path("whole").rglob("predictions.jsonl")
        )
        assert len(cells) == 4
        for cell in cells:
            assert_same_texts("killed" / cell, "whole" / cell)
            said = json.loads(("killed" / cell / "cell.json").read_text(encoding="utf-8"))
            assert said["error"] == ""
        assert Path("killed/out/report.html").exists()

    kill_often(lambda: ["study", str(here / "small.yaml"), "--jobs", "2", "--out", "out"], check)
