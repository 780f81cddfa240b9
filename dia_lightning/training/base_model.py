"""LMModule: trains a base language model from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dia_lightning.errors import UserError
from dia_lightning.numerics import float32_default
from dia_lightning.training.optim import AdamW
from dia_lightning.training.watched import WatchedModule
from dia_lightning.types import text_mask


class LMModule(WatchedModule):
    """Trains a small GPT-2-architecture base model from scratch, the p_θ of the shipped kit.

    Args:
        vocab_size: rows of the embedding table; must equal the tokenizer's size.
        width: embedding width d; narrow, because the diffusion runs in this space.
        layers: transformer blocks.
        heads: attention heads in each.
        positions: longest text in tokens, start token included.
        dropout: applied to embeddings, attention and residual branches.
        optimizer: learning rate, its warm-up, and weight decay.
    """

    def __init__(
        self,
        vocab_size: int = 2000,
        width: int = 128,
        layers: int = 6,
        heads: int = 4,
        positions: int = 96,
        dropout: float = 0.1,
        optimizer: AdamW = AdamW(lr=2e-3, weight_decay=0.1),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {
            "vocab_size": vocab_size,
            "width": width,
            "layers": layers,
            "heads": heads,
            "positions": positions,
        }
        for name, value in sizes.items():
            if value < 1:
                raise UserError(f"{name}: {value} given, allowed: 1 or more")
        if width % heads:
            raise UserError(f"width: {width} given, allowed: a multiple of heads ({heads})")
        if not 0 <= dropout < 1:
            raise UserError(f"dropout: {dropout} given, allowed: 0 ≤ dropout < 1")
        self.optimizer = optimizer
        config = GPT2Config(
            vocab_size=vocab_size, n_embd=width, n_layer=layers, n_head=heads,
            n_positions=positions, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
            bos_token_id=None, eos_token_id=None,  # of the tokenizer, which `setup` knows
        )  # fmt: skip
        self.model = GPT2LMHeadModel(config)

    def setup(self, stage: str) -> None:
        tokenizer = self.trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        if len(tokenizer) != self.model.config.vocab_size:
            raise UserError(
                f"vocab_size: {self.model.config.vocab_size} given, allowed: {len(tokenizer)}, the"
                " size of the tokenizer"
            )
        self.end_id: int = tokenizer.eos_token_id
        for config in (self.model.config, self.model.generation_config):
            config.bos_token_id = config.eos_token_id = self.end_id

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Summed negative log-likelihood in nats of text and end tokens, and their number."""
        end_id = self.end_id
        tokens, keep = batch["tokens"], text_mask(batch["tokens"], batch["prompt_mask"], end_id)
        logits = self.model(F.pad(tokens[:, :-1], (1, 0), value=end_id)).logits
        targets = torch.where(keep, tokens, -100)
        return (
            F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum"),
            keep.sum(),
        )

    @float32_default()
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        total, count = self.loss(batch)
        self.note_rows(batch, (~total.detach().isfinite()).expand(len(batch["tokens"])))
        self.log("train/loss", total / count, prog_bar=True)
        return total / count

    @float32_default()
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        total, count = self.loss(batch)
        self.log("val/loss", total / count, batch_size=int(count), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> Any:
        total = int(self.trainer.estimated_stepping_batches)
        return self.optimizer.configure(self.named_parameters(), total)

    def export(self, folder: Path) -> None:
        """Write the model and its tokenizer in transformers' format (safetensors), loadable as
        `base_lm`.
        """
        self.model.save_pretrained(folder)
        self.trainer.datamodule.tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
