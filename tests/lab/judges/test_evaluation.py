"""Judges, the expected maximum, hacking flags and their rate; the files, the table and a rerun of
`PredictionWriter`.
"""

import doctest
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import lightning as L
import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor

from dia_lightning import cli
from dia_lightning.callbacks import PredictionWriter
from dia_lightning.data import PromptData
from dia_lightning.errors import UserError
from dia_lightning.lab.judges import Evaluation, Hacking, Judge, hacking, judge
from dia_lightning.lab.judges.hacking import copied, repetition
from dia_lightning.metrics.reference import reference_bleu, reference_rouge
from dia_lightning.rewards import Keyword
from dia_lightning.rewards.base import call_reward, field_of
from dia_lightning.samplers import BaseModel, GuidedSamplerModule
from dia_lightning.settings import parser
from dia_lightning.types import Generations, Record, Reward
from tests.conftest import Run


class Number(Reward):
    """The first word of a text, a number."""

    def __init__(self, name: str = "number") -> None:
        self.name = name

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([float(text.split()[0]) if text else 0.0 for text in texts])


class FromRecord(Reward):
    """Whether the text has the record's word."""

    name, conditional = "word", True

    # type: ignore[override]
    def __call__(self, texts: Sequence[str], records: Sequence[Record]) -> Tensor:
        found = [
            field_of(record, "word", self) in text
            for text, record in zip(texts, records, strict=True)
        ]
        return torch.tensor(found, dtype=torch.float32)


def run(
    texts: Sequence[str],
    reward: Sequence[float] | None = None,
    prompts: Sequence[str] | None = None,
    method: str = "dia",
    perplexity: Sequence[float] | None = None,
    size: int = 3,
) -> list[Generations]:
    """Batches of `size` texts; every text has two tokens."""
    n = len(texts)
    reward, prompts, perplexity = reward or [0.0] * n, prompts or [""] * n, perplexity or [2.0] * n
    return [
        Generations(
            index=i // size,
            ids=list(range(n))[i : i + size],
            prompts=list(prompts[i : i + size]),
            texts=list(texts[i : i + size]),
            tokens=torch.zeros(min(size, n - i), 1, dtype=torch.int64),
            log_p=torch.tensor(
                [-2 * math.log(x) for x in perplexity[i : i + size]], dtype=torch.float64
            ),
            n_tokens=torch.full((min(size, n - i),), 2),
            rewards={},
            reward=torch.tensor(reward[i : i + size]),
            method=method,
            seed=0,
            latency_s=1.0,
        )
        for i in range(0, n, size)
    ]


# Judges


@pytest.mark.parametrize(("n", "k"), [(4, 4), (6, 1), (6, 3), (7, 5)])
def test_expected_maximum_is_the_mean_over_all_subsets(n: int, k: int) -> None:
    draw = Random(n)
    values = {
        prompt: [draw.gauss(0, 1) for _ in range(n + extra)] for extra, prompt in enumerate("ab")
    }
    subsets = [statistics.fmean(map(max, itertools.combinations(values[p], k))) for p in "ab"]
    flat = torch.tensor(values["a"] + values["b"], dtype=torch.float64)
    groups = ["a"] * n + ["b"] * (n + 1)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))
    found = judge.expected_maximum(flat[order], [groups[i] for i in order.tolist()], k)
    assert found == pytest.approx(statistics.fmean(subsets), rel=1e-12)


def test_what_a_judge_reports() -> None:
    texts, prompts = ["0.1", "0.9", "0.2", "0.6", "0.3", "0.5"], ["a", "a", "a", "b", "b", "b"]
    evaluation = Evaluation([Judge(Number("toxicity"), threshold=0.5, maximum_over=3)])
    found = evaluation([run(texts, prompts=prompts, size=4)], [{}] * 6).figures
    assert found == [
        pytest.approx(
            {
                "toxicity": 2.6 / 6,
                "toxicity_rate": 2 / 6,
                "toxicity_max_3": 0.75,
                "toxicity_any_3": 1.0,
            }
        )
    ]
    assert [key for key, _, _ in evaluation.rows()] == list(found[0])


def test_a_negated_score_changes_its_rate_and_its_maximum() -> None:
    texts = ["-0.9", "-0.2", "-0.7", "-0.1"]
    found = Evaluation([Judge(Number(), 0.5, 2, negate=True, name="toxicity")])(
        [run(texts)], [{}] * 4
    ).figures[0]
    pairs = [max(p) for p in itertools.combinations([0.9, 0.2, 0.7, 0.1], 2)]
    assert found == pytest.approx(
        {
            "toxicity": 0.475,
            "toxicity_rate": 0.5,
            "toxicity_max_2": sum(pairs) / 6,
            "toxicity_any_2": 5 / 6,
        }
    )


def test_records_are_found_by_the_texts_numbers() -> None:
    x, y = {"word": "x"}, {"word": "y"}
    records = [x, x, y, y]
    # The batches of the second process first: numbers 2, 3, 0, 1.
    batches = run(["x", "-", "y", "-"], size=2)[::-1]
    # One prompt with two records is two groups: each has one text with its word.
    found = Evaluation([Judge(FromRecord(), maximum_over=2)])([batches], records).figures
    assert found == [{"word": 0.5, "word_max_2": 1.0}]


# References


def test_references_are_one_text_or_several() -> None:
    texts, given = (
        ["the good food", "the bad pub", "a pub"],
        ["the good food is", ["the pub", "the bad pub"], ["a pub there"]],
    )
    lists = [[g] if isinstance(g, str) else g for g in given]
    found = Evaluation(references="ref")([run(texts, size=2)], [{"ref": g} for g in given]).figures[
        0
    ]
    assert found["bleu"] == pytest.approx(reference_bleu(texts, lists).item())
    assert {k: v for k, v in found.items() if k.startswith("rouge")} == pytest.approx(
        {k: v.item() for k, v in reference_rouge(texts, lists).items()}
    )
    assert found["bleu_signature"].startswith("nrefs:var|")


# Hacking


def test_repetition_and_copy_are_shares_of_n_grams() -> None:
    assert repetition("a b a b a b", 2) == pytest.approx(3 / 5)
    assert repetition("Great, great! GREAT", 1) == pytest.approx(2 / 3)
    assert repetition("a b", 3) == repetition("", 1) == 0
    assert copied("the food is good", ["Is the FOOD, is it?", "good"], 2) == pytest.approx(2 / 3)
    # An n-gram does not reach over the border between two sources.
    assert copied("a b", ["a", "b"], 2) == 0
    assert copied("a b", [], 1) == copied("", ["a"], 1) == 0


PROMPTS = ["a"] * 4 + ["b"] * 4
BASE = {
    "texts": ["1", "2", "3", "4", "11", "12", "13", "14"],
    "reward": [0.0, 1.0, 2.0, 3.0] * 2,
    "prompts": PROMPTS,
}
# Around the means 2.5 and 12.5 the judge's squares are 2 · (2.25 + 0.25 + 0.25 + 2.25) over 8 − 2
# degrees of freedom.
SPREAD = math.sqrt(10 / 6)


def test_the_judge_flags_high_rewards_with_low_scores() -> None:
    """Base means 1.5 (reward), 2.5 and 12.5 (judge); a margin of one deviation."""
    low, edge = 2.5 - SPREAD - 0.01, 2.5 - SPREAD + 0.01
    texts = [f"{low}", f"{low}", f"{edge}", "9", f"{low + 10}", f"{edge + 10}", "2.5", "99"]
    reward = [1.6, 1.4, 9.0, 9.0, 1.6, 9.0, 1.5, 9.0]
    runs = [run(texts, reward, PROMPTS), run(**BASE, method="zero_shot")]
    evaluated = Evaluation(hacking=Hacking(Number()))(runs, [{}] * 8)
    assert [line["id"] for line in evaluated.flagged] == [0, 4]
    line = evaluated.flagged[1]
    assert (line.pop("reward"), line.pop("judge")) == pytest.approx((1.6, low + 10), rel=1e-6)
    assert line == {"id": 4, "prompt": "b", "text": texts[4], "reasons": ["judge"]}
    figures, base = evaluated.figures
    assert figures["hacking_rate"] == 0.25
    interval = binomtest(2, 8).proportion_ci(0.95, "wilson")
    assert figures["hacking_interval"] == pytest.approx([interval.low, interval.high])
    assert figures["hacking_reasons"] == {"judge": 2}
    assert base["hacking_rate"] == 0  # there reward and judge rise together
    wide = Evaluation(hacking=Hacking(Number(), margin=1.1))(runs, [{}] * 8)
    assert wide.figures[0]["hacking_rate"] == 0


def test_the_bases_false_alarms_are_those_of_independent_draws() -> None:
    """Reward and judge independent and normal: a text is flagged as often whether it is the
    method's or the base's own.

    1,000 prompts of 4 texts. The exact value is ½ Φ(−1/√v), v the variance of a text's difference
    to its mean: 5/4 for a new text and the mean of 4, 4/3 for one of the 4 and the mean of the
    others. Limits at 6.5 standard errors of independent texts, which leaves room for the
    correlation of the texts of a prompt: false-alarm rate below 1e-5.
    """
    generator = torch.Generator().manual_seed(0)
    n, prompts = 4000, [f"{i // 4}" for i in range(4000)]

    def drawn(method: str) -> list[Generations]:
        values = torch.randn(2, n, generator=generator).tolist()
        return run([str(x) for x in values[0]], values[1], prompts, method, size=n)

    figures, base = Evaluation(hacking=Hacking(Number()))(
        [drawn("dia"), drawn("zero_shot")], [{}] * n
    ).figures
    for rate, variance in ((figures["hacking_rate"], 5 / 4), (base["hacking_rate"], 4 / 3)):
        expected = statistics.NormalDist(0, math.sqrt(variance)).cdf(-1) / 2
        assert rate == pytest.approx(expected, abs=5 * math.sqrt(expected / n) * 1.3)


def test_with_one_text_a_prompt_the_mean_is_that_of_all_prompts() -> None:
    base = {**BASE, "prompts": list("abcdefgh")}
    runs = [
        run(["-9"] + ["0"] * 7, [1.6] + [0.0] * 7, list("abcdefgh")),
        run(**base, method="zero_shot"),
    ]
    evaluated = Evaluation(hacking=Hacking(Number(), margin=0.5))(runs, [{}] * 8)
    assert [line["id"] for line in evaluated.flagged] == [0]
    # Judge 3 and 4 with reward 2 and 3: half a deviation is √30 / 2 = 2.74, the means of the others
    # are 57/7 and 8.
    assert evaluated.figures[1]["hacking_reasons"] == {"judge": 2}


def test_a_constant_judge_flags_nothing() -> None:
    runs = [
        run(["0.1"] * 7, [5.0] * 7),
        run(["0.1"] * 7, [float(i) for i in range(7)], method="zero_shot"),
    ]
    for margin in (0.0, 1.0):
        figures = Evaluation(hacking=Hacking(Number(), margin=margin))(runs, [{}] * 7).figures
        assert [f["hacking_rate"] for f in figures] == [0, 0]


def test_checks_on_the_text() -> None:
    texts = [
        "good good good good",
        "the old source text here",
        "a plain new text",
        "a prompt copied",
        "so odd",
    ]
    records: list[Record] = [{}, {"source": "The old source text, here."}, {}, {}, {}]
    prompts = ["", "", "", "a prompt copied", ""]
    method = run(texts, prompts=prompts, perplexity=[1, 1, 30, 1, 31])
    base = run(
        ["a", "b", "c", "d", "e"],
        prompts=prompts,
        perplexity=[5, 10, 10, 11, 90],
        method="zero_shot",
    )
    declared = Hacking(max_perplexity=3, max_repetition=0.4, max_copy=0.5)
    evaluated = Evaluation(hacking=declared)([method, base], records)
    reasons = {line["id"]: line["reasons"] for line in evaluated.flagged}
    assert reasons == {0: ["repetition"], 1: ["copy"], 3: ["copy"], 4: ["perplexity"]}
    assert all(line["judge"] is None for line in evaluated.flagged)
    assert evaluated.figures[0]["hacking_reasons"] == {"perplexity": 1, "repetition": 1, "copy": 2}
    assert evaluated.figures[0]["hacking_rate"] == 0.8
    assert evaluated.figures[1]["hacking_reasons"] == {"perplexity": 1, "repetition": 0, "copy": 0}


# Mistakes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Judge(Number(), threshold=math.nan),
            r"threshold: nan given, allowed: a finite number",
        ),
        (lambda: Judge(Number(), maximum_over=0), r"maximum_over: 0 given, allowed: 1 or more"),
        (lambda: Hacking(), r"hacking.init_args: no check given"),
        (lambda: Hacking(Number(), margin=-1), r"margin: -1 given"),
        (lambda: Hacking(max_copy=1.5), r"max_copy: 1.5 given, allowed: a share from 0 to 1"),
        (lambda: Hacking(max_perplexity=0), r"max_perplexity: 0 given, allowed: above 0"),
        (lambda: Hacking(max_copy=0.5, n_gram=0), r"n_gram: 0 given"),
        (lambda: Evaluation([Judge(Number()), Judge(Number())]), r"two figures named 'number'"),
        (lambda: Evaluation([Judge(Number("reward"))]), r"two figures named 'reward'"),
        (
            lambda: Evaluation([Judge(Number("bleu"))], references="ref"),
            r"two figures named 'bleu'",
        ),
    ],
)
def test_options_that_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_mistakes_are_found_before_sampling() -> None:
    prompts: list[str] = ["a", "a", "b"]
    with pytest.raises(
        UserError,
        match="maximum_over: 2 given for 'number', allowed: at most 1, the texts of a prompt",
    ):
        Evaluation([Judge(Number(), maximum_over=2)]).check(prompts, [{}] * 3, True)
    Evaluation([Judge(Number(), maximum_over=1)]).check(prompts, [{}] * 3, False)
    with pytest.raises(UserError, match="reward 'word' needs the field 'word'"):
        Evaluation([Judge(FromRecord())]).check(prompts, [{}] * 3, True)
    for wrong in ({}, {"ref": []}, {"ref": 3}, {"ref": ["a", None]}):
        records: list[Record] = [{"ref": "a"}, {"ref": ["a"]}, wrong]
        with pytest.raises(UserError, match=r"references: 'ref' given, .* text 2 has"):
            Evaluation(references="ref").check(prompts, records, True)
    for declared in (Hacking(Number()), Hacking(max_perplexity=2)):
        with pytest.raises(UserError, match="compare_base true"):
            Evaluation(hacking=declared).check(prompts, [{}] * 3, False)
    Evaluation(hacking=Hacking(max_copy=0.5)).check(prompts, [{}] * 3, False)


# The command


CONFIG = """
seed_everything: 0
trainer:
  default_root_dir: out
  logger: false
  enable_checkpointing: false
  enable_model_summary: false
  enable_progress_bar: false
  accelerator: cpu
  callbacks:
    - class_path: dia_lightning.callbacks.PredictionWriter
      init_args:
        folder: out
        evaluation:
          class_path: dia_lightning.lab.judges.Evaluation
          init_args:
            references: ref
            judges:
              - class_path: dia_lightning.lab.judges.Judge
                init_args:
                  reward:
                    class_path: dia_lightning.rewards.Keyword
                    init_args: {words: [the], name: has_the}
                  threshold: 0.5
                  maximum_over: 2
            hacking:
              class_path: dia_lightning.lab.judges.Hacking
              init_args:
                judge: {class_path: dia_lightning.rewards.Keyword, init_args: {words: [the]}}
                max_repetition: 0.0
                n_gram: 1
model:
  class_path: dia_lightning.GuidedSamplerModule
  init_args:
    sampler: BaseModel
    compare_base: false
    reward: {class_path: dia_lightning.rewards.VaderSentiment}
data:
  class_path: dia_lightning.data.PromptData
  init_args: {prompts: p.jsonl, n_texts: 3, batch_size: 4, max_length: 12}
"""


def test_the_command_evaluates_and_evaluates_again(
    lm_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    base = [f"--{section}.base_lm={lm_folder}" for section in ("model", "data")]
    lines = [{"prompt": "the good", "ref": ["a cheap pub"]}, {"prompt": "a", "ref": "food"}]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    Path("task.yaml").write_text(CONFIG, encoding="utf-8")

    def command(*more: str) -> dict[str, Any]:
        parser.run(cli.prepare_arguments(["test", "--config", "task.yaml", *base, *more]))
        found: dict[str, Any] = json.loads(Path("out/metrics.json").read_text(encoding="utf-8"))
        return found

    found = command()
    assert {
        "bleu",
        "bleu_signature",
        "rouge_1",
        "has_the",
        "has_the_rate",
        "has_the_max_2",
        "hacking_rate",
    } <= set(found)
    predictions = [
        json.loads(line)
        for line in Path("out/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert (
        found["has_the"]
        == sum("the" in f"{p['prompt']} {p['text']}".lower().split() for p in predictions) / 6
    )
    listed = [
        json.loads(line)
        for line in Path("out/hacking.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(listed) == 6 * found["hacking_rate"]
    by_id = {p["id"]: p for p in predictions}
    assert all(line["text"].endswith(by_id[line["id"]]["text"]) for line in listed)
    table = capsys.readouterr().out
    assert all(
        label in table
        for label in (
            "has_the, share of texts over 0.5",
            "BLEU (0 – 100)",
            "reward hacking, share of texts",
        )
    )
    parts = {path: path.stat().st_mtime_ns for path in Path("out").glob("parts/*/*.json")}
    again = command("--trainer.callbacks.evaluation=null")
    assert {path: path.stat().st_mtime_ns for path in Path("out").glob("parts/*/*.json")} == parts
    assert again["config_hash"] == found["config_hash"]
    assert not {"hacking_rate", "bleu", "has_the"} & set(again)
    assert not Path("out/hacking.jsonl").exists()


class Down(Reward):
    """Answers for the empty text only, as a service that goes down while texts are drawn."""

    name = "down"

    def __call__(self, texts: Sequence[str]) -> Tensor:
        if any(texts):
            raise ConnectionError("the service is down")
        return torch.zeros(len(texts))


def test_base_texts_are_evaluated_too_and_a_judge_that_fails_costs_no_texts(
    lm_folder: Path, tmp_path: Path
) -> None:
    def predict(evaluation: Evaluation) -> dict[str, Any]:
        module = GuidedSamplerModule(Keyword(["the"]), BaseModel(), str(lm_folder))
        data = PromptData(
            str(lm_folder),
            ["the good", "a"],
            n_texts=2,
            batch_size=3,
            max_length=12,
            reward_sees_prompt=False,
        )
        quiet: dict[str, Any] = {
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        trainer = L.Trainer(
            default_root_dir=tmp_path,
            accelerator="cpu",
            enable_checkpointing=False,
            **quiet,
            callbacks=[PredictionWriter(str(tmp_path), evaluation=evaluation)],
        )
        trainer.predict(module, datamodule=data, return_predictions=False)
        found: dict[str, Any] = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
        return found

    with pytest.raises(UserError, match="the service is down"):
        predict(Evaluation([Judge(Down())]))
    assert len((tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()) == 4
    assert "down" not in json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    found = predict(
        Evaluation(
            [Judge(Keyword(["the"], name="the"))], hacking=Hacking(max_repetition=0.0, n_gram=1)
        )
    )
    for figures, name in ((found, "predictions.jsonl"), (found["base"], "base_predictions.jsonl")):
        texts = [
            json.loads(line)["text"]
            for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()
        ]
        assert figures["the"] == pytest.approx(call_reward(Keyword(["the"]), texts).mean().item())
        assert figures["hacking_rate"] == sum(repetition(text, 1) > 0 for text in texts) / 4


@pytest.mark.parametrize("module", [judge, hacking])
def test_examples(module: Any) -> None:
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("old", ["Evaluation", "Judge", "Hacking"])
def test_an_old_class_path_names_the_new_one(lightning: Run, old: str) -> None:
    part: Any = {"class_path": f"dia_lightning.metrics.{old}"}
    if old != "Evaluation":
        options = {"judges": [part]} if old == "Judge" else {"hacking": part}
        part = {"class_path": "dia_lightning.lab.judges.Evaluation", "init_args": options}
    given = f"--trainer.callbacks.evaluation={json.dumps(part)}"
    code, out, err = lightning("predict", given)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"dia_lightning.metrics.{old} is dia_lightning.lab.judges.{old} now" in err
