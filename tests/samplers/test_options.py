"""What a sampler refuses, with the option as it stands on the command line."""

import pytest

from dia_lightning import cli
from dia_lightning.errors import UserError
from dia_lightning.settings import parser

BASELINES = "configs/baselines"
STEERING = "configs/dia_tiny.yaml --model.sampler=ParticleSteering"


@pytest.mark.parametrize(
    ("chosen", "option", "value", "allowed"),
    [
        (f"{BASELINES}/best_of_n_tiny.yaml", "n", "0", "1 or more"),
        (f"{BASELINES}/twisted_smc_tiny.yaml", "ess", "2.0", "0 ≤ ess ≤ 1"),
        (f"{BASELINES}/twisted_smc_tiny.yaml", "every", "0", "1 or more, or word"),
        (f"{BASELINES}/twisted_smc_tiny.yaml", "resampling", "none", "'systematic', 'stratified'"),
        (f"{BASELINES}/guided_decoding_tiny.yaml", "top_k", "-1", "0 or more"),
        (f"{BASELINES}/guided_decoding_tiny.yaml", "final", "beam", "'sample', 'argmax'"),
        (f"{BASELINES}/classifier_free_tiny.yaml", "guidance.scale", "-1.5", "-1 or more"),
        (f"{BASELINES}/classifier_free_tiny.yaml", "guidance.label", "5", "1 to 4, or null"),
        (STEERING, "ess", "2.0", "0 ≤ ess ≤ 1"),
        (STEERING, "every", "0", "1 or more"),
        (STEERING, "potential", "best", "'difference', 'max'"),
    ],
)
def test_a_setting_is_named_by_its_option(
    chosen: str, option: str, value: str, allowed: str
) -> None:
    arguments = ["predict", "--config", *chosen.split(), f"--model.sampler.{option}={value}"]
    with pytest.raises(UserError) as caught:
        parser.build_model(cli.prepare_arguments(arguments))
    said = f"--model.sampler.{option}: {value} given, allowed: {allowed}"
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("solver", ["euler", "Euler", "DDPM"])
def test_an_unknown_solver_is_refused(solver: str) -> None:
    config = f"{BASELINES}/classifier_free_tiny.yaml"
    arguments = ["predict", "--config", config, f"--model.sampler.solver={solver}"]
    with pytest.raises(UserError, match=rf"^--model.sampler.solver: .*{solver}"):
        parser.run(cli.prepare_arguments(arguments), options_only=True)
