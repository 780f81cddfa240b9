"""The enumerable table as a `BaseLM`: its model knows what it has read from the key–value cache
alone.
"""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GPT2Config

from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.types import Batch, Reward
from tests.oracles.table_lm import END, LAM, LOG_P, NEXT, REWARD, ROWS, T, V, codes

Floats = np.ndarray[Any, np.dtype[np.float64]]


class TableModel(torch.nn.Module):
    """Next-token logits of `NEXT`, called as a transformers model is; the cached keys are the
    tokens read.
    """

    config = GPT2Config(n_layer=1, n_positions=T + 1)
    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(V, 4)
        prefixes = sorted(NEXT, key=lambda prefix: (len(prefix), prefix))
        self.rows = {
            n: torch.tensor(np.array([NEXT[p] for p in prefixes if len(p) == n])).log()
            for n in range(T)
        }

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> None:
        return None

    def forward(
        self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False
    ) -> Any:
        seen = input_ids
        if past_key_values is not None:
            states = input_ids[:, None, :, None].double()
            seen = past_key_values.update(states, states, 0)[0][:, 0, :, 0].long()
        logits = []
        for n in range(seen.shape[1] - input_ids.shape[1], seen.shape[1]):
            place = seen[:, 1 : n + 1] @ V ** torch.arange(n - 1, -1, -1)
            logits.append(self.rows[n][place])
        return SimpleNamespace(logits=torch.stack(logits, 1))


class Letters:
    """Tokens 0 and 1 are `a` and `b`, so that every text of the table reads differently."""

    eos_token_id, bos_token_id = END, None

    def __len__(self) -> int:
        return V

    def get_vocab(self) -> dict[str, int]:
        return dict(zip("ab", range(END), strict=True)) | {"": END}

    def __call__(self, texts: str | Sequence[str], **options: Any) -> dict[str, Any]:
        rows = [
            ["ab".index(letter) for letter in text if letter in "ab"]
            for text in ([texts] if isinstance(texts, str) else texts)
        ]
        return {"input_ids": rows[0] if isinstance(texts, str) else rows}

    def batch_decode(
        self, rows: Sequence[Sequence[int]], skip_special_tokens: bool = True, **options: Any
    ) -> list[str]:
        return ["".join("ab"[i] for i in row if i != END) for row in rows]


class TableReward(Reward):
    """The table's reward of each text; `asked` counts."""

    name = "table"

    def __init__(self) -> None:
        read = Letters().batch_decode(ROWS, True)
        assert len(set(read)) == len(ROWS)
        self.known, self.asked = dict(zip(read, REWARD, strict=True)), 0

    def __call__(self, texts: Sequence[str]) -> Tensor:
        self.asked += len(texts)
        return torch.tensor([self.known[text] for text in texts], dtype=torch.float32)


def table_lm() -> BaseLM:
    return BaseLM(TableModel(), Letters(), "table")


def free(n: int) -> Batch:
    """A batch of n texts without prompts."""
    tokens = torch.full((n, T), END)
    return Batch(0, list(range(n)), [""] * n, tokens, torch.zeros_like(tokens, dtype=torch.bool))


P = np.exp(LOG_P)


def soft_values(lam: float = LAM) -> dict[tuple[int, ...], float]:
    """log E[exp(λ r) | prefix] / λ of every beginning of every text, whole texts too."""
    sums: dict[tuple[int, ...], np.ndarray] = {}
    for row, p, r in zip(ROWS, P, REWARD, strict=True):
        for n in range(T + 1):
            sums[row[:n]] = sums.get(row[:n], np.zeros(2)) + p * np.array([math.exp(lam * r), 1.0])
    return {prefix: math.log(top / bottom) / lam for prefix, (top, bottom) in sums.items()}


class TableValue:
    """A value of prefixes looked up by the tokens that are settled; `asked` counts."""

    def __init__(self, values: dict[tuple[int, ...], float]) -> None:
        self.values, self.asked = values, 0

    def __call__(self, tokens: Tensor, known: Tensor) -> Tensor:
        self.asked += len(tokens)
        prefixes = [
            tuple(row[: int(n)]) for row, n in zip(tokens.tolist(), known.sum(1), strict=True)
        ]
        return torch.tensor([self.values[prefix] for prefix in prefixes])


def chi_square_ok(tokens: Tensor, p: Floats) -> bool:
    """Whether rows of the table are draws of p (N,): χ² at false-alarm rate 10⁻³
    (Wilson–Hilferty), rare rows pooled.
    """
    want = p * len(tokens)
    got = np.bincount(codes(tokens), minlength=len(p))
    common = want >= 5
    cells = [*((got - want)[common] ** 2 / want[common])]
    if want[~common].sum() > 0:
        cells.append((got - want)[~common].sum() ** 2 / want[~common].sum())
    df = len(cells) - 1
    return bool(sum(cells) < df * (1 - 2 / (9 * df) + 3.09 * (2 / (9 * df)) ** 0.5) ** 3)
