"""What each objective converges to, against the closed form."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from dia_lightning.data import TextFiles
from dia_lightning.diffusion.critic import CriticNetwork
from dia_lightning.diffusion.schedule import make_schedule
from dia_lightning.diffusion.trunk import NetworkSize
from dia_lightning.errors import UserError
from dia_lightning.rewards import Regex
from dia_lightning.training import CriticModule, DenoiserModule
from dia_lightning.training.critic import OBJECTIVES
from dia_lightning.training.denoiser import BANDS

REWARD, PROBS = torch.tensor([-1.0, 0.2, 2.0]), torch.tensor([0.5, 0.3, 0.2])


def minimiser(objective: str, lam: float) -> float:
    """The constant h that minimises the expected loss, by a fine grid."""
    grid = torch.linspace(-4, 6, 20_001)
    losses = (
        OBJECTIVES[objective](grid[:, None].expand(-1, 3), (lam * REWARD).expand(len(grid), 3))
        @ PROBS
    )
    return float(grid[losses.argmin()])


def test_mse_finds_the_mean() -> None:
    assert abs(minimiser("mse", 1.0) - float(REWARD @ PROBS)) < 1e-3


def test_soft_finds_the_log_mean_exp() -> None:
    for lam in (0.5, 1.0, 2.5):
        assert (
            abs(minimiser("soft", lam) - float(torch.log(PROBS @ torch.exp(lam * REWARD)))) < 1e-3
        )


def test_value_is_in_the_units_of_the_reward() -> None:
    torch.manual_seed(0)
    critic = CriticNetwork(6, make_schedule("cosine"), NetworkSize(8, 1, 2, 5))
    z, t = torch.randn(3, 5, 6), torch.full((3, 5), 0.5)
    plain = critic(z, t)
    critic.mean.fill_(2.0)
    critic.scale.fill_(3.0)
    torch.testing.assert_close(critic(z, t), 2 + 3 * plain)


TINY: dict[str, Any] = {
    "width": 16,
    "layers": 1,
    "heads": 2,
    "max_length": 8,
    "init_from_lm": False,
    "warmup_steps": 1,
}


def on_rewards(module: CriticModule, rewards: torch.Tensor) -> dict[str, torch.Tensor]:
    """Standardises by `rewards`, those of the batch that is returned."""
    batch = {"tokens": torch.zeros(len(rewards), 8, dtype=torch.int64)}

    class Rows(list[int]):
        def __getitem__(self, _: Any) -> Any:
            return batch

    rows = Rows(range(len(rewards)))
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(val_rows=rows))  # type: ignore[assignment]
    module._rewards = lambda _: rewards  # type: ignore[assignment, method-assign]
    module.on_fit_start()
    return batch


@pytest.mark.parametrize(
    ("objective", "lam"), [("mse", 1.0), ("soft", 1.0), ("soft", 2.5), ("soft", -0.5)]
)
def test_the_value_at_the_optimum_is_the_closed_form(
    lm_folder: Path, objective: str, lam: float
) -> None:
    """z says nothing about ten texts: the best constant output must come out as E[r], or log
    E[exp(λ r)] for `soft`.
    """
    module = CriticModule(Regex("a"), str(lm_folder), objective=objective, lam=lam, **TINY)
    rewards = REWARD.repeat_interleave(torch.tensor([5, 3, 2])) + 0.7
    targets = module._targets(on_rewards(module, rewards))
    grid = torch.linspace(-4, 6, 20_001)
    best = grid[
        OBJECTIVES[objective](grid[:, None].expand(-1, 10), targets.expand(len(grid), 10))
        .mean(1)
        .argmin()
    ]
    last: Any = module.network.head[-1]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.constant_(last.bias, float(best))
    value = module.network(torch.randn(1, 8, module.embedding.dim), torch.ones(1, 8)).item()
    want = (lam * rewards).exp().mean().log() if objective == "soft" else rewards.mean()
    assert value == pytest.approx(float(want), abs=2e-3)


def logged(module: L.LightningModule) -> dict[str, float]:
    """What the end of a validation logs, on one process."""
    found: dict[str, float] = {}
    module._trainer = SimpleNamespace(strategy=SimpleNamespace(reduce=lambda x, reduce_op: x))  # type: ignore[assignment]
    module.log = lambda name, value, **_: found.update({name: float(value)})  # type: ignore[assignment, method-assign]
    module.on_validation_epoch_end()
    return found


def test_bands_without_rows_have_no_figure(lm_folder: Path) -> None:
    critic = CriticModule(Regex("a"), str(lm_folder), **TINY)
    critic.on_validation_epoch_start()
    target, value = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 3.0, 3.0])
    error = (value - target).square()
    critic._moments[:, 1] = torch.stack(
        [error.sum(), target.sum(), target.square().sum(), torch.tensor(3.0)]
    )
    critic._moments[:, 2] = torch.tensor([0.5, 2.0, 4.0, 1.0])  # one row: no spread
    want = 1 - float(error.sum() / (target - target.mean()).square().sum())
    found = logged(critic)
    assert set(found) == {f"val/r2_{BANDS[1]}", "val/r2"}
    assert found[f"val/r2_{BANDS[1]}"] == pytest.approx(want)
    denoiser = DenoiserModule(str(lm_folder), **TINY)
    denoiser.on_validation_epoch_start()
    denoiser._in_bands[:, 3] = torch.tensor([6.0, 4.0])
    assert logged(denoiser) == {f"val/loss_{BANDS[3]}": 1.5, "val/loss": 1.5}


def test_a_clean_critic_is_judged_on_noised_text_too(lm_folder: Path, tmp_path: Path) -> None:
    """The original proposal from end to end: it learns clean text, and knows nothing of high
    noise.
    """
    places = [
        f"the {a} {b} is {c}."
        for a in ("good", "bad")
        for b in ("food", "pub", "river")
        for c in ("cheap", "great")
    ]
    (tmp_path / "texts.txt").write_text(
        "\n".join(places * 8) + "\n"
    )  # repeated lines are one row of training
    texts, length = str(tmp_path / "texts.txt"), {"max_length": 16}
    data = TextFiles(texts, val_path=texts, tokenizer=str(lm_folder), batch_size=12, **length)  # type: ignore[arg-type]
    module = CriticModule(
        Regex("good"), str(lm_folder), objective="clean", lr=0.01, **{**TINY, **length}
    )
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(accelerator="cpu", max_steps=60, enable_checkpointing=False,
     val_check_interval=60,
                        check_val_every_n_epoch=None, num_sanity_val_steps=0, **quiet)  # fmt: skip
    trainer.fit(module, datamodule=data)
    r2 = {
        name.removeprefix("val/r2_"): float(value)
        for name, value in trainer.callback_metrics.items()
        if "r2_" in name
    }
    assert {"clean", BANDS[-1]} <= set(r2)
    assert r2["clean"] > 0.9
    assert r2[BANDS[-1]] < 0.5
    assert module.settings()["objective"] == "clean"


def test_a_soft_critic_needs_a_lambda(lm_folder: Path) -> None:
    with pytest.raises(UserError, match=r"lam: 0 given"):
        CriticModule(Regex("a"), str(lm_folder), objective="soft", lam=0, **TINY)
