"""docs/bring_your_own.md to the letter: its files are written, its commands are run, in an empty
folder.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dia_lightning import cli

DOC = Path(cli.__file__).parents[1] / "docs/bring_your_own.md"
BLOCKS: list[tuple[str, str]] = re.findall(
    r"^```(\w+)\n(.*?)^```$", DOC.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)


def commands(block: str) -> list[str]:
    """One command each, without what the shell would not see: line ends behind a backslash.
    Here-documents stay whole.
    """
    return [block] if "<<" in block else block.replace("\\\n", " ").splitlines()


class Reader:
    """Does what the document says, in the current folder. `lightning` is run in this process,
    which has imported it already.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def do(self, language: str, block: str) -> None:
        if language != "sh":
            first = block.partition("\n")[0]
            Path(first.removeprefix("# ")).write_text(block, encoding="utf-8")
            return
        for command in commands(block):
            words = shlex.split(command, comments=True)
            if words[0] == "lightning":
                self.monkeypatch.setattr(sys, "argv", words)
                cli.main()  # SystemExit where it fails
            elif words[0] == "export":
                name, _, value = words[1].partition("=")
                self.monkeypatch.setenv(name, value)
                assert name == "PYTHONPATH"
                self.monkeypatch.syspath_prepend(value)
            else:
                subprocess.run(["bash", "-euc", command], check=True)


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a reader who came to the end."""
    folder = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        # `python` is this one, and `dia_lightning` the tree under test also where another is
        # installed.
        shims = tmp_path_factory.mktemp("bin")
        root = str(Path(cli.__file__).parents[1])
        (shims / "python").write_text(
            f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{root}" exec {shlex.quote(sys.executable)} "$@"\n',
            encoding="utf-8",
        )
        (shims / "python").chmod(0o755)
        monkeypatch.setenv("PATH", str(shims), prepend=":")
        reader = Reader(monkeypatch)
        for language, block in BLOCKS:
            reader.do(language, block)
        yield folder
    sys.modules.pop("my_rewards", None)


def metrics(folder: Path, run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (folder / "runs" / run / "metrics.json").read_text(encoding="utf-8")
    )
    assert found["complete"]
    return found


def test_every_block_is_a_file_or_commands() -> None:
    assert {language for language, _ in BLOCKS} == {"sh", "python", "yaml"}
    files = [block.partition("\n")[0] for language, block in BLOCKS if language != "sh"]
    assert all(re.fullmatch(r"# \w+\.(py|yaml)", name) for name in files), files
    assert len(BLOCKS) >= 12
    text = DOC.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((\w+\.md)\)", text):
        assert (DOC.parent / link).is_file()
    for path in re.findall(r"configs/\w+\.yaml", text):
        assert (DOC.parents[1] / path).is_file(), path


def test_the_model_has_learnt_the_corpus(read: Path) -> None:
    written = json.loads(
        (read / "runs/suffix/base_predictions.jsonl").read_text(encoding="utf-8").splitlines()[0]
    )
    assert written["prompt"] == "In Bergen Monday is"
    assert metrics(read, "suffix")["base"]["log_p_per_token"] > -1  # uniform over 350 tokens: −5.9
    names = {path.name for path in (read / "my_lm").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names


def test_the_reward_rises_with_and_without_a_denoiser(read: Path) -> None:
    for run in ("suffix", "my_dia"):
        found = metrics(read, run)
        assert found["reward"] > found["base"]["reward"] + found["base"]["reward_std"]
    assert "accept_denoise_accept" in metrics(read, "my_dia")
    guided = metrics(read, "guided")
    assert (guided["method"], guided["nfe"]["denoiser"] > 0) == ("dia", True)
    assert guided["reward"] > guided["base"]["reward"]
    assert set(metrics(read, "my_dia")["training"]) == {"denoiser"}


def test_options_of_the_command_line_are_those_of_the_run(read: Path) -> None:
    found = metrics(read, "other")
    assert found["n"] == 16
    assert len(metrics(read, "suffix")["config_hash"]) == 16
    lines = [
        json.loads(line)
        for line in (read / "runs/other/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    good, bad = ("sun", "clear", "mild", "warm", "calm", "dry"), ("rain", "storm")
    for line in lines:
        text = f"{line['prompt']} {line['text']}".lower()
        assert line["reward"] == sum(map(text.count, good)) - sum(map(text.count, bad))


def test_the_kit_holds_what_was_trained(read: Path) -> None:
    assert {path.name for path in (read / "my_kit").iterdir()} == {
        "README.md",
        "dia.yaml",
        "denoiser",
        "critic",
        "lm",
    }
    card = (read / "my_kit/README.md").read_text(encoding="utf-8")
    assert "`my_rewards.Outlook`, code that is not in this folder" in card
    assert (
        card.count("| `denoiser` |") == card.count("| `critic` |") == 2
    )  # parts, and what their training cost
    assert f"key `{metrics(read, 'my_dia')['config_hash']}`" in card
    found = metrics(read, "my_kit")
    assert found["n"] == 32
    assert found["reward"] > found["base"]["reward"] + found["base"]["reward_std"]
    assert set(found["training"]) == {"denoiser"}
