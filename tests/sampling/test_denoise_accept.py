"""Denoise-and-accept: its transition matrix entry by entry, detailed balance with noise, and
exactness from poor beginnings.
"""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dia_lightning.diffusion.denoiser import DenoiserNetwork
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.schedule import Schedule, make_schedule
from dia_lightning.diffusion.trunk import NetworkSize
from dia_lightning.samplers.networks import DenoiserProposal
from dia_lightning.sampling.denoise_accept import DenoiserDrafts, Tilt
from dia_lightning.sampling.ensemble import EnsembleKernel
from dia_lightning.sampling.positions import RandomTokens, Spans
from dia_lightning.sampling.state import State

V, T, END = 3, 3, 2
RNG = np.random.default_rng(5)
TABLE = RNG.normal(size=(V, 4)).astype(np.float32)
BIAS = RNG.normal(size=(T, V)).astype(np.float32)
MIX = RNG.normal(size=(4, V)).astype(np.float32)
E = TABLE / np.linalg.norm(TABLE, axis=1, keepdims=True) * 2.0


class Blank(Schedule):
    """α = 1 − t: at t = 1 nothing is left of the signal, so the noise cancels from the ratio."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t


def proposal(z: Tensor, t: Tensor) -> Tensor:
    """Poor on purpose: a bias for each position and a linear function of the sum over clean
    positions.
    """
    clean = (z * (t == 0)[..., None]).sum(1, keepdim=True)
    return torch.from_numpy(BIAS) + clean @ torch.from_numpy(MIX)


def looking(z: Tensor, t: Tensor) -> Tensor:
    """The same, looking at the noised position too, though not in the right proportion."""
    return proposal(z, t) * 0.3 + 0.6 * z @ torch.from_numpy(E).T


def canonical(row: tuple[int, ...]) -> bool:
    return END not in row or all(x == END for x in row[row.index(END) :])


ROWS = [row for row in itertools.product(range(V), repeat=T) if canonical(row)]
LOG_PI = RNG.normal(size=len(ROWS)) * 1.5


class Table:
    """log π of the rows, any other row is a mistake of the kernel."""

    def log_prob(self, tokens: Tensor) -> Tensor:
        return torch.from_numpy(LOG_PI)[codes(tokens)]


def codes(tokens: Tensor) -> Tensor:
    """(B,) the number of each row in ROWS; a row that is no text is an error."""
    place = torch.full((V**T,), -1)
    place[torch.tensor(ROWS) @ V ** torch.arange(T)] = torch.arange(len(ROWS))
    found = place[tokens @ V ** torch.arange(T)]
    assert bool((found >= 0).all())
    return found


KAPPA, LAM = 1.5, 0.8
C = RNG.normal(size=(T, 4)) * 0.4


def critic(z: Tensor, t: Tensor) -> Tensor:
    """½ (Σ_i ⟨C_i, z_i⟩)², whose gradient at one position depends on all of them."""
    return 0.5 * (torch.from_numpy(C).to(z) * z).sum((1, 2)).square()


def helps(x: tuple[int, ...], hidden: list[int], kind: str) -> np.ndarray:
    """(T, V) what is added to the logits in a move that starts from x and hides the positions
    `hidden`.
    """
    if kind == "tilt":
        seen = [q_numpy(x, hidden, i) @ E if i in hidden else E[x[i]] for i in range(T)]
        gradient = sum(float(C[i] @ seen[i]) for i in range(T)) * C
        return KAPPA * LAM * gradient @ E.T
    return np.zeros((T, V))


def q_numpy(
    context: tuple[int, ...], hidden: list[int], i: int, added: np.ndarray | float = 0.0
) -> np.ndarray:
    """(V,) proposal at position i when the positions `hidden` are unknown and the others hold
    `context`.
    """
    known = [j for j in range(T) if j not in hidden]
    logits = (
        BIAS[i].astype(np.float64) + sum((E[context[j]] for j in known), np.zeros(4)) @ MIX + added
    )
    p = np.exp(logits - logits.max())
    if any(j > i and context[j] != END for j in known):
        p[END] = 0
    if any(j < i and context[j] == END for j in known):
        p[:END] = 0
    return p / p.sum() if p.any() else p


def matrix(spans: int, rounds: int, kind: str = "") -> np.ndarray:
    """P(x → y) of spans of two, in arithmetic of its own."""
    out = np.zeros((len(ROWS), len(ROWS)))
    length = [T if END not in row else row.index(END) + 1 for row in ROWS]
    for a, x in enumerate(ROWS):
        starts = range(1 - spans, length[a])
        for begin in starts:
            order = [i for i in range(begin, begin + spans) if 0 <= i < T]
            # Places beyond the row count when a span is cut into rounds.
            padded = [i if 0 <= i < T else -1 for i in range(begin, begin + spans)]
            for b, y in enumerate(ROWS):
                if any(x[i] != y[i] for i in range(T) if i not in order) or x == y:
                    continue
                forward = _by_round(x, y, padded, rounds, kind)
                reverse = _by_round(y, x, padded, rounds, kind)
                if begin >= length[b]:
                    continue
                ratio = math.exp(LOG_PI[b] - LOG_PI[a]) * reverse / forward
                ratio *= len(starts) / (length[b] - 1 + spans)
                out[a, b] += forward * min(1.0, ratio) / len(starts)
        out[a, a] = 1 - out[a].sum()
    return out


def _by_round(
    x: tuple[int, ...], y: tuple[int, ...], padded: list[int], rounds: int, kind: str
) -> float:
    per, context, total = -(-len(padded) // rounds), list(x), 1.0
    added = helps(x, [i for i in padded if i >= 0], kind)
    for first in range(0, len(padded), per):
        hidden = [i for i in padded[first:] if i >= 0]
        now = [i for i in padded[first : first + per] if i >= 0]
        total *= math.prod(q_numpy(tuple(context), hidden, i, added[i])[y[i]] for i in now)
        for i in now:
            context[i] = y[i]
    return total


def kernel(made: type[DenoiserDrafts] = DenoiserDrafts, **options: Any) -> EnsembleKernel:
    embedding = TokenEmbedding(torch.from_numpy(TABLE))
    given = {"positions": Spans(2), "levels": (1.0,), "rounds": 1, "end_id": END} | options
    logits = looking if "schedule" in given else proposal
    tries, form = given.pop("tries", 1), given.pop("form", "metropolis")
    drafts = made(logits, embedding, given.pop("schedule", Blank()), **given)
    return EnsembleKernel(Table(), drafts, tries, form)


HELP = {
    "": {},
    # At level 0 the critic sees the denoiser's mean without noise, so that the tilt can be computed
    # by hand.
    "tilt": {"tilt": Tilt(critic, KAPPA, 0.0)},
}


@pytest.mark.parametrize(
    ("spans", "rounds", "kind"),
    [
        (1, 1, ""),
        (2, 1, ""),
        (2, 2, ""),
        (3, 3, ""),
        (3, 2, ""),
        (2, 1, "tilt"),
        (3, 2, "tilt"),
    ],
)
def test_transition_matrix_entry_by_entry(spans: int, rounds: int, kind: str) -> None:
    """8,192 steps from each of 15 states; 7 standard errors an entry, false-alarm rate of all
    225 entries below 1e-9.
    """
    want, n = matrix(spans, rounds, kind), 8192
    assert not kind or np.abs(want - matrix(spans, rounds)).max() > 0.05
    pi = np.exp(LOG_PI) / np.exp(LOG_PI).sum()
    np.testing.assert_allclose(pi @ want, pi, atol=1e-12)
    step = kernel(positions=Spans(spans), rounds=rounds, **HELP[kind])
    tokens = torch.tensor(ROWS).repeat_interleave(n, 0)
    start = step.init(tokens, lam=torch.full((len(tokens),), LAM, dtype=torch.float64))
    state, info = step.step(start, torch.Generator().manual_seed(spans * 10 + rounds))
    code = codes(state.tokens)
    got = torch.zeros(len(ROWS), len(ROWS), dtype=torch.float64)
    got.index_put_(
        (torch.arange(len(ROWS)).repeat_interleave(n), code),
        torch.ones(len(code), dtype=torch.float64),
        True,
    )
    error = np.sqrt(want * (1 - want) / n) + 1e-4
    assert (np.abs(got.numpy() / n - want) < 7 * error).all()
    torch.testing.assert_close(state.log_prob, Table().log_prob(state.tokens))
    assert bool((state.tokens != tokens).any(1)[~info.accepted].logical_not().all())


def exact_rows(n: int, seed: int) -> Tensor:
    pi = np.exp(LOG_PI) / np.exp(LOG_PI).sum()
    return torch.tensor(ROWS)[
        torch.from_numpy(np.random.default_rng(seed).choice(len(ROWS), n, p=pi))
    ]


def asymmetry(before: Tensor, after: Tensor) -> tuple[float, int]:
    """χ² of the hypothesis that (x, x') and (x', x) are equally frequent, and its degrees of
    freedom (Bowker's test).
    """
    code = torch.stack([codes(before), codes(after)])
    pairs = torch.zeros(len(ROWS), len(ROWS), dtype=torch.float64)
    pairs.index_put_((code[0], code[1]), torch.ones(code.shape[1], dtype=torch.float64), True)
    total = pairs + pairs.T
    upper = (total >= 10) & torch.ones_like(total).triu(1).bool()
    return float(((pairs - pairs.T) ** 2 / total.clamp_min(1))[upper].sum()), int(upper.sum())


def chi2_limit(df: int, z: float = 3.09) -> float:
    """The 99.9 % quantile of χ² (Wilson and Hilferty)."""
    return df * (1 - 2 / (9 * df) + z * (2 / (9 * df)) ** 0.5) ** 3


@pytest.mark.parametrize(
    ("positions", "rounds", "levels", "help"),
    [
        (Spans(2), 1, (0.6,), {}),
        (Spans(3, shuffle=True), 3, (0.3, 0.8), {}),
        (RandomTokens(2), 2, (0.6,), {}),
        (RandomTokens(), 1, (0.5,), {}),
        (Spans(2), 2, (0.6,), {"tilt": Tilt(critic, 3.0)}),
        (
            Spans(3, shuffle=True),
            2,
            (0.7,),
            {"tilt": Tilt(critic, 3.0, 0.4), "tries": 3},
        ),
        (Spans(2), 2, (0.3, 0.8), {"tries": 3, "form": "gibbs"}),
    ],
)
def test_detailed_balance_with_noise(
    positions: Spans | RandomTokens, rounds: int, levels: tuple[float, ...], help: dict[str, object]
) -> None:
    """60,000 exact draws and one step: (x, x') as frequent as (x', x), false-alarm rate 1e-3 for
    each case.
    """
    step = kernel(
        positions=positions, rounds=rounds, levels=levels, schedule=make_schedule("cosine"), **help
    )
    before = exact_rows(60_000, 1)
    lam = torch.full((len(before),), LAM, dtype=torch.float64)
    after, info = step.step(step.init(before, lam=lam), torch.Generator().manual_seed(2))
    moved = float((after.tokens != before).any(1).float().mean())
    assert moved > 0.05
    assert bool(info.accepted.any())
    chi2, df = asymmetry(before, after.tokens)
    assert df > 8
    assert chi2 < chi2_limit(df)


def test_a_wrong_ratio_shows() -> None:
    """The test above has the power to see the noise left out of the ratio."""

    class Wrong(DenoiserDrafts):
        def _reveal(self, state: State, move, choose):  # type: ignore[no-untyped-def]
            new, log_q = super()._reveal(state, move, choose)
            return new, log_q * 0

    step = kernel(Wrong, levels=(0.5,), schedule=make_schedule("cosine"))
    before = exact_rows(60_000, 1)
    after, _ = step.step(step.init(before), torch.Generator().manual_seed(2))
    chi2, df = asymmetry(before, after.tokens)
    assert chi2 > 2 * chi2_limit(df)


def test_a_wrong_reverse_move_shows() -> None:
    """The same for a tilt that both directions share though it depends on where the move began."""

    class Wrong(DenoiserDrafts):
        def _push(self, state: State, choice, z: Tensor, t: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            return super()._push(
                state, choice, self.embedding(state.tokens.gather(1, choice.place)), t
            )

    step = kernel(Wrong, rounds=2, tilt=Tilt(critic, 1.5, 0.0))
    before = exact_rows(60_000, 1)
    lam = torch.full((len(before),), LAM, dtype=torch.float64)
    after, _ = step.step(step.init(before, lam=lam), torch.Generator().manual_seed(2))
    chi2, df = asymmetry(before, after.tokens)
    assert chi2 > 2 * chi2_limit(df)


def test_the_tilt_follows_each_chains_lambda() -> None:
    """A critic that likes token 1: the chain at λ = 20 proposes little else, the chain at λ = 0
    what it did without.
    """

    def likes(z: Tensor, t: Tensor) -> Tensor:
        return (z * torch.from_numpy(E[1])).sum((1, 2))

    tokens, n = torch.tensor([[0, 0, 0]]).repeat(8000, 1), 4000
    lam = torch.tensor([0.0, 20.0], dtype=torch.float64).repeat_interleave(n)
    step = kernel(tilt=Tilt(likes, 1.0, 0.0), positions=RandomTokens(1), end_id=None)
    step.target = Flat()
    plain = kernel(positions=RandomTokens(1), end_id=None)
    plain.target = Flat()
    step.proposal.proposal = plain.proposal.proposal = lambda z, t: torch.zeros(*t.shape, V)  # type: ignore[attr-defined]
    state, _ = step.step(step.init(tokens, lam=lam), torch.Generator().manual_seed(0))
    same, _ = plain.step(plain.init(tokens), torch.Generator().manual_seed(0))
    share = [
        float((x.tokens[half] == 1).any(1).double().mean())
        for x in (state, same)
        for half in (slice(n), slice(n, None))
    ]
    # π is flat and the way back all but impossible: what the tilt proposes is rejected, where each
    # token had one third. 7 standard errors: false-alarm rate 1e-11.
    assert np.abs(np.array(share) - [1 / 3, 0, 1 / 3, 1 / 3]).max() < 7 * (2 / 9 / n) ** 0.5
    assert share[1] < 0.01


class Flat:
    def log_prob(self, tokens: Tensor) -> Tensor:
        return torch.zeros(len(tokens), dtype=torch.float64)


def test_prompts_stay_and_lengths_change() -> None:
    rows = torch.tensor([row for row in ROWS if row[0] == 1]).repeat(200, 1)
    mask = torch.tensor([True, False, False]).expand_as(rows)
    step = kernel(levels=(0.9,), schedule=make_schedule("cosine"), rounds=2)
    state = step.init(rows, mask)
    for seed in range(5):
        state, _ = step.step(state, torch.Generator().manual_seed(seed))
    assert bool((state.tokens[:, 0] == 1).all())
    assert float(((state.tokens == END) != (rows == END)).any(1).float().mean()) > 0.2


def test_nan_and_impossible_texts_are_rejected() -> None:
    class Broken(Table):
        def log_prob(self, tokens: Tensor) -> Tensor:
            out = super().log_prob(tokens)
            out[tokens[:, 0] == 0] = torch.nan
            out[tokens[:, 0] == END] = -torch.inf
            return out

    step = kernel(levels=(1.0,), positions=RandomTokens(), rounds=3)
    step.target = Broken()
    tokens = torch.tensor([[1, 1, 1]]).repeat(500, 1)
    state = step.init(tokens)
    for seed in range(3):
        state, info = step.step(state, torch.Generator().manual_seed(seed))
        assert not info.log_ratio.isnan().any()
    assert set(state.tokens[:, 0].tolist()) == {1}
    assert bool((state.tokens != tokens).any())


def test_one_call_of_the_target_a_step() -> None:
    class Counting(Table):
        n = 0

        def log_prob(self, tokens: Tensor) -> Tensor:
            self.n += 1
            return super().log_prob(tokens)

    step, counting = kernel(rounds=2), Counting()
    step.target = counting
    state = step.init(torch.tensor(ROWS))
    for seed in range(4):
        state, _ = step.step(state, torch.Generator().manual_seed(seed))
    assert counting.n == 5


def test_options_are_checked() -> None:
    for wrong in ({"rounds": 0}, {"levels": ()}, {"levels": (0.0,)}, {"levels": (1.5,)}):
        with pytest.raises(ValueError, match="rounds must be"):
            kernel(**wrong)
    for option, wrong in (("tries", 0), ("form", "barker")):
        with pytest.raises(ValueError, match=rf"^{option}: {wrong} given, allowed: "):
            kernel(**{option: wrong})


def test_denoiser_in_chunks(embedding: TokenEmbedding, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = DenoiserNetwork(embedding, make_schedule("cosine"), NetworkSize(16, 1, 2, 6)).eval()
    z, t, index = torch.randn(7, 6, 16), torch.rand(7, 6), torch.arange(14).reshape(7, 2) % 6
    want = DenoiserProposal(network).at(z, t, index)
    monkeypatch.setattr("dia_lightning.samplers.networks.rows_at_once", lambda rows: 2)
    torch.testing.assert_close(DenoiserProposal(network).at(z, t, index), want)
