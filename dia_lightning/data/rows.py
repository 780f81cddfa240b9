"""Prompts as rows of tokens, with what is given and what is free."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from dia_lightning.errors import UserError, renamed
from dia_lightning.files import is_text
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.types import BLANK, has_blank

# What was meant as a blank, and would otherwise be text.
_LIKE = re.compile(r"\[\s*blanks?\b[^\]]*\]?", re.IGNORECASE)

# No token has more. Cutting a word of millions into tokens takes minutes.
_LETTERS = 1000


def prompt_rows(
    lm: BaseLM, prompts: list[str], max_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, max_length) of each prompt, and its mask (B, max_length), True at what is given.

    A prompt is the beginning of a text. One with blanks, `[blank:N]` for N free tokens and
    `[blank]` for one or more, is the whole of it: its end token is given too, unless `[blank]` is
    the last of it: there p_θ ends the text, at once too, as after any prompt. The rows have one
    position for each `[blank]` (see `elastic_blanks`).

    Raises:
        UserError: if a prompt leaves no position free, or a blank is malformed, longer than a text
            may be, or next to another whose length is not given.
    """
    for prompt in prompts:
        if len(prompt) > _LETTERS * max_length:
            raise UserError(
                f"prompts: {prompt[:40]!r} has {len(prompt)} letters, too many for"
                f" {max_length} tokens (data.max_length)"
            )
        if not is_text(prompt):
            raise UserError(f"prompts: {prompt[:40]!r} is no text that UTF-8 can hold")
        _check_blanks(prompt)
        for count in filter(None, BLANK.findall(prompt)):
            # Not made into a number where that takes more digits than Python allows.
            if len(count) > 9 or not 1 <= int(count) <= max_length:
                raise UserError(
                    f"prompts: {prompt[:40]!r} has a blank of {count:.20} tokens,"
                    f" allowed: at most {max_length} (data.max_length), and at least 1"
                )
    tokens = torch.full((len(prompts), max_length), lm.end_id, dtype=torch.int64)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, given, (prompt, ids) in zip(
        tokens, mask, zip(prompts, _ids(lm, prompts), strict=True), strict=True
    ):
        whole = has_blank(prompt) and not prompt.endswith("[blank]")
        # A text whose length is not given needs its end token.
        if len(ids) > max_length - (not whole or None in _counts(prompt)):
            raise UserError(
                f"prompts: {prompt[:40]!r} has {len(ids)} tokens, allowed: at"
                f" most {max_length - 1} (data.max_length is {max_length})"
            )
        values = torch.tensor(ids, dtype=torch.int64)
        row[: len(ids)] = torch.where(values < 0, lm.end_id, values)
        given[: len(ids)] = values >= 0
        given[len(ids) :] = whole
    return tokens, mask


def _counts(prompt: str) -> list[int | None]:
    """Of each blank its number of tokens, None for any."""
    return [int(count) if count else None for count in BLANK.split(prompt)[1::2]]


def _check_blanks(prompt: str) -> None:
    for found in _LIKE.findall(prompt):
        if BLANK.fullmatch(found) is None:
            raise UserError(
                f"prompts: {found:.40} given in {prompt[:40]!r}, allowed: [blank] for any number of"
                " tokens, [blank:3] for three"
            )
    parts = BLANK.split(prompt)
    for i in range(2, len(parts) - 2, 2):
        if not parts[i].strip() and None in (parts[i - 1], parts[i + 1]):
            raise UserError(
                f"prompts: two blanks side by side given in {prompt[:40]!r}, allowed: one, or words"
                " between them"
            )


def elastic_blanks(prompts: Sequence[str]) -> torch.Tensor | None:
    """(B, S) bool, which of the blanks of each prompt have any length (`Batch.elastic`); None where
    none has.
    """
    rows = []
    for prompt in prompts:
        counts = BLANK.split(prompt)[1::2]
        runs, parts = [], BLANK.split(prompt)[::2]
        for i, count in enumerate(counts):
            # Blanks of given lengths side by side are one run.
            if not i or parts[i].removesuffix(" "):
                runs.append(count is None)
        rows.append(runs)
    if not any(map(any, rows)):
        return None
    wide = max(map(len, rows))
    return torch.tensor([runs + [True] * (wide - len(runs)) for runs in rows])


def _ids(lm: BaseLM, prompts: list[str]) -> list[list[int]]:
    """The tokens of each prompt, −1 for one that is free."""
    pieces = [BLANK.split(prompt) for prompt in prompts]
    # The space before a blank belongs to the word that fills it, as most tokenizers have it.
    texts = [
        [
            part.removesuffix(" ") if i < len(parts) // 2 else part
            for i, part in enumerate(parts[::2])
        ]
        for parts in pieces
    ]
    with renamed(texts="prompts"):
        first = iter(lm.token_ids([parts[0] for parts in texts]))
        later = iter(lm.continued_ids([part for parts in texts for part in parts[1:]]))
    rows = []
    for parts in pieces:
        row = next(first)
        for count in parts[1::2]:
            row += [-1] * int(count or 1) + next(later)
        rows.append(row)
    return rows
