"""Compares all methods on the tiny kit and writes the tables of docs/results.md (make results).

python benchmarks/results.py              run what is missing under runs/results, then write
python benchmarks/results.py --tables     write from what is there
"""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.theory import fill, table
from dia_lightning.reports.results import Estimate, estimate

DOC, OUT = ROOT / "docs" / "results.md", ROOT / "runs" / "results"
STUDIES = ("equal_time", "methods")
Rows = list[dict[str, str]]


def by_method(study: str) -> dict[str, Rows]:
    """The runs of each method, one a seed."""
    methods: dict[str, Rows] = {}
    with (OUT / "results.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["study"] == study:
                methods.setdefault(row["setting/method"], []).append(row)
    return methods


def figure(runs: Rows, name: str, factor: float = 1.0) -> Estimate | None:
    values = [factor * float(run[name]) for run in runs if run.get(name)]
    return estimate(values) if values else None


def cell(found: Estimate | None, digits: int) -> str:
    if found is None:
        return "–"
    return f"{found.mean:.{digits}f} ± {found.half:.{digits}f}" if found.half == found.half else f"{found.mean:.{digits}f}"


def quality(study: str) -> str:
    """What the texts are: mean and half-width of the 95 % interval over the seeds."""
    names = [("reward", 3), ("log_p_per_token", 2), ("distinct_2", 3), ("self_bleu", 0)]
    if study == "equal_time":
        names[1:1] = [("reward_sentiment", 3)]
    rows = [
        [method, *(cell(figure(runs, name), digits) for name, digits in names)] for method, runs in by_method(study).items()
    ]
    head = ["reward", *(["sentiment"] if study == "equal_time" else []), "log p_θ per token (nats)", "distinct-2", "self-BLEU"]
    return table(["method", *head], rows)


def cost(study: str) -> str:
    """What a text costs, means over the seeds."""
    networks = ("base_lm", "denoiser", "critic")
    rows = []
    for method, runs in by_method(study).items():
        policy = figure(runs, "tokens/policy")
        base = policy if policy is not None else figure(runs, "tokens/base_lm")
        positions = [base, *(figure(runs, f"tokens/{name}") for name in networks[1:])]
        rows.append(
            [
                method,
                cell(figure(runs, "seconds_per_text"), 3),
                _mean(figure(runs, "flops_per_text", 1e-9), 2),
                *(_mean(found, 0) for found in positions),
                _mean(figure(runs, "nfe/reward"), 0),
                _mean(figure(runs, "peak_memory_mib"), 0),
            ]
        )
    head = ["seconds", "GFLOP", "positions of p_θ (or policy)", "of the denoiser", "of the critic", "rewards", "peak MiB"]
    return table(["method, for one text", *head], rows)


def _mean(found: Estimate | None, digits: int) -> str:
    return "–" if found is None else f"{found.mean:,.{digits}f}"


def main(only_tables: bool) -> None:
    if not only_tables:
        files = [f"configs/comparison/{study}.yaml" for study in STUDIES]
        subprocess.run([sys.executable, "-m", "dia_lightning", "study", *files, "--out", str(OUT)], cwd=ROOT, check=False)
    text = DOC.read_text(encoding="utf-8")
    for study in STUDIES:
        text = fill(text, f"results-{study}", f"{quality(study)}\n\n{cost(study)}")
    DOC.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main("--tables" in sys.argv[1:])
