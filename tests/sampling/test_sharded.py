"""p_θ shared out over two processes: the texts of one process with the whole of it, from half of
its blocks on each.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from dia_lightning import cli
from dia_lightning.diffusion.checkpoint import save_network
from dia_lightning.errors import UserError
from dia_lightning.rewards import Regex
from dia_lightning.samplers import DDIM, BaseModel, Diffusion, GuidedSamplerModule
from dia_lightning.samplers.sharded import blocks_of
from dia_lightning.training import DenoiserModule
from tests.oracles.in_parts import in_parts
from tests.sampling.sharded_runs import PROMPTS, annealed, predict, suffixes


def test_two_processes_with_half_of_it_each_draw_the_texts_of_one(
    tmp_path: Path, llama_folder: Path
) -> None:
    """Of GPT-2's and Llama's architecture: three batches for two processes; one, for the first
    alone; and an error in one.
    """
    root = str(Path(cli.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    command = [
        sys.executable,
        "-m",
        "tests.sampling.sharded_runs",
        str(tmp_path),
        str(llama_folder),
    ]
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, llama = tmp_path / "one", str(llama_folder)
    predict(one / "tiny", annealed(), 3, 1)
    predict(one / "llama", suffixes(llama), 1, 1, PROMPTS)
    predict(one / "single", suffixes(llama), 1, 1)
    for name in ("tiny", "llama", "single"):
        for file in sorted(path.name for path in (one / name).glob("*predictions.jsonl")):
            assert (tmp_path / name / file).read_text() == (one / name / file).read_text()
        found, want = (
            json.loads((folder / name / "metrics.json").read_text()) for folder in (tmp_path, one)
        )
        assert found["complete"] is True
        assert found["config_hash"] == want["config_hash"]
        for counted in ("nfe", "tokens", "flops"):  # what is run for the other process is not
            assert found[counted] == want[counted]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for seen in (first, second):
        assert seen["tiny"] == pytest.approx(0.5, abs=0.01)
        assert seen["llama"] == pytest.approx(0.5, abs=0.01)
        assert (
            "shard_base_lm: true given, allowed: false; a gradient is wanted through p_θ"
            in seen["gradient"]
        )
    assert "the service is down" in second["failed"]
    assert "shard_base_lm: true given, but another process has ended" in first["failed"]


def test_what_cannot_be_shared_out_is_refused(tmp_path: Path, llama_folder: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"^shard_base_lm: true given, allowed: with several processes .*there",
    ):
        predict(tmp_path, suffixes(str(llama_folder), shard_base_lm=True), 2, 1)
    adapted = DenoiserModule(
        str(llama_folder),
        **in_parts(DenoiserModule, width=16, layers=2, heads=4, max_length=12, adapter_rank=2),
    )
    save_network(adapted.network, adapted.settings(), tmp_path / "denoiser")
    diffusion, denoiser = Diffusion(DDIM(0.1)), str(tmp_path / "denoiser")
    module = GuidedSamplerModule(
        Regex("the"), diffusion, str(llama_folder), denoiser, lam=0.0, shard_base_lm=True
    )
    with pytest.raises(
        UserError, match=r"^shard_base_lm: true given, allowed: false; denoiser or critic adapt"
    ):
        module.setup("predict")
    policy = BaseModel(policy=str(llama_folder), label="ppo")
    with pytest.raises(
        UserError, match=r"^shard_base_lm: true given, allowed: false; a policy is a second model"
    ):
        GuidedSamplerModule(Regex("the"), policy, str(llama_folder), shard_base_lm=True)
    with pytest.raises(
        UserError,
        match=r"^shard_base_lm: true given, allowed: false; Linear keeps its blocks in no",
    ):
        blocks_of(nn.Linear(1, 1))


def test_blocks_are_found_among_experts() -> None:
    """Whatever is longer: each block of two has four experts."""
    blocks = nn.ModuleList(
        nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(3, 3) for _ in range(4))})
        for _ in range(2)
    )
    assert blocks_of(nn.ModuleDict({"embedding": nn.Embedding(99, 3), "layers": blocks})) is blocks
