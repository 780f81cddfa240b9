"""Corpora: text files and hub data sets, with the same output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from dia_lightning.data.base import TokenData, TokenRows, base_lm_of
from dia_lightning.data.sources import file_rows, hub_rows
from dia_lightning.errors import UserError
from dia_lightning.files import find_path, is_text
from dia_lightning.lm.files import folder_of

END_OF_TEXT = "<|endoftext|>"


def read_texts(path: str | Path, column: str, argument: str = "path") -> list[str]:
    """Texts of a file of any kind that holds prompts, without the space around them.

    `column` names the field that holds them; a `.txt` file (one a line) and a `.json` list of
    strings have none.

    Raises:
        UserError: if the file is missing, of another kind or damaged, has no such column or holds
            no text.
    """
    texts, columns = [], dict[str, None]()
    for where, row in file_rows(str(path), argument, column):
        columns |= dict.fromkeys(row)
        texts.append(_text(row.get(column), column, where, argument))
    if columns and column not in columns:
        raise UserError(
            f"{argument}: {path} has no column {column!r}, it has {', '.join(map(str, columns))}"
        )
    if not any(texts):
        raise UserError(f"{argument}: {path} holds no text")
    return list(filter(None, texts))


def _text(value: Any, column: str, where: str, argument: str) -> str:
    """A text without the space around it, "" where there is none."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{argument}: {where}: the field {column!r} is no string but {value!r:.60}")
    if not is_text(value):
        raise UserError(f"{argument}: {where}: the field {column!r} is no text that UTF-8 can hold")
    return value.strip()


def train_tokenizer(texts: Iterable[str], vocab_size: int, lowercase: bool = False) -> Any:
    """A byte-level BPE tokenizer in GPT-2's style with one special token, `<|endoftext|>`, for
    start, end and padding.

    With `lowercase` it turns every text into lower case first, also those that it will be given
    later.
    """
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer(lowercase=lowercase)
    bpe.train_from_iterator(
        texts, vocab_size, min_frequency=2, special_tokens=[END_OF_TEXT], show_progress=False
    )
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special)


def encode_rows(tokenizer: Any, texts: list[str], max_length: int) -> TokenRows:
    """Token rows of `texts`; a text longer than `max_length` keeps its first tokens and gets no
    end token.
    """
    end_id = tokenizer.eos_token_id
    ids = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=max_length)[
        "input_ids"
    ]
    rows = torch.full((len(ids), max_length), end_id, dtype=torch.int64)
    for row, token_ids in zip(rows, ids, strict=True):
        row[: len(token_ids)] = torch.tensor(token_ids)
    return TokenRows(rows, end_id)


class _Corpus(TokenData):
    """A corpus tokenized with a given tokenizer, or with one trained on it."""

    def __init__(
        self, tokenizer: str | None, train_vocab_size: int, train_lowercase: bool, max_length: int,
        batch_size: int, val_fraction: float, seed: int,
    ) -> None:  # fmt: skip
        super().__init__(max_length, batch_size, seed)
        if not 0 < val_fraction < 1:
            raise UserError(f"val_fraction: {val_fraction} given, allowed: 0 < fraction < 1")
        self._given, self.train_lowercase = tokenizer, train_lowercase
        self.train_vocab_size, self.val_fraction = train_vocab_size, val_fraction
        self.tokenizer: Any = None

    @property
    def tokenizer_path(self) -> str:
        return base_lm_of(self, self._given, "tokenizer")

    def train_and_val_texts(self) -> tuple[list[str], list[str]]:
        raise NotImplementedError

    def split(self, texts: list[str]) -> tuple[list[str], list[str]]:
        """A seeded random split; repeated texts are kept once, so that none stands on both
        sides.
        """
        unique = list(dict.fromkeys(texts))
        order = torch.randperm(
            len(unique), generator=torch.Generator().manual_seed(self.seed)
        ).tolist()
        n_val = max(1, round(self.val_fraction * len(unique)))
        return [unique[i] for i in order[n_val:]], [unique[i] for i in order[:n_val]]

    def prepare_data(self) -> None:
        if self.train_vocab_size and find_path(self.tokenizer_path) is None:
            texts = self.train_and_val_texts()[0]
            train_tokenizer(texts, self.train_vocab_size, self.train_lowercase).save_pretrained(
                self.tokenizer_path
            )

    def setup(self, stage: str) -> None:
        from transformers import AutoTokenizer

        found = find_path(self.tokenizer_path)
        given = found is not None and found.is_dir()
        folder = str(found) if given else folder_of(self.tokenizer_path, "tokenizer")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
            raise UserError(f"tokenizer: cannot load {self.tokenizer_path} ({reason})") from error
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"tokenizer: {self.tokenizer_path} has no end token")
        train, val = self.train_and_val_texts()
        self.train_rows = encode_rows(self.tokenizer, train, self.max_length)
        self.val_rows = encode_rows(self.tokenizer, val, self.max_length)


class TextFiles(_Corpus):
    """Texts of a file: `.txt` (one a line), `.jsonl`, `.csv`, `.tsv`, `.json` or `.parquet`.

    Args:
        path: File with the training texts.
        column: Field that holds the text, where the file has fields.
        val_path: File with held-out texts; null = hold out `val_fraction` of `path`.
        tokenizer: Folder or hub id of a tokenizer in transformers' format; by default that of the
            model's base_lm.
        train_vocab_size: Size of a byte-level BPE to train where the tokenizer's folder does not
            exist; 0 = never.
        train_lowercase: Train a tokenizer that knows lower case only.
        max_length: Longest row in tokens, end token included, 2 or more; longer texts are cut.
        batch_size: Rows in a step and process, 1 or more.
        val_fraction: Share held out where no `val_path` is given, between 0 and 1.
        seed: Seed of the split and of the order of batches.
    """

    def __init__(
        self,
        path: str,
        column: str = "text",
        val_path: str | None = None,
        tokenizer: str | None = None,
        train_vocab_size: int = 0,
        train_lowercase: bool = False,
        max_length: int = 64,
        batch_size: int = 64,
        val_fraction: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__(
            tokenizer, train_vocab_size, train_lowercase, max_length, batch_size, val_fraction, seed
        )
        self.path, self.column, self.val_path = path, column, val_path

    def train_and_val_texts(self) -> tuple[list[str], list[str]]:
        texts = read_texts(self.path, self.column)
        if self.val_path is None:
            return self.split(texts)
        return list(dict.fromkeys(texts)), read_texts(self.val_path, self.column, "val_path")


@dataclass(frozen=True)
class HubSource:
    """A corpus among the data sets of the hub.

    Args:
        dataset: Name on the hub, for example `Skylion007/openwebtext`.
        config: Configuration of the data set, where it has several.
        split: Part of the data set to read.
        column: Field that holds the text.
    """

    dataset: str
    config: str | None = None
    split: str = "train"
    column: str = "text"


class HubText(_Corpus):
    """The first `n_texts` texts of a `datasets` data set, streamed, so that a large corpus is not
    downloaded whole.

    Args:
        source: The data set, and where its texts are.
        n_texts: Texts to take, 2 or more.
        tokenizer: Folder or hub id of a tokenizer; by default that of the model's base_lm.
        train_vocab_size: Size of a byte-level BPE to train where the tokenizer's folder does not
            exist; 0 = never.
        train_lowercase: Train a tokenizer that knows lower case only.
        max_length: Longest row in tokens, end token included, 2 or more; longer texts are cut.
        batch_size: Rows in a step and process, 1 or more.
        val_fraction: Share of the texts held out, between 0 and 1.
        seed: Seed of the split and of the order of batches.
    """

    def __init__(
        self,
        source: HubSource,
        n_texts: int = 100_000,
        tokenizer: str | None = None,
        train_vocab_size: int = 0,
        train_lowercase: bool = False,
        max_length: int = 64,
        batch_size: int = 64,
        val_fraction: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__(
            tokenizer, train_vocab_size, train_lowercase, max_length, batch_size, val_fraction, seed
        )
        if n_texts < 2:
            raise UserError(f"n_texts: {n_texts} given, allowed: 2 or more")
        self.source, self.n_texts = source, n_texts

    def train_and_val_texts(self) -> tuple[list[str], list[str]]:
        return self.split(list(islice(self._stream(), self.n_texts)))

    def _stream(self) -> Iterator[str]:
        argument, column = "dataset", self.source.column
        for where, row in hub_rows(
            self.source.dataset, self.source.config, self.source.split, argument
        ):
            if column not in row:
                fault = f"no column {column!r}, columns there: {', '.join(row)}"
                raise UserError(f"{argument}: cannot stream {self.source.dataset!r} ({fault})")
            if text := _text(row[column], column, where, argument):
                yield text
