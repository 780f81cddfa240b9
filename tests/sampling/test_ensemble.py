"""The ensemble kernel against its transition matrix, entry by entry: every proposal, rule for the
cut and form with one to three drafts; and how often it chooses what.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dia_lightning.errors import UserError
from dia_lightning.sampling import drafts as drafts_module
from dia_lightning.sampling.drafts import SuffixDrafts, WindowDrafts
from dia_lightning.sampling.ensemble import Drafts, EnsembleKernel, choose
from dia_lightning.sampling.positions import Choice, Spans
from dia_lightning.sampling.state import Info, State
from dia_lightning.target import TargetDensity, Terms
from dia_lightning.testing import TableLM, TableReward
from dia_lightning.types import Batch
from tests.oracles.ensemble import Draft, Keep, Listed, Problem, Text, listed, matrix
from tests.sampling import test_denoise_accept as denoising

CUTS, FORMS = ("uniform", "entropy", "jump"), ("metropolis", "gibbs")


def make(n_letters: int, length: int) -> TableLM:
    rng = np.random.default_rng(11)
    every = [
        prefix
        for n in range(length)
        for prefix in itertools.product(range(n_letters + 1), repeat=n)
    ]
    return TableLM({prefix: rng.dirichlet(np.ones(n_letters + 1)) for prefix in every})


class Case:
    """A language model, a reward and the texts of one kind.

    kind: `free`, all texts; `prompt`, those that begin with b; `word`, those with a b fixed in the
    middle, at whatever place.
    """

    def __init__(
        self, length: int, kind: str = "free", alpha: float = 1.0, letters: int = 2
    ) -> None:
        self.lm, self.kind, self.alpha, end = make(letters, length), kind, alpha, letters
        rows = [tuple(row) for row in self.lm.rows.tolist()]
        rewards = np.random.default_rng(3).normal(size=len(rows)) * 1.3
        self.reward = TableReward(self.lm, rewards)
        fixed = {"free": [()], "prompt": [(0,)], "word": [(i,) for i in range(1, length)]}[kind]
        texts = [
            Text(row, tuple(i in places for i in range(length)))
            for places in fixed
            for row in rows
            if all(row[i] == 1 and end not in row[:i] for i in places)
        ]
        values = dict(zip(rows, np.float32(rewards).astype(float), strict=True))
        after = {prefix: _probabilities(self.lm, prefix) for prefix in _prefixes(letters, length)}
        self.problem = Problem(after, texts, values, 0.9, alpha)

    def target(self, tokens: Tensor, mask: Tensor) -> TargetDensity:
        n = len(tokens)
        batch = Batch(0, list(range(n)), ["b" if m[0] else "" for m in mask.tolist()], tokens, mask)
        return TargetDensity(self.lm, self.reward, self.problem.lam, batch, self.alpha)


def _prefixes(letters: int, length: int) -> list[tuple[int, ...]]:
    return [p for n in range(length) for p in itertools.product(range(letters + 1), repeat=n)]


def _probabilities(lm: TableLM, prefix: tuple[int, ...]) -> Any:
    """The table, not what the package makes of it."""
    place = sum(v * lm.vocab_size ** (len(prefix) - 1 - i) for i, v in enumerate(prefix))
    return lm.model.rows[len(prefix)][place].exp().numpy()


class Scripted:
    """Runs a kernel whose random choices are told, one row for each of their combinations.

    log_w: (B, K), that `choose` was asked to choose by. p: (B,), with which probability it would
    have drawn just this.
    """

    def __init__(self, rows: Listed, monkeypatch: pytest.MonkeyPatch, wide: int) -> None:
        self.rows, self.tries = rows, rows.to.shape[1]
        self.wanted = torch.tensor(
            [
                [*content, *[-1] * (wide + 1 - len(content))]
                for drawn in rows.drafts
                for _, content in drawn
            ]
        )
        self.steps, self.log_q = 0, torch.zeros(len(self.wanted), dtype=torch.float64)
        self.log_c = torch.zeros(len(rows.begin), dtype=torch.float64)
        self.lengths = iter(
            [
                torch.tensor([length for _, length in rows.keeps]),
                torch.tensor([length for drawn in rows.drafts for length, _ in drawn]),
            ]
        )
        self.log_w = torch.empty(0)
        monkeypatch.setattr("dia_lightning.sampling.ensemble.choose", self.choose)

    def place(self, weights: Tensor, generator: torch.Generator) -> Tensor:
        place = torch.tensor([place for place, _ in self.rows.keeps])
        share = weights.gather(1, place[:, None])[:, 0] / weights.sum(1)
        # Where no window fits there is nothing to draw.
        self.log_c = torch.where(weights.sum(1) > 0, share, 1.0).log()
        return place

    def draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        wanted = self.wanted[:, self.steps]
        self.steps += 1
        log_q = logits.double().log_softmax(1).gather(1, wanted.clamp_min(0)[:, None])[:, 0]
        self.log_q += torch.where(wanted >= 0, log_q, 0.0)
        return wanted.clamp_min(0)

    def choose(self, log_w: Tensor, form: str, generator: torch.Generator) -> tuple[Tensor, Info]:
        """Each of the drafts in turn, where it is a text."""
        self.log_w = log_w
        self.chosen = torch.arange(len(log_w)) % self.tries
        possible = log_w.gather(1, self.chosen[:, None])[:, 0] > -torch.inf
        return self.chosen, Info(possible, log_w.logsumexp(1))

    def found(self, p_length: float = 1.0) -> Listed:
        """What the kernel made of it."""
        p = (self.log_c + self.log_q.view(-1, self.tries).sum(1)).exp().numpy()
        return self.rows._replace(p=p * p_length, ratio=self.log_w.exp().numpy())


def run(
    case: Case, rows: Listed, proposal: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[State, Scripted]:
    told = Scripted(rows, monkeypatch, case.problem.wide)
    monkeypatch.setattr(drafts_module, "draw_place", told.place)
    monkeypatch.setattr(drafts_module, "draw_categorical", told.draw)
    if getattr(proposal, "vary", False):
        monkeypatch.setattr(WindowDrafts, "_lengths", lambda *given: next(told.lengths))
    texts = [case.problem.texts[i] for i in rows.begin]
    if case.kind == "word" and getattr(proposal, "vary", False):
        proposal.elastic = torch.ones(len(texts), 2, dtype=torch.bool)
    tokens, mask = torch.tensor([t.row for t in texts]), torch.tensor([t.given for t in texts])
    target = case.target(tokens, mask)
    kernel = EnsembleKernel(target, proposal, told.tries)
    state, info = kernel.step(kernel.init(tokens, mask), torch.Generator())
    assert not (info.undefined.any() if info.undefined is not None else True)
    _check_moved(case, rows, state, info, told)
    return state, told


def _check_moved(case: Case, rows: Listed, state: State, info: Info, told: Scripted) -> None:
    """The chains after their moves, and all that is known of them."""
    to = torch.from_numpy(rows.to).gather(1, told.chosen[:, None])[:, 0]
    assert torch.equal(info.accepted, to >= 0)
    to = torch.where(to >= 0, to, torch.from_numpy(rows.begin))
    texts = case.problem.texts
    assert torch.equal(state.tokens, torch.tensor([t.row for t in texts])[to])
    assert torch.equal(state.prompt_mask, torch.tensor([t.given for t in texts])[to])
    log_p = torch.tensor([case.problem.log_p(t) for t in texts], dtype=torch.float64)
    torch.testing.assert_close(state.log_base, log_p[to], atol=1e-5, rtol=0)
    reward = torch.tensor([case.problem.reward[t.row] for t in texts], dtype=torch.float64)
    if case.alpha != 1:
        reward = case.problem.lam * reward + (case.alpha - 1) * log_p
    torch.testing.assert_close(state.reward, reward[to], atol=1e-5, rtol=0)
    if state.read is not None:
        torch.testing.assert_close(state.read.log_p.double().sum(1), log_p[to], atol=1e-5, rtol=0)
        fresh = case.lm.read(state.tokens, state.prompt_mask, state.read.entropy is not None)
        for name in ("log_goes_on", "entropy"):
            mine, its = getattr(state.read, name), getattr(fresh, name)
            if mine is not None:
                torch.testing.assert_close(mine, its, atol=1e-5, rtol=0)


def hold(want: np.ndarray, got: np.ndarray, pi: np.ndarray) -> None:
    np.testing.assert_allclose(want.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(pi @ want, pi, atol=1e-12)
    assert (want >= 0).all()
    # log p_θ is float32 in the package.
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert np.abs(want - np.diag(np.diag(want))).sum() > 0.5  # it moves


def rule_of(case: Case, move: str, cut: str) -> tuple[Any, Callable[[int], Iterator[Keep]], float]:
    """The package's drafts, the oracle's, and the probability of a tuple of lengths for each of
    its lengths.
    """
    problem = case.problem
    if move == "suffix":
        return SuffixDrafts(case.lm, cut), lambda x: problem.suffixes(problem.texts[x], cut), 1.0  # type: ignore[arg-type]
    vary = move == "window, any length"
    proposal = WindowDrafts(case.lm, 2, cut, vary)  # type: ignore[arg-type]
    return proposal, lambda x: problem.windows(problem.texts[x], cut, 2, vary), 0.5 if vary else 1.0


@pytest.mark.parametrize("tries", [1, 2, 3])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(
    ("move", "kind", "alpha"),
    [
        ("suffix", "free", 1.0), ("suffix", "prompt", 0.5),
        ("window", "free", 1.0), ("window", "word", 2.0),
        ("window, any length", "free", 1.0), ("window, any length", "prompt", 2.0),
        ("window, any length", "word", 1.0),
    ],
)  # fmt: skip
def test_transition_matrix(
    move: str, kind: str, alpha: float, cut: str, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 31 texts that end at any place or not at all; all that a step can draw is drawn."""
    length = {"suffix": 3, "window": 4}.get(move, 4) - (tries == 3) + (kind == "prompt")
    case = Case(length, kind, alpha)
    proposal, keeps, p_length = rule_of(case, move, cut)
    n = len(case.problem.texts)
    assert 4 <= n <= 64
    rows = listed(n, keeps, tries)
    _, told = run(case, rows, proposal, monkeypatch)
    # A draft that does not fit stands for all of its contents.
    assert math.isclose(rows.p.sum(), n)
    found = told.found(p_length ** (tries + 1))
    for form in FORMS:
        hold(matrix(n, rows, form), matrix(n, found, form), case.problem.pi())


class ToldSpans(Spans):
    """Spans that begin where they are told, in front of the text or in it."""

    begins: Tensor

    def draw(self, tokens: Tensor, *given: Any) -> Choice:
        index = self.begins[:, None] + torch.arange(self.length)
        return Choice(index.clamp(0, tokens.shape[1] - 1), (index >= 0) & (index < tokens.shape[1]))


def span_keeps(x: int, span: int, rounds: int) -> Iterator[Keep]:
    """Of the texts, π and poor q of test_denoise_accept."""
    rows, wide, end = denoising.ROWS, denoising.T, denoising.END

    def n_spans(row: tuple[int, ...]) -> int:
        return (row.index(end) + 1 if end in row else wide) - 1 + span

    for begin in range(1 - span, n_spans(rows[x]) - span + 1):
        places = [i if 0 <= i < wide else -1 for i in range(begin, begin + span)]

        def q(row: tuple[int, ...], places: list[int] = places) -> float:
            return denoising._by_round(rows[x], row, places, rounds, "")

        def w(row: tuple[int, ...], begin: int = begin) -> float:
            reaches = begin < n_spans(row) + 1 - span
            weight = math.exp(denoising.LOG_PI[rows.index(row)]) / n_spans(row)
            return weight / q(row) if reaches else 0.0

        drafts = []
        for content in itertools.product(range(end + 1), repeat=sum(i >= 0 for i in places)):
            new = list(rows[x])
            for i, token in zip([i for i in places if i >= 0], content, strict=True):
                new[i] = token
            row, told = tuple(new), iter(content)
            if q(row) > 0:
                script = tuple(next(told) if i >= 0 else -1 for i in places)
                text = row in rows
                to = rows.index(row) if text and w(row) > 0 else -1
                drafts.append(Draft(q(row), w(row) if text else 0.0, to, (0, script)))
        yield Keep(1 / n_spans(rows[x]), w(rows[x]), drafts, (begin, 0))


@pytest.mark.parametrize("tries", [1, 2, 3])
@pytest.mark.parametrize(("span", "rounds"), [(1, 1), (2, 1), (2, 2), (3, 2)])
def test_transition_matrix_of_a_poor_denoiser(
    span: int, rounds: int, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """15 texts, spans that reach over either end, contents that are no text among the drafts."""
    if (span, tries) == (3, 3):
        pytest.skip("27³ drafts a span add nothing")
    n = len(denoising.ROWS)
    rows = listed(n, lambda x: span_keeps(x, span, rounds), tries)
    told = Scripted(rows, monkeypatch, denoising.T)
    per = -(-span // rounds)
    wanted = told.wanted[:, :span]

    def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
        now = wanted[:, told.steps : told.steps + per]
        told.steps += per
        log_q = logits.log_softmax(-1).gather(-1, now.clamp_min(0)[..., None])[..., 0]
        told.log_q += torch.where(now >= 0, log_q.double(), 0.0).sum(1)
        return now.clamp_min(0)

    monkeypatch.setattr("dia_lightning.sampling.denoise_accept.draw_categorical", draw)
    positions = ToldSpans(span)
    object.__setattr__(positions, "begins", torch.tensor([begin for begin, _ in rows.keeps]))
    kernel = denoising.kernel(positions=positions, rounds=rounds, tries=tries)
    tokens = torch.tensor([denoising.ROWS[x] for x in rows.begin])
    kernel.step(kernel.init(tokens), torch.Generator().manual_seed(0))
    # Where spans begin is drawn by `Spans`, which has tests of its own.
    begins = np.array([1 / len({*range(1 - span, _n_text(row))}) for row in denoising.ROWS])
    found = told.found()._replace(p=told.found().p * begins[rows.begin])
    pi = np.exp(denoising.LOG_PI) / np.exp(denoising.LOG_PI).sum()
    for form in FORMS:
        hold(matrix(n, rows, form), matrix(n, found, form), pi)


def _n_text(row: tuple[int, ...]) -> int:
    return row.index(denoising.END) + 1 if denoising.END in row else denoising.T


WRONG: dict[str, tuple[str, Any]] = {
    "c": ("log_choice", lambda weights, place: torch.zeros(len(place), dtype=torch.float64)),
    "end": ("_in_window", lambda read, window: (read.log_p.double() * window).sum(1)),
}


@pytest.mark.parametrize(
    ("left_out", "move", "cut"),
    [
        ("c", "suffix", "uniform"), ("c", "suffix", "entropy"), ("c", "suffix", "jump"),
        ("c", "window", "entropy"), ("c", "window, any length", "entropy"),
        ("end", "window", "uniform"), ("end", "window, any length", "jump"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tries", [1, 2])
def test_a_wrong_weight_shows(
    left_out: str, move: str, cut: str, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choice of the place or the factor 1 − p(end) left out: π is not left as it is.

    (Uniform windows of any length begin at as many places before a move as after it.)
    """
    case = Case(3)
    proposal, keeps, p_length = rule_of(case, move, cut)
    n, pi = len(case.problem.texts), case.problem.pi()
    rows = listed(n, keeps, tries)
    monkeypatch.setattr(drafts_module, *WRONG[left_out])
    _, told = run(case, rows, proposal, monkeypatch)
    for form in FORMS:
        got = matrix(n, told.found(p_length ** (tries + 1)), form)
        with pytest.raises(AssertionError):
            hold(matrix(n, rows, form), got, pi)
        assert np.abs(pi @ got - pi).max() > 1e-4


def test_lengths_are_drawn_uniformly() -> None:
    """6,000 windows and as many drafts, each length within 5 standard errors (4e-6 in all)."""
    proposal = WindowDrafts(make(2, 3), 3, vary=True)
    n, generator = 6000, torch.Generator().manual_seed(0)
    for _ in range(2):
        counts = proposal._lengths(n, generator, torch.device("cpu")).bincount(minlength=5)
        assert counts[[0, 4]].tolist() == [0, 0]
        assert ((counts[1:4] - n / 3).abs() < 5 * (n * 2 / 9) ** 0.5).all()
    fixed = WindowDrafts(make(2, 3), 3)._lengths(4, generator, torch.device("cpu"))
    assert fixed.tolist() == [3, 3, 3, 3]


def shares(log_w: list[float], form: str) -> np.ndarray:
    """Probabilities of staying and of each draft, by hand."""
    w = [math.exp(min(x, 30)) for x in log_w]
    if form == "gibbs":
        moves = [x / (1 + sum(w)) for x in w]
    else:
        moves = [0.0 if x == 0 else x / sum(w) * min(1.0, sum(w) / (1 + sum(w) - x)) for x in w]
    return np.array([1 - sum(moves), *moves])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "log_w",
    [
        [0.3], [-2.0], [2.0], [-math.inf], [math.inf],
        [0.5, -1.0, 0.2], [3.0, 2.0], [-4.0, -5.0, -4.5], [-math.inf, 0.4, -math.inf],
        [-math.inf] * 3, [math.inf, 0.0], [900.0, 0.0], [-900.0, 0.0],
    ],
    ids=str,
)  # fmt: skip
def test_how_often_it_chooses(log_w: list[float], form: Any) -> None:
    """40,000 choices, each share within 5 standard errors: 6e-7 a share, 5e-5 in all."""
    n = 40_000
    given = torch.tensor([log_w], dtype=torch.float64).repeat(n, 1)
    chosen, info = choose(given, form, torch.Generator().manual_seed(0))
    place = torch.where(info.accepted, chosen + 1, 0)
    got = place.bincount(minlength=1 + len(log_w)).numpy() / n
    want = shares(log_w, form)
    assert (np.abs(got - want) <= 5 * np.sqrt(want * (1 - want) / n) + 1e-12).all()
    assert not info.log_ratio.isnan().any()
    if len(log_w) == 1:
        assert info.log_ratio[0] == min(log_w[0], 1e300)


def test_a_number_that_is_none_is_never_chosen() -> None:
    """Of two drafts the one with a NaN in its reward, in log p_θ or in log q; told, unless the
    text is impossible.
    """
    nan, inf = math.nan, math.inf
    cases = [
        # log p_θ, reward, log q of the second draft; whether that is told.
        (0.0, nan, 0.0, True), (nan, 0.0, 0.0, True), (0.0, 0.0, nan, True),
        (-inf, nan, 0.0, False), (0.0, nan, inf, False), (-inf, 0.0, 0.0, False),
    ]  # fmt: skip
    for log_base, reward, log_q, told in cases:
        for form in FORMS:
            n = 2000
            texts = {0: (0.0, 0.0), 1: (1.0, 0.0), 2: (log_base, reward)}
            kernel: Any = EnsembleKernel(_Told(texts), _drafts(log_q), 2, form)  # type: ignore[arg-type]
            state = kernel.init(torch.zeros(n, 1, dtype=torch.int64))
            state, info = kernel.step(state, torch.Generator().manual_seed(0))
            assert set(state.tokens[:, 0].tolist()) <= {0, 1}
            assert info.accepted.double().mean() > 0.5
            assert bool(info.undefined.all()) == told
            assert bool(info.undefined.any()) == told
            assert not info.log_ratio.isnan().any()


class _Told:
    lam = 1.0

    def __init__(self, texts: dict[int, tuple[float, float]]) -> None:
        self.texts = texts

    def terms(self, tokens: Tensor) -> Terms:
        found = [self.texts[i] for i in tokens[:, 0].tolist()]
        return Terms(*torch.tensor(found, dtype=torch.float64).T)


def _drafts(log_q: float) -> Any:
    def draw(state: State, n: int, generator: torch.Generator) -> Drafts:
        rows = len(state.tokens)
        tokens = torch.tensor([[[1], [2]]]).repeat(rows, 1, 1)
        return Drafts(
            tokens, torch.tensor([[0.0, 0.0, log_q]], dtype=torch.float64).repeat(rows, 1)
        )

    return draw


def test_options_are_checked() -> None:
    for option, value in (("tries", 0), ("tries", -1), ("form", "barker")):
        with pytest.raises(UserError, match=rf"^{option}: {value} given, allowed: "):
            EnsembleKernel(_Told({}), _drafts(0.0), **{option: value})  # type: ignore[arg-type]
