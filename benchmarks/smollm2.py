"""SmolLM2's denoiser: how often its spans are accepted, and its own texts (make results-smollm2
fills docs/results.md).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.theory import fill, table
from dia_lightning.data import Reading
from dia_lightning.data.prompts import PromptData
from dia_lightning.data.samples import ModelSamples
from dia_lightning.diffusion.denoiser import DenoiserNetwork
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.schedule import Schedule
from dia_lightning.guidance import LogValue
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.rewards import LocalToxicity, VaderSentiment, WeightedSum
from dia_lightning.samplers import BaseModel, Diffusion, GuidedSamplerModule, Sampler
from dia_lightning.samplers.networks import (
    DenoiserProposal,
    embedding_for,
    load_denoiser,
    load_value,
)
from dia_lightning.sampling.denoise_accept import DenoiserDrafts, Tilt
from dia_lightning.sampling.ensemble import EnsembleKernel
from dia_lightning.sampling.positions import Spans
from dia_lightning.target import TargetDensity
from dia_lightning.types import Batch

DOC, KIT = ROOT / "docs" / "results.md", ROOT / "checkpoints" / "smollm2"
LENGTHS, LEVELS, LAM, TILT, CHAINS = (1, 2, 4, 8), (0.5, 1.0), 8.0, 10.0, 32
TILT_LEVEL = 0.4
STEPS, STAGGER = 64, 40.0


class Unigram:
    """A proposal that knows how often p_θ writes each token, and the noised token itself, but no
    context.
    """

    def __init__(self, counts: Tensor, embedding: TokenEmbedding, schedule: Schedule) -> None:
        self.log_p = (counts.float() + 0.1).log()
        self.embedding, self.schedule = embedding, schedule

    def at(self, z: Tensor, t: Tensor, index: Tensor) -> Tensor:
        """Log p(v) + (α/σ²) ⟨z_i, E(v)⟩ at positions `index` (B, K): (B, K, V)."""
        rows = torch.arange(len(z))[:, None]
        alpha, sigma = (
            part(t[rows, index])[..., None] for part in (self.schedule.alpha, self.schedule.sigma)
        )
        return (
            self.log_p
            + (alpha / sigma.square().clamp_min(1e-2)) * z[rows, index] @ self.embedding.weight.T
        )

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        return self.at(z, t, torch.arange(z.shape[1]).expand(z.shape[:2]))


def questions() -> Batch:
    """The questions of the comparison, in one batch."""
    work = PromptData(
        "smollm2", str(KIT / "prompts.txt"),
        reading=Reading(
            template="user\n{prompt}<|im_end|>\n<|im_start|>assistant\n", limit=CHAINS
        ), n_texts=1,
        batch_size=CHAINS, max_length=48, reward_sees_prompt=False,
    )  # fmt: skip
    work.setup("predict")
    return work.batch(0)


def unigram_counts(lm: BaseLM) -> Tensor:
    """(V,) how often each token is in the samples on which the denoiser was trained."""
    seen = ModelSamples(
        "smollm2", 3968, 128, 64, prompts=str(KIT / "prompts_train.jsonl"), shard_size=128
    )
    seen.prepare_data()
    seen.setup("fit")
    rows = seen.train_rows[list(range(len(seen.train_rows)))]
    return rows["tokens"][~rows["prompt_mask"]].bincount(minlength=lm.vocab_size)


def spans(lm: BaseLM, network: DenoiserNetwork, value: LogValue, batch: Batch) -> str:
    """The table of acceptance rates: one step of each kernel from p_θ's own texts."""
    embedding, reward = (
        network.embedding,
        WeightedSum([VaderSentiment(), LocalToxicity()], name="kindness"),
    )
    begin = lm.generate(batch.tokens, batch.prompt_mask, torch.Generator().manual_seed(0))
    unigram = Unigram(unigram_counts(lm), embedding, network.schedule)
    columns = {
        "unigram, λ = 0": (unigram, 0.0, None),
        "denoiser, λ = 0": (DenoiserProposal(network), 0.0, None),
        f"denoiser, λ = {LAM:g}": (DenoiserProposal(network), LAM, None),
        f"the same, tilt {TILT:g}": (DenoiserProposal(network), LAM, value),
    }
    rows = []
    for length in LENGTHS:
        for level in LEVELS:
            rows.append([str(length), f"{level:g}"])
            for proposal, lam, critic in columns.values():
                target, schedule = TargetDensity(lm, reward, lam, batch), network.schedule
                time, tilt_time = schedule.warp(torch.tensor([level, TILT_LEVEL])).tolist()
                drafts = DenoiserDrafts(
                    proposal, embedding, schedule, Spans(length), [time], length, lm.end_id,
                    Tilt(critic, TILT, tilt_time) if critic else None,
                )  # fmt: skip
                kernel = EnsembleKernel(target, drafts)
                state = kernel.init(begin, batch.prompt_mask)
                new, info = kernel.step(state, torch.Generator().manual_seed(length))
                changed = (new.tokens != state.tokens).any(1).float().mean()
                rows[-1].append(
                    f"{100 * float(info.accepted.float().mean()):.0f} % /"
                    f" {100 * float(changed):.0f} %"
                )
            print(rows[-1], flush=True)
    return table(["span (tokens, one a round)", "level u", *columns], rows)


def unguided(lm: BaseLM, batch: Batch) -> str:
    """Mean log p_θ per token of the denoiser's own texts beside p_θ's, and five of them."""
    diffusion = Diffusion(steps=STEPS, stagger=STAGGER)
    samplers: dict[str, Sampler] = {"p_θ": BaseModel(), "the denoiser": diffusion}
    lines = []
    for name, sampler in samplers.items():
        module = GuidedSamplerModule(
            VaderSentiment(), sampler, base_lm="smollm2", denoiser=str(KIT / "denoiser"), lam=0.0,
            compare_base=False,
        )  # fmt: skip
        (drawn,) = module.predict_step(batch)
        own = ~batch.prompt_mask & (drawn.tokens != lm.end_id)
        log_p = lm.log_prob(drawn.tokens, batch.prompt_mask).sum() / (own.sum() + len(own))
        texts = lm.decode(drawn.tokens[:5], batch.prompt_mask[:5])
        head = f"{name}: {float(log_p):.2f} nats per token over {len(own)} texts"
        lines += [
            f"**{head}**",
            "",
            *(f"- {json.dumps(text, ensure_ascii=False)}" for text in texts),
            "",
        ]
        print(head, flush=True)
    return "\n".join(lines).rstrip()


def main() -> None:
    lm = BaseLM.load("smollm2")
    embedding = embedding_for(lm)
    network = load_denoiser(str(KIT / "denoiser"), embedding, lm)
    value = load_value(str(KIT / "critic"), embedding, "kindness", LAM, lm)
    batch = questions()
    with torch.autocast("cpu", torch.bfloat16):
        found = {"unguided": unguided(lm, batch), "spans": spans(lm, network, value, batch)}
    made = (
        f"Accepted / text changed; {CHAINS} chains from p_θ's texts, one step, seed 0, by"
        " `benchmarks/smollm2.py`."
    )
    text = fill(DOC.read_text(encoding="utf-8"), "spans", f"{found['spans']}\n\n{made}")
    DOC.write_text(fill(text, "unguided", found["unguided"]), encoding="utf-8")


if __name__ == "__main__":
    main()
