"""DenoiserModule: trains the diffusion model over p_θ's token embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from dia_lightning.data.samples import ModelSamples, fingerprint, tokenizer_content
from dia_lightning.diffusion.checkpoint import load_weights, read_network, save_network
from dia_lightning.diffusion.denoiser import DenoiserNetwork, NetworkSize
from dia_lightning.diffusion.labels import Labeller
from dia_lightning.diffusion.loss import LOSSES, Noised, draw_times, expected_embedding, noise, warp_knots
from dia_lightning.diffusion.schedule import make_schedule
from dia_lightning.embedding import TokenEmbedding
from dia_lightning.lm import BaseLM
from dia_lightning.optim import adamw_warmup_cosine, check_recipe
from dia_lightning.resources import UserError
from dia_lightning.types import Reward, text_mask

_BINS = 100  # of t, for the running loss
N_BANDS = 5
BANDS = [f"u_{band / N_BANDS:.1f}_{(band + 1) / N_BANDS:.1f}" for band in range(N_BANDS)]


class NoisedRowsModule(L.LightningModule):
    """What denoiser and critic share: p_θ's embedding, the noise of a step, optimiser and export.

    The noise of batch k is drawn for the rows of all processes from (seed, k) and each takes its own, so that W processes
    compute what one does with W times the batch size, and a continued run what an uninterrupted one does (the data module
    counts k in the same way).
    """

    def __init__(
        self, base_lm: str, normalise: bool, schedule: str, denoiser: str | None,
        max_length: int, lr: float, weight_decay: float, warmup_steps: int, seed: int,
    ) -> None:  # fmt: skip
        super().__init__()
        check_recipe(lr, weight_decay, warmup_steps)
        if not 0 <= seed < 1 << 32:
            raise UserError(f"--model.init_args.seed: {seed} given, allowed are 0 to 4294967295")
        self.base_lm_name, self.max_length, self.seed = base_lm, max_length, seed
        self.lr, self.weight_decay, self.warmup_steps = lr, weight_decay, warmup_steps
        self.lm = BaseLM.load(base_lm)
        if max_length > self.lm.max_length:
            raise UserError(f"--model.init_args.max_length: {max_length} given, {base_lm} allows at most {self.lm.max_length}")
        self.embedding = TokenEmbedding(self.lm.embedding_table(), len(self.lm.tokenizer), normalise)
        self.schedule_name, self.schedule = schedule, make_schedule(schedule)
        if denoiser is not None:
            settings, weights = read_network(denoiser, "denoiser", "--model.init_args.denoiser", self.embedding)
            self.schedule_name, self.schedule = settings["schedule"], make_schedule(settings["schedule"])
            self.schedule.set_warp(weights["schedule.knots"])
        self.network: Any

    def setup(self, stage: str) -> None:
        """Check that the data is of this base model.

        Raises:
            UserError: if it was drawn from another model, has another tokenizer, or rows longer than the network takes.
        """
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if data.max_length > self.max_length:
            raise UserError(
                f"--model.init_args.max_length: {self.max_length} given, rows have up to {data.max_length} tokens "
                "(--data.init_args.max_length)"
            )
        if isinstance(data, ModelSamples) and fingerprint(data.lm) != fingerprint(self.lm):
            raise UserError(
                f"--data.init_args.base_lm: {data.base_lm} is another model than {self.base_lm_name} "
                "(--model.init_args.base_lm); give the same for both"
            )
        tokenizer = getattr(data, "tokenizer", None)
        if tokenizer is not None and tokenizer_content(tokenizer) != tokenizer_content(self.lm.tokenizer):
            raise UserError(
                f"--data.init_args.tokenizer: {data.tokenizer_path} is not the tokenizer of {self.base_lm_name} "
                "(--model.init_args.base_lm); give that model"
            )

    def noised(self, batch: dict[str, Tensor], stream: int) -> Noised:
        """The batch at training noise; `stream` numbers the draw (`batch_number` in training)."""
        tokens, prompt_mask = batch["tokens"], batch["prompt_mask"]
        generator = torch.Generator(self.device).manual_seed(self.stream_seed(stream))
        rows, n_rows = self.rows_in_all(len(tokens), self.device)
        times = draw_times(n_rows, self.max_length, self.schedule, generator)[rows, : tokens.shape[1]]
        shape = (n_rows, self.max_length, self.embedding.dim)
        eps = torch.randn(shape, generator=generator, device=self.device)[rows, : tokens.shape[1]]
        ends = ~text_mask(tokens, prompt_mask, self.lm.end_id)
        return noise(tokens, torch.where(prompt_mask, 0.0, times), ends, rows, self.embedding, self.schedule, eps)

    def stream_seed(self, stream: int) -> int:
        return self.seed * 1_000_003 + stream

    def rows_in_all(self, n: int, device: torch.device) -> tuple[Tensor, int]:
        """The numbers (n,) of this process's rows among those of all processes, and how many there are."""
        world, rank = self.trainer.world_size, self.trainer.global_rank
        return torch.arange(rank, n * world, world, device=device), n * world

    @property
    def batch_number(self) -> int:
        """Batches of the whole run before this one: of several that make one step, each has noise of its own."""
        return self.trainer.fit_loop.total_batch_idx

    def band_sums(self, values: Tensor, t: Tensor) -> Tensor:
        """(N_BANDS,) sums of `values` (N,) at times t (N,) in bands of the warped time u."""
        band = (self.schedule.unwarp(t) * N_BANDS).long().clamp(0, N_BANDS - 1)
        return torch.zeros(N_BANDS, device=values.device).index_add(0, band, values.float())

    def configure_optimizers(self) -> Any:
        total = int(self.trainer.estimated_stepping_batches)
        return adamw_warmup_cosine(self.network.named_parameters(), self.lr, self.weight_decay, self.warmup_steps, total)

    def settings(self) -> dict[str, Any]:
        """What loading needs to build the network again; JSON values only."""
        return {
            "schema": 1,
            "base_lm": self.base_lm_name,
            "embedding": self.embedding.fingerprint(),
            "normalise": self.embedding.normalise,
            "schedule": self.schedule_name,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["dia"] = self.settings()

    def export(self, folder: Path) -> None:
        """Write `model.safetensors` and `config.json`, as `read_network` reads them."""
        save_network(self.network, self.settings(), folder)


class DenoiserModule(NoisedRowsModule):
    """Learns to denoise p_θ's samples (see science.md, "Denoiser").

    Args:
        base_lm: hub id, folder or `.gguf` file of p_θ, whose embeddings are noised (see `BaseLM.load`).
        normalise: scale each embedding to one norm; false = as they are, as in the original proposal (see `TokenEmbedding`).
        schedule: `cosine`, `sqrt` or `linear`; bent by time warping while training goes on.
        loss: `ce` (cross-entropy), `eps` (‖ε − ε_ψ‖²) or `x0` (‖z_0 − ẑ_0‖²), on noised positions only.
        width, layers, heads, rotary: the transformer; with `init_from_lm` width and heads are those of base_lm.
        adapter_rank: above 0 the blocks and the head are p_θ's own, frozen and not repeated in checkpoints, with adapters
            of this rank on every matrix (see `adapted`; Llama's architecture only).
        max_length: longest text in tokens, end token included.
        tied_head: read out by the frozen embedding table instead of by a trained one.
        init_from_lm: start from p_θ's own blocks, attention made bidirectional.
        init_from: start from this denoiser (folder or `.ckpt`) of the same base_lm and size instead.
        label_reward, label_edges, label_drop: for classifier-free guidance, condition it on labels too: the class of each
            text's reward between these edges, left out of a share of the texts (see `Labeller`).
        self_condition: every so many steps the network is given an earlier ẑ_0 of its own; 0 = never.
        time_warp: steps between two updates of the warp; 0 = never.
        lr, weight_decay, warmup_steps: AdamW with warm-up and cosine decay to the end of training.
        seed: of the noise.
    """

    loss_in_bin: Tensor

    def __init__(
        self,
        base_lm: str = "checkpoints/tiny/lm",
        normalise: bool = True,
        schedule: str = "cosine",
        loss: str = "ce",
        width: int = 128,
        layers: int = 6,
        heads: int = 4,
        rotary: bool = False,
        adapter_rank: int = 0,
        max_length: int = 40,
        tied_head: bool = False,
        init_from_lm: bool = True,
        init_from: str | None = None,
        label_reward: Reward | None = None,
        label_edges: list[float] | None = None,
        label_drop: float = 0.1,
        self_condition: int = 2,
        time_warp: int = 100,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup_steps: int = 200,
        seed: int = 0,
    ) -> None:
        super().__init__(base_lm, normalise, schedule, None, max_length, lr, weight_decay, warmup_steps, seed)
        for option, value in (("time_warp", time_warp), ("self_condition", self_condition)):
            if value < 0:
                raise UserError(f"--model.init_args.{option}: {value} given, must be 0 (never) or more")
        if loss not in LOSSES:
            raise UserError(f"--model.init_args.loss: {loss!r} given, allowed are {', '.join(LOSSES)}")
        self.loss_name, self.time_warp, self.self_condition = loss, time_warp, self_condition
        size = NetworkSize(width, layers, heads, max_length, rotary, adapter_rank)
        labelled = label_reward is not None or label_edges is not None
        self.labeller = Labeller(label_reward, label_edges, label_drop) if labelled else None
        self.label_reward = self.labeller and self.labeller.reward  # whose calls Export counts
        n_labels = len(label_edges or []) + 1 if labelled else 0
        self.network = DenoiserNetwork(self.embedding, self.schedule, size, tied_head, n_labels, self.lm.model)
        if init_from is not None:
            self._init_from(init_from)
        elif init_from_lm:
            self.network.init_from_lm(self.lm.model, self.lm.bos_id)
        self.register_buffer("loss_in_bin", torch.full((_BINS,), -1.0))

    def _init_from(self, path: str) -> None:
        option = "--model.init_args.init_from"
        _, weights = read_network(path, "denoiser", option, self.embedding)
        if self.network.labels is not None:
            weights.setdefault("labels.weight", self.network.labels.weight.detach())
        load_weights(self.network, weights, option, path)

    def labels(self, batch: dict[str, Tensor], stream: int | None = None) -> Tensor | None:
        """Each row's label (B,), where there are labels; with a `stream`, which numbers the draw, some are dropped."""
        if self.labeller is None:
            return None
        labels = self.labeller(self.lm.decode(batch["tokens"], batch["prompt_mask"]))
        if stream is not None:
            rows, n_rows = self.rows_in_all(len(labels), labels.device)
            # Noise has the seed itself; this one draws other numbers.
            labels = self.labeller.dropped(labels, rows, n_rows, 2 * self.stream_seed(stream) + 1)
        return labels.to(self.device)

    def losses(self, tokens: Tensor, noised: Noised, estimated: bool, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Loss at every noised position (N,) and its time (N,); the fixed shape (B·T) comes first, so nothing waits."""
        z0_prev = None
        if estimated:
            with torch.no_grad():
                hidden, query = self.network.hidden(noised.z, noised.t, None, label)
                flat = expected_embedding(self.network, hidden.flatten(0, 1), query.flatten(0, 1))
            z0_prev = flat.unflatten(0, tokens.shape)
        hidden, query = self.network.hidden(noised.z, noised.t, z0_prev, label)
        keep = noised.noised
        t = noised.t[keep]
        return LOSSES[self.loss_name](self.network, hidden[keep], query[keep], tokens[keep], t), t

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        number = self.batch_number
        label = self.labels(batch, number)
        estimated = self.self_condition > 0 and number % self.self_condition == self.self_condition - 1
        values, t = self.losses(batch["tokens"], self.noised(batch, number), estimated, label)
        # Mean over the positions of all processes, so that the gradient is that of one process with the whole batch.
        count = self.trainer.strategy.reduce(values.new_tensor(float(len(values))), reduce_op="mean")
        loss = values.sum() / count
        self._note_loss(values.detach(), t)
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def _note_loss(self, values: Tensor, t: Tensor) -> None:
        """Running mean of the loss per bin of t; every `time_warp` steps the warp follows it."""
        bins = (t * _BINS).long().clamp(0, _BINS - 1)
        statistics = torch.zeros(2, _BINS, device=values.device)
        statistics[0].index_add_(0, bins, values.float())
        statistics[1].index_add_(0, bins, torch.ones_like(values).float())
        total, count = self.trainer.strategy.reduce(statistics, reduce_op="sum")
        mean = total / count.clamp_min(1)
        fresh = torch.where(self.loss_in_bin < 0, mean, self.loss_in_bin.lerp(mean, 0.02))
        self.loss_in_bin.copy_(torch.where(count > 0, fresh, self.loss_in_bin))
        step = self.trainer.global_step
        if self.time_warp and step and step % self.time_warp == 0:
            seen = self.loss_in_bin >= 0
            centres = (torch.arange(_BINS, device=t.device) + 0.5) / _BINS
            self.schedule.set_warp(warp_knots(centres[seen], self.loss_in_bin[seen], len(self.schedule.knots) - 1))

    def on_validation_epoch_start(self) -> None:
        self._in_bands = torch.zeros(2, N_BANDS, device=self.device)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        noised, estimated = self.noised(batch, -1 - batch_idx), self.self_condition > 0
        values, t = self.losses(batch["tokens"], noised, estimated, self.labels(batch))
        self._in_bands += torch.stack([self.band_sums(values, t), self.band_sums(torch.ones_like(values), t)])

    def on_validation_epoch_end(self) -> None:
        """Mean loss over all noised positions, and in each band that has any."""
        sums = self.trainer.strategy.reduce(self._in_bands, reduce_op="sum")
        assert isinstance(sums, Tensor)
        for name, (total, count) in zip(BANDS, sums.T, strict=True):
            if count > 0:
                self.log(f"val/loss_{name}", total / count, sync_dist=True)
        self.log("val/loss", sums[0].sum() / sums[1].sum(), prog_bar=True, sync_dist=True)

    def settings(self) -> dict[str, Any]:
        size, tied = self.network.size.as_dict(), self.network.tied_head
        labels = {} if self.labeller is None else {"labels": self.labeller.settings()}
        return {**super().settings(), "kind": "denoiser", "size": size, "tied_head": tied, **labels}
