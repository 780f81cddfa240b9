"""How far chains have come (effective sample size, R-hat and autocorrelation time, by
arviz-stats), and a kernel's laws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dia_lightning.sampling.denoise_accept import Kernel, State
from dia_lightning.sampling.resampling import log_mean_exp
from dia_lightning.target import terms_of


def chain_diagnostics(values: Tensor) -> dict[str, float]:
    """Diagnostics of a scalar followed along chains.

    Args:
        values: (S, B), S steps of B chains of one target, started independently.

    Returns:
        `ess` (bulk effective sample size of all S · B values), `rhat` (rank-normalised split R̂;
        Vehtari et al., arXiv:1903.08008, eq. 4 and section 4), `autocorrelation` (integrated
        autocorrelation time in steps, S · B / ess). NaN where S < 4 or B < 2, or where all values
        are one.
    """
    n_steps, n_chains = values.shape
    if n_steps < 4 or n_chains < 2 or bool((values == values[0, 0]).all()):
        return {"ess": torch.nan, "rhat": torch.nan, "autocorrelation": torch.nan}
    from arviz_stats.base import array_stats

    chains = values.T.double().cpu().numpy()
    ess = float(array_stats.ess(chains, chain_axis=0, draw_axis=1))
    rhat = float(array_stats.rhat(chains, chain_axis=0, draw_axis=1))
    return {"ess": ess, "rhat": rhat, "autocorrelation": n_steps * n_chains / ess}


def log_z_upper(reward: Tensor, lam: float) -> Tensor:
    """−log (1/M) Σ_m exp(−λ r(x_m)) of M draws of π: above log Z in expectation, as log Ẑ of an
    annealed population is below.

    From 1/Z = E_π[exp(−λ r)] and Jensen's inequality (Grosse et al., arXiv:1511.02543, the reverse
    bound, in one step). reward (…, M) → (…,).
    """
    return -log_mean_exp(-lam * reward)


def by_prompt(prompts: Sequence[str], traces: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`chain_diagnostics` of the chains that share a prompt, (B,) each, named `ess_<name>`,
    `rhat_<name>` and so on.

    Args:
        prompts: of the B chains. traces: (S, B) by name. `ess` is given per chain, so that it adds
            up over texts.
    """
    out: dict[str, Tensor] = {}
    for name, trace in traces.items():
        for prompt in dict.fromkeys(prompts):
            rows = torch.tensor([other == prompt for other in prompts])
            for kind, value in chain_diagnostics(trace.cpu()[:, rows]).items():
                column = out.setdefault(
                    f"{kind}_{name}", torch.zeros(len(prompts), dtype=torch.float64)
                )
                column[rows] = value / int(rows.sum()) if kind == "ess" else value
    return out


class KernelError(ValueError):
    """A kernel broke one of its laws; the message names the law and what was found."""


def check_kernel(
    kernel: Kernel, state: State, generator: torch.Generator, steps: int = 5, n_errors: float = 5.0
) -> None:
    """Run a kernel from exact draws of its target through the laws that samplers rely on; returns
    if all hold.

    The laws: 'prompts stay'; 'rejected means unchanged'; 'no NaN'; 'cache', the state's terms are
    the target's own; and 'invariance': a kernel that leaves π invariant leaves every mean as it is,
    so the means of log p_θ, of the reward and of the number of distinct tokens change by less than
    `n_errors` standard errors of the paired change (at 5, a right kernel fails with probability
    2e-6; a wrong one passes if its bias is smaller than the error of these means).

    Args:
        kernel: with a `target`. state: at exact draws, such as `kernel.init(lm.generate(…),
            lam=zeros)` for λ = 0.
        steps: how many are made.

    Raises:
        KernelError: naming the law.
        ValueError: for fewer than 100 chains.
    """
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


def _features(state: State) -> dict[str, Tensor]:
    ordered = state.tokens.sort(1).values
    distinct = (ordered.diff(dim=1) != 0).sum(1).double()
    return {
        "log p": state.log_base,
        "reward": state.reward,
        "the number of distinct tokens": distinct,
    }
