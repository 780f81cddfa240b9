"""Parts by name: short class names, options that belong to none, and what version 0.1.0 called
them.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace

from dia_lightning.samplers import (
    Annealed,
    BestOfN,
    Chains,
    Diffusion,
    DPMpp2M,
    GuidedSamplerModule,
    ParticleGibbs,
    ParticleSteering,
    RewardGradient,
    TwistedSMC,
    Unguided,
)
from dia_lightning.settings import parser
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


def test_default_moves_need_no_denoiser(lm_folder: Path) -> None:
    from dia_lightning.rewards import Regex
    from dia_lightning.samplers import DenoiseAccept, Suffix

    assert GuidedSamplerModule(Regex("a"), base_lm=str(lm_folder)).sampler == Annealed()
    for sampler in (Annealed(moves=[Suffix()]), Chains()):
        assert GuidedSamplerModule(Regex("a"), sampler, str(lm_folder)).sampler is sampler
    # Moves that were asked for are not dropped.
    for sampler in (Annealed(moves=[DenoiseAccept()]), Chains(moves=[Suffix(), DenoiseAccept()])):
        needed = f"denoiser: none given, needed for the sampler {type(sampler).__name__}"
        with pytest.raises(Exception, match=needed):
            GuidedSamplerModule(Regex("a"), sampler, str(lm_folder))


def usual(part: Any) -> Any:
    """The options of a part as the parser spells them."""
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        given = {f.name: usual(getattr(part, f.name)) for f in dataclasses.fields(part)}
        return {"class": type(part).__name__, "given": given}
    return [usual(x) for x in part] if isinstance(part, list | tuple) else part


def spelled(found: Any) -> Any:
    if isinstance(found, Namespace):
        given = vars(found.get("init_args") or Namespace())
        name = found.class_path.rpartition(".")[2]
        return {"class": name, "given": {key: spelled(value) for key, value in given.items()}}
    return [spelled(x) for x in found] if isinstance(found, list | tuple) else found


@pytest.mark.parametrize(
    "part",
    [
        *(Chains(), ParticleGibbs(), ParticleSteering(), TwistedSMC(), Diffusion(), BestOfN()),
        Annealed(start=TwistedSMC()),
        ParticleSteering(guidance=Unguided()),
        Diffusion(solver=DPMpp2M()),
        Diffusion(guidance=RewardGradient()),
    ],
    ids=str,
)
def test_a_part_in_the_place_of_a_default_one_has_its_own_defaults(part: Any) -> None:
    """`particles`, `rounds` and `ess` are options of several, each with a default of its own."""
    named = {"class_path": type(part).__name__, "init_args": {}}
    for field in dataclasses.fields(part):
        inner = getattr(part, field.name)
        if dataclasses.is_dataclass(inner) and inner != getattr(type(part)(), field.name):
            named["init_args"][field.name] = type(inner).__name__
    init_args = {"reward": {"class_path": "dia_lightning.rewards.VaderSentiment"}}
    init_args["sampler"] = named
    model = {"class_path": "dia_lightning.GuidedSamplerModule", "init_args": init_args}
    data = {"class_path": "dia_lightning.data.PromptData"}
    Path("plain.yaml").write_text(json.dumps({"model": model, "data": data}), encoding="utf-8")
    found = parser.options_of(["predict", "--config=plain.yaml"]).model.init_args.sampler
    assert spelled(found) == usual(part)


@pytest.mark.parametrize("sampler", ["TwistedSMC", "ParticleGibbs", "ParticleSteering"])
@pytest.mark.parametrize("particles", [1, 3])
def test_a_part_takes_over_what_a_file_gives(sampler: str, particles: int, lightning: Run) -> None:
    """Also where that is the default of the part before."""
    text = f"{{class_path: Annealed, init_args: {{particles: {particles}}}}}"
    Path("mine.yaml").write_text(f"model: {{init_args: {{sampler: {text}}}}}\n", encoding="utf-8")
    files = ["--config=configs/dia_tiny.yaml", "--config=mine.yaml"]
    found = settings(lightning, "predict", *files, f"--model.sampler={sampler}")
    assert found["model"]["init_args"]["sampler"]["init_args"]["particles"] == particles


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
