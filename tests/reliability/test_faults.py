"""What fails in the middle ends in one line, and what was finished before stays whole."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from dia_lightning import cli
from tests.conftest import Run
from tests.test_cli import assert_one_line

FEW = [
    "--data.n_texts=4",
    "--data.batch_size=2",
    "--data.max_length=8",
    "--trainer.callbacks.folder=out",
]
PREDICT = ["predict", "--config", "configs/zero_shot_tiny.yaml", *FEW]
FOLDER = "--trainer.callbacks.folder"
# Kills the process of one rank with its second batch; waits a moment before, so that the others are
# at work.
KILLER = """import os, signal, time, torch
from dia_lightning.types import Reward


class Killer(Reward):
    name = "killer"

    def __init__(self, rank: int) -> None:
        self.rank, self.calls = rank, []

    def __call__(self, texts):
        self.calls.append(1)
        if len(self.calls) == 2 and int(os.environ["LOCAL_RANK"]) == self.rank:
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(len(texts))
"""
HOLDER = """import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


@contextmanager
def disk_of(n_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond it: like a full disk, an error of the system in the
    middle of a write.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def stamps(*patterns: str) -> dict[Path, int]:
    """When the files that match were written."""
    return {
        path: path.stat().st_mtime_ns
        for pattern in patterns
        for path in Path().glob(pattern)
        if path.is_file()
    }


def test_a_full_disk_costs_predict_no_finished_batch(lightning: Run) -> None:
    many = [*PREDICT, "--data.n_texts=256", "--data.batch_size=128"]
    assert lightning(*many, "--trainer.limit_predict_batches=1")[0] == 0
    before = stamps("out/parts/*/*.json")
    [part] = before
    settings = Path("runs/zero_shot_tiny/config.yaml").stat().st_size
    assert part.stat().st_size > 2 * settings
    with disk_of(settings + 1000):
        result = lightning(*many)
    assert_one_line(result, f"{FOLDER}: out/", "File too large; what is finished is kept")
    assert stamps("out/parts/*/*.json") == before
    assert not list(Path().rglob("*.tmp*"))
    assert lightning(*many)[0] == 0
    assert stamps("out/parts/*/*.json").items() > before.items()
    assert json.loads(Path("out/metrics.json").read_text(encoding="utf-8"))["complete"] is True
    assert len(Path("out/predictions.jsonl").read_text(encoding="utf-8").splitlines()) == 256


def test_a_full_disk_costs_fit_no_checkpoint(lightning: Run, lm_folder: Path) -> None:
    base = [
        f"--model.base_lm={lm_folder}",
        f"--data.base_lm={lm_folder}",
        "--model.init_from=random",
    ]
    size = [
        "--model.network.width=16",
        "--model.network.layers=1",
        "--model.network.heads=2",
        "--model.network.max_length=8",
        "--data.max_length=8",
    ]
    data = [
        "--data.n_texts=16",
        "--data.n_val=2",
        "--data.batch_size=4",
        "--data.shard_size=18",
        "--trainer.logger=false",
    ]
    Path("often.yaml").write_text(
        "trainer:\n  limit_val_batches: 0\n  default_root_dir: run\n  callbacks:\n"
        "  - class_path: lightning.pytorch.callbacks.ModelCheckpoint\n"
        "    init_args: {save_last: true, every_n_train_steps: 1}\n"
        "  - class_path: dia_lightning.callbacks.Export\n    init_args: {folder: denoiser}\n",
        encoding="utf-8",
    )
    fit = [
        "fit",
        "--config",
        "configs/ddpm_tiny.yaml",
        "--config",
        "often.yaml",
        *base,
        *size,
        *data,
    ]
    with disk_of(500):
        assert_one_line(
            lightning(*fit, "--trainer.max_steps=1"),
            "--data.init_args.cache",
            "File too large",
        )
    assert not list(Path().rglob("*.safetensors*"))
    assert lightning(*fit, "--trainer.max_steps=1")[0] == 0
    [last] = Path("run").rglob("last.ckpt")
    before = stamps("run/**/*.ckpt", "denoiser/*", "runs/samples/*/*")
    settings = Path("run/config.yaml").stat().st_size
    assert last.stat().st_size > 2 * settings
    with disk_of(settings + 1000):
        result = lightning(*fit, "--trainer.max_steps=2", f"--ckpt_path={last}")
    assert_one_line(result, "File too large; what is finished is kept")
    assert stamps("run/**/*.ckpt", "denoiser/*", "runs/samples/*/*") == before
    assert torch.load(last, weights_only=True)["global_step"] == 1
    assert lightning(*fit, "--trainer.max_steps=2", f"--ckpt_path={last}")[0] == 0


def test_a_folder_that_nobody_may_write_to(lightning: Run) -> None:
    """/proc, where root may not either."""
    assert_one_line(
        lightning(*PREDICT[:-1], "--trainer.callbacks.folder=/proc/out"),
        "--trainer.callbacks",
        "/proc/out",
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a read-only folder")
def test_a_read_only_folder(lightning: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o555)
    assert_one_line(lightning(*PREDICT), "--trainer.callbacks", "out", "Permission denied")


def test_a_folder_belongs_to_one_run_until_that_ends(lightning: Run, tmp_path: Path) -> None:
    """Also where it ends by SIGKILL: no lock is left behind."""
    assert lightning(*PREDICT)[0] == 0
    before = stamps("out/*", "out/parts/*/*")
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDER, "out/parts/.lock"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        result = lightning(*PREDICT, "--data.n_texts=2")
        assert_one_line(
            result,
            f"{FOLDER}: another run is writing to out; wait, or give another folder",
        )
        assert stamps("out/*", "out/parts/*/*") == before
    finally:
        other.kill()
        other.communicate()
    assert lightning(*PREDICT, "--data.n_texts=2")[0] == 0
    assert len(Path("out/predictions.jsonl").read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_others(rank: int, tmp_path: Path) -> None:
    (tmp_path / "killer.py").write_text(KILLER, encoding="utf-8")
    root = str(Path(cli.__file__).parents[1])
    known = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(tmp_path), root]),
    }
    two = [
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--trainer.accelerator=cpu",
        "--data.n_texts=12",
    ]
    reward = ["--allow=killer", "--model.reward=killer.Killer", f"--model.reward.rank={rank}"]
    command = [sys.executable, "-m", "dia_lightning", *PREDICT, *two, *reward]
    with (tmp_path / "err").open("w") as err:
        # A session of its own, whose processes are counted at the end; a pipe would wait for all of
        # them.
        running = subprocess.Popen(
            command, cwd=tmp_path, env=known, stdout=err, stderr=err, start_new_session=True
        )
        code = running.wait(timeout=280)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.killpg(running.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.2)
    else:
        os.killpg(running.pid, signal.SIGKILL)
        pytest.fail("a process went on")
    said = (tmp_path / "err").read_text()
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.startswith(("error", "internal"))]
    fate = "was ended by SIGKILL" if rank else "is gone"
    assert lines == [
        f"error: the process of rank {rank} {fate}, so the whole run ends; what is finished is"
        " kept, the same command goes on from there"
    ]
    assert code == (1 if rank else -signal.SIGKILL)
    assert list(tmp_path.glob("out/parts/*/*.json"))
    assert not list(tmp_path.rglob("*.tmp*"))
