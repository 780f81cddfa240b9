"""What the right side is worth: nats a token from the left alone, from both sides by enumeration,
and from a proposal, at the same positions of p_θ's own texts.

    python benchmarks/right_side.py                 (make right-side)
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.lm.decoding import allocated_cache, select_rows
from dia_lightning.types import text_mask

RIGHT = (1, 2, 4, 8, 16)
_NEGLIGIBLE = 15.0  # nats below the likeliest candidate: e^-15 of its probability
_ROWS = 64  # candidates read at once


class Places(NamedTuple):
    """Texts (N, T), what is given of them (N, T) bool, and one position in each (N,)."""

    tokens: Tensor
    prompt_mask: Tensor
    place: Tensor


def draw_places(
    lm: BaseLM, tokens: Tensor, prompt_mask: Tensor, generator: torch.Generator, length: int = 1
) -> Places:
    """In each text one window of `length` uniformly among those with a token to their right, the
    end token say; texts that have none are left out.
    """
    n_text = text_mask(tokens, prompt_mask, lm.end_id).sum(1)
    low = prompt_mask.sum(1)
    count = n_text - low - length
    u = torch.rand(len(tokens), generator=generator, dtype=torch.float64)
    place = low + (u * count).long()
    keep = count > 0
    return Places(tokens[keep], prompt_mask[keep], place[keep])


@torch.no_grad()
def both_sides(
    lm: BaseLM, text: Tensor, place: int, n_top: int = 256, right: tuple[int, ...] = RIGHT
) -> Tensor:
    """Nats of the token at `place` of `text` (T,) given the left and n tokens of the right, for
    each n in `right` as far as the text goes: (1 + len(right),) float64, from the left alone first.

    Bayes' rule over p_θ's `n_top` likeliest tokens and the true one: p_θ(v | left) p_θ(right |
    left, v). Candidates e^-15 times as likely as the best are read no further.
    """
    cache = allocated_cache(lm.model.config, len(text) + 1)
    start = text.new_tensor([lm.bos_id])
    left = _log_probs(lm, torch.cat([start, text[:place]])[None], cache)[0, -1]
    true = int(text[place])
    top = left.topk(min(n_top, len(left))).indices
    candidates = torch.cat([top[top != true], top.new_tensor([true])])
    n_right = int(text_mask(text[None], torch.zeros_like(text[None]).bool(), lm.end_id).sum())
    n_right -= place + 1
    log_w, costs = left[candidates], [-left[true]]
    words = text[place + 1 : place + 1 + n_right]
    select_rows(cache, torch.zeros_like(candidates))
    read, inputs = 0, candidates[:, None]
    for n in right:
        n = min(n, n_right)
        if n > read:
            ahead = words[read : n - 1].expand(len(inputs), -1)
            log_p = _log_probs(lm, torch.cat([inputs, ahead], 1), cache)
            aim = words[read:n].expand(len(inputs), -1)[..., None]
            # A text may end here if nothing but its end follows, and then p_θ is asked no more.
            after_end = 0.0 if words[0] == lm.end_id else -torch.inf
            log_right = log_p.gather(-1, aim)[..., 0].sum(1)
            log_w = log_w + torch.where(candidates == lm.end_id, after_end, log_right)
            read, inputs = n, words[n - 1].expand(len(candidates), 1)
        costs.append(log_w.logsumexp(0) - log_w[-1])
        keep = log_w > log_w.max() - _NEGLIGIBLE
        keep[-1] = True
        if not bool(keep.all()):
            kept = keep.nonzero()[:, 0]
            select_rows(cache, kept)
            log_w, candidates, inputs = log_w[kept], candidates[kept], inputs[kept]
    return torch.stack(costs)


def _log_probs(lm: BaseLM, inputs: Tensor, cache: DynamicCache) -> Tensor:
    """(B, T, V) float64 log p_θ of what follows each of `inputs` (B, T), which the cache has read
    then.
    """
    if lm.has_body:
        out = lm.model.base_model(inputs, past_key_values=cache, use_cache=True)
        logits = lm.model.get_output_embeddings()(out.last_hidden_state)
    else:
        logits = lm.model(inputs, past_key_values=cache, use_cache=True).logits
    return lm.with_one_end(logits).double().log_softmax(-1)
