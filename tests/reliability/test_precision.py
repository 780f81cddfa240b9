"""Every precision that the trainer offers, and rewards of every size: texts, table and figures
are there.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.numerics import KeepsBuffers, float32_default
from dia_lightning.samplers.networks import embedding_for, load_critic
from tests.conftest import CORPUS
from tests.reliability.test_edges import FIT, REFINED, START

Run = Callable[..., tuple[int, str, str]]
TRUE = ["bf16-true", "16-true", "64-true"]
SIZE = [
    "--data.n_texts=2",
    "--data.batch_size=2",
    "--data.max_length=12",
    "--trainer.callbacks.folder=out",
]
REWARDS = """
import numpy as np
import torch
from dia_lightning.types import Reward

class Of(Reward):
    name, scale = "of", 1.0
    def numbers(self, texts): return [self.scale * len(text.split()) / 10 for text in texts]
    def __call__(self, texts): return torch.tensor(self.numbers(texts))
class Doubles(Of):
    def __call__(self, texts): return self.numbers(texts)
class Array(Of):
    def __call__(self, texts): return np.array(self.numbers(texts))
class Ints(Of):
    def __call__(self, texts): return torch.tensor([len(text) for text in texts])
class Network(Of):
    def __init__(self): self.layer = torch.nn.Linear(1, 1)
    def __call__(self, texts): return self.layer(torch.tensor(self.numbers(texts))[:, None])[:, 0]
class Constant(Of):
    def numbers(self, texts): return [1.0 for _ in texts]
class Low(Of): scale = -1e30
class High(Of): scale = 1e30
class Highest(Of):
    def numbers(self, texts): return [3e38 for _ in texts]
class Spread(Of):
    def numbers(self, texts): return [3e38 if i % 2 else -3e38 for i, _ in enumerate(texts)]
    deterministic = False
"""
METHODS = {
    "annealed": ["configs/dia_tiny.yaml"],
    "dia": ["configs/guided_tiny.yaml", "--model.sampler.steps=2"],
    "mala": [
        "configs/dia_tiny.yaml",
        *REFINED,
        f"{START}.solver=PredictorCorrector",
        f"{START}.solver.accept=true",
    ],
    "twisted_smc": ["configs/baselines/twisted_smc_tiny.yaml"],
    "classifier_free": ["configs/baselines/classifier_free_tiny.yaml", "--model.sampler.steps=2"],
    "guided_decoding": ["configs/baselines/guided_decoding_tiny.yaml"],
}


@pytest.fixture
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of one's own; of another name in each test, since modules stay imported."""
    name = f"rewards_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(REWARDS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def metrics(result: tuple[int, str, str]) -> dict[str, float]:
    assert result[0] == 0, result[2]
    found: dict[str, float] = json.loads(Path("out/metrics.json").read_text(encoding="utf-8"))
    assert found["n"] == 2
    assert len(Path("out/predictions.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    return found


@pytest.mark.parametrize("kind", ["Of", "Doubles", "Array", "Ints", "Network"])
def test_a_reward_of_ones_own(lightning: Run, rewards: str, kind: str) -> None:
    command = ["predict", "--config", "configs/zero_shot_tiny.yaml", *SIZE, f"--allow={rewards}"]
    for precision in ("32-true", *TRUE):
        result = lightning(
            *command, f"--model.reward={rewards}.{kind}", f"--trainer.precision={precision}"
        )
        assert metrics(result)["n"] == 2
        assert result[2] == ""


@pytest.mark.parametrize("method", METHODS)
def test_every_precision_samples(lightning: Run, method: str) -> None:
    """Double precision of the networks, and single, give the same texts; without networks, every
    precision.
    """
    config, *options = METHODS[method]
    command = ["predict", "--config", config, *SIZE, *options, "--model.compare_base=false"]
    texts = {}
    for precision in ("32-true", *TRUE):
        found = metrics(lightning(*command, f"--trainer.precision={precision}"))
        lines = Path("out/predictions.jsonl").read_text(encoding="utf-8").splitlines()
        texts[precision] = [json.loads(line)["text"] for line in lines], found["log_p_per_token"]
    assert texts["64-true"] == texts["32-true"]
    if method == "guided_decoding":
        assert len({str(value) for value in texts.values()}) == 1
    # Of a network that had lost its input, texts would be noise: −log V is −7.6.
    assert all(log_p > 2 * texts["32-true"][1] - 3 for _, log_p in texts.values())


@pytest.mark.parametrize("precision", TRUE)
def test_p_theta_keeps_its_own(lightning: Run, precision: str) -> None:
    found = {}
    for kind in ("32-true", precision):
        metrics(
            lightning(
                "predict",
                "--config",
                "configs/zero_shot_tiny.yaml",
                *SIZE,
                f"--trainer.precision={kind}",
            )
        )
        lines = Path("out/predictions.jsonl").read_text(encoding="utf-8").splitlines()
        found[kind] = {line["text"]: line["log_p"] for line in map(json.loads, lines)}
    assert found[precision] == pytest.approx(found["32-true"], abs=1e-6)


def test_what_a_module_keeps() -> None:
    """Weights change their precision, p_θ's table and the schedule do not; the value stays what
    it was, to a rounding.
    """

    class Module(KeepsBuffers):
        def __init__(self) -> None:
            super().__init__()
            lm = BaseLM.load("checkpoints/tiny/lm")
            self.embedding = embedding_for(lm, critic="checkpoints/tiny/critic")
            self.critic, _ = load_critic("checkpoints/tiny/critic", self.embedding, None, lm)

    generator = torch.Generator().manual_seed(0)
    module = Module()
    table, z = (
        module.embedding.weight.clone(),
        torch.randn(4, 20, module.embedding.dim, generator=generator),
    )
    t = torch.rand(4, 20, generator=generator)
    value = module.critic(z, t)
    for dtype, tolerance in ((torch.float64, 1e-4), (torch.bfloat16, 3e-2), (torch.float16, 1e-2)):
        module.to(dtype)
        assert {weight.dtype for weight in module.parameters()} == {dtype}
        assert torch.equal(module.embedding.weight, table)
        assert module.critic.schedule.knots.dtype == torch.float32
        torch.testing.assert_close(module.critic(z, t), value, atol=tolerance, rtol=0)


def test_the_default_comes_back_after_an_error() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with float32_default():
            assert torch.ones(1).dtype == torch.float32
        with pytest.raises(ZeroDivisionError), float32_default():
            1 / 0
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", ["Low", "High", "Highest", "Spread", "Constant"])
@pytest.mark.parametrize("command", ["predict", "test"])
def test_rewards_of_any_size_end_in_a_table(
    lightning: Run, rewards: str, kind: str, command: str
) -> None:
    given = [
        command,
        "--config",
        "configs/zero_shot_tiny.yaml",
        *SIZE,
        f"--allow={rewards}",
        f"--model.reward={rewards}.{kind}",
    ]
    for n in (2, 1):
        result = lightning(*given, f"--data.n_texts={n}")
        assert (result[0], result[2]) == (0, "")
        assert "reward, mean" in result[1]
        assert list(Path("out/tensorboard").rglob("events*"))
        json.loads(Path("out/metrics.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


def test_huge_rewards_and_lambda(lightning: Run, rewards: str) -> None:
    for kind in ("Low", "Spread"):
        command = [
            "predict",
            "--config",
            "configs/dia_tiny.yaml",
            *SIZE,
            f"--allow={rewards}",
            f"--model.reward={rewards}.{kind}",
        ]
        found = metrics(lightning(*command, "--model.sampler.moves=[Suffix]", "--model.lam=1e6"))
        assert abs(found["reward"]) < 4e38


FAILING = {
    "write_events": "tensorboard is not whole",
    "print_results": "the table is not whole",
    "write_run_report": "there is no report",
}


@pytest.mark.parametrize("name", FAILING)
def test_a_figure_that_cannot_be_written_is_a_warning(
    lightning: Run, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError("no\nbins")

    home = "lab.report.run" if name == "write_run_report" else "callbacks.writer"
    monkeypatch.setattr(f"dia_lightning.{home}.{name}", fails)
    result = lightning("test", "--config", "configs/zero_shot_tiny.yaml", *SIZE)
    metrics(result)
    [line] = result[2].splitlines()
    assert line.startswith("warning: ")
    assert line.endswith(f"{FAILING[name]}: ZeroDivisionError: no bins")


def test_an_evaluation_that_fails_is_an_error_and_loses_no_text(
    lightning: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no judge")

    monkeypatch.setattr("dia_lightning.lab.judges.Evaluation.__call__", fails)
    monkeypatch.setattr("dia_lightning.lab.judges.Evaluation.check", lambda *_: None)
    evaluation = "--trainer.callbacks.evaluation=dia_lightning.lab.judges.Evaluation"
    code, _, err = lightning(
        "predict", "--config", "configs/zero_shot_tiny.yaml", *SIZE, evaluation
    )
    assert code != 0
    assert "no judge" in err
    found = json.loads(Path("out/metrics.json").read_text(encoding="utf-8"))
    assert found["complete"]
    assert found["reward"] is not None
    assert len(Path("out/predictions.jsonl").read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.parametrize("kind", ["denoiser", "tied", "raw", "critic", "lm", "ppo"])
@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_every_network_is_trained(
    lightning: Run, lm_folder: Path, kind: str, precision: str
) -> None:
    fit = [
        *FIT,
        "--data.n_texts=16",
        "--data.batch_size=4",
        "--trainer.max_steps=4",
        "--trainer.val_check_interval=4",
    ]
    Path("texts.txt").write_text("".join(f"{line}\n" for line in CORPUS), encoding="utf-8")
    data = [
        "--data.path=texts.txt",
        "--data.val_path=texts.txt",
        "--data.train_vocab_size=280",
        "--data.max_length=16",
    ]
    size = [
        "--model.vocab_size=280",
        "--model.width=16",
        "--model.layers=1",
        "--model.heads=2",
        "--data.batch_size=4",
    ]
    never = ["--trainer.val_check_interval=null"]
    policy = [
        f"--model.base_lm={lm_folder}",
        f"--data.base_lm={lm_folder}",
        "--data.batch_size=4",
        "--data.max_length=8",
    ]
    command = {
        "denoiser": [*fit, "--model.time_warp=2", "--data.n_val=8"],
        "tied": [*fit, "--model.network.tied_head=true", "--data.n_val=8"],
        "raw": [
            *fit,
            "--model.noising.normalise=false",
            "--model.loss=eps",
            "--model.network.rotary=true",
            "--data.n_val=8",
        ],
        "critic": [
            *fit[:2],
            "configs/critic_tiny.yaml",
            *fit[3:],
            "--model.denoiser=null",
            "--data.n_val=16",
        ],
        "lm": [
            "fit",
            "--config",
            "configs/lm_tiny.yaml",
            *data,
            *size,
            "--trainer.max_steps=4",
            *never,
        ],
        "ppo": [
            "fit",
            "--config",
            "configs/baselines/ppo_tiny.yaml",
            *policy,
            "--data.n_texts=4",
            "--trainer.max_steps=2",
        ],
    }[kind]
    code, _, err = lightning(*command, f"--trainer.precision={precision}")
    assert code == 0, err
    assert list(Path("runs").rglob("*.safetensors"))


def test_a_head_in_training_is_never_an_old_one(llama_folder: Path) -> None:
    """Of a policy in bfloat16 or float64, whose logits are made in float32."""
    for dtype in (torch.bfloat16, torch.float64):
        lm = BaseLM.load(str(llama_folder))
        lm.model.to(dtype).requires_grad_(True)
        tokens = torch.tensor([[1, 2, 3]])
        before = lm.token_log_probs(tokens)
        with torch.no_grad():
            lm.model.get_output_embeddings().weight.mul_(-1)
        found = lm.token_log_probs(tokens)
        lm._head.clear()
        assert not torch.allclose(before, found)
        torch.testing.assert_close(found, lm.token_log_probs(tokens))
