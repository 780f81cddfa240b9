"""What a base model must obey, tried on a few rows when it is loaded: causal, and written as it
is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dia_lightning.errors import UserError

_ROWS, _LENGTH = 4, 8
# Largest difference of logits that counts as none, as a share of the largest logit.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def check_table(tokenizer: Any, rows: int, name: str) -> None:
    """Refuse a tokenizer whose tokens do not fit an embedding table of `rows` rows.

    Special tokens that nothing but their own name in a prompt can call for may lie beyond (Gemma 3
    has one).

    Raises:
        UserError: naming the first token beyond the table.
    """
    numbers: dict[str, int] = tokenizer.get_vocab()
    added = getattr(tokenizer, "added_tokens_decoder", {})
    needed = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    spare = {i for i, token in added.items() if token.special} - needed
    beyond = sorted((i, token) for token, i in numbers.items() if i >= rows and i not in spare)
    if beyond:
        raise UserError(
            f"base_lm: the tokenizer of {name!r} has tokens up to number {beyond[-1][0]} (first"
            f" too many: {beyond[0][1]!r}), the model's table {rows} rows (0 to {rows - 1}); resize"
            " the table with resize_token_embeddings, or use the tokenizer that belongs to the"
            " model"
        )


def check_reading(lm: Any) -> None:
    """Read a few rows with the `BaseLM`, twice, and once more with other last tokens.

    Raises:
        UserError: if the model fails, gives numbers that are not finite, answers differently the
            second time, or lets a later token change what an earlier position predicts.
    """
    rows = _probe(lm)
    other = rows.clone()
    other[:, -1] = (other[:, -1] + 1) % lm.vocab_size
    try:
        first, again, changed = (lm.probe_logits(x) for x in (rows, rows, other))
    except Exception as error:
        raise UserError(
            f"base_lm: {lm.name} cannot be read as a language model ({_reason(error)})"
        ) from error
    if not first.isfinite().all():
        raise UserError(
            f"base_lm: {lm.name} gives logits that are NaN or infinite; its weights are damaged"
        )
    if not same(first, again):
        raise UserError(
            f"base_lm: {lm.name} given, allowed: a fixed p_θ; it reads the same tokens differently"
            " each time"
        )
    if not same(first[:, :-1], changed[:, :-1], 0.1):
        raise UserError(
            f"base_lm: {lm.name} is no causal language model: a later token changes what "
            f"{type(lm.model).__name__} predicts before it (an encoder?)"
        )


def writes_as_it_reads(lm: Any) -> bool:
    """Whether logits from the key–value cache are those of a full pass, also of rows that were
    copied and dropped.
    """
    rows = _probe(lm)
    half = max(1, rows.shape[1] // 2)
    kept = torch.tensor([2, 0, 2], device=rows.device)
    try:
        got = _written(lm, rows, half, kept)
    except Exception:
        return False  # whatever it is that the cache cannot do, `Writing` does without
    return same(lm.probe_logits(rows)[kept, half - 1 :], got)


def reads_in_slots(lm: Any) -> bool:
    """Whether a `RowCache` answers as a full pass does, though its rows stand at different
    places.
    """
    from dia_lightning.lm.row_cache import read_in_parts

    if not (lm.has_cache and lm.has_body):
        return False
    rows = _probe(lm)
    lm.has_slots = True
    try:
        return same(lm.probe_logits(rows), read_in_parts(lm, rows))
    except Exception:
        return False  # then rows are read again
    finally:
        lm.has_slots = False


@torch.no_grad()
def _written(lm: Any, rows: Tensor, half: int, kept: Tensor) -> Tensor:
    """(3, T − half + 1, V) logits at the last positions of rows `kept`, token by token after the
    first half.
    """
    from dia_lightning.lm.decoding import allocated_cache, select_rows

    cache = allocated_cache(lm.model.config, rows.shape[1])
    if lm.has_body and half > 1:
        lm.model.base_model(rows[:, : half - 1], past_key_values=cache, use_cache=True)
    else:
        for i in range(half - 1):
            lm.model(rows[:, i : i + 1], past_key_values=cache, use_cache=True)
    steps: list[Tensor] = []
    for i in range(half - 1, rows.shape[1]):
        if i == half:
            select_rows(cache, kept)
            rows, steps = rows[kept], [steps[0][kept]]
        steps.append(
            lm.model(rows[:, i : i + 1], past_key_values=cache, use_cache=True).logits[:, -1]
        )
    return torch.stack(steps if len(steps) > 1 else [steps[0][kept]], 1)


def _probe(lm: Any) -> Tensor:
    """(4, T) int64: the start token and then any others but the end, the padding token among
    them.
    """
    length = min(_LENGTH, lm.max_length)
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(0, max(1, lm.vocab_size - 1), (_ROWS, max(1, length - 1)), generator=draw)
    pad = getattr(lm.model.config.get_text_config(), "pad_token_id", None)
    if isinstance(pad, int) and 0 <= pad < lm.vocab_size and rows.shape[1] > 2:
        rows[0, 1] = pad
    rows += rows >= lm.end_id if lm.vocab_size > 1 else 0
    return F.pad(rows, (1, 0), value=lm.bos_id).to(lm.device)


def same(a: Tensor, b: Tensor, share: float = 1.0) -> bool:
    """Whether logits agree to this share of what their precision, `a`'s, can tell apart."""
    return not a.numel() or bool((a - b).abs().max() <= share * _TOLERANCE[a.dtype] * a.abs().max())


def _reason(error: Exception) -> str:
    lines: Sequence[str] = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"
