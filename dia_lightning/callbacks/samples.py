"""What a denoiser in training can do: unguided samples, scored by p_θ."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from dia_lightning.guidance import unguided
from dia_lightning.sampling.decode import draw_texts
from dia_lightning.training.denoiser import DenoiserModule
from dia_lightning.types import Batch


class UnguidedSamples(L.Callback):
    """At every validation, draws texts from the denoiser (EMA weights, where averaged) and logs
    their mean log p_θ.

    Logs `val/log_p_per_token` in nats and writes the texts to TensorBoard. The same number for
    p_θ's own samples is the ceiling that an ideal denoiser reaches.

    Args:
        n_texts: Texts to draw at each validation, 1 or more.
        steps: Noise levels that each text passes, 1 or more.
        stagger: Lead of left positions over right ones, in positions, 0 or more (see `staggered`).
    """

    def __init__(self, n_texts: int = 64, steps: int = 64, stagger: float = 4.0) -> None:
        self.n_texts, self.steps, self.stagger = n_texts, steps, stagger

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        # Here and not at the epoch's end: WeightEMA has its weights in the module only in between.
        if batch_idx or trainer.sanity_checking or not isinstance(pl_module, DenoiserModule):
            return
        lm, device = pl_module.lm.to(pl_module.device), pl_module.device
        generator = torch.Generator(device).manual_seed(pl_module.seed)
        shape = (self.n_texts, pl_module.max_length)
        work = Batch(
            0, list(range(self.n_texts)), [""] * self.n_texts,
            torch.full(shape, lm.end_id, device=device),
            torch.zeros(shape, dtype=torch.bool, device=device),
        )  # fmt: skip
        predict = unguided(pl_module.network, pl_module.embedding)
        tokens = draw_texts(
            predict,
            work,
            pl_module.embedding,
            pl_module.schedule,
            lm.end_id,
            generator,
            "ancestral",
            self.steps,
            self.stagger,
        )
        with torch.autocast(device.type, enabled=False):
            log_p = lm.token_log_probs(tokens)
        pl_module.log(
            "val/log_p_per_token",
            log_p.sum() / (log_p != 0).sum(),
            prog_bar=True,
            sync_dist=True,
            batch_size=1,
        )
        writer = getattr(trainer.logger, "experiment", None)
        if writer is not None and hasattr(writer, "add_text"):
            texts = lm.decode(tokens, work.prompt_mask)[:8]
            writer.add_text("val/samples", "\n\n".join(texts), trainer.global_step)
