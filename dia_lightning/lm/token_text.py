"""Text as a base model's tokens and back, to the character."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from operator import eq
from typing import Any

import torch
from torch import Tensor

from dia_lightning.errors import UserError
from dia_lightning.types import leading, text_mask
from dia_lightning.words import words

# A piece that goes on from another text is encoded behind one of these, the tokens of which are
# then cut off.
_BEFORE = ("\n", "a", ".", "0")


class TokenText:
    """Rows of tokens and their texts.

    Attributes:
        tokenizer: transformers' own. name: of the model, for messages. end_id: token that ends a
            text.
        vocab_size: rows of the embedding table, beyond which no token may lie.
    """

    tokenizer: Any
    name: str
    end_id: int
    vocab_size: int

    def encode(self, texts: Sequence[str], length: int) -> Tensor:
        """(B, length) int64: each text's first `length` tokens, then end tokens."""
        rows = torch.full((len(texts), length), self.end_id, dtype=torch.int64)
        for row, ids in zip(rows, self.token_ids(texts, length), strict=True):
            row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
        return rows

    def token_ids(self, texts: Sequence[str], length: int | None = None) -> list[list[int]]:
        """The tokens of each text, of the first `length` at most, no special ones added.

        Raises:
            UserError: naming the first text with a token beyond the embedding table.
        """
        cut = {} if length is None else {"truncation": True, "max_length": length}
        given = ["", *map(readable, texts)]  # never none
        found: list[list[int]] = self.tokenizer(given, add_special_tokens=False, **cut)[
            "input_ids"
        ][1:]
        for ids, text in zip(found, texts, strict=True):
            if ids and max(ids) >= self.vocab_size:
                token = self.tokenizer.convert_ids_to_tokens(max(ids))
                raise UserError(
                    f"texts: {text[:40]!r} has the token {token!r}, which {self.name} has no"
                    " embedding for"
                )
        return found

    def continued_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of pieces of text that go on from others: the first is given no space of
        its own.
        """
        found = self.token_ids(texts)
        wrong = list(range(len(texts)))
        for before in _BEFORE:
            [head] = self.token_ids([before])
            joined = self.token_ids([before + texts[i] for i in wrong])
            wanted, shown = self._read(joined), self._read([head + found[i] for i in wrong])
            left = []
            for i, ids, plain_is_right in zip(wrong, joined, map(eq, wanted, shown), strict=True):
                if not plain_is_right and ids[: len(head)] == head:
                    found[i] = ids[len(head) :]
                elif not plain_is_right:
                    left.append(i)
            wrong = left
        return found

    def decode(self, tokens: Tensor, prompt_mask: Tensor, with_prompt: bool = False) -> list[str]:
        """The text of each row without the end token, and without its leading prompt unless asked
        for.

        What follows a prompt is the whole row's text less the prompt's, to the character: some
        tokenizers drop the space before the first token they are given, which here belongs to the
        prompt.
        """
        rows = _kept(tokens, text_mask(tokens, prompt_mask, self.end_id))
        whole = self._read(rows)
        if with_prompt:
            return whole
        given = leading(prompt_mask).sum(1).tolist()
        before = [tuple(row[:n]) for row, n in zip(rows, given, strict=True)]
        known = dict.fromkeys(before)  # many texts have one prompt
        prompts = dict(zip(known, self._read([*known]), strict=True))
        apart = [i for i, text in enumerate(whole) if not text.startswith(prompts[before[i]])]
        alone = dict(zip(apart, self._read([rows[i][given[i] :] for i in apart]), strict=True))
        return [alone.get(i, text[len(prompts[before[i]]) :]) for i, text in enumerate(whole)]

    @cached_property
    def word_starts(self) -> Tensor:
        """(V,) bool, the tokens that begin another word, or a sign or space, behind a letter."""
        [head] = self.token_ids(["a"])
        [before, *read] = self._read(
            [head, *([*head, i] for i in range(min(len(self.tokenizer), self.vocab_size)))]
        )
        starts = torch.zeros(self.vocab_size, dtype=torch.bool)
        for i, text in enumerate(read):
            # Of what follows the letter; a character that is not whole yet may be anything.
            pair = "a" + text[len(before) :][:1]
            starts[i] = len(pair) == 2 and words(pair) != [pair]
        return starts

    def _read(self, rows: Sequence[Sequence[int]]) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(
            rows, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return texts if rows else []  # transformers reads no row as one

    def is_canonical(self, tokens: Tensor, prompt_mask: Tensor, texts: Sequence[str]) -> Tensor:
        """(B,) bool, whether each whole text, prompt included, is cut into just the tokens of its
        row.

        Where it is not, p_θ may give the same text another probability in other tokens.
        """
        keep = text_mask(tokens, prompt_mask, self.end_id)
        keep &= leading(prompt_mask) | (tokens != self.end_id)
        pairs = zip(self.token_ids(texts), _kept(tokens, keep), strict=True)
        return torch.tensor([ids[: len(row)] == row for ids, row in pairs])


def _kept(tokens: Tensor, keep: Tensor) -> list[list[int]]:
    """The tokens of each row that are kept."""
    return [row[mask].tolist() for row, mask in zip(tokens.cpu(), keep.cpu(), strict=True)]


def readable(text: str) -> str:
    """The text with `?` for halves of surrogate pairs, which JSON can hold and tokenizers
    refuse.
    """
    return text.encode("utf-8", "replace").decode("utf-8")
