"""Bars within a batch: seen by a person at a terminal, and by nobody else."""

import io
import sys

import pytest
from lightning_utilities.core.rank_zero import rank_zero_only

from dia_lightning import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("terminal", "rank", "seen"), [(True, 0, True), (False, 0, False), (True, 1, False)]
)
def test_who_sees_a_bar(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, rank: int, seen: bool
) -> None:
    screen = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(rank_zero_only, "rank", rank, raising=False)
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    assert list(progress.steps(range(3), "tokens")) == [0, 1, 2]
    heat = progress.bar("λ of the population", total=6.0)
    heat.update(1.5)
    heat.refresh()
    heat.close()
    assert ("tokens" in screen.getvalue()) is seen
    assert ("25%" in screen.getvalue()) is seen
    assert bool(screen.getvalue()) is seen


def test_a_quick_loop_shows_none(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    assert list(progress.steps(range(3), "tokens")) == [0, 1, 2]
    assert "%" not in screen.getvalue()
