"""`check_kernel` on right and wrong kernels, of a language model and of the table."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.schedule import make_schedule
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.rewards import Keyword
from dia_lightning.samplers import BaseModel, DenoiseAccept, Models, Move, Suffix
from dia_lightning.sampling.denoise_accept import DenoiserDrafts
from dia_lightning.sampling.drafts import SuffixDrafts
from dia_lightning.sampling.ensemble import Drafts, EnsembleKernel
from dia_lightning.sampling.positions import Spans
from dia_lightning.sampling.state import Info, State
from dia_lightning.target import TargetDensity
from dia_lightning.testing import check_kernel
from dia_lightning.testing.kernel import KernelError


@pytest.fixture
def suffix(lm: BaseLM) -> EnsembleKernel:
    target = TargetDensity(lm, Keyword(["good", "food", "e"]), 0.0)
    return EnsembleKernel(target, SuffixDrafts(lm))


def draws(lm: BaseLM, n: int) -> torch.Tensor:
    empty = torch.full((n, 8), lm.end_id)
    return lm.generate(
        empty, torch.zeros_like(empty, dtype=torch.bool), torch.Generator().manual_seed(0)
    )


def test_right_kernels_pass(lm: BaseLM, embedding: TokenEmbedding, suffix: EnsembleKernel) -> None:
    """2,000 exact draws; a right kernel fails with probability 6e-6."""
    tokens, generator = draws(lm, 2000), torch.Generator().manual_seed(1)
    check_kernel(suffix, suffix.init(tokens), generator)
    table = embedding.weight.T

    def proposal(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return z @ table * 0.3

    schedule = make_schedule("cosine")
    drafts = DenoiserDrafts(proposal, embedding, schedule, Spans(2), (0.5, 0.8), 2, lm.end_id)
    kernel = EnsembleKernel(suffix.target, drafts)
    state = kernel.init(tokens)
    check_kernel(kernel, state, generator, steps=3)
    new, info = kernel.step(state, generator)
    assert 0.02 < float(info.accepted.double().mean()) < 1
    assert bool((new.tokens != tokens).any())


def test_wrong_kernels_are_named(lm: BaseLM, suffix: EnsembleKernel) -> None:
    class Forgets(EnsembleKernel):
        def step(self, state: State, generator: torch.Generator) -> tuple[State, Info]:
            new, info = super().step(state, generator)
            return new._replace(log_base=state.log_base), info

    class Lies(EnsembleKernel):
        def step(self, state: State, generator: torch.Generator) -> tuple[State, Info]:
            new, info = super().step(state, generator)
            return new, info._replace(accepted=torch.zeros_like(info.accepted))

    class Drifts(EnsembleKernel):
        def step(self, state: State, generator: torch.Generator) -> tuple[State, Info]:
            new, info = super().step(state, generator)
            worse = new.log_base < state.log_base
            rows = [
                torch.where(worse.reshape(-1, *[1] * (a.ndim - 1)), b, a)
                for a, b in zip(new[:5], state[:5], strict=True)
            ]
            return State(*rows), info._replace(accepted=info.accepted & ~worse)

    tokens, generator = draws(lm, 2000), torch.Generator().manual_seed(1)
    for wrong, law in (
        (Forgets, "cache"),
        (Lies, "rejected means unchanged"),
        (Drifts, "invariance"),
    ):
        kernel = wrong(suffix.target, suffix.proposal)
        with pytest.raises(KernelError, match=law):
            check_kernel(kernel, kernel.init(tokens), generator)
    with pytest.raises(ValueError, match="100 chains"):
        check_kernel(suffix, suffix.init(tokens[:50]), generator)


@dataclass(frozen=True)
class Fresh(Move):
    """Proposes a text of p_θ; with `trust` 1 its ratio is right, with 0 it accepts always."""

    trust: float = 1.0
    keeps_prompts: bool = True

    def kernel(self, models: Models, target: TargetDensity) -> Any:
        return EnsembleKernel(target, FreshDrafts(self, models, target))


class FreshDrafts(NamedTuple):
    move: Fresh
    models: Models
    target: TargetDensity

    def __call__(self, state: State, n: int, generator: torch.Generator) -> Drafts:
        batch = self.target.batch
        assert batch is not None
        if not self.move.keeps_prompts:
            batch = self.models.lm.batch([""] * len(state.tokens))  # type: ignore[attr-defined]
        tokens: Tensor = BaseModel().draw(self.models, batch, generator).tokens
        log_base, reward = self.target.terms(tokens)
        doubt = (1 - self.move.trust) * state.lam
        log_q = [state.log_base + doubt * state.reward, log_base + doubt * reward]
        return Drafts(tokens[:, None], torch.stack(log_q, 1))


@pytest.mark.parametrize("move", [Suffix(), Fresh()])
def test_right_moves_pass(move: Move) -> None:
    check_kernel(move)


@pytest.mark.parametrize(
    ("move", "law"),
    [
        (Fresh(trust=0.0), "invariance"),
        (Fresh(trust=0.7), "invariance"),
        (Fresh(trust=-1.0), "invariance"),
        (Fresh(keeps_prompts=False), "prompts stay"),
    ],
)
def test_wrong_moves_are_named(move: Move, law: str) -> None:
    """One that accepts always, one that trusts the reward too little, one of the wrong sign, and
    one that forgets the prompts.
    """
    with pytest.raises(KernelError, match=law):
        check_kernel(move)


def test_what_a_move_needs_is_asked_for(suffix: EnsembleKernel, lm: BaseLM) -> None:
    with pytest.raises(ValueError, match="DenoiseAccept needs denoiser; give its kernel"):
        check_kernel(DenoiseAccept())
    with pytest.raises(ValueError, match="state: none given, needed for a kernel"):
        check_kernel(suffix)
    with pytest.raises(ValueError, match="state: given with a move"):
        check_kernel(Suffix(), suffix.init(draws(lm, 100)))
