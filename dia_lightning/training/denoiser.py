"""DenoiserModule: trains the diffusion model over p_θ's token embeddings."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dia_lightning.diffusion.checkpoint import load_weights, read_network
from dia_lightning.diffusion.denoiser import DenoiserNetwork
from dia_lightning.diffusion.labels import RewardLabels
from dia_lightning.diffusion.loss import LOSSES, Noised, expected_embedding, summed, warp_knots
from dia_lightning.errors import UserError
from dia_lightning.numerics import float32_default
from dia_lightning.training.base import BANDS, N_BANDS, Network, NoisedRowsModule, Noising
from dia_lightning.training.optim import AdamW
from dia_lightning.types import scored_mask

_BINS = 100  # of t, for the running loss
# An infiller learns to denoise every so many steps, and to fill gaps in all others. Odd, so that
# some of those steps are self-conditioned.
_DENOISED = 7


class Losses(NamedTuple):
    """Of N noised positions: their sum, with its gradient; `values` (N,), without; and their
    times `t` (N,).
    """

    total: Tensor
    values: Tensor
    t: Tensor


class DenoiserModule(NoisedRowsModule):
    """Learns to denoise p_θ's samples (see science.md, "Denoiser").

    Args:
        base_lm: hub id, folder or `.gguf` file of p_θ, whose embeddings are noised (see
            `BaseLM.load`).
        network: the transformer; begun from base_lm its width and heads are those of base_lm.
        noising: the forward process; the schedule is bent by time warping while training goes on.
        loss: `ce` (cross-entropy), `eps` (‖ε − ε_ψ‖²) or `x0` (‖z_0 − ẑ_0‖²), on noised positions
            only.
        init_from: what the weights begin from: `base_lm` (its own blocks, attention made
            bidirectional), `random`, or a denoiser (folder or `.ckpt`) of the same base_lm and
            size.
        labels: for classifier-free guidance, condition the network on the class of each text's
            reward too.
        self_condition: every so many steps the network is given an earlier ẑ_0 of its own; 0 =
            never.
        time_warp: steps between two updates of the warp; 0 = never.
        optimizer: learning rate, its warm-up, and weight decay.
        seed: of the noise.
    """

    loss_in_bin: Tensor

    def __init__(
        self,
        base_lm: str = "checkpoints/tiny/lm",
        network: Network = Network(),  # noqa: B008 (frozen)
        noising: Noising = Noising(),  # noqa: B008
        loss: str = "ce",
        init_from: str = "base_lm",
        labels: RewardLabels | None = None,
        self_condition: int = 2,
        time_warp: int = 100,
        optimizer: AdamW = AdamW(),  # noqa: B008
        seed: int = 0,
    ) -> None:
        super().__init__(base_lm, network, noising, None, optimizer, seed)
        for option, value in (("time_warp", time_warp), ("self_condition", self_condition)):
            if value < 0:
                raise UserError(f"{option}: {value} given, allowed: 0 (never) or more")
        if loss not in LOSSES:
            raise UserError(f"loss: {loss!r} given, allowed: {', '.join(LOSSES)}")
        self.infills = network.trunk == "infiller"
        if self.infills and loss != "ce":
            raise UserError(f"loss: {loss!r} given, allowed: ce, with trunk: infiller")
        if self.infills and init_from == "random":
            raise UserError(
                "init_from: random given, allowed: base_lm or a denoiser, with trunk: infiller"
            )
        if self.infills:
            self.language_models = {"base_lm": self.lm}  # whose passes Export counts
        self.loss_name, self.time_warp, self.self_condition = loss, time_warp, self_condition
        self.labeller = labels
        self.label_reward = labels and labels.reward  # whose calls Export counts
        n_labels = len(labels.edges) + 1 if labels else 0
        self.network = DenoiserNetwork(
            self.embedding, self.schedule, network.size, network.tied_head, n_labels, self.lm.model
        )
        if init_from == "base_lm":
            self.network.init_from_lm(self.lm.model, self.lm.bos_id)
        elif init_from != "random":
            self._init_from(init_from)
        self.prepare_blocks(network)
        self.register_buffer("loss_in_bin", torch.full((_BINS,), -1.0))

    def _init_from(self, path: str) -> None:
        settings, weights = read_network(path, "denoiser", "init_from", self.embedding)
        if self.network.labels is not None:
            weights.setdefault("labels.weight", self.network.labels.weight.detach())
        load_weights(self.network, settings, weights, "init_from", path)

    def labels(self, batch: dict[str, Tensor], stream: int | None = None) -> Tensor | None:
        """Each row's label (B,), where there are labels; with a `stream`, which numbers the
        draw, some are dropped.
        """
        if self.labeller is None:
            return None
        labels = self.labeller(self.lm.decode(batch["tokens"], batch["prompt_mask"]))
        if stream is not None:
            rows, n_rows = self.rows_in_all(len(labels), labels.device)
            # Noise has the seed itself; this one draws other numbers.
            labels = self.labeller.dropped(labels, rows, n_rows, 2 * self.stream_seed(stream) + 1)
        return labels.to(self.device)

    def losses(
        self, tokens: Tensor, noised: Noised, estimated: bool, label: Tensor | None = None,
        filled: Tensor | None = None,
    ) -> Losses:  # fmt: skip
        """Losses at the noised positions; the fixed shape (B·T) comes first, so nothing waits.

        Of an infiller also at those `filled` (B, T), noised or not, where p_θ reads the text itself
        on the left and where it is clean a token is not its own evidence.
        """
        z0_prev = None
        if estimated:
            with torch.no_grad():
                hidden, query = self.network.hidden(noised.z, noised.t, None, label)
                flat = expected_embedding(self.network, hidden.flatten(0, 1), query.flatten(0, 1))
            z0_prev = flat.unflatten(0, tokens.shape)
        keep, left = (noised.noised, None) if filled is None else (filled, tokens)
        hidden, query = self.network.hidden(noised.z, noised.t, z0_prev, label, left)
        if filled is not None:
            query = query * noised.noised[..., None]
        t = noised.t[keep]
        return Losses(
            *summed(
                LOSSES[self.loss_name], self.network, hidden[keep], query[keep], tokens[keep], t
            ),
            t,
        )

    @float32_default()
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        number = self.batch_number
        label = self.labels(batch, number)
        fills = self.infills and number % _DENOISED > 0
        estimated = (
            self.self_condition > 0 and number % self.self_condition == self.self_condition - 1
        )
        given = (
            batch["tokens"], self.noised(batch, number, fills), estimated and not fills, label,
            self.filled(batch) if fills else None,
        )  # fmt: skip
        self.compile_once(lambda: self.losses(*given).values.mean())
        total, values, t = self.losses(*given)
        # Mean over the positions of all processes, so that the gradient is that of one process with
        # the whole batch.
        count = self.trainer.strategy.reduce(
            values.new_tensor(float(len(values))), reduce_op="mean"
        )
        # A batch may have no noised position, a small one of short texts say: it teaches nothing.
        loss = total / count.clamp_min(1 / self.trainer.world_size)
        if not fills:
            self._note_loss(values, t)
        kept = self.filled(batch) if fills else given[1].noised
        self.note_rows(
            batch, torch.zeros_like(kept).masked_scatter(kept, ~values.isfinite()).any(1)
        )
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def filled(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, T) bool, where an infiller learns to fill gaps: the text, its end token included."""
        return scored_mask(batch["tokens"], batch["prompt_mask"], self.lm.end_id)

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
            self.schedule.set_warp(
                warp_knots(centres[seen], self.loss_in_bin[seen], len(self.schedule.knots) - 1)
            )

    def on_validation_epoch_start(self) -> None:
        self._in_bands = torch.zeros(2, N_BANDS, device=self.device)
        self._in_gaps = torch.zeros(2, device=self.device)

    @float32_default()
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        noised, estimated = self.noised(batch, -1 - batch_idx), self.self_condition > 0
        _, values, t = self.losses(batch["tokens"], noised, estimated, self.labels(batch))
        self._in_bands += torch.stack(
            [self.band_sums(values, t), self.band_sums(torch.ones_like(values), t)]
        )
        if self.infills:
            gaps = self.noised(batch, -1 - batch_idx, gaps=True)
            filled = self.filled(batch)
            values = self.losses(
                batch["tokens"], gaps, False, self.labels(batch), filled
            ).values[(gaps.t == self.schedule.warp(values.new_ones(())))[filled]]  # fmt: skip
            self._in_gaps += torch.stack([values.sum(), values.new_tensor(float(len(values)))])

    def on_validation_epoch_end(self) -> None:
        """Mean loss over all noised positions, and in each band that has any; of an infiller
        also of hidden positions, given all on their left.
        """
        sums = self.trainer.strategy.reduce(self._in_bands, reduce_op="sum")
        assert isinstance(sums, Tensor)
        for name, (total, count) in zip(BANDS, sums.T, strict=True):
            if count > 0:
                self.log(f"val/loss_{name}", total / count, sync_dist=True)
        if self.infills:
            total, count = self.trainer.strategy.reduce(self._in_gaps, reduce_op="sum")
            self.log("val/loss_filled", total / count, sync_dist=True)
        self.log("val/loss", sums[0].sum() / sums[1].sum(), prog_bar=True, sync_dist=True)

    def settings(self) -> dict[str, Any]:
        size, tied = self.network.size.as_dict(), self.network.tied_head
        labels = {} if self.labeller is None else {"labels": self.labeller.settings()}
        return {**super().settings(), "kind": "denoiser", "size": size, "tied_head": tied, **labels}
