"""`--reward FILE.py:NAME` imports a file that the user typed, and nothing else can name one."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dia_lightning.errors import UserError
from dia_lightning.settings import own_code, parser

Run = Callable[..., tuple[int, str, str]]
FEW = ["--n=2", "--data.batch_size=2", "--data.max_length=8", "--lam=0"]
FEW += ["--sampler=BestOfN", "--sampler.n=2"]
# Whoever imports it leaves a file behind.
CODE = """from pathlib import Path
Path("imported").touch()
import torch
import near
from dia_lightning.samplers import BestOfN
from dia_lightning.types import Reward


class Cheer(Reward):
    name = "cheer"

    def __init__(self, words: list[str] = ["good"]) -> None:
        self.words = words

    def __call__(self, texts):
        return torch.tensor([near.FACTOR * sum(map(t.count, self.words)) for t in texts]).float()


class Mine(BestOfN):
    pass


class Other:
    pass


def letters(texts):
    return [float(len(text)) for text in texts]


def needs(texts, more):
    return [0.0] * len(texts)


def _hidden(texts):
    return letters(texts)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    before, path = set(sys.modules), list(sys.path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code").mkdir()
    (tmp_path / "code/mine.py").write_text(CODE, encoding="utf-8")
    (tmp_path / "code/near.py").write_text("FACTOR = 2\n", encoding="utf-8")
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def texts(folder: str) -> list[dict[str, object]]:
    lines = Path(folder, "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def key(folder: str) -> str:
    found: str = json.loads(Path(folder, "metrics.json").read_text("utf-8"))["config_hash"]
    return found


@pytest.mark.parametrize("option", ["--reward", "--model.reward", "--model.init_args.reward"])
def test_a_class_with_its_options(lightning: Run, here: Path, option: str) -> None:
    run = ["predict", *FEW, "--out=a", f"{option}=code/mine.py:Cheer", f"{option}.words", '["e"]']
    code, _, err = lightning(*run)
    assert (code, err) == (0, "")
    for line in texts("a"):
        assert line["reward"] == 2 * str(line["text"]).count("e")
        assert line["rewards"] == {"cheer": line["reward"]}
    assert "mine.Cheer" in Path("a/config.yaml").read_text(encoding="utf-8")


def test_a_function_and_a_sampler(lightning: Run, here: Path) -> None:
    code, _, err = lightning("predict", *FEW[:4], "--out=a", "--reward", "code/mine.py:letters")
    assert (code, err) == (0, "")
    assert all(line["reward"] == len(str(line["text"])) for line in texts("a"))
    mine = ["--sampler=code/mine.py:Mine", "--sampler.n=3", "--reward=code/mine.py:letters"]
    code, _, err = lightning("predict", *FEW[:4], "--out=b", *mine)
    assert (code, err) == (0, "")
    assert "mine.Mine" in Path("b/config.yaml").read_text(encoding="utf-8")


def test_a_run_goes_on_only_with_the_same_code(lightning: Run, here: Path) -> None:
    """By the file's content, wherever it lies; for classes, for functions and for --allow."""
    sys.modules.pop("mine", None)  # of another test, whose name a file would not take
    for name in ("Cheer", "letters"):
        run = ["predict", *FEW, f"--out={name}", f"--reward=code/mine.py:{name}"]
        assert lightning(*run)[0] == 0
        first = key(name)
        assert "1 of 1 batches were there" in lightning(*run)[1]
        Path("moved").mkdir(exist_ok=True)
        for file in ("mine.py", "near.py"):
            Path("moved", file).write_bytes(Path("code", file).read_bytes())
        moved = [argument.replace("code/", "moved/") for argument in run]
        sys.modules.pop("mine")
        assert "1 of 1 batches were there" in lightning(*moved)[1]
        changed = (
            Path("moved/mine.py").read_text(encoding="utf-8").replace("float(len", "-float(len")
        )
        Path("moved/mine.py").write_text(changed, encoding="utf-8")
        assert "batches were there" not in lightning(*moved)[1]
        assert key(name) != first
        sys.modules.pop("mine")
    assert all(line["reward"] == -len(str(line["text"])) for line in texts("letters"))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("nope.py:Cheer", "no such file: nope.py"),
        (
            "code/mine.py:Chee",
            "has no reward Chee; write FILE.py:NAME, it has Cheer, letters, needs",
        ),
        ("code/mine.py", "given without a name; write FILE.py:NAME, it has Cheer"),
        ("code/mine.py:", "given without a name; write FILE.py:NAME, it has Cheer"),
        ("code/mine.py:_hidden", "has no reward _hidden"),
        ("code/mine.py:Other", "has no reward Other"),
        ("code/mine.py:Reward", "has no reward Reward"),
        ("code/mine.py:needs", "needs(texts, more) given, allowed: (texts) or (texts, records)"),
        ("broken.py:A", "broken.py, line 2 cannot be imported (SyntaxError: "),
        ("fails.py:A", "fails.py, line 3 cannot be imported (ZeroDivisionError: "),
        ("leaves.py:A", "leaves.py, line 2 cannot be imported (SystemExit: 3)"),
        ("lacks.py:A", "lacks.py, line 1 cannot be imported (ModuleNotFoundError: "),
        ("code:Cheer", "code:Cheer given, allowed is "),
    ],
)
def test_mistakes_in_one_line(lightning: Run, here: Path, given: str, says: str) -> None:
    Path("broken.py").write_text("a = 1\ndef\n", encoding="utf-8")
    Path("fails.py").write_text("def f():\n    pass\n1 / 0\n", encoding="utf-8")
    Path("leaves.py").write_text("import sys\nsys.exit(3)\n", encoding="utf-8")
    Path("lacks.py").write_text("import nowhere_to_be_found\n", encoding="utf-8")
    code, _, err = lightning("predict", *FEW, "--reward", given)
    assert code == 2
    assert err.startswith("error: --reward: ")
    assert says in err
    assert err.count("\n") == 1
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ["torch.py", "json.py", "my-own.py", "dia_lightning.py"])
def test_a_file_of_any_name(here: Path, name: str) -> None:
    """It takes no other module's place."""
    before = {known: sys.modules.get(known) for known in ("torch", "json", "dia_lightning")}
    Path(name).write_text("def good(texts):\n    return [1.0] * len(texts)\n", encoding="utf-8")
    config = Path(own_code.__file__).parents[2] / "configs/dia_tiny.yaml"
    given = ["predict", f"--config={config}", f"--reward={name}:good"]
    rest, modules = own_code.load_files(given)
    assert {known: sys.modules.get(known) for known in before} == before
    parser.run(rest, options_only=True, allow=modules)


VALUES = ["code/mine.py:Cheer", "./code/mine.py:letters", "{class_path: 'code/mine.py:Cheer'}"]


@pytest.mark.parametrize("value", VALUES)
def test_no_file_and_no_kit_can_name_code(lightning: Run, here: Path, value: str) -> None:
    Path("kit").mkdir()
    for name in ("mine.yaml", "kit/dia.yaml"):
        Path(name).write_text(
            f"model: {{class_path: dia_lightning.GuidedSamplerModule, init_args: {{reward: "
            f"{value if value[0] == '{' else repr(value)}}}}}\n"
            "data: {class_path: dia_lightning.data.PromptData}\n",
            encoding="utf-8",
        )
    for config in ("mine.yaml", "kit"):
        code, _, err = lightning("predict", "--config", config)
        assert code == 2
        assert err.count("\n") == 1
    assert not Path("imported").exists()


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("option", ["model.reward", "reward", "model.init_args.reward"])
def test_no_study_can(here: Path, option: str, value: str) -> None:
    from dia_lightning.lab.study import command

    Path("small.yaml").write_text(
        "title: t\nquestion: q\nconfig: configs/zero_shot_tiny.yaml\n"
        f"set: {{{option}: {json.dumps(value)}}}\ngrid: {{t: {{model.lam: [1.0]}}}}\n",
        encoding="utf-8",
    )
    with pytest.raises(UserError, match=r"^study small/\S+: "):
        command.run_study(["small.yaml", "--out", "out"])
    with pytest.raises(UserError, match=r"reward"):
        parser.run(["predict", f"--{option}={value}"], options_only=True)
    assert not Path("imported").exists()


def test_only_these_options_take_a_file(lightning: Run, here: Path) -> None:
    for option in ("--model", "--data", "--model.base_lm", "--trainer.callbacks"):
        lightning("predict", f"{option}=code/mine.py:Cheer", "--print_config")
        assert not Path("imported").exists(), option
