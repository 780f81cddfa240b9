"""NoisedRowsModule: what training a denoiser and training a critic have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dia_lightning.data.samples import ModelSamples, fingerprint, tokenizer_content
from dia_lightning.diffusion.checkpoint import read_network, save_network
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.loss import Noised, draw_gaps, draw_times, noise
from dia_lightning.diffusion.schedule import make_schedule
from dia_lightning.diffusion.trunk import NetworkSize
from dia_lightning.errors import UserError
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.training.optim import AdamW
from dia_lightning.training.watched import WatchedModule
from dia_lightning.types import text_mask

N_BANDS = 5
BANDS = [f"u_{band / N_BANDS:.1f}_{(band + 1) / N_BANDS:.1f}" for band in range(N_BANDS)]
# How far a compiled network may be off, without and with autocast: fused, fewer results are rounded
# to bfloat16 in between.
_COMPILED = {False: 1e-4, True: 1e-2}


@dataclass(frozen=True)
class Network(NetworkSize):
    """The transformer that is trained, and how it runs.

    Args:
        tied_head: read out by the frozen embedding table instead of by a trained matrix (denoiser
            only).
        activation_checkpointing: run each block again in the backward pass instead of keeping what
            it computed: less memory for more time, with the same loss and gradients.
        compile: the blocks, by torch.compile, at the first batch, whose loss must stay the same.
    """

    tied_head: bool = False
    activation_checkpointing: bool = False
    compile: bool = False

    @property
    def size(self) -> NetworkSize:
        """What a checkpoint's config.json says of it."""
        return NetworkSize(**{f.name: getattr(self, f.name) for f in fields(NetworkSize)})


@dataclass(frozen=True)
class Noising:
    """The forward process: what is noised, and how.

    Args:
        schedule: `cosine`, `sqrt` or `linear`.
        normalise: scale each token embedding to one norm; false = as they are, as in the original
            proposal (see `TokenEmbedding`).
    """

    schedule: str = "cosine"
    normalise: bool = True


class NoisedRowsModule(WatchedModule):
    """What denoiser and critic share: p_θ's embedding, the noise of a step, optimiser and export.

    The noise times of batch k are drawn for the rows of all processes from (seed, k), each row's
    noise from (seed, k, its number), so that W processes compute what one does with W times the
    batch size, and a continued run what an uninterrupted one does (the data module counts k in the
    same way).
    """

    def __init__(
        self, base_lm: str, network: Network, noising: Noising, denoiser: str | None,
        optimizer: AdamW, seed: int,
    ) -> None:  # fmt: skip
        super().__init__()
        if not 0 <= seed < 1 << 32:
            raise UserError(f"seed: {seed} given, allowed: 0 to 4294967295")
        self.base_lm_name, self.max_length, self.seed = base_lm, network.max_length, seed
        self.optimizer = optimizer
        self.lm = BaseLM.load(base_lm)
        if self.max_length > self.lm.max_length:
            raise UserError(
                f"max_length: {self.max_length} given, allowed: up to {self.lm.max_length} for"
                f" {base_lm}"
            )
        self.embedding = TokenEmbedding(
            self.lm.embedding_table(), len(self.lm.tokenizer), noising.normalise
        )
        self.schedule_name, self.schedule = noising.schedule, make_schedule(noising.schedule)
        if denoiser is not None:
            settings, weights = read_network(denoiser, "denoiser", "denoiser", self.embedding)
            self.schedule_name, self.schedule = (
                settings["schedule"],
                make_schedule(settings["schedule"]),
            )
            self.schedule.set_warp(weights["schedule.knots"])
        self.network: Any

    def setup(self, stage: str) -> None:
        """Check that the data is of this base model, and move that where its blocks are adapted.

        Raises:
            UserError: if it was drawn from another model, has another tokenizer, or rows longer
                than the network takes.
        """
        # What is p_θ's, every process has read for itself; DDP would send it round at every step.
        kept = self.state_dict()
        self._ddp_params_and_buffers_to_ignore = [
            name for name, _ in self.named_buffers() if name not in kept
        ]
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if data.max_length > self.max_length:
            raise UserError(
                f"max_length: {self.max_length} given, allowed: {data.max_length} or more, the"
                " tokens of a row (data.max_length)"
            )
        if isinstance(data, ModelSamples) and fingerprint(data.lm) != fingerprint(self.lm):
            raise UserError(
                f"data.base_lm: {data.base_lm} given, allowed: the same model as"
                f" {self.base_lm_name} (model.base_lm)"
            )
        tokenizer = getattr(data, "tokenizer", None)
        if tokenizer is not None and tokenizer_content(tokenizer) != tokenizer_content(
            self.lm.tokenizer
        ):
            raise UserError(
                f"data.tokenizer: {data.tokenizer_path} given, allowed: the tokenizer of"
                f" {self.base_lm_name} (model.base_lm)"
            )
        if self.network.size.needs_lm:
            self.lm.to(self.device)

    def prepare_blocks(self, network: Network) -> None:
        """Have the blocks run again in the backward pass, and compile them at the first batch."""
        self.network.trunk.checkpointed = network.activation_checkpointing
        self.to_compile = network.compile

    def compile_once(self, loss: Callable[[], Tensor]) -> None:
        """Compile the blocks if that was asked for, and see that the first batch's loss stays what
        it is.

        Raises:
            UserError: if it does not, or torch cannot compile here.
        """
        if not self.to_compile:
            return
        self.to_compile, given = False, "compile: true given, allowed: false"
        plain = float(loss().detach())
        trunk = self.network.trunk
        for block in (*trunk.blocks, *getattr(trunk, "joints", ())):
            block.compile()
        try:
            compiled = float(loss().detach())
        except Exception as error:
            reason = str(getattr(error, "inner_exception", error)).strip().splitlines()[0][:160]
            raise UserError(f"{given}; torch cannot compile here ({reason})") from error
        if not abs(compiled - plain) <= _COMPILED[
            torch.is_autocast_enabled(self.device.type)
        ] * max(1.0, abs(plain)):
            raise UserError(
                f"{given}; the first batch has a loss of {compiled:.6g} compiled and"
                f" {plain:.6g} as it is"
            )

    def noised(self, batch: dict[str, Tensor], stream: int, gaps: bool = False) -> Noised:
        """The batch at training noise, or with `gaps` as an infiller reads its right side; `stream`
        numbers the draw (`batch_number` in training).
        """
        tokens, prompt_mask = batch["tokens"], batch["prompt_mask"]
        generator = torch.Generator(self.device).manual_seed(self.stream_seed(stream))
        rows, n_rows = self.rows_in_all(len(tokens), self.device)
        draw = draw_gaps if gaps else draw_times
        times = draw(n_rows, self.max_length, self.schedule, generator)[rows, : tokens.shape[1]]
        eps = self._eps(len(tokens), stream)[:, : tokens.shape[1]]
        ends = ~text_mask(tokens, prompt_mask, self.lm.end_id) & (not gaps)
        return noise(
            tokens,
            torch.where(prompt_mask, 0.0, times),
            ends,
            rows,
            self.embedding,
            self.schedule,
            eps,
        )

    def _eps(self, n: int, stream: int) -> Tensor:
        """Standard normal (n, max_length, d), each row from (seed, stream, its number among
        those of all processes).
        """
        eps = torch.empty(n, self.max_length, self.embedding.dim, device=self.device)
        generator = torch.Generator(self.device)
        for i, row in enumerate(eps):
            number = self.trainer.global_rank + i * self.trainer.world_size
            row.normal_(
                generator=generator.manual_seed(
                    (self.stream_seed(stream) * 0x9E3779B97F4A7C15 + number) % (1 << 63)
                )
            )
        return eps

    def stream_seed(self, stream: int) -> int:
        return self.seed * 1_000_003 + stream

    def rows_in_all(self, n: int, device: torch.device) -> tuple[Tensor, int]:
        """The numbers (n,) of this process's rows among those of all processes, and how many
        there are.
        """
        world, rank = self.trainer.world_size, self.trainer.global_rank
        return torch.arange(rank, n * world, world, device=device), n * world

    def band_sums(self, values: Tensor, t: Tensor) -> Tensor:
        """(N_BANDS,) sums of `values` (N,) at times t (N,) in bands of the warped time u."""
        band = (self.schedule.unwarp(t) * N_BANDS).long().clamp(0, N_BANDS - 1)
        return torch.zeros(N_BANDS, device=values.device).index_add(0, band, values.float())

    def configure_optimizers(self) -> Any:
        total = int(self.trainer.estimated_stepping_batches)
        return self.optimizer.configure(self.network.named_parameters(), total)

    def settings(self) -> dict[str, Any]:
        """What loading needs to build the network again; JSON values only."""
        trunk = self.network.trunk
        return {
            "schema": 1,
            "base_lm": self.base_lm_name,
            "embedding": self.embedding.fingerprint(),
            **({"blocks": trunk.fingerprint()} if trunk.size.needs_lm else {}),
            "normalise": self.embedding.normalise,
            "schedule": self.schedule_name,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["dia"] = self.settings()

    def export(self, folder: Path) -> None:
        """Write `model.safetensors` and `config.json`, as `read_network` reads them."""
        save_network(self.network, self.settings(), folder)
