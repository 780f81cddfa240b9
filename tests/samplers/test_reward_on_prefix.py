"""Unfinished texts weighed by the reward or a critic: exact on listed models whatever the twist
and the schedule, and asked no oftener than that says.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from dia_lightning.data.prompts import prompt_rows
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.errors import UserError
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.rewards.base import CachedReward
from dia_lightning.samplers import BaseModel, Critic, Models, RewardOnPrefix, TwistedSMC
from dia_lightning.samplers.base import draw_base
from dia_lightning.sampling.annealing import particles_of
from dia_lightning.testing import TableLM, TableReward, table_lm
from dia_lightning.testing.law import Law, exact_law
from dia_lightning.types import Batch, Record, Reward

LAM, T = 1.2, 4
PROMPTS = ["", "a", "b "]
Every = int | Literal["word"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_spaces() -> TableLM:
    """Texts of the letters a, b and the space, up to four of them."""
    lm = table_lm(3, T, seed=4)
    lm.tokenizer.letters = "ab "
    return lm


def models_of(lm: BaseLM, reward: Reward, lam: float = LAM) -> Models:
    embedding = TokenEmbedding(lm.embedding_table(), len(lm.tokenizer))

    def critic(z: Tensor, t: Tensor) -> Tensor:
        return 0.4 * (z.sum((1, 2)) + t.sum(1)).sin()

    return Models(lm, embedding, None, critic, reward, lam)  # type: ignore[arg-type]


def apart(batch: Batch, times: int) -> Batch:
    """A population for each of `times` copies of every row."""
    prompts = batch.prompts * times
    return replace(
        batch, ids=list(range(len(prompts))), prompts=prompts, tokens=batch.tokens.repeat(times, 1),
        prompt_mask=batch.prompt_mask.repeat(times, 1),
        records=[{"number": i} for i in range(len(prompts))],
    )  # fmt: skip


def check_unbiased(lm: TableLM, sampler: TwistedSMC, reward: Reward, times: int) -> None:
    """Ẑ, and Ẑ times the weight of each text of π(x) > 0.04, over `times` populations of 8 a
    prompt: within 4.5 standard errors, a false-alarm rate of 7e-6 for each of at most 50 figures
    where they are normal, so a text must be in 40 populations.
    """
    crowd, n_groups, _ = particles_of(apart(lm.batch(PROMPTS), times), 8)
    found = sampler.population(models_of(lm, reward), crowd, n_groups, seeded(3))
    assert found.tokens.shape == (n_groups * 8, T)
    assert found.log_w.shape == (n_groups, 8)
    assert found.log_w.dtype == found.log_z.dtype == torch.float64
    assert found.lam == LAM
    tokens, figures = found.tokens.view(n_groups, 8, T), 0
    for i, prompt in enumerate(PROMPTS):
        law: Law = exact_law(lm, reward, found.lam, prompt)
        z = (found.log_z[i :: len(PROMPTS)] - law.log_z).exp()
        weights = z[:, None] * found.log_w[i :: len(PROMPTS)].softmax(1)
        figured = [(z, 1.0)]
        for x in np.flatnonzero(law.pi > 0.04):
            here = (tokens[i :: len(PROMPTS)] == law.rows[x]).all(-1)
            figured.append(((weights * here).sum(1), float(law.pi[x])))
        for values, want in figured:
            error = float(values.std()) / times**0.5
            assert int((values > 0).sum()) > 40
            assert error < 0.06
            assert abs(float(values.mean()) - want) < 4.5 * error, (prompt, want)
        figures += len(figured)
    assert 8 < figures < 50


@pytest.mark.parametrize("every", [1, 2, "word"])
@pytest.mark.parametrize("twist", [RewardOnPrefix(), Critic()], ids=["reward", "critic"])
def test_unbiased(twist: Any, every: Every) -> None:
    """Ends, and prompts of three lengths in one batch."""
    lm = with_spaces()
    sampler = TwistedSMC(twist, every=every, ess=0.8)
    check_unbiased(lm, sampler, TableReward(lm), 1000)


class Trap(TableReward):
    """Good for whatever begins with a until a text has four letters, then bad; and the reverse."""

    def __init__(self, lm: TableLM) -> None:
        long = np.array([len(text) == T for text in lm.texts()])
        a = np.array([text.startswith("a") for text in lm.texts()])
        super().__init__(lm, np.where(a ^ long, 1.0, -1.0))


@pytest.mark.parametrize("every", [1, 2, "word"])
def test_a_reward_that_misleads_is_exact(every: Every) -> None:
    lm = with_spaces()
    check_unbiased(lm, TwistedSMC(every=every, ess=0.7), Trap(lm), 1200)


@pytest.mark.parametrize("every", [1, "word"])
def test_many_particles_are_draws_of_the_target(every: Every) -> None:
    """4,000 texts of one prompt of a population of 16,000: total variation to π below 0.06; 4,000
    independent draws of some 85 texts are at 0.04 on average. p_θ is at more than 0.2.
    """
    lm = with_spaces()
    reward, law = TableReward(lm), exact_law(lm, TableReward(lm), LAM)
    batch = lm.batch([""] * 4000)
    sampler = TwistedSMC(particles=4, every=every)
    drawn = sampler.draw(models_of(lm, reward), batch, seeded(0))
    assert drawn.diagnostics is not None
    assert abs(float(drawn.diagnostics["log_z"][0]) - law.log_z) < 0.05
    place = {tuple(row): i for i, row in enumerate(law.rows.tolist())}
    count = np.bincount([place[tuple(row)] for row in drawn.tokens.tolist()], minlength=len(place))
    assert np.abs(count / 4000 - law.pi).sum() / 2 < 0.06
    assert np.abs(np.exp(law.log_p) - law.pi).sum() / 2 > 0.2


class Recorded(Reward):
    """The table's reward, with every call's texts."""

    name = "recorded"

    def __init__(self, lm: TableLM) -> None:
        self.inner, self.calls = TableReward(lm), list[list[str]]()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        self.calls.append(list(texts))
        return self.inner(texts)


def every_n(n: int) -> Callable[[str], set[str]]:
    return lambda text: {text[:k] for k in range(n, T, n) if k <= len(text)}


def word_ends(text: str) -> set[str]:
    """Where a space follows; the last letter is at the end, where the text itself counts."""
    return {text[:k] for k in range(1, T - 1) if text[k : k + 1] == " " and text[k - 1] != " "}


@pytest.mark.parametrize(
    ("every", "wanted"), [(1, every_n(1)), (2, every_n(2)), (3, every_n(3)), ("word", word_ends)]
)
def test_which_prefixes_are_asked(every: Every, wanted: Callable[[str], set[str]]) -> None:
    """Without resampling those of the texts that come out, and each finished text; in two calls
    a place at most.
    """
    lm = with_spaces()
    reward = Recorded(lm)
    crowd, n_groups, _ = particles_of(lm.batch([""] * 40), 2)
    sampler = TwistedSMC(every=every, ess=0.0)
    found = sampler.population(models_of(lm, reward), crowd, n_groups, seeded(1))
    texts = lm.decode(found.tokens, torch.zeros_like(found.tokens, dtype=torch.bool))
    want = set(texts).union(*map(wanted, texts))
    asked = {text for call in reward.calls for text in call}
    # A space behind a space asks for what stands before it too, and so for what was asked then.
    assert want <= asked
    assert all(x in want or (every == "word" and x.endswith(" ")) for x in asked)
    assert len(reward.calls) <= 2 * T
    plain = Recorded(lm)
    Critic_only = TwistedSMC(Critic(), every=every, ess=0.0)
    found = Critic_only.population(models_of(lm, plain), crowd, n_groups, seeded(1))
    texts = lm.decode(found.tokens, torch.zeros_like(found.tokens, dtype=torch.bool))
    assert sorted(text for call in plain.calls for text in call) == sorted(texts)


def test_without_lambda_no_prefix_is_asked() -> None:
    lm = with_spaces()
    reward = Recorded(lm)
    models = models_of(lm, reward, 0.0)._replace(critic=None)
    for twist in (RewardOnPrefix(), Critic()):
        reward.calls.clear()
        drawn = TwistedSMC(twist, every=1).draw(models, lm.batch([""] * 9), seeded(0))
        assert sum(map(len, reward.calls)) == 9 * 4
        assert drawn.diagnostics is not None
        assert not drawn.diagnostics["log_z"].any()


def test_equal_prefixes_are_asked_once() -> None:
    lm = with_spaces()
    inner = Recorded(lm)
    TwistedSMC(every=1).draw(models_of(lm, CachedReward(inner)), lm.batch([""] * 50), seeded(0))
    asked = [text for call in inner.calls for text in call]
    assert len(asked) == len(set(asked)) > 20


def test_the_cache_keeps_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one call has more texts than it keeps."""
    monkeypatch.setattr("dia_lightning.rewards.base._MOST_KNOWN", 3)
    lm = with_spaces()
    inner, texts = Recorded(lm), ["a", "b", "ab", "ba", "aa"]
    cached, want = CachedReward(inner), TableReward(lm)(texts)
    assert torch.equal(cached(texts), want)
    assert torch.equal(cached(texts[2:]), want[2:])
    assert inner.calls == [texts]
    assert torch.equal(cached(texts[:2]), want[:2])
    assert inner.calls == [texts, texts[:2]]
    assert torch.equal(cached(["aa", "a", "b"]), want[[4, 0, 1]])
    assert len(inner.calls) == 2


class Seen(Reward):
    """The number in each text's record."""

    name, conditional = "seen", True

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, texts: Sequence[str], records: Sequence[Record] = ()) -> list[float]:
        self.texts = list(texts)
        return [record["number"] for record in records]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("text", ["é", "a 北京b", "😀 the", "the naïve Ωé"])
def test_a_character_that_is_there_in_part_is_left_out(lm: BaseLM, text: str, whole: bool) -> None:
    """The tokens of the small model are bytes: each prefix is read up to its last whole character,
    with its prompt where rewards read that.
    """
    n = len(lm.token_ids([text])[0])
    tokens, mask = prompt_rows(lm, ["the good"], 3 + n)
    given = int(mask.sum())
    tokens[0, given : given + n] = torch.tensor(lm.continued_ids([text])[0])
    rows, reward = torch.arange(n + 1), Seen()
    batch = Batch(0, [0], ["the good"], tokens, mask, whole=whole)
    crowd = apart(batch, n + 1)
    known = torch.arange(tokens.shape[1]) < (given + rows)[:, None]
    value = RewardOnPrefix().value(models_of(lm, reward), crowd, seeded(0))
    # In another order than the batch's, so that each must find its own record.
    found = value(crowd.tokens.flip(0), known.flip(0), rows.flip(0))
    data, before = text.encode(), "the good" if whole else ""
    sizes = [len(reward_text[len(before) :].encode()) for reward_text in reward.texts[::-1]]
    for k, seen in enumerate(reward.texts[::-1]):
        assert seen == before + data[: sizes[k]].decode()
    assert sizes[0] == 0
    assert sizes == sorted(sizes)
    assert reward.texts[0] == before + text
    assert found.tolist() == rows.flip(0).tolist()
    raw = lm.decode(crowd.tokens.where(known, lm.end_id), crowd.prompt_mask)
    assert any("\ufffd" in x for x in raw)


def test_tokens_that_begin_a_word() -> None:
    lm = table_lm(11, 2)
    lm.tokenizer.letters = "aé7_ .'北й\u0301\u200b"
    starts = dict(zip(lm.tokenizer.letters, lm.word_starts.tolist(), strict=False))
    assert [letter for letter, start in starts.items() if start] == [" ", ".", "'", "北", "\u200b"]
    assert lm.word_starts.shape == (12,)
    assert not lm.word_starts[lm.end_id]


def test_words_of_a_real_tokenizer(lm: BaseLM) -> None:
    """Byte-level BPE, which puts the space before a word."""
    pieces = lm.tokenizer.convert_ids_to_tokens(range(len(lm.tokenizer)))
    starts = dict(zip(pieces, lm.word_starts.tolist(), strict=False))
    assert starts["Ġthe"]
    assert starts["Ġ"]
    assert starts["."]
    assert not starts["t"]
    assert not starts["oo"]


def test_population_of_the_base_model() -> None:
    lm = with_spaces()
    models = models_of(lm, TableReward(lm))
    crowd, n_groups, _ = particles_of(apart(lm.batch(PROMPTS), 2), 5)
    found = BaseModel().population(models, crowd, n_groups, seeded(7))
    assert torch.equal(found.tokens, draw_base(lm, crowd, seeded(7)).tokens)
    assert found.log_w.tolist() == [[0.0] * 5] * 6
    assert found.log_z.tolist() == [0.0] * 6
    assert found.log_w.dtype == found.log_z.dtype == torch.float64
    assert found.lam == 0
    for other in (
        BaseModel(temperature=0.9), BaseModel(top_k=3), BaseModel(top_p=0.9),
        BaseModel(policy="folder", label="ppo"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=r"^start: BaseModel.* given, allowed: BaseModel with"):
            other.population(models, crowd, n_groups, seeded(7))
