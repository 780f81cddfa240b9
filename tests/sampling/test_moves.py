"""Options of the exact moves, and adaptation: where it ends, and that it does end."""

import pytest
import torch
from dia_lightning.sampling.moves import Moves, make_kernels

from dia_lightning.diffusion.schedule import make_schedule
from dia_lightning.embedding import TokenEmbedding
from dia_lightning.lm import BaseLM
from dia_lightning.resources import UserError
from dia_lightning.rewards import Keyword, VaderSentiment
from dia_lightning.samplers import GuidedSamplerModule
from dia_lightning.sampling.adaptation import Adapted
from dia_lightning.sampling.denoise_accept import Info, State, start
from dia_lightning.target import TargetDensity
from dia_lightning.types import Prompts, fill_after_end


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
    return State(torch.zeros(n, 1, dtype=torch.int64), torch.zeros(n, 1, dtype=torch.bool), zeros, zeros, zeros)


@pytest.mark.parametrize(
    ("rates", "want"),
    [((0.9, 0.7, 0.5, 0.34, 0.1, 0.01), {3}), ((0.3, 0.2, 0.1), {0}), ((0.9, 0.8, 0.7), {2}), ((0.5, 0.2), {0, 1})],
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


def nearest(embedding: TokenEmbedding):  # type: ignore[no-untyped-def]
    return lambda z, t: 0.7 * z @ embedding.weight.T


def test_an_adapted_kernel_is_one_of_its_ladder(lm: BaseLM, embedding: TokenEmbedding) -> None:
    """After burn-in it makes the very steps of that kernel; two runs with one seed are one; calls of all rungs are counted."""
    target, schedule = TargetDensity(lm, Keyword(["good", "food", "e"]), 1.0), make_schedule("cosine")
    moves = Moves(size=6, levels=[0.3, 0.8], rounds=2, adapt=8, expert=0.3)
    empty = torch.full((64, 8), lm.end_id)
    tokens = lm.generate(empty, torch.zeros_like(empty, dtype=torch.bool), torch.Generator().manual_seed(0))
    ends = []
    for _ in range(2):
        (kernel,) = make_kernels("denoise_accept", moves, target, nearest(embedding), embedding, schedule)
        assert isinstance(kernel, Adapted)
        shapes = [(k.positions.length, *k.levels) for k in kernel.ladder]  # type: ignore[attr-defined]
        want = [(size, float(torch.tensor(t))) for size in (1, 2, 4, 6) for t in (0.3, 0.8)]
        assert [x for shape in shapes for x in shape] == pytest.approx([x for shape in want for x in shape])
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
        ({"tilt": -1.0}, r"moves\.tilt: -1\.0 given, allowed: 0 or more"),
        ({"expert": -0.5}, r"moves\.expert: -0\.5 given, allowed: 0 or more"),
        ({"adapt": -2}, r"moves\.adapt: -2 given, allowed: 0 or more"),
        ({"tilt_level": 1.5}, r"moves\.tilt_level: 1\.5 given, allowed: null, or from 0 to 1"),
        ({"positions": "random", "adapt": 5}, r"moves\.adapt: 5 given, allowed with positions span"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Moves(**options)  # type: ignore[arg-type]


def test_a_tilt_needs_a_critic_of_the_same_reward() -> None:
    moves, reward = Moves(tilt=1.0), Keyword(["good"])
    missing = r"critic: none given, needed for --model\.init_args\.moves\.tilt 1\.0"
    with pytest.raises(UserError, match=missing):
        GuidedSamplerModule(reward, critic=None, moves=moves)
    with pytest.raises(UserError, match=missing):
        GuidedSamplerModule(reward, critic=None, lam=0.0, sampler="base_lm", refine="denoise_accept", moves=moves)
    with pytest.raises(UserError, match="was trained on the reward 'sentiment'"):
        GuidedSamplerModule(reward, moves=moves, critic="checkpoints/tiny/critic")
    assert GuidedSamplerModule(reward, moves=moves, refine="suffix").value is None


@pytest.mark.parametrize("kind", ["annealed", "base_lm"])
def test_tilt_expert_and_adaptation_in_the_modules(kind: str) -> None:
    """All at once with the shipped kit, under the trainer's bf16: calls of every network are counted, chains move."""
    moves = Moves(size=3, rounds=3, tilt=2.0, expert=0.3, adapt=1, levels=[0.5, 1.0])
    module = GuidedSamplerModule(
        VaderSentiment(), sampler=kind, particles=2, moves=moves, refine="denoise_accept", refine_steps=2
    )
    tokens = torch.full((8, 16), module.lm.end_id)
    batch = Prompts(0, list(range(8)), [""] * 8, tokens, torch.zeros_like(tokens, dtype=torch.bool))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        drawn = module.draw(batch, torch.Generator().manual_seed(0))
        (generations,) = [*module.predict_step(batch)][:1]
    assert torch.equal(drawn.tokens, fill_after_end(drawn.tokens, batch.prompt_mask, module.lm.end_id))
    per_text = 2 if kind == "annealed" else 1
    calls = {name: cost.calls / 8 / per_text for name, cost in generations.costs.items()}
    steps = calls["critic"]
    assert steps == int(steps) >= 2
    # Up to three reveal rounds, of which both directions share the first.
    assert steps <= calls["denoiser"] <= 5 * steps
    assert drawn.accept_rate is not None
    assert float(drawn.accept_rate.mean()) > 0
