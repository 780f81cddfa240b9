"""A language model small enough to list all its texts, and a reward of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from string import ascii_lowercase
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.types import Batch, Reward

Floats = NDArray[np.float64]
Prefix = tuple[int, ...]
_MOST = 100_000


class _TableModel(torch.nn.Module):
    """Next-token logits, called as a transformers model is.

    The cached keys are the tokens read, so that the model knows them from the key–value cache
    alone.
    """

    dtype = torch.float32

    def __init__(self, next_probs: Mapping[Prefix, Floats], vocab_size: int, length: int) -> None:
        super().__init__()
        from transformers import GPT2Config

        self.config = GPT2Config(n_layer=1, n_positions=length + 1)
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.nn.Embedding.from_pretrained(
            torch.randn(vocab_size, 4, generator=generator)
        )
        self.rows = [
            torch.tensor(
                np.array([next_probs[prefix] for prefix in _prefixes(vocab_size, n)])
            ).log()
            for n in range(length)
        ]

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> None:
        return None

    def forward(
        self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False
    ) -> Any:
        seen, vocab_size = input_ids, self.rows[0].shape[1]
        if past_key_values is not None:
            states = input_ids[:, None, :, None].double()
            seen = past_key_values.update(states, states, 0)[0][:, 0, :, 0].long()
        logits = []
        for n in range(seen.shape[1] - input_ids.shape[1], seen.shape[1]):
            place = seen[:, 1 : n + 1] @ vocab_size ** torch.arange(n - 1, -1, -1)
            logits.append(self.rows[n][place])
        return SimpleNamespace(logits=torch.stack(logits, 1))


class _Letters:
    """A tokenizer whose tokens are letters; the end token, the last one, is the empty text."""

    bos_token_id = None

    def __init__(self, n_letters: int) -> None:
        self.letters, self.eos_token_id = ascii_lowercase[:n_letters], n_letters

    def __len__(self) -> int:
        return len(self.letters) + 1

    def get_vocab(self) -> dict[str, int]:
        return {letter: i for i, letter in enumerate(self.letters)} | {"": self.eos_token_id}

    def __call__(self, texts: str | Sequence[str], **options: Any) -> dict[str, Any]:
        rows = [
            [self.letters.index(c) for c in text if c in self.letters]
            for text in ([texts] if isinstance(texts, str) else texts)
        ]
        return {"input_ids": rows[0] if isinstance(texts, str) else rows}

    def batch_decode(
        self, rows: Sequence[Sequence[int]], skip_special_tokens: bool = True, **options: Any
    ) -> list[str]:
        return ["".join(self.letters[i] for i in row if i != self.eos_token_id) for row in rows]


class TableLM(BaseLM):
    """A language model that is a table: a next-token distribution after each beginning of a text.

    Tokens are the letters a, b, … and, as the last one, the end token. A text has at most T
    letters; one of T letters has no end token.

    Args:
        next_probs: (V,) probabilities of the next token after each tuple of fewer than T tokens,
            () among them.

    Attributes:
        length: T. rows: (N, T) int64, every text once, in canonical form. log_p: (N,) float64
            log-probabilities in nats, summed from the table.

    Raises:
        ValueError: if a beginning is missing, its row is no distribution, or the size is none that
            `table_lm` allows.
    """

    def __init__(self, next_probs: Mapping[Prefix, Floats]) -> None:
        vocab_size, self.length = len(next_probs[()]), 1 + max(map(len, next_probs))
        _check_size(vocab_size, self.length)
        needed = [p for n in range(self.length) for p in _prefixes(vocab_size, n)]
        for prefix in needed:
            row = np.asarray(next_probs.get(prefix, ()))
            if row.shape != (vocab_size,) or not (row >= 0).all() or abs(row.sum() - 1) > 1e-6:
                raise ValueError(
                    f"next_probs: {row.tolist()} given after {prefix}, needed: {vocab_size}"
                    " probabilities that sum to 1"
                )
        super().__init__(
            _TableModel(next_probs, vocab_size, self.length), _Letters(vocab_size - 1), "table"
        )
        texts = [row for row in _prefixes(vocab_size, self.length) if self._is_text(row)]
        self.rows, self.log_p = torch.tensor(texts), np.zeros(len(texts))
        with np.errstate(divide="ignore"):
            for i, text in enumerate(texts):
                n = text.index(self.end_id) + 1 if self.end_id in text else self.length
                self.log_p[i] = sum(np.log(next_probs[text[:k]][text[k]]) for k in range(n))

    def _is_text(self, row: Prefix) -> bool:
        ended = row.index(self.end_id) if self.end_id in row else self.length
        return all(token == self.end_id for token in row[ended:])

    def texts(self) -> list[str]:
        """The N texts as read, in the order of `rows`; all differ."""
        return list(self.tokenizer.batch_decode(self.rows.tolist()))

    def batch(self, prompts: Sequence[str]) -> Batch:
        """Work for a sampler: one text for each of these prompts, which are letters, fewer than T.

        Raises:
            ValueError: for another prompt.
        """
        tokens = torch.full((len(prompts), self.length), self.end_id)
        for prompt, row in zip(prompts, tokens, strict=True):
            if not set(prompt) <= set(self.tokenizer.letters) or len(prompt) >= self.length:
                raise ValueError(
                    f"prompts: {prompt!r} given, allowed: fewer than {self.length} of the letters"
                    f" {self.tokenizer.letters}"
                )
            row[: len(prompt)] = torch.tensor(self.tokenizer([prompt])["input_ids"][0])
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        mask = torch.arange(self.length) < lengths[:, None]
        return Batch(0, list(range(len(prompts))), list(prompts), tokens, mask)


class TableReward(Reward):
    """A reward that is a list of values, one for each text of a `TableLM`.

    Args:
        lm: whose texts these are.
        values: (N,), in the order of `lm.rows`; by default N(0, 1) draws.
        seed: of those draws.

    Attributes:
        asked: texts that it was asked for so far.
    """

    name = "table"

    def __init__(self, lm: TableLM, values: Floats | None = None, seed: int = 0) -> None:
        if values is None:
            values = np.random.default_rng(seed).normal(size=len(lm.rows))
        self.known, self.asked = dict(zip(lm.texts(), values.tolist(), strict=True)), 0

    def __call__(self, texts: Sequence[str]) -> Tensor:
        self.asked += len(texts)
        return torch.tensor([self.known[text] for text in texts], dtype=torch.float32)


def table_lm(n_letters: int = 2, length: int = 4, seed: int = 0) -> TableLM:
    """A `TableLM` of random rows, each uniform among all distributions of the next token.

    Args:
        n_letters: V − 1, 1 to 26. length: T, 2 or more; V^T is at most 100,000. seed: of the rows.

    Raises:
        ValueError: if there would be no text, or too many to list.
    """
    _check_size(n_letters + 1, length)
    rng = np.random.default_rng(seed)
    every = (prefix for n in range(length) for prefix in _prefixes(n_letters + 1, n))
    return TableLM({prefix: rng.dirichlet(np.ones(n_letters + 1)) for prefix in every})


def _prefixes(vocab_size: int, n: int) -> list[Prefix]:
    return list(itertools.product(range(vocab_size), repeat=n))


def _check_size(vocab_size: int, length: int) -> None:
    if not 2 <= vocab_size <= 27 or length < 2 or vocab_size**length > _MOST:
        raise ValueError(
            f"table_lm: {vocab_size - 1} letters and length {length} given, allowed: 1 to 26"
            f" letters, a length of 2 or more, and (letters + 1)^length up to {_MOST}"
        )
