"""The yardstick of benchmarks/right_side.py against enumeration."""

import pytest
import torch

from benchmarks import right_side
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.testing.table import TableLM, table_lm
from dia_lightning.types import text_mask
from tests.diffusion.test_infiller import infiller


@pytest.fixture(scope="module")
def listed() -> TableLM:
    return table_lm(2, 6, seed=3)


def by_listing(lm: TableLM, text: torch.Tensor, place: int, n: int) -> float:
    """−log p(x_i | x_<i, x_i+1 … x_i+n), summed over all texts of the table."""
    known = [i for i in range(min(len(text), place + 1 + n)) if i != place]
    agree = (lm.rows[:, known] == text[known]).all(1)
    p = torch.from_numpy(lm.log_p).exp()
    true = agree & (lm.rows[:, place] == text[place])
    return float((p[agree].sum() / p[true].sum()).log())


def test_both_sides_are_bayes_rule(listed: TableLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every place with something on its right, for texts that end early, late and not."""
    monkeypatch.setattr(right_side, "RIGHT", (1, 2, 4))
    for text in listed.rows[:: len(listed.rows) // 25]:
        none = torch.zeros_like(text, dtype=torch.bool)
        n_text = int(text_mask(text[None], none[None], listed.end_id).sum())
        for place in range(n_text - 1):
            found = right_side.both_sides(listed, text, none, torch.tensor(place))
            want = [
                by_listing(listed, text, place, min(n, n_text - 1 - place)) for n in (0, 1, 2, 4)
            ]
            assert found.tolist() == pytest.approx(want, abs=1e-6)


def test_few_candidates_and_the_true_one_are_enough_where_p_is_left_out(
    listed: TableLM,
) -> None:
    """With one candidate besides, Bayes' rule over these two."""
    text = listed.rows[40]
    none = torch.zeros_like(text, dtype=torch.bool)
    assert int(text_mask(text[None], none[None], listed.end_id).sum()) > 2
    found = right_side.both_sides(listed, text, none, torch.tensor(0), n_top=1)
    every = [by_listing(listed, torch.cat([x, text[1:]]), 0, 1) for x in torch.arange(3)[:, None]]
    top = int((listed.next_logits(torch.full((1, 1), listed.bos_id))).argmax())
    p = torch.tensor(every).neg().exp()
    true = int(text[0])
    want = 0.0 if top == true else float(((p[true] + p[top]) / p[true]).log())
    assert float(found[1]) == pytest.approx(want, abs=1e-6)


def test_places_have_the_window_and_a_token_on_their_right(lm: BaseLM) -> None:
    tokens = torch.full((4000, 8), lm.end_id)
    tokens[:, :6] = 5
    tokens[1000:, 3:] = lm.end_id
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, :1] = True
    places = right_side.draw_places(lm, tokens, mask, torch.Generator().manual_seed(0), 2)
    long = places.tokens[:, 4] == 5
    assert long.sum() == 1000  # of two, not counting the prompt, texts of three have one place
    assert set(places.place[long].tolist()) == {1, 2, 3, 4}
    assert set(places.place[~long].tolist()) == {1}
    alone = right_side.draw_places(lm, tokens, mask, torch.Generator().manual_seed(0), 3)
    assert len(alone.place) == 1000


def test_many_drafts_change_the_text_as_often_as_the_conditional_does(
    lm: BaseLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K → ∞ is an exact draw of the token given both sides; a poor proposal and p_θ's own."""
    monkeypatch.setattr(right_side, "DRAFTS", (1, 20_000))
    tokens = torch.randint(1, 280, (3, 6), generator=torch.Generator().manual_seed(0))
    places = right_side.Places(
        tokens, torch.zeros_like(tokens, dtype=torch.bool), torch.tensor([1, 3, 4])
    )
    exact = []
    for text, place in zip(tokens, places.place, strict=True):
        every = text.repeat(280, 1)
        every[:, place] = torch.arange(280)
        log_p = lm.log_prob(every)
        log_p[lm.end_id] = -torch.inf
        exact.append(1 - float(log_p.softmax(0)[text[place]]))
    for proposal in (right_side.untrained(lm), right_side.Infill(lm, infiller(lm, moved=True))):
        rates = right_side.change_rates(proposal, places, 1, torch.Generator().manual_seed(1))
        assert rates[:, 1].tolist() == pytest.approx(exact, abs=0.02)
        assert bool((rates[:, 0] <= 1).all())


def test_untrained_a_window_costs_what_p_theta_says(lm: BaseLM) -> None:
    tokens = torch.randint(1, 280, (3, 6), generator=torch.Generator().manual_seed(0))
    mask, place = torch.zeros_like(tokens, dtype=torch.bool), torch.tensor([1, 2, 0])
    places = right_side.Places(tokens, mask, place)
    found = right_side.window_cost(right_side.untrained(lm), places, 2)
    log_p = torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=lm.bos_id)
    logits = lm.model(log_p).logits
    logits[..., lm.end_id] = -torch.inf  # words follow
    log_p = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    want = -log_p.gather(1, place[:, None] + torch.arange(2)).mean(1)
    torch.testing.assert_close(found.float(), want, atol=1e-4, rtol=1e-4)
