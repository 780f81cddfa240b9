"""Several nodes, as docs/scaling.md starts them, and its arithmetic. A node is a process of its
own on this machine.
"""

import json
import math
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import scaling
from dia_lightning import cli
from dia_lightning.meter import weights_of
from dia_lightning.samplers.sharded import blocks_of
from dia_lightning.settings import parser
from dia_lightning.training import DenoiserModule, Network

ROOT = Path(cli.__file__).parents[1]
DOC = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
# Stands for srun: a node's process each, with what SLURM tells it.
SRUN = f"""#!{sys.executable}
import os, subprocess, sys
[kill, *command] = sys.argv[1:]
assert kill == "--kill-on-bad-exit=1"
nodes = int(os.environ["SLURM_NNODES"])
places = [
    {{"SLURM_PROCID": str(i), "SLURM_NODEID": str(i), "SLURM_LOCALID": "0"}} for i in range(nodes)
]
running = [subprocess.Popen(command, env={{**os.environ, **place}}) for place in places]
sys.exit(max(process.wait() for process in running))
"""
SMALL = [
    "--data.max_length=12",
    "--data.batch_size=4",
    "--trainer.accelerator=cpu",
    "--trainer.precision=32",
]
FIT = [
    "--data.n_texts=24",
    "--data.n_val=8",
    "--data.shard_size=8",
    "--model.network.max_length=12",
    "--trainer.val_check_interval=2",
]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def environment(folder: Path, **more: str) -> dict[str, str]:
    paths = {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
        "PYTHON": sys.executable,
    }
    return {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(free_port()), **paths, **more}


def torchrun_lines() -> list[str]:
    """The document's commands, for training on two nodes and for a base model that is shared
    out.
    """
    return [line for line in DOC.replace("\\\n", " ").splitlines() if line.startswith("torchrun ")]


def slurm(folder: Path, *arguments: str, **more: str) -> None:
    """The script as sbatch runs it, on two nodes with a process each."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin/srun").write_text(SRUN)
    (folder / "bin/srun").chmod(0o755)
    given = {
        "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "dia", "SLURM_NNODES": "2", "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1", "SLURM_NODELIST": "127.0.0.1",
        "SLURM_SUBMIT_DIR": str(folder),
    }  # fmt: skip
    command = ["bash", str(ROOT / "docs/slurm.sbatch"), *arguments]
    ended = subprocess.run(
        command,
        env=environment(folder, **given, **more),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]


@pytest.mark.slow
def test_the_slurm_script_trains_on_two_nodes_and_goes_on(tmp_path: Path) -> None:
    """With every callback of the configuration."""
    fit = ["fit", "configs/ddpm_tiny.yaml", *SMALL, *FIT]
    slurm(tmp_path, *fit, "--trainer.max_steps=2")
    assert (tmp_path / "runs/ddpm_tiny/denoiser/model.safetensors").is_file()
    [last] = tmp_path.glob("runs/ddpm_tiny/version_*/checkpoints/last.ckpt")
    slurm(tmp_path, *fit, "--trainer.max_steps=3", SLURM_RESTART_COUNT="1")
    newest = max(
        tmp_path.glob("runs/ddpm_tiny/version_*/checkpoints/last.ckpt"),
        key=lambda path: path.stat().st_mtime_ns,
    )
    assert newest != last
    steps = [torch.load(path, weights_only=True) for path in (last, newest)]
    assert [saved["global_step"] for saved in steps] == [2, 3]
    assert steps[1]["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"] == 3


@pytest.mark.slow
def test_two_nodes_draw_the_texts_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the SLURM script, and by the document's torchrun."""
    few = [*SMALL, "--data.n_texts=10"]
    slurm(tmp_path, "predict", "configs/dia_tiny.yaml", *few, "--trainer.callbacks.folder=slurm")
    line, _ = torchrun_lines()
    port = str(free_port())
    run, options = line.split(" -m dia_lightning ")
    run = run.replace("--nproc-per-node 8", "--nproc-per-node 1").replace(
        "node0:29500", f"127.0.0.1:{port}"
    )
    options = (
        options.split(" --config ")[1]
        .split(maxsplit=1)[1]
        .replace("--trainer.devices 8", "--trainer.devices 1")
    )
    torchrun = [
        str(Path(sys.executable).parent / "torchrun"),
        *shlex.split(run)[1:],
        "-m",
        "dia_lightning",
        "predict",
    ]
    command = [
        *torchrun,
        "--config",
        "configs/dia_tiny.yaml",
        *shlex.split(options),
        *few,
        "--trainer.callbacks.folder=elastic",
    ]
    nodes = [subprocess.Popen(command, cwd=tmp_path, env=environment(tmp_path)) for _ in range(2)]
    assert [node.wait(timeout=400) for node in nodes] == [0, 0]
    monkeypatch.chdir(tmp_path)
    one = ["predict", "--config", "configs/dia_tiny.yaml", *few, "--trainer.callbacks.folder=one"]
    parser.run(cli.prepare_arguments(one))
    texts = [
        (tmp_path / folder / "predictions.jsonl").read_text()
        for folder in ("one", "slurm", "elastic")
    ]
    assert len(texts[0].splitlines()) == 10
    assert texts[1] == texts[0]
    assert texts[2] == texts[0]
    assert json.loads((tmp_path / "slurm/metrics.json").read_text())["complete"] is True


def test_the_table_of_what_is_sent_is_the_arithmetic() -> None:
    assert scaling.communication() in DOC
    assert scaling.ring_seconds(8, 4e9, 1e9) == pytest.approx(7.0)
    # Beside each other, where weights, and so the multiply–adds of a position, can be counted by
    # hand.
    options = yaml.safe_load((ROOT / "configs/ddpm_tiny.yaml").read_text(encoding="utf-8"))[
        "model"
    ]["init_args"]
    network = DenoiserModule(network=Network(**options.get("network", {}))).network
    shape = scaling.network_of(options)
    trunk = sum(p.numel() for p in network.trunk.parameters())
    assert (
        scaling.trained_parameters(shape.trunk)
        == trunk
        == scaling.trained_parameters(network.trunk)
    )
    forward = weights_of(network.trunk) + 2 * 2000 * 128
    matrices = sum(p.numel() for p in network.parameters() if p.ndim == 2)
    backward = weights_of(network.trunk) + 2000 * 128 + matrices
    want = 2 * 10 * 40 * (1.5 * forward + backward)
    assert math.isclose(scaling.flops_of_step(network, 10, 2), want)


def test_a_base_model_that_is_shared_out_is_what_the_document_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its command, and the arithmetic of 70 B parameters on 8 GPUs."""
    monkeypatch.chdir(tmp_path)
    [_, line] = torchrun_lines()
    parser.run(
        cli.prepare_arguments(shlex.split(line.split(" -m dia_lightning ")[1])), options_only=True
    )
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128_256,
    )  # fmt: skip
    with torch.device("meta"):
        blocks = blocks_of(LlamaForCausalLM(config).model)
    block = sum(weight.numel() for weight in blocks[0].parameters())
    whole, table = 2 * 80 * block / 1e9, 2 * 128_256 * 8192 / 1e9
    kept, one = whole / 8 + 4 * table + 4 * block / 1e9, whole + 4 * table
    assert f"80 · {block / 1e6:.1f} M · 2 B = {whole:.1f} GB" in DOC
    assert f"two tables of {table:.1f} GB, the head again in float32 ({2 * table:.1f} GB)" in DOC
    assert (
        f"blocks at a time ({4 * block / 1e9:.1f} GB): {kept:.1f} GB in the place of {one:.1f} GB"
        in DOC
    )
    received = 7 / 8 * whole
    assert f"7/8 · {whole:.1f} GB = {received:.1f} GB, at 450 GB/s {received / 450:.2f} s" in DOC
    assert f"64 times that, {64 * received / 450:.0f} s" in DOC
    rows = received / 450 / (2 * 80 * block / (0.4 * 989e12))
    assert f"token of {10 * round(rows / 10)} rows" in DOC
    assert f"15/16 · {whole:.1f} GB / 50 GB/s = {15 / 16 * whole / 50:.1f} s" in DOC


@pytest.mark.parametrize("kind", ["fit", "predict"])
def test_what_is_measured_is_counted(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "SIZE", {"steps": 3, "texts": 4, "batches": 3, "batch": 2})
    rates = scaling.work(kind, 1, tmp_path)
    assert set(rates) == ({"drawing", "training"} if kind == "fit" else {"sampling"})
    assert all(0 < rate < 1e6 for rate in rates.values())
