"""Checkpoints with random weights for the small base model and for the enumerable table."""

from pathlib import Path

import pytest

from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.lm.base_lm import BaseLM
from tests.oracles.table_model import table_lm
from tests.wiring.kit import save_parts


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory, embedding: TokenEmbedding) -> Path:
    """`denoiser`, `critic` and `soft` of the small base model, the critics of the reward
    `vowels`.
    """
    folder = tmp_path_factory.mktemp("parts")
    save_parts(folder, embedding, "vowels")
    return folder


@pytest.fixture(scope="session")
def table_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of the table and its reward; `factorised/denoiser` tells nothing of a position by
    the others.
    """
    folder, lm = tmp_path_factory.mktemp("table"), table_lm()
    embedding = TokenEmbedding(lm.embedding_table(), len(lm.tokenizer))
    save_parts(folder, embedding, "table", 0.15, 2.0)
    save_parts(folder / "factorised", embedding, "table", 0.15, 2.0, factorised=True)
    return folder


@pytest.fixture
def on_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every base model is the table."""
    monkeypatch.setattr(BaseLM, "load", lambda name: table_lm())
