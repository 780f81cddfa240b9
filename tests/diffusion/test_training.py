"""Fitting: several processes against one, and what a run that was stopped does when it goes on."""

import csv
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from dia_lightning import cli
from dia_lightning.settings import parser

WORDS = ["the", "good", "bad", "cheap", "food", "is", "great", "poor", "near", "river", "pub"]
SIZE = [
    "--model.network.width=16",
    "--model.network.layers=1",
    "--model.network.heads=2",
    "--model.network.max_length=16",
]
FIT = [
    "--trainer.accelerator=cpu", "--trainer.precision=32", "--trainer.log_every_n_steps=1",
    "--trainer.callbacks=null", "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
    "--trainer.limit_val_batches=0", "--trainer.num_sanity_val_steps=0",
    "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
    "--trainer.enable_checkpointing=false", "--model.optimizer.warmup_steps=1",
    "--model.optimizer.lr=0.01",
]  # fmt: skip
REWARD = [
    "--model.denoiser=null",
    "--model.reward=dia_lightning.rewards.Regex",
    "--model.reward.pattern=good|great",
]
AGAIN = ["--model.network.activation_checkpointing=true"]
KINDS = {
    "ddpm": ["--model.time_warp=2", "--trainer.accumulate_grad_batches=2", *AGAIN],
    "critic": REWARD,
}
SCRIPT = """
import sys
from dia_lightning import cli
from dia_lightning.settings import parser
if __name__ == "__main__":
    for kind in " ".join(sys.argv[1:]).split(" -- "):
        parser.run(cli.prepare_arguments(kind.split()))
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of 1 to 12 words, so that the rows of a batch end at different places."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "texts.txt"
    path.write_text(
        "\n".join(" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(80)) + "\n"
    )
    return path


def arguments(kind: str, corpus: Path, lm_folder: Path, logs: Path, *more: str) -> list[str]:
    data = [
        "--data=dia_lightning.data.TextFiles",
        f"--data.path={corpus}",
        f"--data.tokenizer={lm_folder}",
        "--data.max_length=16",
    ]
    logger = ["--trainer.logger.save_dir", str(logs), "--trainer.logger.name", kind]
    model = [f"--model.base_lm={lm_folder}", *SIZE, *KINDS[kind]]
    return ["fit", "--config", f"configs/{kind}_tiny.yaml", *data, *model, *FIT, *logger, *more]


def losses(logs: Path, kind: str) -> list[float]:
    with (logs / kind / "version_0" / "metrics.csv").open(encoding="utf-8") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def test_two_processes_train_as_one_with_twice_the_batch(
    corpus: Path, lm_folder: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    (tmp_path / "fit.py").write_text(SCRIPT)
    together = [
        "--data.batch_size=4",
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--trainer.max_steps=4",
    ]
    both = [arguments(kind, corpus, lm_folder, two, *together) for kind in KINDS]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(cli.__file__).parents[1]),
    }
    command = [sys.executable, str(tmp_path / "fit.py"), *both[0], "--", *both[1]]
    ended = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    for kind in KINDS:
        alone = ["--data.batch_size=8", "--trainer.max_steps=4"]
        parser.run(cli.prepare_arguments(arguments(kind, corpus, lm_folder, one, *alone)))
        assert len(losses(one, kind)) == 4
        assert losses(two, kind) == pytest.approx(losses(one, kind), abs=1e-4)
