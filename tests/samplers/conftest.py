"""A critic of the small base model with random weights, for the samplers on p_θ."""

from pathlib import Path

import pytest
import torch

from dia_lightning.diffusion.checkpoint import save_network
from dia_lightning.diffusion.critic import CriticNetwork
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.schedule import make_schedule
from dia_lightning.diffusion.trunk import NetworkSize


@pytest.fixture(scope="session")
def critic_folder(tmp_path_factory: pytest.TempPathFactory, embedding: TokenEmbedding) -> Path:
    """Holds `mse`, and `soft` made for λ = 0.7, on the reward `vowels`."""
    folder, size = (
        tmp_path_factory.mktemp("critics"),
        NetworkSize(width=16, layers=1, heads=2, max_length=8),
    )
    torch.manual_seed(1)
    critic = CriticNetwork(embedding.dim, make_schedule("cosine"), size)
    settings = {
        "schema": 1,
        "base_lm": "base",
        "embedding": embedding.fingerprint(),
        "schedule": "cosine",
        "kind": "critic",
    }
    settings |= {"size": size.as_dict(), "objective": "mse", "lam": 1.0, "reward": "vowels"}
    save_network(critic, settings, folder / "mse")
    save_network(critic, settings | {"objective": "soft", "lam": 0.7}, folder / "soft")
    return folder
