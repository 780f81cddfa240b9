"""PPO and RLOO on a problem whose optimum is known, and as a run: checkpoints, export, two
processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from dia_lightning import cli
from dia_lightning.data import RolloutData
from dia_lightning.errors import UserError
from dia_lightning.samplers import BaseModel, GuidedSamplerModule
from dia_lightning.settings import parser
from dia_lightning.training import PPOModule
from dia_lightning.training.ppo_loss import gae, token_rewards
from dia_lightning.types import Reward
from tests.oracles import tiny_policy as listed
from tests.oracles.in_parts import in_parts

BETA = 1.0


class Table(Reward):
    """The reward of every text of the listed problem."""

    name = "table"

    def __init__(self, values: Tensor | None = None) -> None:
        self.values = values
        self._known = (
            {} if values is None else dict(zip(listed.TEXTS, values.float().tolist(), strict=True))
        )

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([self._known[text] for text in texts])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("listed") / "lm"
    listed.save(folder)
    return str(folder)


def module(base: str, **options: Any) -> PPOModule:
    made = PPOModule(
        Table(),
        base,
        **in_parts(PPOModule, **{"beta": BETA, "lr": 3e-3, "warmup_steps": 5, **options}),
    )
    made.reward.__init__(listed.rewards(listed.log_p(made.lm.model)))
    return made


def fit(
    model: PPOModule, steps: int, batch_size: int = 256, ckpt: Path | None = None, **options: Any
) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"devices": 1, "enable_checkpointing": False, **quiet, **options}
    trainer = L.Trainer(accelerator="cpu", max_steps=steps, **options)
    trainer.fit(
        model,
        datamodule=RolloutData(model.base_lm, batch_size=batch_size, max_length=listed.T),
        ckpt_path=ckpt,
    )
    return trainer


def perturbed(model: PPOModule) -> PPOModule:
    """Away from p_θ, so that the KL term has a gradient."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.policy.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return model


@pytest.mark.parametrize("options", [{}, {"estimator": "rloo"}], ids=["ppo", "rloo"])
def test_training_ends_at_the_closed_form(base: str, options: dict[str, Any]) -> None:
    """KL(policy ‖ π*) over all 781 texts, π* ∝ p_θ exp(r / β), from above 0.4 nats to under
    0.05.
    """
    model = module(base, **options)
    log_base = listed.log_p(model.lm.model)
    assert float(log_base.exp().sum()) == pytest.approx(1, abs=1e-6)
    target = listed.optimum(log_base, listed.rewards(log_base), BETA)
    trainer = fit(model, 240)
    end = listed.log_p(model.policy).detach()
    assert listed.kl(log_base, target) > 0.4
    assert listed.kl(end, target) < 0.05
    assert torch.equal(listed.log_p(model.lm.model), log_base)
    # What it logs, of 256 texts, against the enumeration: five standard errors of a text's log
    # ratio.
    ratio = end - log_base
    spread = float((end.exp() @ ratio.square() - (end.exp() @ ratio) ** 2).sqrt())
    assert float(trainer.callback_metrics["train/kl"]) == pytest.approx(
        listed.kl(end, log_base), abs=5 * spread / 16
    )


@pytest.mark.parametrize("estimator", ["ppo", "rloo"])
def test_the_gradient_is_unbiased(base: str, estimator: str) -> None:
    """Of rloo, and of ppo at GAE's λ = 1 before whitening and with any V; at a policy that is not
    p_θ.

    Against the exact gradient of E[r] − β KL by enumeration, in its own direction and 7 random
    ones: 5 standard errors.

    60 batches of 128 texts; false-alarm rate about 1e-5.
    """
    model = perturbed(module(base, estimator=estimator, value_coef=0.0))
    weights = list(model.policy.parameters())
    log_base, reward = listed.log_p(model.lm.model), model.reward.values
    log_policy = listed.log_p(model.policy)
    aim = (log_policy.exp() * (reward - BETA * (log_policy - log_base))).sum()
    exact = flat(torch.autograd.grad(aim, weights))
    directions = torch.cat(
        [exact[None], torch.randn(7, len(exact), generator=torch.Generator().manual_seed(2))]
    )
    directions /= directions.norm(dim=1, keepdim=True)
    data, found = rollouts(model, 128), []
    for index in range(60):
        batch = data.rollout(index)
        rollout = model.roll_out(batch, torch.Generator().manual_seed(index))
        if estimator == "rloo":
            advantages, returns = model.advantages(rollout, batch)
        else:
            returns = torch.zeros_like(rollout.log_p)
            values = (
                0.5 * rollout.log_p.cumsum(1) - 0.5 * rollout.log_p
            )  # what stands before the token
            rewards = token_rewards(rollout.reward, rollout.log_ratio, rollout.mask, BETA)
            advantages = gae(rewards, values, rollout.mask, 1.0)
        loss, _ = model.loss(rollout, advantages, returns, torch.arange(128), torch.ones(()))
        found.append(directions @ flat(torch.autograd.grad(-loss, weights)))
    drawn = torch.stack(found).double()
    error = drawn.std(0) / len(drawn) ** 0.5
    assert float(exact.norm()) > 20 * float(error[0])
    assert ((drawn.mean(0) - directions @ exact).abs() < 5 * error).all()


def flat(gradients: Sequence[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


def rollouts(model: PPOModule, batch_size: int, **options: Any) -> RolloutData:
    data = RolloutData(model.base_lm, batch_size=batch_size, max_length=listed.T, **options)
    data.setup("fit")
    return data


def test_a_rollout_and_the_loss_of_a_minibatch_are_what_the_texts_say(base: str) -> None:
    """Of 16 texts with a prompt of one token: log-probabilities by transformers alone, the loss
    by loops.
    """
    model = perturbed(module(base, value_coef=0.3))
    assert model.value_head is not None
    torch.nn.init.normal_(
        model.value_head.weight, std=0.1, generator=torch.Generator().manual_seed(0)
    )
    batch = rollouts(model, 16, prompts=["b"], n_texts=16).rollout(0)
    rollout = model.roll_out(batch, torch.Generator().manual_seed(0))
    assert (rollout.tokens[:, 0] == 1).all()
    place = [listed.ROWS.index((row + [listed.END] * 3)[:4]) for row in rollout.tokens.tolist()]
    torch.testing.assert_close(
        rollout.reward.double(), model.reward.values[place], atol=1e-6, rtol=0
    )
    kept = listed.KEPT & (torch.arange(listed.T) > 0)
    for network, found in (
        (model.policy, rollout.log_p),
        (model.lm.model, rollout.log_p - rollout.log_ratio),
    ):
        with torch.no_grad():
            torch.testing.assert_close(
                found.double().sum(1), listed.log_p(network, kept=kept)[place], atol=1e-5, rtol=0
            )
    assert torch.equal(rollout.mask, kept[place][:, : rollout.mask.shape[1]])

    advantages = torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(3))
    returns, rows = rollout.values + 2, torch.tensor([3, 0, 7, 12])
    moved = rollout._replace(log_p=rollout.log_p - 0.3)
    total = clipped = n = 0.0
    for i in rows.tolist():
        for t in range(rollout.mask.shape[1]):
            if rollout.mask[i, t]:
                a, ratio = float(advantages[i, t]), 1.349859
                total += -min(ratio * a, 1.2 * a) + 0.3 * 2**2 / 2
                clipped += a > 0
                n += 1
    loss, measured = model.loss(moved, advantages, returns, rows, torch.tensor(2.5))
    assert loss.item() == pytest.approx(total / (4 * 2.5), abs=1e-4)
    assert measured.tolist() == pytest.approx([clipped / 10, n * 2 / 10], abs=1e-4)


def test_in_bfloat16_gradients_are_those_of_the_weights_as_they_are(base: str) -> None:
    """Inside one autocast, as in a training step: after drawing, and after the weights have
    changed.
    """
    model = perturbed(module(base, estimator="rloo"))
    weights = list(model.policy.parameters())
    batch, rows, unused = rollouts(model, 64).rollout(0), torch.arange(64), torch.ones(())
    with torch.autocast("cpu", torch.bfloat16):
        rollout = model.roll_out(batch, torch.Generator().manual_seed(0))
        advantages, returns = model.advantages(rollout, batch)
        for _ in range(2):
            found = flat(
                torch.autograd.grad(
                    model.loss(rollout, advantages, returns, rows, unused)[0], weights
                )
            )
            with torch.autocast("cpu", enabled=False):
                want = flat(
                    torch.autograd.grad(
                        model.loss(rollout, advantages, returns, rows, unused)[0], weights
                    )
                )
            assert float((found - want).norm() / want.norm()) < 0.1
            perturbed(model)


def test_a_continued_run_does_what_an_uninterrupted_one_does(base: str, tmp_path: Path) -> None:
    """With an adaptive β; 6 batches of texts, 4 steps each, stopped after 3."""
    options = {"target_kl": 0.2, "beta": 0.5}
    saving = ModelCheckpoint(
        tmp_path, "{step}", save_last=True, every_n_train_steps=12, save_top_k=-1
    )
    whole = module(base, **options)
    fit(whole, 24, 32, callbacks=[saving], enable_checkpointing=True)
    assert float(whole.beta_now) != 0.5
    rest = module(base, **options)
    trainer = fit(rest, 24, 32, ckpt=tmp_path / "step=12.ckpt")
    assert trainer.global_step == 24
    for name, weight in whole.state_dict().items():
        assert torch.equal(rest.state_dict()[name], weight), name


def test_the_kl_that_is_paid_for_is_held_at_its_target(base: str) -> None:
    """β starts 10 times too small; over the last steps it only rises while the KL is above the
    target.
    """
    model = module(base, beta=0.1, target_kl=0.05)
    seen: list[tuple[float, float]] = []

    class Watch(L.Callback):
        def on_train_batch_end(
            self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any
        ) -> None:
            seen.append((float(trainer.callback_metrics["train/kl"]), float(model.beta_now)))

    fit(model, 40, 64, callbacks=[Watch()])
    before = [0.1, *(beta for _, beta in seen)]
    for (kl, beta), last in zip(seen, before, strict=False):
        assert beta == pytest.approx(
            last * (1 + 0.1 * max(-0.2, min(0.2, kl / 0.05 - 1))), rel=1e-5
        )
    assert {beta > last for (_, beta), last in zip(seen, before, strict=False)} == {True, False}


def test_rollout_data_repeats_prompts_and_passes_through_all(base: str) -> None:
    data = RolloutData(base, prompts=["a", "b", "c"], n_texts=2, batch_size=4, max_length=4)
    data.setup("fit")
    batches = [data.rollout(index) for index in range(6)]
    for batch in batches:
        assert batch.prompts[0] == batch.prompts[1]
        assert batch.prompts[2] == batch.prompts[3]
        assert [
            data.lm.tokenizer.decode([row[0]]) for row in batch.tokens.tolist()
        ] == batch.prompts
    order = [prompt for batch in batches for prompt in batch.prompts[::2]]
    passes = [order[i : i + 3] for i in range(0, 12, 3)]
    assert all(sorted(p) == ["a", "b", "c"] for p in passes)
    assert len(set(map(tuple, passes))) > 1
    assert data.rollout(1).prompts == batches[1].prompts
    with pytest.raises(UserError, match="batch_size: 5 given, allowed: a multiple of n_texts"):
        RolloutData(base, n_texts=2, batch_size=5)
    with pytest.raises(UserError, match=r"^prompts: .* given, allowed: without blanks"):
        RolloutData(base, prompts=["a [blank:2]"], n_texts=2, batch_size=4, max_length=4).setup(
            "fit"
        )


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [("beta", 0.0, "above 0"), ("clip", 1.0, "between"),
     ("epochs", 0, "1 or more"),
     ("target_kl", -1.0, "above 0, or null"), ("gae_lambda", 1.1, "0 to 1")],
)  # fmt: skip
def test_mistakes_are_named(base: str, option: str, value: object, allowed: str) -> None:
    with pytest.raises(UserError, match=rf"^{option}: .*{value}.* given, allowed: {allowed}"):
        PPOModule(Table(), base, **in_parts(PPOModule, **{option: value}))


def test_rloo_needs_two_texts_a_prompt(base: str) -> None:
    model = module(base, estimator="rloo")
    batch = rollouts(model, 2, prompts=["a", "b"], n_texts=1).rollout(0)
    with pytest.raises(UserError, match=r"^data.n_texts: 1 given, .* LeaveOneOut compares"):
        model.advantages(model.roll_out(batch, torch.Generator().manual_seed(0)), batch)


def test_fit_export_and_predict(
    lm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipped configurations: texts of the policy, under p_θ, beside p_θ's own."""
    monkeypatch.chdir(tmp_path)
    lm, size = f"--model.base_lm={lm_folder}", ["--data.max_length=12", "--trainer.accelerator=cpu"]
    length = "--model.reward=dia_lightning.rewards.Length"
    fitting = [
        "--trainer.max_steps=8",
        "--data.batch_size=32",
        "--model.optimizer.lr=0.01",
        "--trainer.logger=false",
    ]
    parser.run(cli.prepare_arguments(
        ["fit", "--config", "configs/baselines/ppo_tiny.yaml", lm, length,
         "--model.reward.target=2", *fitting, *size]
    ))  # fmt: skip
    costs = json.loads(Path("runs/ppo_tiny/lm/costs.json").read_text())
    assert costs["networks"]["reward"]["calls"] == 2 * 32
    # Each text: written once (12 rows at most, of its length afterwards), read once more, and
    # learned from in two epochs.
    assert 2 * 32 * 3 < costs["networks"]["policy"]["calls"] <= 2 * 32 * (12 + 1 + 2)
    assert costs["networks"]["base_lm"]["calls"] == 2 * 32
    sampling = [lm, "--model.sampler.policy=runs/ppo_tiny/lm", "--model.sampler.label=ppo"]
    parser.run(cli.prepare_arguments(
        ["predict", "--config", "configs/zero_shot_tiny.yaml", *sampling,
         "--model.compare_base=true", length,
         "--model.reward.target=2", "--data.n_texts=16", *size]
    ))  # fmt: skip
    metrics = json.loads(Path("runs/zero_shot_tiny/metrics.json").read_text())
    assert (metrics["method"], metrics["base"]["method"]) == ("ppo", "zero_shot")
    texts, own = (
        [
            json.loads(line)["tokens"]
            for line in Path(f"runs/zero_shot_tiny/{name}.jsonl").read_text().splitlines()
        ]
        for name in ("predictions", "base_predictions")
    )
    assert len(texts) == len(own) == 16
    assert texts != own


def test_a_policy_is_scored_under_its_reference(base: str, tmp_path: Path) -> None:
    model = perturbed(module(base))
    model.export(tmp_path / "policy")
    sampler = GuidedSamplerModule(
        model.reward,
        BaseModel(policy=str(tmp_path / "policy"), label="ppo"),
        base,
        compare_base=False,
    )
    batch = rollouts(model, 400).rollout(0)
    drawn = sampler.predict_step(batch)[0]
    place = [listed.ROWS.index(row) for row in drawn.tokens.tolist()]
    with torch.no_grad():
        log_base, log_policy = listed.log_p(model.lm.model), listed.log_p(model.policy)
    torch.testing.assert_close(drawn.log_p, log_base[place], atol=1e-5, rtol=0)
    # Texts of the policy: the mean of its log ratio to p_θ is the KL, within 5 standard errors.
    ratio = (log_policy - log_base)[place]
    assert listed.kl(log_policy, log_base) > 10 * float(ratio.std()) / 20
    assert float(ratio.mean()) == pytest.approx(
        listed.kl(log_policy, log_base), abs=5 * float(ratio.std()) / 20
    )
    with pytest.raises(UserError, match=r"^label: 'zero_shot' given"):
        BaseModel(policy=str(tmp_path / "policy"))


def test_a_policy_that_cannot_be_loaded_is_named_by_its_own_option(
    lm_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x", encoding="utf-8")
    wrong = {
        "none": "no such folder",
        "empty": ".* holds no config.json",
        "file": ".* which is a file",
    }
    for name, reason in wrong.items():
        sampler = BaseModel(policy=str(tmp_path / name), label="ppo")
        with pytest.raises(UserError, match=f"^policy: {reason}"):
            GuidedSamplerModule(Table(), sampler, str(lm_folder))


SCRIPT = """
import sys
import torch
from tests.training.test_ppo import fit, listed, module

if __name__ == "__main__":
    base, out = sys.argv[1:]
    model = module(base, target_kl=0.2)
    trainer = fit(model, 4, 32, devices=2, strategy="ddp")
    seen = sorted(model._cached._known)
    torch.save({"state": model.state_dict(), "seen": seen}, f"{out}/{trainer.global_rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_hold_the_same_weights(base: str, tmp_path: Path) -> None:
    """After one batch of texts each, which differ."""
    (tmp_path / "fit.py").write_text(SCRIPT)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(cli.__file__).parents[1]),
    }
    command = [sys.executable, str(tmp_path / "fit.py"), base, str(tmp_path)]
    ended = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["seen"] != second["seen"]
    before = module(base).state_dict()
    for name, weight in first["state"].items():
        assert torch.equal(weight, second["state"][name]), name
    assert not torch.equal(first["state"]["policy.lm_head.weight"], before["policy.lm_head.weight"])
