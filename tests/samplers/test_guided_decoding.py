"""Guided decoding: exact limits on an enumerable table, and the module with a critic on a small
random model.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from dia_lightning.data.prompts import prompt_rows
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.errors import UserError
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.samplers import GuidedDecoding, GuidedSamplerModule
from dia_lightning.samplers.guided_decoding import decode_guided
from dia_lightning.samplers.networks import load_value
from dia_lightning.samplers.prefix import critic_of_prefixes, settled
from dia_lightning.types import Batch, text_mask
from tests.oracles.table_lm import END, LAM, NEXT, ROWS, T, pi
from tests.oracles.table_model import P, TableValue, chi_square_ok, free, soft_values, table_lm
from tests.samplers.test_particle_steering import ShareOfVowels, batch

N = 4000


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_exact_value_gives_the_target() -> None:
    """All candidates and log E[exp(λ r) | prefix]: χ² of 4000 texts at false-alarm rate 10⁻³;
    half the weight fails it.
    """
    given, value = free(N), TableValue(soft_values())
    tokens = decode_guided(table_lm(), given.tokens, given.prompt_mask, value, LAM, 0, seeded(1))
    assert chi_square_ok(tokens, pi())
    assert value.asked == N * 3 * T
    tokens = decode_guided(
        table_lm(), given.tokens, given.prompt_mask, value, LAM / 2, 0, seeded(1)
    )
    assert not chi_square_ok(tokens, pi())


def test_prompts_condition_the_target() -> None:
    """The same given the first token: π(x | x_1)."""
    given = free(N)
    given.tokens[:, 0], given.prompt_mask[:, 0] = 1, True
    value = TableValue(soft_values())
    tokens = decode_guided(table_lm(), given.tokens, given.prompt_mask, value, LAM, 3, seeded(2))
    first = torch.tensor([row[0] == 1 for row in ROWS]).numpy()
    assert chi_square_ok(tokens, pi() * first / (pi() * first).sum())
    assert value.asked == N * 3 * (T - 1)


@pytest.mark.parametrize("value", [TableValue(soft_values()), None])
def test_no_weight_is_the_base_model(value: TableValue | None) -> None:
    """χ² of 4000 texts against p_θ at false-alarm rate 10⁻³."""
    given = free(N)
    tokens = decode_guided(table_lm(), given.tokens, given.prompt_mask, value, 0.0, 0, seeded(3))
    assert value is None or value.asked == 0
    assert chi_square_ok(tokens, P)


@pytest.mark.parametrize("final", ["sample", "argmax"])
def test_one_candidate_is_greedy(final: str, lm: BaseLM) -> None:
    given = batch(lm, ["the", "the good", "a"])
    greedy = lm.generate(given.tokens, given.prompt_mask, seeded(0), top_k=1)

    def value(tokens: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        return 9 * tokens.double().sin().sum(1)

    tokens = decode_guided(lm, given.tokens, given.prompt_mask, value, 2.0, 1, seeded(4), final)
    assert torch.equal(tokens, greedy)
    tokens = decode_guided(lm, given.tokens, given.prompt_mask, value, 2.0, 5, seeded(4), final)
    assert not torch.equal(tokens, greedy)


def test_argmax_takes_the_best_of_candidates() -> None:
    """Token by token the largest of log p + λ h, worked out from the tables."""
    values = soft_values()
    row: tuple[int, ...] = ()
    while len(row) < T and END not in row:
        best = max(
            range(3),
            key=lambda v: (
                float(torch.log(torch.tensor(NEXT[row][v]))) + 3.0 * values[_whole((*row, v))]
            ),
        )
        row = (*row, best)
    given = free(2)
    tokens = decode_guided(
        table_lm(), given.tokens, given.prompt_mask, TableValue(values), 3.0, 0, seeded(0), "argmax"
    )
    assert [tuple(x) for x in tokens.tolist()] == [_whole(row)] * 2


def _whole(prefix: tuple[int, ...]) -> tuple[int, ...]:
    return prefix + (END,) * (T - len(prefix)) if END in prefix else prefix


def test_settled() -> None:
    tokens = torch.tensor([[0, 1, 7, 7], [0, 7, 7, 7], [7, 1, 1, 1]])
    prompt = torch.tensor([[True, False, False, False], [False] * 4, [True, True, True, False]])
    known = settled(tokens, prompt, 2, end_id=7)
    assert known.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]


def test_the_critic_sees_a_clean_prefix_and_noise(
    critic_folder: Path, embedding: TokenEmbedding
) -> None:
    """Against the critic asked by hand; tokens that are not settled make no difference."""
    value = load_value(str(critic_folder / "mse"), embedding, "vowels", 1.0)
    of = critic_of_prefixes(value, embedding, 6, seeded(5))
    noise = torch.randn(6, embedding.dim, generator=seeded(5))
    tokens = torch.randint(0, 200, (700, 6), generator=seeded(6))
    known = torch.arange(6) < torch.randint(0, 7, (700, 1), generator=seeded(7))
    z = embedding(tokens)
    z[~known] = noise.expand(700, 6, -1)[~known]
    got = of(tokens, known)
    torch.testing.assert_close(got, value(z, 1 - known.float()))
    torch.testing.assert_close(of(torch.where(known, tokens, 3), known), got)
    assert float(got.std()) > 1e-3


def module(lm_folder: Path, critic_folder: Path, **options: Any) -> GuidedSamplerModule:
    files = {"base_lm": str(lm_folder), "critic": str(critic_folder / "mse")}
    given = {**files, "lam": 0.7, "compare_base": False} | options
    return GuidedSamplerModule(ShareOfVowels(), GuidedDecoding(top_k=4), **given)


def test_module(lm_folder: Path, critic_folder: Path, lm: BaseLM) -> None:
    guided = module(lm_folder, critic_folder)
    assert guided.value is not None
    calls = []
    guided.value.critic.trunk.register_forward_pre_hook(
        lambda network, inputs: calls.append(len(inputs[0]))
    )
    given = batch(lm, ["the good", "the"])
    (generations,) = guided.predict_step(given)
    tokens = generations.tokens
    assert torch.equal(tokens[given.prompt_mask], given.tokens[given.prompt_mask])
    assert bool((tokens[~text_mask(tokens, given.prompt_mask, lm.end_id)] == lm.end_id).all())
    assert generations.costs["base_lm"][:2] == (2 * 6, 2 * 6)
    assert generations.costs["critic"][:2] == (sum(calls), 6 * sum(calls))
    assert generations.method == "guided_decoding"
    (again,) = guided.predict_step(given)
    assert torch.equal(again.tokens, tokens)


def test_without_weight_no_critic_is_needed(
    lm_folder: Path, critic_folder: Path, lm: BaseLM
) -> None:
    (generations,) = module(lm_folder, critic_folder, lam=0.0, critic=None).predict_step(
        batch(lm, ["the"])
    )
    assert generations.costs.keys() == {"base_lm"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": -1.0}, "^lam: -1.0 given, allowed: 0 or more"),
        ({"critic": None}, "^critic: none given"),
    ],
)
def test_options_are_checked(
    lm_folder: Path, critic_folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        module(lm_folder, critic_folder, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": -1}, "^top_k: -1 given, allowed: 0 or more"),
        ({"final": "beam"}, "^final: beam given, allowed: sample, argmax"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GuidedDecoding(**options)


def test_a_soft_critic_is_for_one_lambda_and_blanks_are_refused(
    lm_folder: Path, critic_folder: Path, lm: BaseLM
) -> None:
    soft = str(critic_folder / "soft")
    with pytest.raises(
        UserError, match=r"lam: 1.5 given, allowed: 0.7, for which the soft critic .* was trained"
    ):
        module(lm_folder, critic_folder, critic=soft, lam=1.5)
    prompts = ["the[blank:2] pub"]
    given = Batch(0, [0], prompts, *prompt_rows(lm, prompts, 8))
    with pytest.raises(
        UserError, match="blanks or a length given, but GuidedDecoding writes from left to right"
    ):
        module(lm_folder, critic_folder, critic=soft).draw(given, torch.Generator())
