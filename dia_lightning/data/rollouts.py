"""Prompts without end, for training on what a model draws."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from dia_lightning.data.prompts import PromptData, Reading
from dia_lightning.data.rows import prompt_rows
from dia_lightning.errors import UserError
from dia_lightning.types import Batch, Record, has_blank


class _Rollouts:
    """The batches that one process draws, from the one after the last of the run that it
    continues; it never ends.
    """

    def __init__(self, data: RolloutData) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Batch]:
        trainer = self.data.trainer
        k = trainer.fit_loop.total_batch_idx + 1 if trainer else 0
        world, rank = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
        while True:
            yield self.data.rollout(k * world + rank)
            k += 1

    def state_dict(self) -> dict[str, Any]:
        """Tells Lightning that it can go on inside an epoch; where, `__iter__` learns from the
        trainer.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class RolloutData(PromptData):
    """Prompts for `fit` of a policy: step k of process r of W takes batch k W + r, fixed by that
    number and the seed.

    Every prompt of a batch comes `n_texts` times. Prompts are passed through in an order that is
    shuffled anew in each pass; without prompts all texts begin with nothing. The run ends by
    `max_steps` of the Trainer.

    Args:
        base_lm: Hub id or folder of p_θ; the model's by default, and no other.
        prompts: List of strings, or a file or data set (see `records.read_records`); null = no
            prompt.
        reading: How the file is read: its columns, and how they make a prompt.
        n_texts: Texts for each prompt in a batch, with which RLOO compares, 1 or more.
        batch_size: Texts in a step and process, a multiple of n_texts.
        max_length: Longest text in tokens, prompt and end token included.
        reward_sees_prompt: Give rewards the prompt and the text as one; false = the text alone.
        seed: Seed of the order of prompts.
    """

    def __init__(
        self,
        base_lm: str | None = None,
        prompts: str | list[str] | None = None,
        reading: Reading = Reading(),  # noqa: B008 (frozen)
        n_texts: int = 4,
        batch_size: int = 128,
        max_length: int = 40,
        reward_sees_prompt: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(
            base_lm, prompts, reading, n_texts, batch_size, max_length, None, reward_sees_prompt
        )
        if batch_size % self.n_texts:
            raise UserError(
                f"batch_size: {batch_size} given, allowed: a multiple of n_texts ({n_texts})"
            )
        self.seed = seed
        self._turn, self._order = -1, [0]

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._kinds = list(self.records.items)
        self._prompts = list(self.texts.items)
        for prompt in filter(has_blank, self._prompts):
            raise UserError(
                f"prompts: {prompt[:40]!r} given, allowed: without blanks; a causal model cannot"
                " fill them"
            )

    def rollout(self, index: int) -> Batch:
        """Batch `index` of all processes together."""
        n = self.batch_size // self.n_texts
        chosen = [
            self._nth(i) for i in range(index * n, (index + 1) * n) for _ in range(self.n_texts)
        ]
        prompts = [self._prompts[i] for i in chosen]
        tokens, mask = prompt_rows(self.lm, prompts, self.max_length)
        ids = list(range(index * self.batch_size, (index + 1) * self.batch_size))
        return Batch(
            index,
            ids,
            prompts,
            tokens,
            mask,
            [self._kinds[i] for i in chosen],
            self.reward_sees_prompt,
        )

    def record_of(self, text: int) -> Record:
        return self._kinds[self._nth(text // self.n_texts)]

    def _nth(self, place: int) -> int:
        """The number of the prompt that stands at `place` of all passes."""
        size = len(self._prompts)
        turn, i = divmod(place, size)
        if turn != self._turn:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
            self._turn, self._order = turn, torch.randperm(size, generator=generator).tolist()
        return int(self._order[i])

    def train_dataloader(self) -> _Rollouts:
        return _Rollouts(self)
