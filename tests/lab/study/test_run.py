"""Cells run, fail, stop and go on; processes die; the results are those of a study that was left
alone.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dia_lightning import cli
from dia_lightning.errors import UserError
from dia_lightning.lab.study import command, worker
from dia_lightning.lab.study.grid import Cell, CellRun, StudyGrid, read_study
from dia_lightning.lab.study.pool import run_cells
from dia_lightning.lab.study.worker import Outcome, read_outcome, run_cell
from dia_lightning.settings import parser

ROOT = Path(cli.__file__).parents[1]
STUDY = """title: Small
question: Does it go on?
config: configs/zero_shot_tiny.yaml
set: {data.n_texts: 6, data.batch_size: 2, data.max_length: 8}
seeds: [0, 1]
seconds: 2
grid:
  temperature: {model.sampler.temperature: [0.5, 1.0]}
baseline: {temperature: 1.0}
"""
MINE = ["my_reward"]
# A reward that ends its process, or raises, at the text's third batch while the file `armed` is
# there.
REWARD = """import os, pathlib, signal, torch
from dia_lightning.types import Reward
calls = [0]
class Mine(Reward):
    name = "mine"
    def __init__(self, folder: str = ".", at: int = 3, kill: bool = False) -> None:
        self.folder, self.at, self.kill = folder, at, kill
    def __call__(self, texts):
        calls[0] += 1
        armed = pathlib.Path(self.folder) / "armed"
        if calls[0] == self.at and armed.exists():
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("first line\\nsecond line")
        return torch.tensor([float(len(text)) / 50 for text in texts])
"""
RUNNER = """import os, signal
from dia_lightning.lab.study.worker import Outcome
def run(cell):
    if cell.seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if cell.seed == 3:
        os._exit(7)
    return Outcome("bad" if cell.seed == 4 else "", os.getpid())
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, from which `my_reward` and `my_runner` can be imported, also by other
    processes.
    """
    (tmp_path / "my_reward.py").write_text(REWARD, encoding="utf-8")
    (tmp_path / "my_runner.py").write_text(RUNNER, encoding="utf-8")
    for name in ("my_reward", "my_runner"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def study_of(here: Path, text: str = STUDY, out: str = "out") -> StudyGrid:
    (here / "small.yaml").write_text(text, encoding="utf-8")
    return read_study(here / "small.yaml", here / out)


def texts(cell: Cell) -> list[str]:
    return [
        json.loads(line)["text"]
        for line in (cell.folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_a_failed_cell_goes_on_where_it_stopped(here: Path) -> None:
    text = STUDY.replace(
        "set: {", f"set: {{model.reward: my_reward.Mine, model.reward.folder: '{here}', "
    )
    cell, whole = study_of(here, text).cells[0], study_of(here, text, "whole").cells[0]
    (here / "armed").touch()
    failed = run_cell(cell, MINE)
    assert failed.error.startswith("reward 'mine' failed")
    assert failed.error.endswith("ValueError: first line")
    assert read_outcome(cell) == failed
    before = {path: path.stat().st_mtime_ns for path in cell.folder.glob("parts/*/*.json")}
    assert len(before) == 2
    (here / "armed").unlink()
    assert run_cell(cell, MINE).error == ""
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert run_cell(whole, MINE).error == ""
    assert len(set(texts(cell))) > 1
    assert texts(cell) == texts(whole)
    found = read_outcome(cell)
    assert found is not None
    assert found.peak_mib > 50


def test_what_is_no_finished_cell(here: Path) -> None:
    cell = study_of(here).cells[0]
    assert read_outcome(cell) is None
    worker.write_outcome(cell, Outcome("", 1.0))
    assert read_outcome(cell) is None  # no metrics.json
    (cell.folder / "metrics.json").write_text('{"complete": false}', encoding="utf-8")
    assert read_outcome(cell) is None
    (cell.folder / "metrics.json").write_text('{"complete": true}', encoding="utf-8")
    assert read_outcome(cell) == Outcome("", 1.0)
    assert read_outcome(study_of(here, STUDY.replace("n_texts: 6", "n_texts: 7")).cells[0]) is None
    (cell.folder / "cell.json").write_text("{", encoding="utf-8")
    assert read_outcome(cell) is None


def test_a_training_before_a_cell_stops_and_goes_on(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = (ROOT / "configs/baselines/ppo_tiny.yaml").read_text(encoding="utf-8")
    # The logger is the study's to set; a checkpoint after each batch of texts.
    (here / "ppo.yaml").write_text(
        config.replace("every_n_train_steps: 100", "every_n_train_steps: 1"), encoding="utf-8"
    )
    small = "data.n_texts: 2, data.batch_size: 4, data.max_length: 8"
    text = (
        STUDY.partition("grid:")[0]
        + f"""
grid:
  method:
    PPO:
      fit:
        config: ppo.yaml
        set: {{trainer.max_steps: 2, model.updates.epochs: 1, model.updates.minibatches: 1, {small},
              model.reward: my_reward.Mine,
              model.reward.folder: '{here}', model.reward.at: 2}}
      set: {{model.sampler.policy: "{{fit}}", model.sampler.label: ppo}}
"""
    )
    seen: list[list[str]] = []
    run = parser.run
    monkeypatch.setattr(
        parser,
        "run",
        lambda arguments, allow: (seen.append(arguments), run(arguments, allow=allow)),
    )
    cell, whole = study_of(here, text).cells[0], study_of(here, text, "whole").cells[0]
    (here / "armed").touch()
    assert "ValueError: first line" in run_cell(cell, MINE).error
    (here / "armed").unlink()
    assert run_cell(cell, MINE).error == ""
    last = f"--ckpt_path={cell.folder}/fit/checkpoints/last.ckpt"
    assert [(arguments[0], last in arguments) for arguments in seen] == [
        ("fit", False),
        ("fit", True),
        ("predict", False),
    ]
    assert (cell.folder / "fit/export/model.safetensors").exists()
    assert json.loads((cell.folder / "metrics.json").read_text(encoding="utf-8"))["method"] == "ppo"
    assert run_cell(cell, MINE).error == ""
    assert [arguments[0] for arguments in seen[3:]] == ["predict"]
    assert run_cell(whole, MINE).error == ""
    assert texts(cell) == texts(whole)
    assert not (here / "runs").exists()
    other = study_of(here, text.replace("trainer.max_steps: 2", "trainer.max_steps: 1")).cells[0]
    assert run_cell(other, MINE).error == ""
    assert [(a[0], last in a) for a in seen[-2:]] == [("fit", False), ("predict", False)]


def test_a_process_that_dies_takes_only_its_cell(here: Path) -> None:
    import my_runner  # type: ignore[import-not-found]

    run = CellRun("predict", ROOT / "configs/dia_tiny.yaml", {})
    cells = [
        Cell("s", {}, seed, f"s/x/seed={seed}", here / f"out/{seed}", run) for seed in range(7)
    ]
    ended = {cell.seed: outcome for cell, outcome in run_cells(cells, 2, 1, my_runner.run)}
    assert {seed: outcome.error for seed, outcome in ended.items()} == {
        0: "",
        1: "its process was ended by SIGKILL",
        2: "",
        3: "its process ended with exit code 7",
        4: "bad",
        5: "",
        6: "",
    }
    died = read_outcome(cells[1])
    assert died is not None
    assert "SIGKILL" in died.error
    assert (
        len({outcome.seconds for outcome in ended.values() if outcome.error in ("", "bad")}) < 5
    )  # a process runs several


def test_a_study_runs_reports_and_runs_nothing_twice(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (here / "armed").touch()
    reward = (
        f"model.reward: my_reward.Mine, model.reward.folder: '{here}', "
        "model.reward.kill: true, model.reward.at"
    )
    # Of the worker's calls: the first cell has three batches, the second one dies in its second.
    (here / "small.yaml").write_text(
        STUDY.replace("set: {", f"set: {{{reward}: 5, "), encoding="utf-8"
    )
    arguments = ["small.yaml", "--out", "out", "--jobs", "1", "--only", "small/temperature=1.0"]
    with pytest.raises(
        UserError,
        match=r"^study small/\S+: --model.reward: my_reward.Mine given, .* with --allow my_reward$",
    ):
        command.run_study(arguments)
    arguments.append("--allow=my_reward")
    command.run_study([*arguments, "--dry-run"])
    said = capfd.readouterr().out
    assert "the study file" in said
    assert "2 of 2 cells to run: 4 s of work" in said
    assert not (here / "out").exists()
    with pytest.raises(SystemExit, match="1"):
        command.run_study(arguments)
    out, err = capfd.readouterr()
    assert "[1/2] small/temperature=1.0/seed=0  " in out
    assert "[2/2] small/temperature=1.0/seed=1  failed: its process was ended by SIGKILL" in out
    assert "1 of 2 cells failed" in out
    assert "Predicting" not in out + err
    assert "reward, mean" in (here / "out/small/temperature=1.0/seed=0/log.txt").read_text(
        encoding="utf-8"
    )
    assert "out/report.html" in out
    assert (here / "out/report.html").exists()
    command.run_study([*arguments, "--dry-run"])
    said = capfd.readouterr().out
    assert "1 (1 failed)" in said
    assert "finished seeds" in said


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["small.yaml"], ["--out"]),
        (["small.yaml", "--out", "o", "--seeds", "a"], ["--seeds", "'a'"]),
        (["small.yaml", "--out", "o", "--jobs", "0"], ["--jobs", "'0'"]),
        (["nope.yaml", "--out", "o"], ["study: no such file", "nope.yaml"]),
        (["small.yaml", "small.yaml", "--out", "o"], ["two files are named small.yaml"]),
        (["small.yaml", "--out", "o", "--only", "big"], ["--only: no cell of small is named big"]),
    ],
)
def test_mistakes_of_the_command(here: Path, arguments: list[str], parts: list[str]) -> None:
    study_of(here)
    with pytest.raises(UserError) as raised:
        command.run_study(arguments)
    for part in parts:
        assert part in str(raised.value)


@pytest.mark.slow
def test_ctrl_c_keeps_finished_cells_and_leaves_no_process(here: Path) -> None:
    (here / "small.yaml").write_text(STUDY.replace("n_texts: 6", "n_texts: 400"), encoding="utf-8")
    program = [
        sys.executable,
        "-m",
        "dia_lightning",
        "study",
        "small.yaml",
        "--jobs",
        "1",
        "--out",
        "out",
    ]
    running = subprocess.Popen(
        program,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while not list(here.glob("out/small/*/*/cell.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(running.pid, signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert err == "interrupted; finished cells are kept, the same command goes on from there\n"
    assert out.startswith("[1/4] small/temperature=0.5/seed=0")
    time.sleep(0.5)
    with pytest.raises(ProcessLookupError):
        os.killpg(running.pid, 0)
