"""Results as studies leave them: figures of plausible size, texts, and one failed run."""

import json
import random
from pathlib import Path
from typing import Any

from dia_lightning.lab.report.results import CellResult, Study

WORDS = [
    "The",
    "Punter",
    "is",
    "a",
    "cheap",
    "family",
    "friendly",
    "pub",
    "near",
    "Café",
    "Adriatic",
    "in",
    "the",
    "riverside",
    "area",
    "that",
    "serves",
    "fine",
    "Italian",
    "food",
]
METHODS = {  # reward, nats below p_θ, distinct-2, FLOPs of p_θ per text
    "zero-shot": (0.20, 0.0, 0.271, 1.2e8),
    "best-of-4": (0.42, 0.05, 0.270, 4.8e8),
    "best-of-16": (0.55, 0.09, 0.266, 1.9e9),
    "guided decoding": (0.50, 0.31, 0.220, 9e8),
    "SMC": (0.47, 0.28, 0.251, 3.1e9),
    "twisted SMC": (0.56, 0.15, 0.262, 2.2e9),
    "PPO": (0.63, 0.42, 0.150, 1.2e8),
    "DIA": (0.46, 0.37, 0.240, 2.6e9),
    "annealed": (0.605, 0.226, 0.269, 2.0e9),
}


def figures(
    reward: float, drop: float, distinct: float, flops: float, noise: random.Random, moves: bool
) -> dict[str, Any]:
    reward += noise.gauss(0, 0.012)
    log_p = -1.274 - drop + noise.gauss(0, 0.012)
    return {
        "n": 256,
        "reward": reward,
        "reward_sentiment": reward,
        "reward_std": 0.2,
        "perplexity": 2.718281828**-log_p,
        "log_p_per_token": log_p,
        "distinct_1": 0.08,
        "distinct_2": distinct + noise.gauss(0, 0.003),
        "distinct_3": 0.46,
        "distinct_4": 0.62,
        "self_bleu": 140 - 250 * distinct + noise.gauss(0, 0.6),
        "latency_s_per_100_tokens": flops / 3e9,
        "seconds_per_text": flops / 1.3e10 * (1 + 0.1 * noise.random()),
        "flops_per_text": flops * 1.05,
        "nfe": {"base_lm": flops / 3e6, "reward": 4.0, **({"denoiser": 84.0} if moves else {})},
        "tokens": {"base_lm": flops / 3e6, **({"denoiser": 3360.0} if moves else {})},
        "flops": {"base_lm": flops, **({"denoiser": flops * 0.05} if moves else {})},
        "peak_memory_mib": 610.0,
        "training": {},
        **(
            {
                "accept_rate": 0.43,
                "accept_suffix": 0.51,
                "log_z": 3.67,
                "ess": 0.5 + 0.1 * noise.random(),
                "by_prompt": [
                    {"prompt": "", "n": 128, "reward": reward, "unique_texts": 0.912, "ess": 0.1},
                    {"prompt": "<b>x", "n": 128, "reward": 0.0, "unique_texts": 0.123, "ess": None},
                ],
            }
            if moves
            else {}
        ),
        "hacking_rate": 0.03 + 0.4 * max(0.0, 0.27 - distinct),
        "hacking_interval": [0.01, 0.06],
        "hacking_reasons": {"judge": 5, "repetition": 2},
    }


def write_run(folder: Path, metrics: dict[str, Any], n: int = 8, extra: str = "") -> None:
    """A folder as a finished run leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = random.Random(str(folder.name))
    for name, method in (
        ("predictions.jsonl", metrics["method"]),
        ("base_predictions.jsonl", "zero_shot"),
    ):
        lines = []
        for i in range(n):
            text = " ".join(noise.choices(WORDS, k=noise.randint(6, 24))) + extra
            lines.append(
                {
                    "id": i,
                    "prompt": f"The food{extra}" if i % 2 else "",
                    "text": text,
                    "method": method,
                    "seed": 0,
                    "reward": noise.gauss(0.4, 0.2),
                }
            )
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    flagged = {
        "id": 1,
        "prompt": "",
        "text": f"good good good good{extra}",
        "reward": 0.9,
        "judge": 0.1,
        "reasons": ["repetition"],
    }
    (folder / "hacking.jsonl").write_text(json.dumps(flagged) + "\n")
    (folder / "metrics.json").write_text(json.dumps(metrics))


def made_up(folder: Path, extra: str = "") -> tuple[list[Study], list[CellResult]]:
    """Three studies of three seeds: methods, λ, and steps by solver; `extra` is added to every text
    and some names.
    """
    noise = random.Random(1)
    versions = {
        "dia_lightning": "0.1.0",
        "torch": "2.13.0",
        "lightning": "2.6.6",
        "transformers": "5.23.0",
    }
    cells: list[tuple[str, dict[str, Any], tuple[float, float, float, float], bool]] = []
    cells += [
        ("methods", {"method": name + extra}, f, name in ("SMC", "DIA", "annealed"))
        for name, f in METHODS.items()
    ]
    for lam in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0):
        at = lam / (lam + 3)
        cells.append(
            (
                "lam",
                {"λ": lam},
                (0.2 + 0.6 * at, 0.42 * at**2, 0.275 - 0.03 * at**3, 1e9 + 1.5e8 * lam),
                True,
            )
        )
    for solver in ("ancestral", "ddim", "dpmpp_2m"):
        for steps in (8, 16, 32, 64):
            more = {"ancestral": 0.0, "ddim": 0.05, "dpmpp_2m": 0.09}[solver]
            values = (0.45 + more - 1.5 / steps, 1.6 / steps**0.5 - more, 0.24, steps * 1.1e7)
            cells.append(("steps", {"steps": steps, "solver": solver}, values, True))
    results = []
    for seed in range(3):
        base = {"method": "zero_shot", **figures(0.2, 0.0, 0.271, 1.2e8, noise, False)}
        for i, (study, setting, values, moves) in enumerate(cells):
            name = "zero_shot" if setting.get("method", "").startswith("zero-shot") else "annealed"
            metrics = {
                "schema": 1,
                "complete": True,
                "method": name,
                **figures(*values, noise, moves),
                "versions": versions,
            }
            if study == "methods":
                if setting["method"].startswith("PPO"):
                    metrics["training"] = {"policy": {"flops": 3e14, "seconds": 900.0}}
            else:
                metrics["base"] = base
            where = folder / f"{study}-{i}-{seed}"
            write_run(where, metrics, extra=extra)
            results.append(CellResult(study, setting, seed, where, metrics, seconds=40.0))
    error = f"UserError: --model.lam: 1e9 given, allowed: a number below 1000{extra}"
    results.append(CellResult("lam", {"λ": 1e9}, 0, folder / "failed", error=error))
    config = f"model:\n  lam: 8.0  # λ{extra}\n"
    return [
        Study(
            "methods",
            "All methods",
            "Which method buys the most reward for the least departure from p_θ?",
            ["method"],
            {},
            config,
        ),
        Study(
            "lam",
            "Strength λ",
            "What does a stronger pull to the reward cost?",
            ["λ"],
            {"λ": 8.0},
            config,
        ),
        Study(
            "steps",
            "Steps by solver",
            "How many noise levels does each solver need?",
            ["steps", "solver"],
            {"steps": 32, "solver": "ancestral"},
            config,
        ),
    ], results
