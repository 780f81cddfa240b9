"""Several processes draw one cache: each shard once, the rows of one process, and what is
finished stays.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from dia_lightning import cli
from dia_lightning.data import ModelSamples

# Both processes run this; Lightning starts the second one in the first run.
SCRIPT = """
import os, sys
from pathlib import Path
import lightning as L
from dia_lightning.data import ModelSamples, shared
from dia_lightning.training import DenoiserModule, Network
from dia_lightning.errors import UserError
from tests.data.test_shared_drawing import made

lm, work, what = sys.argv[1:]
RANK = int(os.environ.get("LOCAL_RANK", 0))
draw = ModelSamples.draw

def noted(self, shard, device):
    if what == "fault" and shard == 3:
        raise RuntimeError("the accelerator is gone")
    with open(f"{work}/drawn-{self.trainer.global_rank}", "a") as file:
        file.write(f"{shard}\\n")
    return draw(self, shard, device)

ModelSamples.draw = noted

def fit(cache):
    model = DenoiserModule(lm, Network(16, 1, 2, 12), init_from="random")
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=1, logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )
    data = made(lm, cache)
    trainer.fit(model, datamodule=data)
    return data

cache = Path(work) / "cache"
data = fit(cache)
if what == "again":
    for shard in (1, 3):
        if data.trainer.global_rank == 0:
            data.shard_path(data.folder, shard).unlink()
    data.trainer.strategy.barrier()
    fit(cache)
    shared.SECONDS_TO_APPEAR = 0
    try:
        fit(f"{cache}-{data.trainer.global_rank}")
    except UserError as error:
        Path(work, f"apart-{data.trainer.global_rank}").write_text(str(error))
"""


def made(lm: str, cache: Path | str) -> ModelSamples:
    """36 rows in 5 shards of 8."""
    return ModelSamples(lm, 32, 4, 12, 16, cache=str(cache), shard_size=8)


def run(work: Path, lm_folder: Path, what: str) -> "subprocess.CompletedProcess[str]":
    (work / "fit.py").write_text(SCRIPT)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(cli.__file__).parents[1]),
    }
    command = [sys.executable, str(work / "fit.py"), str(lm_folder), str(work), what]
    return subprocess.run(
        command, cwd=work, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def drawn(work: Path, rank: int) -> list[int]:
    return [int(line) for line in (work / f"drawn-{rank}").read_text().split()]


def rows(lm_folder: Path, cache: Path) -> dict[str, list[torch.Tensor]]:
    data = made(str(lm_folder), cache)
    shards = sorted(data.folder.glob("*"))
    assert [path.name for path in shards] == [f"shard-{i:05d}.safetensors" for i in range(5)]
    return {
        name: [load_file(path)[name] for path in shards] for name in ("tokens", "prompt_length")
    }


def assert_rows_of_one_process(lm_folder: Path, cache: Path) -> None:
    alone = made(str(lm_folder), cache.parent / "alone")
    alone.setup("fit")
    one, two = rows(lm_folder, cache.parent / "alone"), rows(lm_folder, cache)
    assert all(torch.equal(a, b) for name in one for a, b in zip(one[name], two[name], strict=True))


def test_two_processes_draw_each_shard_once(lm_folder: Path, tmp_path: Path) -> None:
    """All shards; two that are missing; and into folders that they do not share, which is
    refused.
    """
    ended = run(tmp_path, lm_folder, "again")
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert drawn(tmp_path, 0) == [0, 2, 4, 1, 0, 2, 4]
    assert drawn(tmp_path, 1) == [1, 3, 3, 1, 3]
    assert_rows_of_one_process(lm_folder, tmp_path / "cache")
    for rank in range(2):
        refused = (tmp_path / f"apart-{rank}").read_text()
        assert refused.startswith(
            f"cache: {tmp_path}/cache-{rank} lacks what other processes wrote"
        )


def test_a_process_that_fails_leaves_what_is_finished(lm_folder: Path, tmp_path: Path) -> None:
    ended = run(tmp_path, lm_folder, "fault")
    assert ended.returncode != 0
    assert "the accelerator is gone" in ended.stderr
    assert drawn(tmp_path, 1) == [1]
    [folder] = (tmp_path / "cache").iterdir()
    left = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*.safetensors")}
    assert "shard-00001.safetensors" in left
    assert "shard-00003.safetensors" not in left
    made(str(lm_folder), tmp_path / "cache").setup("fit")
    assert all((folder / name).stat().st_mtime_ns == time for name, time in left.items())
    for rest in folder.glob("*.tmp*"):  # of the process that was killed
        rest.unlink()
    assert_rows_of_one_process(lm_folder, tmp_path / "cache")
