"""What this package adds to what it is made of: ratios, each against a named reference in the same
run (make bench).

    python benchmarks/speed.py                      every line of the table in docs/performance.md
    python benchmarks/speed.py predict fit          these only; the others keep what they say

Both sides take turns on one thread, so that another load on the machine meets both; the median of
the pairs' ratios counts.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels import Timers
from benchmarks.theory import fill, table
from dia_lightning import target
from dia_lightning.callbacks import PredictionWriter, writer
from dia_lightning.data import ModelSamples, PromptData
from dia_lightning.diffusion.denoiser import DenoiserNetwork
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.loss import LOSSES, summed
from dia_lightning.diffusion.schedule import make_schedule
from dia_lightning.diffusion.trunk import NetworkSize
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.metrics.functional import self_bleu
from dia_lightning.rewards import VaderSentiment
from dia_lightning.samplers import Ancestral, Diffusion, GuidedSamplerModule
from dia_lightning.samplers import module as sampler_module
from dia_lightning.training import CriticModule, DenoiserModule

DOC, STORE = ROOT / "docs" / "performance.md", ROOT / "runs" / "bench.json"
Found = dict[str, list[str]]
"""Line of the table: reference, goal, measured."""


class Clock(L.Callback):
    """Seconds of all steps of a `fit` but the first two."""

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 2:
            self.began = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.seconds = time.perf_counter() - self.began


def seconds(run: Callable[[], Any]) -> float:
    """What it says it took, or what it took."""
    begin = time.perf_counter()
    said = run()
    return said if isinstance(said, float) else time.perf_counter() - begin


def ratio(ours: Callable[[], Any], reference: Callable[[], Any], pairs: int = 5) -> str:
    """Median of the ratios of `pairs` pairs, and their range, after one of each that does not
    count.
    """
    ours(), reference()
    found = sorted(seconds(ours) / seconds(reference) for _ in range(pairs))
    return f"{statistics.median(found):.2f} × ({found[0]:.2f} to {found[-1]:.2f})"


def trainer(**options: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, **options,
    )  # fmt: skip


def prompts(**given: Any) -> PromptData:
    """Data of these options, ready without a trainer."""
    data = PromptData(**given)
    data.trainer = None
    data.setup("predict")
    return data


def predict() -> Found:
    """`predict` with its files and metrics against the drawing alone."""
    module = GuidedSamplerModule(VaderSentiment(), lam=8.0, compare_base=False)
    given: dict[str, Any] = {
        "base_lm": "checkpoints/tiny/lm",
        "n_texts": 128,
        "batch_size": 64,
        "max_length": 40,
    }
    data = prompts(**given)

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            trainer(callbacks=[PredictionWriter(folder, n_shown=0)]).predict(
                module, PromptData(**given)
            )

    def bare() -> None:
        with torch.inference_mode():
            for i in range(2):
                module.draw(data.batch(i), torch.Generator().manual_seed(2 * i))

    return {
        "`predict`, per text": [
            "the same sampler's steps alone, without Lightning, metrics, files",
            "≤ 1.05 ×",
            ratio(ours, bare, 3),
        ]
    }


def text_work() -> Found:
    """What tokenisation, decoding, the reward's caller and the metrics take of a run like `make
    demo`; of processor time.
    """
    module = GuidedSamplerModule(VaderSentiment(), lam=8.0)
    timers, reward = Timers(), Timers()
    reward.wrap(module.reward._analyzer, "polarity_scores")  # type: ignore[attr-defined]
    for name in ("decode", "encode"):
        timers.wrap(BaseLM, name)
    for part in (target, sampler_module):
        timers.wrap(part, "call_reward")
    timers.wrap(writer, "compute_metrics")
    try:
        with tempfile.TemporaryDirectory() as folder:
            begin = time.process_time()
            data = PromptData(
                base_lm="checkpoints/tiny/lm", n_texts=256, batch_size=64, max_length=40
            )
            trainer(callbacks=[PredictionWriter(folder, n_shown=0)]).predict(module, data)
            whole = time.process_time() - begin
    finally:
        timers.restore(), reward.restore()
    found = (
        f"{100 * (timers.seconds - reward.seconds) / whole:.1f} % (VADER itself:"
        f" {100 * reward.seconds / whole:.1f} %)"
    )
    return {
        "tokenisation, decoding, reward batching, distinct-n and self-BLEU": [
            "the demo's time",
            "< 3 %",
            found,
        ]
    }


def fit(steps: int = 26) -> Found:
    """Training through Lightning against the same loss in a bare loop."""
    found = {}
    for name, make in (
        ("denoiser", DenoiserModule),
        ("critic", lambda **o: CriticModule(VaderSentiment(), **o)),
    ):
        data = ModelSamples(
            "checkpoints/tiny/lm", n_texts=4096, n_val=64, max_length=40, batch_size=64
        )
        module: Any = make(base_lm="checkpoints/tiny/lm")
        data.prepare_data()
        data.setup("fit")
        rows = data.train_rows
        batches = [rows[list(range(64 * i, 64 * i + 64))] for i in range(steps)]
        optimizer = torch.optim.AdamW(module.network.parameters(), lr=1e-4)

        def ours(module: Any = module, data: Any = data) -> float:
            clock = Clock()
            options = {"limit_val_batches": 0, "num_sanity_val_steps": 0, "gradient_clip_val": 1.0}
            trainer(max_steps=steps, callbacks=[clock], **options).fit(module, data)
            return clock.seconds

        def bare(module: Any = module, batches: Any = batches, optimizer: Any = optimizer) -> None:
            for k, batch in enumerate(batches[2:], 2):
                loss = _loss(module, batch, k)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(module.network.parameters(), 1.0)
                optimizer.step()

        found[f"`fit` step, {name}"] = [
            "the same network, noise and loss in a bare loop",
            "≤ 1.05 ×",
            ratio(ours, bare, 3),
        ]
    return found


def _loss(module: Any, batch: dict[str, Tensor], k: int) -> Tensor:
    noised = module.noised(batch, k)
    if isinstance(module, DenoiserModule):
        total, values, _ = module.losses(batch["tokens"], noised, k % 2 == 1)
        return total / len(values)
    return F.mse_loss(module.network.standardised(noised.z, noised.t), module._targets(batch))


def sampling() -> Found:
    """Drawing from p_θ against transformers' `generate` with a cache."""
    lm, n = BaseLM.load("checkpoints/tiny/lm"), 256
    tokens = torch.full((n, 40), lm.end_id)
    start, free = torch.full((n, 1), lm.bos_id), torch.zeros_like(tokens, dtype=torch.bool)

    def reference() -> None:
        lm.model.generate(
            start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0,
            max_new_tokens=40, use_cache=True, pad_token_id=lm.end_id, eos_token_id=lm.end_id,
        )  # fmt: skip

    found = ratio(lambda: lm.generate(tokens, free, torch.Generator().manual_seed(0)), reference)
    return {
        "samples of p_θ for `ModelSamples`": [
            "transformers' `generate` with a cache, same batch of 256",
            "≤ 0.7 ×",
            found,
        ]
    }


def bleu(n: int = 2000) -> Found:
    """Self-BLEU of many texts against nltk text by text; equal first."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    lm = BaseLM.load("checkpoints/tiny/lm")
    tokens = torch.full((n, 40), lm.end_id)
    free = torch.zeros_like(tokens, dtype=torch.bool)
    texts = [
        text.strip()
        for text in lm.decode(lm.generate(tokens, free, torch.Generator().manual_seed(0)), free)
    ]
    ours = seconds(lambda: self_bleu(texts))
    some, words = 20, [text.split() for text in texts]
    smooth = SmoothingFunction().method1
    theirs = seconds(
        lambda: [
            sentence_bleu(words[:i] + words[i + 1 :], words[i], smoothing_function=smooth)
            for i in range(some)
        ]
    )
    found = f"{theirs / some * n / ours:,.0f} × faster (nltk's time from {some} of the texts)"
    return {
        f"self-BLEU of {n:,} texts": ["nltk's `sentence_bleu` per text", "≥ 100 × faster", found]
    }


def first_text() -> Found:
    """The command's start against importing what it is made of."""
    with tempfile.TemporaryDirectory() as folder:
        shown = [
            "--data.n_texts",
            "1",
            "--model.sampler.particles",
            "1",
            "--model.compare_base",
            "false",
        ]
        writes = [
            "--trainer.default_root_dir",
            folder,
            "--trainer.callbacks.init_args.folder",
            f"{folder}/x",
        ]
        command = [sys.executable, "-m", "dia_lightning", "predict", *shown, *writes]
        runs = iter(range(100))

        def ours() -> None:
            subprocess.run(
                [*command[:-1], f"{folder}/{next(runs)}"], cwd=ROOT, check=True, capture_output=True
            )

        def reference() -> None:
            subprocess.run(
                [sys.executable, "-c", "import torch, transformers"], cwd=ROOT, check=True
            )

        return {
            "first text of `lightning predict`, tiny kit": [
                '`python -c "import torch, transformers"`',
                "≤ 2 ×",
                ratio(ours, reference),
            ]
        }


def big_vocabulary() -> Found:
    """The chunked loss against plain cross-entropy on all logits, each in a process of its own
    for its peak memory.
    """
    told = {}
    for side in ("chunked", "plain"):
        code = f"from benchmarks.speed import big_loss; big_loss({side!r})"
        out = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout
        told[side] = json.loads(out)
    memory, took = (told["chunked"][k] / told["plain"][k] for k in ("mib", "seconds"))
    reference = "`cross_entropy` on full logits"
    return {
        "loss with V = 50,257, B·T = 4,096": [
            reference,
            "≤ 0.35 × memory, ≤ 1.15 × time",
            f"{memory:.2f} × memory, {took:.2f} × time",
        ]
    }


def big_loss(side: str, vocabulary: int = 50_257, width: int = 128, rows: int = 4096) -> None:
    """Print the seconds of a forward and backward pass, and the memory that it needed over what
    was there before.
    """
    from dia_lightning.meter import peak_memory_mib, reset_peak_memory

    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = DenoiserNetwork(
        TokenEmbedding(torch.randn(vocabulary, width)),
        make_schedule("cosine"),
        NetworkSize(width, 1, 4, 64),
    )
    hidden = torch.randn(rows, width, requires_grad=True)
    query, targets = torch.randn(rows, width), torch.randint(vocabulary, (rows,))
    device, took = torch.device("cpu"), []
    network.head.weight.grad, network.head.bias.grad = (
        torch.zeros_like(network.head.weight),
        torch.zeros(vocabulary),
    )
    reset_peak_memory(device)
    before = peak_memory_mib(device)
    for _ in range(3):
        begin = time.perf_counter()
        if side == "chunked":
            loss = summed(LOSSES["ce"], network, hidden, query, targets, torch.ones(rows))[0] / rows
        else:
            loss = F.cross_entropy(network.readout(hidden, query), targets)
        loss.backward()
        took.append(time.perf_counter() - begin)
    print(json.dumps({"seconds": min(took), "mib": peak_memory_mib(device) - before}))


def growth() -> Found:
    """Exponents of the sampler's time in its sizes: slope between the ends of log time over log
    size.
    """
    module = GuidedSamplerModule(
        VaderSentiment(), Diffusion(Ancestral()), lam=0.0, compare_base=False
    )
    found = []
    for name, sizes in (("steps", (16, 64, 256)), ("T", (10, 20, 39)), ("batch", (8, 64, 512))):
        took = []
        for size in sizes:
            options = {"steps": 16, "T": 32, "batch": 16} | {name: size}
            module.sampler = Diffusion(Ancestral(), steps=options["steps"])
            n, length = options["batch"], options["T"]
            data = prompts(
                base_lm="checkpoints/tiny/lm", n_texts=n, batch_size=n, max_length=length
            )
            run = lambda data=data: module.draw(data.batch(0), torch.Generator().manual_seed(0))  # noqa: E731
            run()
            took.append(min(seconds(run) for _ in range(2)))
        slope = torch.tensor(took[-1] / took[0]).log() / torch.tensor(sizes[-1] / sizes[0]).log()
        found.append(f"{name} {sizes[0]} to {sizes[-1]}: {float(slope):.2f}")
    found.append(f"memory of 1,000 steps over that of 100: {_growth_of_memory(module):+.1f} MiB")
    return {
        "time of `ancestral`, exponent in": [
            "itself at the smallest size",
            "1 in steps",
            "; ".join(found),
        ]
    }


def _growth_of_memory(module: GuidedSamplerModule) -> float:
    """MiB by which the process's peak rises with 900 more steps."""
    from dia_lightning.meter import peak_memory_mib, reset_peak_memory

    data = prompts(base_lm="checkpoints/tiny/lm", n_texts=8, batch_size=8, max_length=32)
    peaks, device = list[float](), torch.device("cpu")
    for steps in (100, 100, 1000):
        module.sampler = Diffusion(Ancestral(), steps=steps)
        reset_peak_memory(device)
        module.draw(data.batch(0), torch.Generator().manual_seed(0))
        peaks.append(peak_memory_mib(device))
    return peaks[2] - peaks[1]


CASES = {
    "predict": predict, "text_work": text_work, "fit": fit, "sampling": sampling, "bleu": bleu,
    "first_text": first_text, "loss": big_vocabulary, "growth": growth,
}  # fmt: skip


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    known: Found = json.loads(STORE.read_text(encoding="utf-8")) if STORE.exists() else {}
    for name in names or CASES:
        for line, content in CASES[name]().items():
            known[line] = content
            print(line, content, flush=True)
            STORE.parent.mkdir(exist_ok=True)
            STORE.write_text(json.dumps(known), encoding="utf-8")
    body = table(
        ["what", "reference", "goal", "measured"],
        [[line, *content] for line, content in known.items()],
    )
    DOC.write_text(fill(DOC.read_text(encoding="utf-8"), "bench", body), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
