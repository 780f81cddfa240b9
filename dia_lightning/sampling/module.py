"""GuidedSamplerModule: the reward-guided reverse process as `predict_step`."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dia_lightning.critic.network import CriticNetwork
from dia_lightning.diffusion.checkpoint import read_network
from dia_lightning.diffusion.denoiser import DenoiserNetwork, NetworkSize
from dia_lightning.diffusion.schedule import make_schedule
from dia_lightning.embedding import TokenEmbedding
from dia_lightning.guidance import Predict, guided, unguided
from dia_lightning.resources import UserError
from dia_lightning.sampling.base import Drawn, SamplerModule
from dia_lightning.sampling.decode import draw_texts
from dia_lightning.sampling.denoise_accept import start as initial_state
from dia_lightning.sampling.diagnostics import by_prompt
from dia_lightning.sampling.moves import REFINE, Moves, check_refine, make_kernels
from dia_lightning.sampling.population import cycle
from dia_lightning.sampling.proposal import DenoiserProposal
from dia_lightning.sampling.solvers import SOLVERS
from dia_lightning.target import TargetDensity
from dia_lightning.types import Prompts, Reward

N = TypeVar("N", bound=nn.Module)


class GuidedSamplerModule(SamplerModule):
    """Draws from π(x) ∝ p_θ(x) exp(λ r(x)), approximately, by guided diffusion (science.md, "Reverse process").

    Args:
        base_lm: hub id or folder of p_θ; scores the texts.
        denoiser: checkpoint (folder or `.ckpt`) of a denoiser trained for base_lm.
        critic: checkpoint of a critic trained on `reward`; needed unless lam is 0.
        reward: the true reward, for the report.
        sampler: `dia` (predictor and Langevin corrector) or `ancestral`.
        lam: λ, inverse temperature of the reward; 0 = unguided.
        steps: noise levels each text passes.
        stagger: how far left positions run ahead of right ones; 0 = all positions together (see `staggered`).
        corrector_steps: Langevin steps at each level, for `dia`. eta: their size η, relative to σ².
        guidance_scale: factor on λ ∇h; 1 = science.md's score. A critic's gradient at one point falls far short of what
            exchanging a token changes (on the tiny kit some fifteen times), which larger values make up for.
        guidance_cap: longest guidance gradient per token (see `guided`).
        guidance_window: noise levels u between which guidance acts, 0 = clean, 1 = noise.
        temperature: of the denoiser's token distribution; 1 = as trained.
        initial: `diffusion`, or `base_lm` to refine samples of p_θ instead.
        refine: exact moves that follow: `denoise_accept`, `suffix`, both in turn (`cycle`) or `none`. refine_steps: how many
            rounds of them. moves: options of denoise_accept.
        final: tokens are drawn (`sample`) or the likeliest (`argmax`) where a position becomes clean.
        compare_base: sample p_θ for the same prompts too and report both.
        seed: of all randomness.
    """

    def __init__(
        self,
        reward: Reward,
        base_lm: str = "checkpoints/tiny/lm",
        denoiser: str = "checkpoints/tiny/denoiser",
        critic: str | None = "checkpoints/tiny/critic",
        sampler: str = "dia",
        lam: float = 4.0,
        steps: int = 64,
        stagger: float = 4.0,
        corrector_steps: int = 1,
        eta: float = 0.1,
        guidance_scale: float = 1.0,
        guidance_cap: float = 100.0,
        guidance_window: tuple[float, float] = (0.0, 1.0),
        temperature: float = 1.0,
        final: str = "sample",
        initial: str = "diffusion",
        refine: str = "none",
        refine_steps: int = 20,
        moves: Moves | None = None,
        compare_base: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(base_lm, reward, compare_base, seed)
        _check("sampler", sampler, sampler in SOLVERS, ", ".join(SOLVERS))
        _check("final", final, final in ("sample", "argmax"), "sample, argmax")
        _check("initial", initial, initial in ("diffusion", "base_lm"), "diffusion, base_lm")
        _check("refine_steps", refine_steps, refine_steps >= 0, "0 or more")
        check_refine(refine, denoiser)
        _check("lam", lam, lam >= 0, "0 or more")
        _check("steps", steps, steps >= 1, "1 or more")
        _check("stagger", stagger, stagger >= 0, "0 or more")
        _check("corrector_steps", corrector_steps, corrector_steps >= 0, "0 or more")
        _check("eta", eta, 0 <= eta <= 1, "0 ≤ eta ≤ 1")
        _check("temperature", temperature, temperature > 0, "above 0")
        _check("guidance_scale", guidance_scale, guidance_scale > 0, "above 0")
        _check("guidance_cap", guidance_cap, guidance_cap > 0, "above 0")
        self.denoiser, self.critic, self.sampler, self.lam, self.steps = denoiser, critic, sampler, lam, steps
        self.stagger, self.corrector_steps, self.eta = stagger, corrector_steps, eta
        self.guidance_scale, self.guidance_cap, self.guidance_window = guidance_scale, guidance_cap, guidance_window
        self.temperature, self.final, self.method = temperature, final, sampler
        self.initial, self.refine, self.refine_steps, self.moves = initial, refine, refine_steps, moves or Moves()
        self.embedding = TokenEmbedding(self.lm.embedding_table(), len(self.lm.tokenizer))
        self.denoiser_network = load_denoiser(denoiser, self.embedding)
        self.critic_network: CriticNetwork | None
        self._critic_scale: float
        self.critic_network, self._critic_scale = load_value(critic, self.embedding, reward, lam) if lam else (None, 0.0)

    def predictor(self) -> Predict:
        """The denoiser, guided where λ > 0."""
        predict = unguided(self.denoiser_network, self.embedding, self.temperature)
        critic = self.critic_network
        if critic is None:
            return predict
        schedule = self.denoiser_network.schedule

        def log_value(z: Tensor, t: Tensor) -> Tensor:
            return self._critic_scale * self.guidance_scale * critic(z, t)

        return guided(predict, log_value, schedule, self.embedding, self.guidance_cap, self.guidance_window)

    def draw(self, batch: Prompts, generator: torch.Generator) -> Drawn:
        start = self.draw_base(batch, generator) if self.initial == "base_lm" else self._diffuse(batch, generator)
        return start if self.refine == "none" or not self.refine_steps else self._refined(start, batch, generator)

    def _diffuse(self, batch: Prompts, generator: torch.Generator) -> Drawn:
        corrected = self.sampler == "dia"
        options: dict[str, Any] = {"corrector_steps": self.corrector_steps, "eta": self.eta} if corrected else {}
        tokens = draw_texts(
            self.predictor(), batch, self.embedding, self.denoiser_network.schedule, self.lm.end_id, generator,
            self.sampler, self.steps, self.stagger, self.final == "sample", **options,
        )  # fmt: skip
        calls = self.steps * (1 + options.get("corrector_steps", 0))
        return Drawn(tokens, {"denoiser": calls} | ({"critic": calls} if self.critic_network is not None else {}))

    def _refined(self, start: Drawn, batch: Prompts, generator: torch.Generator) -> Drawn:
        """Exact moves from where the diffusion (or p_θ) ended, with what they tell of their convergence."""
        target = TargetDensity(self.lm, self._cached, self.lam, batch)
        network = self.denoiser_network
        proposal = DenoiserProposal(network)
        kernels = make_kernels(self.refine, self.moves, target, proposal, self.embedding, network.schedule)
        state = initial_state(target, start.tokens, batch.prompt_mask)
        state, followed = cycle(kernels, state, self.refine_steps, generator)
        names, n = REFINE[self.refine], len(batch.ids)
        nfe = {name: calls // n for name, calls in target.calls.items()}
        nfe["base_lm"] += names.count("suffix") * self.refine_steps * start.tokens.shape[1]
        nfe["denoiser"] = names.count("denoise_accept") * self.refine_steps * 2 * self.moves.rounds
        nfe = {name: nfe.get(name, 0) + start.nfe.get(name, 0) for name in {**start.nfe, **nfe}}
        diagnostics = {f"accept_{name}": rate for name, rate in zip(names, followed.accepted, strict=True)}
        diagnostics |= by_prompt(batch.prompts, {"reward": followed.reward, "log_p": followed.log_base})
        return Drawn(state.tokens, nfe, followed.accepted.mean(0), diagnostics)


def load_denoiser(path: str, embedding: TokenEmbedding) -> DenoiserNetwork:
    """The denoiser at `path` (folder or `.ckpt`), frozen, for use with `embedding`.

    Raises:
        UserError: if it is missing, damaged, no denoiser, or made for another base model.
    """
    settings, weights = read_network(path, "denoiser", "--model.init_args.denoiser", embedding.fingerprint())
    schedule, size = make_schedule(settings["schedule"]), NetworkSize(**settings["size"])
    network = DenoiserNetwork(embedding, schedule, size, settings["tied_head"])
    return _frozen(network, weights, "--model.init_args.denoiser", path)


def load_critic(path: str, embedding: TokenEmbedding) -> tuple[CriticNetwork, dict[str, Any]]:
    """The critic at `path` (folder or `.ckpt`), frozen, and its settings; errors as for `load_denoiser`."""
    settings, weights = read_network(path, "critic", "--model.init_args.critic", embedding.fingerprint())
    network = CriticNetwork(embedding.dim, make_schedule(settings["schedule"]), NetworkSize(**settings["size"]))
    return _frozen(network, weights, "--model.init_args.critic", path), settings


def load_value(path: str | None, embedding: TokenEmbedding, reward: Reward, lam: float) -> tuple[CriticNetwork, float]:
    """The critic at `path` and the factor that makes it a log-value of λ r: λ, or 1 where it learned log E[exp(λ r) | z_t].

    Raises:
        UserError: as for `load_critic`; if there is none, or it was trained on another reward or, `soft`, for another λ.
    """
    if path is None:
        raise UserError("--model.init_args.critic: none given, needed for --model.init_args.lam above 0")
    network, settings = load_critic(path, embedding)
    if settings["reward"] != reward.name:
        raise UserError(
            f"--model.init_args.critic: {path} was trained on the reward {settings['reward']!r}, the reward is {reward.name!r}"
        )
    soft = settings["objective"] == "soft"
    if soft and settings["lam"] != lam:
        raise UserError(f"--model.init_args.lam: {lam} given, but the soft critic {path} was trained for {settings['lam']}")
    return network, 1.0 if soft else lam


def _frozen(network: N, weights: dict[str, Tensor], option: str, path: str) -> N:
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{option}: {path} does not fit its own config.json ({str(error).splitlines()[-1].strip()})") from error
    return network.eval().requires_grad_(False)


def _check(option: str, value: object, ok: bool, allowed: str) -> None:
    if not ok:
        raise UserError(f"--model.init_args.{option}: {value} given, allowed: {allowed}")
