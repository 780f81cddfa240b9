"""Several particles for each text: populations of the texts that share a prompt."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dia_lightning.sampling.resampling import RESAMPLING, effective_size
from dia_lightning.types import Prompts


def crowd_of(batch: Prompts, particles: int) -> tuple[Prompts, int, Tensor]:
    """The particles' prompts, `particles` a text, one population after the other, a population for the texts that share a
    prompt; the number of populations; the population of each text (B,).
    """
    # Texts of one prompt share its record; records that merely look alike are told apart by their prompts or not at all.
    keys = [(prompt, id(record) if record else 0) for prompt, record in zip(batch.prompts, batch.records, strict=True)]
    distinct = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    group = torch.tensor([distinct[key] for key in keys], device=batch.tokens.device)
    first = torch.tensor([keys.index(key) for key in distinct], device=batch.tokens.device)
    size = particles * int(group.bincount().max())
    rows = first.repeat_interleave(size)
    return replace(rows_of(batch, rows), ids=list(range(len(rows)))), len(distinct), group


def rows_of(batch: Prompts, rows: Tensor) -> Prompts:
    """The prompts numbered `rows` (N,), which may name one several times."""
    chosen = rows.tolist()
    return replace(
        batch, ids=[batch.ids[i] for i in chosen], prompts=[batch.prompts[i] for i in chosen],
        tokens=batch.tokens[rows], prompt_mask=batch.prompt_mask[rows], records=[batch.records[i] for i in chosen],
    )  # fmt: skip


def pick(group: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """(B,) one particle for each text, no particle twice: a random one of its population of `size`."""
    n_groups = int(group.max()) + 1
    order = torch.rand(n_groups, size, generator=generator, device=group.device).argsort(1)
    # The number of a text among those of its population.
    place = (group[:, None] == group).tril(-1).sum(1)
    return group * size + order[group, place]


def pick_by_weight(log_w: Tensor, resampling: str, group: Tensor, generator: torch.Generator) -> Tensor:
    """(B,) a particle for each text, from its population (G, M) resampled in proportion to exp(log_w)."""
    size = log_w.shape[1]
    start = size * torch.arange(len(log_w), device=log_w.device)[:, None]
    return (RESAMPLING[resampling](log_w, generator) + start).flatten()[pick(group, size, generator)]


def weight_diagnostics(log_z: Tensor, log_w: Tensor, roots: Tensor, resampled: Tensor) -> dict[str, Tensor]:
    """By population, (G,) each: log Z; of its size, the effective share of the final weights (`ess`) and the share of the
    starting points `roots` (G, M) that it still descends from; the number of resamplings (`resampled`).
    """
    share = torch.zeros_like(log_w).scatter(1, roots, 1.0).mean(1)
    return {"log_z": log_z, "ess": effective_size(log_w) / log_w.shape[1], "roots": share, "resampled": resampled}
