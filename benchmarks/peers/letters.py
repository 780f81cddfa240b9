"""A language model small enough to list every text, as a folder that any library can load: GPT-2
with large random weights over the letters a, b, c.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

LENGTH, LETTERS = 5, "abc"


def make(folder: Path) -> Path:
    """Write model and tokenizer, always the same."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    if (folder / "tokenizer.json").exists():
        return folder
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=len(LETTERS) + 1, n_positions=LENGTH + 3, n_embd=16, n_layer=2, n_head=2,
        bos_token_id=len(LETTERS), eos_token_id=len(LETTERS), initializer_range=0.3,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    vocabulary = {token: i for i, token in enumerate([*LETTERS, "<|endoftext|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    # The peer reads the tokens' bytes off the decoder; a byte-level one must know every byte.
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    end = {f"{kind}_token": "<|endoftext|>" for kind in ("bos", "eos", "unk", "pad")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **end).save_pretrained(folder)
    return folder


def law(folder: Path) -> dict[tuple[int, ...], float]:
    """Every text, without its end token, and its probability: by transformers alone."""
    from transformers import GPT2LMHeadModel

    model, end = GPT2LMHeadModel.from_pretrained(folder).double().eval(), len(LETTERS)
    texts = {
        letters: 0.0
        for n in range(LENGTH + 1)
        for letters in itertools.product(range(end), repeat=n)
    }
    for letters in texts:
        with torch.no_grad():
            log_p = model(torch.tensor([[end, *letters]])).logits[0].log_softmax(-1)
        written = [float(log_p[i, token]) for i, token in enumerate(letters)]
        ended = float(log_p[-1, end]) if len(letters) < LENGTH else 0.0
        texts[letters] = float(np.exp(sum(written) + ended))
    return texts


def total_variation(
    texts: list[tuple[int, ...]], p: dict[tuple[int, ...], float], reward: NDArray[np.float64],
    lam: float,
) -> tuple[float, float]:  # fmt: skip
    """Of the drawn texts from π ∝ p exp(λ r), and what as many exact draws would have."""
    pi = np.array(list(p.values())) * np.exp(lam * reward)
    pi /= pi.sum()
    place = {text: i for i, text in enumerate(p)}
    share = np.bincount([place[text] for text in texts], minlength=len(p)) / len(texts)
    exact = np.random.default_rng(0).multinomial(len(texts), pi, size=50) / len(texts)
    return float(np.abs(share - pi).sum() / 2), float(np.abs(exact - pi).sum(1).mean() / 2)
