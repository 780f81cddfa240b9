"""Texts drawn from p_θ itself: what denoiser and critic are trained on."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dia_lightning.data.base import TokenData, TokenRows, base_lm_of
from dia_lightning.data.records import read_records
from dia_lightning.data.rows import prompt_rows
from dia_lightning.data.shared import Together, wait_for_files
from dia_lightning.errors import UserError
from dia_lightning.files import in_place
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.meter import Meter, difference
from dia_lightning.types import Cost, has_blank


class ModelSamples(TokenData):
    """Samples of p_θ, drawn once and kept on disk.

    Rows come in shards; each shard is drawn from (seed, shard) alone and moved into place whole. A
    run that was stopped goes on with the missing shards, and more texts later only add shards. Of
    several processes each draws a share of the
    shards, and all read the same ones: the rows are those that one process draws. The folder's name
    is a hash of everything that determines the rows.

    A run of few steps draws no more shards than its steps use. As rows are independent draws, the
    first epoch takes them
    in the order in which they were drawn: step k sees the same rows however long the run is, and
    when it is prolonged later the missing shards are drawn and it goes on with the rows after the
    last.

    Args:
        base_lm: Hub id or folder of p_θ; the model's by default, and no other.
        n_texts: Rows to train on, 1 or more.
        n_val: Rows held out besides, 1 or more.
        max_length: Longest row in tokens, prompt and end token included, 2 or more; longer texts
            are cut.
        batch_size: Rows in a step and process, 1 or more.
        prompts: File or data set with the field `prompt`, of which one is drawn for each row; null
            = no prompts.
        temperature: Temperature of p_θ's next-token distribution, above 0; 1 = p_θ.
        cache: Folder of the caches, the same for all nodes of a run.
        shard_size: Rows in a shard, 1 or more: they are drawn as one batch and kept as one file.
        seed: Seed of the samples and of the order of batches.
    """

    shuffled = 1

    def __init__(
        self,
        base_lm: str | None = None,
        n_texts: int = 16384,
        n_val: int = 512,
        max_length: int = 40,
        batch_size: int = 64,
        prompts: str | None = None,
        temperature: float = 1.0,
        cache: str = "runs/samples",
        shard_size: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__(max_length, batch_size, seed)
        for name, value in (("n_texts", n_texts), ("n_val", n_val), ("shard_size", shard_size)):
            if value < 1:
                raise UserError(f"{name}: {value} given, allowed: 1 or more")
        if not 0 < temperature < math.inf:
            raise UserError(f"temperature: {temperature} given, allowed: above 0, finite")
        self.base_lm, self.n_texts, self.n_val = base_lm, n_texts, n_val
        self.prompts, self.temperature, self.shard_size = prompts, temperature, shard_size
        self.cache = Path(cache)
        self._lm: BaseLM | None = None

    @property
    def lm(self) -> BaseLM:
        self._lm = self._lm or BaseLM.load(base_lm_of(self, self.base_lm))
        return self._lm

    @property
    def device(self) -> torch.device:
        """Where rows are drawn."""
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    @property
    def folder(self) -> Path:
        """The cache folder of these settings."""
        key: dict[str, Any] = {
            "weights": fingerprint(self.lm),
            "prompts": self._prompts() if self.prompts else None,
            "max_length": self.max_length,
            "temperature": self.temperature,
            "shard_size": self.shard_size,
            "seed": self.seed,
        }
        if self.device.type != "cpu":  # generators of another kind of device draw other numbers
            key["device"] = self.device.type
        return self.cache / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]

    def shard_path(self, folder: Path, shard: int) -> Path:
        return folder / f"shard-{shard:05d}.safetensors"

    @property
    def n_shards(self) -> int:
        """Shards that this run uses: held-out rows come first."""
        return -(-(min(self.n_texts, self._rows_of_all_steps()) + self.n_val) // self.shard_size)

    def _rows_of_all_steps(self) -> int:
        trainer = self.trainer
        if not trainer or trainer.max_steps < 0:
            return self.n_texts
        world = trainer.num_nodes * trainer.num_devices
        return max(1, trainer.max_steps) * trainer.accumulate_grad_batches * self.batch_size * world

    def _missing(self, folder: Path) -> list[int]:
        return [i for i in range(self.n_shards) if not self.shard_path(folder, i).exists()]

    def _draw_missing(self, folder: Path) -> None:
        """Each process draws its share of the missing shards; ends when all shards are there."""
        world, rank = (
            (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        )
        folder.mkdir(parents=True, exist_ok=True)
        together = Together(world)
        # The first process looks, before any of them draws, so that all share out the same shards.
        if share := together.agree(self._missing(folder))[rank::world]:
            self._draw_shards(folder, share, shown=rank == 0)
        together.total(len(share))
        wait_for_files(lambda: not self._missing(folder), "cache", self.cache)

    def _draw_shards(self, folder: Path, shards: list[int], shown: bool) -> None:
        from rich.progress import track
        from safetensors.torch import save_file

        self.lm.to(self.device)
        meter = Meter()
        meter.watch("base_lm", self.lm.multiplied())
        for shard in track(shards, description=f"Sampling from {self.lm.name}", disable=not shown):
            path = self.shard_path(folder, shard)
            before, begin = meter.read(), time.perf_counter()
            rows = self.draw(shard, self.device)
            spent = {name: tuple(cost) for name, cost in difference(meter.read(), before).items()}
            with in_place(path) as partial:
                save_file(
                    rows,
                    partial,
                    {"costs": json.dumps(spent), "seconds": str(time.perf_counter() - begin)},
                )
        self.lm.to(torch.device("cpu"))  # it draws no more

    def drawing_costs(self) -> tuple[dict[str, Cost], float]:
        """What the rows of this run cost when they were drawn, also in an earlier run, and the
        seconds of all processes.
        """
        from safetensors import safe_open

        total, seconds, folder = Cost(), 0.0, self.folder
        for shard in range(self.n_shards):
            with safe_open(self.shard_path(folder, shard), "pt") as file:
                spent = file.metadata() or {}
            total = total.plus(Cost(*json.loads(spent.get("costs", "{}")).get("base_lm", Cost())))
            seconds += float(spent.get("seconds", 0))
        return {"base_lm": total}, seconds

    def draw(self, shard: int, device: torch.device) -> dict[str, Tensor]:
        """Rows of one shard: `tokens` (N, T) int32 and `prompt_length` (N,) int32."""
        generator = torch.Generator(device).manual_seed(self.seed * 1_000_003 + shard)
        prompts = self._prompts()
        chosen = torch.randint(
            len(prompts), (self.shard_size,), generator=generator, device=device
        ).tolist()
        tokens, mask = prompt_rows(self.lm, [prompts[i] for i in chosen], self.max_length)
        drawn = self.lm.generate(tokens.to(device), mask.to(device), generator, self.temperature)
        return {"tokens": drawn.int().cpu(), "prompt_length": mask.sum(1).int()}

    def _prompts(self) -> list[str]:
        prompts = (
            [str(r["prompt"]) for r in read_records(self.prompts, needs=("prompt",))]
            if self.prompts
            else [""]
        )
        for prompt in filter(has_blank, prompts):
            raise UserError(
                f"prompts: {prompt[:40]!r} given, allowed: without blanks; p_θ cannot fill them"
                " from both sides"
            )
        return prompts

    def setup(self, stage: str) -> None:
        """Draw what is missing, and read what this run uses.

        Raises:
            UserError: if rows are longer than p_θ's, or the processes do not share the cache.
        """
        if self.max_length > self.lm.max_length:
            allowed = f"allowed: up to {self.lm.max_length} for {self.lm.name}"
            raise UserError(f"max_length: {self.max_length} given, {allowed}")
        folder = self.folder
        self._draw_missing(folder)
        shards = [
            _read_shard(self.shard_path(folder, i), self.lm.vocab_size)
            for i in range(self.n_shards)
        ]
        tokens = torch.cat([s["tokens"] for s in shards]).long()
        prompt_length = torch.cat([s["prompt_length"] for s in shards]).long()
        end = self.lm.end_id
        self.val_rows = TokenRows(tokens[: self.n_val], end, prompt_length[: self.n_val])
        rest = slice(self.n_val, self.n_val + self.n_texts)
        self.train_rows = TokenRows(tokens[rest], end, prompt_length[rest])

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.folder.name}


def _read_shard(path: Path, vocab_size: int) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        rows = load_file(path)
        tokens, length = rows["tokens"], rows["prompt_length"]
        if (
            tokens.min() < 0
            or tokens.max() >= vocab_size
            or length.min() < 0
            or length.max() > tokens.shape[1]
        ):
            raise ValueError("it holds numbers that are no tokens")
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"cache: {path} is damaged ({error}); delete it, and the same command draws it again"
        ) from error
    return rows


def fingerprint(lm: BaseLM, others: Mapping[str, Tensor] | None = None) -> str:
    """A hash of all weights and of the tokenizer, and of the weights of other networks, if any.

    Of a model whose weights are shared out over processes, all must ask for it.
    """
    digest = hashlib.sha256(tokenizer_content(lm.tokenizer).encode())
    for weights in (lm.model.state_dict(), others or {}):
        for name, weight in sorted(weights.items()):
            digest.update(name.encode())
            whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
            digest.update(
                whole.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
            )
    return digest.hexdigest()


def tokenizer_content(tokenizer: Any) -> str:
    """Everything that a tokenizer is, in one string."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    # Left behind by the last call of the tokenizer, not part of what it is.
    content.pop("truncation"), content.pop("padding")
    return json.dumps(content, sort_keys=True)
