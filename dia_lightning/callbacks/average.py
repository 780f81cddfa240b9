"""The average of the weights that is validated and exported."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class WeightEMA(WeightAveraging):
    """Exponential moving average of the parameters, for validation, export and the `state_dict` of
    checkpoints.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), so that the average of a short run
    is not its start (Lightning's EMAWeightAveraging has no such warm-up). Buffers, such as the warp
    of the noise schedule, are taken as they are. The average takes the place of the weights when
    `fit` ends, after the last checkpoint was written.

    Args:
        decay: Share of the average that one step keeps, between 0 and 1.
    """

    def __init__(self, decay: float = 0.999) -> None:
        def average(averaged: Tensor, current: Tensor, n: Tensor | int) -> Tensor:
            share = (
                max(1 - decay, 9 / (10 + n))
                if isinstance(n, int)
                else (9 / (10 + n)).clamp_min(1 - decay)
            )
            return averaged + share * (current - averaged)

        super().__init__(use_buffers=False, avg_fn=average)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Not yet: ModelCheckpoint may still write `last.ckpt`, whose raw weights a continued
        run begins with.
        """

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._copy_average_to_current(pl_module)
