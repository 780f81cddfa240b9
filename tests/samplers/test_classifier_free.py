"""Classifier-free guidance on texts that can be listed, and the sampler on a small random
denoiser.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dia_lightning.data.prompts import prompt_rows
from dia_lightning.diffusion.checkpoint import save_network
from dia_lightning.diffusion.denoiser import DenoiserNetwork
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.schedule import make_schedule, time_grid
from dia_lightning.diffusion.trunk import NetworkSize
from dia_lightning.errors import UserError
from dia_lightning.guidance import classifier_free, unguided
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.rewards import Keyword, Regex
from dia_lightning.samplers import (
    DDIM,
    Ancestral,
    ClassifierFree,
    DiaLiteral,
    Diffusion,
    DPMpp2M,
    GuidedSamplerModule,
    PredictorCorrector,
    Solver,
)  # fmt: skip
from dia_lightning.sampling.decode import commit_tokens, draw_texts
from dia_lightning.sampling.solvers import solve
from dia_lightning.types import Batch, Reward
from tests.oracles.enumerable import Enumerable, Floats

N, V, T = 4000, 4, 3
PROBLEM = Enumerable(V, T, seed=0)
P = np.exp(PROBLEM.log_p)
# Label 1 and 2: texts of a reward up to 0.5 and above, 70 % and 30 % of p.
CLASS = np.where(PROBLEM.reward > 0.5, 2, 1)
GIVEN = [P, *(np.where(y == CLASS, P, 0) / P[y == CLASS].sum() for y in (1, 2))]
TABLE, SCHEDULE = TokenEmbedding(torch.eye(V)), make_schedule("cosine")
ONE_BY_ONE = torch.tensor([[0.0] * k + [1.0] * (T - k) for k in range(T + 1)])


def exact(
    z: Tensor, t: Tensor, z0_prev: Tensor | None = None, label: Tensor | None = None
) -> Tensor:
    """Log p(x_i | z, label) by the sum over all texts."""
    assert label is not None
    alpha, sigma = SCHEDULE.alpha(t)[..., None, None], SCHEDULE.sigma(t).clamp_min(0.05)[..., None]
    log_noise = -(z[:, :, None] - alpha * TABLE.weight).square().sum(-1) / (2 * sigma**2)
    texts = torch.from_numpy(PROBLEM.sequences)
    log_joint = torch.from_numpy(np.stack(GIVEN)).clamp_min(1e-30).log().float()[label]
    log_joint = log_joint + sum(log_noise[:, j][:, texts[:, j]] for j in range(T))
    parts = [
        torch.stack([log_joint[:, texts[:, i] == v].logsumexp(1) for v in range(V)], 1)
        for i in range(T)
    ]
    return torch.stack(parts, 1)


def drawn(label: int, scale: float, times: Tensor) -> Floats:
    """Frequencies of all texts among N."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(N, T, V, generator=generator)
    predict = classifier_free(exact, TABLE, label, scale)
    z = solve(
        "ancestral", predict, SCHEDULE, z, times, generator, commit_tokens(TABLE, True, generator)
    )
    return PROBLEM.frequencies(TABLE.decode(z))


def one_by_one(label: int, scale: float) -> Floats:
    """Π_i p(x_i | x_<i, y)^(1+w) / p(x_i | x_<i)^w, normalised at every token, by loops."""
    rows, out = PROBLEM.sequences, np.ones(len(P))
    for k, row in enumerate(rows):
        for i in range(T):
            before = (rows[:, :i] == row[:i]).all(1)
            weights = []
            for v in range(V):
                with np.errstate(
                    invalid="ignore"
                ):  # a beginning that the label rules out counts at w = -1 alone
                    plain, given = (
                        (p[before & (rows[:, i] == v)].sum() / p[before].sum())
                        for p in (P, GIVEN[label])
                    )
                weights.append(given ** (1 + scale) / plain**scale)
            out[k] *= weights[row[i]] / sum(weights)
            if not out[k]:
                break
    return out


def distance(a: Floats, b: Floats) -> float:
    return float(np.abs(a - b).sum() / 2)


def floor(p: Floats) -> float:
    """Total variation of N exact draws to p: mean and 7 standard deviations over 200 sets (false
    alarms below 1e-9).
    """
    found = (
        np.abs(np.random.default_rng(0).multinomial(N, p / p.sum(), size=200) / N - p).sum(1) / 2
    )
    return float(found.mean() + 7 * found.std())


@pytest.mark.parametrize(("label", "scale"), [(1, 0.0), (2, 0.0), (2, 1.5), (2, -1.0)])
def test_token_by_token_it_follows_the_closed_form(label: int, scale: float) -> None:
    """With the exact denoiser: p(x|y) at w = 0, p(x) at w = −1, and in between and beyond the
    product of conditionals.
    """
    want = one_by_one(label, scale)
    if scale in (0.0, -1.0):
        np.testing.assert_allclose(want, GIVEN[label if scale == 0 else 0], atol=1e-12)
    got = drawn(label, scale, ONE_BY_ONE)
    assert distance(got, want) < floor(want) < 0.09
    others = [
        one_by_one(*other)
        for other in ((1, 0.0), (2, 0.0), (2, 1.5), (2, -1.0))
        if other != (label, scale)
    ]
    assert min(distance(want, other) for other in others) > 0.15


def test_all_positions_together_it_follows_the_label() -> None:
    """At w = 0 in 24 steps: p(x|y), up to what N draws show (measured 0.025; of p itself 0.71)."""
    assert (
        distance(drawn(2, 0.0, time_grid(SCHEDULE, 24, T, 0.5)), GIVEN[2]) < floor(GIVEN[2]) < 0.06
    )
    assert distance(P, GIVEN[2]) > 0.6


SIZE, STEPS = NetworkSize(width=16, layers=1, heads=2, max_length=8), 5
REWARD = Regex("a")
LABELS = {"n_labels": 3, "reward": REWARD.name, "edges": [0.1, 0.2]}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, embedding: TokenEmbedding) -> Path:
    """Random denoisers with three labels and without, as checkpoints."""
    folder = tmp_path_factory.mktemp("labelled")
    settings = {
        "schema": 1,
        "base_lm": "base",
        "embedding": embedding.fingerprint(),
        "schedule": "cosine",
        "kind": "denoiser",
    }
    settings |= {"size": SIZE.as_dict(), "tied_head": False}
    torch.manual_seed(1)
    for name, n_labels in (("labelled", 3), ("plain", 0)):
        network = DenoiserNetwork(embedding, make_schedule("cosine"), SIZE, n_labels=n_labels)
        for weight in network.parameters():
            torch.nn.init.normal_(weight, std=0.3)
        save_network(network, settings | ({"labels": LABELS} if n_labels else {}), folder / name)
    return folder


def module(
    lm_folder: Path,
    parts: Path,
    guidance: ClassifierFree,
    solver: Solver = Ancestral(),
    seed: int = 0,
) -> GuidedSamplerModule:
    sampler = Diffusion(solver, guidance, steps=STEPS, stagger=2.0)
    denoiser = str(parts / "labelled")
    return GuidedSamplerModule(
        REWARD, sampler, str(lm_folder), denoiser, compare_base=False, seed=seed
    )  # fmt: skip


def work(lm: BaseLM, prompts: list[str]) -> Batch:
    tokens, mask = prompt_rows(lm, prompts, 8)
    return Batch(0, list(range(len(prompts))), prompts, tokens, mask)


@pytest.mark.parametrize(
    "solver",
    [Ancestral(), PredictorCorrector(), DiaLiteral(), DDIM(), DPMpp2M()],
    ids=lambda s: s.name,
)
def test_both_ends_are_the_denoiser_with_and_without_its_label(
    lm_folder: Path, parts: Path, lm: BaseLM, solver: Solver
) -> None:
    """w = 0 and w = −1, with the solver's own defaults; prompts stay; both branches of a level
    are one call.
    """
    batch = work(lm, ["the good", "the", "", ""])
    texts = {}
    for scale, label in ((0.0, 2), (-1.0, 0)):
        model = module(lm_folder, parts, ClassifierFree(2, scale), solver)
        network, rows = model.denoiser_network, []
        assert network is not None
        hook = network.trunk.register_forward_pre_hook(
            lambda _, inputs: rows.append(len(inputs[0]))
        )
        (made,) = model.predict_step(batch)
        hook.remove()
        assert set(rows) == {2 * 4}
        assert made.costs["denoiser"].calls == sum(rows)
        plain = unguided(partial(network, label=torch.full((4,), label)), model.embedding)
        texts[label] = draw_texts(
            plain,
            batch,
            model.embedding,
            network.schedule,
            lm.end_id,
            torch.Generator().manual_seed(0),
            solver.name,
            STEPS,
            2.0,
        )
        if (
            scale == -1 or solver.name != "dia_literal"
        ):  # which begins at the noise of the plain branch
            assert torch.equal(made.tokens, texts[label])
        assert torch.equal(made.tokens[batch.prompt_mask], batch.tokens[batch.prompt_mask])
        assert made.method == "classifier_free"
    assert not torch.equal(texts[0], texts[2])


def test_the_highest_label_is_the_default_and_the_scale_counts(
    lm_folder: Path, parts: Path, lm: BaseLM
) -> None:
    batch = work(lm, [""] * 8)
    last = ClassifierFree()
    runs = [
        (last, 0),
        (ClassifierFree(3), 0),
        (ClassifierFree(1), 0),
        (ClassifierFree(scale=5.0), 0),
        (last, 1),
    ]
    default, *others = (
        module(lm_folder, parts, guidance, seed=seed).predict_step(batch)[0].tokens
        for guidance, seed in runs
    )
    assert [torch.equal(default, tokens) for tokens in others] == [True, False, False, False]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClassifierFree(scale=-1.5), r"scale: -1.5 given, allowed: -1 or more"),
        (lambda: Diffusion(steps=0), r"steps: 0 given"),
        (lambda: Diffusion(temperature=0.0), r"temperature: 0.0 given"),
        (lambda: Diffusion(stagger=-1.0), r"stagger: -1.0 given"),
    ],
    ids=["scale", "steps", "temperature", "stagger"],
)
def test_settings_are_checked(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        make()


@pytest.mark.parametrize(
    ("label", "denoiser", "reward", "message"),
    [
        (4, "labelled", REWARD, r"label: 4 given, allowed: 1 to 3, or null"),
        (0, "labelled", REWARD, r"label: 0 given"),
        (None, "plain", REWARD,
         r"denoiser: .*plain given, allowed: one with labels of 'regex.*has no labels"),
        (
            None, "labelled", Keyword(["a"]),
            r"denoiser: .*one with labels of 'keyword' .* it has labels of the reward 'regex'",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_named(
    lm_folder: Path, parts: Path, label: int | None, denoiser: str, reward: Reward, message: str
) -> None:
    sampler = Diffusion(Ancestral(), ClassifierFree(label))
    with pytest.raises(UserError, match=f"^{message}"):
        GuidedSamplerModule(reward, sampler, str(lm_folder), str(parts / denoiser))
