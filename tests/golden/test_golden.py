"""What a seed gives stays as it was recorded in golden.json: texts and tokens byte for byte,
numbers to 1e-6.

Numbers may differ in their last digits between CPUs; a text may then differ too where a draw falls
on an edge, so texts are compared on the kind of CPU alone on which the file was made. Make it anew
before a refactoring.
"""

import json
from typing import Any

import pytest

from tests.golden.make_golden import GOLDEN, LOSSES, TEXTS, kind_of_cpu, losses, texts

CPU = json.loads(GOLDEN.read_text(encoding="utf-8"))["cpu"] if GOLDEN.exists() else ""
pytestmark = pytest.mark.skipif(
    kind_of_cpu() != CPU,
    reason=(
        f"golden.json is of {CPU or 'no CPU'}, this is {kind_of_cpu()}: python -m"
        " tests.golden.make_golden writes it anew"
    ),
)


@pytest.fixture(scope="module")
def golden() -> Any:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", TEXTS)
def test_texts(golden: Any, name: str) -> None:
    want, found = golden["texts"][name], texts(name)
    assert found.keys() == want.keys()
    for file, lines in want.items():
        assert len(found[file]) == len(lines)
        for line, now in zip(lines, found[file], strict=True):
            exact = ("id", "text", "tokens")
            assert [now[key] for key in exact] == [line[key] for key in exact]
            assert [now["reward"], now["log_p"]] == pytest.approx(
                [line["reward"], line["log_p"]], rel=1e-6, abs=1e-9
            )


@pytest.mark.parametrize("name", LOSSES)
def test_one_training_step(golden: Any, name: str) -> None:
    assert losses(name) == pytest.approx(golden["losses"][name], rel=1e-6, abs=1e-9)


def test_nothing_is_missing(golden: Any) -> None:
    assert golden["texts"].keys() == TEXTS.keys()
    assert golden["losses"].keys() == LOSSES.keys()
