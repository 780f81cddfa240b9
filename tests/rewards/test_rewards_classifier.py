"""`SequenceClassifier` against transformers, one text at a time, and its soft form against the
hard one.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dia_lightning.callbacks.run_key import describe
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.schedule import make_schedule
from dia_lightning.errors import UserError
from dia_lightning.guidance import guided, true_gradient, unguided
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.rewards import SequenceClassifier, check_reward
from dia_lightning.rewards.base import RewardError
from dia_lightning.samplers import DDIM, Diffusion, GuidedSamplerModule, RewardGradient
from dia_lightning.types import Batch
from tests.rewards.tiny_classifiers import FAMILIES, WINDOW, Oracle, make_classifier, make_tokenizer

TEXTS = [
    "the good food is great.", "a", "", "the bad food is poor near the river. We like it!",
    "We like the cheap pub", "the " * 40, "the river", "!",
    "the good food is great near the river. We like it!",
]  # fmt: skip
ODD = [
    " \n\t",
    "\0\0",
    "😀👍🏽",
    "Привет, как дела?",
    "你好，世界",
    "مرحبا",
    "a" * 100_000,
    "good " * 20_000,
    "[CLS] [SEP] [PAD]",
]

Folders = Callable[..., Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Each classifier is made once."""
    made: dict[str, Path] = {}

    def folder(family: str, **options: Any) -> Path:
        key = family + json.dumps(options, sort_keys=True)
        if key not in made:
            made[key] = make_classifier(
                tmp_path_factory.mktemp("models") / family, family, **options
            )
        return made[key]

    return folder


@cache
def make(folder: Path, label: int | str = "good", **options: Any) -> SequenceClassifier:
    return SequenceClassifier(str(folder), label, **options)


oracle_of = cache(Oracle)


def log_p(folder: Path, texts: list[str], index: int = 1, window: int = WINDOW) -> Tensor:
    oracle = oracle_of(folder)
    return torch.stack(
        [oracle.logits(text, window=window).double().log_softmax(0)[index] for text in texts]
    ).float()


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_transformers_answer_for_each_text_alone(folders: Folders, family: str) -> None:
    folder = folders(family)
    texts = TEXTS + ODD if family == "gpt2" else TEXTS
    right = log_p(folder, texts)
    assert float(right.std()) > 0.05
    for batch_size in (1, 4):
        values = make(folder, batch_size=batch_size)(texts)
        torch.testing.assert_close(values, right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_it_obeys_the_laws(folders: Folders, family: str) -> None:
    check_reward(make(folders(family), batch_size=3), TEXTS if family == "bert" else ODD)


def test_half_a_surrogate_pair_is_read_as_a_question_mark(folders: Folders) -> None:
    half, mark = make(folders("bert"))(["a \ud800 b", "a ? b"])
    assert half == mark


def test_labels_outputs_and_sign(folders: Folders) -> None:
    folder = folders("bert")
    oracle = oracle_of(folder)
    logits = torch.stack([oracle.logits(text) for text in TEXTS])
    for index, name in enumerate(("bad", "good", "odd")):
        for label in (index, str(index), name):
            torch.testing.assert_close(
                make(folder, label, output="logit")(TEXTS), logits[:, index], rtol=0, atol=1e-5
            )
    torch.testing.assert_close(
        make(folder, output="prob")(TEXTS), logits.softmax(1)[:, 1], rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        make(folder, output="prob", sign=-1)(TEXTS), -logits.softmax(1)[:, 1], rtol=0, atol=1e-5
    )


def test_several_labels_at_once_are_sigmoids(folders: Folders) -> None:
    folder = folders("bert", problem_type="multi_label_classification")
    oracle = oracle_of(folder)
    logits = torch.stack([oracle.logits(text) for text in TEXTS])
    torch.testing.assert_close(
        make(folder, output="prob")(TEXTS), logits.sigmoid()[:, 1], rtol=0, atol=1e-5
    )
    torch.testing.assert_close(make(folder)(TEXTS), logits.sigmoid().log()[:, 1], rtol=0, atol=1e-5)


def test_a_model_with_one_score_has_a_logit_only(folders: Folders) -> None:
    folder = folders("gpt2", labels=["score"])
    torch.testing.assert_close(
        make(folder, 0, output="logit")(["a"])[0],
        oracle_of(folder).logits("a")[0],
        rtol=0,
        atol=1e-5,
    )
    with pytest.raises(UserError, match=r"^output: log_prob given, allowed: logit"):
        make(folder, 0)


@pytest.mark.parametrize("max_length", [3, 8, WINDOW])
def test_longer_texts_are_cut(folders: Folders, max_length: int) -> None:
    for family in ("bert", "gpt2"):
        folder = folders(family)
        values = make(folder, max_length=max_length)(TEXTS)
        torch.testing.assert_close(
            values, log_p(folder, TEXTS, window=max_length), rtol=0, atol=1e-5
        )


def test_texts_of_like_length_share_a_batch(folders: Folders) -> None:
    reward, read = make(folders("bert"), batch_size=2), []
    reward._network.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    reward(["a", "the good food is great", "!", "the good food is great"])
    assert read[0] == (2, 3)  # with [CLS] and [SEP]
    assert read[1][1] > 3
    assert len(read) == 2


def test_the_trainers_precision_changes_nothing(folders: Folders) -> None:
    reward = make(folders("bert"))
    with torch.autocast("cpu", torch.bfloat16):
        values = reward(TEXTS)
    assert torch.equal(values, reward(TEXTS))


def test_it_is_described_and_pickled(folders: Folders) -> None:
    reward = make(folders("distilbert"))
    assert describe(reward)["label"] == "good"
    assert torch.equal(pickle.loads(pickle.dumps(reward))(TEXTS), reward(TEXTS))


# The soft form.


def rows_of(
    tokenizer: Any, texts: list[str], length: int, columns: int
) -> tuple[Tensor, list[str]]:
    """One-hot rows (B, length, columns), end tokens after each text and noise after the first of
    those, and the texts.
    """
    ids = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=length)[
        "input_ids"
    ]
    noise = torch.randint(4, 260, (len(texts), length), generator=torch.Generator().manual_seed(0))
    for row, tokens in zip(noise, ids, strict=True):
        row[: len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        row[len(tokens) : len(tokens) + 1] = tokenizer.eos_token_id
    return torch.nn.functional.one_hot(noise, columns).float(), texts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [20, 50])
def test_on_one_hot_rows_soft_is_the_reward(folders: Folders, family: str, length: int) -> None:
    """With padding columns, rows shorter and longer than the window, and tokens after the end."""
    reward = make(folders(family))
    texts = [
        text for text in TEXTS if len(reward._tokenizer(text)["input_ids"]) < 20 or length == 50
    ]
    probabilities, texts = rows_of(reward._tokenizer, texts, length, len(reward._tokenizer) + 5)
    torch.testing.assert_close(reward.soft(probabilities), reward(texts), rtol=0, atol=1e-5)


def mixture(reward: SequenceClassifier, seed: int = 0, n: int = 5) -> Tensor:
    """(3, n, V) float64, likeliest tokens far from a tie; the second row ends after two tokens,
    the third at once.
    """
    logits = torch.randn(
        3,
        n,
        len(reward._tokenizer),
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
    )
    logits[..., 0] = -1.0
    logits[..., 7] += 6.0
    logits[1, 2, 0] = logits[2, 0, 0] = 12.0
    return logits.softmax(-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_is_what_transformers_makes_of_the_mean_embedding(
    folders: Folders, family: str
) -> None:
    folder = folders(family)
    reward, oracle = make(folder), oracle_of(folder)
    table, ids = (
        oracle.model.get_input_embeddings().weight,
        oracle.tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]"]),
    )
    probabilities, right = mixture(reward), []
    for row, n in zip(probabilities.float(), (5, 2, 0), strict=True):
        embeds = row[: n if n or family not in ("gpt2", "llama") else 1] @ table
        if family not in ("gpt2", "llama"):
            embeds = torch.cat([table[ids[:1]], embeds, table[ids[1:]]])
        right.append(oracle.model(inputs_embeds=embeds[None]).logits[0].log_softmax(0)[1])
    values = reward.soft(probabilities)
    assert values.dtype == torch.float64
    torch.testing.assert_close(values.float(), torch.stack(right).detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_its_gradient_is_that_of_finite_differences(folders: Folders, family: str) -> None:
    """In float64, along 6 random directions: central differences at h = 1e-5 err by O(h²) ≈
    1e-9.
    """
    reward = SequenceClassifier(str(folders(family)), "good")
    reward._network.double()
    p = mixture(reward).requires_grad_()
    (gradient,) = torch.autograd.grad(reward.soft(p).sum(), p)
    generator, h = torch.Generator().manual_seed(1), 1e-5
    for _ in range(6):
        v = torch.randn(p.shape, generator=generator, dtype=torch.float64) / 10
        with torch.no_grad():
            difference = (reward.soft(p + h * v).sum() - reward.soft(p - h * v).sum()) / (2 * h)
        assert float(difference) == pytest.approx(float((gradient * v).sum()), rel=1e-5, abs=1e-8)
    assert float(gradient[0].abs().max()) > 1e-4
    assert float(gradient[1, 2:].abs().max()) == 0


def test_embeddings_are_masked(folders: Folders) -> None:
    for family in ("bert", "gpt2"):
        reward = make(folders(family))
        embeds = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
        mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
        values = reward.reward_from_embeddings(embeds, mask)
        alone = reward.reward_from_embeddings(embeds[1:, :4], mask[1:, :4])
        torch.testing.assert_close(values[1:], alone, rtol=0, atol=1e-5)


def test_the_base_models_tokenizer_is_compared(folders: Folders, lm: BaseLM) -> None:
    reward = make(folders("gpt2"))
    reward.check_tokenizer(make_tokenizer(False))
    for other in (lm.tokenizer, make_tokenizer(False, 310)):
        with pytest.raises(
            UserError,
            match=r"^guidance: RewardGradient given, .* does not share the base model's tokenizer",
        ):
            reward.check_tokenizer(other)
    with pytest.raises(RewardError, match=r"soft needs a tokenizer shared"):
        reward.soft(torch.zeros(1, 2, 0))


def test_guidance_climbs_it(folders: Folders) -> None:
    """`true_gradient` through the classifier: a step of guidance raises the reward of what the
    denoiser expects.
    """
    reward = make(folders("gpt2"))
    embedding, schedule = TokenEmbedding(reward._table()), make_schedule("cosine")
    generator = torch.Generator().manual_seed(0)
    z, t = torch.randn(2, 6, 16, generator=generator), torch.full((2, 6), 0.5)

    def network(z: Tensor, t: Tensor, z0_prev: Tensor | None = None) -> Tensor:
        return z @ embedding.weight.T / 4

    value = true_gradient(reward, network, embedding, 1.0)
    predict = unguided(network, embedding)
    steered = guided(predict, value, schedule, embedding, cap=0.3)(z, t, None).logits
    plain = predict(z, t, None).logits
    assert bool((reward.soft(steered.softmax(-1)) > reward.soft(plain.softmax(-1)) + 1e-3).all())


def test_a_sampler_takes_its_gradient_only_with_the_tokenizer_of_its_model(
    folders: Folders, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError,
        match=r"^guidance: RewardGradient given, .* does not share the base model's tokenizer",
    ):
        GuidedSamplerModule(make(folders("gpt2")), Diffusion(DDIM(0.1), RewardGradient()))
    tokenizer = BaseLM.load("checkpoints/tiny/lm").tokenizer
    folder = make_classifier(tmp_path / "own", "gpt2", tokenizer=tokenizer)
    module = GuidedSamplerModule(make(folder), Diffusion(DDIM(0.1), RewardGradient(), steps=2))
    tokens = torch.full((2, 8), module.lm.end_id)
    batch = Batch(0, [0, 1], ["", ""], tokens, torch.zeros(2, 8, dtype=torch.bool))
    assert torch.isfinite(module.predict_step(batch)[0].reward).all()


# What cannot be loaded.


def test_what_is_not_there_or_not_fit_is_named(
    folders: Folders, lm_folder: Path, tmp_path: Path
) -> None:
    folder = folders("bert")
    for label in ("Good", "good ", "", 3, -1, "3"):
        with pytest.raises(
            UserError,
            match=r"^label: .* given, allowed: bad, good, odd, or an index up to 2$",
        ):
            make(folder, label)
    for options, message in (
        ({"output": "logp"}, "output: logp given, allowed: log_prob, prob or logit"),
        ({"batch_size": 0}, "batch_size: 0 given"),
        ({"sign": 0.0}, "sign: 0.0 given, allowed: -1 or 1"),
        ({"max_length": 2}, f"max_length: 2 given, allowed: 3 to {WINDOW}"),
        ({"max_length": WINDOW + 1}, f"max_length: {WINDOW + 1} given, allowed: 3 to {WINDOW}"),
    ):
        with pytest.raises(UserError, match=f"^{message}"):
            make(folder, **options)
    with pytest.raises(UserError, match=r"^model: no such folder"):
        SequenceClassifier("./nowhere", 0)
    with pytest.raises(UserError, match=r"^model: .* holds no config.json"):
        SequenceClassifier(str(tmp_path), 0)
    # A language model's head for classes would be drawn at random.
    with pytest.raises(
        UserError,
        match=(r"^model: .*a trained sequence classifier; .*no weights 'score.weight'"),
    ):
        SequenceClassifier(str(lm_folder), 0)


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def lost(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lost)
    said = r"cannot fetch 'no/such' from the hub \(no network\); give a local folder"
    with pytest.raises(UserError, match=rf"^model: {said}$"):
        SequenceClassifier("no/such", 0)
    with pytest.raises(UserError, match=rf"^base_lm: {said}, or use the shipped kit: checkpoints"):
        BaseLM.load("no/such")


def test_pickled_weights_and_remote_code_are_not_run(folders: Folders, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = make_classifier(tmp_path / "model", "bert")
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(UserError, match=r"^model: .*model given, .* cannot load it \("):
        make(folder)
    remote = make_classifier(tmp_path / "remote", "bert")
    config = json.loads((remote / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "mine.C", "AutoModelForSequenceClassification": "mine.M"},
    }
    (remote / "config.json").write_text(json.dumps(config))
    (remote / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match=r"^model: .* cannot load it"):
        make(remote)
    assert not (tmp_path / "ran").exists()
