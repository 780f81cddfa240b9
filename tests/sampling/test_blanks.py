"""Blanks and given lengths: what is fixed stays, and denoise-and-accept reaches π given both
sides, on the listed table.
"""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.schedule import make_schedule
from dia_lightning.errors import UserError
from dia_lightning.guidance import Prediction
from dia_lightning.sampling.decode import draw_texts, source_rows, starting_point
from dia_lightning.sampling.denoise_accept import DenoiserDrafts
from dia_lightning.sampling.ensemble import EnsembleKernel
from dia_lightning.sampling.positions import Positions, RandomTokens, Spans
from dia_lightning.target import Terms
from dia_lightning.types import Batch, leading, must_go_on, scored_mask, text_mask
from tests.oracles.table_lm import END, LAM, LOG_P, REWARD, ROWS, T, V, pi

N = 20_000
EMBEDDING = TokenEmbedding(torch.from_numpy(np.random.default_rng(0).normal(size=(3, 8))).float())
SCHEDULE = make_schedule("cosine")
# 99.9 % quantiles of χ² by degrees of freedom.
LIMITS = {1: 10.83, 2: 13.82, 3: 16.27, 5: 20.52}


PLACES = torch.tensor([V ** (T - 1 - i) for i in range(T)])


def code(row: tuple[int, ...]) -> int:
    return sum(v * V ** (T - 1 - i) for i, v in enumerate(row))


class Target:
    """π of the table, by looking up the rows' codes."""

    lam = LAM

    def __init__(self) -> None:
        self.log_p = torch.full((V**T,), -torch.inf, dtype=torch.float64)
        self.reward = torch.zeros(V**T, dtype=torch.float64)
        for i, row in enumerate(ROWS):
            self.log_p[code(row)], self.reward[code(row)] = LOG_P[i], REWARD[i]

    def terms(self, tokens: Tensor) -> Terms:
        index = tokens @ PLACES
        return Terms(self.log_p[index], self.reward[index])


def proposal(z: Tensor, t: Tensor) -> Tensor:
    return torch.tensor([[0.3, -0.2, 0.1]]) + 0.1 * (z @ EMBEDDING.weight.T)


# Texts (T = 4) as they begin, and what of them is fixed: blanks at 0 and 2; a length of two tokens;
# a prefix and a blank.
CASES = {
    "two blanks": ((0, 1, 0, END), (False, True, False, True)),
    "length 2": ((0, 0, END, END), (False, False, True, True)),
    "prompt and blank": ((1, 0, 1, 0), (True, False, True, False)),
}


@pytest.mark.parametrize("positions", [Spans(2), RandomTokens(1)], ids=["spans", "single tokens"])
@pytest.mark.parametrize("case", CASES)
def test_the_law_of_filled_blanks(case: str, positions: Positions) -> None:
    """Exact draws of π given the fixed tokens stay such: χ² of 20,000 chains, false-alarm rate
    10⁻³ a case.
    """
    text, fixed = CASES[case]
    # The text may end only where nothing fixed follows.
    last = max(i for i in range(T) if fixed[i])
    fitting = [
        i for i, row in enumerate(ROWS)
        if all(row[k] == text[k] for k in range(T) if fixed[k])
        and all(row[k] != END for k in range(last) if not fixed[k])
    ]  # fmt: skip
    expected = pi()[fitting] / pi()[fitting].sum()
    drafts = DenoiserDrafts(proposal, EMBEDDING, SCHEDULE, positions, (0.6, 1.0), 2, END)
    kernel = EnsembleKernel(Target(), drafts)
    exact = np.random.default_rng(5).choice(fitting, N, p=expected)
    state = kernel.init(torch.tensor(ROWS)[exact], torch.tensor([fixed] * N))
    generator, accepted = torch.Generator().manual_seed(0), 0
    for _ in range(40):
        before = state.tokens
        state, _ = kernel.step(state, generator)
        accepted += int((before != state.tokens).any(1).sum())
    assert accepted > N / 2  # they do move
    number = {code(row): i for i, row in enumerate(ROWS)}
    counts = np.bincount([number[c] for c in (state.tokens @ PLACES).tolist()], minlength=len(ROWS))
    assert counts[fitting].sum() == N
    chi2 = float(((counts[fitting] - N * expected) ** 2 / (N * expected)).sum())
    assert chi2 < LIMITS[len(fitting) - 1], (case, chi2)


def test_a_solver_keeps_what_is_fixed_and_does_not_end_before_it() -> None:
    text, fixed = CASES["two blanks"]
    tokens, mask = torch.tensor([text] * 500), torch.tensor([fixed] * 500)
    batch = Batch(0, list(range(500)), [""] * 500, tokens, mask)

    def predict(z: Tensor, t: Tensor, z0_prev: Tensor | None) -> Prediction:
        logits = torch.tensor([0.0, 0.0, 3.0]).expand(
            *z.shape[:2], 3
        )  # would end almost everywhere
        return Prediction(EMBEDDING.expected(logits), EMBEDDING.expected(logits), logits)

    drawn = draw_texts(
        predict,
        batch,
        EMBEDDING,
        SCHEDULE,
        END,
        torch.Generator().manual_seed(0),
        "ancestral",
        8,
        2.0,
    )
    assert torch.equal(drawn[mask], tokens[mask])
    assert not bool((drawn[~mask] == END).any())
    assert len({tuple(row) for row in drawn.tolist()}) == 4


def test_a_start_at_the_source_is_noised_so_far_and_no_further() -> None:
    tokens = torch.tensor([[0, 1, 0, END]] * 4000)
    batch = Batch(
        0, list(range(4000)), [""] * 4000, tokens, torch.zeros_like(tokens, dtype=torch.bool)
    )
    z, times = starting_point(
        batch, EMBEDDING, SCHEDULE, 10, 0.0, torch.Generator().manual_seed(0), tokens, 0.5
    )
    level = SCHEDULE.warp(torch.tensor(0.5))
    assert times.max() == level
    assert len(times) == 6
    clean = EMBEDDING(tokens)
    # Mean and deviation of 4,000 × 32 numbers: five standard errors.
    residual = z - SCHEDULE.alpha(level) * clean
    assert abs(float(residual.mean())) < 5 * float(SCHEDULE.sigma(level)) / (4000 * 32) ** 0.5
    assert abs(float(residual.std() / SCHEDULE.sigma(level)) - 1) < 5 / (2 * 4000 * 32) ** 0.5


def test_masks_by_hand() -> None:
    tokens = torch.tensor([[END, 0, 1, 0, END, END]])
    fixed = torch.tensor([[True, False, True, False, True, True]])
    assert leading(fixed).tolist() == [[True, False, False, False, False, False]]
    assert text_mask(tokens, fixed, END).tolist() == [[True] * 5 + [False]]
    assert scored_mask(tokens, fixed, END).tolist() == [[False, True, True, True, True, False]]
    assert must_go_on(fixed).tolist() == [[False, True, False, True, False, False]]
    prefix = torch.tensor([[True, True, False, False]])
    assert not must_go_on(prefix).any()


@pytest.mark.parametrize("n_prompt", range(T))
def test_spans_of_a_prefix_prompt_are_all_that_touch_the_text(n_prompt: int) -> None:
    """Every span is as likely as every other, by listing them: 8,000 draws, each count within 5
    standard errors.
    """
    tokens = torch.tensor([[0, 1, 0, END]] * 8000)
    mask = (torch.arange(T) < n_prompt).expand(8000, -1)
    choice = Spans(2).draw(tokens, mask, END, torch.Generator().manual_seed(1))
    seen = [
        tuple(p for p, ok in zip(*row, strict=True) if ok)
        for row in zip(choice.place.tolist(), choice.valid.tolist(), strict=True)
    ]
    wanted = [tuple(i for i in (a, a + 1) if n_prompt <= i < T) for a in range(n_prompt - 1, T)]
    counts, shares = Counter(seen), Counter(wanted)
    assert set(counts) == set(shares)
    for span, share in shares.items():  # at the end of the text two spans may be one
        expected = 8000 * share / len(wanted)
        assert abs(counts[span] - expected) < 5 * expected**0.5, (span, counts)


class _Words:
    end_id = 0

    class tokenizer:
        def __new__(cls, text: str, add_special_tokens: bool) -> dict[str, list[int]]:  # type: ignore[misc]
            return {"input_ids": [len(word) for word in text.split()]}


def test_source_rows_by_hand() -> None:
    tokens = torch.tensor([[7, 0, 0, 0], [0, 0, 0, 0]])
    mask = torch.tensor([[True, False, False, False], [False] * 4])
    batch = Batch(
        0, [0, 1], ["seven", ""], tokens, mask, [{"source": "a bb"}, {"source": "a bb ccc dddd"}]
    )
    rows = source_rows(_Words(), batch)  # type: ignore[arg-type]
    assert rows.tolist() == [[7, 1, 2, 0], [1, 2, 3, 4]]
    for records, message in (
        ([{"source": "a b c d"}] * 2, "4 tokens, allowed: at most 3"),
        ([{"prompt": "x"}] * 2, "fields there: prompt"),
    ):
        with pytest.raises(UserError, match=message):
            source_rows(_Words(), Batch(0, [0, 1], ["", ""], tokens, mask, records))  # type: ignore[arg-type]


def test_behind_a_source_the_text_has_ended() -> None:
    """Whatever the batch holds there."""
    tokens = torch.tensor([[7, 5, 5, 5, 5], [5, 5, 5, 5, 5]])
    mask = torch.tensor([[True, False, False, False, False], [False] * 5])
    batch = Batch(0, [0, 1], ["seven", ""], tokens, mask, [{"source": "a"}, {"source": "a bb ccc"}])
    rows = source_rows(_Words(), batch)  # type: ignore[arg-type]
    assert rows.tolist() == [[7, 1, 0, 0, 0], [1, 2, 3, 0, 0]]
