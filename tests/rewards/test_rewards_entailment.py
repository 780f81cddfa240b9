"""`Entailment` against transformers pair by pair, its max and mean by hand, and the rules that
cut texts.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dia_lightning.callbacks.run_key import describe
from dia_lightning.errors import UserError
from dia_lightning.rewards import Entailment
from dia_lightning.rewards.base import CachedReward, RewardError, call_reward
from dia_lightning.rewards.entailment import pack, pieces, sentences
from tests.rewards.tiny_classifiers import WINDOW, Oracle, make_classifier, make_tokenizer

LABELS = ["CONTRADICTION", "ENTAILMENT", "NEUTRAL"]
FOOD, PUB, BAD = "The food is great.", "The pub is near the river.", "The bad food is poor."
DOCUMENT = [FOOD, PUB, BAD, "We like it!", "Is it cheap?"]
ODD = [
    "\0\0",
    "😀👍🏽",
    "Привет, как дела?",
    "你好，世界。再见！",
    "a" * 3_000,
    "good " * 500,
    ". . .",
    "!?",
    "\ud800",
    "a\nb\r\nc",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classifier(
        tmp_path_factory.mktemp("nli") / "bert", "bert", labels=LABELS, initializer_range=0.4
    )


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return Oracle(folder)


@pytest.fixture
def reward(folder: Path) -> Entailment:
    return Entailment(str(folder))


def p(oracle: Oracle, premise: str, hypothesis: str, index: int = 1) -> float:
    return float(oracle.logits(premise, hypothesis).softmax(0)[index])


def overlap(pairs: list[tuple[str, str]]) -> Tensor:
    """A stand-in for P(entailment) whose values a person can see: the share of the hypothesis'
    words in the premise.
    """
    return torch.tensor([sum(w in i.split() for w in j.split()) / len(j.split()) for i, j in pairs])


def test_one_premise_and_one_sentence_is_p_of_entailment(
    reward: Entailment, oracle: Oracle
) -> None:
    sources, texts = DOCUMENT * 5, [text for text in DOCUMENT for _ in range(5)]
    values = call_reward(reward, texts, [{"source": source} for source in sources])
    right = torch.tensor(
        [p(oracle, source, text) for source, text in zip(sources, texts, strict=True)]
    )
    torch.testing.assert_close(values, right, rtol=0, atol=1e-5)
    assert float(right.std()) > 0.05


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_it_is_the_mean_over_sentences_of_the_best_premise(
    folder: Path, oracle: Oracle, batch_size: int
) -> None:
    """The chunks are written out: a premise of 8 tokens holds one of these sentences, never two."""
    reward = Entailment(str(folder), max_premise=8, batch_size=batch_size)
    size = {s: len(oracle.tokenizer(s, add_special_tokens=False)["input_ids"]) for s in DOCUMENT}
    assert all(4 < size[s] <= 8 for s in (FOOD, PUB, BAD))
    document, texts = (
        f"{FOOD} {PUB}\n{BAD}",
        [
            f"{PUB} {FOOD}",
            "We like it!",
            f"{BAD}  We like it! {PUB}",
        ],
    )
    right = []
    for own in ([PUB, FOOD], ["We like it!"], [BAD, "We like it!", PUB]):
        best = [
            max(p(oracle, premise, sentence) for premise in (FOOD, PUB, BAD)) for sentence in own
        ]
        right.append(sum(best) / len(best))
    values = call_reward(reward, texts, [{"source": document}] * 3)
    torch.testing.assert_close(values, torch.tensor(right), rtol=0, atol=1e-5)


def test_max_and_mean_by_hand(folder: Path) -> None:
    reward = Entailment(str(folder), max_premise=8)
    reward._probabilities = overlap  # type: ignore[method-assign]
    document = f"{FOOD} {PUB}"
    texts = [FOOD, f"{FOOD} {PUB}", "The food is near.", f"{FOOD} Nothing here.", "Nothing here."]
    right = [1, 1, 3 / 4, 1 / 2, 0]
    torch.testing.assert_close(
        reward(texts, [{"source": document}] * 5), torch.tensor(right, dtype=torch.float32)
    )


def test_what_is_borne_out_beats_what_is_made_up(folder: Path) -> None:
    reward = Entailment(str(folder))
    reward._probabilities = overlap  # type: ignore[method-assign]
    records = [{"source": " ".join(DOCUMENT)}] * 2
    good, bad = reward(
        ["The pub is near the river. We like it!", "The king is old. We like it!"], records
    )
    assert float(good) == 1 > float(bad)


def test_each_pair_is_asked_once(reward: Entailment) -> None:
    asked: list[list[tuple[str, str]]] = []
    reward._probabilities = lambda pairs: (asked.append(pairs), overlap(pairs))[1]  # type: ignore[method-assign]
    reward([FOOD, FOOD, f"{FOOD} {FOOD}"], [{"source": PUB}, {"source": PUB}, {"source": PUB}])
    assert asked == [[(PUB, FOOD)]]


def test_batch_order_and_cache_change_nothing(folder: Path) -> None:
    reward = Entailment(str(folder), batch_size=4)
    texts = [*DOCUMENT, " ".join(DOCUMENT), ""]
    records = [{"story": 1, "source": " ".join(DOCUMENT * n)} for n in (1, 2, 1, 3, 1, 2, 1)]
    values = call_reward(reward, texts, records)
    torch.testing.assert_close(
        call_reward(reward, texts[::-1], records[::-1]).flip(0), values, rtol=0, atol=1e-5
    )
    alone = [
        call_reward(reward, [text], [record]) for text, record in zip(texts, records, strict=True)
    ]
    torch.testing.assert_close(torch.cat(alone), values, rtol=0, atol=1e-5)
    cached = CachedReward(reward)
    torch.testing.assert_close(call_reward(cached, texts, records), values, rtol=0, atol=1e-5)
    assert call_reward(reward, [], []).shape == (0,)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(call_reward(reward, texts, records), values, rtol=0, atol=1e-5)


def test_an_empty_text_claims_nothing(reward: Entailment) -> None:
    assert reward(["", " \n\t "], [{"source": FOOD}] * 2).tolist() == [0, 0]


def test_odd_texts_and_sources_have_values(reward: Entailment) -> None:
    values = call_reward(reward, ODD, [{"source": source} for source in ODD[::-1]])
    assert bool(((values > 0) & (values < 1)).all())


def test_a_document_of_100_000_characters(reward: Entailment) -> None:
    """All of it is read: the one sentence that bears the text out stands at its end."""
    document = "The pub is near. " * 5_900 + FOOD
    reward._probabilities = overlap  # type: ignore[method-assign]
    assert len(document) > 100_000
    assert reward([FOOD], [{"source": document}]).item() == 1


def test_a_record_without_a_source_is_an_error(reward: Entailment, folder: Path) -> None:
    for record in ({}, {"document": FOOD}, {"source": None}, {"source": [FOOD]}):
        with pytest.raises(RewardError, match=r"reward 'entailment' needs the field 'source'"):
            reward([FOOD], [record])
    with pytest.raises(
        RewardError, match=r"reward 'entailment': the field 'source' of a record is empty"
    ):
        reward([FOOD], [{"source": " \n"}])
    other = Entailment(str(folder), source_field="article", name="faithful")
    assert torch.isfinite(other([FOOD], [{"article": PUB}])).all()
    with pytest.raises(RewardError, match=r"reward 'faithful' needs the field 'article'"):
        other([FOOD], [{"source": PUB}])


@pytest.mark.parametrize(
    ("labels", "index"),
    [
        (["entailment", "neutral", "contradiction"], 0), (["not_entailment", "ENTAILED"], 1),
    ],
)  # fmt: skip
def test_the_label_is_read_from_the_model(tmp_path: Path, labels: list[str], index: int) -> None:
    folder = make_classifier(tmp_path / "model", "bert", labels=labels)
    value = Entailment(str(folder))([FOOD], [{"source": PUB}]).item()
    assert value == pytest.approx(p(Oracle(folder), PUB, FOOD, index), abs=1e-5)


@pytest.mark.parametrize(
    "labels", [["LABEL_0", "LABEL_1", "LABEL_2"], ["entailment", "entailed", "non-entailment"]]
)
def test_a_model_without_one_label_for_it_is_refused(tmp_path: Path, labels: list[str]) -> None:
    folder = make_classifier(tmp_path / "model", "bert", labels=labels)
    with pytest.raises(
        UserError,
        match=rf"^model: .* the labels {', '.join(labels)}, allowed: .* one label for",
    ):
        Entailment(str(folder))


def test_arguments(folder: Path, reward: Entailment) -> None:
    for options, message in (
        ({"max_premise": 0}, "max_premise: 0 given, allowed: 1 to 28;"),
        ({"max_premise": WINDOW - 3}, "max_premise: 29 given, allowed: 1 to 28;"),
        ({"batch_size": 0}, "batch_size: 0 given, allowed: 1 or more"),
    ):
        with pytest.raises(UserError, match=f"^{message}"):
            Entailment(str(folder), **options)
    assert reward.conditional
    assert describe(reward)["source_field"] == "source"
    other = pickle.loads(pickle.dumps(reward))
    assert torch.equal(other([FOOD], [{"source": PUB}]), reward([FOOD], [{"source": PUB}]))


# How texts are cut.


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("One. Two! Three? Four… Five", ["One.", "Two!", "Three?", "Four…", "Five"]),
        ("Dr. Smith met J. R. Ewing in the U.S. Army vs. us.",
         ["Dr. Smith met J. R. Ewing in the U.S. Army vs. us."]),
        ('He said "Stop." She left (early.) They did not.',
         ['He said "Stop."', "She left (early.)", "They did not."]),
        ("It costs 3.50 at example.com. then more", ["It costs 3.50 at example.com. then more"]),
        ("Really?! Yes... No.", ["Really?!", "Yes...", "No."]),
        ("a line\nanother\r\n\n  a third  ", ["a line", "another", "a third"]),
        ("你好。再见！「好。」走", ["你好。", "再见！", "「好。」", "走"]),
        ("Это дом. Он стар.", ["Это дом.", "Он стар."]),
        ("1. First. 2. Second.", ["1.", "First.", "2.", "Second."]),
        ("", []), (" \n ", []), (". . .", [".", ".", "."]), ("...", ["..."]),
    ],
)  # fmt: skip
def test_sentences(text: str, right: list[str]) -> None:
    assert sentences(text) == right


@pytest.mark.parametrize(
    "text",
    [
        ". " * 50_000,
        "." * 100_000,
        " " * 100_000 + "a",
        '."' * 50_000,
        "\n" * 100_000,
        ".)" + ")" * 99_999,
    ],
)
def test_long_odd_texts_are_cut_in_linear_time(text: str) -> None:
    """A quadratic rule would take minutes."""
    assert "".join("".join(sentences(text)).split()) == "".join(text.split())


def letters(texts: list[str], add_special_tokens: bool) -> dict[str, list[list[str]]]:
    """A tokenizer with a token a letter, so that a space between sentences is one token."""
    return {"input_ids": [list(text) for text in texts]}


WORDS = st.sampled_from(
    [
        "the",
        "food",
        "Good.",
        "near",
        "River!",
        "a",
        "?",
        "x" * 30,
        "We",
        "like",
        "it.",
        "\n",
        "é",
        "😀",
    ]
)


@settings(deadline=None, max_examples=50)
@given(st.lists(WORDS, max_size=40), st.integers(1, 40))
def test_chunks_hold_every_word_in_order_and_as_much_as_fits(words: list[str], most: int) -> None:
    text = " ".join(words)
    parts, chunks = pieces(letters, text, most), pack(letters, text, most)
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert " ".join(chunks) == " ".join(parts)
    assert all(len(chunk) <= most for chunk in chunks)
    starts = [sum(map(len, chunks[:k])) + k for k in range(len(chunks))]
    first = {sum(map(len, parts[:k])) + k: part for k, part in enumerate(parts)}
    for k in range(1, len(chunks)):
        assert len(chunks[k - 1]) + 1 + len(first[starts[k]]) > most


def test_a_chunk_of_a_real_tokenizer_is_within_the_limit() -> None:
    tokenizer = make_tokenizer(True)
    for most in (2, 7, 16, 31):
        chunks = pack(tokenizer, " ".join(DOCUMENT * 3), most)
        assert (
            max(len(tokenizer(chunk, add_special_tokens=False)["input_ids"]) for chunk in chunks)
            <= most
        )
        assert "".join("".join(chunks).split()) == "".join("".join(DOCUMENT * 3).split())
