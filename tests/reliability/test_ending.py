"""SIGTERM, runs too long to be listed, and two runs in one folder."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from dia_lightning.data.lazy import Missing, Repeated
from tests.reliability.test_edges import FIT
from tests.reliability.test_kill import ENVIRONMENT
from tests.test_cli import assert_one_line

Run = Callable[..., tuple[int, str, str]]
PREDICT = [
    "predict",
    "--model.compare_base=false",
    "--data.max_length=12",
    "--trainer.callbacks.folder=out",
]
# Two processes do not share a machine's few cores.
ALONE = {**ENVIRONMENT, "OMP_NUM_THREADS": "1"}
CASES = {
    "inside a batch": [
        "--data.batch_size=2",
        "--data.n_texts=2",
        "--model.sampler.rounds=100000000",
    ],
    "10^10 texts": [
        "--data.batch_size=2",
        "--data.n_texts=10000000000",
        "--model.sampler.moves=[]",
    ],
    "two processes": [
        "--data.batch_size=2",
        "--data.n_texts=100000",
        "--model.sampler.moves=[]",
        "--trainer.devices=2",
    ],
}


def has_begun(case: str, err: Path) -> bool:
    parts = list(Path("out/parts").glob("*/*.json"))
    return Path("out/parts/.lock").exists() if case == "inside a batch" else len(parts) > 2


@pytest.mark.parametrize(
    "case", [*list(CASES)[:2], pytest.param("two processes", marks=pytest.mark.slow)]
)
def test_sigterm_ends_at_once(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "dia_lightning", *PREDICT, *CASES[case]]
    with Path("err").open("w", encoding="utf-8") as err:
        running = subprocess.Popen(
            command, env=ALONE, stdout=subprocess.DEVNULL, stderr=err, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while (
            not has_begun(case, Path("err"))
            and running.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.1)
        time.sleep(2 if case == "inside a batch" else 0.2)
        begin = time.monotonic()
        running.send_signal(signal.SIGTERM)
        code = running.wait(30)
        seconds = time.monotonic() - begin
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
    assert (code, seconds < 8) == (143, True), (
        code,
        seconds,
        Path("err").read_text(encoding="utf-8"),
    )
    assert "interrupted; finished batches are kept" in Path("err").read_text(encoding="utf-8")
    if case != "inside a batch":
        lines = [
            json.loads(line)
            for line in Path("out/predictions.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        assert len(lines) >= 6
        assert [line["id"] for line in lines] == sorted(line["id"] for line in lines)


def test_more_texts_than_can_be_numbered(lightning: Run) -> None:
    assert_one_line(
        lightning(*PREDICT, f"--data.n_texts={10**19}"),
        "n_texts",
        "as many texts as can be numbered",
    )
    Path("lengths.txt").write_text("The food\n", encoding="utf-8")
    result = lightning(
        *PREDICT,
        f"--data.n_texts={10**10}",
        "--data.length=lengths.txt",
        "--model.sampler=Diffusion",
    )
    assert_one_line(
        result,
        "--data.n_texts: 10000000000 given",
        "10000000 with --data.length",
    )


def test_sequences_that_are_computed() -> None:
    repeated = Repeated(["a", "b"], 3)
    assert list(repeated) == list("aaabbb")
    assert (repeated[-1], repeated[2:4], len(Repeated([0], 10**10))) == ("b", ["a", "b"], 10**10)
    with pytest.raises(IndexError):
        repeated[6]
    for n, done in ((6, set()), (6, {0, 1}), (6, {1, 4, 9}), (3, {0, 1, 2}), (10, {9, 0, 5, 4})):
        assert list(Missing(n, done)) == [i for i in range(n) if i not in done]
    assert Missing(10**10, {0, 2})[10**9] == 10**9 + 2


@pytest.mark.parametrize(
    "option", ["trainer.max_s", "data.n_t", "model.base", "trainer.callbacks.fol"]
)
def test_an_abbreviation_is_unknown(lightning: Run, option: str) -> None:
    assert_one_line(
        lightning("predict", f"--{option}=3"), f"--{option}: unknown option; did you mean "
    )


def test_an_abbreviation_is_unknown_to_the_tools(lightning: Run) -> None:
    result = lightning("study", "configs/ablations/lam.yaml", "--out=out", "--jo=2")
    assert_one_line(result, "study: ", "unrecognized arguments: --jo=2")
    assert_one_line(lightning("kit", "export", "--ou=out"), "kit")
    assert not Path("out").exists()


def test_a_second_fit_in_one_folder_is_refused(lightning: Run) -> None:
    folder = Path("runs/ddpm_tiny")
    folder.mkdir(parents=True)
    short = [
        *FIT,
        "--data.n_texts=16",
        "--data.batch_size=4",
        "--trainer.max_steps=1",
        "--trainer.limit_val_batches=0",
    ]
    with FileLock(folder / ".fit.lock"):
        assert_one_line(
            lightning(*short),
            "--trainer.default_root_dir (in ",
            "configs/ddpm_tiny.yaml): another fit is writing to runs/ddpm_tiny",
        )
        assert not list(folder.rglob("*.ckpt"))
    assert lightning(*short)[0] == 0  # what a killed one left behind refuses nothing
    assert lightning(*short)[0] == 0
