"""GuidedSamplerModule: aligned text as `predict_step`, by whichever sampler it is given."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch

from dia_lightning.data.samples import tokenizer_content
from dia_lightning.diffusion.trunk import NetworkSize
from dia_lightning.errors import UserError, renamed, require
from dia_lightning.files import find_path
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.lm.loaded import as_base_lm
from dia_lightning.meter import (
    Meter,
    Metered,
    difference,
    networks_of,
    peak_memory_mib,
    reset_peak_memory,
    weights_of,
)
from dia_lightning.numerics import KeepsBuffers, NotFinite, float32_default, named_rows
from dia_lightning.rewards.base import CachedReward, call_reward, reported_names
from dia_lightning.rewards.function import as_reward
from dia_lightning.samplers.annealed import Annealed
from dia_lightning.samplers.base import Drawn, Models, Sampler, draw_base
from dia_lightning.samplers.networks import embedding_for, load_denoiser, load_labelled, load_value
from dia_lightning.samplers.sharded import ShardedBaseLM
from dia_lightning.sampling.resampling import LAM_MAX
from dia_lightning.target import completions, fillings, whole_texts
from dia_lightning.types import Batch, Cost, Generations, Reward, has_blanks, scored_mask

_LOG = logging.getLogger(__name__)
Draw = Callable[[Batch, torch.Generator], Drawn]


class GuidedSamplerModule(KeepsBuffers, L.LightningModule):
    """Draws from π(x) ∝ p_θ(x) exp(λ r(x)), or by a baseline, and reports all of them alike.

    `predict_step` draws texts with the sampler, scores them under p_θ and the reward, and times the
    drawing. All randomness of a batch comes from (seed, batch index), so that neither the number of
    processes nor a restart changes a text.

    Args:
        reward: Reward r to aim at: a class, on the command line FILE.py:NAME, in Python a function
            of texts too.
        sampler: Method by which texts are drawn.
        base_lm: Base model p_θ: hub id, folder, `.gguf` file or `smollm2`. The data uses it too.
            In Python a loaded model too, as `(model, tokenizer)` or a `BaseLM`.
        denoiser: Denoiser of base_lm (folder or `.ckpt`), where the sampler needs one; null = the
            one beside base_lm in its kit.
        critic: Critic trained on the reward (folder or `.ckpt`), where the sampler needs one; null
            = the one beside base_lm.
        lam: λ, inverse temperature of the reward, 0 or more; 0 = p_θ itself. `BaseModel`, `BestOfN`
            unweighted and classifier-free guidance do not use it.
        alpha: α of the power target p_θ^α exp(λ r), above 0; 1 = p_θ itself. Above 1 likely texts
            become likelier. Exact samplers only.
        compare_base: Sample p_θ for the same prompts too and report both.
        shard_base_lm: Keep a part of p_θ's blocks in each process, for a p_θ too large for one GPU
            (see docs/scaling.md). Not with networks that adapt those blocks.
        seed: Seed of all randomness, 0 to 4294967295.

    Attributes:
        keeps_faults: whether a batch in which NaN arises is put into a file in the trainer's
            folder.
    """

    keeps_faults = True

    def __init__(
        self,
        reward: Reward,
        sampler: Sampler = Annealed(),  # noqa: B008 (frozen)
        base_lm: str = "checkpoints/tiny/lm",
        denoiser: str | None = None,
        critic: str | None = None,
        lam: float = 6.0,
        alpha: float = 1.0,
        compare_base: bool = True,
        shard_base_lm: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require("seed", seed, 0 <= seed < 1 << 32, "0 to 4294967295")
        require("lam", lam, 0 <= lam <= LAM_MAX, f"0 or more, up to {LAM_MAX:g}")
        fits = alpha == 1 or (sampler.powers and 0 < alpha < math.inf)
        require("alpha", alpha, fits, _alphas(sampler))
        reward = as_reward(reward)
        reported_names(reward)
        self._sharded: ShardedBaseLM | None = None
        self.lm = as_base_lm(base_lm)
        self.base_lm = base_lm = base_lm if isinstance(base_lm, str) else self.lm.name
        self.reward, self.lam, self.compare_base, self.seed = reward, lam, compare_base, seed
        self.alpha = alpha
        self.shard_base_lm = shard_base_lm
        self._cached = CachedReward(reward)
        self.denoiser, self.critic = denoiser, critic
        self.sampler = sampler
        self.method = self.sampler.method
        self.models = self._load_networks()
        self.sampler.check(self.models)

    def _load_networks(self) -> Models:
        """What the sampler needs, as parts of this module: they move along and the run's hash is
        made of them.
        """
        needed = self.sampler.needs(self.lam)
        denoiser = self._path("denoiser") if "denoiser" in needed else None
        critic = self._path("critic") if "critic" in needed else None
        embedding = embedding_for(self.lm, denoiser, critic)
        network, n_labels, value = None, 0, None
        if denoiser is not None and "labels" in needed:
            network, n_labels = load_labelled(denoiser, embedding, self.reward.name, self.lm)
        elif denoiser is not None:
            network = load_denoiser(denoiser, embedding, self.lm)
        if critic is not None:
            value = load_value(critic, embedding, self.reward.name, self.lam, self.lm)
        self.embedding, self.denoiser_network, self.value = embedding, network, value
        policy = self._load_policy()
        self.language_models = {"base_lm": self.lm} | ({"policy": policy} if policy else {})
        return Models(
            self.lm, embedding, network, value, self._cached, self.lam, n_labels, policy, self.alpha
        )

    def _path(self, name: str) -> str:
        path: str | None = getattr(self, name) or _beside(self.base_lm, name)
        if path is None:
            sampler = type(self.sampler).__name__
            raise UserError(
                f"{name}: none given, needed for the sampler {sampler} with these parts at λ ="
                f" {self.lam:g}"
            )
        setattr(self, name, path)
        return path

    def _load_policy(self) -> BaseLM | None:
        path = self.sampler.policy
        if path is None:
            return None
        if self.shard_base_lm:
            raise UserError("shard_base_lm: true given, allowed: false; a policy is a second model")
        with renamed(base_lm="policy"):
            policy = BaseLM.load(path)
        self.policy_network = policy.model
        if tokenizer_content(policy.tokenizer) != tokenizer_content(self.lm.tokenizer):
            raise UserError(
                f"policy: {path} given, allowed: a model with the tokenizer of base_lm,"
                f" {self.base_lm}"
            )
        return policy

    def draw(self, batch: Batch, generator: torch.Generator) -> Drawn:
        """Texts for a batch of prompts, with all randomness from `generator`."""
        if batch.elastic is not None and not isinstance(self.sampler, Annealed):
            raise UserError(
                f"prompts: a [blank] of any length given, but {type(self.sampler).__name__} has one"
                " for each text; allowed: the sampler Annealed, or blanks such as [blank:3]"
            )
        return self.sampler.draw(self.models, batch, generator)

    def draw_base(self, batch: Batch, generator: torch.Generator) -> Drawn:
        """Samples of p_θ, given both sides of a blank."""
        if has_blanks(batch):
            plain = self.sampler if isinstance(self.sampler, Annealed) else Annealed()
            return plain.draw(self.models._replace(lam=0.0, alpha=1.0), batch, generator)
        return draw_base(self.lm, batch, generator)

    def setup(self, stage: str) -> None:
        """Move p_θ to the device, and share it out where that is asked for.

        Raises:
            UserError: if it cannot be shared out.
        """
        if self.shard_base_lm and self._sharded is None:
            sizes = [getattr(part, "size", None) for part in self.modules()]
            if any(size.needs_lm for size in sizes if isinstance(size, NetworkSize)):
                raise UserError(
                    "shard_base_lm: true given, allowed: false; denoiser or critic adapt p_θ's own"
                    " blocks (adapter_rank) or read them (trunk infiller), which are then whole"
                )
            self._sharded = ShardedBaseLM(self.lm, self.device, self.trainer.world_size)
        self.lm.to(self.device)

    def finish(self) -> None:
        """Wait until all processes have drawn their texts, and run what they need of a shared
        p_θ meanwhile.
        """
        if self._sharded is not None:
            self._sharded.serve()

    def teardown(self, stage: str) -> None:
        self.finish()

    @float32_default()
    def predict_step(self, batch: Batch, batch_idx: int = 0) -> list[Generations]:
        """The method's texts, and with `compare_base` as many samples of p_θ for the same
        prompts.
        """
        warm = batch_idx > 0
        generations = [self._generate(batch, self.draw, self.method, 0, warm)]
        if self.compare_base:
            generations.append(self._generate(batch, self.draw_base, "zero_shot", 1, warm))
        return generations

    def test_step(self, batch: Batch, batch_idx: int = 0) -> Any:
        """The same; the figures are made by `PredictionWriter`."""
        return {"generations": self.predict_step(batch, batch_idx)}

    def _generate(
        self, batch: Batch, draw: Draw, method: str, stream: int, warm: bool
    ) -> Generations:
        try:
            return self._generated(batch, draw, method, stream, warm)
        except NotFinite as error:
            if self.keeps_faults and self._trainer is not None:
                given = {
                    "tokens": batch.tokens,
                    "prompt_mask": batch.prompt_mask,
                    "ids": torch.tensor(batch.ids),
                }
                error.complete(
                    f"{method} batch {batch.index}", self._trainer.default_root_dir, given
                )
            raise

    def _generated(
        self, batch: Batch, draw: Draw, method: str, stream: int, warm: bool
    ) -> Generations:
        generator = torch.Generator(self.device).manual_seed(
            self.seed * 1_000_003 + 2 * batch.index + stream
        )
        reset_peak_memory(self.device)
        before, start = self._spent(), self._now()
        drawn = draw(batch, generator)
        latency_s, costs = self._now() - start, difference(self._spent(), before)
        peak_memory = peak_memory_mib(self.device)
        tokens, given = drawn.tokens, drawn.prompt_mask
        given = batch.prompt_mask if given is None else given
        keep = scored_mask(tokens, batch.prompt_mask, self.lm.end_id)
        texts = completions(self.lm, tokens, batch)
        whole = whole_texts(self.lm, texts, batch)
        seen = whole if batch.whole else texts
        reward = call_reward(self._cached, seen, batch.records)
        parts: Any = getattr(self.reward, "parts", None)
        # In p_θ's own precision, whatever the trainer's: these numbers are compared between runs.
        with torch.autocast(self.device.type, enabled=False):
            log_p = self.lm.log_prob(tokens, batch.prompt_mask).cpu()
        # −inf is a text that p_θ cannot write.
        if wrong := [i for i, value in enumerate(log_p.tolist()) if not value < math.inf]:
            raise NotFinite(
                f"log p_θ of the text is NaN or infinite in {named_rows(wrong, len(log_p))}"
            )
        return Generations(
            index=batch.index, ids=batch.ids, prompts=batch.prompts, texts=texts,
            tokens=tokens.cpu(), log_p=log_p, n_tokens=keep.sum(1).cpu(),
            rewards=parts(seen, batch.records) if parts else {self.reward.name: reward},
            reward=reward, method=method, seed=self.seed, latency_s=latency_s, warm=warm,
            costs=costs, peak_memory_mib=peak_memory, seen=[] if seen == texts else seen,
            canonical=self.lm.is_canonical(tokens, batch.prompt_mask, whole),
            fills=fillings(self.lm, tokens, given, batch),
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
        policy = {} if self.sampler.policy is None else {"policy": self.sampler.policy}
        return {name: getattr(self, name) for name in sorted(names)} | policy

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _beside(base_lm: str, part: str) -> str | None:
    """The denoiser or critic of the kit that `base_lm` belongs to, where there is one."""
    folder = (
        Path("checkpoints", base_lm, part) if base_lm == "smollm2" else Path(base_lm).parent / part
    )
    is_kit = base_lm == "smollm2" or Path(base_lm).name == "lm"
    return str(folder) if is_kit and find_path(folder) is not None else None


def _alphas(sampler: Sampler) -> str:
    return "above 0" if sampler.powers else f"1 with {type(sampler).__name__}"
