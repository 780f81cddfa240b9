"""SamplerModule: what DIA and every baseline have in common, so that their figures can be compared."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from dia_lightning.cost import Meter, Metered, difference, networks_of, peak_memory_mib, reset_peak_memory, weights_of
from dia_lightning.diffusion.adapted import AdaptedTrunk
from dia_lightning.finite import NotFinite, named_rows
from dia_lightning.lm import BaseLM
from dia_lightning.precision import KeepsBuffers, float32_default
from dia_lightning.resources import UserError
from dia_lightning.rewards import CachedReward, call_reward
from dia_lightning.rewards.base import reported_names
from dia_lightning.sampling.resampling import LAM_MAX
from dia_lightning.sampling.sharded import ShardedBaseLM
from dia_lightning.target import own_texts, whole_texts
from dia_lightning.types import Cost, Generations, Prompts, Reward, scored_mask


class Drawn(NamedTuple):
    """What a method drew for a batch.

    tokens: (B, T) int64 in canonical form. accept_rate: (B,) share of accepted moves of a method that has them.
    diagnostics: further figures by name, one a text (B,).
    """

    tokens: Tensor
    accept_rate: Tensor | None = None
    diagnostics: dict[str, Tensor] | None = None


Draw = Callable[[Prompts, torch.Generator], Drawn]


def check(option: str, value: object, ok: bool, allowed: str) -> None:
    """Raises the UserError of an option of the model unless `ok`."""
    if not ok:
        raise UserError(f"--model.init_args.{option}: {value} given, allowed: {allowed}")


def check_lam(lam: float) -> None:
    """λ is 0 or more, and λ r a number for every r that float32 can hold."""
    check("lam", lam, 0 <= lam <= LAM_MAX, f"0 or more, up to {LAM_MAX:g}")


def check_stagger(stagger: float) -> None:
    """From 0, all positions together, up to where float32 still tells the times of positions apart."""
    check("stagger", stagger, 0 <= stagger <= 1e4, "0 or more, up to 10000")


class SamplerModule(KeepsBuffers, L.LightningModule):
    """`predict_step` draws texts with `draw`, scores them under p_θ and the reward, and times the drawing.

    Every constructor argument is kept under its own name (the run's hash is made of them). All randomness of a batch comes
    from (seed, batch index), so that neither the number of processes nor a restart changes a text.

    With `shard_base_lm` each of several processes keeps a part of p_θ only (see `ShardedBaseLM`).
    """

    method = ""

    def __init__(self, base_lm: str, reward: Reward, compare_base: bool, seed: int, shard_base_lm: bool = False) -> None:
        super().__init__()
        check("seed", seed, 0 <= seed < 1 << 32, "0 to 4294967295")
        reported_names(reward)
        self.base_lm, self.reward, self.compare_base, self.seed = base_lm, reward, compare_base, seed
        self.shard_base_lm = shard_base_lm
        self._sharded: ShardedBaseLM | None = None
        self.lm = BaseLM.load(base_lm)
        self._cached = CachedReward(reward)
        self.language_models = {"base_lm": self.lm}

    def draw(self, batch: Prompts, generator: torch.Generator) -> Drawn:
        """Texts for a batch of prompts, with all randomness from `generator`."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Move p_θ to the device, and share it out where that is asked for.

        Raises:
            UserError: if it cannot be shared out.
        """
        if self.shard_base_lm and self._sharded is None:
            if any(isinstance(part, AdaptedTrunk) for part in self.modules()):
                raise UserError(
                    "--model.init_args.shard_base_lm: true given, but denoiser or critic adapt p_θ's own blocks "
                    "(adapter_rank), which they read whole; allowed: false"
                )
            self._sharded = ShardedBaseLM(self.lm, self.device, self.trainer.world_size)
        self.lm.to(self.device)

    def finish(self) -> None:
        """Wait until all processes have drawn their texts, and run what they need of a shared p_θ meanwhile."""
        if self._sharded is not None:
            self._sharded.serve()

    def teardown(self, stage: str) -> None:
        self.finish()

    @float32_default()
    def predict_step(self, batch: Prompts, batch_idx: int = 0) -> list[Generations]:
        """The method's texts, and with `compare_base` as many samples of p_θ for the same prompts."""
        warm = batch_idx > 0
        generations = [self._generate(batch, self.draw, self.method, 0, warm)]
        if self.compare_base:
            generations.append(self._generate(batch, self.draw_base, "zero_shot", 1, warm))
        return generations

    def test_step(self, batch: Prompts, batch_idx: int = 0) -> Any:
        """The same; the figures are made by `PredictionWriter`."""
        return {"generations": self.predict_step(batch, batch_idx)}

    def draw_base(
        self, batch: Prompts, generator: torch.Generator, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
    ) -> Drawn:
        """Samples of p_θ, with the defaults of exactly p_θ, in its own precision whatever the trainer's."""
        with torch.autocast(self.device.type, enabled=False):
            tokens = self.lm.generate(batch.tokens, batch.prompt_mask, generator, temperature, top_k, top_p)
        return Drawn(tokens)

    def _generate(self, batch: Prompts, draw: Draw, method: str, stream: int, warm: bool) -> Generations:
        try:
            return self._generated(batch, draw, method, stream, warm)
        except NotFinite as error:
            if self._trainer is not None:
                given = {"tokens": batch.tokens, "prompt_mask": batch.prompt_mask, "ids": torch.tensor(batch.ids)}
                error.complete(f"{method} batch {batch.index}", self._trainer.default_root_dir, given)
            raise

    def _generated(self, batch: Prompts, draw: Draw, method: str, stream: int, warm: bool) -> Generations:
        generator = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + 2 * batch.index + stream)
        reset_peak_memory(self.device)
        before, start = self._spent(), self._now()
        drawn = draw(batch, generator)
        latency_s, costs = self._now() - start, difference(self._spent(), before)
        peak_memory = peak_memory_mib(self.device)
        tokens = drawn.tokens
        keep = scored_mask(tokens, batch.prompt_mask, self.lm.end_id)
        texts = own_texts(self.lm, tokens, batch)
        whole = whole_texts(self.lm, texts, batch)
        seen = whole if batch.whole else texts
        reward = call_reward(self._cached, seen, batch.records)
        parts: Any = getattr(self.reward, "parts", None)
        # In p_θ's own precision, whatever the trainer's: these numbers are compared between runs.
        with torch.autocast(self.device.type, enabled=False):
            log_p = self.lm.log_prob(tokens, batch.prompt_mask).cpu()
        # −inf is a text that p_θ cannot write.
        if wrong := [i for i, value in enumerate(log_p.tolist()) if not value < math.inf]:
            raise NotFinite(f"log p_θ of the text is NaN or infinite in {named_rows(wrong, len(log_p))}")
        return Generations(
            index=batch.index, ids=batch.ids, prompts=batch.prompts, texts=texts, tokens=tokens.cpu(),
            log_p=log_p, n_tokens=keep.sum(1).cpu(),
            rewards=parts(seen, batch.records) if parts else {self.reward.name: reward}, reward=reward,
            method=method, seed=self.seed, latency_s=latency_s, warm=warm, costs=costs,
            peak_memory_mib=peak_memory, seen=[] if seen == texts else seen,
            canonical=self.lm.is_canonical(tokens, batch.prompt_mask, whole),
            accept_rate=None if drawn.accept_rate is None else drawn.accept_rate.cpu(),
            diagnostics={name: values.cpu() for name, values in (drawn.diagnostics or {}).items()},
        )  # fmt: skip

    @cached_property
    def _meter(self) -> Meter:
        meter = Meter()
        for name, lm in self.language_models.items():
            meter.watch(name, lm.multiplied())
        meter.watch_all(self)
        for network in networks_of(self.reward):
            meter.watch("reward", [(network, weights_of(network))])
        return meter

    def _spent(self) -> dict[str, Cost]:
        spent = self._meter.read()
        return spent | {"reward": spent.get("reward", Cost())._replace(calls=self._cached.n_asked)}

    def trained_parts(self) -> dict[str, str]:
        """The paths of the networks that were trained for this, by name."""
        names = {part.network_name for part in self.modules() if isinstance(part, Metered)}
        return {name: getattr(self, name) for name in sorted(names)}

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
