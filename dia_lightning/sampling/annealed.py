"""AnnealedSamplerModule: an annealed population with exact moves as `predict_step`."""

from __future__ import annotations

import torch
from torch import Tensor

from dia_lightning.embedding import TokenEmbedding
from dia_lightning.resources import UserError
from dia_lightning.sampling.base import Drawn, SamplerModule
from dia_lightning.sampling.module import load_denoiser
from dia_lightning.sampling.moves import REFINE, Moves, check_refine, make_kernels
from dia_lightning.sampling.population import anneal, cycle
from dia_lightning.sampling.proposal import DenoiserProposal
from dia_lightning.target import TargetDensity
from dia_lightning.types import Prompts, Reward


class AnnealedSamplerModule(SamplerModule):
    """Draws from π(x) ∝ p_θ(x) exp(λ r(x)) by an annealed population (see `population.anneal`), asymptotically exactly.

    The texts of a batch that share a prompt are drawn from one population of `particles` times their number.

    Args:
        reward: r, any.
        base_lm: hub id or folder of p_θ.
        denoiser: checkpoint of a denoiser for base_lm; needed for the move `denoise_accept`.
        lam: λ, inverse temperature of the reward; 0 = p_θ itself.
        particles: size of the population per text.
        ess: each rise of λ keeps this share of effective particles.
        refine: exact moves: `suffix`, `denoise_accept`, both in turn (`cycle`) or `none`.
        moves: options of denoise_accept.
        steps_per_level: rounds of moves at each temperature. refine_steps: further rounds at λ.
        compare_base: sample p_θ for the same prompts too and report both.
        seed: of all randomness.
    """

    method = "annealed"

    def __init__(
        self,
        reward: Reward,
        base_lm: str = "checkpoints/tiny/lm",
        denoiser: str | None = "checkpoints/tiny/denoiser",
        lam: float = 6.0,
        particles: int = 4,
        ess: float = 0.5,
        refine: str = "cycle",
        moves: Moves | None = None,
        steps_per_level: int = 1,
        refine_steps: int = 1,
        compare_base: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(base_lm, reward, compare_base, seed)
        limits = {"lam": lam >= 0, "particles": particles >= 1, "ess": 0 < ess < 1}
        limits |= {"steps_per_level": steps_per_level >= 0, "refine_steps": refine_steps >= 0}
        for name, ok in limits.items():
            if not ok:
                allowed = {"ess": "between 0 and 1", "particles": "1 or more"}.get(name, "0 or more")
                raise UserError(f"--model.init_args.{name}: {locals()[name]} given, allowed: {allowed}")
        self.lam, self.particles, self.ess = lam, particles, ess
        self.steps_per_level, self.refine_steps = steps_per_level, refine_steps
        self.denoiser, self.refine, self.moves = denoiser, refine, moves or Moves()
        self.embedding = TokenEmbedding(self.lm.embedding_table(), len(self.lm.tokenizer))
        needs_denoiser = check_refine(refine, denoiser)
        self.denoiser_network = load_denoiser(denoiser or "", self.embedding) if needs_denoiser else None

    def draw(self, batch: Prompts, generator: torch.Generator) -> Drawn:
        crowd, n_groups, group = crowd_of(batch, self.particles)
        with torch.autocast(self.device.type, enabled=False):
            tokens = self.lm.generate(crowd.tokens, crowd.prompt_mask, generator)
        target = TargetDensity(self.lm, self._cached, self.lam, crowd)
        network = self.denoiser_network
        proposal = None if network is None else DenoiserProposal(network)
        schedule = None if network is None else network.schedule
        kernels = make_kernels(self.refine, self.moves, target, proposal, self.embedding, schedule)
        state, log_z, trace = anneal(
            target, kernels, tokens, crowd.prompt_mask, n_groups, generator, self.ess, self.steps_per_level
        )
        state, followed = cycle(kernels, state, self.refine_steps, generator)
        chosen = pick(group, len(tokens) // n_groups, generator)
        rates = followed.accepted if self.refine_steps else trace.accepted.mean(0)[:, None].expand(-1, len(tokens))
        rates = rates[:, chosen]
        diagnostics = {"log_z": log_z[group], "temperatures": torch.full_like(log_z[group], len(trace.lam))}
        diagnostics |= {f"accept_{name}": rate for name, rate in zip(REFINE[self.refine], rates, strict=True)}
        rounds = self.refine_steps + self.steps_per_level * len(trace.lam)
        nfe = self._nfe(target, len(tokens) // len(batch.ids), len(batch.ids), rounds, tokens.shape[1])
        return Drawn(state.tokens[chosen], nfe, rates.mean(0) if len(rates) else None, diagnostics)

    def _nfe(self, target: TargetDensity, particles: int, n_texts: int, rounds: int, length: int) -> dict[str, int]:
        """Network evaluations per text: p_θ scores every proposal, and draws samples and suffixes token by token."""
        names = REFINE[self.refine]
        nfe = {"base_lm": target.calls["base_lm"] // n_texts + particles * length * (1 + rounds * names.count("suffix"))}
        nfe["reward"] = target.calls["reward"] // n_texts
        if "denoise_accept" in names:
            nfe["denoiser"] = particles * 2 * self.moves.rounds * rounds
        return nfe


def crowd_of(batch: Prompts, particles: int) -> tuple[Prompts, int, Tensor]:
    """The particles' prompts, `particles` a text, one population after the other, a population for the texts that share a
    prompt; the number of populations; the population of each text (B,).
    """
    distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(batch.prompts))}
    group = torch.tensor([distinct[prompt] for prompt in batch.prompts], device=batch.tokens.device)
    first = torch.tensor([batch.prompts.index(prompt) for prompt in distinct], device=batch.tokens.device)
    size = particles * int(group.bincount().max())
    rows = first.repeat_interleave(size)
    prompts = [batch.prompts[i] for i in rows.tolist()]
    crowd = Prompts(batch.index, list(range(len(rows))), prompts, batch.tokens[rows], batch.prompt_mask[rows])
    return crowd, len(distinct), group


def pick(group: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """(B,) one particle for each text, no particle twice: a random one of its population of `size`."""
    n_groups = int(group.max()) + 1
    order = torch.rand(n_groups, size, generator=generator, device=group.device).argsort(1)
    # The number of a text among those of its population.
    place = (group[:, None] == group).tril(-1).sum(1)
    return group * size + order[group, place]
