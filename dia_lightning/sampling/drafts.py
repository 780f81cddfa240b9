"""Drafts by p_θ itself: of the rest of a text, or of a window of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dia_lightning.lm.base_lm import BaseLM, told
from dia_lightning.lm.row_cache import RowCache, TokenTerms
from dia_lightning.numerics import draw_categorical
from dia_lightning.sampling.blanks import is_rigid
from dia_lightning.sampling.cuts import Cut, draw_place, log_choice, worth
from dia_lightning.sampling.ensemble import Drafts
from dia_lightning.sampling.state import State
from dia_lightning.types import leading, must_go_on, text_mask


class Known(NamedTuple):
    """Rows (N, T) that are being drafted, and what p_θ says of them so far."""

    tokens: Tensor
    log_p: Tensor
    log_goes_on: Tensor
    entropy: Tensor | None


class SuffixDrafts:
    """Keeps a random beginning of the text and draws the rest from p_θ (QUEST, Faria et al.,
    arXiv:2406.00049, eq. 6).

    p_θ cancels in the weights: exp(λ r_j) c(i | x_j) is left.

    Args:
        lm: p_θ. cut: how the place of the cut is drawn.
    """

    def __init__(self, lm: BaseLM, cut: Cut = "uniform") -> None:
        self.lm, self.cut = lm, cut

    def __call__(self, state: State, n: int, generator: torch.Generator) -> Drafts:
        lm, tokens, mask = self.lm, state.tokens, state.prompt_mask
        read = as_read(lm, state, self.cut != "uniform")
        weights = worth(self.cut, read, self._allowed(tokens, mask))
        first = draw_place(weights, generator)
        rows = torch.arange(len(tokens), device=tokens.device).repeat_interleave(n)
        behind = torch.arange(tokens.shape[1], device=tokens.device) >= first[:, None]
        known = rows_known(tokens.masked_fill(behind, lm.end_id), read, rows)
        cache = cache_of(lm, state, read, first, rows)
        until = torch.full_like(rows, tokens.shape[1])
        known = write_on(cache, known, first[rows], until, generator)
        its = _texts(lm, known, mask[rows], cache if read.cache is not None else None)
        its_weights = worth(self.cut, its, self._allowed(known.tokens, mask[rows]))
        log_q = (its.log_p.double() * behind[rows]).sum(1) - log_choice(its_weights, first[rows])
        own = (read.log_p.double() * behind).sum(1) - log_choice(weights, first)
        log_q = _where_any(weights, own, log_q.view(-1, n))
        return Drafts(known.tokens.view(*log_q[:, 1:].shape, -1), log_q, read=its, own=read)

    def _allowed(self, tokens: Tensor, prompt_mask: Tensor) -> Tensor:
        free = text_mask(tokens, prompt_mask, self.lm.end_id) & ~prompt_mask
        return free & ~must_go_on(prompt_mask)


class WindowDrafts:
    """Redraws a window of the text from p_θ, left to right without an end, and weighs each draft by
    how p_θ goes on with the right side: p_θ(right | left, y_j) exp(λ r_j) c(i | x_j) Π_l (1 −
    p_θ(end at l)).

    What is given (prompts, fixed words) stays as it is and in its order. A window lies between two
    of those.

    Args:
        lm: p_θ. length: tokens of the window, those of the longest where they `vary`.
        cut: how the place of the window is drawn.
        vary: the window's length and that of each draft are drawn uniformly from 1 … `length`, so
            that texts grow and shrink; a window that does not fit is a step without a move.
        elastic: (B, S) the blanks whose length is not given, see `Batch.elastic`.
    """

    def __init__(
        self, lm: BaseLM, length: int, cut: Cut = "uniform", vary: bool = False,
        elastic: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.lm, self.length, self.cut, self.vary, self.elastic = lm, length, cut, vary, elastic

    def __call__(self, state: State, n: int, generator: torch.Generator) -> Drafts:
        lm, tokens, mask = self.lm, state.tokens, state.prompt_mask
        n_rows, wide, device = *tokens.shape, tokens.device
        read = as_read(lm, state, self.cut != "uniform")
        length = self._lengths(n_rows, generator, device)
        weights = worth(self.cut, read, self._allowed(tokens, mask, length))
        first = draw_place(weights, generator)
        rows = torch.arange(n_rows, device=device).repeat_interleave(n)
        new_length = self._lengths(n_rows * n, generator, device)
        rigid = is_rigid(mask, self.elastic).gather(1, first[:, None])[rows, 0]
        new_length = torch.where(rigid, length[rows], new_length)
        known, its_mask, fits = self._moved(tokens, mask, read, first, length, new_length, rows)
        cache = cache_of(lm, state, read, first, rows)
        begin, end = first[rows], (first[rows] + new_length).clamp_max(wide)
        known = write_on(cache, known, begin, end, generator, may_end=False)
        known = read_on(cache, known, its_mask, end)
        its = _texts(lm, known, its_mask, cache if read.cache is not None else None)
        allowed = self._allowed(known.tokens, its_mask, new_length)
        places = torch.arange(wide, device=device)
        window = (places >= begin[:, None]) & (places < end[:, None])
        log_q = _in_window(its, window) - log_choice(worth(self.cut, its, allowed), begin)
        own_window = (places >= first[:, None]) & (places < (first + length)[:, None])
        own = _in_window(read, own_window) - log_choice(weights, first)
        log_q = log_q.masked_fill(~fits, torch.inf).view(n_rows, n)
        return Drafts(
            known.tokens.view(n_rows, n, wide),
            _where_any(weights, own, log_q),
            its_mask.view(n_rows, n, wide) if self.vary else None,
            its,
            read,
        )

    def _lengths(self, n: int, generator: torch.Generator, device: torch.device) -> Tensor:
        if not self.vary:
            return torch.full((n,), self.length, device=device)
        return torch.randint(1, self.length + 1, (n,), generator=generator, device=device)

    def _allowed(self, tokens: Tensor, mask: Tensor, length: Tensor) -> Tensor:
        """(N, T) where a window of `length` (N,) free tokens before the end begins."""
        is_end = (tokens == self.lm.end_id) & ~mask
        free = text_mask(tokens, mask, self.lm.end_id) & ~mask & ~is_end
        before = F.pad(free.long().cumsum(1), (1, self.length))
        behind = torch.arange(tokens.shape[1], device=tokens.device) + length[:, None]
        inside = before.gather(1, behind.clamp_max(before.shape[1] - 1))
        inside = torch.where(behind <= tokens.shape[1], inside, -1)
        return inside - before[:, : tokens.shape[1]] == length[:, None]

    def _moved(
        self, tokens: Tensor, mask: Tensor, read: TokenTerms, first: Tensor, length: Tensor,
        new_length: Tensor, rows: Tensor,
    ) -> tuple[Known, Tensor, Tensor]:  # fmt: skip
        """Rows (B K, T) in which what stands right of the window has moved to the end of the new
        one; what is given in them; whether they fit.
        """
        wide = tokens.shape[1]
        places = torch.arange(wide, device=tokens.device)
        begin, old, new = (x[:, None] for x in (first[rows], length[rows], new_length))
        source = torch.where(places < begin + new, places, places - new + old)
        beyond = source >= wide
        source = source.clamp_max(wide - 1)
        moved = tokens[rows].gather(1, source).masked_fill(beyond, self.lm.end_id)
        window = (places >= begin) & (places < begin + new)
        # What is given to the end of the row, its end tokens, is so wherever that end is.
        moved_mask = mask[rows].gather(1, source) & ~window
        n_text = text_mask(tokens, mask, self.lm.end_id).sum(1)[rows, None]
        # A text that fills its row without an end is the beginning of one: it has no shorter form.
        ended = (n_text < wide) | (tokens[rows, -1:] == self.lm.end_id)
        fits = (new == old) | ended & (n_text - old + new <= wide)
        known = rows_known(moved, read, rows)
        return known, moved_mask, fits[:, 0]


def as_read(lm: BaseLM, state: State, entropy: bool) -> TokenTerms:
    """What p_θ says of the chains' texts: kept from the last move, or read now."""
    read = state.read
    if read is None or (entropy and read.entropy is None):
        with torch.autocast(state.tokens.device.type, enabled=False):
            read = lm.read(state.tokens, state.prompt_mask, entropy)
    return read


def cache_of(lm: BaseLM, state: State, read: TokenTerms, first: Tensor, rows: Tensor) -> RowCache:
    """States of p_θ before the places `first` (B,), copied to `rows` (N,) of the chains."""
    if read.cache is not None:
        return read.cache.take(rows)
    tokens, most = state.tokens, int(first.max())
    cache = RowCache(lm, *tokens.shape)
    inputs = F.pad(tokens, (1, 0), value=lm.bos_id)[:, : most + 1]
    with torch.autocast(tokens.device.type, enabled=False):
        cache.read(inputs, torch.zeros_like(first), most + 1)
    return cache.take(rows)


def rows_known(tokens: Tensor, read: TokenTerms, rows: Tensor) -> Known:
    """`tokens` (N, T), with what was read of the chains `rows` (N,) they come from."""
    entropy = None if read.entropy is None else read.entropy[rows]
    tokens = tokens if len(tokens) == len(rows) else tokens[rows]
    return Known(tokens, read.log_p[rows], read.log_goes_on[rows], entropy)


def write_on(
    cache: RowCache, known: Known, first: Tensor, until: Tensor, generator: torch.Generator,
    may_end: bool = True,
) -> Known:  # fmt: skip
    """Draw the places from `first` to before `until` (N,) of each row from p_θ; without an end
    unless it `may_end`.

    Every 8 tokens (so that a GPU is not made to wait oftener) rows that are written to their end
    are dropped.
    """
    lm, wide = cache.lm, known.tokens.shape[1]
    # What is written out of turn goes to a column of its own, which is cut off again.
    columns = [None if x is None else F.pad(x, (0, 1)) for x in known]
    steps, high = (int(x) for x in torch.stack([(until - first).max(), first.max()]))
    rows = torch.arange(len(first), device=first.device)
    inputs = F.pad(known.tokens, (1, 0), value=lm.bos_id).gather(1, first[:, None])
    place, ended, dropped = first, torch.zeros_like(rows, dtype=torch.bool), []
    end = torch.full((1,), lm.end_id, device=first.device)
    with torch.autocast(first.device.type, enabled=False):
        for step in range(steps):
            logits = lm.logits(cache.read(inputs, place, high + step + 1)[:, 0])
            allowed = logits
            if not may_end:
                allowed = logits.index_fill(1, end, -1e30)
            live = (place < until) & ~ended
            drawn = torch.where(live, draw_categorical(allowed, generator), lm.end_id)
            found = [drawn, *told(logits, drawn, lm.end_id, known.entropy is not None)]
            at = torch.where(live, place, wide)
            for column, values in zip(columns, found, strict=False):
                assert column is not None
                column[rows, at] = values
            ended = ended | (drawn == lm.end_id)
            place, inputs = place + 1, drawn[:, None]
            if step % 8 == 7:
                going = (~ended & (place < until)).nonzero()[:, 0]
                if not len(going):
                    break
                if len(going) < 0.85 * len(rows):
                    dropped.append((cache, going))
                    cache, rows, place, until = (
                        cache.take(going), rows[going], place[going], until[going],
                    )  # fmt: skip
                    ended, inputs = ended[going], inputs[going]
    for whole, going in reversed(dropped):
        whole.put(going, cache)
        cache = whole
    return Known(*(None if x is None else x[:, :wide] for x in columns))  # type: ignore[arg-type]


def read_on(cache: RowCache, known: Known, prompt_mask: Tensor, first: Tensor) -> Known:
    """Let p_θ read the rows from the places `first` (N,) to the end of their texts."""
    lm, tokens = cache.lm, known.tokens
    n_text = text_mask(tokens, prompt_mask, lm.end_id).sum(1)
    most, widest = (int(x) for x in torch.stack([(n_text - first).max(), n_text.max()]))
    if most < 1:
        return known
    steps = torch.arange(most, device=tokens.device)
    place = first[:, None] + steps
    valid = place < n_text[:, None]
    at = place.clamp_max(tokens.shape[1] - 1)
    inputs = F.pad(tokens, (1, 0), value=lm.bos_id).gather(1, at)
    with torch.autocast(tokens.device.type, enabled=False):
        states = cache.read(inputs, first, widest, valid)
        terms = lm.token_terms(states, tokens.gather(1, at), valid, known.entropy is not None)
    at = torch.where(valid, place, tokens.shape[1])

    def put(old: Tensor, new: Tensor) -> Tensor:
        return F.pad(old, (0, 1)).scatter(1, at, new)[:, :-1]

    entropy = None
    if known.entropy is not None and terms.entropy is not None:
        entropy = put(known.entropy, terms.entropy)
    log_p, log_goes_on = put(known.log_p, terms.log_p), put(known.log_goes_on, terms.log_goes_on)
    return Known(tokens, log_p, log_goes_on, entropy)


def _texts(lm: BaseLM, known: Known, prompt_mask: Tensor, cache: RowCache | None) -> TokenTerms:
    """What p_θ says of the drafts, and nothing of what lies behind their ends."""
    keep = text_mask(known.tokens, prompt_mask, lm.end_id)
    entropy = None if known.entropy is None else torch.where(keep, known.entropy, 0.0)
    log_p = torch.where(keep & ~leading(prompt_mask), known.log_p, 0.0)
    return TokenTerms(log_p, torch.where(keep, known.log_goes_on, 0.0), entropy, cache)


def _where_any(weights: Tensor, own: Tensor, log_q: Tensor) -> Tensor:
    """(B, 1 + K) the log q of the chains and of their drafts; without a place to cut there is no
    move.
    """
    none = weights.sum(1, keepdim=True) == 0
    own = own[:, None].masked_fill(none, 0.0)
    return torch.cat([own, log_q.masked_fill(none, torch.inf)], 1)


def _in_window(read: TokenTerms, window: Tensor) -> Tensor:
    """(N,) log q of what stands in `window` (N, T): p_θ without the end, token by token."""
    return ((read.log_p.double() - read.log_goes_on.double()) * window).sum(1)
