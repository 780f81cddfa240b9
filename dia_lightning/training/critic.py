"""CriticModule: learns the value of noised texts from any reward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dia_lightning.diffusion.critic import CriticNetwork
from dia_lightning.diffusion.loss import Noised
from dia_lightning.errors import UserError
from dia_lightning.numerics import float32_default
from dia_lightning.rewards.base import CachedReward, call_reward
from dia_lightning.training.base import BANDS, N_BANDS, Network, NoisedRowsModule, Noising
from dia_lightning.training.optim import AdamW
from dia_lightning.types import Reward


class CriticModule(NoisedRowsModule):
    """Learns h_φ(z_t, t) on p_θ's samples (see science.md, "Critic").

    Args:
        reward: any `Reward`; called on decoded texts, each text once.
        base_lm: hub id or folder of p_θ.
        network: the transformer; begun from base_lm its width and heads are those of base_lm.
        noising: the forward process, its schedule unwarped.
        denoiser: checkpoint whose noise schedule, with its warp, is used instead.
        objective: `mse` (E[r | z_t]), `soft` (log E[exp(λ r) | z_t]) or `clean` (r on clean text
            only, the original proposal).
        lam: λ of `soft`, in 1 / reward; not used by the others.
        init_from: what the weights begin from: `base_lm` (its own blocks) or `random`.
        optimizer: learning rate, its warm-up, and weight decay.
        seed: of the noise.
    """

    def __init__(
        self,
        reward: Reward,
        base_lm: str = "checkpoints/tiny/lm",
        network: Network = Network(layers=4),  # noqa: B008 (frozen)
        noising: Noising = Noising(),  # noqa: B008
        denoiser: str | None = None,
        objective: str = "mse",
        lam: float = 1.0,
        init_from: str = "base_lm",
        optimizer: AdamW = AdamW(warmup_steps=100),  # noqa: B008
        seed: int = 0,
    ) -> None:
        super().__init__(base_lm, network, noising, denoiser, optimizer, seed)
        if objective not in OBJECTIVES:
            raise UserError(f"objective: {objective!r} given, allowed: {', '.join(OBJECTIVES)}")
        if objective == "soft" and lam == 0:
            raise UserError("lam: 0 given, allowed: any other number where objective is soft")
        if init_from not in ("base_lm", "random"):
            raise UserError(f"init_from: {init_from!r} given, allowed: base_lm, random")
        if network.tied_head:
            raise UserError("tied_head: true given, allowed: false; a critic reads out no tokens")
        if reward.conditional:
            raise UserError(
                f"reward: {reward.name!r} given, allowed: a reward of the text alone; this one"
                " compares with a record"
            )
        self.reward, self.objective, self.lam = CachedReward(reward), objective, lam
        self.network = CriticNetwork(self.embedding.dim, self.schedule, network.size, self.lm.model)
        self.prepare_blocks(network)
        if init_from == "base_lm":
            self.network.trunk.init_from_lm(self.lm.model, self.lm.bos_id, self.embedding.unit)

    def on_fit_start(self) -> None:
        """Standardise: mean and scale of the reward over the held-out rows."""
        rows = self.trainer.datamodule.val_rows  # type: ignore[attr-defined]
        batch = rows[list(range(len(rows)))]
        rewards = self._rewards({k: v.to(self.device) for k, v in batch.items()})
        if not float(rewards.std()) > 0:
            raise UserError(
                f"reward: {self.reward.name!r} given, allowed: one that differs between samples; it"
                f" is {float(rewards.mean()):g} on all of them"
            )
        self.network.mean.copy_(self._units * rewards.mean())
        self.network.scale.copy_(
            rewards.new_ones(()) if self.objective == "soft" else rewards.std()
        )

    @float32_default()
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        noised = (
            self._clean(batch)
            if self.objective == "clean"
            else self.noised(batch, self.batch_number)
        )
        target, objective = self._targets(batch), OBJECTIVES[self.objective]
        self.compile_once(
            lambda: objective(self.network.standardised(noised.z, noised.t), target).mean()
        )
        value = self.network.standardised(noised.z, noised.t)
        losses = objective(value, target)
        self.note_rows(batch, ~losses.detach().isfinite())
        loss = losses.mean()
        if self.objective == "soft":
            self.log("train/clipped", (target - value > SOFT_CLIP).float().mean(), sync_dist=True)
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        # Rows: squared error, target, its square, count; columns: the bands, and all rows without
        # noise.
        self._moments = torch.zeros(4, N_BANDS + 1, device=self.device)

    @float32_default()
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        noised, clean, target = (
            self.noised(batch, -1 - batch_idx),
            self._clean(batch),
            self._targets(batch),
        )
        level = torch.where(noised.noised, noised.t, 0.0).amax(1)
        for columns, rows in ((slice(N_BANDS), noised), (slice(N_BANDS, None), clean)):
            error = (self.network.standardised(rows.z, rows.t) - target).square()
            for row, values in enumerate((error, target, target.square(), torch.ones_like(target))):
                self._moments[row, columns] += (
                    self.band_sums(values, level) if rows is noised else values.sum()
                )

    def on_validation_epoch_end(self) -> None:
        """R² on held-out samples, in five bands of each row's highest noise level u, and on
        clean text (for `soft`, of h/λ).
        """
        moments = self.trainer.strategy.reduce(self._moments, reduce_op="sum")
        assert isinstance(moments, Tensor)
        names = [*(f"val/r2_{band}" for band in BANDS), "val/r2_clean", "val/r2"]
        columns = [*moments.T, moments[:, :N_BANDS].sum(1)]
        for name, (error, total, square, count) in zip(names, columns, strict=True):
            spread = square - total.square() / count
            if spread > 1e-6:  # neither an empty band (NaN) nor one of equal rewards has an R²
                self.log(name, 1 - error / spread, prog_bar=name == "val/r2", sync_dist=True)

    def _clean(self, batch: dict[str, Tensor]) -> Noised:
        tokens = batch["tokens"]
        return Noised(
            self.embedding(tokens),
            tokens.new_zeros(tokens.shape, dtype=torch.float32),
            torch.zeros_like(tokens) > 0,
        )

    def _rewards(self, batch: dict[str, Tensor]) -> Tensor:
        return call_reward(self.reward, self.lm.decode(batch["tokens"], batch["prompt_mask"])).to(
            self.device
        )

    @property
    def _units(self) -> float:
        """`soft` learns in units of λ r."""
        return self.lam if self.objective == "soft" else 1.0

    def _targets(self, batch: dict[str, Tensor]) -> Tensor:
        """What `network.standardised` is to be, (B,)."""
        return (self._units * self._rewards(batch) - self.network.mean) / self.network.scale

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "kind": "critic",
            "size": self.network.size.as_dict(),
            "objective": self.objective,
            "lam": self.lam,
            "reward": self.reward.name,
        }


# The exponent is cut here; how often that happens is logged as `train/clipped`.
SOFT_CLIP = 20.0


def mse(value: Tensor, target: Tensor) -> Tensor:
    """(h − y)²: h → E[y | z_t]."""
    return (value - target).square()


def soft(value: Tensor, target: Tensor) -> Tensor:
    """Fits exp(h) to exp(y) for y = λ r, so that h → log E[exp(λ r) | z_t], the exact log-value of
    the target.

    The Itakura–Saito form exp(y − h) − (y − h) − 1 has its minimum at E[exp(y − h)] = 1 and needs
    no division by exp(h),
    but its gradient has the variance of exp(y): the exponent is clipped at `SOFT_CLIP`.
    """
    gap = (target - value).clamp_max(SOFT_CLIP)
    return torch.exp(gap) - gap - 1


OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": mse, "soft": soft, "clean": mse}
