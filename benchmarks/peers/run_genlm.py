"""Runs genlm-control's SMC with a reward on every prefix, in an environment of its own.

    .venv-peers/bin/python benchmarks/peers/run_genlm.py job.json result.json

`compare.py` writes the job and reads the result. Nothing of the package is imported here.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from genlm.control import Potential, PromptedLLM, direct_token_sampler
from judges import judge_of


class RewardOnPrefix(Potential):
    """exp(λ r) of the text so far, as the peer's `critic` asks for it."""

    def __init__(self, llm: PromptedLLM, job: dict[str, Any]) -> None:
        super().__init__(llm.vocab, tables=llm.tables)
        self.judge, self.lam = judge_of(job["reward"]), job["lam"]

    def _values(self, contexts: list[Any]) -> np.ndarray:
        texts = [b"".join(map(bytes, c)).decode("utf-8", "replace") for c in contexts]
        return self.lam * np.array(self.judge(texts), dtype=np.float64)

    async def complete(self, context: Any) -> float:
        return float(self._values([context])[0])

    async def prefix(self, context: Any) -> float:
        return float(self._values([context])[0])

    async def batch_complete(self, contexts: Any) -> np.ndarray:
        return self._values(contexts)

    async def batch_prefix(self, contexts: Any) -> np.ndarray:
        return self._values(contexts)


def systematic(log_w: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As many equally weighted particles as there are weights."""
    share = np.exp(log_w - log_w.max())
    edges = np.cumsum(share / share.sum())
    edges[-1] = 1.0
    places = (rng.random() + np.arange(len(log_w))) / len(log_w)
    return np.searchsorted(edges, places, side="right").clip(max=len(log_w) - 1)


async def draw(llm: PromptedLLM, job: dict[str, Any], prompt: list[int], rng: Any) -> Any:
    """Runs until `wanted` different texts are there, or `runs` are over: what each run gave."""
    llm.model.clear_cache()
    if len(prompt) > 1:
        llm.model.cache_kv(prompt[:-1])
    llm.prompt_ids = prompt
    length, seen, runs = job["length"], set[tuple[int, ...]](), list[dict[str, Any]]()
    while len(seen) < job["wanted"] and len(runs) < job["runs"]:
        begin = time.perf_counter()
        found = await direct_token_sampler(llm).smc(
            n_particles=job["particles"], ess_threshold=job["ess"], max_tokens=length + 1,
            critic=RewardOnPrefix(llm, job), resampling_method="systematic",
            # A text may also stop at the last place without an end token, as ours.
            terminate_when=lambda context: len(context) >= length,
        )  # fmt: skip
        ids = [[token.token_id for token in context[:-1]] for context in found.contexts]
        chosen = systematic(np.asarray(found.log_weights), rng)
        seconds = time.perf_counter() - begin
        texts = [ids[i] for i in chosen]
        seen |= {tuple(text) for text in texts}
        runs.append(
            {
                "seconds": seconds, "tokens": texts, "log_z": float(found.log_ml),
                "log_weights": [float(w) for w in found.log_weights], "different": len(seen),
            }
        )  # fmt: skip
        llm.model.clear_cache()
    return runs


async def main(job: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(job["threads"])
    np.random.seed(job["seed"])
    torch.manual_seed(job["seed"])
    rng = np.random.default_rng(job["seed"])
    llm = PromptedLLM.from_name(
        job["folder"], backend="hf", eos_byte_strings=[end.encode() for end in job["ends"]],
        batch_size=job["batch"], hf_opts={"torch_dtype": getattr(torch, job["dtype"])},
    )  # fmt: skip
    warm = {**job, "particles": 4, "length": min(4, job["length"]), "wanted": 1, "runs": 1}
    await draw(llm, warm, job["prompts"][0], rng)
    return {"prompts": [await draw(llm, job, prompt, rng) for prompt in job["prompts"]]}


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    result = asyncio.run(main(given))
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
