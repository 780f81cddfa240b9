"""Guidance by a value and by the true gradient of a reward, against Gaussian laws and by hand."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dia_lightning
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.schedule import make_schedule, time_grid
from dia_lightning.guidance import (
    Predict,
    Prediction,
    classifier_free,
    guided,
    true_gradient,
    unguided,
)
from dia_lightning.sampling.solvers import SOLVERS
from dia_lightning.types import Denoiser
from tests.oracles.gaussian_mixture import GaussianMixture

SCHEDULE = make_schedule("cosine")
F64 = torch.float64
N = 40_000


class Table(TokenEmbedding):
    """Any vectors as an embedding table, unscaled."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(torch.eye(2))
        self.weight, self.decodable = weight, torch.ones(len(weight), dtype=torch.bool)

    def expected(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1) @ self.weight


# Tokens so dense on the line that sums over them are integrals: p_θ puts N(0, 1) on them.
LINE = Table(torch.linspace(-7, 7, 561, dtype=F64)[:, None])


def posterior(z: Tensor, t: Tensor, z0_prev: Tensor | None = None) -> Tensor:
    """Logits of p(token | z_t) for tokens that are N(0, 1) on LINE."""
    alpha, sigma = SCHEDULE.alpha(t)[..., None], SCHEDULE.sigma(t)[..., None].clamp_min(1e-3)
    v = LINE.weight[:, 0]
    return -(v**2) / 2 - (z - alpha * v) ** 2 / (2 * sigma**2)


class Linear:
    """r = Σ_i Σ_v p_{i,v} c_v."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def soft(self, probabilities: Tensor) -> Tensor:
        return (probabilities @ self.values).sum(1)


class Square(Linear):
    """R = Σ_i (Σ_v p_{i,v} c_v)², where soft and straight-through gradients differ."""

    def soft(self, probabilities: Tensor) -> Tensor:
        return (probabilities @ self.values).square().sum(1)


class Both(Linear):
    """0.7 `Linear` − 0.2 `Square`."""

    def soft(self, probabilities: Tensor) -> Tensor:
        return 0.7 * super().soft(probabilities) - 0.2 * Square(self.values).soft(probabilities)


def zero(z: Tensor, t: Tensor, _: Tensor | None) -> Prediction:
    return Prediction(torch.zeros_like(z), torch.zeros_like(z), torch.zeros(*z.shape[:2], 1))


def standard_normal(z: Tensor, t: Tensor, _: Tensor | None) -> Prediction:
    """Z_0 ~ N(0, 1): ẑ_0 = α z."""
    z0 = SCHEDULE.alpha(t)[..., None] * z
    return Prediction(z0, z0, torch.zeros(*z.shape[:2], 1))


def run(sampler: str, steps: int, predict: Predict, n: int = N) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, 1, 1, generator=generator, dtype=F64)
    return SOLVERS[sampler](
        predict, SCHEDULE, z, time_grid(SCHEDULE, steps, 1, 0.0).double(), generator
    ).flatten()


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "dpmpp_2m", "dia"])
def test_guidance_samples_the_tilted_gaussian(sampler: str) -> None:
    """p = N(0, 1), r(x) = x: the exact value is log E[exp(λ z_0) | z_t] = λ α z_t + …, the
    target is N(λ, 1).
    """
    lam = 0.8
    line = Table(torch.ones(1, 1, dtype=F64))
    x = run(
        sampler,
        200,
        guided(
            standard_normal,
            lambda z, t: lam * (SCHEDULE.alpha(t)[..., None] * z).sum((1, 2)),
            SCHEDULE,
            line,
            cap=100.0,
        ),
    )
    # Seven standard errors are 0.035 and 0.025 (false-alarm rate 3e-12); discretisation adds less
    # than 0.02.
    assert abs(float(x.mean()) - lam) < 0.055
    assert abs(float(x.std()) - 1) < 0.045


@pytest.mark.parametrize("straight_through", [False, True])
def test_true_gradient_of_a_linear_reward_is_exact(straight_through: bool) -> None:
    """p = N(0, 1), r(x) = c x: the target is N(λ c, 1), whose posterior mean is α z + σ² λ c at
    every level.
    """
    lam, c = 0.6, -1.5
    value = true_gradient(Linear(c * LINE.weight[:, 0]), posterior, LINE, lam, straight_through)
    predict = guided(unguided(posterior, LINE), value, SCHEDULE, LINE, cap=1e9)
    z = torch.linspace(-2, 2, 9, dtype=F64)[:, None, None]
    for level in (0.2, 0.5, 0.9):
        t = torch.full((9, 1), level, dtype=F64)
        alpha, sigma = SCHEDULE.alpha(t[0, 0]), SCHEDULE.sigma(t[0, 0])
        got = predict(z, t, None)
        torch.testing.assert_close(got.z0, alpha * z + sigma**2 * lam * c, rtol=0, atol=1e-6)
        torch.testing.assert_close(got.z0_network, alpha * z, rtol=0, atol=1e-6)
        # Tokens: α ⟨∇, E(v)⟩ = α² λ c v is added to their logits.
        tilt = (got.logits - posterior(z, t)).expand(9, 1, 561)
        torch.testing.assert_close(
            tilt, (alpha**2 * lam * c * LINE.weight[:, 0]).expand(9, 1, 561), rtol=0, atol=1e-5
        )


def test_samples_with_the_true_gradient() -> None:
    """500 samples of `ddim` from noise at quantiles: the whole chain of tilts ends at N(λ c, 1),
    nothing random.
    """
    lam, c, n = 0.6, 1.5, 500
    value = true_gradient(Linear(c * LINE.weight[:, 0]), posterior, LINE, lam)
    predict = guided(unguided(posterior, LINE), value, SCHEDULE, LINE, cap=1e9)
    z = torch.special.ndtri((torch.arange(n, dtype=F64) + 0.5) / n)[:, None, None]
    x = SOLVERS["ddim"](
        predict, SCHEDULE, z, time_grid(SCHEDULE, 60, 1, 0.0).double(), torch.Generator()
    )
    assert float(x.mean()) == pytest.approx(lam * c, abs=0.02)
    assert float(x.std()) == pytest.approx(1, abs=0.03)


def small_network() -> tuple[Denoiser, Table]:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(3 * 2, 3 * 5, generator=generator, dtype=F64)

    def network(z: Tensor, t: Tensor, z0_prev: Tensor | None = None) -> Tensor:
        return ((z + t[..., None]).flatten(1) @ mixing).tanh().unflatten(1, (3, 5))

    return network, Table(torch.randn(5, 2, generator=generator, dtype=F64))


VALUES = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0], dtype=F64)


def test_soft_gradient_equals_finite_differences() -> None:
    """Of λ (w_1 r_1 + w_2 r_2) through the denoiser, all positions mixed, one of them clean."""
    network, table = small_network()
    value = true_gradient(Both(VALUES), network, table, 1.3, temperature=0.8)
    z = torch.randn(1, 3, 2, generator=torch.Generator().manual_seed(1), dtype=F64)
    t = torch.tensor([[0.0, 0.4, 0.7]], dtype=F64)
    got = guided(zero, value, SCHEDULE, table, cap=1e9)(z, t, None).z0
    alpha, sigma = SCHEDULE.alpha(t)[..., None], SCHEDULE.sigma(t)[..., None]
    want = torch.zeros_like(z)
    for i in (1, 2):
        for j in range(2):
            step = torch.zeros_like(z)
            step[0, i, j] = 1e-5
            want[0, i, j] = (value(z + step, t) - value(z - step, t)).item() / 2e-5
    torch.testing.assert_close(got, sigma**2 / alpha * want, rtol=1e-6, atol=1e-8)


def test_straight_through_is_one_hot_forward_and_soft_backward() -> None:
    """For r = Σ (p·c)²: value Σ c_k², k the likeliest token; gradient 2 c_k ∇(p·c), where the
    soft one is 2 (p·c) ∇(p·c).
    """
    network, table = small_network()
    t = torch.full((1, 3), 0.5, dtype=F64)
    z = torch.randn(1, 3, 2, generator=torch.Generator().manual_seed(1), dtype=F64).requires_grad_()
    value = true_gradient(Square(VALUES), network, table, 2.0, straight_through=True)(z, t)
    soft = network(z, t).softmax(-1)
    hard = VALUES[soft.argmax(-1)]
    assert value.item() == pytest.approx(2 * hard.square().sum().item())
    (got,) = torch.autograd.grad(value, z)
    (want,) = torch.autograd.grad(2 * (2 * hard * (soft @ VALUES)).sum(), z)
    torch.testing.assert_close(got, want)


def test_clean_positions_enter_as_their_tokens() -> None:
    """A reward of position 0 alone, held at t = 0: the value is that token's, whatever the
    network says there.
    """
    network, table = small_network()

    class First:
        def soft(self, probabilities: Tensor) -> Tensor:
            return probabilities[:, 0] @ VALUES

    table.weight = table.weight / table.weight.norm(dim=1, keepdim=True)
    z = torch.zeros(5, 3, 2, dtype=F64)
    z[:, 0] = table.weight
    t = torch.tensor([0.0, 0.5, 0.5], dtype=F64).expand(5, 3)
    torch.testing.assert_close(true_gradient(First(), network, table, 3.0)(z, t), 3 * VALUES)


def test_tokens_that_no_decoding_may_return_have_no_share() -> None:
    network, table = small_network()
    table.decodable = torch.tensor([True, True, True, False, True])
    value = true_gradient(
        Linear(torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0], dtype=F64)), network, table, 1.0
    )
    z, t = torch.ones(2, 3, 2, dtype=F64), torch.full((2, 3), 0.5, dtype=F64)
    assert value(z, t).tolist() == [0.0, 0.0]


def test_lambda_zero_is_the_denoiser_itself() -> None:
    network, table = small_network()
    plain = unguided(network, table)
    none = guided(
        plain, true_gradient(Linear(VALUES), network, table, 0.0), SCHEDULE, table, cap=5.0
    )
    z, t = torch.ones(2, 3, 2, dtype=F64), torch.full((2, 3), 0.5, dtype=F64)
    for a, b in zip(plain(z, t, None), none(z, t, None), strict=True):
        assert torch.equal(a, b)


# Two labels of a law on the line: its components, and its first and its others.
KINDS = [slice(None), slice(0, 1), slice(1, None)]
SHARES, MEANS, STDS = torch.tensor([[0.3, 0.5, 0.2], [-2.0, 0.5, 1.5], [0.4, 0.5, 0.3]], dtype=F64)
LAWS = [
    GaussianMixture(SHARES[kind] / SHARES[kind].sum(), MEANS[kind, None], STDS[kind])
    for kind in KINDS
]


def labelled_posterior(
    z: Tensor, t: Tensor, z0_prev: Tensor | None = None, label: Tensor | None = None
) -> Tensor:
    """Logits of p(token | z_t, label) for tokens on LINE under LAWS."""
    assert label is not None
    log_p = torch.stack([law.log_density(LINE.weight) for law in LAWS])
    alpha, sigma = SCHEDULE.alpha(t)[..., None], SCHEDULE.sigma(t)[..., None]
    return log_p[label][:, None] - (z - alpha * LINE.weight[:, 0]) ** 2 / (2 * sigma**2)


@pytest.mark.parametrize("label", [1, 2])
@pytest.mark.parametrize("scale", [-1.0, 0.0, 2.5])
def test_the_classifier_free_score_is_the_formula(label: int, scale: float) -> None:
    """∇log p(z|y) + w (∇log p(z|y) − ∇log p(z)) by central differences of the laws at each
    level, two levels in a text.
    """
    z = torch.linspace(-2, 2, 9, dtype=F64)[:, None, None].repeat(1, 2, 1)
    t = torch.tensor([0.3, 0.8], dtype=F64).expand(9, 2)
    got = classifier_free(labelled_posterior, LINE, label, scale)(z, t, None)
    for i, level in enumerate((0.3, 0.8)):
        alpha, sigma = (
            float(f(torch.tensor(level, dtype=F64))) for f in (SCHEDULE.alpha, SCHEDULE.sigma)
        )
        seen, x, h = [law.level(alpha, sigma) for law in LAWS], z[:, i], 1e-5
        plain, given = (
            (law.log_density(x + h) - law.log_density(x - h)) / (2 * h)
            for law in (seen[0], seen[label])
        )
        score = (alpha * got.z0[:, i, 0] - x[:, 0]) / sigma**2
        torch.testing.assert_close(score, given + scale * (given - plain), rtol=0, atol=1e-5)
        each = torch.cat([LAWS[k].posterior_mean(x, alpha, sigma) for k in (0, label)])
        torch.testing.assert_close(got.z0_network[:, i], each, rtol=0, atol=1e-6)


def test_classifier_free_tokens_by_hand_and_branches_that_keep_to_themselves() -> None:
    """Of log-probabilities, not of raw logits; one call for both branches; none is told of the
    other's earlier estimate.
    """
    network, table = small_network()
    table.decodable = torch.tensor([True, True, True, False, True])
    asked: list[tuple[Tensor | None, Tensor]] = []

    def labelled(
        z: Tensor, t: Tensor, z0_prev: Tensor | None = None, label: Tensor | None = None
    ) -> Tensor:
        assert label is not None
        asked.append((z0_prev, label))
        logits = network(z + 0.3 * label[:, None, None], t) + 5.0 * label[:, None, None]
        return logits if z0_prev is None else logits + z0_prev @ table.weight.T

    z = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(1), dtype=F64)
    t = torch.full((2, 3), 0.5, dtype=F64)
    predict = classifier_free(labelled, table, 2, 1.5, temperature=0.7)
    first = predict(z, t, None)
    second = predict(z, t, first.z0_network)
    for got, (plain_prev, given_prev) in (
        (first, (None, None)),
        (second, first.z0_network.chunk(2)),
    ):
        logits = [
            labelled(z, t, prev, torch.full((2,), y))
            for prev, y in ((plain_prev, 0), (given_prev, 2))
        ]
        plain, given = (
            x.masked_fill(~table.decodable, -torch.inf).div(0.7).softmax(-1) for x in logits
        )
        product = torch.where(table.decodable, given**2.5 / plain**1.5, 0.0)
        torch.testing.assert_close(got.logits.softmax(-1), product / product.sum(-1, keepdim=True))
        torch.testing.assert_close(got.z0, 2.5 * given @ table.weight - 1.5 * plain @ table.weight)
        torch.testing.assert_close(got.logits_network.softmax(-1), plain)  # type: ignore[union-attr]
    assert [label.tolist() for _, label in asked[:2]] == [[0, 0, 2, 2]] * 2


@pytest.mark.parametrize("factor", [None, lambda u: 0.01 * u])
def test_cap_window_and_factor(factor: object) -> None:
    """Gradient 50 in each of 4 dimensions: ‖gradient‖ √d = 200 is cut to 3; times 0.01 u it is 2
    u and left alone.
    """
    z, t = torch.zeros(2, 3, 4), torch.tensor([[0.0, 0.5, 0.9]]).expand(2, 3)
    table = Table(torch.eye(4))
    push = guided(
        zero,
        lambda z, t: 50 * z.sum((1, 2)),
        SCHEDULE,
        table,
        3.0,
        window=(0.6, 1.0),
        factor=factor,
    )  # type: ignore[arg-type]
    shift = push(z, t, None).z0
    assert torch.equal(shift[:, :2], torch.zeros(2, 2, 4))
    alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
    length = 3.0 if factor is None else 200 * 0.01 * SCHEDULE.unwarp(t)[:, 2]
    torch.testing.assert_close(
        shift[:, 2].norm(dim=-1), (sigma**2 / alpha)[:, 2] * length / 2
    )  # √d = 2


def test_gradients_work_under_inference_mode_and_leave_nothing_behind() -> None:
    network, table = small_network()
    predict = guided(
        unguided(network, table),
        true_gradient(Linear(VALUES), network, table, 1.0),
        SCHEDULE,
        table,
        cap=9.0,
    )
    z, t = torch.ones(2, 3, 2, dtype=F64), torch.full((2, 3), 0.5, dtype=F64)
    want = predict(z, t, None)
    with torch.inference_mode():
        got = predict(z.clone(), t.clone(), None)
    assert torch.equal(got.z0, want.z0)
    assert not any(part.requires_grad for part in want)


def test_gradients_are_switched_on_in_guidance_and_in_training_only() -> None:
    package = Path(dia_lightning.__file__).parent
    for file in package.rglob("*.py"):
        found = re.search(
            r"enable_grad|autograd\.grad|requires_grad_\(\)", file.read_text(encoding="utf-8")
        )
        assert (found is not None) == (
            file.relative_to(package).as_posix() in ("guidance.py", "diffusion/loss.py")
        ), file
