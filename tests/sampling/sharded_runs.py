"""Runs of samplers, each process a program of its own: `python -m tests.sampling.sharded_runs
FOLDER LLAMA`.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from dia_lightning.callbacks import PredictionWriter
from dia_lightning.data import PromptData
from dia_lightning.errors import UserError
from dia_lightning.rewards import Regex
from dia_lightning.samplers import Annealed, Chains, GuidedSamplerModule
from dia_lightning.samplers.sharded import blocks_of
from dia_lightning.types import Reward

TINY = "checkpoints/tiny/lm"
PROMPTS = ["the", "the food is good", ""]


class FailsOnTheSecond(Reward):
    """In the second process, that is."""

    name = "fails"

    def __call__(self, texts: Sequence[str]) -> Tensor:
        if os.environ["LOCAL_RANK"] == "1":
            raise RuntimeError("the service is down")
        return torch.zeros(len(texts))


def annealed(**options: Any) -> GuidedSamplerModule:
    return GuidedSamplerModule(Regex("the"), Annealed(particles=2), TINY, lam=1.0, **options)


def suffixes(base_lm: str, reward: Reward | None = None, **options: Any) -> GuidedSamplerModule:
    sampler = Chains(rounds=1)
    return GuidedSamplerModule(
        reward or Regex("the"), sampler, base_lm, lam=1.0, compare_base=False, **options
    )


def predict(
    folder: Path,
    module: GuidedSamplerModule,
    n_texts: int,
    devices: int,
    prompts: list[str] | None = None,
) -> None:
    """Every text a batch of its own."""
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False,
        inference_mode=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[PredictionWriter(str(folder), n_shown=0)],
    )  # fmt: skip
    data = PromptData(module.base_lm, prompts, n_texts=n_texts, batch_size=1, max_length=8)
    trainer.predict(module, datamodule=data, return_predictions=False)


def share(module: GuidedSamplerModule) -> float:
    """Of the weights of p_θ's blocks, what this process keeps."""
    weights = list(blocks_of(module.lm.model.base_model).parameters())
    return sum(w.to_local().numel() for w in weights) / sum(w.numel() for w in weights)  # type: ignore[operator]


def main(folder: Path, llama: str) -> None:
    """What each process saw goes to `FOLDER/RANK.json`."""
    seen: dict[str, Any] = {}
    for name, module, n_texts in (
        ("tiny", annealed(shard_base_lm=True), 3),
        ("llama", suffixes(llama, shard_base_lm=True), 1),
    ):
        predict(folder / name, module, n_texts, 2, None if name == "tiny" else PROMPTS)
        seen[name] = share(module)
    # The same module again, with one batch, which leaves the second process without any.
    predict(folder / "single", module, 1, 2)
    given = torch.zeros(1, 3, 16, requires_grad=True)
    try:
        module.lm.model.base_model(inputs_embeds=given)
    except UserError as error:
        seen["gradient"] = str(error)
    try:
        predict(folder / "failed", suffixes(llama, FailsOnTheSecond(), shard_base_lm=True), 3, 2)
    except UserError as error:
        seen["failed"] = str(error)
    (folder / f"{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(seen), encoding="utf-8")
    # Without the farewell of Python's own: as a process ends that was killed.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
