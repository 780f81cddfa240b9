"""Costs against torch's own count of floating-point operations, and against arithmetic by hand."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dia_lightning.callbacks import Export
from dia_lightning.callbacks.export import training_costs
from dia_lightning.data import ModelSamples
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.meter import (
    Meter,
    difference,
    networks_of,
    peak_memory_mib,
    reset_peak_memory,
    weights_of,
)
from dia_lightning.rewards import Keyword, VaderSentiment
from dia_lightning.rewards.compose import WeightedSum
from dia_lightning.samplers import BaseModel, BestOfN, Chains, Diffusion, GuidedSamplerModule
from dia_lightning.training import CriticModule, DenoiserModule
from dia_lightning.types import Batch, Cost
from tests.oracles.in_parts import in_parts

KIT = Path("checkpoints/tiny")


def free(lm: BaseLM, n: int, length: int = 12) -> Batch:
    tokens = torch.full((n, length), lm.end_id)
    return Batch(0, list(range(n)), [""] * n, tokens, torch.zeros_like(tokens, dtype=torch.bool))


def matrix_products(counter: FlopCounterMode) -> int:
    """Of products with weights: `addmm` and `mm`, not attention's batched ones."""
    counts = counter.get_flop_counts()["Global"]
    return sum(flops for op, flops in counts.items() if str(op) in ("aten.addmm", "aten.mm"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scoring_and_writing_against_torchs_count(dtype: torch.dtype) -> None:
    """The same operations, but for the positions after a text's end, which the head is spared."""
    lm, meter = BaseLM.load(str(KIT / "lm")), Meter()
    lm.model.to(dtype)
    meter.watch("base_lm", lm.multiplied())
    tokens = torch.randint(0, 1000, (8, 12), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        lm.log_prob(tokens)
    spent = meter.read()["base_lm"]
    assert spent == Cost(8, 96, matrix_products(counter))
    with FlopCounterMode(display=False) as counter:
        lm.generate(
            tokens, torch.zeros_like(tokens, dtype=torch.bool), torch.Generator().manual_seed(0)
        )
    drawn = difference(meter.read(), {"base_lm": spent})["base_lm"]
    assert drawn == Cost(96, 96, matrix_products(counter))


def test_a_gradient_of_the_inputs_costs_as_much_again_and_training_thrice() -> None:
    linear = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 4, bias=False))
    z = torch.randn(3, 7, 6)
    for trained, gradient, factor in ((False, False, 1), (False, True, 2), (True, True, 3)):
        meter = Meter()
        linear.requires_grad_(trained)
        meter.watch("net", [(linear, weights_of(linear))])
        given = z.clone().requires_grad_(gradient)
        with FlopCounterMode(display=False) as counter:
            out: Tensor = linear(given)
            if gradient:
                out.sum().backward()
        assert meter.read() == {"net": Cost(3, 21, 2 * 50 * 21 * factor)}
        assert matrix_products(counter) == 2 * 50 * 21 * factor


def test_without_a_gradient_to_come_training_weights_cost_a_pass_forward() -> None:
    linear, meter = nn.Linear(4, 4), Meter()
    meter.watch("net", [(linear, weights_of(linear))])
    with torch.no_grad():
        linear(torch.zeros(2, 3, 4))
    assert meter.read()["net"] == Cost(2, 6, 2 * 16 * 6)


def test_every_method_is_counted_alike() -> None:
    """By hand: rows and positions that each method must ask for."""
    reward, length, n = VaderSentiment(), 12, 4
    best = GuidedSamplerModule(reward, BestOfN(n=3), compare_base=True)
    chosen, base = best.predict_step(free(best.lm, n, length))
    assert chosen.costs["base_lm"][:2] == (3 * n * length, 3 * n * length)
    assert chosen.costs["reward"] == Cost(3 * n)
    assert base.costs["base_lm"].flops * 3 == chosen.costs["base_lm"].flops
    assert base.costs.keys() == {"base_lm"}
    sampler = Diffusion(steps=5, stagger=0.0)
    guided = GuidedSamplerModule(reward, sampler, lam=2.0, compare_base=False)
    (drawn,) = guided.predict_step(free(guided.lm, n, length))
    # Predictor and corrector at each of five levels; every position, and the start position is the
    # network's own.
    assert (
        drawn.costs["denoiser"][:2] == drawn.costs["critic"][:2] == (2 * 5 * n, 2 * 5 * n * length)
    )
    network, value = guided.denoiser_network, guided.value
    assert network is not None
    assert value is not None
    # Hidden and read out at each; the critic with a gradient of its inputs.
    assert drawn.costs["denoiser"].flops == 2 * 2 * 5 * n * length * sum(
        weights for _, weights in network.multiplied()
    )
    trunk, head = (weights for _, weights in value.critic.multiplied())
    assert drawn.costs["critic"].flops == 2 * 2 * (2 * 5 * n) * (length * trunk + head)


def test_refinement_counts_its_start_and_its_moves() -> None:
    module = GuidedSamplerModule(VaderSentiment(), Chains(rounds=2), compare_base=False)
    (drawn,) = module.predict_step(free(module.lm, 4))
    # Drawn once, scored once, and at each step a suffix is drawn and scored.
    assert drawn.costs["reward"] == Cost(4 * 3)
    assert 4 * 12 + 4 * 3 < drawn.costs["base_lm"].calls <= 3 * 4 * 12 + 4 * 3


def test_networks_of_rewards_are_found() -> None:
    inner = Keyword(["a"])
    inner.network = nn.Linear(2, 2)  # type: ignore[attr-defined]
    assert list(networks_of(WeightedSum([VaderSentiment(), inner]))) == [inner.network]  # type: ignore[attr-defined]


def test_a_policy_is_counted_beside_the_reference() -> None:
    module = GuidedSamplerModule(
        VaderSentiment(), BaseModel(policy=str(KIT / "lm"), label="ppo"), compare_base=False
    )
    (drawn,) = module.predict_step(free(module.lm, 2))
    assert drawn.costs.keys() == {"policy"}
    assert module.trained_parts() == {"policy": "checkpoints/tiny/lm"}


def test_peak_memory_rises_with_what_is_held() -> None:
    device = torch.device("cpu")
    reset_peak_memory(device)
    before = peak_memory_mib(device)
    held = torch.ones(64 << 18)  # 64 MiB
    assert peak_memory_mib(device) > before + 50
    del held


def fit(module: L.LightningModule, folder: Path, steps: int, ckpt: Path | None = None) -> Export:
    export = Export(str(folder))
    saving = L.pytorch.callbacks.ModelCheckpoint(
        folder.parent / "ckpt", "{step}", every_n_train_steps=2, save_top_k=-1
    )
    data = ModelSamples(
        n_texts=16,
        n_val=8,
        max_length=12,
        batch_size=4,
        shard_size=8,
        cache=str(folder.parent / "samples"),
    )
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, callbacks=[export, saving],
        enable_progress_bar=False, limit_val_batches=0, enable_model_summary=False,
        default_root_dir=folder.parent,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt)
    return export


@pytest.mark.parametrize("kind", ["denoiser", "critic"])
def test_training_leaves_what_it_cost(tmp_path: Path, kind: str) -> None:
    """Four steps of four rows; a continued run has spent as much as one that was not stopped."""

    def module() -> L.LightningModule:
        small = {"layers": 1, "max_length": 12, "init_from_lm": False, "width": 16, "heads": 2}
        return (
            DenoiserModule(**in_parts(DenoiserModule, **small))
            if kind == "denoiser"
            else CriticModule(VaderSentiment(), **in_parts(CriticModule, **small))
        )

    fit(module(), tmp_path / "whole", 4)
    fit(module(), tmp_path / "half", 2)
    fit(module(), tmp_path / "rest", 4, tmp_path / "ckpt" / "step=2.ckpt")
    whole, half, rest = (
        json.loads((tmp_path / name / "costs.json").read_text())
        for name in ("whole", "half", "rest")
    )
    if kind == "critic":
        # The held-out rewards are asked for again.
        assert rest["networks"].pop("reward")["calls"] == whole["networks"]["reward"]["calls"] + 8
        assert whole["networks"].pop("reward")["calls"] == 8 + 4 * 4
    assert rest["networks"].keys() == whole["networks"].keys() == {"base_lm", kind}
    for name, cost in rest["networks"].items():
        assert cost == pytest.approx(whole["networks"][name])
    network = whole["networks"][kind]
    # A denoiser's every other step conditions on its own estimate, which is a pass without a
    # gradient.
    assert network["calls"] == 4 * 4 * (1.5 if kind == "denoiser" else 1)
    assert network["tokens"] == network["calls"] * 12
    assert half["networks"][kind]["flops"] < network["flops"]
    assert whole["networks"]["base_lm"]["tokens"] == 24 * 12
    assert whole["flops"] == sum(cost["flops"] for cost in whole["networks"].values())
    assert whole["seconds"] > 0
    found = training_costs({kind: str(tmp_path / "whole"), "none": str(tmp_path)})
    assert found == {kind: json.loads((tmp_path / "whole" / "costs.json").read_text())}
