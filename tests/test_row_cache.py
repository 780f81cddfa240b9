"""p_θ's states of rows that stand at different places, and what it says of every token, against
full passes by transformers alone.
"""

from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from dia_lightning.lm import row_cache
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.lm.row_cache import RowCache
from dia_lightning.rewards import Keyword
from dia_lightning.sampling.drafts import SuffixDrafts, WindowDrafts
from dia_lightning.sampling.ensemble import EnsembleKernel
from dia_lightning.target import TargetDensity
from dia_lightning.types import Batch, fill_after_end, text_mask

LENGTH = 12


def full_pass(lm: BaseLM, rows: Tensor) -> Tensor:
    """(N, T, V) log-probabilities of each next token, by the model itself."""
    inputs = F.pad(rows[:, :-1], (1, 0), value=lm.bos_id)
    with torch.no_grad():
        logits: Tensor = lm.model(inputs, use_cache=False).logits
    return logits.float().log_softmax(-1)


def in_pieces(lm: BaseLM, rows: Tensor, seed: int, cache: RowCache | None = None) -> Tensor:
    """The same from a cache, each row read in pieces of lengths of its own: 1 token, none, many."""
    n, wide = rows.shape
    cache = RowCache(lm, n, wide) if cache is None else cache
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randint(wide + 1, (n, 3), generator=generator).sort(1).values
    cuts = F.pad(F.pad(cuts, (1, 0)), (0, 1), value=wide)
    inputs = F.pad(rows, (1, 0), value=lm.bos_id)[:, :-1]
    out = torch.full((n, wide, lm.vocab_size), torch.nan)
    for begin, end in pairwise(cuts.T):
        longest = int((end - begin).max())
        if not longest:
            continue
        place = begin[:, None] + torch.arange(longest)
        valid = place < end[:, None]
        piece = inputs.gather(1, place.clamp_max(wide - 1))
        # What is not valid may be anything.
        piece = torch.where(valid, piece, torch.randint(lm.vocab_size, piece.shape))
        states = cache.read(piece, begin, int(end.max()), valid)
        log_p = lm.logits(states).log_softmax(-1)
        for row in range(n):
            count = int(valid[row].sum())
            out[row, begin[row] : begin[row] + count] = log_p[row, :count]
    assert not out.isnan().any()
    return out


def some_rows(lm: BaseLM, n: int = 5, length: int = LENGTH) -> Tensor:
    return torch.randint(1, lm.vocab_size, (n, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["gpt2", "llama", "no slots", "no body"])
def any_lm(
    request: pytest.FixtureRequest, lm: BaseLM, llama: BaseLM, monkeypatch: pytest.MonkeyPatch
) -> BaseLM:
    chosen = llama if request.param == "llama" else lm
    assert chosen.has_slots
    if request.param in ("no slots", "no body"):
        monkeypatch.setattr(chosen, "has_slots", False)
        monkeypatch.setattr(chosen, "has_body", request.param == "no slots")
    return chosen


@pytest.mark.parametrize("seed", range(4))
def test_pieces_are_read_as_the_whole_is(any_lm: BaseLM, seed: int) -> None:
    rows = some_rows(any_lm)
    got = in_pieces(any_lm, rows, seed)
    torch.testing.assert_close(got, full_pass(any_lm, rows), atol=1e-4, rtol=1e-4)


def test_a_few_rows_at_a_time(any_lm: BaseLM, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = some_rows(any_lm)
    monkeypatch.setattr(row_cache, "_POSITIONS_AT_ONCE", {"cpu": 1})
    got = in_pieces(any_lm, rows, 0)
    torch.testing.assert_close(got, full_pass(any_lm, rows), atol=1e-4, rtol=1e-4)


def test_rows_are_taken_put_and_chosen(any_lm: BaseLM) -> None:
    """Each row read to half, then to its end in a cache that has it from elsewhere."""
    rows, half = some_rows(any_lm), LENGTH // 2
    want = full_pass(any_lm, rows)
    inputs = F.pad(rows, (1, 0), value=any_lm.bos_id)[:, :-1]

    def begun(rows: Tensor) -> RowCache:
        cache = RowCache(any_lm, len(rows), LENGTH)
        begin = F.pad(rows, (1, 0), value=any_lm.bos_id)[:, :half]
        cache.read(begin, torch.zeros_like(rows[:, 0]), half)
        return cache

    def check(cache: RowCache, at: Tensor) -> None:
        first = torch.full_like(at, half)
        states = cache.read(inputs[at][:, half:], first, LENGTH)
        log_p = any_lm.logits(states).log_softmax(-1)
        torch.testing.assert_close(log_p, want[at, half:], atol=1e-4, rtol=1e-4)

    cache, at = begun(rows), torch.tensor([2, 0, 2, 4])
    taken = cache.take(at)
    check(taken, at)
    check(cache.take(at), at)  # a copy: what was written to the first is not in it
    other = begun(rows.flip(0))
    other.put(torch.tensor([1, 3]), cache.take(torch.tensor([1, 3])))
    check(other.take(torch.arange(5)), torch.tensor([4, 1, 2, 3, 0]))
    chosen = begun(rows).where(torch.tensor([True, False, False, True, True]), begun(rows.flip(0)))
    check(chosen, torch.tensor([0, 3, 2, 3, 4]))


def texts(lm: BaseLM, n: int = 6) -> tuple[Tensor, Tensor]:
    """Rows that end at once, in the middle and not at all, with prompts and a fixed word."""
    tokens, mask = some_rows(lm, n), torch.zeros(n, LENGTH, dtype=torch.bool)
    for row, end in enumerate([0, 3, LENGTH - 1, LENGTH]):
        tokens[row, end:] = lm.end_id
    mask[1, :2] = mask[3, :4] = True
    mask[4, [0, 5]] = True
    return fill_after_end(tokens, mask, lm.end_id), mask


@pytest.mark.parametrize("entropy", [True, False])
def test_what_is_said_of_every_token(
    any_lm: BaseLM, entropy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """log p, log(1 − p(end)) and the entropy, 0 behind the text; in chunks too."""
    tokens, mask = texts(any_lm)
    every, keep = full_pass(any_lm, tokens), text_mask(tokens, mask, any_lm.end_id)
    prompt = mask.long().cumprod(1).bool()
    want = {
        "log_p": every.gather(-1, tokens[..., None])[..., 0].masked_fill(prompt, 0.0),
        "log_goes_on": torch.log1p(-every[..., any_lm.end_id].exp()),
        "entropy": -(every.exp() * every).sum(-1),
    }
    for at_once in (1 << 22, 1):
        monkeypatch.setattr("dia_lightning.lm.base_lm._LOGITS_AT_ONCE", {"cpu": at_once})
        read = any_lm.read(tokens, mask, entropy)
        assert (read.entropy is not None) == entropy
        for name in want if entropy else ("log_p", "log_goes_on"):
            expected = torch.where(keep, want[name], 0.0)
            torch.testing.assert_close(getattr(read, name), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        any_lm.log_prob(tokens, mask), read.log_p.double().sum(1), atol=1e-4, rtol=0
    )


def test_states_that_do_not_fit_are_not_kept(lm: BaseLM, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, mask = texts(lm)
    assert lm.read(tokens, mask).cache is not None
    layers, heads, width = 2, 2, 8
    size = 2 * layers * len(tokens) * heads * (LENGTH + 1) * width * 4
    for limit, kept in ((size, True), (size - 1, False), (0, False)):
        monkeypatch.setattr(row_cache, "_KEPT_BYTES", limit)
        assert (lm.read(tokens, mask).cache is not None) == kept


def with_ends(lm: BaseLM) -> BaseLM:
    """The same model, of which three more tokens end a text."""
    other = deepcopy(lm)
    other.add_ends([7, 8, 9])
    assert len(other.end_ids) == 4
    return other


MOVES: dict[str, Any] = {
    "suffix": lambda lm: SuffixDrafts(lm),
    "suffix, entropy": lambda lm: SuffixDrafts(lm, "entropy"),
    "window": lambda lm: WindowDrafts(lm, 3),
    "window, any length": lambda lm: WindowDrafts(lm, 3, "jump", vary=True),
}


@pytest.mark.parametrize("several_ends", [False, True])
@pytest.mark.parametrize("move", MOVES)
def test_what_a_chain_knows_after_ten_moves(
    any_lm: BaseLM, move: str, several_ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it as read anew, with the states kept between moves and not; the same seed gives the
    same texts either way, and as full passes give them.
    """
    lm, found = with_ends(any_lm) if several_ends else any_lm, []
    tokens, mask = texts(any_lm, 40)
    tokens = fill_after_end(tokens.masked_fill((tokens > 6) & (tokens < 10), 5), mask, lm.end_id)
    for kept, slots in ((1 << 30, lm.has_slots), (0, lm.has_slots), (1 << 30, False)):
        monkeypatch.setattr(row_cache, "_KEPT_BYTES", kept)
        monkeypatch.setattr(lm, "has_slots", slots)
        proposal, generator = MOVES[move](lm), torch.Generator().manual_seed(0)
        kernel = EnsembleKernel(TargetDensity(lm, Keyword(["e"]), 0.5, None), proposal, 2)
        free = torch.zeros_like(mask) if "suffix" in move else mask
        kernel.target.batch = _batch(tokens, free)
        state, moved = kernel.init(tokens, free), 0
        for _ in range(10):
            state, info = kernel.step(state, generator)
            moved += int(info.accepted.sum())
        assert moved > 40
        assert state.read is not None
        assert (state.read.cache is not None) == (kept > 0 or not slots)
        fresh = lm.read(state.tokens, state.prompt_mask, state.read.entropy is not None)
        for name in ("log_p", "log_goes_on", "entropy"):
            mine, its = getattr(state.read, name), getattr(fresh, name)
            assert (mine is None) == (its is None)
            if mine is not None:
                torch.testing.assert_close(mine, its, atol=1e-4, rtol=1e-4)
        want = lm.log_prob(state.tokens, state.prompt_mask)
        torch.testing.assert_close(state.log_base, want, atol=1e-4, rtol=1e-5)
        canonical = fill_after_end(state.tokens, state.prompt_mask, lm.end_id)
        assert torch.equal(state.tokens, canonical)
        found.append(state.tokens)
    assert not torch.equal(found[0], tokens)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def _batch(tokens: Tensor, mask: Tensor) -> Batch:
    return Batch(0, list(range(len(tokens))), [""] * len(tokens), tokens, mask)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("gemma3_text", {"head_dim": 8, "sliding_window": 10}),
        ("mistral", {"sliding_window": 10}),
        ("gpt_neo", {"num_layers": 2, "attention_types": [[["global", "local"], 1]],
                     "window_size": 10}),
    ],
)  # fmt: skip
def test_a_model_that_looks_back_no_further_than_a_window(
    kind: str, more: dict[str, Any], lm: BaseLM
) -> None:
    """Wider than what is tried at the load, narrower than the texts."""
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64,
        "vocab_size": len(lm.tokenizer), "bos_token_id": lm.end_id, "eos_token_id": lm.end_id,
        "pad_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(sizes | more))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.base_model.parameters():
            weight.mul_(3)  # so that what is out of sight counts
    narrow = BaseLM(model, lm.tokenizer)
    for length in (6, 10, 11, 24):
        assert not narrow.has_slots or bool(RowCache(narrow, 1, length)._layers) == (length <= 10)
        rows = some_rows(narrow, 4, length)
        want = full_pass(narrow, rows)
        torch.testing.assert_close(in_pieces(narrow, rows, 0), want, atol=1e-3, rtol=1e-3)
