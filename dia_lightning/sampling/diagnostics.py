"""How far chains have come: effective sample size, R-hat and autocorrelation time, by
arviz-stats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dia_lightning.sampling.resampling import log_mean_exp


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


def log_z_reverse(reward: Tensor, lam: float) -> Tensor:
    """−log (1/M) Σ_m exp(−λ r(x_m)) of M draws of π: above log Z in expectation, as log Ẑ of an
    annealed population is below. No bound of a single run: either may lie on the other side.

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
