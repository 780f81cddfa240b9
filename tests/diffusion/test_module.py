"""DenoiserModule step by step: what the network is shown, how the noise times follow the loss,
and what is refused.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoTokenizer, GPT2LMHeadModel

from dia_lightning.data import ModelSamples, TextFiles
from dia_lightning.data.text import train_tokenizer
from dia_lightning.diffusion.denoiser import DenoiserNetwork
from dia_lightning.errors import UserError
from dia_lightning.rewards import Regex
from dia_lightning.training import CriticModule, DenoiserModule
from tests.oracles.in_parts import in_parts

TINY: dict[str, Any] = {
    "width": 16,
    "layers": 1,
    "heads": 2,
    "max_length": 8,
    "init_from_lm": False,
}


def at(module: Any, batch: int, step: int = 0) -> Any:
    """`module` before batch `batch` (optimiser step `step`) of a run of one process."""
    module._trainer = SimpleNamespace(
        world_size=1, global_rank=0, global_step=step,
        fit_loop=SimpleNamespace(total_batch_idx=batch),
        strategy=SimpleNamespace(reduce=lambda x, reduce_op: x),
    )  # fmt: skip
    module.log = lambda *_, **__: None
    return module


def rows(n: int = 16) -> dict[str, Tensor]:
    tokens = torch.randint(1, 280, (n, 8), generator=torch.Generator().manual_seed(0))
    return {"tokens": tokens, "prompt_mask": torch.zeros_like(tokens, dtype=torch.bool)}


def test_every_second_batch_is_conditioned_on_the_networks_own_estimate(
    lm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module = DenoiserModule(str(lm_folder), **in_parts(DenoiserModule, **TINY))
    given: list[Tensor | None] = []
    hidden = DenoiserNetwork.hidden

    def seen(
        self: DenoiserNetwork, z: Tensor, t: Tensor, z0_prev: Tensor | None = None, *more: Any
    ) -> tuple[Tensor, Tensor]:
        given.append(z0_prev)
        return hidden(self, z, t, z0_prev, *more)

    monkeypatch.setattr(DenoiserNetwork, "hidden", seen)
    taught = []
    for batch in range(4):
        module.zero_grad()
        at(module, batch).training_step(rows(), 0).backward()
        gradient = module.network.trunk.z0_in.weight.grad
        assert gradient is not None
        taught.append(bool(gradient.abs().sum() > 0))
    assert taught == [False, True, False, True]
    assert [z0 is None for z0 in given] == [True, True, False, True, True, False]
    noised = at(module, 1).noised(rows(), 1)
    want = module.embedding.expected(module.network(noised.z, noised.t))
    torch.testing.assert_close(given[2], want)


@pytest.mark.parametrize("rotary", [False, True])
def test_every_trained_weight_has_a_gradient_at_every_step(lm_folder: Path, rotary: bool) -> None:
    """What several processes need; in the critic too."""
    options = {**TINY, "rotary": rotary}
    denoiser, critic = (
        DenoiserModule(str(lm_folder), **in_parts(DenoiserModule, **options)),
        CriticModule(Regex("a"), str(lm_folder), **in_parts(CriticModule, **options)),
    )
    critic._rewards = lambda batch: torch.arange(16.0)  # type: ignore[assignment, method-assign]
    for module in (denoiser, critic):
        for batch in range(2):
            module.zero_grad()
            at(module, batch).training_step(rows(), 0).backward()
            assert [
                name for name, w in module.named_parameters() if w.requires_grad and w.grad is None
            ] == []
        assert "network.trunk.z0_in.weight" in module.state_dict()
        assert "network.trunk.positions" in module.state_dict()


def test_processes_send_what_is_learnt_and_not_what_is_p_thetas(lm_folder: Path) -> None:
    """At every step DDP sends the gradients, and the first process's buffers to all."""
    module = DenoiserModule(str(lm_folder), **in_parts(DenoiserModule, **TINY))
    data = TextFiles("a.txt", tokenizer=str(lm_folder), max_length=8)
    module._trainer = SimpleNamespace(datamodule=data)  # type: ignore[assignment]
    module.setup("fit")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(module)
        sent = {id(buffer) for buffer in wrapped.modules_buffers}
    finally:
        distributed.destroy_process_group()
    assert {name for name, buffer in module.named_buffers() if id(buffer) in sent} == {
        "schedule.knots",
        "loss_in_bin",
    }


def test_batches_of_one_step_have_noise_of_their_own(lm_folder: Path) -> None:
    module = DenoiserModule(str(lm_folder), **in_parts(DenoiserModule, **TINY))
    first, second = (
        at(module, batch, step=5).noised(rows(), module.batch_number) for batch in (10, 11)
    )
    again = at(module, 10, step=9).noised(rows(), module.batch_number)
    assert not torch.equal(first.z, second.z)
    assert torch.equal(first.z, again.z)


def test_noise_is_that_of_the_whole_batch_however_rows_are_cut(lm_folder: Path) -> None:
    """Two processes and one, rows with end tokens: which rows hide their ends is a matter of the
    row's number in all.
    """
    module = at(DenoiserModule(str(lm_folder), **in_parts(DenoiserModule, **TINY)), 0)
    batch = rows()
    batch["tokens"][:, 4:] = module.lm.end_id
    whole = module.noised(batch, 3)
    assert bool(whole.noised[1::2, 5:].any())
    assert not bool(whole.noised[::2, 5:].any())
    module._trainer.world_size = 2
    for rank in range(2):
        module._trainer.global_rank = rank
        part = module.noised({name: values[rank::2, :6] for name, values in batch.items()}, 3)
        assert torch.equal(part.z, whole.z[rank::2, :6])
        assert torch.equal(part.noised, whole.noised[rank::2, :6])


def test_each_row_has_noise_of_its_own(lm_folder: Path) -> None:
    """Rows of two batches, 128 numbers each: no pair's correlation and no row's variance beyond
    5.5 standard errors.
    """
    module = at(DenoiserModule(str(lm_folder), **in_parts(DenoiserModule, **TINY)), 0)
    eps = torch.cat([module._eps(100, stream).flatten(1) for stream in (3, 4)])
    product = eps @ eps.T / 128**0.5
    assert (
        float((product - product.diag().diag()).abs().max()) < 5.5
    )  # false alarm: 20,000 pairs, 1 in 1,300
    assert float((product.diag() - 128**0.5).abs().max()) < 5.5 * 2**0.5
    assert not torch.equal(module._eps(4, -1), module._eps(4, 3))


def test_noise_times_gather_where_the_running_loss_rises(lm_folder: Path) -> None:
    """Loss 0 below t = 0.6, 1 above 0.8, linear between: 80 % of u goes there, beside its even
    share of the rest.
    """
    t = torch.linspace(0, 1, 2001)
    loss = ((t - 0.6) / 0.2).clamp(0, 1)
    still, following = (
        DenoiserModule(str(lm_folder), **in_parts(DenoiserModule, time_warp=0, **TINY)),
        DenoiserModule(str(lm_folder), **in_parts(DenoiserModule, time_warp=4, **TINY)),
    )
    shares = []
    for module in (still, following):
        for step in range(1, 5):
            assert torch.equal(module.schedule.knots, torch.linspace(0, 1, 65))  # not before step 4
            at(module, step, step)._note_loss(loss, t)
        low, high = module.schedule.unwarp(torch.tensor([0.6, 0.8])).tolist()
        shares.append(high - low)
    assert shares[0] == pytest.approx(0.2, abs=1e-5)
    assert shares[1] == pytest.approx(0.8 + 0.2 * 0.2, abs=0.04)  # bins of 0.01 blur both ends
    noised = at(following, 9).noised(rows(512), 9)
    moving = noised.t[noised.noised & (noised.t < 1)]
    assert ((moving > 0.6) & (moving < 0.8)).float().mean() > 0.6


def refuse(module: DenoiserModule, data: Any, message: str) -> None:
    module._trainer = SimpleNamespace(datamodule=data)  # type: ignore[assignment]
    with pytest.raises(UserError, match=message):
        module.setup("fit")


def test_data_of_another_base_model_is_refused(lm_folder: Path, tmp_path: Path) -> None:
    other = GPT2LMHeadModel.from_pretrained(lm_folder)
    torch.nn.init.normal_(other.transformer.h[0].mlp.c_fc.weight)
    other.save_pretrained(tmp_path / "lm")
    AutoTokenizer.from_pretrained(lm_folder).save_pretrained(tmp_path / "lm")
    train_tokenizer(["another language altogether"] * 3, 280).save_pretrained(
        tmp_path / "tokenizer"
    )
    module = DenoiserModule(str(lm_folder), **in_parts(DenoiserModule, **TINY))
    both = r"^data.base_lm: .* \(model.base_lm\)"
    refuse(module, ModelSamples(str(tmp_path / "lm"), max_length=8), both)
    (tmp_path / "a.txt").write_text("the good food\nthe bad food\n")
    corpus = TextFiles(str(tmp_path / "a.txt"), tokenizer=str(tmp_path / "tokenizer"), max_length=8)
    corpus.setup("fit")
    refuse(module, corpus, r"^data.tokenizer: .* \(model.base_lm\)")
    refuse(
        module,
        ModelSamples(str(lm_folder), max_length=9),
        r"^max_length: 8 .*data.max_length",
    )
    module._trainer = SimpleNamespace(datamodule=ModelSamples(str(lm_folder), max_length=8))  # type: ignore[assignment]
    module.setup("fit")


@pytest.mark.parametrize(
    ("option", "value"),
    [("lr", -1.0), ("lr", 0.0), ("lr", float("nan")), ("weight_decay", -0.1), ("warmup_steps", -1),
     ("heads", 0), ("layers", 0),
     ("width", 0), ("max_length", 0), ("max_length", 999), ("seed", -1), ("seed", 1 << 70),
     ("time_warp", -1)],
)  # fmt: skip
def test_impossible_options_are_named(lm_folder: Path, option: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"^{option}: {value} given, "):
        DenoiserModule(str(lm_folder), **in_parts(DenoiserModule, **{**TINY, option: value}))
