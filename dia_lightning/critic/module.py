"""CriticModule: learns the value of noised texts from any reward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dia_lightning.critic.loss import OBJECTIVES, SOFT_CLIP
from dia_lightning.critic.network import CriticNetwork
from dia_lightning.diffusion.denoiser import NetworkSize
from dia_lightning.diffusion.loss import Noised
from dia_lightning.diffusion.module import N_BANDS, NoisedRowsModule
from dia_lightning.resources import UserError
from dia_lightning.rewards import CachedReward, call_reward
from dia_lightning.types import Reward


class CriticModule(NoisedRowsModule):
    """Learns h_φ(z_t, t) on p_θ's samples (see science.md, "Critic").

    Args:
        reward: any `Reward`; called on decoded texts, each text once.
        base_lm: hub id or folder of p_θ.
        denoiser: checkpoint whose noise schedule, with its warp, is used; nothing = `schedule` unwarped.
        objective: `mse` (E[r | z_t]), `soft` (log E[exp(λ r) | z_t]) or `clean` (r on clean text only, the original proposal).
        lam: λ of `soft`, in 1 / reward; not used by the others.
        schedule: as for the denoiser, where no `denoiser` is given.
        width, layers, heads, rotary, max_length, init_from_lm: the transformer, as for the denoiser.
        lr, weight_decay, warmup_steps: AdamW with warm-up and cosine decay to the end of training.
        seed: of the noise.
    """

    def __init__(
        self,
        reward: Reward,
        base_lm: str = "checkpoints/tiny/lm",
        denoiser: str | None = None,
        objective: str = "mse",
        lam: float = 1.0,
        schedule: str = "cosine",
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        rotary: bool = False,
        max_length: int = 40,
        init_from_lm: bool = True,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup_steps: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__(base_lm, schedule, denoiser, max_length, lr, weight_decay, warmup_steps, seed)
        if objective not in OBJECTIVES:
            raise UserError(f"--model.init_args.objective: {objective!r} given, allowed are {', '.join(OBJECTIVES)}")
        self.reward, self.objective, self.lam = CachedReward(reward), objective, lam
        size = NetworkSize(width, layers, heads, max_length, rotary)
        self.network = CriticNetwork(self.embedding.dim, self.schedule, size)
        if init_from_lm:
            self.network.trunk.init_from_lm(self.lm.model, self.lm.bos_id)

    def on_fit_start(self) -> None:
        """Standardise: mean and scale of the reward over the held-out rows."""
        rows = self.trainer.datamodule.val_rows  # type: ignore[attr-defined]
        batch = rows.__getitems__(list(range(len(rows))))
        rewards = self._rewards({k: v.to(self.device) for k, v in batch.items()})
        if not float(rewards.std()) > 0:
            raise UserError(f"--model.init_args.reward: {self.reward.name} is {float(rewards.mean()):g} on every sample")
        self.network.mean.copy_(rewards.mean())
        self.network.scale.copy_(rewards.std())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        noised = self._noised(batch, self.trainer.global_step)
        target = self._standardised_rewards(batch)
        value = self.network.standardised(noised.z, noised.t)
        lam = self.lam * float(self.network.scale) if self.objective == "soft" else 1.0
        loss = OBJECTIVES[self.objective](value, target, lam).mean()
        if self.objective == "soft":
            self.log("train/clipped", (lam * target - value > SOFT_CLIP).float().mean(), sync_dist=True)
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        self._moments = torch.zeros(4, N_BANDS, device=self.device)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        noised = self._noised(batch, -1 - batch_idx)
        target = self._standardised_rewards(batch)
        error = (self._point_estimate(noised) - target).square()
        level = torch.where(noised.noised, noised.t, 0.0).amax(1)
        for row, values in enumerate((error, target, target.square())):
            total, count = self.band_means(values, level)
            self._moments[row] += total
        self._moments[3] += count

    def _point_estimate(self, noised: Noised) -> Tensor:
        value = self.network.standardised(noised.z, noised.t)
        return value / (self.lam * float(self.network.scale)) if self.objective == "soft" else value

    def on_validation_epoch_end(self) -> None:
        """R² on held-out samples, in five bands of each row's highest noise level u (for `soft`, of h/λ)."""
        moments = self.trainer.strategy.reduce(self._moments, reduce_op="sum")
        assert isinstance(moments, Tensor)
        for band, (error, total, square, count) in enumerate(moments.T):
            spread = square - total.square() / count.clamp_min(1)
            name = f"val/r2_u_{band / N_BANDS:.1f}_{(band + 1) / N_BANDS:.1f}"
            self.log(name, 1 - error / spread.clamp_min(1e-6), rank_zero_only=True)
        error, total, square, count = moments.sum(1)
        self.log("val/r2", 1 - error / (square - total.square() / count), prog_bar=True, rank_zero_only=True)

    def _noised(self, batch: dict[str, Tensor], stream: int) -> Noised:
        noised = self.noised(batch, stream)
        if self.objective != "clean":
            return noised
        return Noised(self.embedding(batch["tokens"]), torch.zeros_like(noised.t), torch.zeros_like(noised.noised))

    def _rewards(self, batch: dict[str, Tensor]) -> Tensor:
        return call_reward(self.reward, self.lm.decode(batch["tokens"], batch["prompt_mask"])).to(self.device)

    def _standardised_rewards(self, batch: dict[str, Tensor]) -> Tensor:
        return (self._rewards(batch) - self.network.mean) / self.network.scale

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "kind": "critic",
            "size": self.network.size.as_dict(),
            "objective": self.objective,
            "lam": self.lam,
            "reward": self.reward.name,
        }
