"""What all data modules share: token rows in memory, cut into batches that do not depend on the number of processes."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from dia_lightning.resources import UserError
from dia_lightning.types import text_mask


class TokenRows(Dataset[Any]):
    """(N, T) token rows; a batch is one indexing operation, cut to its longest text."""

    def __init__(self, tokens: Tensor, end_id: int, prompt_length: Tensor | None = None) -> None:
        self.tokens, self.end_id = tokens, end_id
        self.prompt_length = torch.zeros(len(tokens), dtype=torch.int64) if prompt_length is None else prompt_length

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """One batch: `tokens` (B, T) and `prompt_mask` (B, T), T the longest text with its end token."""
        tokens = self.tokens[indices]
        place = torch.arange(tokens.shape[1])
        prompt_mask = place < self.prompt_length[indices, None]
        longest = int(text_mask(tokens, prompt_mask, self.end_id).sum(1).max())
        return {"tokens": tokens[:, :longest], "prompt_mask": prompt_mask[:, :longest]}


def _whole_batch(batch: Any) -> Any:
    return batch


class TokenData(L.LightningDataModule):
    """Base of the data modules that train a network: subclasses set `train_rows` and `val_rows` in `setup`.

    With world size W, process r sees rows r, r + W, … of one seeded permutation, so that the batches of all processes
    together are the batch of one process with W times the batch size.
    """

    def __init__(self, max_length: int, batch_size: int, seed: int) -> None:
        super().__init__()
        if max_length < 2:
            raise UserError(f"--data.init_args.max_length: {max_length} given, at least 2 allowed")
        if batch_size < 1:
            raise UserError(f"--data.init_args.batch_size: {batch_size} given, at least 1 allowed")
        self.max_length, self.batch_size, self.seed = max_length, batch_size, seed
        self.train_rows: TokenRows
        self.val_rows: TokenRows

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.train_rows, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.val_rows, shuffle=False)

    def _loader(self, rows: TokenRows, shuffle: bool) -> DataLoader[Any]:
        trainer = self.trainer
        world, rank = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
        batch_size = min(self.batch_size, max(1, len(rows) // world))
        sampler: DistributedSampler[Any] = DistributedSampler(rows, world, rank, shuffle, self.seed, drop_last=shuffle)
        return DataLoader(rows, batch_size, sampler=sampler, collate_fn=_whole_batch, drop_last=shuffle)
