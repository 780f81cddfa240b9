"""Prompts for a sampler: from a file, a list or none, cut into batches that do not depend on the
number of processes.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import lightning as L
import torch

from dia_lightning.data.base import base_lm_of
from dia_lightning.data.lazy import Missing, Repeated
from dia_lightning.data.records import fill_template, read_records, template_fields
from dia_lightning.data.rows import elastic_blanks, prompt_rows
from dia_lightning.data.text import read_texts
from dia_lightning.errors import UserError, renamed
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.types import Batch, Record, has_blank

# Lengths that are drawn and kept; each takes 8 bytes and its prompt a look.
_MOST_DRAWN = 10_000_000


class _Batches:
    """The batches of a run that one process of `world` draws, by their numbers.

    No `DataLoader`: Lightning would split one among the processes itself, and fails where a process
        has nothing to do.
    """

    def __init__(self, data: PromptData, indices: Sequence[int], rank: int, world: int) -> None:
        self.data, self.indices, self.places = data, indices, range(rank, len(indices), world)

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[Batch]:
        for place in self.places:
            yield self.data.batch(self.indices[place])


@dataclass(frozen=True)
class Reading:
    """How records are read from a file or a data set, and how they become prompts.

    Args:
        fields: Columns of the file that make a record's fields, see `records.read_records`.
        split: Part of the data set to read, where it has several.
        limit: Take the first records only, 1 or more; null = all.
        template: Prompt made of a record's fields, for example `"{source:400} TL;DR:"` (its first
            400 words); null = the field `prompt`; `""` = no prompt, the records serve rewards and
            metrics alone.
    """

    fields: dict[str, str | list[str]] | None = None
    split: str = "train"
    limit: int | None = None
    template: str | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit: {self.limit} given, allowed: 1 or more")


class PromptData(L.LightningDataModule):
    """Work for `lightning predict`: `n_texts` texts for every prompt, or `n_texts` without a
    prompt.

    Attributes:
        texts: after `setup`, the prompt of every text of the run.
        records: the record of each: the fields of its line in the file, for rewards and metrics
            that compare with them.

    Args:
        base_lm: Hub id or folder of p_θ, for its tokenizer; the model's by default, and no other.
        prompts: List of strings, or a file or data set (see `records.read_records`); null = no
            prompt. A prompt begins the text. With blanks, `[blank:3]` of three tokens or
            `[blank]` of any number, it is the whole text.
        reading: How the file is read: its columns, and how they make a prompt.
        n_texts: Texts for each prompt, 1 or more.
        batch_size: Texts sampled together, 1 or more. With the seed it determines the texts; the
            number of processes does not.
        max_length: Longest text in tokens, prompt and end token included.
        length: Exact number of tokens after the prompt, end token not counted, or a file of texts
            whose lengths are drawn; null = p_θ ends the text. For `Diffusion` and moves of
            `DenoiseAccept`, which can hold an end token in its place.
        reward_sees_prompt: Give rewards the prompt and the text as one; false = the text alone.
        end_tokens: Tokens that end a text besides the model's own, for example a line feed.
    """

    def __init__(
        self,
        base_lm: str | None = None,
        prompts: str | list[str] | None = None,
        reading: Reading = Reading(),
        n_texts: int = 64,
        batch_size: int = 64,
        max_length: int = 40,
        length: int | str | None = None,
        reward_sees_prompt: bool = True,
        end_tokens: list[str] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("n_texts", n_texts),
            ("batch_size", batch_size),
            ("max_length", max_length),
        ):
            if value < 1:
                raise UserError(f"{name}: {value} given, allowed: 1 or more")
        self.base_lm, self.prompts, self.n_texts = base_lm, prompts, n_texts
        self.reading = reading
        self.batch_size, self.max_length, self.length = batch_size, max_length, length
        self.reward_sees_prompt, self.end_tokens = reward_sees_prompt, end_tokens
        # A process may have no batch: fewer may be left than there are processes.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.lm: BaseLM
        self.texts: Repeated[str] = Repeated([], n_texts)
        self.records: Repeated[Record] = Repeated([], n_texts)
        self.lengths: Sequence[int] = []
        self.wanted: Sequence[int] = []

    def setup(self, stage: str) -> None:
        model = self.trainer.lightning_module if self.trainer else None
        own = getattr(model, "base_lm", None)
        if isinstance(own, str) and self.base_lm not in (None, own):
            raise UserError(f"base_lm: {self.base_lm} given, allowed: the model's, {own}")
        self.lm = getattr(model, "lm", None) or BaseLM.load(base_lm_of(self, self.base_lm))
        if self.max_length > self.lm.max_length:
            raise UserError(
                f"max_length: {self.max_length} given, allowed: up to {self.lm.max_length} for"
                f" {self.lm.name}"
            )
        self.lm.add_ends(self._end_ids())
        records = self._read()
        prompts = [self._prompt(record) for record in records]
        if len(prompts) * self.n_texts > sys.maxsize:
            raise UserError(
                f"n_texts: {self.n_texts} given, allowed: as many texts as can be numbered"
            )
        self.texts, self.records = Repeated(prompts, self.n_texts), Repeated(records, self.n_texts)
        self.lengths = self._lengths(len(self.texts))
        blank = next(filter(has_blank, prompts), None)
        if self.length is not None and blank is not None:
            raise UserError(
                f"length: {self.length} given, allowed: null where prompts have blanks, such as"
                f" {blank[:40]!r}"
            )
        # A prompt that is too long is an error now, not after hours.
        if isinstance(self.length, int):
            prompt_rows(
                self.lm, [f"{prompt}[blank:{self.length}]" for prompt in prompts], self.max_length
            )
        for index in range(self.n_batches) if isinstance(self.length, str) else ():
            self.batch(index)
        prompt_rows(self.lm, prompts, self.max_length)
        self.skip(set())

    def _end_ids(self) -> list[int]:
        texts = self.end_tokens or []
        with renamed(texts="end_tokens"):
            ids = self.lm.continued_ids(texts)
        for text, found in zip(texts, ids, strict=True):
            if len(found) != 1:
                raise UserError(
                    f"end_tokens: {text!r} given, allowed: what is one token of"
                    f" {self.lm.name}, it is {len(found)}"
                )
        return [found[0] for found in ids]

    def _read(self) -> list[Record]:
        if self.prompts is None:
            return [{"prompt": ""}]
        if isinstance(self.prompts, str):
            template = self.reading.template
            needs = ("prompt",) if template is None else template_fields(template)
            return read_records(
                self.prompts,
                self.reading.fields,
                self.reading.split,
                self.reading.limit,
                needs=needs,
            )
        if not self.prompts:
            raise UserError(
                "prompts: an empty list given, allowed: one prompt or more, or null for none"
            )
        return [{"prompt": prompt} for prompt in self.prompts[: self.reading.limit]]

    def _prompt(self, record: Record) -> str:
        return (
            str(record["prompt"])
            if self.reading.template is None
            else fill_template(self.reading.template, record)
        )

    def _lengths(self, n: int) -> Sequence[int]:
        """The number of tokens of each text, where it is given."""
        if self.length is None:
            return []
        if isinstance(self.length, int):
            if self.length < 1:
                raise UserError(f"length: {self.length} given, allowed: 1 or more")
            return Repeated([self.length], n)
        if n > _MOST_DRAWN:
            raise UserError(
                f"n_texts: {self.n_texts} given; a length is drawn for each of {n}"
                f" texts before the first, allowed: {_MOST_DRAWN} with data.length"
                f" {self.length}"
            )
        column = "ref" if self.length.lower().endswith(".csv") else "text"
        seen = self.lm.tokenizer(
            read_texts(self.length, column, "length"), add_special_tokens=False
        )["input_ids"]
        fitting = [len(ids) for ids in seen if 0 < len(ids) < self.max_length]
        if not fitting:
            raise UserError(
                f"length: {self.length} has no text of 1 to {self.max_length - 1} tokens"
            )
        return random.Random(0).choices(fitting, k=n)

    def batch(self, index: int) -> Batch:
        """Batch number `index` of the run."""
        ids = range(index * self.batch_size, min((index + 1) * self.batch_size, len(self.texts)))
        prompts = [self.texts[i] for i in ids]
        shaped = (
            [f"{self.texts[i]}[blank:{self.lengths[i]}]" for i in ids] if self.lengths else prompts
        )
        tokens, mask = prompt_rows(self.lm, shaped, self.max_length)
        return Batch(
            index,
            list(ids),
            prompts,
            tokens,
            mask,
            [self.records[i] for i in ids],
            self.reward_sees_prompt,
            elastic_blanks(shaped),
        )

    def record_of(self, text: int) -> Record:
        """The record of the text that has this number in the run."""
        return self.records[text]

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        # A true precision of the trainer copies every record; texts that share one share a
        # population.
        records = [self.record_of(text) for text in batch.ids]
        return replace(
            batch,
            tokens=batch.tokens.to(device),
            prompt_mask=batch.prompt_mask.to(device),
            records=records,
            elastic=None if batch.elastic is None else batch.elastic.to(device),
        )

    @property
    def n_batches(self) -> int:
        """Batches of the whole run."""
        return -(-len(self.texts) // self.batch_size)

    def skip(self, done: set[int]) -> None:
        """Leave out batches that an earlier run has finished."""
        self.wanted = Missing(self.n_batches, done)

    def predict_dataloader(self) -> _Batches:
        """Process r of W draws the batches r, r + W, … of those that are wanted."""
        world, rank = (
            (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        )
        return _Batches(self, self.wanted, rank, world)

    def test_dataloader(self) -> _Batches:
        return self.predict_dataloader()
