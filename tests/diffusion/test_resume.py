"""A run that goes on does what an uninterrupted one does, and what a run leaves behind is what
it says.
"""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from dia_lightning.callbacks import Export, WeightEMA
from dia_lightning.data import ModelSamples
from dia_lightning.training import DenoiserModule
from tests.oracles.in_parts import in_parts


class Losses(L.Callback):
    def __init__(self) -> None:
        self.by_step: dict[int, float] = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        self.by_step[trainer.fit_loop.total_batch_idx] = float(outputs["loss"])


def fit(
    lm_folder: Path, work: Path, steps: int, saves: str, ckpt: Path | None = None, **trainer: Any
) -> dict[int, float]:
    """Losses by number of batch; 40 rows in batches of 8, so that an epoch is 5 batches."""
    model = DenoiserModule(
        str(lm_folder),
        **in_parts(
            DenoiserModule,
            width=16,
            layers=1,
            heads=2,
            max_length=12,
            init_from_lm=False,
            time_warp=2,
            warmup_steps=1,
        ),
    )
    data = ModelSamples(
        str(lm_folder), 40, 8, 12, 8, cache=str(lm_folder.parent / "samples"), shard_size=16
    )
    losses = Losses()
    saving = ModelCheckpoint(
        work / saves, "{step}", save_last=True, every_n_train_steps=3, save_top_k=-1
    )
    callbacks = [losses, WeightEMA(), Export(str(work / saves / "export")), saving]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    made = L.Trainer(
        accelerator="cpu", max_steps=steps, callbacks=callbacks, limit_val_batches=0,
        check_val_every_n_epoch=None, **quiet, **trainer,
    )  # fmt: skip
    made.fit(model, datamodule=data, ckpt_path=ckpt)
    return losses.by_step


def test_a_continued_run_does_what_an_uninterrupted_one_does(
    lm_folder: Path, tmp_path: Path
) -> None:
    """Inside the first epoch, and inside the second, where rows come in another order."""
    whole = fit(lm_folder, tmp_path, 12, "whole")
    assert sorted(whole) == list(range(12))
    for step in (3, 6):
        rest = fit(lm_folder, tmp_path, 12, f"from{step}", tmp_path / f"whole/step={step}.ckpt")
        assert rest == pytest.approx({k: v for k, v in whole.items() if k >= step}, abs=1e-6)


def test_a_finished_run_keeps_its_weights_beside_their_average(
    lm_folder: Path, tmp_path: Path
) -> None:
    fit(lm_folder, tmp_path, 2, "short")  # ends before the first periodic checkpoint
    saved = torch.load(tmp_path / "short/last.ckpt", weights_only=True)
    raw, averaged = saved["current_model_state"], saved["state_dict"]
    export = load_file(tmp_path / "short/export/model.safetensors")
    assert any(not torch.equal(raw[f"network.{name}"], weight) for name, weight in export.items())
    assert all(torch.equal(averaged[f"network.{name}"], weight) for name, weight in export.items())
    for name in ("schedule.knots", "loss_in_bin"):
        assert torch.equal(averaged[name], raw[name])
    loss_in_bin = averaged["loss_in_bin"]
    assert set(loss_in_bin[loss_in_bin < 0].tolist()) == {-1.0}  # bins not seen yet


def test_the_average_follows_a_short_run_and_then_keeps_its_decay() -> None:
    """Weights 1, 2, 3, …: the average against the recursion written out, and close to the end
    after 100 steps.
    """

    class Counter(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

    ema, module, want = WeightEMA(decay=0.9), Counter(), 1.0
    ema.setup(L.Trainer(logger=False, accelerator="cpu"), module, "fit")
    for n in range(100):
        with torch.no_grad():
            module.weight.fill_(float(n + 1))
        ema._average_model.update_parameters(module)
        if n:
            decay = min(0.9, (1 + n) / (10 + n))
            want = decay * want + (1 - decay) * (n + 1)
        if n == 10:
            assert ema._average_model.module.weight.item() > 6  # 0.9 from the start: 4.1
    assert ema._average_model.module.weight.item() == pytest.approx(want, rel=1e-5)
