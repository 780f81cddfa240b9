"""Runs the tasks that need no network and writes their figures into docs/tasks.md.

python benchmarks/tasks.py                       (make tasks)
python benchmarks/tasks.py safety_tiny           one of them
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.theory import fill, table

DOC = ROOT / "docs" / "tasks.md"
TASKS = ("safety_tiny", "style_formal_tiny", "style_informal_tiny", "factuality_tiny", "slots_tiny")
# Not figures of the texts: what identifies a run, and what diagnoses the sampler.
LEFT_OUT = {"schema", "complete", "method", "n", "config_hash", "versions", "base", "nfe",
 "bleu_signature", "hacking_reasons",
            "tokenizer", "reasons", "tokens", "flops"}  # fmt: skip


def run(task: str) -> tuple[dict[str, Any], float]:
    """The task's metrics.json, and the seconds that it took from the command to its end."""
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "dia_lightning", "test", "--config", f"configs/tasks/{task}.yaml"],
        cwd=ROOT,
        check=True,
    )
    metrics: dict[str, Any] = json.loads(
        (ROOT / "runs" / task / "metrics.json").read_text(encoding="utf-8")
    )
    return metrics, time.perf_counter() - begin


def rows(metrics: dict[str, Any]) -> list[list[str]]:
    """A row for every figure that both runs have."""
    base = metrics["base"]
    return [
        [key, cell(base[key]), cell(metrics[key])]
        for key in metrics
        if key in base and key not in LEFT_OUT
    ]


def cell(value: Any) -> str:
    if isinstance(value, list):
        return " – ".join(cell(item) for item in value)
    return "–" if value is None else f"{value:.3f}"


def main(tasks: list[str]) -> None:
    for task in tasks or TASKS:
        metrics, seconds = run(task)
        body = table([f"`{task}`", "p_θ (zero-shot)", f"DIA ({metrics['method']})"], rows(metrics))
        body += f"\n\n{metrics['n']} texts each, seed 0, {seconds:.0f} s with start and figures."
        if "bleu_signature" in metrics:
            body += f" BLEU: `{metrics['bleu_signature']}`."
        DOC.write_text(
            fill(DOC.read_text(encoding="utf-8"), f"task-{task}", body), encoding="utf-8"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
