"""Seconds and network calls per step of each exact kernel on the shipped kit, and what the kernel
adds to its networks' time.

    python benchmarks/kernels.py                    (make bench)

Remakes its table in docs/theory.md. The reference is the time spent inside the networks (the
critic's backward pass included) and the reward in the same steps, taken by timers around their
calls; processor time, one thread.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.theory import DOC, fill, table
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.lm.row_cache import RowCache
from dia_lightning.meter import Meter, difference
from dia_lightning.rewards import VaderSentiment
from dia_lightning.samplers import DenoiseAccept, Models, Move, Suffix, Window
from dia_lightning.samplers.networks import load_denoiser, load_value
from dia_lightning.sampling.positions import Spans
from dia_lightning.target import TargetDensity

CHAINS, LENGTH, LAM = 128, 40, 6.0
NETWORKS = ("base_lm", "denoiser", "critic")
KERNELS: dict[str, Move] = {
    "suffix regeneration": Suffix(),
    "denoise-and-accept, span 4, 4 rounds": DenoiseAccept(),
    "denoise-and-accept, span 8, 8 rounds": DenoiseAccept(positions=Spans(8), rounds=8),
    "denoise-and-accept, span 4, 1 round": DenoiseAccept(rounds=1),
    "the same, tilted": DenoiseAccept(rounds=1, tilt=2.0),
    "window of 4 by p_θ, 4 tries": Window(),
}


class Timers:
    """Time spent in calls of the wrapped functions, nested calls once."""

    def __init__(self) -> None:
        self.seconds, self._depth, self._wrapped = 0.0, 0, list[tuple[Any, str, Any]]()

    def wrap(self, owner: Any, name: str) -> None:
        call: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin, self._depth = time.process_time(), self._depth + 1
            try:
                return call(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.process_time() - begin

        self._wrapped.append((owner, name, call))
        setattr(owner, name, timed)

    def restore(self) -> None:
        for owner, name, call in self._wrapped:
            setattr(owner, name, call)


def main(steps: int = 5) -> None:
    torch.set_num_threads(1)
    lm = BaseLM.load("checkpoints/tiny/lm")
    embedding = TokenEmbedding(lm.embedding_table(), len(lm.tokenizer))
    denoiser = load_denoiser("checkpoints/tiny/denoiser", embedding)
    reward = VaderSentiment()
    value = load_value("checkpoints/tiny/critic", embedding, reward.name, LAM)
    generator, timers = torch.Generator().manual_seed(0), Timers()
    tokens = torch.full((CHAINS, LENGTH), lm.end_id)
    begin = lm.generate(tokens, torch.zeros_like(tokens, dtype=torch.bool), generator)
    for owner, name in (
        (RowCache, "read"),
        (lm, "states"),
        (lm, "logits"),
        (denoiser, "hidden"),
        (denoiser, "readout"),
    ):
        timers.wrap(owner, name)
    for owner, name in ((value, "forward"), (reward._analyzer, "polarity_scores"), (lm, "decode")):
        timers.wrap(owner, name)
    timers.wrap(torch.autograd, "grad")  # the critic's backward pass
    meter = Meter()
    meter.watch("base_lm", lm.multiplied())
    for network in (denoiser, value):
        meter.watch_all(network)
    rows, models = [], Models(lm, embedding, denoiser, value, reward, LAM)
    for label, move in KERNELS.items():
        kernel = move.kernel(models, TargetDensity(lm, reward, LAM))
        state: Any = kernel.init(begin)  # type: ignore[attr-defined]
        state, _ = kernel.step(state, generator)
        before = meter.read()
        timers.seconds, started = 0.0, time.process_time()
        for _ in range(steps):
            state, _ = kernel.step(state, generator)
        total = time.process_time() - started
        spent = difference(meter.read(), before)
        asked = [
            f"{spent[name].tokens / steps / CHAINS:.0f}" if name in spent else "0"
            for name in NETWORKS
        ]
        added = 100 * (total / timers.seconds - 1)
        rows.append([label, f"{total / steps:.2f}", *asked, f"{added:.1f} %"])
        print(rows[-1], flush=True)
    positions = ["positions of p_θ", "of the denoiser", "of the critic"]
    head = [
        f"kernel, {CHAINS} chains",
        "processor s a step",
        *positions,
        "added to the networks' time",
    ]
    made = (
        f"Made by `make bench`: {steps} steps, one core (AMD EPYC), float32, texts of up to"
        f" {LENGTH} tokens."
    )
    body = f"{table(head, rows)}\n\n{made}"
    DOC.write_text(fill(DOC.read_text(encoding="utf-8"), "kernels", body), encoding="utf-8")


if __name__ == "__main__":
    main()
