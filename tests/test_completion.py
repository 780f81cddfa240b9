"""What a shell offers, asked as bash asks."""

import subprocess

import pytest
import shtab

from dia_lightning import completion
from dia_lightning.cli import COMMANDS, TOOLS
from tests.conftest import Run
from tests.test_cli import assert_one_line


@pytest.fixture(scope="module")
def script() -> str:
    return str(shtab.complete(completion.every_command({**COMMANDS, **TOOLS}), "bash"))


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("", [*COMMANDS, *TOOLS]),
        ("predict --model.la", ["--model.lam"]),
        ("predict --model.sampler Ann", ["Annealed"]),
        ("fit --model.adapter", ["--model.adapter_rank"]),
        ("fit --trainer.max_st", ["--trainer.max_steps"]),
        ("test --data.n_te", ["--data.n_texts"]),
        ("kit export --with", ["--with-base-lm"]),
        ("study --dry", ["--dry-run"]),
        ("preference im", ["import"]),
        ("completion z", ["zsh"]),
    ],
)
def test_bash_offers(script: str, typed: str, offered: list[str]) -> None:
    words = typed.split(" ")
    line = f"COMP_WORDS=(lightning {' '.join(words[:-1])} '{words[-1]}'); COMP_CWORD={len(words)}; _shtab_lightning"
    shown = 'printf "%s\\n" "${COMPREPLY[@]}"'
    out = subprocess.run(["bash", "-c", f"{script}\n{line}\n{shown}"], check=True, capture_output=True, text=True).stdout
    assert set(offered) <= set(out.split())
    if typed:
        assert out.split() == offered


def test_the_command_prints_it(lightning: Run, script: str) -> None:
    assert lightning("completion", "bash")[1] == f"{script}\n"


def test_mistakes(lightning: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_one_line(lightning("completion", "fish"), "completion", "'fish'", "zsh")
    monkeypatch.setattr(completion, "find_spec", lambda name: None)
    assert_one_line(lightning("completion", "bash"), "shtab is missing", "dia-lightning[completion]")
