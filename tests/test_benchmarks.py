"""The measuring scripts at a fraction of their size, and the estimators that they rest on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import moves
from benchmarks.rows import Rows, publish


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
