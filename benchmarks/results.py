"""Compares all methods on the tiny kit and writes the tables of docs/results.md (make results).

python benchmarks/results.py              run what is missing under runs/results, then write python
benchmarks/results.py --tables     write from what is there python benchmarks/results.py --smollm2
the same for SmolLM2, with ten texts of each method, under runs/results_smollm2
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.theory import fill, table
from dia_lightning.lab.report.results import Estimate, estimate
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.rewards import Perplexity, VaderSentiment, WeightedSum

DOC, RUNS = ROOT / "docs" / "results.md", ROOT / "runs"
STUDIES = {"results": ("equal_time", "methods"), "results_smollm2": ("smollm2",)}
PARTS = {"equal_time": ("sentiment",), "methods": (), "smollm2": ("sentiment", "toxicity")}
Rows = list[dict[str, str]]


def folder_of(study: str) -> Path:
    """Where the study's runs are."""
    return next(RUNS / folder for folder, studies in STUDIES.items() if study in studies)


def by_method(study: str) -> dict[str, Rows]:
    """The runs of each method, one a seed."""
    methods: dict[str, Rows] = {}
    with (folder_of(study) / "results.csv").open(encoding="utf-8", newline="") as file:
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
    return (
        f"{found.mean:.{digits}f} ± {found.half:.{digits}f}"
        if found.half == found.half
        else f"{found.mean:.{digits}f}"
    )


def quality(study: str) -> str:
    """What the texts are: mean and half-width of the 95 % interval over the seeds."""
    names = [("reward", 3), ("log_p_per_token", 2), ("distinct_2", 3), ("self_bleu", 0)]
    names[1:1] = [(f"reward_{part}", 3) for part in PARTS[study]]
    rows = [
        [method, *(cell(figure(runs, name), digits) for name, digits in names)]
        for method, runs in by_method(study).items()
    ]
    if study == "equal_time":
        rewards = base_rewards()
        for row, runs in zip(rows, by_method(study).values(), strict=True):
            reached = figure(runs, "reward")
            assert reached is not None
            row.append(f"{100 * float((rewards >= reached.mean).float().mean()):.2f} %")
    head = ["reward", *PARTS[study], "log p_θ per token (nats)", "distinct-2", "self-BLEU"]
    return table(
        [
            "method",
            *head,
            *(["p_θ's texts of that reward and more"] if study == "equal_time" else []),
        ],
        rows,
    )


def base_rewards(n: int = 20_000) -> torch.Tensor:
    """The rewards (n,) of the study `equal_time` for texts of p_θ."""
    lm = BaseLM.load("checkpoints/tiny/lm")
    reward = WeightedSum([VaderSentiment(), Perplexity("checkpoints/tiny/lm")], [1.0, 0.2])
    generator, rewards = torch.Generator().manual_seed(12345), []
    for _ in range(n // 1000):
        rows = torch.full((1000, 40), lm.end_id)
        free = torch.zeros_like(rows, dtype=torch.bool)
        texts = lm.decode(lm.generate(rows, free, generator), free)
        rewards.append(reward([text.strip() for text in texts]))
    return torch.cat(rewards)


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
    head = [
        "seconds",
        "GFLOP",
        "positions of p_θ (or policy)",
        "of the denoiser",
        "of the critic",
        "rewards",
        "peak MiB",
    ]
    return table(["method, for one text", *head], rows)


def _mean(found: Estimate | None, digits: int) -> str:
    return "–" if found is None else f"{found.mean:,.{digits}f}"


def examples(study: str, n: int = 10) -> str:
    """The first texts of each method's first run, unedited."""
    blocks = []
    for method, runs in by_method(study).items():
        lines = (
            (Path(runs[0]["folder"]) / "predictions.jsonl")
            .read_text(encoding="utf-8")
            .splitlines()[:n]
        )
        items = [f"- {json.dumps(json.loads(line)['text'], ensure_ascii=False)}" for line in lines]
        blocks.append("\n".join([f"**{method}**", "", *items]))
    return "\n\n".join(blocks)


def main(folder: str, only_tables: bool) -> None:
    if not only_tables:
        files = [f"configs/comparison/{study}.yaml" for study in STUDIES[folder]]
        arguments = ["study", *files, "--out", str(RUNS / folder)]
        subprocess.run([sys.executable, "-m", "dia_lightning", *arguments], cwd=ROOT, check=False)
    text = DOC.read_text(encoding="utf-8")
    for study in STUDIES[folder]:
        text = fill(text, f"results-{study}", f"{quality(study)}\n\n{cost(study)}")
    if folder == "results_smollm2":
        text = fill(text, "texts-smollm2", examples("smollm2"))
    DOC.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(
        "results_smollm2" if "--smollm2" in sys.argv[1:] else "results", "--tables" in sys.argv[1:]
    )
