"""How far chains have come: effective sample size, R-hat and autocorrelation time (arviz-stats)."""

from __future__ import annotations

import torch
from torch import Tensor


def chain_diagnostics(values: Tensor) -> dict[str, float]:
    """Diagnostics of a scalar followed along chains.

    Args:
        values: (S, B), S steps of B chains of one target, started independently.

    Returns:
        `ess` (bulk effective sample size of all S · B values), `rhat` (rank-normalised split R̂; Vehtari et al.,
        arXiv:1903.08008, eq. 4 and section 4), `autocorrelation` (integrated autocorrelation time in steps, S · B / ess).
        NaN where S < 4 or B < 2.
    """
    n_steps, n_chains = values.shape
    if n_steps < 4 or n_chains < 2:
        return {"ess": torch.nan, "rhat": torch.nan, "autocorrelation": torch.nan}
    from arviz_stats.base import array_stats

    chains = values.T.double().cpu().numpy()
    ess = float(array_stats.ess(chains, chain_axis=0, draw_axis=1))
    rhat = float(array_stats.rhat(chains, chain_axis=0, draw_axis=1))
    return {"ess": ess, "rhat": rhat, "autocorrelation": n_steps * n_chains / ess}
