"""The program run in this process, and a base model small enough for tests, in transformers'
format.
"""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = (
    "1"  # read by torch as it is imported, and by the programs that tests start
)

import torch
from hypothesis import settings

from dia_lightning import cli
from dia_lightning.data.text import train_tokenizer
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.errors import INTERRUPTS
from dia_lightning.lm.base_lm import BaseLM

CORPUS = [
    f"the {a} food is {b} near the {c}."
    for a in ("good", "bad", "cheap")
    for b in ("great", "poor")
    for c in ("river", "pub")
]


# `make fuzz`: properties of tests/reliability/test_fuzz.py, 100,000 cases together.
settings.register_profile("fuzz", max_examples=12_500)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def lightning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Run:
    """Runs the program in this process, from an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lightning", *arguments])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="session")
def lm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised GPT-2 of width 16 with a tokenizer of 280 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("base") / "lm"
    tokenizer = train_tokenizer(CORPUS, 280)
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=32,
        initializer_range=0.3, bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of Llama's architecture, with four heads of queries for two of keys and values,
    and one table for both ends.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama") / "lm"
    tokenizer = train_tokenizer(CORPUS, 280)
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        initializer_range=0.3, tie_word_embeddings=True, bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)  # ones would say nothing
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(llama_folder: Path) -> BaseLM:
    return BaseLM.load(str(llama_folder))


@pytest.fixture(scope="session")
def lm(lm_folder: Path) -> BaseLM:
    return BaseLM.load(str(lm_folder))


@pytest.fixture(scope="session")
def embedding(lm: BaseLM) -> TokenEmbedding:
    return TokenEmbedding(lm.embedding_table(), len(lm.tokenizer))


@pytest.fixture(autouse=True)
def not_interrupted() -> Iterator[None]:
    """A command that was interrupted ends its process; here the next test goes on in it."""
    yield
    INTERRUPTS.pressed = False
