"""The command as a user meets it: help, options, mistakes in one line, Ctrl-C."""

import importlib.metadata
import inspect
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from dia_lightning import cli
from dia_lightning.callbacks import PredictionWriter
from dia_lightning.data import ModelSamples, PromptData
from dia_lightning.files import require_path
from dia_lightning.samplers import GuidedSamplerModule
from dia_lightning.settings import parser
from dia_lightning.settings.short import SHORT
from dia_lightning.training import DenoiserModule

Run = Callable[..., tuple[int, str, str]]
NO_HUB = {"HF_ENDPOINT": "http://127.0.0.1:9"}
SMALL = ["--data.n_texts=4", "--data.batch_size=4", "--model.sampler.rounds=1"]
SMALL += ["--out=out"]
SHIPPED = Path(cli.__file__).parents[1]


def environment(folder: Path) -> dict[str, str]:
    """No hub, neither over the network nor from a cache of this machine."""
    return {
        **os.environ,
        **NO_HUB,
        "HF_HOME": str(folder / "hf"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
    }


def program(
    folder: Path, *command: str, timeout_s: float = 120
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def script(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def assert_one_line(result: tuple[int, str, str], *parts: str) -> None:
    code, _, err = result
    assert code == 2, err
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    for part in parts:
        assert part in err, err


# Help


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    for arguments in (
        ["--help"],
        ["-h"],
        ["predict", "--help"],
        ["fit", "--config", "nope.yaml", "-h"],
        ["--version"],
    ):
        code = (
            f"import sys, atexit; sys.argv = ['lightning', *{arguments}]\natexit.register(lambda:"
            " print(sorted({'torch', 'lightning', 'transformers', 'yaml'} & set(sys.modules)),"
            " file=sys.stderr))\nfrom dia_lightning.cli import main; main()"
        )
        done = program(tmp_path, sys.executable, "-c", code)
        assert done.returncode == 0
        assert done.stderr == "[]\n"
        assert done.stdout
        assert max(map(len, done.stdout.splitlines())) <= 128


def test_help_names_every_command(lightning: Run) -> None:
    _, text, _ = lightning("--help")
    for command, purpose in cli.COMMANDS.items():
        assert re.search(rf"^  {command} +{re.escape(purpose)}$", text, re.MULTILINE)
        assert purpose.capitalize() in lightning(command, "--help")[1]


@pytest.mark.parametrize(
    ("command", "model", "data"),
    [("predict", GuidedSamplerModule, PromptData), ("fit", DenoiserModule, ModelSamples)],
)
def test_every_option_that_help_names_exists(command: str, model: type, data: type) -> None:
    owners = {
        "model": model,
        "data": data,
        "trainer.callbacks": PredictionWriter,
        "trainer": L.Trainer,
    }
    given = re.findall(r"^  --([\w.]+) ", cli.command_help(command), re.MULTILINE)
    long = [SHORT.get(name, name) for name in given if command == "predict" or name != "seed"]
    named = [
        (owner, name.removeprefix(f"{owner}.").partition(".")[0])
        for name in long
        for owner in [next((o for o in owners if name.startswith(f"{o}.")), "")]
        if owner
    ]
    assert len(named) >= 7
    for owner, option in named:
        assert option in inspect.signature(owners[owner]).parameters, f"--{owner}.{option}"


def test_every_setting_can_be_listed(lightning: Run) -> None:
    code, out, _ = lightning("predict", "--help-all")
    assert code == 0
    assert "--trainer.accumulate_grad_batches" in out
    code, out, _ = lightning("predict", "--model.help", "dia_lightning.GuidedSamplerModule")
    assert code == 0
    assert "--model.sampler" in out
    for part, option in (
        ("Diffusion", "guidance"),
        ("CriticGuidance", "scale"),
        ("Annealed", "particles"),
    ):
        kind = "sampler.guidance" if part == "CriticGuidance" else "sampler"
        given = ["--model.sampler=Diffusion"] if part == "CriticGuidance" else []
        code, out, err = lightning("predict", *given, f"--model.{kind}.help", part)
        assert (code, err) == (0, "")
        assert f".{option} " in out


# Options


def settings(lightning: Run, *arguments: str) -> dict[str, Any]:
    code, out, err = lightning(*arguments, "--print_config")
    assert code == 0, err
    found: dict[str, Any] = yaml.safe_load(out)
    return found


def test_predict_without_a_config_takes_the_shipped_one(lightning: Run) -> None:
    shipped = yaml.safe_load((SHIPPED / "configs/dia_tiny.yaml").read_text(encoding="utf-8"))
    found = settings(lightning, "predict")
    assert found["model"]["class_path"] == shipped["model"]["class_path"]
    for name, value in shipped["model"]["init_args"].items():
        assert name in ("reward", "sampler") or found["model"]["init_args"][name] == value


def test_short_and_long_names_are_one_option(lightning: Run) -> None:
    long = settings(
        lightning, "predict", "--model.init_args.lam", "3", "--data.init_args.n_texts=5"
    )
    short = settings(lightning, "predict", "--model.lam", "3", "--data.n_texts=5")
    assert short == long
    assert short["model"]["init_args"]["lam"] == 3
    assert short["data"]["init_args"]["n_texts"] == 5
    assert (
        settings(lightning, "predict", "--model.lam=3", "--model.init_args.lam=5")["model"][
            "init_args"
        ]["lam"]
        == 5
    )


def test_a_config_in_the_current_folder_wins_over_a_shipped_one(
    lightning: Run, tmp_path: Path
) -> None:
    shipped = settings(lightning, "predict", "--config", "configs/dia_tiny.yaml")
    assert shipped["model"]["init_args"]["lam"] != 77
    (tmp_path / "configs").mkdir()
    text = (SHIPPED / "configs/dia_tiny.yaml").read_text(encoding="utf-8")
    (tmp_path / "configs/dia_tiny.yaml").write_text(
        re.sub(r"lam: \S+", "lam: 77", text), encoding="utf-8"
    )
    for arguments in (
        ["--config", "configs/dia_tiny.yaml"],
        ["--config=configs/dia_tiny.yaml"],
        ["-c", "configs/dia_tiny.yaml"],
    ):
        assert settings(lightning, "predict", *arguments)["model"]["init_args"]["lam"] == 77
    assert (
        settings(lightning, "predict", "--config", "configs/dia_tiny.yaml", "--model.lam=5")[
            "model"
        ]["init_args"]["lam"]
        == 5
    )


def test_a_later_config_wins_and_only_named_ones_count(lightning: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model:\n  init_args:\n    lam: 12\n", encoding="utf-8")
    both = settings(
        lightning, "predict", "--config", "configs/dia_tiny.yaml", "--config", "mine.yaml"
    )
    assert both["model"]["init_args"]["lam"] == 12
    zero_shot = settings(lightning, "predict", "--config", "configs/zero_shot_tiny.yaml")
    sampler = zero_shot["model"]["init_args"]["sampler"]
    assert sampler["class_path"] == "dia_lightning.BaseModel"
    assert "particles" not in sampler["init_args"]


def test_interpolation_follows_the_command_line(lightning: Run, tmp_path: Path) -> None:
    text = (SHIPPED / "configs/dia_tiny.yaml").read_text(encoding="utf-8")
    folder = 'init_args: {folder: "${trainer.default_root_dir}/texts"}'
    writer = f"{{class_path: dia_lightning.callbacks.PredictionWriter, {folder}}}"
    text += f"trainer:\n  callbacks: [{writer}]\n"
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    found = settings(
        lightning, "predict", "--config", "mine.yaml", "--trainer.default_root_dir", "elsewhere"
    )
    assert found["trainer"]["callbacks"][0]["init_args"]["folder"] == "elsewhere/texts"


def test_a_checkpoint_never_brings_settings(
    lightning: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hyper = {
        "_class_path": "dia_lightning.GuidedSamplerModule",
        "lam": 9.0,
        "sampler": {"class_path": "Annealed", "init_args": {"rounds": 3}},
    }
    torch.save({"hyper_parameters": hyper, "state_dict": {}}, tmp_path / "old.ckpt")
    seen = []
    monkeypatch.setattr(
        parser.DiaCLI, "_run_subcommand", lambda self, command: seen.append(self.model)
    )
    code, _, err = lightning("predict", "--ckpt_path", "old.ckpt", "--model.lam=2", *SMALL)
    assert code == 0, err
    assert (seen[0].lam, seen[0].sampler.rounds) == (2, 1)


# Mistakes: one line, exit code 2


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["COMMAND", "none given", "fit, validate, test, predict"]),
        (["prdict"], ["COMMAND", "'prdict'", "fit, validate, test, predict"]),
        (["--model.lam", "3"], ["COMMAND", "fit, validate, test, predict"]),
        (["predict", "--config", "nope.yaml"], ["--config", "nope.yaml", "no such file"]),
        (["predict", "--config"], ["--config", "no file given"]),
        (["predict", "--model.init_args.lmabda", "3"],
         ["--model.init_args.lmabda: unknown option", " lam,"]),
        (["predict", "--model.lmabda=3"], ["--model.lmabda: unknown option"]),
        (["predict", "--data.n_text=3"],
         ["--data.n_text: unknown option", "did you mean n_texts?"]),
        (["predict", "--trainer.max_stepz=3"],
         ["--trainer.max_stepz: unknown option", "--trainer.max_steps?"]),
        (["predict", "--modle.lam=3"], ["--modle.lam: unknown option"]),
        (["predict", "--trainer.max=3"],
         ["--trainer.max: unknown option; did you mean --trainer.max_"]),
        (["predict", "--=[a, b]"], ["--: unknown option"]),
        (["predict", "--=3"], ["--: unknown option"]),
        (["predict", "--trainer.callbacks.foldr=x"],
         ["--trainer.callbacks.foldr: unknown option", "folder"]),
        (["predict", "prompts.txt"], ["prompts.txt", "an option was expected"]),
        (["predict", "--model.init_args.lam", "abc"],
         ["--model.init_args.lam: abc given", "float"]),
        (["predict", "--model.lam=abc"], ["--model.lam: abc given", "float"]),
        (["predict", "--model.lam"], ["--model.lam: no value given"]),
        (["predict", "--data.n_texts=1.5"], ["--data.n_texts: 1.5 given", "int"]),
        (["predict", "--trainer.precision=17"], ["--trainer.precision: 17 given", "'bf16-mixed'"]),
        (["predict", "--model", "dia_lightning.data.Nope"],
         ["--model: dia_lightning.data.Nope given", "PromptData"]),
        (
            ["predict", "--allow=nowhere", "--model.reward=nowhere.Reward"],
            ["--model.reward: nowhere.Reward", "No module named 'nowhere'"],
        ),
        (["predict", "--model", "dia_lightning.data.HubText"],
         ["--model: dia_lightning.data.HubText", "LightningModule"]),
        (["fit"], ["--data", "--model", "required", "--config"]),
        (["fit", "--model=dia_lightning.training.CriticModule",
          "--data=dia_lightning.data.ModelSamples"], ["reward: required"]),
        (["fit", "--config", "configs/dia_tiny.yaml"],
         ["--model: GuidedSamplerModule", "training_step", "configs/ddpm_tiny"]),
        (["validate", "--config", "configs/dia_tiny.yaml"],
         ["--model: GuidedSamplerModule", "validation_step"]),
        (["predict", "--config", "configs/ddpm_tiny.yaml"],
         ["--model: DenoiserModule", "predict_step", "configs/dia_tiny"]),
        (
            ["fit", "--config", "configs/ddpm_tiny.yaml", "--data=dia_lightning.data.PromptData"],
            ["--data: PromptData", "train_dataloader"],
        ),
        (["predict", "--ckpt_path", "nope.ckpt"], ["--ckpt_path: no such file: nope.ckpt"]),
        (["predict", "--trainer.accelerator=abacus"], ["--trainer", "abacus", "cpu"]),
    ],
)  # fmt: skip
def test_wrong_options(lightning: Run, arguments: list[str], parts: list[str]) -> None:
    assert_one_line(lightning(*arguments), *parts)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"model: [1,\n  b: }\n", ["line 2", "no YAML"]),
        (b"- a\n- b\n", ["allowed: a file of options"]),
        (b"", ["allowed: a file of options"]),
        (b"\xff\xfe\x00", ["UTF-8"]),
        (b"modle:\n  class_path: x\n", ["--modle.class_path", "unknown option"]),
        (b"seed_everything: yes please\n", ["--seed_everything", "yes please given", "int"]),
        (
            b"model:\n  class_path: dia_lightning.GuidedSamplerModule\n  init_args: {lam: abc}\n",
            ["init_args.lam", "abc"],
        ),
        (
            b"trainer:\n  default_root_dir: ${nowhere}\n",
            ["--trainer.default_root_dir (in bad.yaml)", "'nowhere'"],
        ),
    ],
)
def test_wrong_config_files(
    lightning: Run, tmp_path: Path, content: bytes, parts: list[str]
) -> None:
    (tmp_path / "bad.yaml").write_bytes(content)
    assert_one_line(
        lightning("predict", "--config", "bad.yaml"),
        *parts,
        *([] if b"nowhere" in content else ["bad.yaml"]),
    )


def test_a_folder_is_no_config(lightning: Run) -> None:
    assert_one_line(lightning("predict", "--config", "configs"), "--config", "is a folder")


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("missing.txt", None, ["no such file", "missing.txt"]),
        ("empty.txt", b" \n\n", ["holds no prompt"]),
        ("table.csv", b"a,b\n", ["holds no prompt", "table.csv"]),
        ("table.xml", b"<a/>", [".txt", ".jsonl", "table.xml"]),
        ("latin.txt", "Café".encode("latin-1"), ["UTF-8", "latin.txt"]),
        ("field.jsonl", b'{"prompt": "The"}\n{"text": "a"}\n', ["line 2", "'prompt'"]),
        ("number.jsonl", b'{"prompt": 3}\n', ["no string", "3"]),
        ("broken.jsonl", b'{"prompt": \n', ["line 1", "JSON"]),
        (
            "long.txt",
            b"the food is good " * 30,
            ["tokens", "at most 39", "--data.init_args.max_length is 40"],
        ),
    ],
)
def test_wrong_prompt_files(
    lightning: Run, tmp_path: Path, name: str, content: bytes | None, parts: list[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert_one_line(
        lightning("predict", *SMALL, "--data.prompts", name), "--data.prompts: ", *parts
    )


def test_wrong_values(lightning: Run) -> None:
    assert_one_line(
        lightning("predict", *SMALL, "--model.init_args.lam=-1"),
        "--model.init_args.lam",
        "-1",
        "0 or more",
    )
    assert_one_line(lightning("predict", *SMALL, "--model.lam=nan"), "--model.lam: nan given")
    assert_one_line(lightning("predict", *SMALL, "--data.n_texts=0"), "--data.n_texts: 0 given")
    assert_one_line(
        lightning("predict", *SMALL, "--trainer.limit_predict_batches=-3"), "--trainer", "-3"
    )
    assert_one_line(lightning("predict", *SMALL, "--trainer.devices=0"), "--trainer", "devices")


def test_wrong_checkpoints(lightning: Run, lm_folder: Path, tmp_path: Path) -> None:
    option = "--model.denoiser"
    moved = [*SMALL, "--model.sampler.moves=[DenoiseAccept]"]
    assert_one_line(
        lightning("predict", *moved, f"{option}=nope/denoiser"),
        option,
        "no such file or folder: nope/denoiser",
    )
    assert_one_line(
        lightning("predict", *moved, f"{option}={tmp_path}"), option, "no checkpoint of a denoiser"
    )
    assert_one_line(
        lightning("predict", *moved, f"{option}=checkpoints/tiny/critic"), option, "holds a critic"
    )
    foreign = [
        "--model.base_lm",
        str(lm_folder),
        "--data.max_length=20",
    ]
    assert_one_line(
        lightning("predict", *moved, *foreign),
        "--model.init_args.denoiser (in ",
        "another base model",
        "checkpoints/tiny/lm",
    )
    (tmp_path / "cut.ckpt").write_bytes(b"PK\x03\x04 the beginning only")
    assert_one_line(
        lightning("predict", *SMALL, "--ckpt_path=cut.ckpt"), "--ckpt_path", "cut.ckpt", "damaged"
    )


def test_folders_that_cannot_be_written(lightning: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert_one_line(
        lightning("predict", *SMALL, "--trainer.callbacks.folder=file/out"),
        "--trainer.callbacks.folder",
        "file/out",
    )
    assert_one_line(
        lightning("predict", *SMALL, "--trainer.default_root_dir=file/x"),
        "--trainer.default_root_dir",
        "file/x",
    )
    cache = [
        "fit",
        "--config",
        "configs/ddpm_tiny.yaml",
        "--data.n_texts=8",
        "--data.n_val=8",
        "--data.shard_size=16",
    ]
    assert_one_line(
        lightning(*cache, "--data.cache=file/samples"), "--data.cache: ", "file/samples"
    )


def test_debug_shows_the_traceback(lightning: Run) -> None:
    code, _, err = lightning("predict", "--debug", "--model.lam=abc")
    assert code == 2
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith("error: --model.lam")


def test_a_bug_is_not_the_users_mistake(lightning: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr(parser, "run", broken)
    code, _, err = lightning("predict")
    assert code == 1
    assert (
        err == "internal error: ZeroDivisionError: first line (run again with --debug for the"
        " traceback)\n"
    )
    assert "in broken" in lightning("predict", "--debug")[2]


# The real program


def test_one_program_with_three_names(tmp_path: Path) -> None:
    entries = {
        e.name: e.value
        for e in importlib.metadata.entry_points(group="console_scripts")
        if "dia_lightning" in e.value
    }
    assert entries == {"lightning": "dia_lightning.cli:main", "dia": "dia_lightning.cli:main"}
    commands = [[script("lightning")], [script("dia")], [sys.executable, "-m", "dia_lightning"]]
    for arguments, code in (
        (["--version"], 0),
        (["predict", "--help"], 0),
        (["predict", "--config", "nope.yaml"], 2),
    ):
        done = [program(tmp_path, *command, *arguments) for command in commands]
        assert [d.returncode for d in done] == [code] * 3
        assert len({d.stdout + d.stderr for d in done}) == 1


def test_a_hub_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worse than a closed port (tests/test_lm.py): every try waits for its time limit."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setitem(NO_HUB, "HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        done = program(
            tmp_path,
            sys.executable,
            "-m",
            "dia_lightning",
            "predict",
            *SMALL,
            "--model.base_lm=gpt2",
        )
        assert time.monotonic() - start < 90
    assert_one_line(
        (done.returncode, done.stdout, done.stderr),
        "--model.base_lm: ",
        "'gpt2'",
        "checkpoints/tiny/lm",
    )
    assert done.stdout == ""


def test_predict_says_only_what_matters(tmp_path: Path) -> None:
    # Particles enough that no warning of equal texts is due.
    many = ["--model.sampler.particles=8"]
    done = program(tmp_path, script("lightning"), "predict", *SMALL, *many)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "reward, mean" in done.stdout
    assert not re.search("Tip|TPU|https?://|Warning", done.stdout)
    assert len((tmp_path / "out/predictions.jsonl").read_text(encoding="utf-8").splitlines()) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path, lightning: Run) -> None:
    few = ["--data.max_length=16", "--model.sampler.particles=2"]  # cheaper batches, still twenty
    arguments = [
        "predict",
        "--data.n_texts=40",
        "--data.batch_size=2",
        "--trainer.callbacks.folder=out",
        *few,
    ]
    command = [sys.executable, "-m", "dia_lightning", *arguments]
    running = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 100
    while (
        not (finished := sorted(tmp_path.glob("out/parts/*/*.json")))
        and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    try:
        _, err = running.communicate(timeout=5)
    except (
        subprocess.TimeoutExpired
    ):  # Python drops an interrupt that arrives inside a destructor; people press again
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert err == "interrupted; finished batches are kept, the same command goes on from there\n"
    assert finished
    assert (
        json.loads((tmp_path / "out/metrics.json").read_text(encoding="utf-8"))["complete"] is False
    )
    readable = (tmp_path / "out/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    before = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.glob("out/parts/*/*.json"))}
    assert len(before) < 20
    assert [json.loads(line)["id"] for line in readable] == list(range(2 * len(before)))
    code, out, err = lightning(*arguments)
    assert code == 0, err
    assert f"{len(before)} of 20 batches were there" in out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    lines = (tmp_path / "out/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["id"] for line in lines] == list(range(40))


def test_a_dropped_interrupt_ends_the_run_after_its_batch(tmp_path: Path) -> None:
    """As where Ctrl-C arrives inside a destructor: here in a reward that lets nothing through."""
    (tmp_path / "deaf.py").write_text(
        "import os, signal, torch\nfrom dia_lightning.types import Reward\n\n\nclass"
        " Deaf(Reward):\n    name = 'deaf'\n\n    def __call__(self, texts):\n        try:\n       "
        "     os.kill(os.getpid(), signal.SIGINT)\n        except BaseException:\n           "
        " pass\n        return torch.zeros(len(texts))\n",
        encoding="utf-8",
    )
    arguments = [
        "--allow=deaf",
        "--model.reward=deaf.Deaf",
        "--data.n_texts=6",
        "--data.batch_size=2",
    ]
    arguments += ["--trainer.callbacks.folder=out"]
    command = [
        sys.executable,
        "-m",
        "dia_lightning",
        "predict",
        "--config",
        "configs/zero_shot_tiny.yaml",
        *arguments,
    ]
    known = {**environment(tmp_path), "PYTHONPATH": os.pathsep.join([str(tmp_path), str(SHIPPED)])}
    done = subprocess.run(
        command, cwd=tmp_path, env=known, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 130, done.stderr
    assert (
        done.stderr
        == "interrupted; finished batches are kept, the same command goes on from there\n"
    )
    assert len(list(tmp_path.glob("out/parts/*/*.json"))) == 1


def test_shipped_files_are_found_from_anywhere(lightning: Run) -> None:
    assert require_path("configs/dia_tiny.yaml", "--config") == SHIPPED / "configs/dia_tiny.yaml"
    assert lightning("predict", "--config", "configs/dia_tiny.yaml", "--print_config")[0] == 0


def test_one_batch_is_no_float() -> None:
    """Also where another package made `Optional[Union[float, int]]` first: `typing` then hands
    out that one.
    """
    options = LightningArgumentParser()
    for name in ("first", "second"):
        options.add_argument(
            f"--{name}", type=float | int | None if name == "second" else float | None
        )
    parser.DiaCLI.add_arguments_to_parser(None, options)  # type: ignore[arg-type]
    given = options.parse_args(["--first=1", "--second=1"])
    assert [type(given.first), type(given.second)] == [float, int]
    assert type(options.parse_args(["--second=0.5"]).second) is float
