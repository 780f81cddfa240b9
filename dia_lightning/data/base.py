"""What all data modules share: token rows in memory, cut into batches that do not depend on the
number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from dia_lightning.errors import UserError
from dia_lightning.types import text_mask


class TokenRows(Dataset[Any]):
    """(N, T) token rows; an item is a whole batch, cut to its longest text."""

    def __init__(self, tokens: Tensor, end_id: int, prompt_length: Tensor | None = None) -> None:
        self.tokens, self.end_id = tokens, end_id
        self.prompt_length = (
            torch.zeros(len(tokens), dtype=torch.int64) if prompt_length is None else prompt_length
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, indices: list[int]) -> dict[str, Tensor]:
        """One batch: `tokens` (B, T) and `prompt_mask` (B, T), T the longest text with its end
        token.
        """
        tokens = self.tokens[indices]
        place = torch.arange(tokens.shape[1])
        prompt_mask = place < self.prompt_length[indices, None]
        longest = int(text_mask(tokens, prompt_mask, self.end_id).sum(1).max())
        return {"tokens": tokens[:, :longest], "prompt_mask": prompt_mask[:, :longest]}


class _Batches(DistributedSampler[Any]):
    """The rows of each batch of all processes together, as lists of row numbers.

    (A `DistributedSampler`, because Lightning puts one of its own in the place of any other.)

    Args:
        rows: to be numbered. size: rows a batch, those of all processes. world: number of
            processes.
        shuffled: from which epoch on rows come in a new seeded order; None = never, and the rest is
            a batch too.
        seed: of the orders. done: batches that are behind the run when an epoch is begun or gone on
            with.
    """

    def __init__(
        self,
        rows: TokenRows,
        size: int,
        world: int,
        shuffled: int | None,
        seed: int,
        done: Callable[[], int],
    ) -> None:
        super().__init__(rows, 1, 0, seed=seed)
        self.n_rows, self.size, self.world, self.shuffled, self.done = (
            len(rows),
            size,
            world,
            shuffled,
            done,
        )

    def __len__(self) -> int:
        return -(-self.n_rows // self.size) if self.shuffled is None else self.n_rows // self.size

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        epoch, first = divmod(self.done(), len(self))
        order = list(range(self.n_rows))
        if self.shuffled is not None and epoch >= self.shuffled:
            order = torch.randperm(
                self.n_rows, generator=torch.Generator().manual_seed(self.seed + epoch)
            ).tolist()
        for i in range(first, len(self)):
            batch = order[i * self.size : (i + 1) * self.size]
            yield batch + [batch[0]] * (-len(batch) % self.world)  # every process has as many rows


class _Loader(DataLoader[Any]):
    """Tells Lightning that it can go on inside an epoch; where, `_Batches` learns from the
    trainer.
    """

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def base_lm_of(data: L.LightningDataModule, given: str | None, option: str = "base_lm") -> str:
    """`given`, or the base_lm of the model that is trained or samples.

    Raises:
        UserError: if neither is there.
    """
    module = getattr(data.trainer, "lightning_module", None)
    own = getattr(module, "base_lm_name", None) or getattr(module, "base_lm", None)
    name = given or own
    if not isinstance(name, str):
        raise UserError(f"{option}: none given, and the model has no base_lm")
    return name


def _own_rows(batch: dict[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    return {name: values[rank::world] for name, values in batch.items()}


class TokenData(L.LightningDataModule):
    """Base of the data modules that train a network: subclasses set `train_rows` and `val_rows` in
    `setup`.

    Batch k of a run is fixed by k: a continued run goes on with the batch after its last one. With
    world size W, process r takes rows r, r + W, … of it, cut to the longest text of the whole
    batch, so that W processes compute what one does with W times the batch size.

    Attributes:
        shuffled: from which epoch on rows are shuffled; 1 where rows are independent draws already.
    """

    shuffled = 0

    def __init__(self, max_length: int, batch_size: int, seed: int) -> None:
        super().__init__()
        if max_length < 2:
            raise UserError(f"max_length: {max_length} given, allowed: 2 or more")
        if batch_size < 1:
            raise UserError(f"batch_size: {batch_size} given, allowed: 1 or more")
        if not 0 <= seed < 1 << 32:
            raise UserError(f"seed: {seed} given, allowed: 0 to 4294967295")
        self.max_length, self.batch_size, self.seed = max_length, batch_size, seed
        self.train_rows: TokenRows
        self.val_rows: TokenRows

    def train_dataloader(self) -> DataLoader[Any]:
        trainer = self.trainer
        if given := getattr(trainer, "overfit_batches", 0):
            raise UserError(
                f"trainer.overfit_batches: {given} given, allowed: 0; train on fewer rows instead"
            )
        return self._loader(
            self.train_rows,
            self.shuffled,
            lambda: trainer.fit_loop.total_batch_idx + 1 if trainer else 0,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.val_rows, None, lambda: 0)

    def _loader(
        self, rows: TokenRows, shuffled: int | None, done: Callable[[], int]
    ) -> DataLoader[Any]:
        world, rank = (
            (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        )
        size = min(self.batch_size, max(1, len(rows) // world)) * world
        batches = _Batches(rows, size, world, shuffled, self.seed, done)
        return _Loader(
            rows,
            batch_size=None,
            sampler=batches,
            collate_fn=partial(_own_rows, rank=rank, world=world),
        )
