"""Several particles for each text: populations of the texts that share a prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from dia_lightning.types import Prompts


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
