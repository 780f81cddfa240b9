"""What the right side is worth: nats a token from the left alone, from both sides by enumeration,
and from the proposals, at the same positions of p_θ's own texts; and how often windows change.

    python benchmarks/right_side.py [KIT ...] [--places N] [--windows N]
                                                    (make right-side)

Remakes its tables in docs/results.md, one a kit: tiny, tiny_comments, smollm2.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicCache

from benchmarks.theory import fill, table, with_error
from dia_lightning.data.samples import ModelSamples
from dia_lightning.diffusion.denoiser import DenoiserNetwork
from dia_lightning.diffusion.schedule import make_schedule
from dia_lightning.diffusion.trunk import NetworkSize
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.lm.decoding import allocated_cache, select_rows
from dia_lightning.samplers.networks import DenoiserProposal, embedding_for, load_denoiser
from dia_lightning.sampling.infill import Infill
from dia_lightning.types import text_mask

DOC = ROOT / "docs" / "results.md"
SEED = 1234  # of the texts; those that networks are trained on have 0
WINDOWS, DRAFTS = (1, 2, 4, 8), (1, 4, 16)
RIGHT = (1, 2, 4, 8, 16)
_NEGLIGIBLE = 15.0  # nats below the likeliest candidate: e^-15 of its probability


class Kit(NamedTuple):
    """p_θ, its denoisers by name (those that are there), and its texts: prompts, tokens, and
    candidates of the enumeration.
    """

    base_lm: str
    denoisers: dict[str, str]
    prompts: str | None = None
    length: int = 40
    n_top: int = 256


KITS = {
    "tiny": Kit(
        "checkpoints/tiny/lm",
        {"denoiser": "checkpoints/tiny/denoiser", "infiller": "checkpoints/tiny/infiller"},
    ),
    "tiny_comments": Kit(
        "checkpoints/tiny_comments/lm",
        {
            "denoiser": "checkpoints/tiny_comments/denoiser",
            "infiller": "checkpoints/tiny_comments/infiller",
        },
        length=32,
    ),
    "smollm2": Kit(
        "smollm2",
        {"denoiser": "checkpoints/smollm2/denoiser", "infiller": "checkpoints/smollm2/infiller"},
        "checkpoints/smollm2/prompts_train.jsonl",
        64,
    ),
}


class Places(NamedTuple):
    """Texts (N, T), what is given of them (N, T) bool, and one position in each (N,)."""

    tokens: Tensor
    prompt_mask: Tensor
    place: Tensor


def draw_places(
    lm: BaseLM, tokens: Tensor, prompt_mask: Tensor, generator: torch.Generator, length: int = 1
) -> Places:
    """In each text one window of `length` uniformly among those with a token to their right, the
    end token say; texts that have none are left out.
    """
    n_text = text_mask(tokens, prompt_mask, lm.end_id).sum(1)
    low = prompt_mask.sum(1)
    count = n_text - low - length
    u = torch.rand(len(tokens), generator=generator, dtype=torch.float64)
    place = low + (u * count).long()
    keep = count > 0
    return Places(tokens[keep], prompt_mask[keep], place[keep])


@torch.no_grad()
def both_sides(
    lm: BaseLM, text: Tensor, prompt_mask: Tensor, place: Tensor, n_top: int = 256
) -> Tensor:
    """Nats of the token at `place` of `text` (T,) given the left and n tokens of the right, for
    each n in `RIGHT` as far as the text goes: (1 + len(RIGHT),) float64, from the left alone first.

    Bayes' rule over p_θ's `n_top` likeliest tokens and the true one: p_θ(v | left) p_θ(right |
    left, v). Candidates e^-15 times as likely as the best are read no further.
    """
    cache = allocated_cache(lm.model.config, int(place) + 1 + max(RIGHT))
    start = text.new_tensor([lm.bos_id])
    left = _log_probs(lm, torch.cat([start, text[:place]])[None], cache)[0, -1]
    true = int(text[place])
    top = left.topk(min(n_top, len(left))).indices
    candidates = torch.cat([top[top != true], top.new_tensor([true])])
    n_right = int(text_mask(text[None], prompt_mask[None], lm.end_id).sum() - place) - 1
    log_w, costs = left[candidates], [-left[true]]
    words = text[place + 1 : place + 1 + n_right]
    select_rows(cache, torch.zeros_like(candidates))
    read, inputs = 0, candidates[:, None]
    for n in RIGHT:
        n = min(n, n_right)
        if n > read:
            ahead = words[read : n - 1].expand(len(inputs), -1)
            log_p = _log_probs(lm, torch.cat([inputs, ahead], 1), cache)
            aim = words[read:n].expand(len(inputs), -1)[..., None]
            # A text may end here if nothing but its end follows, and then p_θ is asked no more.
            after_end = 0.0 if words[0] == lm.end_id else -torch.inf
            log_right = log_p.gather(-1, aim)[..., 0].sum(1)
            log_w = log_w + torch.where(candidates == lm.end_id, after_end, log_right)
            read, inputs = n, words[n - 1].expand(len(candidates), 1)
        costs.append(log_w.logsumexp(0) - log_w[-1])
        keep = log_w > log_w.max() - _NEGLIGIBLE
        keep[-1] = True
        if not bool(keep.all()):
            kept = keep.nonzero()[:, 0]
            select_rows(cache, kept)
            log_w, candidates, inputs = log_w[kept], candidates[kept], inputs[kept]
    return torch.stack(costs)


def _log_probs(lm: BaseLM, inputs: Tensor, cache: DynamicCache) -> Tensor:
    """(B, T, V) float64 log p_θ of what follows each of `inputs` (B, T), which the cache has read
    then.
    """
    if lm.has_body:
        out = lm.model.base_model(inputs, past_key_values=cache, use_cache=True)
        logits = lm.model.get_output_embeddings()(out.last_hidden_state)
    else:
        logits = lm.model(inputs, past_key_values=cache, use_cache=True).logits
    return lm.with_one_end(logits).double().log_softmax(-1)


@torch.no_grad()
def denoiser_cost(network: DenoiserNetwork, places: Places, end_id: int) -> Tensor:
    """(N,) nats of the token at each place, hidden at u = 1, all others known."""
    tokens, _, place = places
    rows = torch.arange(len(tokens))
    t = torch.zeros(tokens.shape)
    t[rows, place] = 1.0
    z = network.embedding(tokens)
    noise = torch.randn(len(tokens), z.shape[-1], generator=torch.Generator().manual_seed(0))
    one = torch.ones(())
    alpha, sigma = network.schedule.alpha(one), network.schedule.sigma(one)
    z[rows, place] = alpha * z[rows, place] + sigma * noise
    logits = DenoiserProposal(network).at(z, t, place[:, None])[:, 0]
    word_follows = tokens[rows, place + 1] != end_id
    logits[word_follows, end_id] = -torch.inf
    return F.cross_entropy(logits, tokens[rows, place], reduction="none")


def window_cost(infill: Infill, places: Places, length: int) -> Tensor:
    """(N,) nats a token of the windows of `length` from each place on."""
    tokens, mask, place = places
    here = tokens.gather(1, place[:, None] + torch.arange(length))
    return -infill.log_prob(tokens, place, length, here[:, None], mask)[:, 0] / length


def change_rates(infill: Infill, places: Places, length: int, generator: torch.Generator) -> Tensor:
    """(N, len(DRAFTS)) probability that the ensemble kernel changes the text at λ = 0, for each
    number of drafts: of text and drafts one is taken with probability ∝ p_θ(x_j) / q(y_j).

    Windows that the text goes on after keep its length, so where they lie has one probability.
    """
    tokens, mask, place = places
    n_drafts = max(DRAFTS)
    values, log_q = infill.draw(tokens, place, length, n_drafts, generator, mask)
    at = place[:, None] + torch.arange(length)
    here = tokens.gather(1, at)[:, None]
    values = torch.cat([here, values], 1)
    log_q = torch.cat([infill.log_prob(tokens, place, length, here, mask), log_q], 1)
    texts = tokens[:, None].expand(-1, 1 + n_drafts, -1).flatten(0, 1)
    at = at[:, None].expand_as(values).flatten(0, 1)
    texts = texts.scatter(1, at, values.flatten(0, 1))
    given = mask[:, None].expand(-1, 1 + n_drafts, -1).flatten(0, 1)
    log_w = infill.lm.log_prob(texts, given).unflatten(0, (-1, 1 + n_drafts)) - log_q
    same = (values == here).all(-1)
    shares = (log_w[:, : 1 + k].softmax(1) for k in DRAFTS)
    return torch.stack([1 - (w * same[:, : w.shape[1]]).sum(1) for w in shares], 1)


def untrained(lm: BaseLM) -> Infill:
    """p_θ given the left, as an infiller that was not trained."""
    size = NetworkSize(width=16, layers=1, heads=2, max_length=lm.max_length, trunk="infiller")
    network = DenoiserNetwork(embedding_for(lm), make_schedule("cosine"), size, model=lm.model)
    network.init_from_lm(lm.model, lm.bos_id)
    return Infill(lm, network.eval().requires_grad_(False))


def measure(name: str, n_places: int, n_windows: int) -> str:
    """The two tables of a kit."""
    kit, begun = KITS[name], time.process_time()
    size = {"max_length": kit.length, "shard_size": 2 * n_places}
    data = ModelSamples(kit.base_lm, 1, 1, prompts=kit.prompts, seed=SEED, **size)
    generator = torch.Generator().manual_seed(SEED)
    lm, drawn = data.lm, data.draw(0, torch.device("cpu"))
    tokens, given = drawn["tokens"].long(), drawn["prompt_length"]
    mask = torch.arange(tokens.shape[1]) < given[:, None]
    networks = {
        label: load_denoiser(path, embedding_for(lm, path), lm)
        for label, path in kit.denoisers.items()
        if (ROOT / path).exists()
    }
    proposals = {"p_θ, left alone": untrained(lm)} | {
        label: Infill(lm, network)
        for label, network in networks.items()
        if network.size.trunk == "infiller"
    }
    places = draw_places(lm, tokens, mask, generator)
    places = Places(*(part[:n_places] for part in places))
    found = [both_sides(lm, *row, kit.n_top) for row in zip(*places, strict=True)]
    costs = dict(zip(["left alone", *map(str, RIGHT)], torch.stack(found).T, strict=True))
    for label, network in networks.items():
        costs[label] = denoiser_cost(network, places, lm.end_id)
    head = ["", *costs]
    best = costs[str(RIGHT[-1])]
    rows = [
        ["nats a token", *(_mean(cost) for cost in costs.values())],
        [f"above column {RIGHT[-1]}", *(_mean(cost - best) for cost in costs.values())],
    ]
    text = [table(head, rows), ""]
    rows = []
    for length in WINDOWS:
        places = draw_places(lm, tokens, mask, generator, length)
        few = Places(*(part[:n_windows] for part in places))
        places = Places(*(part[:n_places] for part in places))
        for label, infill in proposals.items():
            rates = change_rates(infill, few, length, generator).T
            cells = [f"{100 * float(rate.mean()):.0f} %" for rate in rates]
            rows.append([f"{length}, {label}", _mean(window_cost(infill, places, length)), *cells])
            print(rows[-1], flush=True)
    head = ["window, proposal", "nats a token", *(f"changed, K = {k}" for k in DRAFTS)]
    minutes = (time.process_time() - begun) / 60
    made = (
        f"{len(found)} positions and as many windows, one a text, changes in {len(few.place)} of"
        f" them; texts of seed {SEED}; {kit.n_top} candidates; {minutes:.0f} minutes of one core."
    )
    return "\n".join([*text, table(head, rows), "", made])


def _mean(cost: Tensor) -> str:
    return with_error(float(cost.mean()), float(cost.double().std()) / len(cost) ** 0.5, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kits", nargs="*", default=["tiny"], choices=[*KITS])
    parser.add_argument("--places", type=int, default=512)
    parser.add_argument("--windows", type=int, default=128)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.kits:
        fill(DOC.read_text(encoding="utf-8"), f"right-side-{name}", "")  # the place is there
        body = measure(name, given.places, given.windows)
        print(body)
        text = fill(DOC.read_text(encoding="utf-8"), f"right-side-{name}", body)
        DOC.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
