"""Windows that an infiller draws: one law for draws and for given fillings, and it sums to one."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from dia_lightning.diffusion.denoiser import DenoiserNetwork
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.schedule import make_schedule
from dia_lightning.diffusion.trunk import NetworkSize
from dia_lightning.errors import UserError
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.sampling.infill import Infill
from dia_lightning.types import fill_after_end
from tests.diffusion.test_infiller import infiller

T = 9


@pytest.fixture(params=["gpt2", "llama"])
def base(request: pytest.FixtureRequest, lm: BaseLM, llama: BaseLM) -> BaseLM:
    return lm if request.param == "gpt2" else llama


def rows(lm: BaseLM) -> tuple[Tensor, Tensor]:
    """Texts of 3, 5, 8 and 9 tokens, and where a window of three begins: past the end, across it,
    before it, and at the right edge.
    """
    tokens = torch.randint(1, lm.vocab_size, (4, T), generator=torch.Generator().manual_seed(0))
    tokens[tokens == lm.end_id] += 1
    tokens[0, 3:], tokens[1, 5:], tokens[2, 8:] = lm.end_id, lm.end_id, lm.end_id
    return tokens, torch.tensor([5, 4, 0, 6])


def filled(tokens: Tensor, first: Tensor, values: Tensor) -> Tensor:
    """(B · K, T)."""
    out = tokens.repeat_interleave(values.shape[1], 0)
    place = (first[:, None] + torch.arange(values.shape[2])).repeat_interleave(values.shape[1], 0)
    return out.scatter(1, place, values.flatten(0, 1))


def plain_log_q(infill: Infill, tokens: Tensor, first: int, values: Tensor) -> float:
    """Token by token, each from a whole pass of the network."""
    network, lm, row = infill.network, infill.lm, tokens.clone()
    length, total = len(values), 0.0
    hidden = torch.zeros(len(row), dtype=torch.bool)
    hidden[first : first + length] = True
    z = torch.where(hidden[:, None], 0.0, network.embedding(tokens))[None]
    word_follows = bool((tokens[first + length :] != lm.end_id).any())
    for i, value in enumerate(values.tolist(), first):
        states = network.hidden(z, hidden[None].float(), left=row[None])[0]
        logits = network.head(states[0, i]).double()
        if (row[:i] == lm.end_id).any():
            logits[torch.arange(len(logits)) != lm.end_id] = -torch.inf
        elif word_follows:
            logits[lm.end_id] = -torch.inf
        total += float(logits.log_softmax(-1)[value])
        row[i] = value
    return total


def test_draws_have_the_log_q_of_given_fillings(base: BaseLM) -> None:
    """Of ragged windows in one batch; each also by itself and in one plain pass for each token."""
    infill, (tokens, first) = Infill(base, infiller(base, moved=True)), rows(base)
    values, log_q = infill.draw(tokens, first, 3, 5, torch.Generator().manual_seed(1))
    assert values.shape == (4, 5, 3)
    again = infill.log_prob(tokens, first, 3, values)
    torch.testing.assert_close(log_q, again, atol=1e-4, rtol=1e-4)
    for row in range(4):
        one = slice(row, row + 1)
        alone = infill.log_prob(tokens[one], first[one], 3, values[one])
        torch.testing.assert_close(alone, again[one], atol=1e-4, rtol=1e-4)
        for draft in range(5):
            want = plain_log_q(infill, tokens[row], int(first[row]), values[row, draft])
            assert abs(want - float(log_q[row, draft])) < 1e-4
    assert bool((log_q[0] == 0).all())  # past the end there are ends


def test_drafts_are_texts(base: BaseLM) -> None:
    infill, (tokens, first) = Infill(base, infiller(base, moved=True)), rows(base)
    values, log_q = infill.draw(tokens, first, 3, 300, torch.Generator().manual_seed(1))
    texts = filled(tokens, first, values)
    assert texts.equal(fill_after_end(texts, torch.zeros_like(texts).bool(), base.end_id))
    ends = (values == base.end_id).any(-1)
    assert bool(ends[0].all())
    assert not bool(ends[2].any())
    assert bool(log_q.isfinite().all())
    ended = infill.log_prob(tokens, first, 3, torch.full((4, 1, 3), base.end_id))[:, 0]
    assert ended.isfinite().tolist() == [True, True, False, True]


def test_a_fixed_end_token_is_a_word(base: BaseLM) -> None:
    infill, (tokens, first) = Infill(base, infiller(base, moved=True)), rows(base)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[1, 8] = mask[0, 3] = True
    values, _ = infill.draw(tokens, first, 3, 300, torch.Generator().manual_seed(1), mask)
    assert not bool((values[1] == base.end_id).any())
    log_q = infill.log_prob(tokens, first, 3, torch.full((4, 1, 3), base.end_id), mask)
    assert log_q.isneginf()[:, 0].tolist() == [False, True, True, False]


@pytest.mark.parametrize("row", range(4))
def test_it_sums_to_one(base: BaseLM, row: int) -> None:
    infill, (tokens, first) = Infill(base, infiller(base, moved=True)), rows(base)
    tokens, first = tokens[row : row + 1], first[row : row + 1]
    every = torch.arange(base.vocab_size)[None, :, None]
    one = infill.log_prob(tokens, first, 1, every)
    assert abs(float(one.exp().sum()) - 1) < 1e-6
    both = torch.cat([torch.full_like(every, 7), every], -1)
    pair = infill.log_prob(tokens, first, 2, both)
    # Of a window of two the first token's law: that of the window of one knows more.
    first_of_two = pair.exp().sum()
    drawn, _ = infill.draw(tokens, first, 2, 20_000, torch.Generator().manual_seed(2))
    share = (drawn[0, :, 0] == 7).double().mean()
    error = (first_of_two * (1 - first_of_two) / 20_000).sqrt().clamp_min(1e-9)
    assert abs(share - first_of_two) < 5 * error


def test_draws_follow_the_law(base: BaseLM) -> None:
    """Five standard errors a token: a false alarm in 10,000 runs."""
    infill, (tokens, first) = Infill(base, infiller(base, moved=True)), rows(base)
    n, every = 20_000, torch.arange(base.vocab_size).expand(4, -1)[..., None]
    law = infill.log_prob(tokens, first, 1, every).exp()
    drawn, _ = infill.draw(tokens, first, 1, n, torch.Generator().manual_seed(3))
    for p, row in zip(law, drawn[..., 0], strict=True):
        share = row.bincount(minlength=base.vocab_size) / n
        error = (p * (1 - p) / n).sqrt() + 1e-4
        assert bool(((share - p).abs() < 5 * error).all())


def test_a_model_without_a_cache_draws_the_same(base: BaseLM) -> None:
    infill, (tokens, first) = Infill(base, infiller(base, moved=True)), rows(base)
    want = infill.draw(tokens, first, 3, 4, torch.Generator().manual_seed(1))
    plain = BaseLM(deepcopy(base.model), base.tokenizer)
    plain.has_cache = False
    found = Infill(plain, infill.network).draw(
        tokens, first, 3, 4, torch.Generator().manual_seed(1)
    )
    assert found[0].equal(want[0])
    torch.testing.assert_close(found[1], want[1], atol=1e-4, rtol=1e-4)


def test_untrained_it_is_p_theta(base: BaseLM) -> None:
    """Windows at the right edge: nothing is barred there but what p_θ has no probability for."""
    infill, (tokens, _) = Infill(base, infiller(base)), rows(base)
    first = torch.full((1,), 6)
    values = tokens[3:, None, 6:]
    want = base.token_log_probs(tokens[3:])[:, 6:].double().sum(1)
    found = infill.log_prob(tokens[3:], first, 3, values)[:, 0]
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)


def test_windows_outside_the_row_and_other_networks_are_refused(
    lm: BaseLM, embedding: TokenEmbedding
) -> None:
    infill, (tokens, first) = Infill(lm, infiller(lm)), rows(lm)
    for wrong, length in ((first + 2, 3), (first - 1, 3), (first, 0)):
        with pytest.raises(ValueError, match="do not lie in rows of 9"):
            infill.draw(tokens, wrong, length, 2, torch.Generator())
    other = DenoiserNetwork(embedding, make_schedule("cosine"), NetworkSize(16, 1, 2, T))
    with pytest.raises(UserError, match="denoiser: trunk 'bidirectional' given, allowed: 'infill"):
        Infill(lm, other)
    capped = BaseLM(deepcopy(lm.model), lm.tokenizer)
    capped.has_body = False
    with pytest.raises(UserError, match=r"^base_lm: .* linear head of its last states"):
        Infill(capped, infiller(lm))
