"""Prompts for a sampler: from a file, a list or none, cut into batches that do not depend on the number of processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import lightning as L
import torch

from dia_lightning.lm import BaseLM
from dia_lightning.resources import UserError, require_path
from dia_lightning.types import Prompts


def read_prompts(path: str | Path) -> list[str]:
    """Prompts of a `.txt` file (one a line) or a `.jsonl` file (field `prompt`), empty lines left out.

    Raises:
        UserError: if the file is missing, not UTF-8, of another kind, empty, or a line of it is no such object.
    """
    option = "--data.init_args.prompts"
    file = require_path(path, option)
    if file.suffix not in (".txt", ".jsonl"):
        raise UserError(f"{option}: {path} given, allowed are files ending in .txt or .jsonl")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option}: cannot read {path} as UTF-8 text ({error})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if file.suffix == ".jsonl":
        prompts = [_prompt_of(line, f"{path}, text line {i}") for i, line in enumerate(prompts, 1)]
    if not prompts:
        raise UserError(f"{option}: {path} holds no prompt; leave the option out to sample without prompts")
    return prompts


def _prompt_of(line: str, where: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'--data.init_args.prompts: {where} is no JSON object with a field "prompt"') from error
    if not isinstance(prompt, str):
        raise UserError(f"--data.init_args.prompts: {where}: the prompt is no string but {prompt!r:.60}")
    return prompt


def prompt_rows(lm: BaseLM, prompts: list[str], max_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, max_length) with each prompt at the left, and its mask (B, max_length).

    Raises:
        UserError: if a prompt leaves no position free.
    """
    ids = lm.tokenizer(prompts, add_special_tokens=False)["input_ids"]
    for prompt, row in zip(prompts, ids, strict=True):
        if len(row) >= max_length:
            raise UserError(
                f"--data.init_args.prompts: {prompt[:40]!r} has {len(row)} tokens, allowed are at most {max_length - 1} "
                f"(--data.init_args.max_length is {max_length})"
            )
    lengths = torch.tensor([len(row) for row in ids])
    mask = torch.arange(max_length) < lengths[:, None]
    tokens = torch.full((len(prompts), max_length), lm.end_id, dtype=torch.int64)
    tokens[mask] = torch.tensor([i for row in ids for i in row], dtype=torch.int64)
    return tokens, mask


class _Batches:
    """The batches of a run that one process draws, by their numbers.

    No `DataLoader`: Lightning would split one among the processes itself, and fails where a process has nothing to do.
    """

    def __init__(self, lm: BaseLM, texts: list[str], batch_size: int, max_length: int, indices: list[int]) -> None:
        self.lm, self.texts, self.batch_size, self.max_length, self.indices = lm, texts, batch_size, max_length, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Prompts]:
        for index in self.indices:
            start = index * self.batch_size
            texts = self.texts[start : start + self.batch_size]
            tokens, mask = prompt_rows(self.lm, texts, self.max_length)
            yield Prompts(index, list(range(start, start + len(texts))), texts, tokens, mask)


class PromptData(L.LightningDataModule):
    """Work for `lightning predict`: `n_texts` texts for every prompt, or `n_texts` without a prompt.

    Attributes:
        texts: after `setup`, the prompt of every text of the run.

    Args:
        prompts: a `.txt` or `.jsonl` file, a list of strings, or nothing.
        n_texts: texts for each prompt.
        batch_size: texts sampled together; with the seed it determines the result, the number of processes does not.
        max_length: longest text in tokens, prompt and end token included.
        base_lm: hub id or folder of p_θ, for its tokenizer; the model's by default.
    """

    def __init__(
        self,
        base_lm: str = "checkpoints/tiny/lm",
        prompts: str | list[str] | None = None,
        n_texts: int = 64,
        batch_size: int = 64,
        max_length: int = 40,
    ) -> None:
        super().__init__()
        for option, value in (("n_texts", n_texts), ("batch_size", batch_size), ("max_length", max_length)):
            if value < 1:
                raise UserError(f"--data.init_args.{option}: {value} given, at least 1 allowed")
        self.base_lm, self.prompts, self.n_texts = base_lm, prompts, n_texts
        self.batch_size, self.max_length = batch_size, max_length
        # A process may have no batch: fewer may be left than there are processes.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.lm: BaseLM
        self.texts: list[str] = []
        self.wanted: list[int] = []

    def setup(self, stage: str) -> None:
        model = self.trainer.lightning_module if self.trainer else None
        self.lm = getattr(model, "lm", None) or BaseLM.load(self.base_lm)
        if self.max_length > self.lm.max_length:
            raise UserError(
                f"--data.init_args.max_length: {self.max_length} given, {self.lm.name} allows at most {self.lm.max_length}"
            )
        prompts = [""] if self.prompts is None else self.prompts
        prompts = read_prompts(prompts) if isinstance(prompts, str) else prompts
        if not prompts:
            raise UserError("--data.init_args.prompts: an empty list given; leave the option out to sample without")
        prompt_rows(self.lm, prompts, self.max_length)  # a prompt that is too long is an error now, not after hours
        self.texts = [prompt for prompt in prompts for _ in range(self.n_texts)]
        self.skip(set())

    def transfer_batch_to_device(self, batch: Prompts, device: torch.device, dataloader_idx: int) -> Prompts:
        return replace(batch, tokens=batch.tokens.to(device), prompt_mask=batch.prompt_mask.to(device))

    @property
    def n_batches(self) -> int:
        """Batches of the whole run."""
        return -(-len(self.texts) // self.batch_size)

    def skip(self, done: set[int]) -> None:
        """Leave out batches that an earlier run has finished."""
        self.wanted = [index for index in range(self.n_batches) if index not in done]

    def predict_dataloader(self) -> _Batches:
        """Process r of W draws the batches r, r + W, … of those that are wanted."""
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        return _Batches(self.lm, self.texts, self.batch_size, self.max_length, self.wanted[rank::world])

    def test_dataloader(self) -> _Batches:
        return self.predict_dataloader()
