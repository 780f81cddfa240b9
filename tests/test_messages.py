"""One mistake in Python and on the command line: the argument there, the option here."""

import re
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pyarrow as pa
import pytest
from pyarrow import parquet

from dia_lightning.callbacks import PredictionWriter
from dia_lightning.data import PromptData, TextFiles
from dia_lightning.data.records import read_records
from dia_lightning.data.samples import ModelSamples
from dia_lightning.diffusion.labels import RewardLabels
from dia_lightning.errors import UserError, renamed
from dia_lightning.lm import BaseLM
from dia_lightning.rewards import Hinge, Keyword, Perplexity, VaderSentiment, WeightedSum
from dia_lightning.samplers import (
    Annealed,
    BaseModel,
    ClassifierFree,
    CriticGuidance,
    Diffusion,
    GuidedSamplerModule,
    Sampler,
)
from dia_lightning.training import AdamW, CriticModule, DenoiserModule, Network
from tests.conftest import Run

FIT = ["fit", "--config", "configs/ddpm_tiny.yaml"]
LM = "checkpoints/tiny/lm"
NESTED = (
    "{class_path: WeightedSum, init_args: {rewards: [{class_path: VaderSentiment},"
    " {class_path: Hinge, init_args: {threshold: 0, reward: {class_path: Keyword,"
    " init_args: {words: [good, '']}}}}]}}"
)


def module(sampler: Sampler, **options: str | float | None) -> GuidedSamplerModule:
    given = {"denoiser": None, "critic": None, **options}
    return GuidedSamplerModule(VaderSentiment(), sampler, **given)  # type: ignore[arg-type]


def into_a_file() -> None:
    Path("file").touch()
    trainer = L.Trainer(logger=False, callbacks=[PredictionWriter("file/out")])
    trainer.predict(module(BaseModel()), datamodule=PromptData(n_texts=1))


def nested() -> WeightedSum:
    return WeightedSum([VaderSentiment(), Hinge(Keyword(["good", ""]), 0.0)])


PARTS: dict[str, tuple[Callable[[], object], str, list[str], str]] = {
    "base_lm": (
        lambda: BaseLM.load("./nope"), "base_lm: no such folder: ./nope",
        ["predict", "--model.base_lm=./nope"], "--model.base_lm",
    ),
    "prompts": (
        lambda: PromptData(LM, prompts="nope.txt").setup("predict"),
        "prompts: no such file or folder: nope.txt",
        ["predict", "--data.prompts", "nope.txt"], "--data.prompts",
    ),
    "folder": (
        into_a_file, "folder: cannot write to file/out",
        ["predict", "--trainer.callbacks.folder=file/out"], "--trainer.callbacks.folder",
    ),
    "lr": (
        lambda: DenoiserModule(LM, optimizer=AdamW(lr=-1.0)), "lr: -1.0 given, allowed: above 0",
        [*FIT, "--model.optimizer.lr=-1"], "--model.optimizer.lr",
    ),
    "sampler": (
        lambda: Annealed(particles=0), "particles: 0 given, allowed: 1 or more",
        ["predict", "--model.sampler.particles=0"], "--model.sampler.particles",
    ),
    "nested reward": (
        nested, "words: ['good', ''] given, allowed: one word",
        ["predict", f"--model.reward={NESTED}"], "--model.reward: rewards.reward.words",
    ),
    "n_texts": (
        lambda: PromptData(n_texts=0), "n_texts: 0 given, allowed: 1 or more",
        ["predict", "--data.n_texts=0"], "--data.n_texts",
    ),
    "denoiser missing": (
        lambda: module(Diffusion(), denoiser="nope"), "denoiser: no such file or folder: nope",
        ["predict", "--model.sampler=Diffusion", "--model.denoiser=nope"], "--model.denoiser",
    ),
    "denoiser not given": (
        lambda: module(Diffusion(), base_lm="./other"), "denoiser: none given, needed for",
        ["predict", "--model.sampler=Diffusion", "--model.base_lm=./other",
         "--model.denoiser=null"], "--model.denoiser",
    ),
    "critic of another reward": (
        lambda: GuidedSamplerModule(
            Keyword(["a"]), Diffusion(guidance=CriticGuidance()), denoiser=None, critic=None
        ),
        "critic: checkpoints/tiny/critic given, allowed: one for the reward 'keyword'",
        ["predict", "--model.sampler=Diffusion", "--model.sampler.guidance=CriticGuidance",
         "--model.reward=Keyword", "--model.reward.words=[a]",
         "--model.critic=checkpoints/tiny/critic"], "--model.critic",
    ),
    "policy": (
        lambda: module(BaseModel(policy="./nope", label="ppo")), "policy: no such folder: ./nope",
        ["predict", "--model.sampler=BaseModel", "--model.sampler.label=ppo",
         "--model.sampler.policy=./nope"], "--model.sampler.policy",
    ),
    "model of a reward": (
        lambda: Perplexity("./nope"), "model: no such folder: ./nope",
        ["predict", "--model.reward=Perplexity", "--model.reward.model=./nope"],
        "--model.reward.model",
    ),
    "max_length of the module": (
        lambda: DenoiserModule(LM, Network(max_length=9999)),
        "max_length: 9999 given, allowed: up to",
        [*FIT, "--model.network.max_length=9999", "--data.max_length=9999"],
        "--model.network.max_length",
    ),
    "max_length of the data": (
        lambda: ModelSamples(LM, max_length=9999).setup("fit"),
        "max_length: 9999 given, allowed: up to",
        [*FIT, "--data.max_length=9999"], "--data.max_length",
    ),
    "seed of the data": (
        lambda: ModelSamples(LM, seed=-1), "seed: -1 given, allowed: 0 to 4294967295",
        [*FIT, "--data.seed=-1"], "--data.seed",
    ),
    "seed of the module": (
        lambda: DenoiserModule(LM, seed=-1), "seed: -1 given, allowed: 0 to 4294967295",
        [*FIT, "--model.seed=-1"], "--model.seed",
    ),
    "a class in a union": (
        lambda: DenoiserModule(LM, labels=RewardLabels(Keyword([""]), [0.5])),
        "words: [''] given, allowed: one word",
        [*FIT, "--model.labels=RewardLabels", "--model.labels.edges=[0.5]",
         "--model.labels.reward=Keyword", "--model.labels.reward.words=['']"],
        "--model.labels.reward.words",
    ),
    "objective": (
        lambda: CriticModule(VaderSentiment(), LM, objective="soft", lam=0.0),
        "lam: 0 given, allowed: any other number",
        ["fit", "--config", "configs/critic_tiny.yaml", "--model.objective=soft",
         "--model.lam=0"], "--model.lam",
    ),
    "tokenizer": (
        lambda: TextFiles("a.txt", tokenizer="./nope").setup("fit"),
        "tokenizer: no such folder: ./nope",
        ["fit", "--config", "configs/lm_tiny.yaml", "--data.path=a.txt",
         "--data.train_vocab_size=0",
         "--data.tokenizer=./nope"], "--data.tokenizer",
    ),
    "tokenizer of the writer": (
        lambda: PredictionWriter(tokenizer="moses"),  # type: ignore[arg-type]
        "tokenizer: 'moses' given, allowed: ",
        ["predict", "--trainer.callbacks.tokenizer=moses"], "--trainer.callbacks.tokenizer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_python_names_the_argument_and_a_command_the_option(
    part: str, lightning: Run, lm_folder: Path
) -> None:
    make, said, command, option = PARTS[part]
    Path("other").symlink_to(lm_folder)
    Path("a.txt").write_text("a\nb\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"^{re.escape(said)}") as caught:
        make()
    assert isinstance(caught.value, ValueError)
    code, _, err = lightning(*command)
    assert code == 2
    assert err.count("\n") == 1
    name = said.partition(": ")[0]
    if part == "tokenizer of the writer":  # refused by its type
        assert err.startswith(f"error: {option}: moses given, allowed: ")
        return
    rest = said.removeprefix(f"{name}: ").replace("file/out", "")
    assert err.startswith(f"error: {option}: {rest}")


def test_arguments_in_the_text_become_options_too(lightning: Run) -> None:
    """Typed ones as they were typed, others by their full name."""
    few = [f"--data.{name}=2" for name in ("n_texts", "n_val", "shard_size")]
    code, _, err = lightning(*FIT, *few, "--model.network.max_length=8", "--data.max_length=12")
    assert code == 2
    assert err == (
        "error: --model.network.max_length: 8 given, allowed: 12 or more, the tokens of a row"
        " (--data.max_length)\n"
    )
    code, _, err = lightning(
        "predict", "--data.prompts", '["a b c d e f g h i j"]', "--data.max_length=3"
    )
    assert code == 2
    assert "(--data.max_length is 3)" in err
    long = '["' + "a " * 60 + '"]'
    code, _, err = lightning("predict", "--data.prompts", long)
    assert code == 2
    assert err.startswith("error: --data.prompts: 'a a ")
    assert "(--data.init_args.max_length is " in err


def test_a_setting_of_a_file_is_named_with_the_file(lightning: Run) -> None:
    Path("mine.yaml").write_text(
        "model: {init_args: {sampler: {class_path: Diffusion, init_args: {guidance: {class_path:"
        " CriticGuidance, init_args: {cap: -1.0}}}}}}\n",
        encoding="utf-8",
    )
    code, _, err = lightning(
        "predict", "--config", "configs/dia_tiny.yaml", "--config", "mine.yaml"
    )
    option = "--model.init_args.sampler.init_args.guidance.init_args.cap"
    assert code == 2
    assert err.startswith(f"error: {option} (in ")
    assert "mine.yaml): -1.0 given, allowed: above 0" in err


def test_a_default_is_in_no_file(lightning: Run) -> None:
    base = ["predict", "--model.sampler=BaseModel", "--model.sampler.policy=./nope"]
    code, _, err = lightning(*base)
    assert code == 2
    assert err.startswith("error: --model.init_args.sampler.init_args.label: 'zero_shot' given")


def test_the_innermost_name_wins_and_other_names_stay() -> None:
    with pytest.raises(UserError, match=r"^policy: no such folder"), renamed(base_lm="policy"):
        BaseLM.load("./nope")
    with pytest.raises(UserError, match=r"^label: 9 given"), renamed(base_lm="policy"):
        raise UserError("label: 9 given")
    with pytest.raises(ValueError, match=r"^base_lm: other$"), renamed(base_lm="policy"):
        raise ValueError("base_lm: other")
    assert UserError("data.base_lm: x given").argument == "data.base_lm"
    for text in ("no name", "Two words: here", "a b: c", "--model.lr: -1 given", "base_lm:x"):
        assert UserError(text).argument == ""


def test_a_mistake_of_the_user_is_not_taken_for_a_damaged_file(tmp_path: Path) -> None:
    """`UserError` is a ValueError, which readers of files catch."""
    twice = pa.Table.from_arrays([pa.array(["a"])] * 2, names=["prompt", "prompt"])
    parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(UserError, match=r"^prompts: .*twice.parquet: the header names the column"):
        read_records(tmp_path / "twice.parquet")


@pytest.mark.parametrize("command", [["kit", "export", "--out=x"], ["study", "x.yaml", "--out=x"]])
def test_small_commands_say_what_cannot_be_allowed(lightning: Run, command: list[str]) -> None:
    """argparse replaces the text of a ValueError that a `type` raises."""
    code, _, err = lightning(*command, "--allow", "my-rewards")
    assert code == 2
    assert err.startswith("error: --allow: my-rewards given, allowed: the name of your module")


def test_the_label_of_a_part_is_checked_where_the_networks_are_known() -> None:
    with pytest.raises(UserError, match=r"^label: 9 given, allowed: 1 to 4"):
        GuidedSamplerModule(
            VaderSentiment(), Diffusion(guidance=ClassifierFree(9)),
            denoiser="checkpoints/tiny_labelled/denoiser", critic=None,
        )  # fmt: skip
