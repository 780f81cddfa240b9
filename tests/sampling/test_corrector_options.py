"""What GuidedSamplerModule makes of the options of `dia`'s corrector, on the shipped kit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dia_lightning.resources import UserError
from dia_lightning.rewards import VaderSentiment
from dia_lightning.samplers import GuidedSamplerModule
from dia_lightning.sampling import module as sampling_module
from dia_lightning.types import Prompts


def made(**options: Any) -> GuidedSamplerModule:
    given = {"sampler": "dia", "refine": "none", "steps": 3, "lam": 0.0, "compare_base": False, **options}
    return GuidedSamplerModule(VaderSentiment(), **given)


def work(module: GuidedSamplerModule, n: int = 3) -> Prompts:
    return Prompts(0, list(range(n)), [""] * n, torch.full((n, 8), module.lm.end_id), torch.zeros(n, 8, dtype=torch.bool))


@pytest.mark.parametrize("refine", ["none", "denoise_accept"])
def test_mala_tells_its_acceptance_also_of_texts_that_are_refined(refine: str) -> None:
    module = made(corrector="mala", eta=0.3, refine=refine)
    rates = module.predict_step(work(module))[0].diagnostics["accept_mala"]
    assert rates.shape == (3,)
    assert bool(((rates > 0) & (rates < 1)).all())
    unadjusted = made(eta=0.3, refine=refine)
    assert "accept_mala" not in unadjusted.predict_step(work(unadjusted))[0].diagnostics


def test_steps_decay_where_they_are_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """η/(k + 1)^γ of the run's corrector step k, by hand; other solvers' η is a number as ever."""
    given: list[dict[str, Any]] = []

    def seen(*arguments: Any, **options: Any) -> Tensor:
        given.append(options)
        return torch.zeros(3, 8, dtype=torch.int64)

    monkeypatch.setattr(sampling_module, "draw_texts", seen)
    for options in ({"eta_decay": 0.75}, {}, {"eta_decay": 0.75, "sampler": "ddim"}):
        module = made(eta=0.2, **options)
        module.draw(work(module), torch.Generator())
    assert [given[0]["eta"](k) for k in (0, 3)] == pytest.approx([0.2, 0.2 / 4**0.75])
    assert given[1]["eta"] == 0.2
    assert given[2] == {"eta": 0.2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corrector": "hmc"}, "corrector: hmc given, allowed: ula, mala"),
        ({"eta_decay": 0.5}, "eta_decay: 0.5 given, allowed: 0, or ½ < eta_decay ≤ 1"),
        ({"eta_decay": 1.1}, "eta_decay: 1.1 given, allowed: 0, or ½ < eta_decay ≤ 1"),
        ({"eta_decay": 0.6, "eta": 0.0}, "eta: 0.0 given, allowed: above 0 where it decays"),
    ],
)
def test_what_is_not_allowed_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^--model.init_args.{message}"):
        made(**options)
