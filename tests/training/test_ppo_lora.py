"""PPO with low-rank adapters: what is trained, that the merged export is the policy, and that
p_θ is untouched.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from dia_lightning.errors import UserError
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.samplers import BaseModel, GuidedSamplerModule
from dia_lightning.training import PPOModule
from tests.oracles import tiny_policy as listed
from tests.oracles.in_parts import in_parts
from tests.training.test_ppo import Table, fit, module, rollouts

RANK = 4
# GPT-2 of width 32 and two blocks: inputs + outputs of attention in and out, and of the two layers
# behind.
ADAPTERS = 2 * RANK * ((32 + 96) + (32 + 32) + (32 + 128) + (128 + 32))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("listed") / "lm"
    listed.save(folder)
    return str(folder)


def adapted(base: str, **options: Any) -> PPOModule:
    pytest.importorskip("peft")
    return module(base, **{"lora_rank": RANK, "lr": 2e-2, **options})


def names_trained(model: PPOModule) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def test_only_the_adapters_and_the_value_head_train(base: str) -> None:
    for estimator, head in (("ppo", 33), ("rloo", 0)):
        model = adapted(base, estimator=estimator)
        trained = names_trained(model)
        assert sum(model.get_parameter(name).numel() for name in trained) == ADAPTERS + head
        assert {name for name in trained if "lora_" not in name} == (
            {"value_head.weight", "value_head.bias"} if head else set()
        )


@pytest.mark.parametrize("estimator", ["ppo", "rloo"])
def test_it_begins_as_p_theta(base: str, estimator: str) -> None:
    """Ratio 1 and KL 0 at every token, for whatever is drawn of A; another seed draws another A,
    the run's own RNG stays.
    """
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    model = adapted(base, estimator=estimator)
    assert (
        torch.equal(torch.rand(3), want) or estimator == "ppo"
    )  # whose value head is made with the global RNG
    batch = rollouts(model, 64, n_texts=2).rollout(0)
    rollout = model.roll_out(batch, torch.Generator().manual_seed(0))
    assert float(rollout.log_ratio.abs().max()) < 1e-6
    torch.testing.assert_close(listed.log_p(model.policy), listed.log_p(model.lm.model))
    first = [w for n, w in model.named_parameters() if "lora_A" in n]
    for seed, same in ((0, True), (1, False)):
        other = [
            w
            for n, w in adapted(base, estimator=estimator, seed=seed).named_parameters()
            if "lora_A" in n
        ]
        assert all(torch.equal(a, b) == same for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("estimator", ["ppo", "rloo"])
def test_training_moves_the_policy_to_the_optimum_and_nothing_else(
    base: str, estimator: str, tmp_path: Path
) -> None:
    """KL(policy ‖ π*) from above 0.4 nats to under 0.1; the export, merged, is the policy on all
    781 texts.
    """
    model = adapted(base, estimator=estimator)
    log_base = listed.log_p(model.lm.model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trained = names_trained(model)
    fit(model, 72)
    target = listed.optimum(log_base, model.reward.values, 1.0)
    with torch.no_grad():
        log_policy = listed.log_p(model.policy)
    assert listed.kl(log_base, target) > 0.4
    assert listed.kl(log_policy, target) < 0.1
    changed = {
        name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])
    }
    assert changed == trained
    assert torch.equal(listed.log_p(model.lm.model), log_base)

    model.export(tmp_path / "policy")
    exported = BaseLM.load(str(tmp_path / "policy"))
    assert type(exported.model) is type(model.lm.model)
    assert set(exported.model.state_dict()) == set(model.lm.model.state_dict())
    torch.testing.assert_close(listed.log_p(exported.model), log_policy, atol=1e-5, rtol=0)
    assert torch.equal(listed.log_p(model.policy), log_policy)  # which exporting leaves as it is
    sampler = GuidedSamplerModule(
        model.reward,
        BaseModel(policy=str(tmp_path / "policy"), label="ppo"),
        base,
        compare_base=False,
    )
    drawn = sampler.predict_step(rollouts(model, 16).rollout(0))[0]
    place = [listed.ROWS.index(row) for row in drawn.tokens.tolist()]
    torch.testing.assert_close(drawn.log_p, log_base[place], atol=1e-5, rtol=0)


def test_a_continued_run_does_what_an_uninterrupted_one_does(base: str, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    whole = adapted(base)
    fit(whole, 8, 32, callbacks=[saving], enable_checkpointing=True)
    rest = adapted(base, seed=0)
    fit(rest, 8, 32, ckpt=tmp_path / "step=4.ckpt")
    for name, weight in whole.state_dict().items():
        assert torch.equal(rest.state_dict()[name], weight), name


def test_a_rank_below_one_and_a_missing_peft_are_named(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"^lora_rank: 0 given, allowed: 1 or more, or null"):
        PPOModule(Table(), base, **in_parts(PPOModule, lora_rank=0))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        UserError,
        match=r"lora_rank: 4 given, .*peft .*, pip install 'dia-lightning\[lora\]'",
    ):
        PPOModule(Table(), base, **in_parts(PPOModule, lora_rank=4))
