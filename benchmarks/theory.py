"""Remakes the plots in docs/theory/ and the tables of docs/theory.md.

    python benchmarks/theory.py                     all of it
    python benchmarks/theory.py langevin solvers    some of its parts: langevin, solvers, tokens

Seeds are fixed, so the same machine makes the same numbers again. Tables stand between HTML
comments in docs/theory.md.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("MPLBACKEND", "Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from benchmarks import theory_mixture as mixture
from benchmarks import theory_samplers as samplers
from benchmarks.theory_mixture import Curve

ROOT = Path(__file__).resolve().parents[1]
DOC, PLOTS = ROOT / "docs" / "theory.md", ROOT / "docs" / "theory"
RC = {"svg.hashsalt": "theory", "font.size": 9, "svg.fonttype": "none"}
# Told apart without colour: dark, middle and light, three dashes, many markers.
STYLES = [
    {"color": color, "linestyle": line, "marker": marker}
    for color, line, marker in zip(
        ["#000000", "#1f5fa8", "#c2571a", "#6a6a6a", "#000000", "#1f5fa8", "#c2571a", "#6a6a6a"],
        ["-", "-", "-", "-", "--", "--", ":", ":"],
        ["o", "s", "^", "D", "v", "P", "X", "*"],
        strict=True,
    )
]


def fill(text: str, name: str, body: str) -> str:
    """`text` with what stands between the two comments called `name` replaced.

    Raises:
        ValueError: where `text` does not hold the pair of comments once.
    """
    pattern = re.compile(rf"(<!-- {name}: [^>]*-->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"{name}: one pair of comments needed, found {len(pattern.findall(text))}")
    return pattern.sub(lambda match: f"{match[1]}{body.strip()}\n{match[2]}", text)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_error(mean: float, error: float, digits: int = 3) -> str:
    """Mean ± standard error; without an error the mean alone."""
    if np.isnan(mean):
        return "–"
    return f"{mean:.{digits}f} ± {error:.{digits}f}" if error > 0 else f"{mean:.{digits}f}"


def draw(ax: Axes, curves: Mapping[str, Curve], floor: float, label_floor: str) -> None:
    """Curves with their standard errors on logarithmic axes, and the sampling floor."""
    for style, (name, line) in zip(STYLES, curves.items(), strict=False):
        ax.errorbar(
            line.x,
            line.mean,
            line.error,
            label=name,
            markersize=5,
            linewidth=1.3,
            capsize=2,
            **style,
        )
    ax.axhline(floor, color="#999999", linewidth=4, alpha=0.6, zorder=0, label=label_floor)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.grid(True, which="both", color="#dddddd", linewidth=0.5)


def plain_ticks(ax: Axes, x: Sequence[float], y: Sequence[float]) -> None:
    """The numbers themselves on the axes instead of powers of ten."""
    for axis, at in ((ax.xaxis, x), (ax.yaxis, y)):
        axis.set_major_locator(FixedLocator(list(at)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))


def save(figure: plt.Figure, name: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def langevin(
    folder: Path, n: int = 100_000, seeds: int = 3, smallest: float = 0.02
) -> dict[str, str]:
    """W2 of ULA and MALA against η and against the number of steps."""
    etas = [eta for eta in (0.02, 0.04, 0.08, 0.16, 0.32) if eta >= smallest]
    eta, steps = 0.16, [1, 2, 4, 8, 16, 32, 64, 128, 256]
    by_eta, by_steps = (
        mixture.against_eta(etas, n, seeds),
        mixture.against_steps(eta, steps, n, seeds),
    )
    floor, spread = mixture.floor(mixture.LANGEVIN_LAW, n, 20)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    label = f"{n:,} exact draws (floor)"
    draw(left, by_eta, floor, label)
    draw(right, by_steps, floor, label)
    left.set(
        xlabel="step size η",
        ylabel="Wasserstein-2 distance to the target",
        title="after η k = 10, from exact draws",
    )
    right.set(
        xlabel="steps k",
        ylabel="Wasserstein-2 distance to the target",
        title=f"η = {eta}, all chains from x = 3",
    )
    plain_ticks(left, etas, [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5])
    plain_ticks(right, steps, [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2])
    for ax in (left, right):
        ax.legend(fontsize=8)
    save(figure, "langevin", folder)
    bias = mixture.order(by_eta["ULA"], 3 * floor)
    rows = [
        [
            f"{eta:g}",
            *(with_error(by_eta[k].mean[i], by_eta[k].error[i], 4) for k in ("ULA", "MALA")),
        ]
        for i, eta in enumerate(etas)
    ]
    text = (
        table(["η", "W2 of ULA", "W2 of MALA"], rows)
        + f"\n\n{n:,} chains, {seeds} seeds, mean ± standard error. Floor: {floor:.4f} (standard"
        f" deviation {spread:.4f}). ULA's W2 grows like η to the power"
        f" {with_error(-bias[0], bias[1], 2)}, by least squares over the {bias[2]} points above"
        " three floors."
    )
    return {"langevin": text}


def solvers(folder: Path, n: int = 50_000, seeds: int = 3, largest: int = 128) -> dict[str, str]:
    """W2 of each solver with the exact denoiser, and its order."""
    steps = [k for k in (4, 8, 16, 32, 64, 128, 256) if k <= largest]
    curves = mixture.solvers(steps, n, seeds)
    floor, spread = mixture.floor(mixture.SOLVER_LAW, n, 20)
    figure, ax = plt.subplots(figsize=(7.5, 5), layout="constrained")
    draw(ax, curves, floor, f"{n:,} exact draws (floor)")
    ax.set(xlabel="steps (noise levels)", ylabel="Wasserstein-2 distance to the target")
    plain_ticks(ax, steps, [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3])
    for order, start in ((1, 0.75), (2, 0.1)):
        line = start * (steps[0] / np.array(steps)) ** order
        ax.plot(steps, line, color="#bbbbbb", linewidth=1, linestyle=(0, (1, 1)))
        ax.annotate(
            f"order {order}",
            (steps[1], line[1]),
            fontsize=8,
            color="#777777",
            xytext=(4, 4),
            textcoords="offset points",
        )
    ax.legend(fontsize=8, loc="lower left")
    save(figure, "solvers", folder)
    rows = []
    for name, line in curves.items():
        fixed = name in mixture.DETERMINISTIC
        slope, error, points = mixture.order(line, 0 if fixed else 3 * floor)
        used = line.x[line.mean > (0 if fixed else 3 * floor)]
        span = f"{used[0]:.0f} – {used[-1]:.0f}" if points else "–"
        at = [with_error(line.mean[i], line.error[i], 4) for i in (len(steps) // 3, len(steps) - 1)]
        rows.append([name, with_error(slope, error, 2), span, *at])
    head = [
        "solver",
        "order (− slope)",
        "steps fitted",
        f"W2 at {steps[len(steps) // 3]}",
        f"W2 at {steps[-1]}",
    ]
    text = (
        table(head, rows)
        + f"\n\n{n:,} samples, {seeds} seeds for the solvers that draw noise, mean ± standard"
        " error; `ddim` and `dpmpp_2m` start at quantiles and draw nothing. Slopes by least"
        " squares with their standard error; where noise is drawn, of points above three floors."
        f" Floor: {floor:.4f} (standard deviation {spread:.4f})."
    )
    return {"solvers": text}


def tokens(folder: Path, scale: samplers.Scale | None = None, workers: int = 2) -> dict[str, str]:
    """Total variation of every sampler on an enumerable problem; workers: processes that share
    the work, 0 for this one.
    """
    scale = scale or samplers.Scale()
    if workers:
        spawn = get_context("spawn")
        with ProcessPoolExecutor(workers, spawn, torch.set_num_threads, (1,)) as pool:
            found = samplers.measure(scale, pool.map)
    else:
        found = samplers.measure(scale)
    figure, axes = plt.subplots(1, 2, figsize=(11, 6.2), layout="constrained", sharey=True)
    for ax, names, title in zip(
        axes,
        samplers.PANELS,
        ("reverse diffusion, critic `mse`", "exact moves and populations"),
        strict=True,
    ):
        draw(
            ax,
            {name: found.curves[name] for name in names},
            found.floor,
            f"{scale.n:,} exact draws (floor)",
        )
        ax.axhline(
            found.untouched,
            color="#999999",
            linewidth=1,
            linestyle="-.",
            zorder=0,
            label="samples of p, untouched",
        )
        ax.set(xlabel="network calls a text", title=title)
        ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=2)
        plain_ticks(ax, scale.budgets, [0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1])
    axes[0].set_ylabel("total variation to π")
    save(figure, "tokens", folder)
    return {name: f"{table(*found.tables[name])}\n\n{found.notes[name]}" for name in found.tables}


PARTS: dict[str, Callable[[Path], dict[str, str]]] = {
    "langevin": langevin,
    "solvers": solvers,
    "tokens": tokens,
}


def main(names: Sequence[str]) -> None:
    unknown = set(names) - PARTS.keys()
    if unknown:
        raise SystemExit(f"{', '.join(sorted(unknown))}: no such part, allowed: {', '.join(PARTS)}")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    plt.rcParams.update(RC)
    for name in names or PARTS:
        start = time.perf_counter()
        for marker, body in PARTS[name](PLOTS).items():
            DOC.write_text(fill(DOC.read_text(encoding="utf-8"), marker, body), encoding="utf-8")
        print(
            f"{name}: {time.perf_counter() - start:.0f} s, {time.process_time():.0f} s of processor"
            " time so far",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
