"""Zero-shot: samples of p_θ itself, the base line of every figure; or of another language model, seen by p_θ."""

from __future__ import annotations

import torch

from dia_lightning.data.samples import tokenizer_content
from dia_lightning.lm import BaseLM
from dia_lightning.resources import UserError
from dia_lightning.sampling.base import Drawn, SamplerModule
from dia_lightning.types import Prompts, Reward


class ZeroShotModule(SamplerModule):
    """Draws from p_θ; with the defaults from exactly p_θ.

    A fine-tuned policy is sampled as `base_lm` with p_θ as `reference`: its texts are then scored under p_θ, like those of
    every other method.

    Args:
        base_lm: hub id or folder of the model that is sampled.
        reward: the reward to report.
        temperature: of the next-token distribution. top_k: keep the k likeliest tokens, 0 = all.
        top_p: keep the likeliest tokens that together have this probability, 1 = all.
        reference: hub id or folder of p_θ where that is another model; it must have the same tokenizer.
        method: name in the outputs; with a reference the policy's own, for example `ppo`.
        compare_base: sample p_θ for the same prompts too and report both.
        shard_base_lm: each of several processes keeps a part of p_θ only, as for `GuidedSamplerModule`.
        seed: of all randomness.
    """

    method = "zero_shot"

    def __init__(
        self,
        reward: Reward,
        base_lm: str = "checkpoints/tiny/lm",
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        reference: str | None = None,
        method: str = "zero_shot",
        compare_base: bool = False,
        shard_base_lm: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(base_lm if reference is None else reference, reward, compare_base, seed, shard_base_lm)
        if temperature <= 0 or top_k < 0 or not 0 < top_p <= 1:
            raise UserError(
                f"--model.init_args: temperature {temperature}, top_k {top_k}, top_p {top_p} given; allowed: "
                "temperature above 0, top_k 0 or more, 0 < top_p ≤ 1"
            )
        if not method or (reference is not None) == (method == "zero_shot"):
            allowed = "zero_shot without a reference, with one another name, for example ppo"
            raise UserError(f"--model.init_args.method: {method!r} given, allowed: {allowed}")
        if shard_base_lm and reference is not None:
            raise UserError("--model.init_args.shard_base_lm: true given, but a reference is a second model")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.base_lm, self.reference, self.method = base_lm, reference, method
        self.sampled = self.lm
        if reference is not None:
            self.sampled = BaseLM.load(base_lm)
            self.language_models["policy"] = self.sampled
            self.network = self.sampled.model  # a part of the module: it moves along, and the run's hash is made of it
            if tokenizer_content(self.sampled.tokenizer) != tokenizer_content(self.lm.tokenizer):
                raise UserError(f"--model.init_args.reference: {reference} has another tokenizer than base_lm, {base_lm}")

    def draw(self, batch: Prompts, generator: torch.Generator) -> Drawn:
        settings = self.temperature, self.top_k, self.top_p
        if self.reference is None:
            return self.draw_base(batch, generator, *settings)
        with torch.autocast(self.device.type, enabled=False):
            tokens = self.sampled.generate(batch.tokens, batch.prompt_mask, generator, *settings)
        return Drawn(tokens)

    def trained_parts(self) -> dict[str, str]:
        return {} if self.reference is None else {"policy": self.base_lm}
