"""Prompts with blanks, from the prompt to the outputs; and what cannot be, in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dia_lightning as dia
from dia_lightning.callbacks.batch_files import dumps, from_json, records, to_json
from dia_lightning.metrics.generation import compute_metrics
from dia_lightning.samplers.annealed import Annealed
from dia_lightning.samplers.base import Sampler
from dia_lightning.samplers.best_of_n import BestOfN
from dia_lightning.samplers.chains import Chains
from dia_lightning.samplers.moves import Suffix, Window
from dia_lightning.samplers.twisted_smc import TwistedSMC
from dia_lightning.sampling.annealing import particles_of
from dia_lightning.types import Batch
from tests.conftest import Run
from tests.test_cli import assert_one_line

PROMPTS = [
    "the [blank] food [blank]",
    "the [blank:2] good",
    "the",
    "[blank] is near.",
    "the[blank]",
]


def draw(lm_folder: Path, **given: Any) -> dia.Result:
    small = {"n": 2, "max_length": 14, "progress": False, "compare_base": False, "lam": 1.0}
    reward = lambda texts: [-len(text) / 10 for text in texts]  # noqa: E731
    return dia.sample(**{"base_lm": str(lm_folder), "reward": reward, **small, **given})


def test_what_fills_the_blanks_is_told(lm_folder: Path, tmp_path: Path) -> None:
    """Given pieces and fills in turn are the text; log p_θ is that of the right side and of the
    filling; all the same in files, tables and after a restart.
    """
    found = draw(lm_folder, prompts=PROMPTS, compare_base=True)
    assert found.base is not None
    found.save(tmp_path / "out")
    for result, name in ((found, "predictions"), (found.base, "base_predictions")):
        rows = [json.loads(x) for x in (tmp_path / f"out/{name}.jsonl").read_text().splitlines()]
        for row, text, fills, prompt in zip(
            rows, result.texts, result.fills, result.prompts, strict=True
        ):
            assert row["prompt"] == prompt
            assert row.get("fills", []) == fills
            parts = prompt.replace("[blank:2]", "[blank]").split("[blank]")
            if len(parts) == 1:
                assert "fills" not in row
                continue
            pieces = [part.removesuffix(" ") for part in parts[:-1]] + parts[-1:]
            assert len(fills) == len(pieces) - 1
            assert text == "".join(a + b for a, b in zip(pieces, [*fills, ""], strict=True))
            if "log_p_right" in row:
                both = row["log_p_right"] + row["log_p_fill"]
                assert both == pytest.approx(row["log_p"], abs=1e-4)
        told = [
            prompt for prompt, row in zip(result.prompts, rows, strict=True) if "log_p_fill" in row
        ]
        assert told == [prompt for prompt in PROMPTS[:2] + PROMPTS[3:4] for _ in range(2)]
        right = result.diagnostics["log_p_right"]
        assert right.isnan().tolist() == [False] * 4 + [True] * 2 + [False] * 2 + [True] * 2
        assert result.to_pandas()["log_p_fill"].notna().sum() == 6
        batch = result._batches[0]
        again = from_json(json.loads(dumps(to_json(batch))))
        assert [row.get("fills") for row in records(again)] == [row.get("fills") for row in rows]
        figures = compute_metrics([batch])
        assert figures["log_p_right"] == pytest.approx(float(right.nanmean()))
        n = [int(v) for v in batch.n_tokens]
        assert figures["log_p_per_token"] == pytest.approx(float(batch.log_p.sum()) / sum(n))


def test_the_reward_reads_no_blank(lm_folder: Path) -> None:
    """Also where the blank is the last of the prompt, of a given length or not."""
    seen: list[str] = []

    def reward(texts: list[str]) -> list[float]:
        seen.extend(texts)
        return [0.0] * len(texts)

    prompts = ["the food[blank:3]", "the food[blank]", "the [blank] food", "[blank:2] food [blank]"]
    result = draw(lm_folder, prompts=prompts, reward=reward)
    assert not any("[" in text for text in seen)
    assert set(result.texts) <= set(seen)
    assert all(text.startswith("the") for text in result.texts[:6])


def test_batches_with_blanks_beside_batches_without(lm_folder: Path) -> None:
    found = draw(lm_folder, prompts=["the", "the [blank] food", "the good"], batch_size=2)
    assert found.diagnostics["log_p_right"].isnan().tolist() == [
        True,
        True,
        False,
        False,
        True,
        True,
    ]
    assert [len(row) for row in found.fills] == [0, 0, 1, 1, 0, 0]


def test_texts_of_unlike_lengths_share_no_population() -> None:
    """`data.length: FILE` draws a length for each text of one prompt."""
    mask = torch.tensor([[False] * n + [True] * (6 - n) for n in (2, 3, 2, 3, 4)])
    batch = Batch(0, list(range(5)), [""] * 5, torch.zeros(5, 6, dtype=torch.int64), mask)
    crowd, n_groups, group = particles_of(batch, 2)
    assert (n_groups, group.tolist()) == (3, [0, 1, 0, 1, 2])
    assert torch.equal(crowd.prompt_mask[::4], mask[[0, 1, 4]])
    batch.prompt_mask = torch.zeros_like(mask)
    assert particles_of(batch, 2)[1] == 1


@pytest.mark.parametrize("rounds", [0, 1])
def test_what_is_given_stays_whatever_the_rounds(lm_folder: Path, rounds: int) -> None:
    sampler = Annealed([Suffix(), Window(3, vary=True)], rounds=rounds, pool=2, texts=1)
    found = draw(lm_folder, prompts="the [blank] food [blank:2] near", sampler=sampler, n=5)
    for text, (first, second) in zip(found.texts, found.fills, strict=True):
        assert text == f"the{first} food{second} near"
    assert bool((found.ess < 1).any())


@pytest.mark.parametrize(
    "blank",
    [
        "[blank:]", "[blank 3]", "[blanks]", "[BLANK]", "[blank:-1]", "[blank:two]", "[ blank ]",
        "[blank",
    ],
)  # fmt: skip
def test_a_malformed_blank_is_no_text(lm_folder: Path, blank: str) -> None:
    with pytest.raises(
        dia.UserError, match=r"^prompts: \[.*allowed: \[blank\] for any number"
    ) as e:
        draw(lm_folder, prompts=f"the {blank} food")
    assert blank[:4] in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("the [blank][blank] food", "two blanks side by side given"),
        ("the [blank] [blank:2] food", "two blanks side by side given"),
        ("[blank:2][blank]", "two blanks side by side given"),
        ("the [blank:0] food [blank]", "a blank of 0 tokens, allowed: at most 14"),
        ("the [blank:99] food", "a blank of 99 tokens, allowed: at most 14"),
        ("the [blank]" + " food" * 12, "14 tokens, allowed: at most 13"),
        ("the [blank]" + " food" * 40, "tokens, allowed: at most 13"),
    ],
)
def test_pieces_that_cannot_be(lm_folder: Path, prompt: str, said: str) -> None:
    with pytest.raises(dia.UserError, match=r"^prompts: ") as e:
        draw(lm_folder, prompts=prompt)
    assert said in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("sampler", "said"),
    [
        (
            BestOfN(2),
            r"prompts: a \[blank\] of any length given, but BestOfN has one for each text",
        ),
        (Chains(), "but Chains has one for each text"),
        (TwistedSMC(), "but TwistedSMC has one for each text"),
        (Annealed([Suffix()]), "moves: Suffix given, allowed with blanks or a length"),
        (Annealed([Window(4)]), r"moves: Window given, allowed with a \[blank\] of any length"),
        (Annealed([Suffix(), Window(2)]), "moves: Suffix, Window given, allowed with a"),
    ],
    ids=str,
)
def test_who_cannot_fill_a_blank_of_any_length(
    lm_folder: Path, sampler: Sampler, said: str
) -> None:
    with pytest.raises(dia.UserError, match=said) as e:
        draw(lm_folder, prompts="the [blank] food", sampler=sampler)
    assert "\n" not in str(e.value)


def test_a_weighted_start_has_no_blanks(lm_folder: Path) -> None:
    for prompt in ("the [blank] food", "the [blank:2] food", "[blank]. food"):
        with pytest.raises(
            dia.UserError, match="start: TwistedSMC given, allowed: BaseModel where"
        ):
            draw(lm_folder, prompts=prompt, sampler=Annealed(start=TwistedSMC()))


@pytest.mark.parametrize("prompt", ["the [blank] food", "the [blank:2] food", "the[blank]"])
def test_a_length_and_blanks_are_two_things(lightning: Run, prompt: str) -> None:
    result = lightning(
        "predict", "--data.length=3", f"--data.prompts=[{prompt!r}]",
        "--data.max_length=12", "--model.sampler=Annealed",
    )  # fmt: skip
    assert_one_line(result, "--data.length: 3 given, allowed: null where prompts have blanks")
