"""Writes what `predict` and `test` draw, batch by batch, and continues where a stopped run left off."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from dia_lightning import __version__
from dia_lightning.metrics import compute_metrics
from dia_lightning.reports.tables import print_results
from dia_lightning.resources import UserError
from dia_lightning.sampling.base import SamplerModule
from dia_lightning.types import Generations

SCHEMA = 1


def describe(part: Any) -> Any:
    """The constructor arguments of `part` by name, nested, as JSON values: what determines a run."""
    if part is None or isinstance(part, str | int | float | bool):
        return part
    if isinstance(part, list | tuple):
        return [describe(item) for item in part]
    names = [name for name in inspect.signature(type(part).__init__).parameters if name != "self"]
    return {"class": type(part).__qualname__} | {n: describe(getattr(part, n)) for n in names if hasattr(part, n)}


def write_atomically(path: Path, text: str) -> None:
    """Write to a neighbour first, so that `path` is whole or absent whenever the process dies."""
    partial = path.with_name(f"{path.name}.tmp{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def records(batch: Generations) -> list[dict[str, Any]]:
    """One dictionary a text, with the fields of `predictions.jsonl`."""
    return [
        {
            "id": batch.ids[i],
            "prompt": batch.prompts[i],
            "text": batch.texts[i],
            "tokens": batch.tokens[i].tolist(),
            "reward": batch.reward[i].item(),
            "rewards": {name: values[i].item() for name, values in batch.rewards.items()},
            "log_p": batch.log_p[i].item(),
            "n_tokens": int(batch.n_tokens[i]),
            "method": batch.method,
            "seed": batch.seed,
            **({} if batch.accept_rate is None else {"accept_rate": batch.accept_rate[i].item()}),
        }
        for i in range(len(batch.texts))
    ]


def _to_json(batch: Generations) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return value.tolist() if isinstance(value, Tensor) else value

    fields = {name: plain(value) for name, value in asdict(batch).items()}
    for group in ("rewards", "diagnostics"):
        fields[group] = {name: plain(values) for name, values in fields[group].items()}
    return fields


def _from_json(fields: dict[str, Any]) -> Generations:
    for name in ("tokens", "log_p", "n_tokens", "reward", "accept_rate"):
        if fields[name] is not None:
            fields[name] = torch.tensor(fields[name], dtype=torch.float64 if name == "log_p" else None)
    for group in ("rewards", "diagnostics"):
        fields[group] = {name: torch.tensor(values) for name, values in fields[group].items()}
    return Generations(**fields)


class PredictionWriter(L.Callback):
    """`predictions.jsonl`, `metrics.json` and the table at the end.

    Every batch goes to a file of its own under `parts/<hash of the settings>`; at the end rank zero merges them in order.
    A rerun with the same settings draws only the batches that are missing.

    Args:
        folder: where to write.
        n_shown: sample texts under the table.
    """

    def __init__(self, folder: str = "runs/predict", n_shown: int = 3) -> None:
        self.folder, self.n_shown = Path(folder), n_shown
        self._hash = ""
        self._n_batches = self._n_resumed = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage not in ("predict", "test"):
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(pl_module, SamplerModule) or not hasattr(data, "skip"):
            raise UserError(
                f"--model: {type(pl_module).__name__} does not sample; give a sampler (for example --config "
                "configs/dia_tiny.yaml), with --data PromptData"
            )
        settings = {"model": describe(pl_module), "data": describe(data), "version": __version__}
        self._hash = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        try:
            self._parts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--trainer.callbacks: cannot write to {self.folder} ({error.strerror})") from error
        done = {int(path.stem) for path in self._parts.glob("*.json")}
        self._n_batches, self._n_resumed = data.n_batches, len(done)
        # All processes must have looked before the first of them writes.
        trainer.strategy.barrier()
        data.skip(done)

    @property
    def _parts(self) -> Path:
        return self.folder / "parts" / self._hash

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        outputs = outputs["generations"] if isinstance(outputs, dict) else outputs
        text = json.dumps([_to_json(generations) for generations in outputs])
        write_atomically(self._parts / f"{outputs[0].index:06d}.json", text)

    on_test_batch_end = on_predict_batch_end

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Merge on rank zero, if every batch is there (after an interruption some are not)."""
        if stage not in ("predict", "test") or not self._hash:
            return
        trainer.strategy.barrier()
        paths = sorted(self._parts.glob("*.json"))
        if not trainer.is_global_zero or len(paths) < self._n_batches:
            return
        parts = [[_from_json(g) for g in json.loads(path.read_text(encoding="utf-8"))] for path in paths]
        runs = [list(run) for run in zip(*parts, strict=True)]
        names = ["predictions.jsonl", "base_predictions.jsonl"]
        for name, run in zip(names, runs, strict=False):
            lines = [json.dumps(record, ensure_ascii=False) for batch in run for record in records(batch)]
            write_atomically(self.folder / name, "\n".join(lines) + "\n")
        metrics = [{"method": run[0].method, **compute_metrics(run)} for run in runs]
        result = {"schema": SCHEMA, **metrics[0], "config_hash": self._hash, "versions": _versions()}
        if len(metrics) > 1:
            result["base"] = metrics[1]
        write_atomically(self.folder / "metrics.json", json.dumps(result, indent=2) + "\n")
        if trainer.logger:
            trainer.logger.log_metrics({k: v for k, v in metrics[0].items() if isinstance(v, float)})
        print_results(metrics, runs, self.folder, self.n_shown, self._n_resumed, self._n_batches)


def _versions() -> dict[str, str]:
    import lightning
    import transformers

    return {
        "dia_lightning": __version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "transformers": transformers.__version__,
    }
