"""What `Diffusion` makes of the options of its corrector, on the shipped kit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dia_lightning import cli
from dia_lightning.errors import UserError
from dia_lightning.rewards import VaderSentiment
from dia_lightning.samplers import (
    DDIM,
    Chains,
    DenoiseAccept,
    Diffusion,
    GuidedSamplerModule,
    PredictorCorrector,
    Sampler,
    Solver,
)
from dia_lightning.samplers import diffusion as diffusion_module
from dia_lightning.settings import parser
from dia_lightning.settings.places import place
from dia_lightning.types import Batch


def made(solver: Solver, refined: bool = False) -> GuidedSamplerModule:
    sampler: Sampler = Diffusion(solver, steps=3)
    if refined:
        sampler = Chains(sampler, [DenoiseAccept()], rounds=1)
    return GuidedSamplerModule(VaderSentiment(), sampler, lam=0.0, compare_base=False)


def work(module: GuidedSamplerModule, n: int = 3) -> Batch:
    mask = torch.zeros(n, 8, dtype=torch.bool)
    return Batch(0, list(range(n)), [""] * n, torch.full((n, 8), module.lm.end_id), mask)


@pytest.mark.parametrize("refined", [False, True])
def test_mala_tells_its_acceptance_also_of_texts_that_are_refined(refined: bool) -> None:
    module = made(PredictorCorrector(eta=0.3, accept=True), refined)
    rates = module.predict_step(work(module))[0].diagnostics["accept_mala"]
    assert rates.shape == (3,)
    assert bool(((rates > 0) & (rates < 1)).all())
    unadjusted = made(PredictorCorrector(eta=0.3), refined)
    assert "accept_mala" not in unadjusted.predict_step(work(unadjusted))[0].diagnostics


def test_steps_decay_where_they_are_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """η/(k + 1)^γ of the run's corrector step k, by hand; other solvers' η is a number as ever."""
    given: list[dict[str, Any]] = []

    def seen(*arguments: Any, **options: Any) -> Tensor:
        given.append(options)
        return torch.zeros(3, 8, dtype=torch.int64)

    monkeypatch.setattr(diffusion_module, "draw_texts", seen)
    for solver in (PredictorCorrector(0.2, eta_decay=0.75), PredictorCorrector(0.2), DDIM(0.2)):
        module = made(solver)
        module.draw(work(module), torch.Generator())
    assert [given[0]["eta"](k) for k in (0, 3)] == pytest.approx([0.2, 0.2 / 4**0.75])
    assert given[1]["eta"] == 0.2
    assert given[2] == {"eta": 0.2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta_decay": 0.5}, "eta_decay: 0.5 given, allowed: 0, or ½ < eta_decay ≤ 1"),
        ({"eta_decay": 1.1}, "eta_decay: 1.1 given, allowed: 0, or ½ < eta_decay ≤ 1"),
        ({"eta_decay": 0.6, "eta": 0.0}, "eta: 0.0 given, allowed: above 0 where it decays"),
    ],
)
def test_what_is_not_allowed_is_said(
    lightning: Callable[..., tuple[int, str, str]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        PredictorCorrector(**options)
    corrector = [f"--model.sampler.solver.{name}={value}" for name, value in options.items()]
    code, _, err = lightning("predict", "--model.sampler=Diffusion", *corrector)
    assert code == 2
    assert err.startswith(f"error: --model.sampler.solver.{message}")


def parse(*arguments: str) -> None:
    parser.run(cli.prepare_arguments(["predict", *arguments]), options_only=True)


@pytest.mark.parametrize(
    ("solver", "option"),
    [
        ("PredictorCorrector", "corrector=hmc"), ("DDIM", "eta_decay=0.75"),
        ("DDIM", "accept=true"), ("Ancestral", "eta=0.1"), ("DPMpp2M", "steps=2"),
        ("DDIM", "reading=per_step"),
    ],
)  # fmt: skip
def test_an_option_of_another_solver_is_refused(solver: str, option: str) -> None:
    name = option.partition("=")[0]
    parts = ["--model.sampler=Diffusion", f"--model.sampler.solver={solver}"]
    parse(*parts)
    with pytest.raises(UserError, match=rf"^--model\.sampler\.solver.*{name}"):
        parse(*parts, f"--model.sampler.solver.{option}")


@pytest.mark.parametrize(
    ("part", "given"),
    [("sampler", "DenoiseAccept"), ("sampler.solver", "Suffix"), ("sampler.guidance", "null"),
     ("sampler.solver", "DDIN")],
)  # fmt: skip
def test_a_part_of_another_kind_is_named(part: str, given: str) -> None:
    with pytest.raises(UserError, match=rf"^--model\.{part}: {given} given, allowed"):
        parse("--model.sampler=Diffusion", f"--model.{part}={given}")


@pytest.mark.parametrize(
    ("said", "option", "others"),
    [
        ("rounds: -1 given", "rounds", ["moves.rounds=3"]),
        ("rounds: 0 given", "moves.rounds", ["rounds=3"]),
        ("steps: 0 given", "steps", ["solver.steps=2"]),
        ("steps: 2 given", "solver.steps", ["steps=0"]),
        ("ess: 2.0 given", "ess", []),
    ],
)
def test_of_two_parts_with_one_setting_the_wrong_one_is_named(
    said: str, option: str, others: list[str]
) -> None:
    given = said.split()[1]
    parts = ["=Diffusion", ".solver=PredictorCorrector"] if "steps" in option else []
    parts += [".moves=[DenoiseAccept]"] if "rounds" in said else []
    typed = [f"--model.sampler{part}" for part in parts]
    typed += [f"--model.sampler.{o}" for o in [f"{option}={given}", *others]]
    arguments = cli.prepare_arguments(["predict", *typed])
    error = UserError(said)
    place(error, parser.options_of(arguments), arguments)
    assert str(error) == f"--model.sampler.{option}: {given} given"
