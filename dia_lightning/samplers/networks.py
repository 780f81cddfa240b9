"""Trained networks as samplers want them: frozen, and the critic in units of the reward."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dia_lightning.diffusion.checkpoint import is_normalised, load_weights, read_network
from dia_lightning.diffusion.critic import CriticNetwork
from dia_lightning.diffusion.denoiser import DenoiserNetwork
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.schedule import make_schedule
from dia_lightning.diffusion.trunk import NetworkSize
from dia_lightning.errors import UserError
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.lm.row_cache import rows_at_once
from dia_lightning.sampling.positions import gather_at

N = TypeVar("N", bound=nn.Module)


def embedding_for(
    lm: BaseLM, denoiser: str | None = None, critic: str | None = None
) -> TokenEmbedding:
    """E of `lm`, rows of one norm or raw as the first checkpoint given was trained on; loading
    another checks that it was too.

    Raises:
        UserError: if that checkpoint is missing, damaged or of another kind.
    """
    given = {"denoiser": denoiser, "critic": critic}
    kind, path = next(
        ((kind, path) for kind, path in given.items() if path is not None), ("", None)
    )
    normalise = path is None or is_normalised(path, kind, kind)
    return TokenEmbedding(lm.embedding_table(), len(lm.tokenizer), normalise)


def load_denoiser(
    path: str, embedding: TokenEmbedding, lm: BaseLM | None = None
) -> DenoiserNetwork:
    """The denoiser at `path` (folder or `.ckpt`), frozen, for use with `embedding`; one that adapts
    p_θ's blocks needs `lm`.

    Raises:
        UserError: if it is missing, damaged, no denoiser, or made for another base model or other
            embeddings of it.
    """
    return _load_denoiser(path, embedding, lm)[0]


def load_labelled(
    path: str, embedding: TokenEmbedding, reward: str, lm: BaseLM | None = None
) -> tuple[DenoiserNetwork, int]:
    """The denoiser at `path`, which has labels made of the reward called `reward`, and how many.

    Raises:
        UserError: as for `load_denoiser`, or if it has no labels or those of another reward.
    """
    network, settings = _load_denoiser(path, embedding, lm)
    labels = settings.get("labels")
    if labels is None or labels["reward"] != reward:
        has = "no labels" if labels is None else f"labels of the reward {labels['reward']!r}"
        raise UserError(
            f"denoiser: {path} given, allowed: one with labels of {reward!r} (trained with"
            f" labels); it has {has}"
        )
    return network, labels["n_labels"]


def _load_denoiser(
    path: str, embedding: TokenEmbedding, lm: BaseLM | None
) -> tuple[DenoiserNetwork, dict[str, Any]]:
    settings, weights = read_network(path, "denoiser", "denoiser", embedding)
    schedule, size = make_schedule(settings["schedule"]), NetworkSize(**settings["size"])
    n_labels = settings.get("labels", {}).get("n_labels", 0)
    network = DenoiserNetwork(
        embedding, schedule, size, settings["tied_head"], n_labels, lm and lm.model
    )
    return _frozen(network, settings, weights, "denoiser", path), settings


def load_critic(
    path: str, embedding: TokenEmbedding, reward: str | None = None, lm: BaseLM | None = None
) -> tuple[CriticNetwork, dict[str, Any]]:
    """The critic at `path` (folder or `.ckpt`), frozen, and its settings; `reward` is the name of
    that it must be for.

    Raises:
        UserError: as for `load_denoiser`, or if it was trained on another reward.
    """
    settings, weights = read_network(path, "critic", "critic", embedding)
    if reward is not None and settings["reward"] != reward:
        raise UserError(
            f"critic: {path} given, allowed: one for the reward {reward!r}; it was trained on"
            f" the reward {settings['reward']!r}"
        )
    schedule, size = make_schedule(settings["schedule"]), NetworkSize(**settings["size"])
    network = CriticNetwork(embedding.dim, schedule, size, lm and lm.model)
    return _frozen(network, settings, weights, "critic", path), settings


class RewardValue(nn.Module):
    """A critic's value in units of the reward; a `soft` one was fitted to λ r and is divided by
    its λ.
    """

    def __init__(self, critic: CriticNetwork, unit: float) -> None:
        super().__init__()
        self.critic, self.unit = critic, unit

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """Z (B, T, d), t (B, T) → (B,)."""
        value: Tensor = self.critic(z, t)
        return value / self.unit


def load_value(
    path: str | None, embedding: TokenEmbedding, reward: str, lam: float, lm: BaseLM | None = None
) -> RewardValue:
    """The critic at `path` as a value of the reward called `reward`, for use at λ = `lam`.

    Raises:
        UserError: as for `load_critic`; if there is none, or it is `soft` and was trained for
            another λ.
    """
    if path is None:
        raise UserError("critic: none given, needed for guidance at lam above 0")
    network, settings = load_critic(path, embedding, reward, lm)
    soft = settings["objective"] == "soft"
    if soft and settings["lam"] != lam:
        raise UserError(
            f"lam: {lam} given, allowed: {settings['lam']}, for which the soft critic {path} was"
            " trained"
        )
    return RewardValue(network, lam if soft else 1.0)


def _frozen(
    network: N, settings: dict[str, Any], weights: dict[str, Tensor], argument: str, path: str
) -> N:
    load_weights(network, settings, weights, argument, path)
    return network.eval().requires_grad_(False)


class DenoiserProposal:
    """A denoiser as `Proposal`: logits (B, T, V) at (z, t), or with `at` of the positions asked
    for only.
    """

    def __init__(self, network: DenoiserNetwork) -> None:
        self.network = network

    @torch.no_grad()
    def at(self, z: Tensor, t: Tensor, index: Tensor) -> Tensor:
        """Logits (B, K, V) float32 at positions `index` (B, K)."""
        rows = rows_at_once(z)
        chunks = zip(z.split(rows), t.split(rows), index.split(rows), strict=True)
        return torch.cat([self._at(*chunk) for chunk in chunks])

    def _at(self, z: Tensor, t: Tensor, index: Tensor) -> Tensor:
        return self.network.readout(*(gather_at(x, index) for x in self.network.hidden(z, t)))

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        return self.at(z, t, torch.arange(z.shape[1], device=z.device).expand(z.shape[:2]))
