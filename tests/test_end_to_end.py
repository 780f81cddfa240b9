"""From a corpus to aligned text by the shipped configurations alone, at a fraction of their
size.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.gpt2 import GPUS, computed, random_gpt2
from benchmarks.scaling import DOC
from dia_lightning import cli
from dia_lightning.errors import UserError
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.settings import parser
from dia_lightning.training import DenoiserModule
from tests.oracles.in_parts import in_parts

GIB = 1 << 30


def sentences(first: int, last: int) -> list[str]:
    food, places = (
        ("good", "great", "bad", "terrible", "cheap", "lovely"),
        (
            "river",
            "pub",
            "hotel",
            "park",
        ),
    )
    return [
        f"The {food[i % 6]} restaurant {i % 7} near the {places[i % 4]} has {food[i // 6 % 6]} food"
        f" and a {food[i % 5]} bar."
        for i in range(first, last)
    ]


def run(*arguments: str) -> None:
    """One command of the user, in this process."""
    parser.run(cli.prepare_arguments(list(arguments)))


LM, SIZE = "runs/lm_tiny/lm", ["width=32", "layers=2", "heads=2"]
SAMPLES = [
    f"--data.base_lm={LM}",
    "--data.n_texts=96",
    "--data.n_val=32",
    "--data.shard_size=64",
    "--data.max_length=24",
]
NOISED = [
    f"--model.base_lm={LM}",
    "--model.network.max_length=24",
    *(f"--model.network.{x}" for x in SIZE),
    *SAMPLES,
    "--data.batch_size=16",
]
DDPM = ["--config", "configs/ddpm_tiny.yaml", *NOISED, "--trainer.val_check_interval=2"]
TEXTS = [
    f"--model.base_lm={LM}",
    f"--data.base_lm={LM}",
    "--data.n_texts=6",
    "--data.batch_size=4",
    "--data.max_length=24",
]
DIA = ["--config", "configs/dia_tiny.yaml", *TEXTS]
GUIDED = ["--config", "configs/guided_tiny.yaml", *TEXTS]
STEPS = ["--model.sampler.steps=4"]
START = "--model.sampler.start"
# Chains from where guided diffusion ends.
DIFFUSED = ["--model.sampler=Chains", f"{START}=Diffusion", f"{START}.steps=4"]
DIFFUSED += [
    f"{START}.guidance=CriticGuidance",
    f"{START}.guidance.scale=10",
    "--model.sampler.rounds=2",
]
SPAN = "{class_path: Spans, init_args: {length: 2}}"
MOVES = f"--model.sampler.moves=[{{class_path: DenoiseAccept, init_args: {{positions: {SPAN}}}}}]"
SOLVERS = {
    "ancestral": ["Ancestral"], "ddim": ["DDIM", f"{START}.solver.eta=0.1"],
    "dpmpp_2m": ["DPMpp2M"], "dia": ["PredictorCorrector"], "dia_literal": ["DiaLiteral"],
}  # fmt: skip
PARTS = ["--model.denoiser=runs/ddpm_tiny/denoiser", "--model.critic=runs/critic_tiny/critic"]
LAST = "runs/ddpm_tiny/version_0/checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder in which base model, denoiser (3 steps) and critic were trained, one command
    each.
    """
    folder = tmp_path_factory.mktemp("workshop")
    before = Path.cwd()
    os.chdir(folder)
    try:
        for name, rows in (("train", sentences(0, 240)), ("valid", sentences(240, 280))):
            with Path(f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([["mr", "ref"], *(["x", row] for row in rows)])
        corpus = [
            "--data.path=train.csv",
            "--data.val_path=valid.csv",
            "--data.train_vocab_size=300",
            "--data.max_length=32",
        ]
        small = [
            "--model.vocab_size=300",
            "--model.dropout=0",
            "--model.optimizer.warmup_steps=10",
            *(f"--model.{x}" for x in SIZE),
        ]
        steps = [
            "--trainer.max_steps=120",
            "--trainer.val_check_interval=60",
            "--data.batch_size=32",
        ]
        run(
            "fit",
            "--config",
            "configs/lm_tiny.yaml",
            *corpus,
            *small,
            *steps,
            "--trainer.check_val_every_n_epoch=null",
        )
        run("fit", *DDPM, "--trainer.max_steps=3")
        critic = [
            "--model.denoiser=runs/ddpm_tiny/denoiser",
            "--trainer.max_steps=3",
            "--trainer.val_check_interval=2",
        ]
        run("fit", "--config", "configs/critic_tiny.yaml", *NOISED, *critic)
        yield folder
    finally:
        os.chdir(before)


def contents(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def test_training_writes_where_the_configs_say(workshop: Path) -> None:
    assert contents(".") >= {"train.csv", "valid.csv", "runs"}
    assert not {"lightning_logs", "checkpoints", "config.yaml"} & contents(".")
    for name, exports in (
        ("lm_tiny", {"lm", "tokenizer"}),
        ("ddpm_tiny", {"denoiser"}),
        ("critic_tiny", {"critic"}),
    ):
        assert contents(f"runs/{name}") >= {"version_0", *exports}
        assert contents(f"runs/{name}/version_0") >= {"config.yaml", "checkpoints"}
        assert any("events.out.tfevents" in file for file in contents(f"runs/{name}/version_0"))
    for part in ("ddpm_tiny/denoiser", "critic_tiny/critic"):
        assert contents(f"runs/{part}") == {"config.json", "costs.json", "model.safetensors"}
    assert len(contents("runs/samples")) == 1


def test_unguided_samples_and_their_log_p_are_on_tensorboard(workshop: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator("runs/ddpm_tiny/version_0").Reload()
    (log_p,) = events.Scalars("val/log_p_per_token")
    assert -20 < log_p.value < 0
    (texts,) = events.Tensors("val/samples/text_summary")
    assert len(texts.tensor_proto.string_val[0].decode().split("\n\n")) == 8


def test_the_base_model_has_learnt_its_corpus(workshop: Path) -> None:
    lm = BaseLM.load(LM)
    assert lm.vocab_size == 300
    rows = lm.encode(sentences(300, 316), 32)
    nats_per_token = -lm.log_prob(rows).sum() / (lm.token_log_probs(rows) != 0).sum()
    assert nats_per_token < 2.5  # uniform: log 300 = 5.7


def test_the_runs_own_config_runs_again(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(parser.DiaCLI, "_run_subcommand", lambda self, command: seen.append(self))
    run("fit", "--config", "runs/ddpm_tiny/version_0/config.yaml")
    assert seen[0].trainer.max_steps == 3
    assert seen[0].model.network.size.width == 32


def predictions(folder: str) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in (Path(folder) / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_predict_and_test_with_what_was_exported(
    workshop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("predict", *DIA, *PARTS)
    assert "reward, mean" in capsys.readouterr().out
    assert contents("runs/dia_tiny") == {
        "predictions.jsonl",
        "base_predictions.jsonl",
        "metrics.json",
        "parts",
        "config.yaml",
        "tensorboard",
    }
    drawn = predictions("runs/dia_tiny")
    assert [row["id"] for row in drawn] == list(range(6))
    metrics = json.loads(Path("runs/dia_tiny/metrics.json").read_text(encoding="utf-8"))
    assert metrics["n"] == metrics["base"]["n"] == 6
    assert metrics["reward"] == pytest.approx(sum(row["reward"] for row in drawn) / 6, abs=1e-6)
    run("test", *DIA, *PARTS, "--trainer.callbacks.folder=runs/tested")
    assert [row["text"] for row in predictions("runs/tested")] == [row["text"] for row in drawn]


@pytest.mark.parametrize(
    "sampler", ["ancestral", "ddim", "dpmpp_2m", "dia", "dia_literal", "base_lm"]
)
def test_every_sampler_from_the_command_line(workshop: Path, sampler: str) -> None:
    folder = f"runs/by_{sampler}"
    begin = ["--model.sampler=Chains", "--model.sampler.rounds=2"]
    if sampler != "base_lm":
        solver, *options = SOLVERS[sampler]
        begin = [*DIFFUSED, f"{START}.solver={solver}", *options]
    run(
        "predict",
        *GUIDED,
        *PARTS,
        *begin,
        MOVES,
        "--model.compare_base=false",
        f"--trainer.callbacks.folder={folder}",
    )
    metrics = json.loads(Path(folder, "metrics.json").read_text(encoding="utf-8"))
    assert metrics["method"] == sampler
    assert 0 <= metrics["accept_denoise_accept"] <= 1
    assert metrics["nfe"]["denoiser"] >= (0 if sampler == "base_lm" else 4)


def test_tempered_chains_from_the_command_line(workshop: Path) -> None:
    three = ["--model.sampler=Chains", "--model.sampler.temperatures=3"]
    run("predict", *DIA, *PARTS, *three, "--model.sampler.rounds=2",
        "--model.sampler.moves=[Suffix]", "--trainer.callbacks.folder=runs/rungs")  # fmt: skip
    metrics = json.loads(Path("runs/rungs/metrics.json").read_text(encoding="utf-8"))
    assert metrics["n"] == len(predictions("runs/rungs")) == 6
    assert 0 <= metrics["accept_tempered"] <= 1
    with pytest.raises(Exception, match="temperatures: 3 given, allowed: 1 where λ is 0"):
        run("predict", *DIA, *PARTS, *three, "--model.lam=0")


def test_a_source_is_rewritten_and_blanks_are_filled(workshop: Path) -> None:
    text = sentences(0, 1)[0]
    words = text.split()
    Path("source.jsonl").write_text(json.dumps({"source": text}) + "\n", encoding="utf-8")
    blanks = f"{words[0]} [blank:3] {words[-1]}"
    Path("blanks.jsonl").write_text(json.dumps({"prompt": blanks}) + "\n", encoding="utf-8")
    base = ["predict", *GUIDED, *PARTS, "--model.compare_base=false"]
    source = ["--data.prompts=source.jsonl", "--data.reading.template=", "--data.n_texts=3"]
    still = ["--model.sampler=Source"]
    run(*base, *source, *still, "--trainer.callbacks.folder=runs/still")
    assert [row["text"] for row in predictions("runs/still")] == [text] * 3
    ancestral = "--model.sampler.solver=Ancestral"
    run(
        *base,
        *source,
        *STEPS,
        ancestral,
        "--model.sampler.strength=0.05",
        "--trainer.callbacks.folder=runs/near",
    )
    assert len(predictions("runs/near")) == 3
    for sampler in ("ancestral", "dia"):
        run(*base, "--data.prompts=blanks.jsonl", "--data.n_texts=3", *DIFFUSED,
         f"{START}.solver={SOLVERS[sampler][0]}",
            "--model.sampler.moves=[DenoiseAccept]",
            f"--trainer.callbacks.folder=runs/blanks_{sampler}")  # fmt: skip
        for row in predictions(f"runs/blanks_{sampler}"):
            assert row["prompt"] == blanks
            assert row["text"].startswith(words[0])
            assert row["text"].endswith(words[-1])
    run(*base, "--data.length=5", *STEPS, "--trainer.callbacks.folder=runs/five")
    assert [row["n_tokens"] for row in predictions("runs/five")] == [6] * len(
        predictions("runs/five")
    )
    five = [*base, "--data.length=5"]
    run(*five, "--model.sampler=Annealed", "--trainer.callbacks.folder=runs/annealed")
    assert {row["n_tokens"] for row in predictions("runs/annealed")} == {6}
    with pytest.raises(UserError, match="BestOfN writes from left to right"):
        run(*five, "--model.sampler=BestOfN", "--trainer.callbacks.folder=runs/none")


def test_a_checkpoint_samples_as_its_export_does(workshop: Path) -> None:
    three = Path("runs/three_steps")
    if not three.exists():  # before another test goes on training
        shutil.copytree("runs/ddpm_tiny/denoiser", three)
    unguided = ["--model.lam=0", "--model.compare_base=false"]
    run(
        "predict",
        *GUIDED,
        *STEPS,
        *unguided,
        f"--model.denoiser={three}",
        "--trainer.callbacks.folder=runs/from_folder",
    )
    run(
        "predict",
        *GUIDED,
        *STEPS,
        *unguided,
        f"--model.denoiser={LAST}",
        "--trainer.callbacks.folder=runs/from_ckpt",
    )
    texts = [
        [row["tokens"] for row in predictions(f"runs/from_{kind}")] for kind in ("folder", "ckpt")
    ]
    assert texts[0] == texts[1]


def test_a_denoiser_begins_where_another_ended(workshop: Path) -> None:
    begun = DenoiserModule(
        LM,
        **in_parts(
            DenoiserModule,
            init_from="runs/ddpm_tiny/denoiser",
            width=32,
            layers=2,
            heads=2,
            max_length=24,
        ),
    )
    for name, weight in load_file("runs/ddpm_tiny/denoiser/model.safetensors").items():
        assert torch.equal(begun.network.state_dict()[name], weight)
    with pytest.raises(UserError, match=r"init_from: .* does not fit a network of this size"):
        DenoiserModule(
            LM,
            **in_parts(
                DenoiserModule,
                init_from="runs/ddpm_tiny/denoiser",
                width=32,
                layers=1,
                heads=2,
                max_length=24,
            ),
        )


def test_zero_shot(workshop: Path) -> None:
    prompts = Path("prompts.txt")
    prompts.write_text("The good restaurant\nThe bad\n", encoding="utf-8")
    run(
        "predict",
        "--config",
        "configs/zero_shot_tiny.yaml",
        *TEXTS,
        f"--data.prompts={prompts}",
        "--data.n_texts=2",
    )
    drawn = predictions("runs/zero_shot_tiny")
    assert [row["prompt"] for row in drawn] == ["The good restaurant"] * 2 + ["The bad"] * 2
    assert not Path("runs/zero_shot_tiny/base_predictions.jsonl").exists()


def test_validate_measures_the_checkpoint(
    workshop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def loss(*arguments: str) -> float:
        capsys.readouterr()
        run("validate", *DDPM, *arguments)
        found = re.search(r"val/loss\b\D*([\d.]+)", capsys.readouterr().out)
        assert found
        return float(found[1])

    assert loss("--ckpt_path", LAST) != loss()


def test_training_goes_on_from_a_checkpoint(
    workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = Path("runs/ddpm_tiny/denoiser/model.safetensors")
    before = load_file(weights)
    trained: list[int] = []
    step = DenoiserModule.training_step

    def counted(self: DenoiserModule, batch: Any, batch_idx: int) -> torch.Tensor:
        trained.append(self.trainer.global_step)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DenoiserModule, "training_step", counted)
    run("fit", *DDPM, "--trainer.max_steps=5", "--ckpt_path", LAST)
    assert trained == [3, 4]
    after = load_file(weights)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    newest = max(
        Path("runs/ddpm_tiny").glob("version_*/checkpoints/last.ckpt"),
        key=lambda path: path.stat().st_mtime_ns,
    )
    assert str(newest) != LAST
    assert torch.load(newest, weights_only=True)["global_step"] == 5


# The GPT-2 configurations, on a model of GPT-2 small's shape


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with `gpt2`: random weights of GPT-2 small's shape, and a small tokenizer, so
    that most ids name nothing.
    """
    folder = tmp_path_factory.mktemp("gpt2")
    random_gpt2(folder, sentences(0, 240))
    model = BaseLM.load(str(folder / "gpt2")).model
    assert (model.config.vocab_size, model.config.n_embd, model.config.n_layer) == (50257, 768, 12)
    yield folder
    shutil.rmtree(folder)


def peak_gib(folder: Path, *arguments: str) -> float:
    """Runs the program by itself; its largest resident memory."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    running = subprocess.Popen(
        [sys.executable, "-m", "dia_lightning", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(running.pid, 0)
    running.returncode = os.waitstatus_to_exitcode(status)
    assert running.returncode == 0
    return usage.ru_maxrss * 1024 / GIB


@pytest.mark.slow
def test_the_gpt2_configs_run_within_the_memory_stated(gpt2: Path) -> None:
    few = [
        "--data.n_texts=16",
        "--data.n_val=8",
        "--data.shard_size=8",
        "--data.batch_size=4",
        "--trainer.max_steps=2",
    ]
    few += ["--trainer.val_check_interval=2"]
    peaks = {"ddpm": peak_gib(gpt2, "fit", "--config", "configs/ddpm_gpt2.yaml", *few)}
    # A random model writes no sentiment, and few ids of the tokenizer: whether there is any text at
    # all.
    reward = ["--model.reward=dia_lightning.rewards.Regex", r"--model.reward.pattern=\S"]
    peaks["critic"] = peak_gib(gpt2, "fit", "--config", "configs/critic_gpt2.yaml", *few, *reward)
    texts = ["--data.n_texts=4", "--data.batch_size=4", "--model.sampler.rounds=2"]
    peaks["dia"] = peak_gib(gpt2, "predict", "--config", "configs/dia_gpt2.yaml", *texts, *reward)
    assert len(predictions(str(gpt2 / "runs/dia_gpt2"))) == 4
    limits = {
        "ddpm": 8,
        "critic": 5,
        "dia": 3,
    }  # GiB; 6.7, 3.9 and 2.3 were seen at these batch sizes
    assert all(peaks[name] < limits[name] for name in limits), peaks
    print(peaks)


@pytest.mark.slow
def test_the_gpt2_configs_say_which_batches_fit(gpt2: Path) -> None:
    """As computed, in the document and in the configurations' comments."""
    found = computed(gpt2)
    assert found in DOC.read_text(encoding="utf-8")
    for stem in ("ddpm_gpt2", "critic_gpt2"):
        cells = next(line for line in found.splitlines() if line.startswith(f"| `{stem}` |")).split(
            "|"
        )
        said = " and ".join(
            f"{rows.strip()} rows in {gpu}" for gpu, rows in zip(GPUS, cells[-3:-1], strict=True)
        )
        assert f"# computed, not measured: {said} " in Path(f"configs/{stem}.yaml").read_text(
            encoding="utf-8"
        )
