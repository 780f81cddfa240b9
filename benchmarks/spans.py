"""How often spans that SmolLM2's denoiser proposes are accepted, by length, level and tilt (make results-smollm2)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.theory import fill, table
from dia_lightning.data.prompts import PromptData
from dia_lightning.data.samples import ModelSamples
from dia_lightning.diffusion.schedule import Schedule
from dia_lightning.embedding import TokenEmbedding
from dia_lightning.lm import BaseLM
from dia_lightning.rewards import LocalToxicity, VaderSentiment, WeightedSum
from dia_lightning.sampling.loading import embedding_for, load_denoiser, load_value
from dia_lightning.sampling.moves import Moves, make_kernels
from dia_lightning.sampling.proposal import DenoiserProposal
from dia_lightning.target import TargetDensity

DOC, KIT = ROOT / "docs" / "results.md", ROOT / "checkpoints" / "smollm2"
LENGTHS, LEVELS, LAM, CHAINS, STEPS = (1, 2, 4, 8), (0.5, 0.8, 1.0), 8.0, 64, 2


class Unigram:
    """A proposal that knows how often p_θ writes each token, and the noised token itself, but no context."""

    def __init__(self, counts: Tensor, embedding: TokenEmbedding, schedule: Schedule) -> None:
        self.log_p = (counts.float() + 0.1).log()
        self.embedding, self.schedule = embedding, schedule

    def at(self, z: Tensor, t: Tensor, index: Tensor) -> Tensor:
        """Log p(v) + (α/σ²) ⟨z_i, E(v)⟩ at positions `index` (B, K): (B, K, V)."""
        rows = torch.arange(len(z))[:, None]
        alpha, sigma = (part(t[rows, index])[..., None] for part in (self.schedule.alpha, self.schedule.sigma))
        return self.log_p + (alpha / sigma.square().clamp_min(1e-2)) * z[rows, index] @ self.embedding.weight.T

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        return self.at(z, t, torch.arange(z.shape[1]).expand(z.shape[:2]))


def settings() -> Iterator[tuple[str, bool, float, float]]:
    """(Name, from the denoiser, λ, κ) of the columns."""
    yield "unigram, λ = 0", False, 0.0, 0.0
    yield "denoiser, λ = 0", True, 0.0, 0.0
    yield f"denoiser, λ = {LAM:g}", True, LAM, 0.0
    yield "the same, tilt 10", True, LAM, 10.0


def main() -> None:
    lm = BaseLM.load("smollm2")
    embedding = embedding_for(lm)
    network = load_denoiser(str(KIT / "denoiser"), embedding, lm)
    reward = WeightedSum([VaderSentiment(), LocalToxicity()], name="kindness")
    value = load_value(str(KIT / "critic"), embedding, reward.name, LAM, lm)
    work = PromptData(
        "smollm2", str(KIT / "prompts.txt"), template="user\n{prompt}<|im_end|>\n<|im_start|>assistant\n",
        limit=CHAINS, n_texts=1, batch_size=CHAINS, max_length=48, reward_sees_prompt=False,
    )  # fmt: skip
    work.setup("predict")
    batch, generator = work.batch(0), torch.Generator().manual_seed(0)
    begin = lm.generate(batch.tokens, batch.prompt_mask, generator)
    seen = ModelSamples("smollm2", 3968, 128, 64, prompts=str(KIT / "prompts_train.jsonl"), shard_size=128)
    seen.setup("fit")
    rows_seen = seen.train_rows[list(range(len(seen.train_rows)))]
    text = rows_seen["tokens"][~rows_seen["prompt_mask"]]
    unigram = Unigram(text.bincount(minlength=lm.vocab_size), embedding, network.schedule)
    rows = []
    for length in LENGTHS:
        for level in LEVELS:
            row = [str(length), f"{level:g}"]
            for _, trained, lam, tilt in settings():
                proposal = DenoiserProposal(network) if trained else unigram
                target = TargetDensity(lm, reward, lam, batch)
                moves = Moves(size=length, rounds=length, levels=[level], tilt=tilt)
                critic = value if tilt else None
                [kernel] = make_kernels("denoise_accept", moves, target, proposal, embedding, network.schedule, critic)
                state = kernel.init(begin, batch.prompt_mask)  # type: ignore[attr-defined]
                accepted, changed = 0.0, 0.0
                for _ in range(STEPS):
                    new, info = kernel.step(state, generator)
                    accepted += float(info.accepted.float().mean()) / STEPS
                    changed += float((new.tokens != state.tokens).any(1).float().mean()) / STEPS
                    state = new
                row.append(f"{100 * accepted:.0f} % / {100 * changed:.0f} %")
            rows.append(row)
            print(row, flush=True)
    head = ["span (tokens, one a round)", "level u", *(name for name, *_ in settings())]
    made = f"Accepted / text changed. Made by `benchmarks/spans.py`: {CHAINS} chains from p_θ's texts, {STEPS} steps, seed 0."
    DOC.write_text(fill(DOC.read_text(encoding="utf-8"), "spans", f"{table(head, rows)}\n\n{made}"), encoding="utf-8")


if __name__ == "__main__":
    main()
