"""Islands of the annealed population, and populations that begin with weights, through
`predict_step` on the enumerable table.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dia_lightning.errors import UserError
from dia_lightning.samplers import (
    Annealed,
    BaseModel,
    BestOfN,
    Diffusion,
    Drawn,
    Sampler,
    Suffix,
    annealed,
)
from dia_lightning.samplers.base import Population
from dia_lightning.sampling.drafts import SuffixDrafts
from dia_lightning.sampling.ensemble import EnsembleKernel
from dia_lightning.sampling.resampling import log_mean_exp
from dia_lightning.types import Batch, Generations
from tests.oracles.table_lm import END, LOG_P, REWARD, ROWS, T, codes, pi
from tests.oracles.table_model import chi_square_ok, free
from tests.wiring.kit import seed_of
from tests.wiring.test_laws import LAM, SUFFIX, drawn, guided, log_z

pytestmark = pytest.mark.usefixtures("on_table")


def test_islands_of_two_particles(table_parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One population a text for 4,000 texts: the mean of every indicator of a text within 0.03 of
    π (effective islands about 1,000, their share is told), without their weights beyond; log Z
    within 0.1 of the exact one, each way.
    """

    def far(generations: Generations) -> float:
        found = np.bincount(codes(generations.tokens), minlength=len(ROWS)) / 4000
        return float(np.abs(found - pi(LAM)).max())

    made = guided(table_parts, Annealed([SUFFIX], particles=2, texts=1))
    generations = drawn(made, free(4000))
    assert far(generations) < 0.03
    assert abs(float(generations.diagnostics["log_z"][0]) - log_z(LAM)) < 0.1
    assert abs(float(generations.diagnostics["log_z_reverse"][0]) - log_z(LAM)) < 0.1
    (share,) = set(generations.diagnostics["ess"].tolist())
    assert 0.1 < share < 0.5
    monkeypatch.setattr(annealed, "pick_islands", lambda group, log_z, generator: group * 0 +
                        torch.arange(len(group)))  # fmt: skip
    assert far(drawn(made, free(4000))) > 0.08


def test_islands_of_two_prompts(table_parts: Path) -> None:
    """Texts keep to the islands of their own prompt, which they share by threes."""
    tokens = torch.full((900, T), END)
    tokens[:, 0] = torch.randperm(900, generator=torch.Generator().manual_seed(1)) % 2
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, 0] = True
    batch = Batch(0, list(range(900)), ["ab"[i] for i in tokens[:, 0]], tokens, mask)
    for pool in (1, 2):
        sampler = Annealed([SUFFIX], particles=2, texts=3, pool=pool)
        generations = drawn(guided(table_parts, sampler), batch)
        assert torch.equal(generations.tokens[:, 0], tokens[:, 0])
        exact = [log_z(LAM, int(first)) for first in tokens[:, 0]]
        np.testing.assert_allclose(generations.diagnostics["log_z"].numpy(), exact, atol=0.15)


@dataclass(frozen=True)
class Even(Sampler):
    """Every row as likely, weighted for π at a share of λ."""

    share: float = 1.0

    def draw(self, models: Any, batch: Batch, generator: torch.Generator) -> Drawn:
        raise NotImplementedError

    def population(
        self, models: Any, crowd: Batch, n_groups: int, generator: torch.Generator
    ) -> Population:
        code = torch.randint(len(ROWS), (len(crowd.ids),), generator=generator)
        lam = self.share * models.lam
        log_w = torch.from_numpy(LOG_P + lam * REWARD)[code].view(n_groups, -1) + np.log(len(ROWS))
        return Population(torch.tensor(ROWS)[code], log_w, lam, log_mean_exp(log_w))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_weighted_population_begins(table_parts: Path, share: float) -> None:
    """400 of 6,000 particles; rounds 0 beyond the start: the weights alone make the law."""
    moved = Annealed([SUFFIX], particles=15, rounds=2, start=Even(share))
    for sampler in (moved, replace(moved, rounds=0), replace(moved, particles=5, pool=3)):
        generations = drawn(guided(table_parts, sampler), free(400))
        assert chi_square_ok(generations.tokens, pi(LAM))
        assert not chi_square_ok(generations.tokens, np.full(len(ROWS), 1 / len(ROWS)))
        assert abs(float(generations.diagnostics["log_z"][0]) - log_z(LAM)) < 0.1
        assert float(generations.diagnostics["temperatures"][0]) >= 1 + (share < 1)
        assert float(generations.diagnostics["roots"][0]) < 1


def test_a_weighted_population_is_moved_at_its_own_temperature(table_parts: Path) -> None:
    """At λ itself there is nothing to anneal: one round after the resampling, one at the end."""
    calls: list[float] = []

    class Counted(EnsembleKernel):
        def step(self, state: Any, generator: torch.Generator) -> Any:
            calls.extend(state.lam.tolist())
            return super().step(state, generator)

    @dataclass(frozen=True)
    class Count(Suffix):
        def kernel(self, models: Any, target: Any) -> Any:
            return Counted(target, SuffixDrafts(target.lm))

    for share, least in ((1.0, LAM), (0.5, LAM / 2)):
        calls.clear()
        drawn(guided(table_parts, Annealed([Count()], 2, start=Even(share))), free(10))
        assert calls[:20] == [least] * 20
        assert calls[-20:] == [LAM] * 20
    assert len(calls) >= 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": Diffusion()}, "start: Diffusion given"),
        ({"start": BestOfN()}, "start: BestOfN given"),
        ({"start": BaseModel(top_k=3)}, "BaseModel with its defaults"),
        ({"start": BaseModel(temperature=0.5)}, "BaseModel with its defaults"),
        ({"texts": -1}, "texts: -1 given, allowed: 0 or more"),
    ],
)
def test_starts_without_known_weights_are_refused(options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Annealed(**options)


def test_a_start_beyond_lambda_is_refused(table_parts: Path) -> None:
    made = guided(table_parts, Annealed([SUFFIX], start=Even(2.0)))
    with pytest.raises(UserError, match="at λ = 3 given, allowed: up to 1"):
        made.predict_step(free(4))
    with pytest.raises(UserError, match="BaseModel with its defaults"):
        BaseModel(top_k=1).population(made.models, free(4), 1, seed_of(0, 0, 0))
