"""Classifier-free guidance: the reverse diffusion of a denoiser that was trained with labels of the reward."""

from __future__ import annotations

import math

import torch

from dia_lightning.guidance import classifier_free
from dia_lightning.sampling.base import Drawn, SamplerModule, check, check_stagger
from dia_lightning.sampling.decode import draw_texts
from dia_lightning.sampling.loading import embedding_for, load_labelled
from dia_lightning.sampling.solvers import SOLVERS
from dia_lightning.types import Prompts, Reward


class ClassifierFreeModule(SamplerModule):
    """Draws texts by the score of p(z|y) (p(z|y) / p(z))^w, y a class of the reward (Ho and Salimans, arXiv:2207.12598).

    At w = 0 the target is p_θ given that the reward lies in that class. For larger w these are the scores of no diffusion
    process: what the texts then follow is not known, only that they show more of the label and are less diverse.

    Args:
        reward: whose classes the labels are; reported.
        base_lm: hub id or folder of p_θ; scores the texts.
        denoiser: checkpoint (folder or `.ckpt`) of a denoiser for base_lm with labels of `reward`
            (`DenoiserModule.label_reward`).
        label: 1 to the number of labels, the class of the highest reward, which is the default.
        scale: w; 0 = the labelled denoiser as it is, −1 = without the label.
        sampler: the solver: `ancestral`, `ddim`, `dpmpp_2m`, `dia` or `dia_literal`, with its own defaults.
        steps: noise levels each text passes. stagger: how far left positions run ahead of right ones (see `staggered`).
        temperature: of the denoiser's token distribution; 1 = as trained.
        compare_base: sample p_θ for the same prompts too and report both.
        shard_base_lm: each of several processes keeps a part of p_θ only, as for `GuidedSamplerModule`.
        seed: of all randomness.
    """

    method = "classifier_free"

    def __init__(
        self,
        reward: Reward,
        base_lm: str = "checkpoints/tiny/lm",
        denoiser: str = "checkpoints/tiny_labelled/denoiser",
        label: int | None = None,
        scale: float = 1.0,
        sampler: str = "ancestral",
        steps: int = 64,
        stagger: float = 40.0,
        temperature: float = 1.0,
        compare_base: bool = True,
        shard_base_lm: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(base_lm, reward, compare_base, seed, shard_base_lm)
        check("scale", scale, -1 <= scale < math.inf, "-1 or more, finite")
        check("sampler", sampler, sampler in SOLVERS, ", ".join(SOLVERS))
        check("steps", steps, steps >= 1, "1 or more")
        check_stagger(stagger)
        check("temperature", temperature, temperature > 0, "above 0")
        self.denoiser, self.label, self.scale, self.sampler = denoiser, label, scale, sampler
        self.steps, self.stagger, self.temperature = steps, stagger, temperature
        self.embedding = embedding_for(self.lm, denoiser)
        self.denoiser_network, n_labels = load_labelled(denoiser, self.embedding, reward.name, self.lm)
        check("label", label, label is None or 1 <= label <= n_labels, f"1 to {n_labels}, or null for {n_labels}")
        self._y = n_labels if label is None else label

    def draw(self, batch: Prompts, generator: torch.Generator) -> Drawn:
        network = self.denoiser_network
        tokens = draw_texts(
            classifier_free(network, self.embedding, self._y, self.scale, self.temperature), batch, self.embedding,
            network.schedule, self.lm.end_id, generator, self.sampler, self.steps, self.stagger,
        )  # fmt: skip
        return Drawn(tokens)
