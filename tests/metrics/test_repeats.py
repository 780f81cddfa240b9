"""How different the texts of a prompt are, and when a run warns of copies."""

import math
from typing import Any

import pytest
import torch

from dia_lightning.callbacks.table import repeats
from dia_lightning.metrics.repeats import (
    Copied,
    figures_by_prompt,
    repeated,
    warnings_of,
    with_unique_texts,
)
from dia_lightning.samplers import Annealed, BaseModel, BestOfN, Chains, Sampler, TwistedSMC
from dia_lightning.types import Generations


def batch(
    index: int, prompts: str, texts: str, log_p: float = -30.0, n_tokens: int = 9, **columns: Any
) -> Generations:
    """A text for each letter of `texts`, of the prompt at the same place."""
    n = len(texts)
    rewards = torch.arange(n, dtype=torch.float32) + 10 * index
    return Generations(
        index, [10 * index + i for i in range(n)], list(prompts), [4 * text for text in texts],
        torch.zeros(n, 2, dtype=torch.long), torch.full((n,), log_p, dtype=torch.float64),
        torch.full((n,), n_tokens), {"r": rewards}, rewards, "annealed", 0, 1.0,
        diagnostics={name: torch.tensor(values) for name, values in columns.items()},
    )  # fmt: skip


def test_texts_are_counted_over_the_whole_run() -> None:
    """Of prompt x 3 texts of 5 in two batches; records that merely look alike are two prompts."""
    run = [batch(0, "xxxy", "aabc", roots=[0.5] * 4), batch(1, "xyx", "daa")]
    found = with_unique_texts(run, [])
    told = [values for one in found for values in one.diagnostics["unique_texts"].tolist()]
    assert told == pytest.approx([0.6, 0.6, 0.6, 1, 0.6, 1, 0.6])
    assert found[0].diagnostics["roots"].tolist() == [0.5] * 4
    assert "unique_texts" not in run[0].diagnostics
    one, other = {"source": "s"}, {"source": "s"}
    (told,) = with_unique_texts([batch(0, "xxxx", "abab")], [one, one, other, one])
    want = torch.tensor([2 / 3, 2 / 3, 1, 2 / 3])
    assert torch.equal(told.diagnostics["unique_texts"], want)


def test_figures_of_each_prompt_in_the_order_of_the_run() -> None:
    run = [
        batch(0, "xxy", "aab", ess=[0.5, 0.5, 0.25], log_z=[1.0, 1.0, 2.0], other=[0.0] * 3),
        batch(1, "xy", "cb", ess=[0.1, 0.3], log_z=[4.0, -math.inf], other=[0.0] * 2),
    ]
    found = figures_by_prompt(with_unique_texts(run, []), [])["by_prompt"]
    assert [list(row) for row in found] == 2 * [
        ["prompt", "n", "reward", "unique_texts", "ess", "log_z"]
    ]
    assert [(row["prompt"], row["n"], row["reward"]) for row in found] == [
        ("x", 3, 11 / 3), ("y", 2, 6.5),
    ]  # fmt: skip
    assert [row["unique_texts"] for row in found] == pytest.approx([2 / 3, 1 / 2])
    assert [row["ess"] for row in found] == pytest.approx([1.1 / 3, 0.275])
    assert [row["log_z"] for row in found] == [2, -math.inf]
    few, many = ("".join(chr(97 + i) for i in range(n)) for n in (16, 17))
    assert len(figures_by_prompt([batch(0, few, few)], [])["by_prompt"]) == 16
    assert figures_by_prompt([batch(0, many, many)], []) == {}


@pytest.mark.parametrize(
    ("texts", "copies"),
    [("aaaaaaab", 7), ("aaaabcde", 4), ("aaabcdef", 0), ("aab", 0), ("aa", 0), ("aaa", 3)],
)
def test_a_large_share_of_copies_is_told(texts: str, copies: int) -> None:
    """Half of the texts and three of them; a prompt of different ones comes first."""
    run = [batch(0, "o" * 8 + "x" * len(texts), "abcdefgh" + texts)]
    assert repeated(run, [], []) == ([Copied(2, copies, len(texts))] if copies else [])


def test_copies_that_p_theta_itself_would_make_are_none() -> None:
    """Likely texts, texts of one or two tokens, and prompts of which p_θ's own texts are copies."""
    same = "aaaaaaab"
    for log_p, n_tokens, told in (
        (math.log(0.09), 9, True), (math.log(0.11), 9, False), (-30.0, 3, False), (-30.0, 4, True),
    ):  # fmt: skip
        assert bool(repeated([batch(0, "x" * 8, same, log_p, n_tokens)], [], [])) == told
    run = [batch(0, "x" * 8, same)]
    for base, told in (("abcdefgh", True), ("aaabcdef", True), ("bbbbbcde", False)):
        assert bool(repeated(run, [batch(0, "x" * 8, base)], [])) == told
    assert repeated(run, [batch(0, "y" * 8, same)], []) == [Copied(1, 7, 8)]


def test_the_line_says_what_to_raise() -> None:
    found = [Copied(i, 7, 8) for i in range(2, 10)]
    lines = warnings_of(found, {"particles": 4, "rounds": 1})
    assert lines[0] == "prompt 2: 7 of 8 texts are the same; raise particles (4) or rounds (1)"
    assert len(lines) == 6
    assert lines[5] == "and 3 more"
    assert warnings_of(found[:5], {})[-1] == "prompt 6: 7 of 8 texts are the same"
    assert warnings_of([], {"rounds": 1}) == []


@pytest.mark.parametrize(
    ("sampler", "advice"),
    [
        (Annealed(particles=3, rounds=2), "; raise particles (3) or rounds (2)"),
        (Annealed([], particles=3), "; raise particles (3)"),
        (TwistedSMC(), "; raise particles (4)"),
        (Chains(), "; raise rounds (20)"),
        (BestOfN(), ""),
        (BaseModel(top_k=1), None),
    ],
    ids=str,
)
def test_settings_are_those_that_the_sampler_has(sampler: Sampler, advice: str | None) -> None:
    found = repeats(sampler, [[batch(0, "xxxx", "aaab")]], [])
    want = [] if advice is None else [f"prompt 1: 3 of 4 texts are the same{advice}"]
    assert found == want
