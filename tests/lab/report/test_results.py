"""Means and intervals over seeds, equal settings, and the files of a run's folder."""

import doctest
import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from dia_lightning.errors import UserError
from dia_lightning.lab.report import labels, results
from dia_lightning.lab.report.results import (
    NATS_ABOVE_BASE,
    CellResult,
    aggregate,
    estimate,
    flatten,
    read_metrics,
    relative_to_base,
)


def test_examples_in_docstrings() -> None:
    for module in (labels, results):
        found = doctest.testmod(module)
        assert found.attempted > 0
        assert found.failed == 0


def test_intervals_are_students() -> None:
    for n in (2, 3, 5, 40):
        values = np.random.default_rng(n).normal(3.0, 2.0, n)
        found = estimate(values.tolist())
        low, high = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
        assert (found.mean - found.half, found.mean + found.half) == pytest.approx(
            (low, high), rel=1e-9
        )
        assert found.n == n
    # Two values: t with one degree of freedom is Cauchy's, whose 97.5 % quantile is tan(0.475 π).
    assert estimate([1.0, 4.0]).half == pytest.approx(math.tan(0.475 * math.pi) * 1.5)
    alone = estimate([1.0])
    assert (alone.mean, alone.n) == (1.0, 1)
    assert math.isnan(alone.half)


def test_every_number_has_a_flat_name() -> None:
    metrics = {
        "schema": 1,
        "complete": True,
        "method": "a",
        "n": 2,
        "nfe": {"lm": 3},
        "lost": None,
        "nan": math.nan,
        "two": [1, 2.5],
    }
    assert flatten(metrics) == {"n": 2, "nfe/lm": 3, "two/0": 1, "two/1": 2.5}


def result(setting: dict[str, object], seed: int, error: str = "", **metrics: object) -> CellResult:
    return CellResult("s", dict(setting), seed, Path(), dict(metrics), error)


def test_seeds_of_a_setting_are_one_group_and_failed_ones_none() -> None:
    groups = aggregate(
        [
            result({"λ": 4, "solver": "ddim"}, 0, reward=1.0, ess=0.5),
            result({"λ": 8, "solver": "ddim"}, 0, reward=9.0),
            result({"solver": "ddim", "λ": 4.0}, 1, reward=3.0),
            result({"λ": 4, "solver": "ddim"}, 2, "it broke", reward=99.0),
            result({"λ": 4, "solver": True}, 0, reward=0.0),
            result({"λ": 4, "solver": 1}, 0, reward=0.0),
        ]
    )
    assert [group.setting["λ"] for group in groups] == [4, 8, 4, 4]
    first = groups[0]
    assert [r.seed for r in first.results] == [0, 1]
    assert (first.figures["reward"].mean, first.figures["reward"].n) == (2.0, 2)
    assert (first.figures["ess"].mean, first.figures["ess"].n) == (0.5, 1)


def test_likelihood_is_compared_with_the_base_of_the_run_else_of_the_study() -> None:
    own = result({"a": 1}, 0, log_p_per_token=-1.5, base={"log_p_per_token": -1.2})
    other = result({"a": 2}, 0, log_p_per_token=-1.7)
    zero = result({"a": 3}, 0, method="zero_shot", log_p_per_token=-1.4)
    found = [r.metrics.get(NATS_ABOVE_BASE) for r in relative_to_base([own, other, zero])]
    assert found == pytest.approx([0.3, 1.7 - 1.3, 0.0])
    assert relative_to_base([other]) == [other]


def test_a_run_that_was_stopped_or_is_missing_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*metrics\.json"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.json").write_text(json.dumps({"complete": False, "n": 3}))
    with pytest.raises(UserError, match="was stopped"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.json").write_text(json.dumps({"complete": True, "n": 3, "schema": 2}))
    with pytest.raises(UserError, match=r"metrics.json has schema 2, this version reads 1$"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.json").write_text(json.dumps({"complete": True, "n": 3, "schema": 1}))
    assert read_metrics(tmp_path)["n"] == 3
