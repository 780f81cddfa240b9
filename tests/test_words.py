"""Words in many scripts: by hand, against Python's own `\\w` and sacrebleu's tokenizers."""

import doctest
import re
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU

from dia_lightning import words as module
from dia_lightning.errors import UserError
from dia_lightning.words import check_tokenizer, cut, n_words, resolve, whole_word, words

ODD = ["", " \n", "😀❤️", "！？…", "\ud800", "a\0b", "\u0301", "👩\u200d👧"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's a café.", ["It", "s", "a", "café"]),
        ("我用Python3写", ["我", "用", "Python3", "写"]),
        ("東京のタワー々", ["東", "京", "の", "タ", "ワ", "ー", "々"]),
        ("กินน้ำ ๑๒", ["กิ", "น", "น้", "ำ", "๑๒"]),
        ("ພາສາ", ["ພ", "າ", "ສ", "າ"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("مَرْحَبًا بك", ["مَرْحَبًا", "بك"]),
        ("می\u200cخواهم", ["می\u200cخواهم"]),
        ("한국어를 배운다", ["한국어를", "배운다"]),
        ("cafe\u0301 שָׁלוֹם", ["cafe\u0301", "שָׁלוֹם"]),
        ("❤️ 👩\u200d👧 \u0301 ！", []),
    ],
)
def test_words_by_hand(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@given(st.text(alphabet=st.characters(max_codepoint=0x2FF) | st.sampled_from("’“—яжΩ½²א한")))
def test_with_spaces_and_no_marks_words_are_those_of_python(text: str) -> None:
    assert words(text) == re.findall(r"\w+", text)
    assert words(text, contractions=True) == re.findall(r"\w+(?:['’]\w+)*", text)
    assert n_words(text) == len(text.split())


def test_no_letter_or_digit_is_lost() -> None:
    """Every character that Python holds for a letter or digit is in a word; none of the others."""
    known = [
        chr(i)
        for i in range(sys.maxunicode + 1)
        if unicodedata.category(chr(i)) not in ("Cn", "Cs")
    ]
    lost = [c for c in known if (c.isalnum() or c == "_") != (words(c) == [c])]
    assert lost == []


@pytest.mark.parametrize(
    ("phrase", "text", "found"),
    [
        ("便宜", "价格便宜，很好", True), ("便宜", "very便宜!", True), ("便宜", "便 宜", False),
        ("スシ", "私はスシが好き", True), ("กิน", "อยากกินข้าว", True), ("ก", "กิน", False),
        ("cat", "concatenate", False), ("cafe", "很好的cafe在", True),
        ("cafe", "很好的cafes", False),
        ("5", "有5家", True), ("5", "有15家", False), ("ABC", "ＡＢＣ", False),
        ("C++", "学C++吧", True),
        ("हिन्दी", "मैं हिन्दी बोलता", True), ("हिन", "हिन्दी", False),
        ("cafe", "cafe\u0301", False), ("می", "می\u200cخواهم", False), ("한국", "한국어", False),
        ("❤", "❤️", True), ("straße", "STRASSE", False),
    ],
)  # fmt: skip
def test_whole_words_in_any_script(phrase: str, text: str, found: bool) -> None:
    assert (whole_word(phrase).search(text) is not None) is found


CHINESE, JAPANESE = "这家店价格便宜。", "これは安い店です。"


@pytest.mark.parametrize(
    ("texts", "name"),
    [
        (["a café", "Привет, мир", "हिन्दी में", "مرحبا بك", "한국어를 배운다", "γειά"], "13a"),
        (["The word 北京 means northern capital."], "13a"),
        ([CHINESE], "zh"), ([CHINESE, "the"], "zh"), (["我用Python写code"], "zh"),
        ([CHINESE * 10 + "の"], "zh"), (["ผมกินข้าว"], "char"), (["ผมกินข้าว北京"], "char"),
        (["ก北京北京"], "zh"), (["ភាសាខ្មែរ"], "char"), (["ພາສາລາວ"], "char"), (["မြန်မာ"], "char"),
        (["བོད་སྐད།"], "char"), ([], "13a"), (ODD, "13a"),
    ],
)  # fmt: skip
def test_auto_goes_by_all_texts_together(texts: list[str], name: str) -> None:
    assert resolve("auto", texts) == name
    assert resolve("auto", texts[::-1]) == name
    assert resolve("intl", texts) == "intl"


def test_one_text_in_another_script_changes_no_run() -> None:
    assert resolve("auto", [CHINESE, *["the food is good"] * 9]) == "13a"
    assert resolve("auto", [*[CHINESE] * 9, "the food is good"]) == "zh"


def without_mecab(monkeypatch: pytest.MonkeyPatch) -> None:
    from sacrebleu.tokenizers import tokenizer_ja_mecab

    monkeypatch.setattr(tokenizer_ja_mecab, "MeCab", None)
    module.bleu.cache_clear()


def test_japanese_without_mecab_is_cut_into_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    without_mecab(monkeypatch)
    assert resolve("auto", [JAPANESE]) == "char"
    with pytest.raises(
        UserError, match=r"^tokenizer: ja-mecab given, allowed: char, or .*sacrebleu\[ja\]"
    ):
        check_tokenizer("ja-mecab")
    module.bleu.cache_clear()


def test_japanese_with_mecab() -> None:
    pytest.importorskip("MeCab")
    pytest.importorskip("ipadic")
    assert resolve("auto", [JAPANESE]) == "ja-mecab"
    assert cut([JAPANESE, *ODD], "ja-mecab")[:2] == [["これ", "は", "安い", "店", "です", "。"], []]


@pytest.mark.parametrize("name", ["13a", "intl", "zh", "char"])
def test_tokens_are_sacrebleus(name: str) -> None:
    texts = [CHINESE, JAPANESE, "U.S. 3.5% cafés ", "ผมกินข้าว", *ODD]
    assert cut(texts, name) == [
        BLEU(tokenize=name).tokenizer(text.rstrip()).split() for text in texts
    ]


def test_an_unknown_tokenizer_is_refused() -> None:
    with pytest.raises(
        UserError, match="tokenizer: 'moses' given, allowed: auto, 13a, intl, zh, ja-mecab, char"
    ):
        resolve("moses", [])


def test_examples() -> None:
    assert doctest.testmod(module) == (0, 3)
