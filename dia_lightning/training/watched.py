"""WatchedModule: training that ends where its loss is lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
from torch import Tensor, stack

from dia_lightning.numerics import KeepsBuffers, NotFinite, named_rows


class WatchedModule(KeepsBuffers, L.LightningModule):
    """A module whose steps say in which rows the loss is not finite; looked at where the loggers
    read it, and before anything is kept.
    """

    mend = "lower model.optimizer.lr, or clip gradients with trainer.gradient_clip_val"

    def __init__(self) -> None:
        super().__init__()
        self._noted: list[tuple[int, Mapping[str, Tensor], Tensor]] = []

    @property
    def batch_number(self) -> int:
        """Batches of the whole run before this one: of several that make one step, each has its
        own.
        """
        return self.trainer.fit_loop.total_batch_idx

    def note_rows(self, batch: Mapping[str, Tensor], wrong: Tensor) -> None:
        """Remember a step's batch and the rows (B,) whose loss is not finite, without waiting
        for the device.
        """
        self._noted.append((self.batch_number, batch, wrong))

    def check_noted(self) -> None:
        """Look at the steps since the last look; the device is waited for once.

        Raises:
            NotFinite: for the first of them with a loss that is not finite; the batch is saved.
        """
        noted, self._noted = self._noted, []
        found = stack([wrong.any() for _, _, wrong in noted]).tolist() if noted else []
        for (number, batch, wrong), bad in zip(noted, found, strict=True):
            if bad:
                rows = named_rows(wrong.nonzero()[:, 0].tolist(), len(wrong))
                error = NotFinite(f"train/loss is NaN or infinite in {rows}")
                rank = (
                    f" of process {self.trainer.global_rank}" if self.trainer.world_size > 1 else ""
                )
                hint, tensors = (
                    f"; no later weights are kept: {self.mend}",
                    {
                        **batch,
                        "wrong": wrong,
                    },
                )
                error.complete(
                    f"batch {number}{rank}", self.trainer.default_root_dir, tensors, hint
                )
                raise error

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Check where the loggers read the loss."""
        if len(self._noted) >= self.trainer.log_every_n_steps:  # type: ignore[attr-defined]
            self.check_noted()

    def on_validation_start(self) -> None:
        self.check_noted()

    def on_train_end(self) -> None:
        self.check_noted()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # A checkpoint of weights that are lost would take the place of a good one
        self.check_noted()
