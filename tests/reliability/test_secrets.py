"""What the environment holds in secret is in no file that a run writes, and not in what it
prints.
"""

import sys
from pathlib import Path

import pytest

from dia_lightning import cli

NAMES = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY",
    "AWS_SECRET_ACCESS_KEY", "PERSPECTIVE_API_KEY", "GITHUB_TOKEN",
)  # fmt: skip


def test_no_secret_is_written(
    lm_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A training with its logger, a test with its report, and a run that fails, whose traceback
    is shown.
    """
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(NAMES):
        monkeypatch.setenv(name, f"s3cr3t-of-{i}-{name}")

    def lightning(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["lightning", *arguments])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    base = [f"--model.base_lm={lm_folder}", f"--data.base_lm={lm_folder}", "--data.max_length=8"]
    size = [
        "--model.network.width=16",
        "--model.network.layers=1",
        "--model.network.heads=2",
        "--model.network.max_length=8",
        "--model.init_from=random",
    ]
    data = [
        "--data.n_texts=16",
        "--data.n_val=2",
        "--data.batch_size=4",
        "--trainer.max_steps=1",
        "--data.shard_size=18",
    ]
    assert (
        lightning(
            "fit",
            "--config",
            "configs/ddpm_tiny.yaml",
            *base,
            *size,
            *data,
            "--trainer.val_check_interval=1",
        )
        == 0
    )
    parts = ["--model.denoiser=runs/ddpm_tiny/denoiser", "--model.critic=null"]
    few = [*base, *parts, "--data.n_texts=2", "--data.batch_size=2", "--model.sampler.rounds=1"]
    assert lightning("test", "--config", "configs/dia_tiny.yaml", *few) == 0
    assert (
        lightning(
            "predict",
            "--config",
            "configs/dia_tiny.yaml",
            *few,
            "--data.prompts=none.txt",
            "--debug",
        )
        == 2
    )
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {
        "last.ckpt",
        "config.yaml",
        "predictions.jsonl",
        "metrics.json",
        "report.html",
        "costs.json",
    } <= names
    assert any(name.startswith("events.out") for name in names)
    printed = capfd.readouterr()
    assert "Traceback" in printed.err
    said = [printed.out.encode(), printed.err.encode(), *(path.read_bytes() for path in files)]
    assert not [content for content in said if b"s3cr3t-of" in content]
