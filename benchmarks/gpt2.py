"""GPT-2 small's configurations on random weights of its shape: a step's memory and seconds here;
what fits a GPU, on paper.

    python benchmarks/gpt2.py                    (make gpt2; 10 minutes, 8 GiB)

Remakes two tables of docs/scaling.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lightning as L
import torch
import yaml
from torch import Tensor

from benchmarks.scaling import DOC, trained_parameters
from benchmarks.theory import fill, table
from dia_lightning.data.text import train_tokenizer
from dia_lightning.diffusion import loss, trunk
from dia_lightning.meter import peak_memory_mib, reset_peak_memory
from dia_lightning.rewards import Regex
from dia_lightning.training import AdamW, CriticModule, DenoiserModule, Network, Noising

# Everything on a GPU but what grows with the rows; bytes.
WEIGHT = {
    "weights": 4,
    "gradients": 4,
    "Adam's moments": 8,
    "their average (WeightEMA)": 4,
    "DDP's buckets": 4,
    "bf16 copies": 2,
}
LOGITS = (
    6 * 4 * (1 << 25)
)  # one chunk of `loss.summed`, forward and backward: about six tensors of float32
# A tenth is left to the allocator and to CUDA itself.
GPUS = {"24 GB": 0.9 * 24e9, "80 GB": 0.9 * 80e9}


class Steps(L.Callback):
    """Prints seconds of a batch after the first, and the largest memory of the process
    meanwhile.
    """

    def __init__(self) -> None:
        self.began, self.seconds = 0.0, list[float]()

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if not self.seconds:
            reset_peak_memory(module.device)
        self.began = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        print(
            json.dumps(
                {"seconds": median(self.seconds[1:]), "gib": peak_memory_mib(module.device) / 1024}
            )
        )

    on_predict_batch_start, on_predict_batch_end, on_predict_end = (
        on_train_batch_start,
        on_train_batch_end,
        on_train_end,
    )


def random_gpt2(folder: Path, texts: list[str]) -> None:
    """`folder`/gpt2: random weights of GPT-2 small's shape, and a small tokenizer, so that most
    ids name nothing.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = train_tokenizer(texts, 400)
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    GPT2LMHeadModel(GPT2Config(bos_token_id=end, eos_token_id=end)).save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")


def options_of(stem: str) -> dict[str, Any]:
    options: dict[str, Any] = yaml.safe_load(
        (ROOT / f"configs/{stem}.yaml").read_text(encoding="utf-8")
    )["model"]["init_args"]
    parts = {"network": Network, "noising": Noising, "optimizer": AdamW}
    return {k: parts[k](**value) if k in parts else value for k, value in options.items()}


def made(stem: str, folder: Path) -> Any:
    """The module of a configuration, on the folder's weights."""
    options = {**options_of(stem), "base_lm": str(folder / "gpt2")}
    if stem == "ddpm_gpt2":
        return DenoiserModule(**options)
    return CriticModule(**{**options, "reward": Regex("a"), "denoiser": None})


def kept_bytes(module: Any, rows: int) -> int:
    """What a step with `rows` rows, every position noised, keeps for its backward pass under
    bf16-mixed.
    """
    tokens = torch.zeros(rows, module.max_length, dtype=torch.int64)
    t = torch.full(tokens.shape, 0.5)
    noised = loss.Noised(module.embedding(tokens), t, t > 0)
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(note, lambda x: x),
    ):
        if isinstance(module, DenoiserModule):
            made = module.network.hidden(noised.z, noised.t)[0]
        else:
            made = module.network.standardised(noised.z, noised.t)
    assert made.requires_grad
    # `loss.summed` keeps the states that it reads out, and their gradient.
    return sum(kept.values()) + (2 * made.nbytes if isinstance(module, DenoiserModule) else 0)


def computed(folder: Path) -> str:
    """Rows of a step that fit. On a GPU attention keeps no matrix of weights."""
    attend, trunk.attend = trunk.attend, torch.nn.functional.scaled_dot_product_attention
    rows = []
    try:
        for stem in ("ddpm_gpt2", "critic_gpt2"):
            module = made(stem, folder)
            table_bytes = module.embedding.weight.nbytes
            fixed = sum(WEIGHT.values()) * trained_parameters(module.network) + 2 * table_bytes
            if stem == "ddpm_gpt2":
                # The head's gradient is there three times: of one chunk, of all of them, of the
                # steps before.
                fixed += LOGITS + 2 * module.network.head.weight.nbytes
                fixed += 4 * sum(
                    p.numel() for p in module.lm.model.parameters()
                )  # UnguidedSamples asks p_θ
            kept = []
            for module.network.trunk.checkpointed in (False, True):
                kept.append((kept_bytes(module, 4) - kept_bytes(module, 2)) / 2)
            # In the backward pass one block's gradients are there too, and all of a block that runs
            # again.
            block = kept[0] / module.network.size.layers
            for label, row in (
                ("", kept[0] + block),
                (", activation_checkpointing", kept[1] + 2 * block),
            ):
                fit = [str(int((limit - fixed) / row) // 8 * 8) for limit in GPUS.values()]
                rows.append(
                    [f"`{stem}`{label}", f"{fixed / 1e9:.1f} GB", f"{row / 1e6:.0f} MB", *fit]
                )
    finally:
        trunk.attend = attend
    return table(
        ["computed, not measured", "without rows", "each row", *(f"rows in {gpu}" for gpu in GPUS)],
        rows,
    )


def works() -> dict[str, list[str]]:
    """What is measured, and its command."""
    fit = [
        "--data.n_texts=64",
        "--data.n_val=8",
        "--data.shard_size=8",
        "--trainer.max_steps=3",
        "--trainer.logger=false",
    ]
    fit += ["--trainer.limit_val_batches=0", "--trainer.enable_checkpointing=false"]
    reward = ["--model.reward=dia_lightning.rewards.Regex", r"--model.reward.pattern=\S"]
    found = {}
    for n in (4, 16):
        found[f"`ddpm_gpt2`, a step of {n} rows"] = ["fit", "ddpm", *fit, f"--data.batch_size={n}"]
        found[f"`critic_gpt2`, a step of {n} rows"] = [
            "fit",
            "critic",
            *fit,
            *reward,
            f"--data.batch_size={n}",
        ]
    for n in (2, 8):
        few = [f"--data.n_texts={2 * n}", f"--data.batch_size={n}", "--model.compare_base=false"]
        found[f"`dia_gpt2`, a batch of {n} texts"] = ["predict", "dia", *few, *reward]
    return found


def measure(folder: Path, command: str, stem: str, *options: str) -> dict[str, float]:
    """`seconds` and `gib`, see `Steps`."""
    arguments = [command, "--config", f"configs/{stem}_gpt2.yaml", *options]
    arguments += [
        "--allow=benchmarks",
        "--trainer.callbacks=benchmarks.gpt2.Steps",
        "--trainer.enable_progress_bar=false",
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-m", "dia_lightning", *arguments]
    ended = subprocess.run(
        program, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, float] = json.loads(
        next(line for line in ended.stdout.splitlines() if line.startswith("{"))
    )
    return found


def measured(folder: Path) -> str:
    rows = []
    for label, work in works().items():
        found = measure(folder, *work)
        rows.append([label, f"{found['seconds']:.1f} s", f"{found['gib']:.1f} GiB"])
        print(rows[-1], flush=True)
    made = (
        f"Made by `make gpt2` on {os.cpu_count()} CPU cores, no GPU; random weights, rows and texts"
        " of up to 64 tokens."
    )
    return f"{table(['measured', 'time', 'memory of the process'], rows)}\n\n{made}"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_gpt2(folder, [line for line in DOC.read_text(encoding="utf-8").splitlines() if line])
        for stem, export in (("ddpm_gpt2", "denoiser"), ("critic_gpt2", "critic")):
            made(stem, folder).export(folder / "runs" / stem / export)
        for marker, part in (("gpt2-memory", computed), ("gpt2-measured", measured)):
            body = part(folder)  # minutes, in which the document may change
            DOC.write_text(fill(DOC.read_text(encoding="utf-8"), marker, body), encoding="utf-8")


if __name__ == "__main__":
    main()
