"""Writes what was trained as safetensors, so that the next command can load it by a folder name,
and what that cost.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from dia_lightning.errors import UserError
from dia_lightning.files import find_path, in_place
from dia_lightning.lm.files import local
from dia_lightning.meter import Meter, difference, peak_memory_mib, reset_peak_memory
from dia_lightning.rewards.base import CachedReward
from dia_lightning.types import Cost


class Export(L.Callback):
    """At the end of `fit` (rank zero), calls the module's `export(folder)`; EMA weights where an
    EMA callback runs before.

    Beside it comes `costs.json`: by network what passed through it in all processes (`types.Cost`),
    validation and the drawing of the training texts included; `flops`, their sum; `seconds` of fit
    and of the drawing; `peak_memory_mib`. A continued run adds to what its checkpoint had spent.

    Args:
        folder: Folder to write to; an export there is replaced. By default `denoiser`, `critic` or
            `lm` in the trainer's `default_root_dir` (`--out`).
    """

    def __init__(self, folder: str | None = None) -> None:
        self._given, self.folder = folder, Path(folder or ".")
        self._meter, self._before, self._seconds, self._began = Meter(), dict[str, Cost](), 0.0, 0.0
        self._reward: CachedReward | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._given is None:
            name = getattr(getattr(pl_module, "network", None), "network_name", "lm")
            self.folder = Path(trainer.default_root_dir, name)
        self._meter = Meter()
        self._meter.watch_all(pl_module)
        for name, lm in getattr(pl_module, "language_models", {}).items():
            self._meter.watch(name, lm.multiplied())
        self._reward = next(
            (value for value in vars(pl_module).values() if isinstance(value, CachedReward)), None
        )
        self._began = time.perf_counter()
        reset_peak_memory(pl_module.device)

    def _spent(self) -> dict[str, Cost]:
        spent = self._before | {
            name: cost.plus(self._before.get(name, Cost()))
            for name, cost in self._meter.read().items()
        }
        asked = Cost(0 if self._reward is None else self._reward.n_asked)
        return difference(spent | {"reward": spent.get("reward", Cost()).plus(asked)}, {})

    def state_dict(self) -> dict[str, Any]:
        seconds = self._seconds + (time.perf_counter() - self._began if self._began else 0.0)
        return {
            "costs": {name: tuple(cost) for name, cost in self._spent().items()},
            "seconds": seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = {name: Cost(*cost) for name, cost in state_dict["costs"].items()}
        self._seconds = state_dict["seconds"]

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        costs = self._of_all_processes(trainer, self._spent())
        drawn, seconds = getattr(trainer.datamodule, "drawing_costs", lambda: ({}, 0.0))()  # type: ignore[attr-defined]
        costs |= {name: cost.plus(costs.get(name, Cost())) for name, cost in drawn.items()}
        if trainer.is_global_zero:
            pl_module.export(self.folder)  # type: ignore[operator]
            written = {
                "networks": {name: cost._asdict() for name, cost in costs.items()},
                "flops": sum(cost.flops for cost in costs.values()),
                "seconds": self.state_dict()["seconds"] + seconds,
                "peak_memory_mib": peak_memory_mib(pl_module.device),
            }
            with in_place(self.folder / "costs.json") as partial:
                partial.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")

    def _of_all_processes(self, trainer: L.Trainer, costs: dict[str, Cost]) -> dict[str, Cost]:
        values = torch.tensor([list(cost) for cost in costs.values()], dtype=torch.float64).reshape(
            -1, len(Cost._fields)
        )
        total = trainer.strategy.reduce(values.to(trainer.strategy.root_device), reduce_op="sum")
        assert isinstance(total, torch.Tensor)
        return {name: Cost(*row) for name, row in zip(costs, total.tolist(), strict=True)}


def training_costs(paths: dict[str, str]) -> dict[str, Any]:
    """The `costs.json` beside each of the exports at `paths`, those that have one."""
    folders = {name: local(path, "config.json", name) for name, path in paths.items()}
    found = {name: find_path(Path(folder) / "costs.json") for name, folder in folders.items()}
    return {name: _read_json(path, name) for name, path in found.items() if path is not None}


def _read_json(path: Path, argument: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{argument}: cannot read {path} ({error})") from error
