"""Parts by name: short class names, options that belong to none, and what version 0.1.0 called
them.
"""

import json
from pathlib import Path

import pytest

from dia_lightning.samplers import Annealed, GuidedSamplerModule
from tests.conftest import Run
from tests.test_cli import assert_one_line, settings

SMALL = ["--data.n_texts=2", "--data.max_length=12", "--trainer.callbacks.folder=out"]
SEE = "see docs/migration.md"


@pytest.mark.parametrize(
    "option",
    [
        "refine=suffix",
        "rungs=3",
        "steps=8",
        "eta=0.1",
        "guidance_scale=10",
        "particles=2",
        "moves.size=3",
    ],
)
def test_an_old_option_names_the_new_one(lightning: Run, option: str) -> None:
    name = option.partition("=")[0]
    message = f"--model.{name}: now part of --model.sampler; {SEE}"
    assert_one_line(lightning("predict", f"--model.{option}"), message)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["moves=[{class_path: DenoiseAccept, init_args: {expert: 0.3}}]"], "moves: expert"),
        (["moves=[DenoiseAccept]", "moves.expert=0.3"], "moves.expert"),
        (["=Chains", "moves=[Suffix, DenoiseAccept]", "moves.expert=0.3"], "moves.expert"),
    ],
)
def test_what_is_gone_names_what_does_its_work(
    lightning: Run, options: list[str], name: str
) -> None:
    given = [f"--model.sampler{'' if o.startswith('=') else '.'}{o}" for o in options]
    message = f"--model.sampler.{name}: gone, drafts by p_θ are now the move Window; {SEE}"
    assert_one_line(lightning("predict", *given), message)
    text = "model: {init_args: {sampler: {class_path: Chains, init_args: {moves: "
    text += "[{class_path: DenoiseAccept, init_args: {expert: 0.3}}]}}}}\n"
    Path("old.yaml").write_text(text, encoding="utf-8")
    files = ["--config", "configs/dia_tiny.yaml", "--config", "old.yaml"]
    assert_one_line(lightning("predict", *files), "the move Window", "old.yaml", SEE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("annealed", "Annealed"),
        ("base_lm", "Chains"),
        ("source", "Chains with --model.sampler.start Source"),
        ("ddim", "Diffusion with --model.sampler.solver DDIM"),
        ("dia", "Diffusion"),
    ],
)
def test_an_old_sampler_names_the_new_one(lightning: Run, old: str, new: str) -> None:
    message = f"--model.sampler: {old} is {new} now; {SEE}"
    assert_one_line(lightning("predict", f"--model.sampler={old}"), message)
    text = f"model: {{init_args: {{sampler: {old}}}}}\n"
    Path("old.yaml").write_text(text, encoding="utf-8")
    files = ["--config", "configs/dia_tiny.yaml", "--config", "old.yaml"]
    assert_one_line(lightning("predict", *files), f"{old} is {new} now", "old.yaml", SEE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("sampling.GuidedSamplerModule", "GuidedSamplerModule"),
        ("baselines.PPOModule", "training.PPOModule"),
        ("baselines.SMCModule", "GuidedSamplerModule with the sampler ParticleSteering"),
        ("baselines.ZeroShotModule", "GuidedSamplerModule with the sampler BaseModel"),
    ],
)
def test_an_old_class_names_the_new_one(lightning: Run, old: str, new: str) -> None:
    message = f"dia_lightning.{old} is dia_lightning.{new} now; {SEE}"
    assert_one_line(lightning("predict", f"--model=dia_lightning.{old}"), f"--model: {message}")
    text = f"model: {{class_path: dia_lightning.{old}}}\ndata: dia_lightning.data.PromptData\n"
    Path("old.yaml").write_text(text, encoding="utf-8")
    assert_one_line(lightning("predict", "--config", "old.yaml"), message, "old.yaml")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["eta=3"], "eta: unknown option; allowed for dia_lightning.Annealed are "),
        (["steps=3"], "steps: unknown option"),
        (["guidance=Unguided"], "guidance: unknown option"),
        (["=Diffusion", "particles=3"], "particles: unknown option"),
        (["=BestOfN", "weight=true"], "weight: unknown option; did you mean weighted?"),
        (["=Diffusion", "solver=Ancestral", "solver.eta=0.5"], "solver.eta: unknown option"),
        (["moves=[{class_path: Suffix, init_args: {rounds: 3}}]"], "moves: rounds: unknown option"),
    ],
)
def test_an_option_of_another_part_is_refused(
    lightning: Run, options: list[str], message: str
) -> None:
    given = [f"--model.sampler{'' if o.startswith('=') else '.'}{o}" for o in options]
    assert_one_line(lightning("predict", *given), f"--model.sampler.{message}")


@pytest.mark.parametrize(
    ("option", "value"), [("", "Anealed"), (".moves", "[Sufix]"), (".solver", "DDIN")]
)
def test_a_part_that_is_none(lightning: Run, option: str, value: str) -> None:
    sampler = ["--model.sampler=Diffusion"] if option == ".solver" else []
    result = lightning("predict", *sampler, f"--model.sampler{option}={value}")
    name = value.strip("[]")
    assert_one_line(result, f"--model.sampler{option}: {name} given", "did you mean ")


def test_short_names_on_the_command_line_and_in_a_file(lightning: Run) -> None:
    given = ["sampler=Chains", "sampler.start=Diffusion", "sampler.start.solver=DDIM"]
    given += ["sampler.start.solver.eta=0.5", "sampler.moves=[Suffix]", "sampler.temperatures=2"]
    typed = settings(lightning, "predict", *[f"--model.{option}" for option in given])
    Path("mine.yaml").write_text(
        "model: {init_args: {sampler: {class_path: Chains, init_args: {moves: [Suffix],"
        " temperatures: 2, start: {class_path: Diffusion, init_args: {solver: {class_path: DDIM,"
        " init_args: {eta: 0.5}}}}}}}}\n",
        encoding="utf-8",
    )
    files = ["--config", "configs/dia_tiny.yaml", "--config", "mine.yaml"]
    written = settings(lightning, "predict", *files)
    assert typed["model"] == written["model"]
    sampler = typed["model"]["init_args"]["sampler"]
    assert sampler["class_path"] == "dia_lightning.Chains"
    plain = {"tries": 1, "form": "metropolis", "cut": "uniform"}
    suffix = {"class_path": "dia_lightning.Suffix", "init_args": plain}
    assert sampler["init_args"]["moves"] == [suffix]
    solver = sampler["init_args"]["start"]["init_args"]["solver"]
    assert solver == {"class_path": "dia_lightning.DDIM", "init_args": {"eta": 0.5}}


def test_moves_are_a_list_of_names(lightning: Run) -> None:
    for moves, names in (("[Suffix]", {"accept_suffix"}), ("[]", set())):
        few = [*SMALL, "--model.compare_base=false", f"--trainer.callbacks.folder={len(names)}"]
        code, _, err = lightning("predict", *few, "--model.sampler.moves", moves)
        assert (code, err) == (0, "")
        metrics = json.loads(Path(str(len(names)), "metrics.json").read_text(encoding="utf-8"))
        assert {
            name for name in metrics if name.startswith("accept_") and name != "accept_rate"
        } == names


def test_default_moves_of_a_base_model_without_a_denoiser(
    lm_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from dia_lightning.rewards import Regex
    from dia_lightning.samplers import Chains, DenoiseAccept, Suffix

    module = GuidedSamplerModule(Regex("a"), base_lm=str(lm_folder))
    assert module.sampler == Annealed(moves=[Suffix()])
    [record] = caplog.records
    assert (
        record.getMessage() == f"{lm_folder}: no denoiser belongs to this base model; moves: suffix"
    )
    caplog.clear()
    for sampler in (Annealed(moves=[Suffix()]), Chains()):
        assert GuidedSamplerModule(Regex("a"), sampler, str(lm_folder)).sampler is sampler
    # Moves that were asked for are not dropped.
    with pytest.raises(Exception, match="denoiser: none given, needed for the sampler Annealed"):
        GuidedSamplerModule(Regex("a"), Annealed(moves=[DenoiseAccept()]), str(lm_folder))
    assert not caplog.records


def test_default_moves_of_another_base_model_on_the_command_line(
    lightning: Run, lm_folder: Path
) -> None:
    Path("plain.yaml").write_text(
        "model: {class_path: dia_lightning.GuidedSamplerModule, init_args: {reward:"
        f" {{class_path: dia_lightning.rewards.VaderSentiment}}, base_lm: '{lm_folder}'}}}}\ndata:"
        f" {{class_path: dia_lightning.data.PromptData, init_args: {{base_lm: '{lm_folder}',"
        " n_texts: 2, max_length: 12}}\ntrainer: {logger: false, enable_checkpointing: false,"
        " callbacks: [{class_path: dia_lightning.callbacks.PredictionWriter, init_args: {folder:"
        " out}}]}\n",
        encoding="utf-8",
    )
    code, _, err = lightning("predict", "--config", "plain.yaml")
    assert code == 0, err
    metrics = json.loads(Path("out/metrics.json").read_text(encoding="utf-8"))
    assert "accept_suffix" in metrics
    assert "accept_denoise_accept" not in metrics


@pytest.mark.parametrize(
    ("given", "lost", "by"),
    [
        (
            ["--model.sampler.particles", "3", "--model.sampler", "Chains"],
            "--model.sampler.particles",
            "--model.sampler",
        ),
        (
            ["--model.sampler.ess=0.4", "--model.sampler=Annealed"],
            "--model.sampler.ess",
            "--model.sampler",
        ),
        (["--model.reward.n=2", "--model.reward=Coverage"], "--model.reward.n", "--model.reward"),
    ],
)
def test_an_option_that_a_later_part_replaces_is_refused(
    lightning: Run, given: list[str], lost: str, by: str
) -> None:
    assert_one_line(lightning("predict", *given), f"{lost}: given before {by}", f"write {by} first")
