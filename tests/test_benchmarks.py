"""The measuring scripts at a fraction of their size, and the estimators that they rest on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import blanks, equal_time, moves
from benchmarks.peers import compare, letters
from benchmarks.peers.judges import judge_of
from benchmarks.rows import Rows, publish
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.samplers import BestOfN, Diffusion


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
def test_effective_samples_of_an_autoregression(phi: float) -> None:
    """τ = (1 + φ) / (1 − φ) of the chain x' = φ x + ε, from its stationary law."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, 64, generator=generator, dtype=torch.float64)
    rows = [noise[0]]
    for step in noise[1:]:
        rows.append(phi * rows[-1] + (1 - phi**2) ** 0.5 * step)
    ess, censored = moves.pooled_ess(torch.stack(rows))
    assert not censored
    assert ess == pytest.approx(noise.numel() * (1 - phi) / (1 + phi), rel=0.1)


def test_chains_that_stand_still_are_no_more_than_their_number() -> None:
    values = torch.randn(64, generator=torch.Generator().manual_seed(1)).double()
    ess, censored = moves.pooled_ess(values.expand(400, 64))
    assert censored
    assert ess < 2.1 * 64


def test_rows_are_kept_and_a_torn_one_is_measured_again(tmp_path: Path) -> None:
    path, asked = tmp_path / "rows.jsonl", []

    def of(spec: dict[str, int]) -> dict[str, float]:
        asked.append(spec["seed"])
        return {"x": float(spec["seed"])}

    specs = [{"seed": seed} for seed in range(3)]
    assert Rows(path).measure(specs, of, None)
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole[:-20], encoding="utf-8")
    again = Rows(path)
    assert again.measure(specs, of, None)
    assert asked == [0, 1, 2, 2]
    assert [json.loads(line)["figures"]["x"] for line in path.open()] == [0.0, 1.0, 2.0]
    assert not Rows(path).measure([{"seed": 9}], of, minutes=-1)
    assert asked[-1] == 2
    assert [row["figures"]["x"] for row in Rows(path).of(specs)] == [0.0, 1.0, 2.0]


def test_a_table_replaces_the_one_before_or_becomes_a_section(tmp_path: Path) -> None:
    doc = tmp_path / "doc.md"
    doc.write_text("# Results\n", encoding="utf-8")
    for body in ("first", "second"):
        publish(tmp_path, "moves", "Moves", body, doc)
    text = doc.read_text(encoding="utf-8")
    assert text.count("## Moves") == 1
    assert "second" in text
    assert "first" not in text


def test_the_grid_begins_with_todays_move_and_names_each_variant_once() -> None:
    given = moves.arguments_of(["--kits", "smollm2"])
    specs = moves.grid(given)
    assert specs[0]["moves"] == [moves.suffix()]
    assert (specs[0]["length"], specs[0]["reward"], specs[0]["seed"]) == (128, "sentiment", 0)
    keys = [json.dumps(spec, sort_keys=True) for spec in specs]
    assert len(set(keys)) == len(keys)
    labels = [moves.label(parts) for tier in moves.variants() for parts in tier]
    assert len(set(labels)) == len(labels)


def test_moves_on_the_tiny_kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "OUT", tmp_path)
    monkeypatch.setattr(moves, "POOL", 4)
    monkeypatch.setattr(moves, "BURN", 1)
    monkeypatch.setattr(moves, "variants", lambda: [[[moves.suffix()]]])
    quick = ["--quick", "--rewards", "sentences"]
    assert moves.main(quick, tmp_path) == 0
    [row] = [json.loads(line) for line in (tmp_path / "quick.jsonl").open()]
    figures = row["figures"]
    assert figures["steps"] >= 16
    assert 0 <= figures["accepted"] <= 1
    assert figures["positions"] > 8 * figures["steps"]
    assert np.isfinite(figures["ess_per_second"])
    assert "suffix, uniform, K = 1" in (tmp_path / "table.md").read_text(encoding="utf-8")
    assert moves.main(quick, tmp_path) == 0  # nothing is measured again
    assert len((tmp_path / "quick.jsonl").read_text(encoding="utf-8").splitlines()) == 1


def test_a_sentence_reward_is_the_mean_over_sentences() -> None:
    found = moves.SentimentBySentence()(["Good food. Bad place.", "", "Good food!"])
    one = moves.VaderSentiment()(["Good food.", "Bad place.", "Good food!"])
    torch.testing.assert_close(found, torch.stack([one[:2].mean(), torch.tensor(0.0), one[2]]))


def test_effort_that_fits_a_budget() -> None:
    def row(effort: int, seconds: float) -> dict[str, Any]:
        return {"spec": {"effort": effort}, "figures": {"seconds_per_text": seconds}}

    rows = [row(1, 0.1), row(1, 0.1), row(2, 0.1), row(2, 0.28), row(4, 0.4)]
    assert [equal_time.chosen(rows, budget) for budget in (0.05, 0.1, 0.2, 1.0)] == [
        [], rows[:2], rows[2:4], rows[4:],
    ]  # fmt: skip


@pytest.mark.parametrize("kit", list(equal_time.KITS))
def test_ladders_of_effort_rise(kit: str) -> None:
    for ladder in equal_time.methods(kit).values():
        assert list(ladder) == sorted(ladder)
        assert len({repr(sampler) for sampler in ladder.values()}) == len(ladder)


def test_equal_time_on_the_tiny_kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        equal_time, "methods", lambda kit: {"best-of-n": {2: BestOfN(n=2), 4: BestOfN(n=4)}}
    )
    assert equal_time.main(["--quick"], tmp_path) == 0
    [row] = [json.loads(line) for line in (tmp_path / "quick.jsonl").open()]
    figures = row["figures"]
    assert figures["texts"] == 16
    assert figures["reward"] == pytest.approx(
        figures["reward_sentiment"] + 0.2 * figures["log_p_per_token"], abs=0.3
    )
    assert 0 < figures["distinct_2"] <= 1
    assert figures["seconds_per_text"] > 0


def test_places_of_exact_draws_are_uniform_and_of_others_not() -> None:
    rng = np.random.default_rng(0)
    true, weights = rng.normal(size=4000), rng.random(4000)
    weights /= weights.sum()
    exact = rng.choice(true, 2000, p=weights)
    near, error = blanks.kl(blanks.places(exact, true, weights, rng))
    assert abs(near) < 5 * error
    assert blanks.kl(blanks.places(exact + 0.5, true, weights, rng))[0] > 0.05
    assert blanks.kl(blanks.places(0.5 * exact, true, weights, rng))[0] > 0.05
    tied = np.round(true)
    near, error = blanks.kl(blanks.places(np.round(exact), tied, weights, rng))
    assert abs(near) < 5 * error


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A pub near the river.", 2),
        ("A pub near the river", 1),
        ("The river has a pub.", 1),
        ("A public place near the river.", 0),
        ("A pub, the river. And more.", 1),
        ("", 0),
    ],
)
def test_a_problem_is_solved_by_whole_words_in_their_order(text: str, found: int) -> None:
    problem = blanks.Problem("", (" pub", " river."), (1, 2, 0))
    assert problem.found(text) == found
    assert problem.solved(text) == (found == 2)


def test_problems_are_solved_by_the_text_from_which_they_are_cut() -> None:
    problems = blanks.problems("tiny")
    assert len(set(problems)) == len(problems) == 100
    assert sum(problem.ends for problem in problems) == 50
    assert {len(problem.pieces) for problem in problems} == {2, 3, 4}
    # The prompt with its blanks has as many tokens as the text had.
    for problem in problems[:10]:
        batch = blanks.data_of("tiny", problem.prompt("lengths"), 1, "").batch(0)
        assert int((~batch.prompt_mask).sum()) == sum(problem.gaps)


def test_blanks_on_the_tiny_kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blanks, "OUT", tmp_path)
    monkeypatch.setitem(blanks.KITS["tiny"], "pool", 300)
    monkeypatch.setattr(blanks, "ENOUGH", 2)
    monkeypatch.setitem(
        blanks.METHODS, "guided diffusion", blanks.Method("lengths", lambda: Diffusion(steps=4))
    )
    asked = ["--quick", "--methods", "guided diffusion", "p_θ alone"]
    blanks.pool.cache_clear()
    assert blanks.main(asked, tmp_path) == 0
    rows = [json.loads(line) for line in (tmp_path / "quick.jsonl").open()]
    valid = {row["spec"]["method"]: row["figures"]["valid"] for row in rows}
    assert all(valid["guided diffusion"])
    blanks.pool.cache_clear()


def test_law_of_the_letters_and_distance_from_it(tmp_path: Path) -> None:
    folder = letters.make(tmp_path / "letters")
    p = letters.law(folder)
    assert sum(p.values()) == pytest.approx(1.0, abs=1e-9)
    lm = BaseLM.load(str(folder))
    rows = torch.full((4, letters.LENGTH), lm.end_id)
    for row, text in zip(rows, list(p)[:4], strict=True):
        row[: len(text)] = torch.tensor(text, dtype=torch.int64)
    expected = [np.log(value) for value in list(p.values())[:4]]
    assert lm.log_prob(rows).tolist() == pytest.approx(expected, abs=1e-4)
    reward = np.array(judge_of({"name": "last letter", "letter": "b"})(
        ["".join(letters.LETTERS[i] for i in text) for text in p]
    ))  # fmt: skip
    pi = np.array(list(p.values())) * np.exp(3 * reward)
    drawn = np.random.default_rng(1).choice(len(p), 5000, p=pi / pi.sum())
    far, floor = letters.total_variation([list(p)[i] for i in drawn], p, reward, 3.0)
    assert far == pytest.approx(floor, rel=0.4)  # of one draw of 5,000 texts, seed fixed
    assert letters.total_variation([list(p)[i] for i in drawn], p, -reward, 3.0)[0] > 0.5


@pytest.mark.parametrize(
    ("spec", "text", "value"),
    [
        ({"name": "last word", "word": "pub"}, "It is a pub.", 1.0),
        ({"name": "last word", "word": "pub"}, "A pub it is.", 0.0),
        ({"name": "last word", "word": "pub"}, "It is a brewpub.", 0.0),
        ({"name": "coverage", "words": ["pub", "cheap"]}, "A cheap place.", 0.5),
        ({"name": "last letter", "letter": "b"}, "ab", 1.0),
        ({"name": "last letter", "letter": "b"}, "ba", 0.0),
    ],
)
def test_judges(spec: dict[str, Any], text: str, value: float) -> None:
    assert judge_of(spec)([text]) == [value]


def test_our_side_of_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {
        "kit": "tiny", "reward": {"name": "sentiment"}, "lam": 8.0, "seed": 0, "texts": 6,
        "wanted": 12, "runs": 4, "method": "population",
    }  # fmt: skip
    figures = compare.measure(spec)
    assert figures["reached"]
    assert figures["different"] >= 12
    assert figures["drawn"] in (12, 18, 24)
    assert figures["seconds"] > 0


@pytest.mark.slow
def test_the_peer_draws_the_law_of_the_letters() -> None:
    if not compare.PEER.exists():
        pytest.skip("the peer's environment is made by `make peers`")
    spec = {
        "kit": "letters", "reward": {"name": "last letter", "letter": "b"}, "lam": 2.0, "seed": 0,
        "texts": 1024, "wanted": 100_000, "runs": 1, "method": "genlm-control",
    }  # fmt: skip
    figures = compare.measure(spec)
    assert figures["drawn"] == 1024
    assert figures["total_variation"] < 5 * figures["floor"]
