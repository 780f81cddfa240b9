"""benchmarks/theory.py at a fraction of its size, and its places in docs/theory.md."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import theory
from benchmarks.theory_mixture import Curve, curve, order, w2
from benchmarks.theory_samplers import ALL, PANELS, Scale
from benchmarks.theory_tokens import Problem, base_samples, best_of_n, exact_predictor, make_problem
from tests.oracles.gaussian_mixture import midpoints

DOC = theory.DOC.read_text(encoding="utf-8")
SMALL = Scale(V=3, T=3, n=100, seeds=2, budgets=(8, 16), levels=(4,), train_steps=10, batch=16)
PARTS = {
    "langevin": lambda folder: theory.langevin(folder, n=500, seeds=2, smallest=0.1),
    "solvers": lambda folder: theory.solvers(folder, n=500, seeds=2, largest=16),
    "tokens": lambda folder: theory.tokens(folder, SMALL, workers=0),
}


@pytest.fixture(scope="module")
def problem() -> Problem:
    return make_problem(3, 3, 1.5, 3, 8)


@pytest.mark.parametrize("name", PARTS)
def test_parts_make_their_plot_and_their_tables(name: str, tmp_path: Path) -> None:
    bodies = PARTS[name](tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [f"{name}.svg"]
    assert f"](theory/{name}.svg)" in DOC
    filled = DOC
    for marker, body in bodies.items():
        rows = [line for line in body.splitlines() if line.startswith("| ")]
        assert len(rows) >= 3
        assert len({row.replace(r"\|", "").count("|") for row in rows}) == 1
        assert "nan" not in body
        filled = theory.fill(filled, marker, body)
    assert all(body in filled for body in bodies.values())
    if name == "tokens":
        assert all(
            f"| {sampler} |" in bodies["samplers"] for sampler in ALL if isinstance(sampler, str)
        )


def test_every_sampler_has_a_line_of_its_own() -> None:
    assert set(theory.PARTS) == set(PARTS)
    assert all(len(names) <= len(theory.STYLES) for names in PANELS)
    assert len({tuple(style.values()) for style in theory.STYLES}) == len(theory.STYLES)


def test_the_same_seeds_make_the_same_files(tmp_path: Path) -> None:
    theory.plt.rcParams.update(theory.RC)
    first, second = (
        (PARTS["solvers"](tmp_path / name), (tmp_path / name / "solvers.svg").read_bytes())
        for name in "ab"
    )
    assert first == second


def test_fill_replaces_what_stands_between_and_no_more() -> None:
    text = "a\n<!-- x: made by make theory -->\nold\nold\n<!-- end of x -->\nb\n"
    assert (
        theory.fill(text, "x", "new\n")
        == "a\n<!-- x: made by make theory -->\nnew\n<!-- end of x -->\nb\n"
    )
    for wrong in ("nothing", text + text):
        with pytest.raises(ValueError, match="x: one pair of comments needed, found"):
            theory.fill(wrong, "x", "new")


def test_unknown_parts_are_named() -> None:
    with pytest.raises(SystemExit, match="other: no such part, allowed: langevin, solvers, tokens"):
        theory.main(["other"])


def test_slopes_and_standard_errors() -> None:
    steps = np.array([4.0, 8.0, 16.0, 32.0])
    assert order(Curve(steps, 3 / steps**2, steps * 0), 0) == pytest.approx((2, 0, 4), abs=1e-9)
    assert order(Curve(steps, 3 / steps, steps * 0), 0.1)[2] == 3  # 3/32 lies below
    assert math.isnan(order(Curve(steps, 3 / steps, steps * 0), 0.3)[0])
    # By hand: x centred −1, 0, 1 (in units of log 2), y 0, 0, 3 (in the same): slope 1.5, rest 0.5,
    # −1, 0.5.
    rough = Curve(steps[:3], np.array([1.0, 1.0, 8.0]), steps[:3] * 0)
    assert order(rough, 0) == pytest.approx((-1.5, (1.5 / 1 / 2) ** 0.5, 3))
    got = curve([1.0, 2.0], [[1.0, 5.0], [3.0, 5.0]])
    assert got.mean.tolist() == [2, 5]
    assert got.error.tolist() == [1, 0]


def test_w2_of_a_shift_is_the_shift() -> None:
    quantiles = torch.special.ndtri(midpoints(1000))
    assert w2(quantiles.flip(0) + 0.3, quantiles) == pytest.approx(0.3)


def test_the_exact_denoiser_knows_both_ends(problem: Problem) -> None:
    """All noise: the marginals of π. No noise: the text itself. Between: a sum over all texts in
    NumPy.
    """
    predict, listed = exact_predictor(problem, 1.5), problem.listed
    pi = np.exp(listed.log_pi(1.5))
    x = torch.from_numpy(listed.sequences)
    clean = problem.embedding(x)
    marginals = np.array(
        [[pi[listed.sequences[:, i] == v].sum() for v in range(3)] for i in range(3)]
    )
    got = predict(torch.zeros(1, 3, clean.shape[-1]), torch.ones(1, 3), None)
    np.testing.assert_allclose(got.logits.exp()[0], marginals, atol=1e-5)
    assert torch.equal(predict(clean, torch.full((len(x), 3), 0.02), None).logits.argmax(-1), x)
    t = torch.tensor([[0.3, 0.6, 0.8]])
    z = torch.randn(1, 3, clean.shape[-1], generator=torch.Generator().manual_seed(0))
    alpha, sigma = (
        np.cos(t.numpy() * np.pi / 2 * 0.998)[..., None],
        np.sin(t.numpy() * np.pi / 2 * 0.998)[..., None],
    )
    weight = pi * np.exp(-(((z.numpy() - alpha * clean.numpy()) / sigma) ** 2).sum((1, 2)) / 2)
    want = (weight[:, None, None] * clean.numpy()).sum(0) / weight.sum()
    np.testing.assert_allclose(predict(z, t, None).z0[0], want, atol=1e-4)


def test_best_of_n_is_at_the_right_temperature(problem: Problem) -> None:
    """One candidate is p; 64 come near to π: bounds are the floor of 4,000 draws and 0.03 (its
    bias is of order 1/64).
    """
    generator, listed = torch.Generator().manual_seed(0), problem.listed
    floor = listed.floor(4000, 1.5, np.random.default_rng(0))
    assert listed.total_variation(best_of_n(problem, 1, 4000, generator), 0.0) < floor + 0.03
    assert listed.total_variation(base_samples(problem, 4000, generator), 0.0) < floor + 0.03
    assert listed.total_variation(best_of_n(problem, 1, 4000, generator), 1.5) > floor + 0.2
    assert listed.total_variation(best_of_n(problem, 64, 4000, generator), 1.5) < floor + 0.03
