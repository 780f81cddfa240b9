"""How formal a text is: a logistic model on features of style, small enough to read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dia_lightning.errors import UserError
from dia_lightning.rewards import formality_words as words
from dia_lightning.types import Reward

WEIGHTS = Path(__file__).with_name("formality.json")
# A sentence's length says much about its style, a document's nothing; and no text is made formal by
# going on and on.
_MOST_WORDS = 40

_NEGATION = re.compile(r"(?<=\S)\s+(n't\b|'(?:s|re|ve|ll|d|m)\b)", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
_SENTENCE = re.compile(r"[.!?…]+(?:\s|$)|\n")
_MARKS = {
    "contractions": (
        r"(?i)\b\w+(?:n't|'(?:re|ve|ll|d|m))\b|\b(?:it|that|he|she|what|there|who|here|where|how|let)'s\b"
    ),
    "lost_apostrophes": (
        r"(?i)\b(?:dont|cant|wont|didnt|doesnt|isnt|wasnt|arent|couldnt|wouldnt|shouldnt|havent|hasnt|aint"
        r"|im|ive|youre|theyre|thats|whats|theres|youll|youve|hes|shes|lets)\b"
    ),
    "exclamations": r"!",
    "questions": r"\?",
    "ellipses": r"\.\s?\.+|…",
    "emoticons": (
        r"(?:(?<=\s)|^)[:;=8x]'?-?[()DdPp3/\\|oO\]\[]+(?=\s|$)|<3|\^_?\^|[\u2600-\u27bf\U0001f000-\U0001faff]"
    ),
    "elongations": r"(?i)([a-z])\1\1",
    "swung_words": r"\*\w+\*|~+|&(?=\s)",
    "opening_conjunctions": r"(?:^|[.!?]\s+)(?:And|But|So|Or|Because|Plus|and|but|so|or|plus)\b",
    "passives": r"(?i)\b(?:is|are|was|were|be|been|being)\s+(?:\w+ly\s+)?\w+(?:ed|en|own|ght)\b",
    "commas": r",",
}
_COMPILED = {name: re.compile(pattern) for name, pattern in _MARKS.items()}
_LATINATE = re.compile(
    r"(?:[tsc]ion|ment|[iae]ty|[ae]n[ct]e|[ae]ncy|is[mt]|ure|ive|ous|ic|[iu]al|ical|[ai]ble|[ie]fy|i[sz]e|ate)(?:d|s|ly|es)?$"
)


class Formality(Reward):
    """How formal a text is, by a logistic model on features of style; it never looks at what the
    text is about.

    The features are shares of word classes, signs of speech (contractions, slang, emoticons, runs
    of punctuation) and of writing (long and Latinate words, passives, connectives), and the
    sentences' length; texts in lower case are judged by the others. Trained by
    benchmarks/formality.py; docs/rewards.md says on what, and how it agrees with people.

    Args:
        output: `log_prob`: log-probability that the text is formal, in nats; `logit`: not bounded;
            `prob`: in [0, 1].
        formal: Reward formal texts; false = informal ones.
        name: Label in outputs.

    Raises:
        UserError: if `output` is none of the three.
    """

    on_prefix = True

    def __init__(
        self,
        output: Literal["log_prob", "logit", "prob"] = "log_prob",
        formal: bool = True,
        name: str = "formality",
    ) -> None:
        if output not in _OUTPUTS:
            raise UserError(f"output: {output!r} given, allowed: {', '.join(_OUTPUTS)}")
        self.output, self.formal, self.name = output, formal, name

    def __call__(self, texts: Sequence[str]) -> Tensor:
        logit = formality_logit(features(texts))
        return _OUTPUTS[self.output](logit if self.formal else -logit).float()


_OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "log_prob": F.logsigmoid,
    "logit": lambda x: x,
    "prob": torch.sigmoid,
}


@lru_cache(maxsize=1)
def _model() -> tuple[Tensor, float]:
    """(F,) weights of the features as they are, and the bias."""
    stored = json.loads(WEIGHTS.read_text(encoding="utf-8"))
    weights = torch.tensor([stored["weights"][name] for name in FEATURES], dtype=torch.float64)
    return weights, float(stored["bias"])


def formality_logit(values: Tensor) -> Tensor:
    """Features (B, F) → (B,) log-odds of formal against informal, float64."""
    weights, bias = _model()
    return values @ weights + bias


def features(texts: Sequence[str]) -> Tensor:
    """(B, F) float64, in the order of `FEATURES`."""
    rows = [list(_features(text).values()) for text in texts]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, len(FEATURES))


def _features(text: str) -> dict[str, float]:
    text = _NEGATION.sub(r"\1", text.strip()).replace("’", "'")
    found = _WORD.findall(text)
    lower = [word.lower() for word in found]
    # Two words of grace: a share among three words is no share.
    per_word = 1 / (len(found) + 2)
    n_sentences = max(1, sum(bool(part.strip()) for part in _SENTENCE.split(text)))
    marks = {
        name: math.log1p(sum(1 for _ in pattern.finditer(text)) / n_sentences)
        for name, pattern in _COMPILED.items()
    }
    # Between a count and a share: one word of slang tells, and tells a little less in a long text.
    per_root = (len(found) + 2) ** -0.5
    classes = {
        name: sum(word in members for word in lower) * per_root
        for name, members in words.CLASSES.items()
    }
    return marks | classes | _shape(found, per_word, n_sentences) | _case(text, bool(found))


def _shape(found: list[str], per_word: float, n_sentences: int) -> dict[str, float]:
    """Lengths of words and sentences."""
    content = [word for word in found if word.lower() not in words.FUNCTION_WORDS]
    lengths = [min(len(word), 15) for word in content]
    return {
        "log_sentence_length": math.log1p(min(len(found) / n_sentences, _MOST_WORDS)),
        "word_length": (sum(lengths) + 2 * 5) / (len(content) + 2),
        "long_words": sum(length >= 8 for length in lengths) * per_word,
        "very_long_words": sum(length >= 11 for length in lengths) * per_word,
        "latinate": (
            sum(len(word) > 5 and _LATINATE.search(word.lower()) is not None for word in content)
            * per_word
        ),
    }


def _case(text: str, has_words: bool) -> dict[str, float]:
    """What capitals and the last sign say; without any capital the text may be from a source
    that has none.
    """
    has_capitals = any(character.isupper() for character in text)
    return {
        "no_capitals": float(has_words and not has_capitals),
        "lower_start": float(has_capitals and text[:1].islower()),
        "no_full_stop": float(
            has_words and text.rstrip("\"'”’)] ")[-1:] not in (".", "!", "?", ":", "…")
        ),
    }


FEATURES = tuple(_features(""))
