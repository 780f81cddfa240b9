"""Options of the exact moves, and adaptation: where it ends, and that it does end."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.schedule import Schedule, make_schedule
from dia_lightning.errors import UserError
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.rewards import Keyword, VaderSentiment
from dia_lightning.samplers import (
    Annealed,
    Chains,
    DenoiseAccept,
    GuidedSamplerModule,
    Models,
    Suffix,
)  # fmt: skip
from dia_lightning.sampling.adaptation import Adapted
from dia_lightning.sampling.positions import RandomTokens, Spans
from dia_lightning.sampling.state import Info, State, start
from dia_lightning.target import TargetDensity
from dia_lightning.types import Batch, fill_after_end


class Coin:
    """Accepted with a given probability; remembers how often it was asked."""

    def __init__(self, rate: float) -> None:
        self.rate, self.steps = rate, 0

    def step(self, state: State, generator: torch.Generator) -> tuple[State, Info]:
        self.steps += 1
        u = torch.rand(len(state.tokens), generator=generator)
        return state, Info(u < self.rate, u)


def chains(n: int) -> State:
    zeros = torch.zeros(n, dtype=torch.float64)
    return State(
        torch.zeros(n, 1, dtype=torch.int64),
        torch.zeros(n, 1, dtype=torch.bool),
        zeros,
        zeros,
        zeros,
    )


@pytest.mark.parametrize(
    ("rates", "want"),
    [
        ((0.9, 0.7, 0.5, 0.34, 0.1, 0.01), {3}),
        ((0.3, 0.2, 0.1), {0}),
        ((0.9, 0.8, 0.7), {2}),
        ((0.5, 0.2), {0, 1}),
    ],
)
def test_adaptation_ends_where_the_rate_is_wanted(rates: tuple[float, ...], want: set[int]) -> None:
    ladder, generator = [Coin(rate) for rate in rates], torch.Generator().manual_seed(0)
    kernel = Adapted(ladder, burn_in=40)
    for _ in range(40):
        kernel.step(chains(100), generator)
    assert round(kernel.place) in want
    frozen, before = kernel.place, [coin.steps for coin in ladder]
    for _ in range(30):
        kernel.step(chains(100), generator)
    assert kernel.place == frozen
    changed = [coin.steps - n for coin, n in zip(ladder, before, strict=True)]
    assert changed == [30 if i == round(frozen) else 0 for i in range(len(rates))]


def test_adaptation_checks_its_arguments() -> None:
    for ladder, burn_in, rate in (([], 5, 0.35), ([Coin(0.5)], -1, 0.35), ([Coin(0.5)], 5, 1.0)):
        with pytest.raises(ValueError, match="allowed are 1 or more, 0 or more"):
            Adapted(ladder, burn_in, rate)


class Nearest(nn.Module):
    """A denoiser whose logits are the likeness to each token's embedding."""

    def __init__(self, embedding: TokenEmbedding, schedule: Schedule) -> None:
        super().__init__()
        self.embedding, self.schedule = embedding, schedule

    def hidden(self, z: Tensor, t: Tensor) -> tuple[Tensor]:
        return (z,)

    def readout(self, z: Tensor) -> Tensor:
        return 0.7 * z @ self.embedding.weight.T

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.readout(z)


def test_an_adapted_kernel_is_one_of_its_ladder(lm: BaseLM, embedding: TokenEmbedding) -> None:
    """After burn-in it makes the very steps of that kernel; two runs with one seed are one;
    calls of all rungs are counted.
    """
    target, schedule = (
        TargetDensity(lm, Keyword(["good", "food", "e"]), 1.0),
        make_schedule("cosine"),
    )
    move = DenoiseAccept(Spans(6), rounds=2, levels=[0.3, 0.8], adapt=8)
    models = Models(lm, embedding, Nearest(embedding, schedule), None, target.reward, 1.0)  # type: ignore[arg-type]
    empty = torch.full((64, 8), lm.end_id)
    tokens = lm.generate(
        empty, torch.zeros_like(empty, dtype=torch.bool), torch.Generator().manual_seed(0)
    )
    ends = []
    for _ in range(2):
        kernel = move.kernel(models, target)
        assert isinstance(kernel, Adapted)
        shapes = [(k.proposal.positions.length, *k.proposal.levels) for k in kernel.ladder]  # type: ignore[attr-defined]
        want = [(size, float(torch.tensor(t))) for size in (1, 2, 4, 6) for t in (0.3, 0.8)]
        assert [x for shape in shapes for x in shape] == pytest.approx(
            [x for shape in want for x in shape]
        )
        state, generator = start(target, tokens), torch.Generator().manual_seed(1)
        for _ in range(8):
            state, _ = kernel.step(state, generator)
        place = kernel.place
        chosen = kernel.ladder[round(place)]
        seen = generator.get_state()
        after, _ = kernel.step(state, generator)
        generator.set_state(seen)
        same, _ = chosen.step(state, generator)
        assert torch.equal(after.tokens, same.tokens)
        assert kernel.place == place
        ends.append(after.tokens)
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tilt": -1.0}, r"tilt: -1\.0 given, allowed: 0 or more"),
        ({"adapt": -2}, r"adapt: -2 given, allowed: 0 or more"),
        ({"tilt_level": 1.5}, r"tilt_level: 1\.5 given, allowed: null, or from 0 to 1"),
        (
            {"positions": RandomTokens(4), "adapt": 5},
            r"adapt: 5 given, allowed: 0 unless positions are Spans",
        ),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        DenoiseAccept(**options)


@pytest.fixture
def lm_alone(tmp_path: Path) -> str:
    """The shipped kit's base model without denoiser and critic beside it."""
    return str(shutil.copytree("checkpoints/tiny/lm", tmp_path / "alone"))


def test_a_tilt_needs_a_critic_of_the_same_reward(lm_alone: str) -> None:
    tilted, reward = DenoiseAccept(tilt=1.0), Keyword(["good"])
    denoiser, critic = "checkpoints/tiny/denoiser", "checkpoints/tiny/critic"
    for sampler in (Annealed([Suffix(), tilted]), Chains(moves=[tilted])):
        missing = (
            rf"^critic: none given, needed for the sampler {type(sampler).__name__} with these"
            r" parts at λ = 6"
        )
        with pytest.raises(UserError, match=missing):
            GuidedSamplerModule(reward, sampler, lm_alone, denoiser)
        with pytest.raises(UserError, match="was trained on the reward 'sentiment'"):
            GuidedSamplerModule(reward, sampler, critic=critic)
        # At λ = 0 a reward tilts nothing.
        assert GuidedSamplerModule(reward, sampler, lm_alone, denoiser, lam=0.0).value is None
    assert GuidedSamplerModule(reward, Annealed([Suffix()]), critic=critic).value is None


@pytest.mark.parametrize("kind", ["annealed", "base_lm"])
def test_tilt_and_adaptation_in_the_modules(kind: str) -> None:
    """All at once with the shipped kit, under the trainer's bf16: calls of every network are
    counted, chains move.
    """
    move = DenoiseAccept(Spans(3), rounds=3, tilt=2.0, adapt=1, levels=[0.5, 1.0])
    annealed, chains = Annealed([move], particles=2, rounds=2), Chains(moves=[move], rounds=2)
    module = GuidedSamplerModule(VaderSentiment(), annealed if kind == "annealed" else chains)
    tokens = torch.full((8, 16), module.lm.end_id)
    batch = Batch(0, list(range(8)), [""] * 8, tokens, torch.zeros_like(tokens, dtype=torch.bool))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        drawn = module.draw(batch, torch.Generator().manual_seed(0))
        (generations,) = [*module.predict_step(batch)][:1]
    assert torch.equal(
        drawn.tokens, fill_after_end(drawn.tokens, batch.prompt_mask, module.lm.end_id)
    )
    per_text = 2 if kind == "annealed" else 1
    calls = {name: cost.calls / 8 / per_text for name, cost in generations.costs.items()}
    steps = calls["critic"]
    assert steps == int(steps) >= 2
    # Up to three reveal rounds, of which both directions share the first.
    assert steps <= calls["denoiser"] <= 5 * steps
    assert drawn.accept_rate is not None
    assert float(drawn.accept_rate.mean()) > 0
