"""p_θ is asked in its own precision whatever the trainer's, and what a text was read as is what
was rewarded.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.lm.decoding import Decoding
from dia_lightning.samplers import (
    Annealed,
    BaseModel,
    BestOfN,
    Chains,
    Critic,
    DenoiseAccept,
    GuidedDecoding,
    GuidedSamplerModule,
    Sampler,
    Spans,
    Suffix,
    TwistedSMC,
    Window,
)
from dia_lightning.types import Reward
from tests.wiring.kit import Vowels, prompted


@pytest.mark.parametrize(
    "sampler",
    [
        BaseModel(),
        BestOfN(2),
        Annealed([Suffix(cut="entropy")], particles=2),
        Annealed([Window(2, tries=2)], particles=2),
        Annealed([DenoiseAccept(Spans(2), rounds=2, tries=2)], particles=2),
        Chains(moves=[Suffix(), DenoiseAccept(Spans(2))], rounds=2),
        TwistedSMC(Critic(), particles=2, every=1),
        TwistedSMC(particles=2, every=1),
        GuidedDecoding(),
    ],
    ids=str,
)
def test_the_base_model_never_runs_under_autocast(
    lm_folder: Path, parts: Path, lm: BaseLM, sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {name: str(parts / name) for name in ("denoiser", "critic")}
    made = GuidedSamplerModule(Vowels(), sampler, str(lm_folder), **files, lam=1.0)
    asked: list[str] = []

    def watch(owner: Any, name: str) -> None:
        plain: Callable[..., Any] = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            assert not torch.is_autocast_enabled("cpu"), name
            asked.append(name)
            return plain(*arguments, **options)

        monkeypatch.setattr(owner, name, watched)

    for name in ("generate", "log_prob", "read", "logits"):
        watch(made.lm, name)
    watch(Decoding, "next_logits")
    made.lm.model.register_forward_pre_hook(lambda *_: watched_model(asked))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.is_autocast_enabled("cpu")
        for generations in made.predict_step(prompted(lm, ["the good", "the"])):
            assert generations.log_p.dtype == torch.float64
    assert {"model", "log_prob"} <= set(asked)
    if isinstance(sampler, Annealed) and not isinstance(sampler.moves[0], DenoiseAccept):
        assert {"read", "logits"} <= set(asked)


def watched_model(asked: list[str]) -> None:
    assert not torch.is_autocast_enabled("cpu")
    asked.append("model")


class Reads(Reward):
    """Remembers what it was given."""

    name = "reads"

    def __init__(self) -> None:
        self.given: list[str] = []

    def __call__(self, texts: Sequence[str]) -> Tensor:
        self.given += texts
        return torch.tensor([float(len(text)) for text in texts])


@pytest.mark.parametrize("whole", [True, False])
def test_what_is_rewarded_is_what_was_read(lm_folder: Path, lm: BaseLM, whole: bool) -> None:
    reward, given = Reads(), replace(prompted(lm, ["the good", "a", ""]), whole=whole)
    made = GuidedSamplerModule(reward, BaseModel(), str(lm_folder), compare_base=False)
    before = time.perf_counter()
    (found,) = made.predict_step(given)
    assert 0 < found.latency_s < time.perf_counter() - before
    read = (
        [p + t for p, t in zip(given.prompts, found.texts, strict=True)] if whole else found.texts
    )
    assert reward.given == read
    assert found.seen == (read if whole else [])
    assert found.reward.tolist() == [len(text) for text in read]
    assert found.rewards["reads"].tolist() == found.reward.tolist()
    assert set(found.costs) == {"base_lm"}  # of the drawing alone
    assert found.ids == [0, 1, 2]
    own = lm.decode(found.tokens, given.prompt_mask)
    assert found.texts == own
    torch.testing.assert_close(found.log_p, lm.log_prob(found.tokens, given.prompt_mask))
    whole_texts = [p + t for p, t in zip(given.prompts, own, strict=True)]
    assert torch.equal(
        found.canonical, lm.is_canonical(found.tokens, given.prompt_mask, whole_texts)
    )


def test_a_policy_is_a_part_of_the_module(lm_folder: Path) -> None:
    """So it moves to the device with it, its weights enter the run's key, and it is told among
    what was trained.
    """
    folder = str(lm_folder)
    made = GuidedSamplerModule(
        Vowels(), BaseModel(policy=folder, label="ppo"), folder, compare_base=False
    )
    assert made.models.policy is not None
    assert made.policy_network is made.models.policy.model
    assert made.models.policy.model is not made.lm.model
    assert any(name.startswith("policy_network.") for name, _ in made.named_parameters())
    assert made.trained_parts() == {"policy": folder}
    assert made.method == "ppo"
    assert set(made.language_models) == {"base_lm", "policy"}
    assert GuidedSamplerModule(Vowels(), BaseModel(), folder).trained_parts() == {}
