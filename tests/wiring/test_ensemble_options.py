"""Options of the moves from the command line and from files to the kernel, and that each of them
counts.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from dia_lightning import cli
from dia_lightning.samplers import (
    Chains,
    DenoiseAccept,
    GuidedSamplerModule,
    Move,
    Spans,
    Suffix,
    Window,
)
from dia_lightning.settings import parser
from dia_lightning.target import TargetDensity
from dia_lightning.testing import TableReward, table_lm
from dia_lightning.types import text_mask
from tests.conftest import Run
from tests.test_cli import assert_one_line

# Of each move what another value of an option makes of its kernel; `.` stands for its drafts.
OPTIONS: list[tuple[str, str, Any, str]] = [
    ("Suffix", "tries", 3, "tries"),
    ("Suffix", "form", "gibbs", "form"),
    ("Suffix", "cut", "entropy", ".cut"),
    ("Suffix", "cut", "jump", ".cut"),
    ("Window", "tries", 2, "tries"),
    ("Window", "form", "gibbs", "form"),
    ("Window", "cut", "entropy", ".cut"),
    ("Window", "cut", "jump", ".cut"),
    ("Window", "length", 2, ".length"),
    ("Window", "vary", True, ".vary"),
    ("DenoiseAccept", "tries", 2, "tries"),
    ("DenoiseAccept", "form", "gibbs", "form"),
]


def kernel_of(move: Move, module: GuidedSamplerModule) -> Any:
    return move.kernel(module.models, TargetDensity(module.lm, module.reward, module.lam))


@pytest.mark.parametrize("given", ["file", "list", "last"])
@pytest.mark.parametrize(("move", "option", "value", "where"), OPTIONS)
def test_options_reach_the_kernel(
    move: str, option: str, value: Any, where: str, given: str, tmp_path: Path
) -> None:
    told = f"[{{class_path: {move}, init_args: {{{option}: {str(value).lower()}}}}}]"
    arguments = ["predict", "--config", "configs/dia_tiny.yaml"]
    if given == "list":
        arguments += [f"--model.sampler.moves={told}"]
    elif given == "last":
        arguments += [f"--model.sampler.moves=[{move}]", f"--model.sampler.moves.{option}={value}"]
    else:
        file = tmp_path / "mine.yaml"
        inner = f"{{class_path: Annealed, init_args: {{moves: {told}}}}}"
        file.write_text(f"model: {{init_args: {{sampler: {inner}}}}}\n", encoding="utf-8")
        arguments += ["--config", str(file)]
    module = parser.build_model(cli.prepare_arguments(arguments))
    kernel = kernel_of(module.sampler.moves[-1], module)
    owner = kernel.proposal if where.startswith(".") else kernel
    assert getattr(owner, where.lstrip(".")) == value
    plain = kernel_of(type(module.sampler.moves[-1])(), module)
    owner = plain.proposal if where.startswith(".") else plain
    assert getattr(owner, where.lstrip(".")) != value


@pytest.mark.parametrize(("move", "option", "value", "where"), OPTIONS)
def test_options_change_texts(
    move: str, option: str, value: Any, where: str, table_parts: Path
) -> None:
    """The same seed, one move of 400 chains."""
    lm, part = table_lm(length=5), {"Suffix": Suffix, "Window": Window}.get(move, DenoiseAccept)
    reward, texts = TableReward(lm), []
    for given in ({}, {option: value}):
        options = {"positions": Spans(2), "rounds": 1} if part is DenoiseAccept else {}
        sampler = Chains(moves=[part(**options, **given)], rounds=1)  # type: ignore[arg-type]
        module = GuidedSamplerModule(
            reward, sampler, lm, str(table_parts / "denoiser"), lam=1.0, compare_base=False  # type: ignore[arg-type]
        )  # fmt: skip
        texts.append(module.predict_step(lm.batch([""] * 400))[0].tokens)
    assert not torch.equal(*texts)


@pytest.mark.parametrize("tries", [1, 2, 5])
def test_tries_are_rewarded(tries: int) -> None:
    """One text each, beside the one at the start."""
    lm = table_lm()
    batch, reward = lm.batch([""] * 10), TableReward(lm)
    for move in (Suffix(tries=tries), Window(2, tries=tries)):
        target = TargetDensity(lm, reward, 1.0, batch)
        kernel: Any = move.kernel(_models(lm, reward), target)
        state = kernel.init(lm.rows[:10])
        before = dict(target.calls)
        kernel.step(state, torch.Generator().manual_seed(0))
        assert target.calls["reward"] - before["reward"] == 10 * tries
        assert target.calls["base_lm"] == before["base_lm"]  # known since they were drawn


def _models(lm: Any, reward: Any) -> Any:
    return GuidedSamplerModule(reward, Chains(), lm, lam=1.0, compare_base=False).models


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("vary", [False, True])
def test_windows_are_as_long_as_they_are_told(length: int, vary: bool) -> None:
    """At most so many neighbours change; texts grow and shrink by `length` − 1 or not at all."""
    lm = table_lm(length=5)
    reward, n = TableReward(lm), 3000
    target = TargetDensity(lm, reward, 0.0, lm.batch([""] * n))
    kernel: Any = Window(length, vary, tries=2).kernel(_models(lm, reward), target)
    start = lm.rows[torch.arange(n) % len(lm.rows)]
    state, _ = kernel.step(kernel.init(start), torch.Generator().manual_seed(0))
    mask = torch.zeros_like(start, dtype=torch.bool)
    grown = text_mask(state.tokens, mask, lm.end_id).sum(1) - text_mask(start, mask, lm.end_id).sum(
        1
    )
    most = length - 1 if vary else 0
    assert (int(grown.min()), int(grown.max())) == (-most, most)
    same = (grown == 0) & (state.tokens != start).any(1)
    changed = (state.tokens != start)[same]
    reach = changed.shape[1] - changed.flip(1).int().argmax(1) - changed.int().argmax(1)
    assert int(reach.max()) == length


@pytest.mark.parametrize(
    ("move", "option", "value", "allowed"),
    [
        ("Suffix", "tries", "0", "1 or more"),
        ("Suffix", "form", "barker", "'metropolis', 'gibbs'"),
        ("Suffix", "cut", "random", "'uniform', 'entropy', 'jump'"),
        ("Window", "tries", "-1", "1 or more"),
        ("Window", "tries", "1.5", "int"),
        ("Window", "form", "Gibbs", "'metropolis', 'gibbs'"),
        ("Window", "cut", "", "'uniform', 'entropy', 'jump'"),
        ("Window", "length", "0", "1 or more"),
        ("Window", "vary", "maybe", "bool"),
        ("DenoiseAccept", "tries", "0", "1 or more"),
        ("DenoiseAccept", "form", "best", "'metropolis', 'gibbs'"),
    ],
)
def test_wrong_values_end_in_one_line(
    lightning: Run, move: str, option: str, value: str, allowed: str
) -> None:
    moves = [f"--model.sampler.moves=[{move}]", f"--model.sampler.moves.{option}={value}"]
    assert_one_line(lightning("predict", *moves), f"moves.{option}: {value}", "given", allowed)
    listed = f"[{{class_path: {move}, init_args: {{{option}: {value or repr('')}}}}}]"
    result = lightning("predict", f"--model.sampler.moves={listed}")
    assert_one_line(result, "--model.sampler.moves", "given, allowed: ", allowed)


@pytest.mark.parametrize(
    ("move", "option"),
    [("Suffix", "length"), ("Suffix", "vary"), ("DenoiseAccept", "cut"), ("Window", "rounds")],
)
def test_an_option_of_another_move_is_refused(lightning: Run, move: str, option: str) -> None:
    moves = [f"--model.sampler.moves=[{move}]", f"--model.sampler.moves.{option}=1"]
    assert_one_line(lightning("predict", *moves), f"moves.{option}: unknown option")
