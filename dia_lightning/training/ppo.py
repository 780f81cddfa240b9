"""PPO and RLOO: a policy fine-tuned to the target that DIA samples from, the baseline that it is
compared with.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dia_lightning.errors import UserError, require
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.numerics import float32_default
from dia_lightning.rewards.base import CachedReward, call_reward
from dia_lightning.samplers.base import require_counts
from dia_lightning.sampling.annealing import particles_of
from dia_lightning.target import reward_inputs
from dia_lightning.training.lora import add_adapters, merged
from dia_lightning.training.optim import AdamW
from dia_lightning.training.ppo_loss import (
    adapted_beta,
    clipped_loss,
    explained_variance,
    gae,
    leave_one_out,
    token_rewards,
    was_clipped,
    whiten,
)
from dia_lightning.training.watched import WatchedModule
from dia_lightning.types import Batch, Reward, scored_mask


class Estimator(ABC):  # noqa: B024
    """How much better than expected each drawn text was: the baseline of the policy gradient."""


@dataclass(frozen=True)
class GAE(Estimator):
    """Advantages of every token by a value head on the last hidden state, whitened: PPO (Schulman
    et al. 2017, Ziegler et al. 2019).

    Args:
        gae_lambda: λ of generalised advantage estimation, 0 to 1.
        value_coef: weight of the value loss, 0 or more.
    """

    gae_lambda: float = 0.95
    value_coef: float = 0.1

    def __post_init__(self) -> None:
        require("gae_lambda", self.gae_lambda, 0 <= self.gae_lambda <= 1, "0 to 1")
        require("value_coef", self.value_coef, self.value_coef >= 0, "0 or more")


@dataclass(frozen=True)
class LeaveOneOut(Estimator):
    """Texts of the same prompt are each other's baseline: RLOO (Ahmadian et al. 2024)."""


@dataclass(frozen=True)
class Updates:
    """What a batch of texts is used for.

    Args:
        epochs: passes over each batch of texts.
        minibatches: optimiser steps a pass.
        clip: ε, between 0 and 1: how far the probability ratio (of a token with GAE, of a text
            with LeaveOneOut) may pay to move in one batch.
        gradient_clip: largest norm of a gradient (the Trainer's own option does not work here).
    """

    epochs: int = 2
    minibatches: int = 2
    clip: float = 0.2
    gradient_clip: float = 1.0

    def __post_init__(self) -> None:
        require_counts(self, "epochs", "minibatches")
        require("clip", self.clip, 0 < self.clip < 1, "between 0 and 1")
        require("gradient_clip", self.gradient_clip, self.gradient_clip > 0, "above 0")


class Rollout(NamedTuple):
    """Texts of the policy and what was known of them when they were drawn.

    tokens, mask (B, T): mask is True at drawn tokens, end token included. log_p, values (B, T): log
        policy in nats, and V
    before each token. log_ratio (B, T): log policy − log p_θ. reward (B,).
    """

    tokens: Tensor
    mask: Tensor
    log_p: Tensor
    values: Tensor
    log_ratio: Tensor
    reward: Tensor


class PPOModule(WatchedModule):
    """Fine-tunes a copy of p_θ to maximise E[r(x)] − β KL(policy ‖ p_θ).

    The optimum is π*(x) ∝ p_θ(x) exp(r(x) / β), the target of DIA with λ = 1 / β. The policy starts
    from p_θ and has no dropout. The texts of step k on process i come from (seed, k, i).
    `max_steps` of the Trainer counts optimiser steps, of which every batch of texts makes epochs ×
    minibatches. Data: `RolloutData`.

    Args:
        reward: any `Reward`.
        base_lm: hub id or folder of p_θ.
        estimator: `GAE` (PPO) or `LeaveOneOut` (RLOO).
        beta: β, price of a nat of KL in units of r; 0.125 is λ = 8.
        target_kl: KL in nats a text to which β is then adapted (Ziegler et al. 2019); null: β is
            fixed.
        updates: how often each batch of texts is learned from, and how far the policy may move.
        lora_rank: train low-rank adapters of this rank (see `lora.add_adapters`) and the value head
            instead of all weights; they need a larger lr. The exported policy has them merged.
        optimizer: learning rate, its warm-up, and weight decay.
        seed: of all randomness.
    """

    beta_now: Tensor

    mend = "lower model.optimizer.lr or model.updates.gradient_clip"

    def __init__(
        self,
        reward: Reward,
        base_lm: str = "checkpoints/tiny/lm",
        estimator: Estimator = GAE(),
        beta: float = 0.125,
        target_kl: float | None = None,
        updates: Updates = Updates(),
        lora_rank: int | None = None,
        optimizer: AdamW = AdamW(lr=1e-4, weight_decay=0.0, warmup_steps=10),  # noqa: B008
        seed: int = 0,
    ) -> None:
        super().__init__()
        require("beta", beta, beta > 0, "above 0")
        fits = target_kl is None or target_kl > 0
        require("target_kl", target_kl, fits, "above 0, or null for a fixed beta")
        require("seed", seed, 0 <= seed < 1 << 32, "0 to 4294967295")
        self.automatic_optimization = False
        self.reward, self.base_lm, self.estimator = reward, base_lm, estimator
        self.beta, self.target_kl, self.updates = beta, target_kl, updates
        self.lora_rank, self.optimizer, self.seed = lora_rank, optimizer, seed
        self._cached = CachedReward(reward)
        self.lm = BaseLM.load(base_lm)
        self.policy_lm = BaseLM.load(base_lm)
        model = self.policy_lm.model
        # Adapters are put into the very model that `policy_lm` draws from.
        self.policy = (
            model.requires_grad_(True)
            if lora_rank is None
            else add_adapters(model, lora_rank, seed)
        )
        self.language_models = {"policy": self.policy_lm, "base_lm": self.lm}
        self.value_head = self._value_head() if isinstance(estimator, GAE) else None
        self.register_buffer("beta_now", torch.tensor(beta, dtype=torch.float64))

    def _value_head(self) -> nn.Linear:
        size = self._forward(torch.zeros(1, 1, dtype=torch.int64))[1].shape[-1]
        head = nn.Linear(size, 1)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return head

    def train(self, mode: bool = True) -> PPOModule:
        """Never with dropout: the ratio of an unchanged policy to itself is 1."""
        super().train(mode)
        self.policy.eval()
        return self

    def setup(self, stage: str) -> None:
        self.lm.to(self.device)

    def configure_optimizers(self) -> Any:
        total = int(min(self.trainer.estimated_stepping_batches, 1 << 60))
        return self.optimizer.configure(self.named_parameters(), total)

    @float32_default()
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Draw a batch of texts and learn from it."""
        generator = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + batch.index)
        rollout = self.roll_out(batch, generator)
        advantages, returns = self.advantages(rollout, batch)
        measured = self._measure(rollout, returns)
        updated = self._update(rollout, advantages, returns, generator)
        fine = torch.stack([*updated.values()]).isfinite().all() & (
            rollout.log_p + rollout.log_ratio
        ).isfinite().all(1)
        self.note_rows(
            {"tokens": rollout.tokens, "mask": rollout.mask, "reward": rollout.reward}, ~fine
        )
        measured |= updated
        if self.target_kl is not None:
            self.beta_now.copy_(adapted_beta(self.beta_now, measured["kl"], self.target_kl))
        shown = {"reward", "kl"}
        for name, value in measured.items():
            self.log(
                f"train/{name}", value.float(), prog_bar=name in shown, batch_size=len(batch.ids)
            )

    @torch.no_grad()
    def roll_out(self, batch: Batch, generator: torch.Generator) -> Rollout:
        """Texts of the policy for a batch of prompts, with their rewards."""
        tokens = self.policy_lm.generate(batch.tokens, batch.prompt_mask, generator)
        reward = call_reward(self._cached, reward_inputs(self.lm, tokens, batch), batch.records).to(
            self.device
        )
        mask = scored_mask(tokens, batch.prompt_mask, self.lm.end_id)
        longest = int(mask.any(0).nonzero().max()) + 1
        tokens, mask, given = tokens[:, :longest], mask[:, :longest], batch.prompt_mask[:, :longest]
        parts = [
            self.evaluate(*pair)
            for pair in zip(
                tokens.chunk(self.updates.minibatches),
                mask.chunk(self.updates.minibatches),
                strict=True,
            )
        ]
        log_p, values = (torch.cat(x) for x in zip(*parts, strict=True))
        log_ratio = log_p - self.lm.token_log_probs(tokens, given)
        return Rollout(tokens, mask, log_p, values, log_ratio, reward)

    def evaluate(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Log policy in nats of each token of `mask`, and V before it; (B, T) float32 each, 0
        elsewhere.
        """
        # Autocast keeps its bfloat16 copies of the weights for the whole step: those from before
        # the last optimiser step, and, made while texts were drawn, without gradients.
        torch.clear_autocast_cache()
        logits, hidden = self._forward(F.pad(tokens[:, :-1], (1, 0), value=self.lm.bos_id))
        log_p = -F.cross_entropy(
            logits.float().flatten(0, 1), tokens.flatten(), reduction="none"
        ).unflatten(0, tokens.shape)
        values = torch.zeros_like(log_p)
        if self.value_head is not None:
            # bfloat16 tells values apart to 1 in 256 only.
            with torch.autocast(tokens.device.type, enabled=False):
                values = self.value_head(hidden.to(self.value_head.weight.dtype))[..., 0].float()
        return torch.where(mask, log_p, 0.0), torch.where(mask, values, 0.0)

    def _forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) and last hidden states (B, T, H)."""
        out = self.policy(inputs, use_cache=False, output_hidden_states=True)
        return self.lm.with_one_end(out.logits), out.hidden_states[-1]

    def advantages(self, rollout: Rollout, batch: Batch) -> tuple[Tensor, Tensor]:
        """What an update learns from: advantages (B, T) and returns (B, T) for ppo; for rloo
        advantages (B,), no returns.
        """
        if not isinstance(self.estimator, GAE):
            group = particles_of(batch, 1)[2]
            if int(group.bincount().min()) < 2:
                raise UserError(
                    "data.n_texts: 1 given, allowed: 2 or more; LeaveOneOut compares texts of one"
                    " prompt"
                )
            scores = rollout.reward - self.beta_now * rollout.log_ratio.sum(1)
            return leave_one_out(scores, group).float(), rollout.reward.new_zeros(0)
        rewards = token_rewards(
            rollout.reward, rollout.log_ratio, rollout.mask, self.beta_now.float()
        )
        found = gae(rewards, rollout.values, rollout.mask, self.estimator.gae_lambda)
        return whiten(found, rollout.mask, self._total), found + rollout.values

    def _update(
        self, rollout: Rollout, advantages: Tensor, returns: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The optimiser steps that one batch of texts makes; means over them of what `loss`
        measures.
        """
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        length = self._total(rollout.mask.sum(1).double().mean()) / self.trainer.world_size
        seen = []
        for _ in range(self.updates.epochs):
            order = torch.randperm(len(rollout.mask), generator=generator, device=self.device)
            for rows in order.chunk(self.updates.minibatches):
                loss, measured = self.loss(rollout, advantages, returns, rows, length)
                optimizer.zero_grad()  # type: ignore[union-attr]
                self.manual_backward(loss)
                self.clip_gradients(optimizer, self.updates.gradient_clip, "norm")  # type: ignore[arg-type]
                optimizer.step()  # type: ignore[union-attr]
                scheduler.step()  # type: ignore[union-attr, call-arg]
                seen.append(measured)
        means = self._total(torch.stack(seen).double().mean(0)) / self.trainer.world_size
        return dict(zip(("clip_fraction", "value_loss"), means, strict=True))

    def loss(
        self, rollout: Rollout, advantages: Tensor, returns: Tensor, rows: Tensor, length: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss of some rows, and (2,) the share of entries whose ratio is clipped and the value
        loss.

        Args:
            length: mean number of tokens of all texts of the step. (Divided by their own, rows in a
                minibatch of short texts would count more.)
        """
        mask = rollout.mask[rows]
        log_p, values = self.evaluate(rollout.tokens[rows], mask)
        log_ratio, chosen = log_p - rollout.log_p[rows], advantages[rows]
        if not isinstance(self.estimator, GAE):
            log_ratio = log_ratio.sum(1)
            clipped = was_clipped(log_ratio, chosen, self.updates.clip).float().mean()
            return clipped_loss(log_ratio, chosen, self.updates.clip).mean(), torch.stack(
                [clipped, torch.zeros_like(clipped)]
            )
        n = (len(rows) * length).float()
        policy_loss = (
            torch.where(mask, clipped_loss(log_ratio, chosen, self.updates.clip), 0.0).sum() / n
        )
        value_loss = torch.where(mask, values - returns[rows], 0.0).square().sum() / (2 * n)
        clipped = (was_clipped(log_ratio, chosen, self.updates.clip) & mask).sum() / n
        return (
            policy_loss + self.estimator.value_coef * value_loss,
            torch.stack([clipped, value_loss]).detach(),
        )

    def _measure(self, rollout: Rollout, returns: Tensor) -> dict[str, Tensor]:
        """Means over the texts of all processes: r, KL to p_θ and entropy in nats a text, tokens
        a text; β; R² of V.
        """
        values = (
            rollout.reward,
            rollout.log_ratio.sum(1),
            -rollout.log_p.sum(1),
            rollout.mask.sum(1),
        )
        sums = self._total(torch.stack([torch.ones_like(rollout.reward), *values]).double().sum(1))
        found = dict(zip(("reward", "kl", "entropy", "tokens"), sums[1:] / sums[0], strict=True))
        found["beta"] = self.beta_now.clone()
        if self.value_head is not None:
            found["explained_variance"] = explained_variance(
                returns, rollout.values, rollout.mask, self._total
            )
        return found

    def _total(self, x: Tensor) -> Tensor:
        """The sum of `x` over all processes."""
        total = self.trainer.strategy.reduce(x, reduce_op="sum")
        assert isinstance(total, Tensor)
        return total

    def export(self, folder: Path) -> None:
        """Write the policy and its tokenizer in transformers' format, loadable as `base_lm`.

        The sampler `BaseModel` samples it, with this folder as `policy` and the `label` ppo.
        """
        policy = self.policy if self.lora_rank is None else merged(self.policy)
        policy.save_pretrained(folder)
        self.policy_lm.tokenizer.save_pretrained(folder)
