"""Human preference: strengths, intervals and agreement against other sources; export, annotations
and import as one round.
"""

import csv
import json
import math
import subprocess
import sys
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path
from random import Random
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from dia_lightning import cli
from dia_lightning.callbacks.batch_files import dumps
from dia_lightning.errors import UserError
from dia_lightning.lab.preference.command import run_preference
from dia_lightning.lab.preference.comparison import (
    Comparison,
    bradley_terry,
    compare,
    has_estimate,
    krippendorff_alpha,
    majority,
    resampled_wins,
    wins_of,
)
from dia_lightning.lab.preference.pairs import draw_pairs

# Bradley–Terry


def test_two_methods_have_a_closed_form() -> None:
    for won, lost in [(7.0, 3.0), (0.5, 9.5), (40.0, 40.0)]:
        beta = bradley_terry(np.array([[0.0, won], [lost, 0.0]]))
        assert beta == pytest.approx(
            [math.log(won / lost) / 2, -math.log(won / lost) / 2], abs=1e-9
        )
    # Never beaten: half a win a side.
    assert bradley_terry(np.array([[0.0, 4], [0, 0]]))[0] == pytest.approx(
        math.log(4.5 / 0.5) / 2, abs=1e-9
    )


def test_strengths_of_the_baseball_example() -> None:
    """American League East 1987, Agresti, Categorical Data Analysis: log-strengths against
    Baltimore's.
    """
    wins = [  # Milwaukee, Detroit, Toronto, New York, Boston, Cleveland, Baltimore
        [0, 7, 9, 7, 7, 9, 11],
        [6, 0, 7, 5, 11, 9, 9],
        [4, 6, 0, 7, 7, 8, 12],
        [6, 8, 6, 0, 6, 7, 10],
        [6, 2, 6, 7, 0, 7, 12],
        [4, 4, 5, 6, 6, 0, 6],
        [2, 4, 1, 3, 1, 7, 0],
    ]
    beta = bradley_terry(np.array(wins, dtype=float))
    assert beta - beta[-1] == pytest.approx(
        [1.5814, 1.4364, 1.2945, 1.2476, 1.1077, 0.6839, 0.0], abs=6e-5
    )


def test_strengths_are_the_maximum_that_an_optimiser_finds() -> None:
    """Unequal numbers of games and ties; a batch is its members one by one."""
    wins = np.random.default_rng(0).integers(1, 30, size=(3, 4, 4)) / 2 * (1 - np.eye(4))
    found = bradley_terry(wins)
    for one, w in zip(found, wins, strict=True):

        def loss(beta: Any, w: Any = w) -> float:
            return float(-(w * log_expit(beta[:, None] - beta[None, :])).sum() + beta.sum() ** 2)

        assert one == pytest.approx(minimize(loss, np.zeros(4), tol=1e-12).x, abs=1e-5)
        assert bradley_terry(w) == pytest.approx(one, abs=1e-9)


def test_an_estimate_exists_where_no_group_is_unbeaten() -> None:
    """Ford's condition, by all ways to part the methods in two."""
    generator, seen = np.random.default_rng(0), set()
    for _ in range(200):
        wins = (generator.random((4, 4)) < 0.35) * (1 - np.eye(4))
        groups = [list(g) for n in (1, 2, 3) for g in combinations(range(4), n)]
        expected = all(wins[np.ix_([i for i in range(4) if i not in g], g)].any() for g in groups)
        assert bool(has_estimate(wins)) == expected
        seen.add(expected)
    assert seen == {True, False}


# Intervals and agreement


def test_intervals_cover_the_truth() -> None:
    """400 data sets of 60 pairs, P(win) 0.55, P(tie) 0.1: intervals of nominally 95 % cover the win
    rate 0.6.

    The standard error of the share is 0.012 if the coverage is 0.94, which n = 60 allows; below
    0.89 or above 0.985 by chance: less than 1e-4.
    """
    draw, covered = np.random.default_rng(0), 0
    for seed in range(400):
        scores = draw.choice([1.0, 0.5, 0.0], p=[0.55, 0.1, 0.35], size=60)
        rates = compare(
            [Comparison(0, 1, s) for s in scores], ["a", "b"], n_bootstrap=500, seed=seed
        )["win_rates"][0]
        assert rates["win_rate"] == pytest.approx(scores.mean())
        low, high = rates["interval"]
        covered += low <= 0.6 <= high
    assert 0.89 <= covered / 400 <= 0.985


def test_resampled_wins_keep_the_numbers_of_pairs() -> None:
    outcomes = (
        [Comparison(0, 1, 1.0)] * 3 + [Comparison(0, 1, 0.5)] * 2 + [Comparison(1, 2, 0.0)] * 4
    )
    drawn = resampled_wins(outcomes, 3, 50, np.random.default_rng(0))
    games = drawn + drawn.swapaxes(1, 2)
    assert (games == [[0, 5, 0], [5, 0, 4], [0, 4, 0]]).all()
    assert set(drawn[:, 2, 1]) == {4.0}
    assert len(set(drawn[:, 0, 1])) > 3
    assert wins_of(outcomes, 3).tolist() == [[0, 4, 0], [1, 0, 0], [0, 4, 0]]


def test_alpha_is_that_of_published_examples() -> None:
    """Krippendorff 2011, Computing Krippendorff's Alpha-Reliability: examples A (binary) and C
    (nominal, values missing).
    """
    binary = ["0100000010", "1110010000"]
    assert krippendorff_alpha(list(zip(*binary, strict=True))) == pytest.approx(0.095, abs=5e-4)
    nominal = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
    units = [[value for value in unit if value != "."] for unit in zip(*nominal, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha([["1", "1"], ["2", "2"]]) == pytest.approx(1)
    assert krippendorff_alpha([["1", "1"], ["1"], ["2"]]) is None
    assert krippendorff_alpha([]) is None


def test_a_majority_is_more_than_half() -> None:
    assert [
        majority(v) for v in ([1.0], [1.0, 0.0], [0.5], [1.0, 0.5], [0.0, 0.0, 1.0], [0.5, 0.0])
    ] == [1, 0.5, 0.5, 1, 0, 0]


# Export


METHODS = {"dia_secret": "swift", "smc_secret": "plain", "ppo_secret": "slow"}


def write_runs(folder: Path, n_prompts: int, per_prompt: int = 2, same: int = 0) -> list[str]:
    """Runs of three methods; the first `same` texts are equal in all."""
    paths = []
    for method, word in METHODS.items():
        path = folder / method / "predictions.jsonl"
        path.parent.mkdir()
        keys = [(p, i) for p in range(n_prompts) for i in range(per_prompt)]
        lines = [
            {
                "id": j,
                "prompt": f"prompt {p}, “ü”",
                "text": f'text {p} {i}, {"equal" if j < same else word}\n"x"; y',
                "method": method,
            }
            for j, (p, i) in enumerate(keys)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        paths.append(str(path))
    return paths


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_pairs_are_balanced_blinded_and_of_one_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_preference(
        ["export", *write_runs(tmp_path, 60, same=5), "--out", str(tmp_path / "out"), "--n", "100"]
    )
    key, rows = (
        read_json(tmp_path / "out/key.json"),
        read_csv(tmp_path / "out/annotators/pairs.csv"),
    )
    assert sorted(Counter(frozenset(sides) for sides in key["pairs"].values()).values()) == [
        33,
        33,
        34,
    ]
    for a, b in combinations(METHODS, 2):
        left = sum(sides == [a, b] for sides in key["pairs"].values())
        assert left in (16, 17)
    assert [count["identical"] for count in key["drawn"]] == [5, 5, 5]
    assert "5 identical" in capsys.readouterr().out
    assert {row["pair_id"] for row in rows} == set(key["pairs"])
    for row in rows:
        words = [METHODS[method] for method in key["pairs"][row["pair_id"]]]
        both = [row["text_1"], row["text_2"]]
        assert [text.partition(", ")[2].partition("\n")[0] for text in both] == words
        # The same prompt, and the same number among its texts.
        assert both[0].split(",")[0] == both[1].split(",")[0]
        assert both[0].split()[1] == row["prompt"].split()[1].rstrip(",")
        assert row["choice"] == ""
    for file in (tmp_path / "out/annotators").iterdir():
        assert "secret" not in file.read_text(encoding="utf-8")


def test_sides_and_order_are_random_and_the_seed_decides() -> None:
    runs = {m: {("p", i): f"{m} {i}" for i in range(40)} for m in ("a", "b")}
    pairs, _ = draw_pairs(runs, 40, 0)
    assert draw_pairs(runs, 40, 0)[0] == pairs
    other = draw_pairs(runs, 40, 1)[0]
    assert not {pair["pair_id"] for pair in other} & {pair["pair_id"] for pair in pairs}
    sides = "".join(pair["method_1"] for pair in pairs)
    assert sides.count("a") == 20
    assert "aaa" in sides  # neither alternating nor in blocks
    assert 10 < sum(x != y for x, y in pairwise(sides)) < 30


def test_label_studio_finds_what_its_configuration_names(tmp_path: Path) -> None:
    run_preference(["export", *write_runs(tmp_path, 3), "--out", str(tmp_path / "out")])
    root = ElementTree.parse(tmp_path / "out/annotators/labelling_config.xml").getroot()
    shown = {tag.get("name"): tag.get("value", "") for tag in root.iter("Text")}
    pairwise = root.find(".//Pairwise")
    assert pairwise is not None
    assert (pairwise.get("name"), pairwise.get("toName")) == ("comparison", "answer1,answer2")
    controls = [
        name
        for tag in (*root.iter("Pairwise"), *root.iter("Choices"))
        for name in str(tag.get("toName")).split(",")
    ]
    assert set(controls) <= set(shown)
    tasks, rows = (
        read_json(tmp_path / "out/annotators/tasks.json"),
        read_csv(tmp_path / "out/annotators/pairs.csv"),
    )
    assert all(
        {value.removeprefix("$") for value in shown.values()} < set(task["data"]) for task in tasks
    )
    columns = [
        [task["data"][k] for k in ("pair_id", "prompt", "answer1", "answer2")] for task in tasks
    ]
    assert columns == [[row[k] for k in ("pair_id", "prompt", "text_1", "text_2")] for row in rows]


def test_runs_of_one_method_are_named_by_their_folders(tmp_path: Path) -> None:
    paths = write_runs(tmp_path, 3)[:2]
    for path in paths:
        lines = [
            json.dumps({**json.loads(line), "method": "dia"})
            for line in Path(path).read_text(encoding="utf-8").splitlines()
        ]
        Path(path).write_text("\n".join(lines), encoding="utf-8")
    run_preference(["export", *paths, "--out", str(tmp_path / "out")])
    assert read_json(tmp_path / "out/key.json")["methods"] == ["dia_secret", "smc_secret"]


# The whole round


def annotation(annotator: int, choice: str, **more: Any) -> dict[str, Any]:
    """As Label Studio exports it; with choice "" nothing was selected."""
    result: list[dict[str, Any]] = []
    if choice in ("1", "2"):
        value = {"selected": {"1": "left", "2": "right"}[choice]}
        result = [
            {
                "id": "x",
                "type": "pairwise",
                "from_name": "comparison",
                "to_name": "answer1,answer2",
                "value": value,
            }
        ]
    if choice == "tie":
        result = [
            {
                "id": "y",
                "type": "choices",
                "from_name": "tie",
                "to_name": "prompt",
                "value": {"choices": ["tie"]},
            }
        ]
    return {"id": 1, "completed_by": annotator, "result": result, "was_cancelled": False, **more}


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_people_who_choose_by_strength_give_the_strengths_back(tmp_path: Path, kind: str) -> None:
    """1,500 pairs, log-strengths 0.8, 0 and −0.8, no ties; two annotators, each judges every pair
    alike.

    500 pairs of each two methods: the standard error of a log-strength is below 0.055, so 0.25 is
    beyond 4.5 of them; false-alarm rate below 1e-4.
    """
    run_preference(
        [
            "export",
            *write_runs(tmp_path, 300, per_prompt=2),
            "--out",
            str(tmp_path / "out"),
            "--n",
            "1500",
        ]
    )
    planted = dict(zip(METHODS, (0.8, 0.0, -0.8), strict=True))
    key, draw = read_json(tmp_path / "out/key.json"), Random(0)
    chosen = {}
    for row in read_csv(tmp_path / "out/annotators/pairs.csv"):
        # The annotator sees texts only.
        left, right = (
            next(m for m, word in METHODS.items() if word in row[side])
            for side in ("text_1", "text_2")
        )
        chosen[row["pair_id"]] = (
            "1" if draw.random() < expit(planted[left] - planted[right]) else "2"
        )
    file = tmp_path / f"ada.{kind}"
    if kind == "csv":
        file.write_text(
            "pair_id;choice\n" + "".join(f"{p};{c}\n" for p, c in chosen.items()), encoding="utf-8"
        )
    else:
        tasks = [
            {"id": 1, "data": {"pair_id": p}, "annotations": [annotation(k, c) for k in (1, 2)]}
            for p, c in chosen.items()
        ]
        file.write_text(json.dumps(tasks), encoding="utf-8")
    run_preference(["import", str(tmp_path / "out"), "--annotations", str(file)])
    found = read_json(tmp_path / "out/preference.json")
    assert found["bradley_terry"]["regularised"] is False
    for method, beta in planted.items():
        strength = found["bradley_terry"]["methods"][method]
        assert strength["log_strength"] == pytest.approx(beta, abs=0.25)
        low, high = strength["interval"]
        assert low < strength["log_strength"] < high
        assert 0.1 < high - low < 0.35
    for rate in found["win_rates"]:
        wins = sum(
            sides[c == "2"] == rate["method"]
            for p, c in chosen.items()
            if rate["other"] in (sides := key["pairs"][p]) and rate["method"] in sides
        )
        assert (rate["n"], rate["win_rate"]) == (500, pytest.approx(wins / 500))
    assert found["annotators"] == ({"ada": 1500} if kind == "csv" else {"1": 1500, "2": 1500})
    assert found["krippendorff_alpha"] == (None if kind == "csv" else pytest.approx(1))


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, list[str]]:
    """Six pairs of two methods: the folder and the pairs' names, the first method of the key on the
    left in all of them.
    """
    run_preference(
        ["export", *write_runs(tmp_path, 3)[:2], "--out", str(tmp_path / "out"), "--n", "6"]
    )
    key = read_json(tmp_path / "out/key.json")
    key["pairs"] = {pair: key["methods"] for pair in key["pairs"]}
    (tmp_path / "out/key.json").write_text(json.dumps(key), encoding="utf-8")
    return tmp_path / "out", list(key["pairs"])


def test_several_people_no_one_and_skipped_tasks(
    exported: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, pairs = exported
    given = [
        [annotation(1, "1"), annotation(2, "1"), annotation(3, "2")],  # won
        [annotation(1, "1"), annotation(2, "2")],  # balanced: a tie
        [annotation(1, "tie"), annotation(2, "2")],  # lost
        [annotation(1, ""), annotation(2, "2", was_cancelled=True)],  # judged by no one
        [annotation(1, "1", completed_by={"id": 1, "email": "ada@x.org"})],  # won
    ]
    tasks = [
        {"id": i, "data": {"pair_id": p}, "annotations": a}
        for i, (p, a) in enumerate(zip(pairs, given, strict=False))
    ]
    (folder / "ls.json").write_text(json.dumps(tasks), encoding="utf-8")
    run_preference(["import", str(folder), "--annotations", str(folder / "ls.json")])
    found = read_json(folder / "preference.json")
    assert found["pairs"] == {
        "n": 6,
        "judged": 4,
        "unjudged": 2,
        "judged_by_several": 3,
        "identical": 0,
    }
    (rate,) = found["win_rates"]
    assert (rate["n"], rate["ties"], rate["win_rate"]) == (4, 1, 2.5 / 4)
    assert found["annotators"] == {"1": 3, "2": 3, "3": 1, "ada@x.org": 1}
    assert found["left_share"] == 4 / 7
    units = [["1", "1", "2"], ["1", "2"], ["tie", "2"]]
    assert found["krippendorff_alpha"] == krippendorff_alpha(units)
    assert "4 of 6 pairs judged, 3 by several" in capsys.readouterr().out


def test_csv_files_may_name_their_annotators(exported: tuple[Path, list[str]]) -> None:
    folder, pairs = exported
    lines = f"pair_id,choice,annotator\n{pairs[0]},1,eve\n{pairs[0]},2,bob\n"
    lines += f"{pairs[1]}, TIE ,eve\n{pairs[2]},,eve\n"
    (folder / "all.csv").write_text(lines, encoding="utf-8")
    (folder / "zoe.csv").write_text(f"pair_id\tchoice\n{pairs[2]}\t1\n", encoding="utf-8")
    run_preference(
        ["import", str(folder), "--annotations", str(folder / "all.csv"), str(folder / "zoe.csv")]
    )
    found = read_json(folder / "preference.json")
    assert found["annotators"] == {"bob": 1, "eve": 2, "zoe": 1}
    assert (found["win_rates"][0]["ties"], found["win_rates"][0]["win_rate"]) == (2, 2 / 3)
    assert found["bradley_terry"]["regularised"] is False


# Files as other programs write and change them


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\f", "\x1c", "\r", "\r\n"])
def test_every_text_that_a_run_wrote_is_exported(tmp_path: Path, separator: str) -> None:
    """Written as the product writes `predictions.jsonl`: only a line feed ends a line."""
    prompt, paths = f"The Eagle is{separator}a", []
    for method in ("a", "b"):
        (tmp_path / method).mkdir()
        paths.append(str(tmp_path / method / "predictions.jsonl"))
        line = {"id": 0, "prompt": prompt, "text": f"x{separator}{method}", "method": method}
        Path(paths[-1]).write_bytes(f"{dumps(line)}\n".encode())
    run_preference(["export", *paths, "--out", str(tmp_path / "out")])
    (row,) = read_csv(tmp_path / "out/annotators/pairs.csv")
    (task,) = read_json(tmp_path / "out/annotators/tasks.json")
    assert row["prompt"] == task["data"]["prompt"] == prompt
    assert sorted([row["text_1"], row["text_2"]]) == [f"x{separator}{m}" for m in "ab"]


def test_a_spreadsheet_makes_no_number_or_formula_of_the_csv(tmp_path: Path) -> None:
    """Texts that would run are marked, those of tasks.json are as they are; the choices are read as
    ever.
    """
    paths, texts = [], {"a": ["=1+1", "+1", "-1", "@A1"], "b": ["plain", "\t=2", "a=b", "-x"]}
    for method, written in texts.items():
        (tmp_path / method).mkdir()
        paths.append(str(tmp_path / method / "predictions.jsonl"))
        lines = [
            json.dumps({"prompt": f"={i}", "text": t, "method": method}) + "\n"
            for i, t in enumerate(written)
        ]
        Path(paths[-1]).write_text("".join(lines))
    run_preference(["export", *paths, "--out", str(tmp_path / "out"), "--n", "4"])
    rows = read_csv(tmp_path / "out/annotators/pairs.csv")
    shown = {row[k] for row in rows for k in ("text_1", "text_2")}
    assert shown == {"'=1+1", "'+1", "'-1", "'@A1", "plain", "'\t=2", "a=b", "'-x"}
    assert {row["prompt"] for row in rows} == {f"'={i}" for i in range(4)}
    assert all(row["pair_id"].startswith("pair-") for row in rows)
    tasks = read_json(tmp_path / "out/annotators/tasks.json")
    assert {task["data"][k] for task in tasks for k in ("answer1", "answer2")} == {
        *texts["a"],
        *texts["b"],
    }
    with (tmp_path / "ada.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "choice": "1"} for row in rows)
    run_preference(["import", str(tmp_path / "out"), "--annotations", str(tmp_path / "ada.csv")])
    assert read_json(tmp_path / "out/preference.json")["pairs"]["judged"] == 4


def test_exports_of_earlier_versions_are_imported(exported: tuple[Path, list[str]]) -> None:
    """Their pairs are named by twelve digits alone."""
    folder, pairs = exported
    key = read_json(folder / "key.json")
    old = ["0123456789ab", "12e456789012", "123456789012", "abcdefabcdef", "00e000000000", "a1"]
    key["pairs"] = {name: key["pairs"][pair] for name, pair in zip(old, pairs, strict=True)}
    (folder / "key.json").write_text(json.dumps(key), encoding="utf-8")
    (folder / "ada.csv").write_text("pair_id,choice\n" + "".join(f"{name},1\n" for name in old))
    run_preference(["import", str(folder), "--annotations", str(folder / "ada.csv")])
    assert read_json(folder / "preference.json")["pairs"]["judged"] == 6


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_spreadsheet_may_save_the_csv_in_its_own_way(
    exported: tuple[Path, list[str]], encoding: str, end: str, delimiter: str
) -> None:
    folder, pairs = exported
    cells = [["pair_id", "text_1", "choice"], *([pair, '"a, ""é"";\n\tb"', "1"] for pair in pairs)]
    content = end.join(delimiter.join(row) for row in cells) + end
    (folder / "ada.csv").write_bytes(content.encode(encoding))
    run_preference(["import", str(folder), "--annotations", str(folder / "ada.csv")])
    assert read_json(folder / "preference.json")["annotators"] == {"ada": 6}


OTHERS = {
    "relation": {"from_id": "x", "to_id": "z", "type": "relation", "direction": "right"},
    "rectangle": {
        "id": "r",
        "type": "rectanglelabels",
        "from_name": "box",
        "to_name": "image",
        "value": {"x": 1.0, "y": 2.0, "width": 3.0, "height": 4.0, "rectanglelabels": ["tie"]},
    },
    "textarea": {
        "id": "t",
        "type": "textarea",
        "from_name": "why",
        "to_name": "prompt",
        "value": {"text": ["tie"]},
    },
    "choices": {
        "id": "c",
        "type": "choices",
        "from_name": "topic",
        "to_name": "prompt",
        "value": {"choices": ["tie"]},
    },
    "pairwise": {
        "id": "p",
        "type": "pairwise",
        "from_name": "fluency",
        "to_name": "answer1,answer2",
        "value": {"selected": "right"},
    },
    "rating": {
        "id": "s",
        "type": "rating",
        "from_name": "stars",
        "to_name": "prompt",
        "value": {"rating": 4},
    },
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("others", [*([name] for name in OTHERS), list(OTHERS)])
@pytest.mark.parametrize("choice", ["1", "2", "tie", ""])
def test_results_of_other_kinds_are_passed_over(
    exported: tuple[Path, list[str]], others: list[str], choice: str, first: bool
) -> None:
    folder, pairs = exported
    added = [OTHERS[name] for name in others]
    given = annotation(1, choice)
    given["result"] = [*added, *given["result"]] if first else [*given["result"], *added]
    # Another task has a choice, since a file without one is refused.
    tasks = [
        {"id": 1, "data": {"pair_id": pairs[0]}, "annotations": [given]},
        {"id": 2, "data": {"pair_id": pairs[1]}, "annotations": [annotation(1, "1")]},
    ]
    (folder / "ls.json").write_text(json.dumps(tasks), encoding="utf-8")
    run_preference(["import", str(folder), "--annotations", str(folder / "ls.json")])
    found = read_json(folder / "preference.json")
    score = {"1": 1.0, "2": 0.0, "tie": 0.5}
    judged = [1.0, score[choice]] if choice else [1.0]
    assert found["pairs"]["judged"] == len(judged)
    assert found["win_rates"][0]["win_rate"] == sum(judged) / len(judged)


# Mistakes


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            "pair_id,choice\nnope,1\n",
            r"a\.csv, line 2: the pair 'nope' is not in this export",
        ),
        (
            "a.csv",
            "pair_id,choice\nPAIR,3\n",
            r"line 2: choice '3' given, allowed: 1, 2, tie or empty",
        ),
        (
            "a.csv",
            "pair_id,choice\nPAIR,1\nPAIR,2\n",
            r"line 3: 'a' chose '1' and '2' for one pair",
        ),
        ("a.csv", "pair_id,text_1\nPAIR,1\n", r"no columns pair_id and choice"),
        ("a.csv", "pair_id,choice\nPAIR,\n", r"no choice in these files"),
        (
            "a.json",
            '[{"id": 1, "comparison": "left"}]',
            r"no JSON export of Label Studio .*annotations",
        ),
        ("a.json", "{", r"no JSON export of Label Studio"),
        (
            "a.json",
            json.dumps(
                [
                    {
                        "id": 7,
                        "data": {"pair_id": "PAIR"},
                        "annotations": [
                            {
                                **annotation(1, "1"),
                                "result": (
                                    annotation(1, "1")["result"] + annotation(1, "tie")["result"]
                                ),
                            }
                        ],
                    }
                ]
            ),
            r"task 7: choice '1 and tie' given",
        ),
        ("missing/a.csv", None, r"cannot read"),
    ],
)
def test_a_mistake_in_annotations_is_one_error(
    exported: tuple[Path, list[str]], name: str, content: str | None, message: str
) -> None:
    folder, pairs = exported
    if content is not None:
        (folder / name).write_text(content.replace("PAIR", pairs[0]), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        run_preference(["import", str(folder), "--annotations", str(folder / name)])
    assert not (folder / "preference.json").exists()


def test_mistakes_of_the_command_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def program(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["dia", "preference", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        err = capsys.readouterr().err
        assert end.value.code == 2
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    a, b, _ = write_runs(tmp_path, 2)
    out = str(tmp_path / "out")
    assert "allowed: two predictions.jsonl or more" in program("export", a, "--out", out)
    assert "no pair of different texts" in program("export", a, a, "--out", out)
    assert "--n: 0 given" in program("export", a, b, "--out", out, "--n", "0")
    assert "invalid int value: 'x'" in program("export", a, b, "--out", out, "--n", "x")
    assert "cannot read" in program("export", a, str(tmp_path / "no.jsonl"), "--out", out)
    assert "invalid choice" in program("judge")
    assert "required: COMMAND" in program()
    assert "holds no export" in program("import", out, "--annotations", a)
    run_preference(["export", a, b, "--out", out])
    assert "holds an export already" in program("export", a, b, "--out", out)


def test_help_is_there_and_imports_nothing_heavy(tmp_path: Path) -> None:
    for arguments in (["--help"], ["export", "--help"], ["import", "--help"]):
        code = (
            f"import sys, atexit; sys.argv = ['dia', 'preference', *{arguments}]\n"
            "heavy = {'torch', 'lightning', 'numpy'}\n"
            "atexit.register(lambda: print(sorted(heavy & set(sys.modules)), file=sys.stderr))\n"
            "from dia_lightning.cli import main; main()"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(cli.__file__).parents[1],
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "[]\n")
        assert done.stdout.startswith("usage: dia preference")
    assert "preference" in cli.HELP
