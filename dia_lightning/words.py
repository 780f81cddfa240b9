"""How a text is cut into words, in any script: by sacrebleu's tokenizers, or for rewards by rules.

Scripts that write no spaces between words are Chinese, Japanese, Thai, Lao, Khmer, Burmese,
Tibetan and their relatives. Their letters are words of their own here, in texts of all kinds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal, get_args

import regex  # type: ignore[import-untyped]

from dia_lightning.errors import UserError

Tokenizer = Literal["auto", "13a", "intl", "zh", "ja-mecab", "char"]
_NOT_INSTALLED = (ImportError, RuntimeError, AssertionError)

_EAST = r"\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\p{Bopomofo}"
_SCRIPTS = (
    rf"{_EAST}\p{{Thai}}\p{{Lao}}\p{{Khmer}}\p{{scx=Myanmar}}\p{{Tibetan}}\p{{Tai_Le}}"
    r"\p{New_Tai_Lue}\p{Tai_Tham}\p{Tai_Viet}\p{Javanese}\p{Balinese}"
)
_LETTER = rf"[[{_SCRIPTS}]&&[\p{{L}}\p{{Nl}}]]"
# Of scripts with spaces, where a word may hold vowel signs and, between letters, (non-)joiners.
_FIRST = rf"[[\p{{L}}\p{{N}}_]--{_LETTER}]"
_NEXT = rf"[[\p{{L}}\p{{M}}\p{{N}}_]--{_LETTER}]"
_JOINER = r"[\u200c\u200d]?"
_RUN = rf"{_FIRST}(?:{_JOINER}{_NEXT})*"
# What makes the character beside it part of a longer word; a variation selector does not.
_SELECTOR = r"[\ufe00-\ufe0f\U000e0100-\U000e01ef]"
_BESIDE = rf"[[\p{{L}}\p{{M}}\p{{N}}_]--[{_SCRIPTS}]--{_SELECTOR}]"
_MARKS = "\u3001-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"

_is_letter = regex.compile(rf"(?V1){_LETTER}")
_is_east = regex.compile(rf"(?V1)[{_EAST}]")
_is_kana = regex.compile(r"(?V1)[\p{scx=Hiragana}\p{scx=Katakana}--\p{Han}]")
_run = regex.compile(rf"(?V1){_RUN}")
_word = regex.compile(rf"(?V1){_LETTER}\p{{M}}*|{_RUN}")
_word_or_contraction = regex.compile(rf"(?V1){_LETTER}\p{{M}}*|{_RUN}(?:['’]{_RUN})*")
_piece = regex.compile(rf"(?V1){_LETTER}\p{{M}}*|[{_MARKS}]")
_latin_word, _latin_word_or_contraction = re.compile(r"\w+"), re.compile(r"\w+(?:['’]\w+)*")
_latin = regex.compile(r"\p{Latin}")
# Without these characters, which leaves Latin, Python's own and faster \w is the same.
_beyond_latin = re.compile("[\u0300-\u200f\u20d0-\u20ff\u2c00-\U0010ffff]")
_alphanumeric = regex.compile(r"[\p{L}\p{M}\p{N}]")


def words(text: str, contractions: bool = False) -> list[str]:
    """Letters of scripts without spaces, one by one with their vowel signs; else runs of letters.

    Digits and underscores count as letters, punctuation and symbols are left out.

    Args:
        text: any text.
        contractions: take "isn't" as one word.

    >>> words("the café在北京 isn't हिन्दी")
    ['the', 'café', '在', '北', '京', 'isn', 't', 'हिन्दी']
    """
    if _beyond_latin.search(text):
        pattern = _word_or_contraction if contractions else _word
    else:
        pattern = _latin_word_or_contraction if contractions else _latin_word
    found: list[str] = pattern.findall(text)
    return found


def n_words(text: str) -> int:
    """Pieces between white space; in scripts without spaces every letter and punctuation mark.

    >>> n_words("It isn't, is it?"), n_words("价格便宜，很好。")
    (4, 8)
    """
    return len((text if text.isascii() else _piece.sub(r" \g<0> ", text)).split())


def whole_word(phrase: str) -> Any:
    """The pattern that finds `phrase`, case ignored, where no word goes on before or after it.

    In a script without spaces words have no ends, so that there it may stand anywhere.
    """
    parts = phrase.split()
    # Not \b, which would ask for a letter beside a phrase that ends with a sign, such as "C++".
    inner = r"\s+".join(regex.escape(part) for part in parts)
    before = "" if _is_letter.match(parts[0][0]) else rf"(?<!{_BESIDE}{_JOINER})"
    ends_in_letter = regex.search(rf"(?V1){_LETTER}\p{{M}}*$", parts[-1])
    after = rf"(?![\p{{M}}--{_SELECTOR}])" if ends_in_letter else rf"(?!{_JOINER}{_BESIDE})"
    return regex.compile(f"(?V1-f){before}{inner}{after}", regex.IGNORECASE)


@lru_cache(maxsize=8)
def bleu(tokenizer: str) -> Any:
    """Sacrebleu's BLEU with this tokenizer, which is its attribute `tokenizer`.

    Raises:
        RuntimeError, AssertionError: for `ja-mecab` where MeCab or its dictionary is missing.
    """
    from sacrebleu.metrics.bleu import BLEU

    # Texts are compared as they are: no warning about those that look tokenised.
    found = BLEU(force=True, tokenize=tokenizer)
    if tokenizer == "ja-mecab":
        inner = found.tokenizer
        # MeCab is C++, for which a lone surrogate is no text and NUL the end.
        found.tokenizer = lambda text: inner(re.sub("[\0\ud800-\udfff]", "\ufffd", text))
    return found


def check_tokenizer(tokenizer: str) -> None:
    """Raise UserError unless the tokenizer is known and installed."""
    if tokenizer not in get_args(Tokenizer):
        allowed = ", ".join(get_args(Tokenizer))
        raise UserError(f"tokenizer: {tokenizer!r} given, allowed: {allowed}")
    if tokenizer != "auto":
        try:
            bleu(tokenizer)
        except _NOT_INSTALLED as error:
            raise UserError(
                f"tokenizer: {tokenizer} given, allowed: char, or this one after "
                "pip install 'sacrebleu[ja]' (MeCab and its IPA dictionary are not installed)"
            ) from error


def resolve(tokenizer: str, texts: Sequence[str]) -> str:
    """The tokenizer that `auto` stands for with these texts together; any other is itself.

    `13a`, unless more than half of the words are letters of scripts without spaces. Then `char`,
    unless most of these are Chinese or Japanese. Then `zh`, unless more than a tenth of those are
    kana. Then `ja-mecab` where that is installed, else `char`.

    Raises:
        UserError: as `check_tokenizer`.

    >>> resolve("auto", ["the food is good", "北京"]), resolve("auto", ["我用Python写code"])
    ('13a', 'zh')
    """
    check_tokenizer(tokenizer)
    if tokenizer != "auto":
        return tokenizer
    beyond = (t for t in texts if not t.isascii() and _beyond_latin.search(t))
    letters = Counter(_is_letter.findall("\n".join(beyond)))
    n = sum(letters.values())
    if not n or n <= len(_run.findall("\n".join(texts))):
        return "13a"
    east = sum(count for letter, count in letters.items() if _is_east.match(letter))
    if 2 * east <= n:
        return "char"
    kana = sum(count for letter, count in letters.items() if _is_kana.match(letter))
    if 10 * kana <= east:
        return "zh"
    try:
        bleu("ja-mecab")
    except _NOT_INSTALLED:
        return "char"
    return "ja-mecab"


def cut(texts: Sequence[str], tokenizer: str) -> list[list[str]]:
    """The tokens of each text by sacrebleu's tokenizer of this name, as its BLEU has them."""
    tokenize: Callable[[str], str] = bleu(tokenizer).tokenizer
    return [tokenize(text.rstrip()).split() for text in texts]


class RougeWords:
    """A tokenizer for rouge-score: lower-case words with a letter or digit, in any script.

    `words` for `13a`, whose BLEU tokens keep punctuation; else the tokenizer's tokens.
    """

    def __init__(self, tokenizer: str) -> None:
        self.tokenizer = tokenizer

    def tokenize(self, text: str) -> list[str]:
        if self.tokenizer == "13a":
            return words(text.lower())
        return [
            token for token in cut([text.lower()], self.tokenizer)[0] if _alphanumeric.search(token)
        ]


def mostly_latin(texts: Sequence[str]) -> bool:
    """Whether half of the letters or more are Latin ones; so too where there are none."""
    text = "\n".join(texts)
    return text.isascii() or 2 * len(_latin.findall(text)) >= sum(map(str.isalpha, text))
