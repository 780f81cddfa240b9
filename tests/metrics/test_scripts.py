"""Figures and rewards in many scripts: sacrebleu and plain counts, texts against themselves,
null with a reason.
"""

import doctest
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from dia_lightning.callbacks import PredictionWriter
from dia_lightning.data import PromptData
from dia_lightning.errors import UserError
from dia_lightning.lab.judges import Evaluation, Hacking
from dia_lightning.lab.judges.hacking import copied, repetition
from dia_lightning.lab.report.run import write_run_report
from dia_lightning.metrics import DistinctN, SelfBLEU
from dia_lightning.metrics import reasons as reasons_module
from dia_lightning.metrics.functional import distinct_n, self_bleu
from dia_lightning.metrics.reasons import reasons
from dia_lightning.metrics.reference import (
    ReferenceBLEU,
    ReferenceROUGE,
    reference_bleu,
    reference_rouge,
)
from dia_lightning.rewards import Coverage, Keyword, Length, check_reward
from dia_lightning.samplers import BaseModel, GuidedSamplerModule
from dia_lightning.types import Generations, Reward
from tests.metrics.test_metrics import Processes

# Variants of one sentence each, and a word that all but the last have.
TEXTS = {
    "chinese": (
        [
            "这家小饭馆就在河边，价格便宜，服务很好。",
            "这家小饭馆就在桥边，价格便宜，服务一般。",
            "这家小饭馆就在河边，价格公道，服务很好。",
        ],
        "便宜",
    ),
    "japanese": (
        [
            "この店は川のそばにあり、安くておいしい。",
            "この店は橋のそばにあり、安くてまずい。",
            "この店は川のそばにあり、高くておいしい。",
        ],
        "安く",
    ),
    "thai": (
        [
            "ร้านนี้อยู่ริมแม่น้ำราคาถูก",
            "ร้านนี้อยู่ริมสะพานราคาถูก",
            "ร้านนี้อยู่ริมแม่น้ำราคาแพง",
        ],
        "ถูก",
    ),
    "khmer": (["ហាងនេះនៅមាត់ទន្លេថោក", "ហាងនេះនៅជិតទន្លេថោក", "ហាងនេះនៅមាត់ទន្លេថ្លៃ"], "ថោក"),
    "hindi": (
        [
            "यह छोटी दुकान नदी के पास सस्ती है।",
            "यह बड़ी दुकान नदी के पास सस्ती है।",
            "यह छोटी दुकान नदी के पास महंगी है।",
        ],
        "सस्ती",
    ),
    "arabic": (
        [
            "هذا المطعم قريب من النهر ورخيص جدا",
            "هذا المطعم بعيد من النهر ورخيص جدا",
            "هذا المطعم قريب من النهر وغالي جدا",
        ],
        "ورخيص",
    ),
    "korean": (
        [
            "이 식당은 강 옆에 있고 아주 싸다",
            "이 식당은 다리 옆에 있고 아주 싸다",
            "이 식당은 강 옆에 있고 아주 비싸다",
        ],
        "싸다",
    ),
    "russian": (
        [
            "этот бар у реки очень дешёвый",
            "этот паб у реки очень дешёвый",
            "этот бар у реки очень дорогой",
        ],
        "дешёвый",
    ),
    "mixed": (
        [
            "我用Python写code，然后deploy到server",
            "我用Java写code，然后deploy到server",
            "我用Python写tests，然后deploy到server",
        ],
        "code",
    ),
}
NAMES = {"chinese": "zh", "thai": "char", "khmer": "char", "mixed": "zh"}


def name_of(script: str) -> str:
    if script != "japanese":
        return NAMES.get(script, "13a")
    try:
        BLEU(tokenize="ja-mecab")
    except RuntimeError:
        return "char"
    return "ja-mecab"


def sacrebleus(texts: list[str], name: str) -> float:
    bleu = BLEU(effective_order=True, tokenize=name)
    return statistics.fmean(
        bleu.sentence_score(t, texts[:i] + texts[i + 1 :]).score for i, t in enumerate(texts)
    )


@pytest.mark.parametrize("script", TEXTS)
def test_diversity_in_any_script(script: str) -> None:
    texts, _ = TEXTS[script]
    for name in {"13a", "intl", "zh", "char", name_of(script)}:
        assert self_bleu(texts, tokenizer=name).item() == pytest.approx(
            sacrebleus(texts, name), abs=1e-9
        )
    assert self_bleu(texts).item() == pytest.approx(sacrebleus(texts, name_of(script)), abs=1e-9)
    assert self_bleu(texts).item() > 30
    for name, n in ((name, n) for name in ("auto", "13a", "intl", "zh", "char") for n in (1, 2, 4)):
        chosen = name_of(script) if name == "auto" else name
        tokens = [
            t.split() if chosen == "13a" else BLEU(tokenize=chosen).tokenizer(t).split()
            for t in texts
        ]
        grams = [tuple(row[i : i + n]) for row in tokens for i in range(len(row) - n + 1)]
        expected = len(set(grams)) / len(grams) if grams else math.nan
        assert distinct_n(texts, n, name).item() == pytest.approx(expected, nan_ok=True)
    assert distinct_n(texts, 1).item() < 0.8


@pytest.mark.parametrize("script", TEXTS)
def test_a_text_is_its_own_best_reference(script: str) -> None:
    texts, _ = TEXTS[script]
    own, other = [[t] for t in texts], [[t] for t in [*texts[1:], texts[0]]]
    assert reference_bleu(texts, own).item() == pytest.approx(100)
    expected = (
        BLEU(tokenize=name_of(script)).corpus_score(texts, [[given[0] for given in other]]).score
    )
    assert 10 < expected < 99
    assert reference_bleu(texts, other).item() == pytest.approx(expected)
    assert [value.item() for value in reference_rouge(texts, own).values()] == pytest.approx(
        [1, 1, 1]
    )
    assert all(0.2 < value.item() < 0.99 for value in reference_rouge(texts, other).values())
    metric = ReferenceBLEU()
    metric.update(texts, own)
    assert f"|tok:{name_of(script)}" in metric.signature()


def test_rouge_in_latin_script_is_rouge_scores_own() -> None:
    texts, references = ["Le café était très bon, señor"], ["Le cafe etait bon, señora"]
    expected = RougeScorer(["rouge1"]).score(references[0], texts[0])["rouge1"].fmeasure
    assert reference_rouge(texts, [references])["rouge_1"].item() == pytest.approx(expected)
    assert reference_rouge(texts, [references], "intl")["rouge_1"].item() != pytest.approx(expected)


@pytest.mark.parametrize("script", TEXTS)
def test_rewards_in_any_script(script: str) -> None:
    texts, word = TEXTS[script]
    assert Keyword([word])(texts).tolist() == [1, 1, 0]
    records = [{"source": texts[0]}] * 3
    same, near, far = Coverage(n=2)([*texts[:2], "the food is good"], records).tolist()
    assert same == 1
    assert 0.3 < near < 1
    assert far == 0
    for reward in (Keyword([word, "x"]), Length(8)):
        check_reward(reward, texts)
    check_reward(Coverage(), texts, [{"source": text} for text in [*texts[1:], texts[0]]])
    assert repetition(f"{texts[0]} {texts[0]}", 3) > 0.3
    assert copied(texts[0], [texts[0]], 3) == 1
    assert 0 < copied(texts[1], [texts[0]], 2) < 1


def test_length_by_hand() -> None:
    chinese = TEXTS["chinese"][0][0]
    assert len(BLEU(tokenize="zh").tokenizer(chinese).split()) == 20
    texts = [chinese, "यह दुकान सस्ती है।", "กินน้ำ", "去cafe，吧！", "한국어를 배운다"]
    assert Length(20)(texts).mul(20).add(20).tolist() == pytest.approx([20, 4, 4, 5, 2])


def test_a_vowel_sign_cuts_no_word() -> None:
    assert repetition("हिन्दी हिन्दू", 1) == 0
    assert repetition("हिन्दी हिन्दी", 1) == 0.5
    assert copied("हिन", ["हिन्दी"], 1) == 0
    assert Coverage(n=1)(["हिन", "हिन्दी"], [{"source": "हिन्दी भाषा"}] * 2).tolist() == [0, 1]


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_all_processes_together_choose() -> None:
    """Alone the second process would take another tokenizer, and the third has no text."""
    shares = [TEXTS["chinese"][0], ["the food is good", "the food is bad"], []]
    whole = shares[0] + shares[1]

    def work(texts: list[str]) -> Callable[[dict[str, Any]], list[float]]:
        def figures(options: dict[str, Any]) -> list[float]:
            metrics: list[Any] = [SelfBLEU(**options), DistinctN(2, **options)]
            pairs: list[Any] = [ReferenceBLEU(**options), ReferenceROUGE(**options)]
            if texts:
                for metric in metrics:
                    metric.update(texts)
                for metric in pairs:
                    metric.update(texts, [texts[:1]] * len(texts))
            bleu, rouge = pairs[0].compute(), pairs[1].compute()
            return [
                *(metric.compute().item() for metric in metrics),
                bleu.item(),
                rouge["rouge_l"].item(),
            ]

        return figures

    references = [given for share in shares for given in [share[:1]] * len(share)]
    expected = [
        sacrebleus(whole, "zh"),
        distinct_n(whole, 2, "zh").item(),
        reference_bleu(whole, references).item(),
    ]
    expected.append(reference_rouge(whole, references, "zh")["rouge_l"].item())
    for found in Processes(3).run([work(share) for share in shares]):
        assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("tokenizer", ["auto", "13a", "intl", "zh", "char"])
def test_odd_texts_have_a_meaning_or_none(tokenizer: str) -> None:
    for odd in (["", " ", "\n"], ["😀", "😀❤️"], ["！？", "..."], ["\ud800", "a\udfffb"]):
        for value in (
            self_bleu(odd, tokenizer=tokenizer).item(),
            distinct_n(odd, 1, tokenizer).item(),
        ):
            assert math.isnan(value) == (not "".join(odd).strip())
        bleu = reference_bleu(odd, [[text] for text in odd], tokenizer).item()
        assert math.isnan(bleu) if not "".join(odd).strip() else bleu >= 0
        reference_rouge(odd, [[text] for text in odd], tokenizer)
        for value in (
            *Length(3)(odd),
            *Keyword(["a", "店"])(odd),
            *Coverage()(odd, [{"source": "店"}] * len(odd)),
        ):
            assert math.isfinite(value)
    assert reference_rouge(["the"], [["😀"]], tokenizer)["rouge_1"].isnan()


# metrics.json


class Says(GuidedSamplerModule):
    """Draws as p_θ does and puts other texts in the place of what was drawn."""

    def __init__(self, reward: Reward, base_lm: str, texts: Sequence[str] = ()) -> None:
        super().__init__(reward, BaseModel(), base_lm)
        self._texts = list(texts)

    def predict_step(self, batch: Any, batch_idx: int) -> list[Generations]:
        found = super().predict_step(batch, batch_idx)
        for generations in found:
            generations.texts = [self._texts[i % len(self._texts)] for i in generations.ids]
            generations.seen = []
        return found


def run(
    folder: Path, lm: Path, texts: Sequence[str], n: int, evaluation: Evaluation | None = None,
    tokenizer: Any = "auto", field: Any = None,
) -> dict[str, Any]:  # fmt: skip
    prompts = folder / "p.jsonl"
    folder.mkdir(exist_ok=True)
    prompts.write_text(json.dumps({"prompt": "", "ref": field or "x"}), encoding="utf-8")
    module = Says(Keyword(["the"]), str(lm), texts)
    data = PromptData(str(lm), str(prompts), n_texts=n, batch_size=2, max_length=8)
    writer = PredictionWriter(str(folder), evaluation=evaluation, tokenizer=tokenizer)
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=[writer],
        enable_checkpointing=False,
        **quiet,
    )
    trainer.predict(module, datamodule=data, return_predictions=False)
    found: dict[str, Any] = json.loads(
        (folder / "metrics.json").read_text(encoding="utf-8"), parse_constant=pytest.fail
    )
    return found


def nulls(figures: dict[str, Any], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for key, value in figures.items():
        if isinstance(value, dict) and key != "base":
            found |= nulls(value, f"{prefix}{key}/")
        found |= {f"{prefix}{key}"} if value is None else set()
    return found


@pytest.mark.parametrize("script", ["chinese", "thai", "hindi"])
def test_a_run_says_its_tokenizer(script: str, lm_folder: Path, tmp_path: Path) -> None:
    texts, _ = TEXTS[script]
    evaluation = Evaluation(references="ref", hacking=Hacking(max_repetition=0.5, max_copy=0.9))
    found = run(tmp_path, lm_folder, texts, 3, evaluation, field=texts[0])
    assert found["tokenizer"] == found["base"]["tokenizer"] == name_of(script)
    assert found["self_bleu"] == pytest.approx(sacrebleus(texts, name_of(script)))
    assert f"tok:{name_of(script)}" in found["bleu_signature"]
    assert found["bleu"] > 50
    assert found["rouge_1"] > 0.5
    assert set(found["reasons"]) == nulls(found)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("parts/*/*.json")}
    again = run(tmp_path, lm_folder, texts, 3, evaluation, "char", texts[0])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("parts/*/*.json")} == before
    assert again["tokenizer"] == again["base"]["tokenizer"] == "char"
    assert again["self_bleu"] == pytest.approx(sacrebleus(texts, "char"))
    assert again["distinct_2"] == pytest.approx(distinct_n(texts, 2, "char").item())
    assert "tok:char" in again["bleu_signature"]
    assert again["bleu"] == pytest.approx(reference_bleu(texts, [texts[:1]] * 3, "char").item())


@pytest.mark.parametrize(
    ("texts", "n", "missing"),
    [
        (["one two"], 1, {"reward_std": "fewer than two texts", "self_bleu": "fewer than two texts",
                          "distinct_3": "no text has 3 words or more",
                          "distinct_4": "no text has 4 words or more"}),
        (["", " "], 4,
         {"self_bleu": "no text has a word", "distinct_1": "no text has 1 words or more"}),
        (["便宜"], 2,
         {"distinct_3": "no text has 3 words or more",
          "distinct_4": "no text has 4 words or more"}),
    ],
)  # fmt: skip
def test_every_null_has_its_reason(
    texts: list[str], n: int, missing: dict[str, str], lm_folder: Path, tmp_path: Path
) -> None:
    found = run(tmp_path, lm_folder, texts, n, Evaluation(references="ref"), field="😀")
    expected = {
        **missing,
        **dict.fromkeys(("rouge_1", "rouge_2", "rouge_l"), "no reference has a word"),
    }
    assert expected.items() <= found["reasons"].items()
    for figures in (found, found["base"]):
        assert set(figures["reasons"]) == nulls(figures)
    page = write_run_report(tmp_path, tmp_path / "none.yaml").read_text(encoding="utf-8")
    assert all(reason in page for reason in expected.values())
    assert f"tokenizer {found['tokenizer']}." in page


def test_reasons_reach_what_is_nested_and_infinite() -> None:
    figures = {
        "n": 5,
        "nfe": {"critic": math.nan, "lm": 1.0},
        "log_z": math.inf,
        "style": None,
        "rhat_reward": math.nan,
    }
    found = reasons(figures)
    assert set(found) == {"nfe/critic", "log_z", "style", "rhat_reward"}
    assert found["log_z"] == "not finite: inf"
    assert "4 steps" in found["rhat_reward"]
    assert doctest.testmod(reasons_module) == (0, 1)


def test_a_tokenizer_that_is_not_there_ends_in_one_line(
    lightning: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sacrebleu.tokenizers import tokenizer_ja_mecab

    from dia_lightning import words

    monkeypatch.setattr(tokenizer_ja_mecab, "MeCab", None)
    words.bleu.cache_clear()
    code, _, error = lightning("predict", "--trainer.callbacks.tokenizer", "ja-mecab")
    assert code == 2
    assert len(error.strip().splitlines()) == 1
    assert "tokenizer: ja-mecab given, allowed: char" in error
    code, _, error = lightning("predict", "--trainer.callbacks.tokenizer", "moses")
    assert code == 2
    assert "moses" in error
    assert "ja-mecab" in error
    for metric in (SelfBLEU, ReferenceBLEU):
        with pytest.raises(UserError, match="'moses' given"):
            metric(tokenizer="moses")
