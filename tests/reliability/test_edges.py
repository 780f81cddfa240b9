"""The smallest, the largest and the strangest that a person may ask of the command: it does it,
or says why not in one line.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dia_lightning import cli
from dia_lightning.lm.base_lm import BaseLM
from tests.test_cli import assert_one_line

Run = Callable[..., tuple[int, str, str]]
ROOT = Path(cli.__file__).parents[1]
SMALL = ["--data.n_texts=2", "--data.max_length=12", "--trainer.callbacks.folder=out"]
PLAIN = ["predict", "--config", "configs/dia_tiny.yaml", *SMALL, "--model.compare_base=false"]
START = "--model.sampler.start"
# Guided diffusion, and a round of exact moves afterwards.
REFINED = ["--model.sampler=Chains", "--model.sampler.rounds=1", f"{START}=Diffusion"]
REFINED += ["--model.sampler.moves=[Suffix, DenoiseAccept]", f"{START}.steps=2"]
REFINED += [f"{START}.guidance=CriticGuidance", f"{START}.guidance.scale=10"]
DIFFUSED = [*PLAIN, *REFINED]
GUIDED = [*PLAIN, "--model.sampler=Diffusion", "--model.sampler.steps=1"]


def written(result: tuple[int, str, str], n: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`metrics.json` and the lines of `predictions.jsonl` of a run that said nothing but its
    results.
    """
    code, _, err = result
    assert (code, err) == (0, "")
    metrics = json.loads(Path("out/metrics.json").read_text(encoding="utf-8"))
    lines = [
        json.loads(line)
        for line in Path("out/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert (metrics["complete"], metrics["n"], len(lines)) == (True, n, n)
    assert metrics["perplexity"] >= 1
    assert all(line["log_p"] <= 0 for line in lines)
    return metrics, lines


@pytest.mark.parametrize("start", [PLAIN, DIFFUSED], ids=["annealed", "dia"])
def test_lambda_is_nothing_or_huge(lightning: Run, start: list[str]) -> None:
    metrics, _ = written(lightning(*start, "--model.lam=0"), 2)
    assert metrics.get("log_z", 0) == 0
    metrics, _ = written(lightning(*start, "--model.lam=1e6"), 2)
    # log Z of λ r ≤ λ, r being at most 1.
    assert 0 <= metrics.get("log_z", 0) <= 1e6


@pytest.mark.parametrize("start", [PLAIN, DIFFUSED], ids=["annealed", "dia"])
def test_texts_of_one_token(lightning: Run, start: list[str]) -> None:
    _, lines = written(lightning(*start, "--data.max_length=1"), 2)
    assert [line["n_tokens"] for line in lines] == [1, 1]
    Path("one.txt").write_text("The\n", encoding="utf-8")
    assert_one_line(
        lightning(*start, "--data.max_length=1", "--data.prompts=one.txt"),
        "'The' has 1 tokens",
        "max_length is 1",
    )


def test_a_pool_is_thinned(lightning: Run) -> None:
    """Sixteen times the texts; log Ẑ is an estimate of the same number."""
    few, many = (
        written(lightning(*PLAIN, "--model.lam=2", f"--model.sampler.pool={pool}"), 2)[0]
        for pool in (1, 16)
    )
    assert many["tokens"]["base_lm"] > 3 * few["tokens"]["base_lm"]
    assert many["log_z"] == pytest.approx(few["log_z"], abs=2)


def test_one_of_everything(lightning: Run) -> None:
    ones = ["--data.n_texts=1", "--data.batch_size=1", "--model.lam=1"]
    metrics, _ = written(lightning(*PLAIN, *ones, "--model.sampler.particles=1"), 1)
    assert metrics["log_z"] == pytest.approx(metrics["log_z_reverse"], abs=1)
    assert metrics["self_bleu"] is None  # there are no others
    solver = [
        f"{START}.solver=PredictorCorrector",
        f"{START}.solver.eta=0",
        f"{START}.solver.steps=1",
    ]
    written(lightning(*DIFFUSED, *ones, f"{START}.steps=1", *solver), 1)


@pytest.mark.parametrize("solver", ["DDIM", "DPMpp2M", "Ancestral", "DiaLiteral"])
def test_one_step_without_noise(lightning: Run, solver: str) -> None:
    still = ["--model.sampler.solver.eta=0"] if solver in ("DDIM", "DiaLiteral") else []
    guided = ["--model.sampler.guidance=CriticGuidance", "--model.sampler.guidance.scale=10"]
    written(lightning(*GUIDED, *guided, f"--model.sampler.solver={solver}", *still), 2)


PROMPT_FILES = {
    "blank_lines.txt": b"\n\nThe food\n\n  \nA pub\n\n",
    "crlf.txt": b"The food\r\n\r\nA pub\r\n",
    "mac.txt": b"The food\r\rA pub\r",
    "utf16.txt": "The food\r\nA pub\r\n".encode("utf-16"),
    "list.json": b'["The food", {"prompt": "A pub"}]',
    "bom.txt": b"\xef\xbb\xbfThe food\nA pub",
    "bom_crlf.jsonl": b'\xef\xbb\xbf{"prompt": "The food"}\r\n\r\n{"prompt": "A pub"}\r\n',
    "excel.csv": b'\xef\xbb\xbf"prompt"\r\n"The food"\r\n"A pub"\r\n',
}


@pytest.mark.parametrize("name", PROMPT_FILES)
def test_prompt_files_as_programs_write_them(lightning: Run, name: str) -> None:
    from dia_lightning.data.records import read_records

    Path(name).write_bytes(PROMPT_FILES[name])
    assert [record["prompt"] for record in read_records(name)] == ["The food", "A pub"]


def test_one_prompt_one_text(lightning: Run) -> None:
    Path("one.txt").write_bytes(b"\xef\xbb\xbfThe food\r\n\r\n")
    _, lines = written(lightning(*PLAIN, "--data.prompts=one.txt", "--data.n_texts=1"), 1)
    assert lines[0]["prompt"] == "The food"


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("empty.txt", b"", ["holds no prompt", "leave it out"]),
        ("bom.txt", b"\xef\xbb\xbf", ["holds no prompt"]),
        ("utf16.txt", "The food\n".encode("utf-16-le"), ["line 1", "null byte"]),
        ("latin.txt", b"The food\nCaf\xe9\n", ["line 2", "UTF-8"]),
        ("null.txt", b"The\0food\n", ["line 1", "null byte"]),
        ("words.txt", b"food " * 2_000_000, ["'food food", "has 9999999 letters", "12 tokens"]),
        ("word.txt", b"a" * 10_000_000, ["'aaaa", "has 10000000 letters", "12 tokens"]),
        ("blank.txt", b"The [blank:99999999999] food",
         ["blank of 99999999999 tokens", "at most 12"]),
        ("digits.txt", b"[blank:" + b"9" * 5000 + b"]",
         ["blank of 99999999999999999999 tokens", "at most 12"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_prompt_files_that_cannot_be(
    lightning: Run, name: str, content: bytes, parts: list[str]
) -> None:
    Path(name).write_bytes(content)
    result = lightning(*PLAIN, f"--data.prompts={name}")
    assert_one_line(result, "--data.prompts: ", *parts)
    assert len(result[2]) < 400


def test_the_config_may_stand_behind_what_changes_it(lightning: Run) -> None:
    _, before, _ = lightning(
        "predict",
        "--config",
        "configs/smc_tiny.yaml",
        "--data.n_texts=3",
        "--model.lam=2",
        "--print_config",
    )
    _, behind, _ = lightning(
        "predict",
        "--data.n_texts=3",
        "--model.lam=2",
        "--config",
        "configs/smc_tiny.yaml",
        "--print_config",
    )
    assert "ParticleSteering" in before
    assert behind == before


FIT = [
    "fit",
    "--config",
    "configs/ddpm_tiny.yaml",
    "--data.n_val=4",
    "--data.shard_size=8",
    "--data.max_length=12",
]
FIT += [
    "--model.network.width=32",
    "--model.network.layers=1",
    "--model.network.heads=2",
    "--model.init_from=random",
    "--trainer.max_steps=2",
]
FIT += ["--trainer.val_check_interval=2", "--data.cache=samples"]


def test_training_on_rows_one_by_one(lightning: Run) -> None:
    code, _, err = lightning(*FIT, "--data.n_texts=2", "--data.batch_size=1", "--data.n_val=1")
    assert code == 0, err
    assert_one_line(
        lightning(*FIT, "--data.max_length=1"), "--data.max_length: 1 given", "2 or more"
    )
    assert_one_line(
        lightning(*FIT, "--data.batch_size=0"), "--data.batch_size: 0 given", "1 or more"
    )


DIFFUSION = ["--model.sampler=Diffusion"]


def move(options: str) -> list[str]:
    """The move DenoiseAccept with these options."""
    return [f"--model.sampler.moves=[{{class_path: DenoiseAccept, init_args: {{{options}}}}}]"]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--model.lam=1e308"], ["--model.lam: 1e+308 given", "up to 1e+100"]),
        (["--model.lam=inf"], ["--model.lam: inf given", "float"]),
        (["--model.sampler.particles=0"], ["--model.sampler.particles: 0 given", "1 or more"]),
        ([*DIFFUSION, "--model.sampler.steps=0"], ["--model.sampler.steps: 0 given", "1 or more"]),
        (["--model.seed=-1"], ["--model.seed: -1 given", "0 to"]),
        (["--model.seed=99999999999999999999"],
         ["--model.seed: 99999999999999999999 given", "0 to"]),
        (["--model.sampler.pool=0"], ["--model.sampler.pool: 0 given", "1 or more"]),
        (move("positions: middle"),
         ["--model.sampler.moves: positions: middle given", "name or path of a class"]),
        (move("levels: [0.5, 2]"), ["levels: [0.5, 2.0] given", "up to 1"]),
        (move("positions: {class_path: Spans, init_args: {length: 0}}"),
         ["length: 0 given", "1 or more"]),
        (move("rounds: 0"), ["rounds: 0 given", "1 or more"]),
        (move("tilt: -1"), ["tilt: -1.0 given", "0 or more"]),
        (move("tilt_level: 7"), ["tilt_level: 7.0 given", "from 0 to 1"]),
        (move("adapt: 2, positions: RandomTokens"), ["adapt: 2 given", "Spans"]),
        ([*DIFFUSION, "--model.base_lm=bare", "--model.denoiser=null"],
         ["--model.denoiser: none given"]),
        (["--data.prompts=[]"], ["--data.prompts: ", "empty list"]),
        (["--data.max_length=1000000"], ["--data.max_length: 1000000 given", "up to"]),
    ],
    ids=lambda value: value[-1] if "=" in value[0] else "",
)  # fmt: skip
def test_values_that_cannot_be(lightning: Run, options: list[str], parts: list[str]) -> None:
    shutil.copytree(
        ROOT / "checkpoints/tiny/lm", "bare"
    )  # a base model beside which no denoiser is
    assert_one_line(lightning(*PLAIN, *options), *parts)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 5"),
    ],
)
def test_more_than_the_memory_holds(
    lightning: Run, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def generate(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(BaseLM, "generate", generate)
    assert_one_line(
        lightning(*PLAIN), "not enough memory", "--data.batch_size", "--model.sampler.particles"
    )
