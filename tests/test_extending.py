"""docs/extending.md to the letter: its files are written, its commands run; and its parts draw
from π.
"""

import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dia_lightning import cli
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.samplers import Models
from dia_lightning.sampling.state import start
from dia_lightning.target import TargetDensity
from dia_lightning.testing import check_kernel
from dia_lightning.testing.kernel import KernelError
from dia_lightning.testing.sampler import SamplerError
from dia_lightning.types import Batch, Reward
from tests.conftest import Run

DOC = Path(cli.__file__).parents[1] / "docs/extending.md"
BLOCKS = re.findall(
    r"^```(\w+)\n(.*?)^```$", DOC.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)
FILES = {block.partition("\n")[0][2:]: block for language, block in BLOCKS if language != "sh"}
COMMANDS = [
    shlex.split(line)[1:]
    for language, block in BLOCKS
    if language == "sh"
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("lightning ")
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A reader's folder, with the files of the document."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    kept = {
        Path(name).stem: sys.modules.pop(Path(name).stem, None) for name in FILES
    }  # another test's
    for name, content in FILES.items():
        Path(name).write_text(content, encoding="utf-8")
    yield tmp_path
    for module, before in kept.items():
        sys.modules.pop(module, None)
        sys.modules.update({} if before is None else {module: before})


def metrics(run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(f"runs/{run}/metrics.json").read_text(encoding="utf-8"))
    return found


def test_a_part_is_one_file_of_at_most_20_lines() -> None:
    parts = [name for name in FILES if name in ("my_reward.py", "my_move.py", "my_sampler.py")]
    assert len(parts) == 3
    for name in parts:
        assert sum(bool(line.strip()) for line in FILES[name].splitlines()) <= 20, name


def test_the_document_runs(
    folder: Path, lightning: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(COMMANDS) == 3
    for command in COMMANDS:
        code, _, err = lightning(*command)
        assert code == 0, err
    rejection, moved, mine = (metrics(run) for run in ("rejection", "moved", "mine"))
    assert (rejection["method"], rejection["n"]) == ("rejection", 8)
    assert 0 <= rejection["never_accepted"] < 0.5
    assert rejection["reward"] > rejection["base"]["reward"]
    assert (moved["method"], moved["n"]) == ("annealed", 8)
    assert 0 < moved["accept_fresh"] < 1
    assert moved["reward"] > moved["base"]["reward"]
    assert (mine["method"], "accept_suffix" in mine) == ("rejection", True)
    runpy.run_path("my_run.py")
    lines = Path("runs/mine/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert capsys.readouterr().out.splitlines()[-8:] == [json.loads(line)["text"] for line in lines]


@pytest.mark.parametrize(
    ("part", "right", "wrong", "error"),
    [
        ("my_move", "[state.log_base[:, None]", "[0 * state.log_base[:, None]", KernelError),
        ("my_move", "log_q = models", "log_q = -models", KernelError),
        ("my_move", "(new, state.prompt_mask[rows])", "(new)", KernelError),
        ("my_sampler", "models.lam * (", "0.5 * models.lam * (", SamplerError),
        ("my_sampler", "models.lam * (", "0 * (", SamplerError),
        ("my_sampler", "torch.rand(len(new), generator=generator)", "torch.rand(len(new))",
         SamplerError),
    ],
)  # fmt: skip
def test_its_checks_pass_and_find_faults(
    folder: Path, part: str, right: str, wrong: str, error: type[Exception]
) -> None:
    runpy.run_path(f"check_{part}.py")
    sys.modules.pop(part)
    assert right in FILES[f"{part}.py"]
    changed = FILES[f"{part}.py"].replace(right, wrong)
    Path(f"{part}.py").write_text(changed + "# longer, so that it is read anew\n", encoding="utf-8")
    with pytest.raises(error):
        runpy.run_path(f"check_{part}.py")


def test_without_leave_nothing_of_the_user_is_imported(folder: Path, lightning: Run) -> None:
    for part, value in (
        ("sampler", "my_sampler.Rejection"),
        ("reward", "my_reward.Short"),
        ("sampler.moves", "[my_move.Fresh]"),
    ):
        code, _, err = lightning("predict", f"--model.{part}", value)
        module = value.strip("[]").partition(".")[0]
        assert (code, f"--allow {module}" in err) == (2, True), err
        assert module not in sys.modules


class Even(Reward):
    """Minus one for a text of an odd number of characters, about every other one."""

    name = "even"

    def __call__(self, texts: Sequence[str]) -> list[float]:
        return [-float(len(text) % 2) for text in texts]


def test_the_move_leaves_exact_draws_of_the_sampler_as_they_are(
    folder: Path, lm: BaseLM, embedding: TokenEmbedding
) -> None:
    """Rejection draws from π exactly, and the move leaves π invariant: wrong means of either
    would drift.
    """
    fresh = runpy.run_path("my_move.py")["Fresh"]
    rejection = runpy.run_path("my_sampler.py")["Rejection"]
    n, lam = 1000, 2.0
    models = Models(lm, embedding, None, None, Even(), lam)
    tokens = torch.full((n, 10), lm.end_id)
    batch = Batch(0, list(range(n)), [""] * n, tokens, torch.zeros_like(tokens, dtype=torch.bool))
    generator = torch.Generator().manual_seed(0)
    drawn = rejection(best=0.0, tries=20).draw(models, batch, generator)
    assert not drawn.diagnostics["never_accepted"].any()
    target = TargetDensity(lm, models.reward, lam, batch)
    state = start(target, drawn.tokens, batch.prompt_mask)
    check_kernel(fresh().kernel(models, target), state, generator)
