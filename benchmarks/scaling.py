"""How fast one and two processes draw samples, train and sample on this machine; and what many GPUs
send, on paper.

    python benchmarks/scaling.py                    (make scaling; 10 minutes)
    python benchmarks/scaling.py --repeats 1        quicker, and rougher

Remakes the tables of docs/scaling.md. Each process has one thread and the same work, whatever their
number; one and two processes take turns, so that another load on the machine meets both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lightning as L
import torch
import yaml

from benchmarks.theory import fill, table
from dia_lightning.data import ModelSamples, PromptData
from dia_lightning.diffusion.denoiser import DenoiserNetwork
from dia_lightning.diffusion.schedule import make_schedule
from dia_lightning.diffusion.trunk import NetworkSize
from dia_lightning.meter import weights_of
from dia_lightning.rewards import VaderSentiment
from dia_lightning.samplers import GuidedSamplerModule
from dia_lightning.training import DenoiserModule, Network

DOC = ROOT / "docs" / "scaling.md"
WORKS = {
    "drawing": "drawing the cache, texts/s",
    "training": "training, rows/s",
    "sampling": "`predict`, texts/s",
}
SIZE = {"steps": 40, "texts": 960, "batches": 4, "batch": 16}  # for each process
# An H100: 40 % of its dense bf16 peak; NVLink in one direction; a network adapter of 400 Gb/s for
# each node of 8.
FLOPS, NVLINK, NETWORK = 0.4 * 989e12, 450e9, 50e9


class Clock(L.Callback):
    """Seconds from the start of batch `first` to the end, of all processes together."""

    def __init__(self, first: int) -> None:
        self.first, self.began, self.seconds, self.n_batches = first, 0.0, 0.0, 0

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if batch_idx == self.first and not self.began:
            trainer.strategy.barrier()
            self.began, self.n_batches = time.perf_counter(), 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.n_batches += 1

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        trainer.strategy.barrier()
        self.seconds = time.perf_counter() - self.began

    on_predict_batch_start = on_train_batch_start
    on_predict_batch_end, on_predict_end = on_train_batch_end, on_train_end


class TimedSamples(ModelSamples):
    seconds = 0.0

    def setup(self, stage: str) -> None:
        begin = time.perf_counter()
        super().setup(stage)
        self.seconds = time.perf_counter() - begin


def work(kind: str, processes: int, folder: Path) -> dict[str, float]:
    """Rows or texts a second, in one of the `processes` that Lightning starts."""
    torch.set_num_threads(1)
    clock = Clock(first=1)
    trainer = L.Trainer(
        accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto",
        callbacks=[clock], max_steps=SIZE["steps"], limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    if kind == "fit":
        n, n_val = SIZE["texts"] * processes, 64 * processes
        data = TimedSamples(n_texts=n, n_val=n_val, cache=str(folder), shard_size=64)
        trainer.fit(DenoiserModule(), datamodule=data)
        rows = clock.n_batches * data.batch_size * processes
        return {
            "drawing": data.n_shards * data.shard_size / data.seconds,
            "training": rows / clock.seconds,
        }
    prompts = PromptData(
        n_texts=SIZE["batches"] * SIZE["batch"] * processes, batch_size=SIZE["batch"]
    )
    module = GuidedSamplerModule(VaderSentiment(), compare_base=False)
    trainer.predict(module, datamodule=prompts, return_predictions=False)
    return {"sampling": clock.n_batches * prompts.batch_size * processes / clock.seconds}


def measure(repeats: int) -> str:
    found: dict[tuple[str, int], list[float]] = {}
    for _, kind, processes in product(range(repeats), ("fit", "predict"), (1, 2)):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--work", kind, str(processes), folder]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            ended = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
        line = next(line for line in ended.stdout.splitlines() if line.startswith("{"))
        print(f"{kind}, processes: {processes}: {line}", flush=True)
        for name, rate in json.loads(line).items():
            found.setdefault((name, processes), []).append(rate)
    rows = []
    for name, label in WORKS.items():
        one, two = median(found[name, 1]), median(found[name, 2])
        rows.append([label, f"{one:.1f}", f"{two:.1f}", f"{two / one:.2f}"])
    made = (
        f"Median of {repeats}, made by `make scaling` on {os.cpu_count()} CPU cores, one thread a"
        " process, no GPU."
    )
    return f"{table(['tiny kit', '1 process', '2 processes', 'ratio'], rows)}\n\n{made}"


def network_of(options: dict[str, Any]) -> DenoiserNetwork:
    """The denoiser of a configuration as a shape without weights."""
    from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

    size = Network(**options.get("network", {})).size.as_dict()
    with torch.device("meta"):
        model, vocab = None, GPT2Config().vocab_size
        if size.get("adapter_rank"):  # SmolLM2-135M
            config = LlamaConfig(
                vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
            )  # fmt: skip
            model, vocab = LlamaForCausalLM(config), config.vocab_size
        table_of = SimpleNamespace(
            dim=size["width"], vocab_size=vocab, weight=torch.empty(vocab, size["width"])
        )
        return DenoiserNetwork(table_of, make_schedule("cosine"), NetworkSize(**size), model=model)  # type: ignore[arg-type]


def trained_parameters(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def flops_of_step(network: DenoiserNetwork, rows: int, self_condition: int) -> float:
    """2 for each multiply–add of a weight matrix: forward, backward for the inputs and for what is
    trained; every `self_condition`-th batch has a pass forward more.
    """
    trunk, head, embedding = (
        weights_of(network.trunk),
        weights_of(network.head),
        network.embedding.weight.numel(),
    )
    learnt = sum(p.numel() for p in network.parameters() if p.requires_grad and p.ndim == 2)
    forward = trunk + head + embedding
    return (
        2.0
        * rows
        * network.size.max_length
        * (forward * (1 + 1 / self_condition) + trunk + head + learnt)
    )


def ring_seconds(n: int, size: float, speed: float) -> float:
    """A ring all-reduce: each process sends 2 (n − 1)/n of the bytes."""
    return 2 * (n - 1) / n * size / speed


def communication() -> str:
    rows = []
    for stem, batches in (("ddpm_gpt2", (64, 512)), ("ddpm_smollm2", (16, 256))):
        options = yaml.safe_load((ROOT / f"configs/{stem}.yaml").read_text(encoding="utf-8"))[
            "model"
        ]["init_args"]
        network = network_of(options)
        n = trained_parameters(network)
        for batch in batches:
            compute = flops_of_step(network, batch, options.get("self_condition", 2)) / FLOPS
            sends = [ring_seconds(8, 4 * n, NVLINK), ring_seconds(64, 4 * n, NETWORK)]
            shares = [f"{1e3 * s:.2f} ms, {100 * s / compute:.0f} %" for s in sends]
            rows.append(
                [
                    f"`{stem}`, {batch} rows",
                    f"{n / 1e6:.1f} M",
                    f"{4 * n / 1e6:.0f} MB",
                    f"{1e3 * compute:.1f} ms",
                    *shares,
                ]
            )
    head = [
        "rows a GPU and step",
        "trained",
        "gradients",
        "compute",
        "all-reduce, 8 GPUs",
        "all-reduce, 64 GPUs",
    ]
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        rates = work(given.work[0], int(given.work[1]), Path(given.work[2]))
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(json.dumps(rates))
        return
    for name, body in (("communication", communication()), ("measured", measure(given.repeats))):
        DOC.write_text(fill(DOC.read_text(encoding="utf-8"), name, body), encoding="utf-8")


if __name__ == "__main__":
    main()
