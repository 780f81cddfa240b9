"""Records what a seed gives: texts of every sampler, one training step of every module, as
`golden.json`.

    python -m tests.golden.make_golden

A refactoring must leave all of it as it is (`test_golden.py`). Rewrite the file only where a change
of the texts is meant.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).with_name("golden.json")
BLANKS = {"prompt": "The Eagle is a [blank:3] in the city centre."}

# In float32: how bfloat16 rounds depends on the CPU.
PLAIN = ["--trainer.precision=32-true"]
NO_TASK = "--trainer.callbacks.evaluation=null"
FEW = ["--data.n_texts=4", "--data.batch_size=4", "--data.max_length=20"]
SAMPLER = "--model.sampler"
STEPS = [f"{SAMPLER}.steps=8"]
SMALL = [f"{SAMPLER}.moves=[Suffix, DenoiseAccept]", f"{SAMPLER}.particles=4", f"{SAMPLER}.pool=3"]
SMALL += ["--model.lam=8", f"{SAMPLER}.rounds=1"]
STYLE = [
    "--data.reading.limit=3",
    "--data.n_texts=1",
    "--data.batch_size=2",
    "--data.max_length=32",
    NO_TASK,
]
SPAN = "{class_path: Spans, init_args: {length: 3}}"
TILTED = f"positions: {SPAN}, levels: [0.4, 0.9], tilt: 1.0"
MOVES = f"{SAMPLER}.moves=[Suffix, {{class_path: DenoiseAccept, init_args: {{{TILTED}}}}}]"
START = f"{SAMPLER}.start"
REFINED = [f"{SAMPLER}=Chains", f"{SAMPLER}.moves=[DenoiseAccept]", f"{SAMPLER}.rounds=2"]
REFINED += [f"{START}=Diffusion", f"{START}.solver=Ancestral", f"{START}.steps=8"]
REFINED += [f"{START}.guidance=CriticGuidance", f"{START}.guidance.scale=10"]
TEXTS: dict[str, list[str]] = {
    "annealed": ["configs/tasks/slots_tiny.yaml", *FEW, "--data.reading.limit=2", NO_TASK, *SMALL],
    "chains": [
        "configs/dia_tiny.yaml", *FEW, f"{SAMPLER}=Chains", f"{SAMPLER}.temperatures=3",
        f"{SAMPLER}.rounds=2", MOVES,
    ],
    "source": ["configs/tasks/style_formal_tiny.yaml", *STYLE, f"{SAMPLER}.rounds=4"],
    "dia": [
        "configs/guided_tiny.yaml", *FEW, *STEPS, f"{SAMPLER}.guidance.decay=1",
        f"{SAMPLER}.guidance.window=[0.1,0.9]", f"{SAMPLER}.solver.accept=true",
        f"{SAMPLER}.solver.eta_decay=0.8", f"{SAMPLER}.final=argmax",
    ],
    "ancestral": ["configs/guided_tiny.yaml", *FEW, *REFINED, "--data.prompts=blanks.jsonl"],
    "ddim": [
        "configs/tasks/style_informal_tiny.yaml", *STYLE, f"{SAMPLER}=Diffusion", *STEPS,
        f"{SAMPLER}.solver=DDIM", f"{SAMPLER}.solver.eta=0.1", f"{SAMPLER}.strength=0.5",
        "--model.lam=0", f"{SAMPLER}.temperature=0.8",
    ],
    "dpmpp_2m": [
        "configs/guided_tiny.yaml", *FEW, *STEPS, f"{SAMPLER}.solver=DPMpp2M", "--data.length=7",
    ],
    "dia_literal": [
        "configs/guided_tiny.yaml", *FEW, *STEPS, f"{SAMPLER}.solver=DiaLiteral",
        f"{SAMPLER}.solver.reading=per_step",
    ],
    "smc": ["configs/smc_tiny.yaml", *FEW, *STEPS, f"{SAMPLER}.every=2"],
    "twisted_smc": ["configs/baselines/twisted_smc_tiny.yaml", *FEW],
    "twisted_smc_by_reward": [
        "configs/baselines/twisted_smc_tiny.yaml", *FEW, f"{SAMPLER}.twist=RewardOnPrefix",
        f"{SAMPLER}.every=word",
    ],
    "guided_decoding": ["configs/baselines/guided_decoding_tiny.yaml", *FEW],
    "best_of_n": [
        "configs/baselines/best_of_n_tiny.yaml", *FEW, f"{SAMPLER}.weighted=true", "--model.lam=2",
    ],
    "zero_shot": ["configs/zero_shot_tiny.yaml", *FEW, f"{SAMPLER}.top_p=0.9"],
    "classifier_free": ["configs/baselines/classifier_free_tiny.yaml", *FEW, *STEPS],
}  # fmt: skip
ONE = ["--trainer.max_steps=1", "--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=0"]
ROWS = [
    "--data.n_texts=16",
    "--data.n_val=8",
    "--data.shard_size=8",
    "--data.batch_size=8",
    "--data.max_length=20",
]
LOSSES: dict[str, list[str]] = {
    "denoiser": ["configs/ddpm_tiny.yaml", *ONE, *ROWS],
    "critic": ["configs/critic_tiny.yaml", *ONE, *ROWS],
    "base_model": [
        "configs/lm_tiny.yaml", *ONE, "--data.path=texts.txt", "--data.val_path=texts.txt",
        "--data.tokenizer=tokenizer", "--data.train_vocab_size=300", "--data.batch_size=8",
        "--model.vocab_size=300",
    ],
    "ppo": [
        "configs/baselines/ppo_tiny.yaml", "--trainer.max_steps=4", "--trainer.log_every_n_steps=1",
        "--data.batch_size=8", "--data.max_length=20",
    ],
}  # fmt: skip


@contextlib.contextmanager
def workshop() -> Iterator[Path]:
    """An empty folder with the inputs, in which commands are run."""
    before = Path.cwd()
    folder = Path(tempfile.mkdtemp(prefix="golden"))
    (folder / "blanks.jsonl").write_text(json.dumps(BLANKS) + "\n", encoding="utf-8")
    rows = [
        f"The {a} restaurant near the {b} has {c} food."
        for a in ("good", "cheap")
        for b in ("river", "pub")
        for c in ("fast", "bad")
    ]
    (folder / "texts.txt").write_text("\n".join(rows * 4) + "\n", encoding="utf-8")
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)
        shutil.rmtree(folder, ignore_errors=True)


def _run(command: str, config: str, *options: str) -> None:
    from dia_lightning import cli
    from dia_lightning.settings import parser

    parser.run(cli.prepare_arguments([command, "--config", config, *PLAIN, *options]))


def texts(name: str) -> dict[str, list[dict[str, Any]]]:
    """The lines of predictions.jsonl and base_predictions.jsonl, of which what a seed decides."""
    with workshop() as folder:
        _run("predict", *TEXTS[name], f"--trainer.callbacks.folder={folder / 'out'}")
        found = {}
        for file in sorted((folder / "out").glob("*predictions.jsonl")):
            lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            found[file.stem] = [
                {key: line[key] for key in ("id", "text", "tokens", "reward", "log_p")}
                for line in lines
            ]
        return found


def losses(name: str) -> dict[str, float]:
    """What the first step of training logs."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with workshop() as folder:
        _run("fit", *LOSSES[name])
        (events,) = folder.rglob("events.out.tfevents*")
        read = EventAccumulator(str(events.parent)).Reload()
        names = [
            tag
            for tag in read.Tags()["scalars"]
            if tag.startswith("train/") and "second" not in tag
        ]
        return {tag: read.Scalars(tag)[0].value for tag in sorted(names)}


def kind_of_cpu() -> str:
    """What decides how sums are rounded: the processor's name, and the instructions that torch
    uses.
    """
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    name = next(
        (line.partition(": ")[2] for line in lines if line.startswith("model name")),
        platform.processor(),
    )
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def main() -> None:
    golden: dict[str, Any] = {"cpu": kind_of_cpu()}
    golden |= {
        "texts": {name: texts(name) for name in TEXTS},
        "losses": {name: losses(name) for name in LOSSES},
    }
    GOLDEN.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {GOLDEN}", file=sys.stderr)


if __name__ == "__main__":
    main()
