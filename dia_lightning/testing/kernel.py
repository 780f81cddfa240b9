"""A kernel's laws, from exact draws of its target."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.samplers import Models, Move
from dia_lightning.sampling.state import Kernel, State, start
from dia_lightning.target import TargetDensity, terms_of
from dia_lightning.testing.law import exact_law, misfit
from dia_lightning.testing.table import TableReward, table_lm

_LAM = 1.5


class KernelError(ValueError):
    """A kernel broke one of its laws; the message names the law and what was found."""


def check_kernel(
    kernel: Kernel | Move, state: State | None = None, generator: torch.Generator | None = None,
    steps: int = 5, n_errors: float = 5.0,
) -> None:  # fmt: skip
    """Run a kernel from exact draws of its target through the laws that samplers rely on; returns
    if all hold.

    The laws: 'prompts stay'; 'rejected means unchanged'; 'no NaN'; 'cache', the state's terms are
    the target's own; and 'invariance': a kernel that leaves π invariant leaves every mean as it is,
    so the means of log p_θ, of the reward and of the number of distinct tokens change by less than
    `n_errors` standard errors of the paired change (at 5, a right kernel fails with probability
    2e-6; a wrong one passes if its bias is smaller than the error of these means).

    A move without a `state` is tried on `table_lm()` at λ = 1.5, from 8,000 exact draws, half of
    them with a prompt; there 'invariance' also is a χ² test of each half against π (false-alarm
    rate 10⁻⁴).

    Args:
        kernel: with a `target`; or a move that needs no network.
        state: at exact draws of the target, 100 or more, such as `kernel.init(lm.generate(…),
            lam=zeros)` for λ = 0.
        generator: of all randomness; by default one with seed 0.
        steps: how many are made.

    Raises:
        KernelError: naming the law.
        ValueError: for fewer than 100 chains, for a kernel without a state, or for a move that
            needs networks or comes with a state.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    if isinstance(kernel, Move):
        if state is not None:
            raise ValueError("state: given with a move, allowed: none; or the kernel of the move")
        _check_on_table(kernel, generator, steps, n_errors)
        return
    if state is None:
        raise ValueError("state: none given, needed for a kernel; allowed without: a move")
    _check_laws(kernel, state, generator, steps, n_errors)


def _check_on_table(move: Move, generator: torch.Generator, steps: int, n_errors: float) -> None:
    if needed := sorted(move.needs(_LAM)):
        raise ValueError(
            f"check_kernel: {type(move).__name__} needs {', '.join(needed)}; give its kernel, made"
            " with them, and a state"
        )
    lm = table_lm()
    reward, batch = TableReward(lm), lm.batch(["", "a"] * 4000)
    models = Models(
        lm, TokenEmbedding(lm.embedding_table(), len(lm.tokenizer)), None, None, reward, _LAM
    )
    laws, tokens = [exact_law(lm, reward, _LAM, prompt) for prompt in ("", "a")], batch.tokens
    for i, law in enumerate(laws):
        tokens[i::2] = law.draw(len(tokens) // 2, generator)
    target = TargetDensity(lm, reward, _LAM, batch)
    state = start(target, tokens, batch.prompt_mask)
    state = _check_laws(move.kernel(models, target), state, generator, steps, n_errors)
    for i, law in enumerate(laws):
        if wrong := misfit(law, state.tokens[i::2], 1e-4 / 2):
            raise KernelError(f"law 'invariance': after {steps} steps from exact draws, {wrong}")


def _check_laws(
    kernel: Kernel, state: State, generator: torch.Generator, steps: int, n_errors: float
) -> State:
    """The state after the steps, if all laws hold."""
    if len(state.tokens) < 100:
        raise ValueError(f"state: at least 100 chains are needed, got {len(state.tokens)}")
    first, before = state, _features(state)
    for _ in range(steps):
        new, info = kernel.step(state, generator)
        if info.log_ratio.isnan().any():
            raise KernelError("law 'no NaN': a log ratio is NaN; make it −inf")
        changed = (new.tokens != state.tokens).any(1)
        if (changed & ~info.accepted).any():
            raise KernelError(
                "law 'rejected means unchanged': a rejected move has changed the tokens"
            )
        state = new
    if not torch.equal(state.tokens[first.prompt_mask], first.tokens[first.prompt_mask]):
        raise KernelError("law 'prompts stay': a token of a prompt has changed")
    target: Any = kernel.target  # type: ignore[attr-defined]
    fresh = terms_of(target, state.tokens)
    for name, cached, own in zip(fresh._fields, (state.log_base, state.reward), fresh, strict=True):
        if not torch.allclose(cached, own, atol=1e-3, rtol=1e-4):
            raise KernelError(
                f"law 'cache': {name} differs from the target's own by"
                f" {(cached - own).abs().max().item():g}"
            )
    for name, values in _features(state).items():
        change = values - before[name]
        error = (change.std() / len(change) ** 0.5).clamp_min(1e-9)
        if not abs(change.mean()) <= n_errors * error:
            raise KernelError(
                f"law 'invariance': the mean of {name} went from {before[name].mean():.4f} to"
                f" {values.mean():.4f} in {steps} steps, {abs(change.mean() / error):.1f} standard"
                f" errors, allowed are {n_errors}"
            )
    return state


def _features(state: State) -> dict[str, Tensor]:
    ordered = state.tokens.sort(1).values
    distinct = (ordered.diff(dim=1) != 0).sum(1).double()
    return {
        "log p": state.log_base,
        "reward": state.reward,
        "the number of distinct tokens": distinct,
    }
