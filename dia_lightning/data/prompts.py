"""Prompts for a sampler: from a file, a list or none, cut into batches that do not depend on the
number of processes.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import lightning as L
import torch

from dia_lightning.data.base import base_lm_of
from dia_lightning.data.lazy import Missing, Repeated
from dia_lightning.data.records import fill_template, read_records, template_fields
from dia_lightning.data.text import read_texts
from dia_lightning.errors import UserError, renamed
from dia_lightning.files import is_text
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.types import Batch, Record

_BLANK = re.compile(r"\[blank(?::(\d+))?\]")
# What was meant as a blank, and would otherwise be text.
_LIKE = re.compile(r"\[\s*blanks?\b[^\]]*\]?", re.IGNORECASE)

# No token has more. Cutting a word of millions into tokens takes minutes.
_LETTERS = 1000
# Lengths that are drawn and kept; each takes 8 bytes and its prompt a look.
_MOST_DRAWN = 10_000_000


def has_blank(prompt: str) -> bool:
    """Whether a prompt has blanks to fill in, `[blank]` or `[blank:N]`."""
    return _BLANK.search(prompt) is not None


def prompt_rows(
    lm: BaseLM, prompts: list[str], max_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, max_length) of each prompt, and its mask (B, max_length), True at what is given.

    A prompt is the beginning of a text. One with blanks, `[blank:N]` for N free tokens and
    `[blank]` for one or more, is the whole of it: its end token is given too, unless `[blank]` is
    the last of it. The rows have one position for each `[blank]` (see `elastic_blanks`).

    Raises:
        UserError: if a prompt leaves no position free, or a blank is malformed, longer than a text
            may be, or next to another whose length is not given.
    """
    for prompt in prompts:
        if len(prompt) > _LETTERS * max_length:
            raise UserError(
                f"prompts: {prompt[:40]!r} has {len(prompt)} letters, too many for"
                f" {max_length} tokens (data.max_length)"
            )
        if not is_text(prompt):
            raise UserError(f"prompts: {prompt[:40]!r} is no text that UTF-8 can hold")
        _check_blanks(prompt)
        for count in filter(None, _BLANK.findall(prompt)):
            # Not made into a number where that takes more digits than Python allows.
            if len(count) > 9 or int(count) > max_length:
                raise UserError(
                    f"prompts: {prompt[:40]!r} has a blank of {count:.20} tokens,"
                    f" allowed: at most {max_length} (data.max_length)"
                )
    tokens = torch.full((len(prompts), max_length), lm.end_id, dtype=torch.int64)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, given, (prompt, ids) in zip(
        tokens, mask, zip(prompts, _ids(lm, prompts), strict=True), strict=True
    ):
        whole = has_blank(prompt) and not prompt.endswith("[blank]")
        if len(ids) > max_length or (len(ids) == max_length and not whole):
            raise UserError(
                f"prompts: {prompt[:40]!r} has {len(ids)} tokens, allowed: at"
                f" most {max_length - 1} (data.max_length is {max_length})"
            )
        values = torch.tensor(ids, dtype=torch.int64)
        row[: len(ids)] = torch.where(values < 0, lm.end_id, values)
        given[: len(ids)] = values >= 0
        given[len(ids) :] = whole
    return tokens, mask


def _check_blanks(prompt: str) -> None:
    for found in _LIKE.findall(prompt):
        if _BLANK.fullmatch(found) is None:
            raise UserError(
                f"prompts: {found:.40} given in {prompt[:40]!r}, allowed: [blank] for any number of"
                " tokens, [blank:3] for three"
            )
    parts = _BLANK.split(prompt)
    for i in range(2, len(parts) - 2, 2):
        if not parts[i].strip() and None in (parts[i - 1], parts[i + 1]):
            raise UserError(
                f"prompts: two blanks side by side given in {prompt[:40]!r}, allowed: one, or words"
                " between them"
            )


def elastic_blanks(prompts: Sequence[str]) -> torch.Tensor | None:
    """(B, S) bool, which of the blanks of each prompt have any length (`Batch.elastic`); None where
    none has.
    """
    rows = []
    for prompt in prompts:
        counts = _BLANK.split(prompt)[1::2]
        runs, parts = [], _BLANK.split(prompt)[::2]
        for i, count in enumerate(counts):
            # Blanks of given lengths side by side are one run.
            if not i or parts[i].removesuffix(" "):
                runs.append(count is None)
        rows.append(runs)
    if not any(map(any, rows)):
        return None
    wide = max(map(len, rows))
    return torch.tensor([runs + [True] * (wide - len(runs)) for runs in rows])


def _ids(lm: BaseLM, prompts: list[str]) -> list[list[int]]:
    """The tokens of each prompt, −1 for one that is free."""
    pieces = [_BLANK.split(prompt) for prompt in prompts]
    # The space before a blank belongs to the word that fills it, as most tokenizers have it.
    texts = [
        [
            part.removesuffix(" ") if i < len(parts) // 2 else part
            for i, part in enumerate(parts[::2])
        ]
        for parts in pieces
    ]
    with renamed(texts="prompts"):
        first = iter(lm.token_ids([parts[0] for parts in texts]))
        later = iter(lm.continued_ids([part for parts in texts for part in parts[1:]]))
    rows = []
    for parts in pieces:
        row = next(first)
        for count in parts[1::2]:
            row += [-1] * int(count or 1) + next(later)
        rows.append(row)
    return rows


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
