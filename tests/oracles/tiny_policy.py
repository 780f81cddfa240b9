"""A GPT-2 of six tokens and texts of up to four, all of them listed: log p of every text, the
reward, and π* in closed form.

Uses transformers alone, nothing of the package.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WORDS = ["a", "b", "c", "d", "e"]
END, T = len(WORDS), 4
# Every text once: words, and the end token where it is shorter than T.
ROWS = [
    list(words) + [END] * (T - n) for n in range(T + 1) for words in itertools.product(range(END),
     repeat=n)
]  # fmt: skip
TOKENS = torch.tensor(ROWS)
KEPT = torch.tensor(
    [[i <= row.index(END) if END in row else True for i in range(T)] for row in ROWS]
)
TEXTS = [" ".join(WORDS[i] for i in row if i != END) for row in ROWS]


def save(folder: Path, seed: int = 0) -> None:
    """Random weights, in transformers' format."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    known = {word: i for i, word in enumerate([*WORDS, "<end>"])}
    inner = Tokenizer(models.WordLevel(known, unk_token="<end>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", bos_token="<end>"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=END + 1, n_embd=32, n_layer=2, n_head=2, n_positions=T + 1,
        initializer_range=0.15, bos_token_id=END, eos_token_id=END, tie_word_embeddings=False,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)


def log_p(model: Any, rows: Tensor = TOKENS, kept: Tensor = KEPT) -> Tensor:
    """(N,) float64 log-probability of every text, with gradients where they are on."""
    inputs = torch.cat([torch.full_like(rows[:, :1], END), rows[:, :-1]], 1)
    every = model(inputs).logits.double().log_softmax(-1)
    return (every.gather(2, rows[..., None])[..., 0] * kept).sum(1)


def rewards(log_base: Tensor, seed: int = 0) -> Tensor:
    """(N,) float64, a random function of pairs of tokens, each at its place; mean 0 and variance
    1 under exp(log_base).
    """
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(ROWS), dtype=torch.float64)
    for i in range(T):
        for j in range(i, T):
            table = torch.randn(END + 1, END + 1, generator=generator, dtype=torch.float64)
            total += table[TOKENS[:, i], TOKENS[:, j]]
    p = log_base.detach().exp()
    total -= p @ total
    return total / (p @ total**2).sqrt()


def kl(log_a: Tensor, log_b: Tensor) -> float:
    """KL(a ‖ b) in nats of two normalised laws over the texts."""
    return float((log_a.exp() * (log_a - log_b)).sum())


def optimum(log_base: Tensor, reward: Tensor, beta: float) -> Tensor:
    """log π*, π* ∝ p exp(r / β)."""
    unnormalised = log_base + reward / beta
    return unnormalised - unnormalised.logsumexp(0)
