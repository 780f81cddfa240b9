"""Whether a source document bears a text out, by a model of natural-language inference."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dia_lightning.errors import UserError, require
from dia_lightning.lm.token_text import readable
from dia_lightning.rewards.base import RewardError, field_of
from dia_lightning.rewards.classifier import load_classifier, logits_of, tokenize, window_of
from dia_lightning.types import Record, Reward

# Full stops, with closing quotes or brackets, before white space and anything but a small letter;
# those of Chinese and Japanese, which no white space follows.
_END = re.compile(r"(?<![.!?…])[.!?…]+[\"'”’»)\]]*(?=\s+[^\sa-z])|[。！？]+[」』”’）]*")
_ABBREVIATION = re.compile(
    r"\b(?:Mrs?|Ms|Dr|Prof|St|Sr|Jr|Gen|Sen|Rep|Gov|vs|[A-Z]|(?:[A-Za-z]\.)+[A-Za-z])\.$"
)


class Entailment(Reward):
    """How far the record's source entails the text: Σ_j max_i P(entailment | premise i, sentence j)
    / J, in [0, 1].

    The source is cut into sentences, which are packed in order into chunks of at most `max_premise`
    tokens, the premises i; each sentence j of the text is a hypothesis. A sentence too long for its
    place is halved, near white space, until it
    fits: nothing is left unread. An empty or blank text claims nothing and gets 0.

    Source: SummaC zero-shot, Laban et al., arXiv:2111.09525, section 3.3 (max over premises, mean
    over hypotheses), with P (entailment) alone as score and chunks for premises.

    Args:
        model: Hub id or local folder of a classifier of (premise, hypothesis) with one label for
            entailment.
        source_field: Field of the record with the source document.
        max_premise: Tokens in a chunk of the source; by default three quarters of the model's
            window, the rest is the hypothesis'.
        batch_size: Pairs that the network reads at a time, 1 or more.
        name: Label in outputs.

    Raises:
        UserError: if the model cannot be loaded, none or several of its labels say entailment, or
            an argument does not fit.
        RewardError: when called, if a record has no source or an empty one.
    """

    conditional = True
    on_prefix = False

    def __init__(
        self, model: str = "FacebookAI/roberta-large-mnli", source_field: str = "source",
        max_premise: int | None = None, batch_size: int = 32, name: str = "entailment",
    ) -> None:  # fmt: skip
        self.model, self.source_field, self.max_premise = model, source_field, max_premise
        self.batch_size, self.name = batch_size, name
        require("batch_size", batch_size, batch_size > 0, "1 or more")
        self._network, self._tokenizer = load_classifier(model)
        self._index = _entailment_index(self._network.config, model)
        self._window = window_of(self._network, self._tokenizer)
        free = self._window - self._tokenizer.num_special_tokens_to_add(pair=True)
        fits = max_premise is None or 0 < max_premise < free
        require(
            "max_premise",
            max_premise,
            fits,
            f"1 to {free - 1}; premise and hypothesis share {free} tokens of {model}",
        )
        self._most_premise = max_premise or min(free - 1, 3 * free // 4)
        self._most_hypothesis = free - self._most_premise

    def __call__(self, texts: Sequence[str], records: Sequence[Record] | None = None) -> Tensor:
        given = [{}] * len(texts) if records is None else records
        sources = [self._source(record) for record in given]
        premises = {
            source: pack(self._tokenizer, source, self._most_premise) for source in set(sources)
        }
        hypotheses = {
            text: pieces(self._tokenizer, text, self._most_hypothesis) for text in set(texts)
        }
        pairs: dict[tuple[str, str], int] = {}
        for source, text in zip(sources, texts, strict=True):
            for pair in ((i, j) for j in hypotheses[text] for i in premises[source]):
                pairs.setdefault(pair, len(pairs))
        p = self._probabilities(list(pairs))
        values = torch.zeros(len(texts))
        for k, (source, text) in enumerate(zip(sources, texts, strict=True)):
            if own := [pairs[i, j] for j in hypotheses[text] for i in premises[source]]:
                values[k] = p[own].view(len(hypotheses[text]), -1).amax(1).mean()
        return values

    def _source(self, record: Record) -> str:
        source = field_of(record, self.source_field, self)
        if not source.strip():
            raise RewardError(
                f"reward {self.name!r}: the field {self.source_field!r} of a record is empty,"
                " needed: a source text"
            )
        return source

    def _probabilities(self, pairs: list[tuple[str, str]]) -> Tensor:
        """P(entailment) of (premise, hypothesis), (N,)."""
        first, second = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        rows = tokenize(self._network, self._tokenizer, first, second, max_length=self._window)
        return logits_of(self._network, rows, self.batch_size).softmax(1)[:, self._index]


def sentences(text: str) -> list[str]:
    """The sentences of a text by rule: they end with their line, at 。！？, and at
    `.`, `!`, `?`, `…` before white space and no small letter, but not at the stop of an initial or
    a common English abbreviation.
    """
    found = []
    for line in text.splitlines():
        start = 0
        for end in _END.finditer(line):
            if end.group() != "." or not _ABBREVIATION.search(
                line, max(start, end.end() - 20), end.end()
            ):
                found.append(line[start : end.end()])
                start = end.end()
        found.append(line[start:])
    return [sentence.strip() for sentence in found if sentence.strip()]


def pieces(tokenizer: Any, text: str, most: int) -> list[str]:
    """The sentences of `text`, those of more than `most` tokens in parts."""
    return [piece for sentence in sentences(text) for piece in _halved(tokenizer, sentence, most)]


def pack(tokenizer: Any, text: str, most: int) -> list[str]:
    """The sentences of `text` in order, joined to chunks of at most `most` tokens."""
    parts = pieces(tokenizer, text, most)
    chunks: list[str] = []
    room = 0
    for part, size in zip(parts, _sizes(tokenizer, parts), strict=True):
        if chunks and size < room:  # a space may be a token more
            chunks[-1] += " " + part
            room -= size + 1
        else:
            chunks.append(part)
            room = most - size
    return chunks


def _halved(tokenizer: Any, text: str, most: int) -> list[str]:
    if len(text) < 2 or _sizes(tokenizer, [text])[0] <= most:
        return [text]
    middle = len(text) // 2
    space = text.rfind(" ", 1, middle + 1)
    cut = space if space > len(text) // 4 else middle
    return [
        piece
        for half in (text[:cut].strip(), text[cut:].strip())
        if half
        for piece in _halved(tokenizer, half, most)
    ]


def _sizes(tokenizer: Any, texts: list[str]) -> list[int]:
    """Tokens of each text, special tokens not counted."""
    return (
        [
            len(ids)
            for ids in tokenizer([readable(text) for text in texts], add_special_tokens=False)[
                "input_ids"
            ]
        ]
        if texts
        else []
    )


def _entailment_index(config: Any, model: str) -> int:
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    found = [
        i
        for i, name in enumerate(names)
        if "entail" in name.lower() and not re.match(r"\W*(no|un|dis)", name.lower())
    ]
    if len(found) != 1:
        labels = ", ".join(names)
        raise UserError(
            f"model: {model} given with the labels {labels}, allowed: a model with one"
            " label for entailment"
        )
    return found[0]
