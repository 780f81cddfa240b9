"""Whatever is given, either it works or a `UserError` says why not; `make fuzz` runs these
100,000 times.
"""

import contextlib
import inspect
import json
import math
import re
import string
from collections import Counter
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import sacrebleu
import torch
from hypothesis import HealthCheck, example, given, reject, settings
from hypothesis import strategies as st

from dia_lightning import cli, samplers
from dia_lightning.data import HubSource, HubText, ModelSamples, PromptData, TextFiles
from dia_lightning.data.prompts import Reading, prompt_rows
from dia_lightning.data.records import fill_template, read_records, template_fields
from dia_lightning.data.text import read_texts
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.labels import RewardLabels
from dia_lightning.errors import UserError
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.metrics import DistinctN, SelfBLEU
from dia_lightning.metrics.functional import distinct_n, perplexity, self_bleu
from dia_lightning.rewards import Regex
from dia_lightning.samplers import (
    BaseModel,
    Chains,
    ClassifierFree,
    CriticGuidance,
    DenoiseAccept,
    Diffusion,
    Guidance,
    GuidedSamplerModule,
    Move,
    ParticleSteering,
    PrefixTwist,
    RewardGradient,
    Sampler,
    Solver,
)
from dia_lightning.sampling.positions import Positions, RandomTokens, Spans, WholeText
from dia_lightning.settings import parser
from dia_lightning.training import CriticModule, DenoiserModule, PPOModule
from dia_lightning.training.base import Network, Noising
from dia_lightning.training.base_model import LMModule
from dia_lightning.training.optim import AdamW
from dia_lightning.training.ppo import GAE, Estimator, LeaveOneOut, Updates
from dia_lightning.words import resolve
from tests.oracles.in_parts import in_parts
from tests.wiring.kit import save_parts

MANY = settings.default.max_examples > 100  # as in the profile `fuzz` of tests/conftest.py
fuzz = settings(deadline=None, derandomize=not MANY, suppress_health_check=list(HealthCheck))
# A command line takes a second.
fuzz_slowly = settings(fuzz, max_examples=max(6, settings.default.max_examples // 50))


@contextlib.contextmanager
def one_line(*names: str) -> Any:
    """What may be raised: a `UserError` that says something, and not on and on.

    It begins with an option as the command line has it, or with one of `names`.
    """
    message = "--"
    try:
        yield
    except UserError as error:
        message = str(error)
    named = re.match(r"--|reward|[a-z_]\w*(\.\w+)*: ", message)  # an option, or an argument
    assert named or message.startswith(tuple(f"{name}: " for name in names))
    assert len(message) < 2000


# Files of prompts and texts

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["prompt", "source", "a", ""]), inner, max_size=3)
    ),
    max_leaves=6,
)
OBJECTS = st.dictionaries(
    st.sampled_from(["prompt", "source", "references", "a.b", ""]), JSON, min_size=1, max_size=3
)


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


# `json` writes halves of surrogate pairs as escapes.
JSON_LINES = st.lists(OBJECTS, max_size=4).map(
    lambda rows: "\n".join(map(json.dumps, rows)).encode()
)
SHAPED = st.text(string.printable + "é\ufeff\u2028\0\"',", max_size=60).map(str.encode)
TABLE = st.lists(SHAPED, max_size=4).map(lambda lines: b"\n".join([b"prompt,a", *lines]))
CONTENT = (
    st.binary(max_size=60)
    | SHAPED
    | JSON_LINES
    | TABLE
    | JSON.map(dumped)
    | st.lists(OBJECTS | st.text(max_size=8)).map(dumped)
)
SUFFIXES = st.sampled_from([".txt", ".jsonl", ".csv", ".tsv", ".json", ".parquet"])


@fuzz
@given(SUFFIXES, CONTENT)
@example(".csv", b'prompt\n"a')
@example(".csv", b"prompt,prompt\na,b")
@example(".jsonl", b'{"prompt": "\\ud800"}')
@example(".jsonl", b"[" * 100_000)
@example(".jsonl", b'{"prompt": ' + b"1" * 5000 + b"}")
@example(".json", b'{"a": {"b": [null, 1]}}')
@example(".json", b'["a", {"prompt": "b"}, [1]]')
@example(".json", b"[" * 900 + b"]" * 900)
@example(".jsonl", b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}")
@example(".parquet", b"PAR1" + bytes(20) + b"PAR1")
@example(".txt", "a\r\rb".encode("utf-16") + b"\0")
def test_files_of_prompts(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, content: bytes
) -> None:
    file = scratch(tmp_path_factory) / f"a{suffix}"
    file.write_bytes(content)
    with one_line():
        records = read_records(file, needs=("prompt",))
        assert records
        assert all(str(record["prompt"]).encode() is not None for record in records)
    with one_line():
        texts = read_texts(file, "prompt")
        assert texts
        assert all(text == text.strip() != "" and text.encode() for text in texts)


FIELDS = st.dictionaries(
    st.sampled_from(["prompt", "source", "references"]),
    st.sampled_from(["prompt", "a", "a.b", "prompt[]", "source[]", "", "[]", "."])
    | st.just(["prompt", "a"]),
    max_size=3,
)


@fuzz
@given(JSON_LINES, FIELDS, st.none() | st.integers(-1, 3), st.none() | st.integers())
def test_fields_of_records(
    tmp_path_factory: pytest.TempPathFactory,
    content: bytes,
    fields: dict[str, Any],
    limit: int | None,
    seed: int | None,
) -> None:
    file = scratch(tmp_path_factory) / "a.jsonl"
    file.write_bytes(content)
    with one_line():
        assert read_records(file, fields, limit=limit, seed=seed)


def scratch(factory: pytest.TempPathFactory) -> Path:
    return Path(factory.getbasetemp())


@fuzz
@given(st.text(max_size=30) | st.text("{}:a!r0.[]", max_size=12), OBJECTS)
@example("{", {"a": "b"})
@example("{a:9}", {"a": "b"})
@example("{a:\u00b2}", {"a": "b"})
@example("{a:" + "9" * 5000 + "}", {"a": "b"})
def test_templates(template: str, record: dict[str, Any]) -> None:
    with one_line():
        assert isinstance(fill_template(template, record), str)
        assert all(isinstance(record[field], str) for field in template_fields(template))


PROMPTS = (
    st.text(max_size=12)
    | st.text("[blank:0123]ab ", max_size=16)
    | st.sampled_from(["[blank:3]", "a [blank:2] b", "[blank:0]"])
)


@fuzz
@given(st.lists(PROMPTS, max_size=3), st.integers(1, 20))
@example(["[blank:\u0663]"], 8)
@example(["[blank:" + "9" * 5000 + "]"], 8)
@example(["\ud800"], 8)
def test_rows_of_prompts(lm: BaseLM, prompts: list[str], max_length: int) -> None:
    with one_line():
        tokens, mask = prompt_rows(lm, prompts, max_length)
        assert tokens.shape == mask.shape == (len(prompts), max_length)
        assert ((tokens >= 0) & (tokens < lm.vocab_size)).all()
        assert (tokens[~mask] == lm.end_id).all()


# Options

REWARD = Regex("a")
PATHS = {
    "base_lm",
    "denoiser",
    "critic",
    "init_from",
    "tokenizer",
    "cache",
    "path",
    "val_path",
    "dataset",
    "prompts",
    "policy",
}
SIZES = {
    "width", "layers", "heads", "vocab_size", "positions", "adapter_rank", "n_texts", "max_length",
    "minibatches", "n",
}  # fmt: skip
NAMES = st.sampled_from(["", "none", "zero_shot", "mse", "ce", "cosine", "argmax", "rloo"])
KINDS = (Sampler, Move, Positions, Solver, Guidance, PrefixTwist)
OFFERED = [*(getattr(samplers, name) for name in samplers.__all__), Spans, RandomTokens, WholeText]
PARTS = [part for part in OFFERED if issubclass(part, KINDS) and not inspect.isabstract(part)]
PARTS.remove(Solver)
CLASSES = [
    DenoiserModule,
    CriticModule,
    LMModule,
    PPOModule,
    PromptData,
    ModelSamples,
    TextFiles,
    HubText,
]


def parts_of(kind: type) -> Any:
    return st.sampled_from([part() for part in PARTS if issubclass(part, kind)])


for kind in KINDS:
    st.register_type_strategy(kind, parts_of(kind))


@st.composite
def options(draw: Any, cls: type) -> dict[str, Any]:
    """Some of a class's options with values of their types; where a number makes memory, a small
    one.
    """
    hints = get_type_hints(cls.__init__)
    names = [
        name
        for name in inspect.signature(cls).parameters
        if name not in PATHS | {"reward", "label_reward", "lora_rank"}
    ]
    chosen = draw(st.lists(st.sampled_from(names), max_size=3, unique=True)) if names else []
    sizes = set() if cls in PARTS else SIZES
    values = {}
    for name in chosen:
        kind = (
            st.integers(-2, 40)
            if name in sizes
            else NAMES
            if hints[name] is str
            else st.from_type(hints[name])
        )
        values[name] = draw(kind)
    return values


@st.composite
def grouped(draw: Any, cls: type) -> Any:
    """A group of options, as a module holds it; one line where its own values do not fit."""
    with one_line(*inspect.signature(cls).parameters):
        return cls(**draw(options(cls)))
    reject()


GROUPS = [AdamW, GAE, HubSource, LeaveOneOut, Network, Noising, Reading, Updates]
for group in GROUPS:
    st.register_type_strategy(group, grouped(group))
st.register_type_strategy(Estimator, st.one_of(*map(grouped, (GAE, LeaveOneOut))))
st.register_type_strategy(
    RewardLabels,
    st.lists(st.floats(-3, 3), min_size=1, unique=True).map(
        lambda edges: RewardLabels(REWARD, sorted(edges))
    ),
)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each network is read once."""
    monkeypatch.setattr(BaseLM, "load", lru_cache(BaseLM.load))


def cases(classes: list[type]) -> Any:
    return st.sampled_from(classes).flatmap(lambda cls: st.tuples(st.just(cls), options(cls)))


@fuzz
@given(cases(CLASSES))
@example((DenoiserModule, {"width": 0}))
@example((DenoiserModule, {"heads": 3}))
@example((LMModule, {"width": 0}))
@example((LMModule, {"heads": 3}))
@example((ModelSamples, {"temperature": math.nan}))
def test_options_of_the_right_type(
    loaded: None, lm_folder: Path, case: tuple[type, dict[str, Any]]
) -> None:
    cls, values = case
    small = {
        "reward": REWARD, "base_lm": str(lm_folder), "path": "a.txt", "source": HubSource("a"),
        "max_length": 8, "width": 16, "layers": 1, "heads": 2, "vocab_size": 40, "positions": 8,
        "init_from": "random", "denoiser": "nowhere/denoiser", "critic": None,
    }  # fmt: skip
    known = set(inspect.signature(cls).parameters)
    known |= {"max_length", "width", "layers", "heads"} if "network" in known else set()
    values = {name: value for name, value in small.items() if name in known} | values
    with one_line():
        cls(**in_parts(cls, **values))


def numbers(value: Any) -> list[float]:
    inside = value if isinstance(value, list | tuple) else [value]
    return [x for x in inside if isinstance(x, float)]


@fuzz
@given(cases(PARTS))
@example((CriticGuidance, {"cap": 1e300}))
@example((CriticGuidance, {"window": (math.nan, 1.0)}))
@example((RewardGradient, {"window": (0.5, 0.5)}))
@example((ClassifierFree, {"scale": math.nan}))
@example((DenoiseAccept, {"levels": []}))
@example((DenoiseAccept, {"levels": [0.5, math.nan]}))
@example((DenoiseAccept, {"adapt": 1, "positions": WholeText()}))
@example((ParticleSteering, {"every": 0}))
@example((BaseModel, {"label": ""}))
def test_settings_of_a_part(case: tuple[type, dict[str, Any]]) -> None:
    """It holds what it was given, none of it NaN, or says which setting it refuses, in its own
    name.
    """
    cls, values = case
    try:
        made = cls(**values)
    except UserError as error:
        name, _, rest = str(error).partition(": ")
        assert name in inspect.signature(cls).parameters
        assert " given, allowed: " in rest
        assert "\n" not in rest
        return
    assert {name: getattr(made, name) for name in values} == values
    assert not any(math.isnan(x) for value in values.values() for x in numbers(value))


@pytest.fixture(scope="session")
def networks(tmp_path_factory: pytest.TempPathFactory, embedding: TokenEmbedding) -> Path:
    folder = tmp_path_factory.mktemp("networks")
    save_parts(folder, embedding, REWARD.name)
    return folder


SAMPLERS = st.one_of(
    parts_of(Sampler),
    st.builds(Diffusion, parts_of(Solver), parts_of(Guidance)),
    st.builds(Chains, parts_of(Sampler), st.lists(parts_of(Move), max_size=2)),
    st.builds(ParticleSteering, parts_of(Guidance)),
)
TILTED = Chains(Diffusion(), [DenoiseAccept(tilt=1.0)], temperatures=2)


@fuzz
@given(SAMPLERS, options(GuidedSamplerModule), st.booleans(), st.booleans())
@example(Diffusion(), {"lam": math.nan}, True, True)
@example(TILTED, {"lam": 0.0}, True, True)
@example(TILTED, {"lam": 1.0}, True, False)
@example(Diffusion(guidance=RewardGradient()), {}, True, True)
@example(Chains(Diffusion(guidance=ClassifierFree(label=9))), {}, True, True)
def test_a_module_with_any_sampler(
    loaded: None,
    lm_folder: Path,
    networks: Path,
    sampler: Sampler,
    values: dict[str, Any],
    denoiser: bool,
    critic: bool,
) -> None:
    """It is made of all networks that its sampler needs, and of no others."""
    given = {"denoiser": str(networks / "denoiser")} if denoiser else {}
    given |= {"critic": str(networks / "critic")} if critic else {}
    with one_line(*inspect.signature(GuidedSamplerModule).parameters, "guidance", "temperatures"):
        made = GuidedSamplerModule(
            REWARD, **{"sampler": sampler, "base_lm": str(lm_folder), **given, **values}
        )
        needed = made.sampler.needs(made.lam)
        assert (made.denoiser_network is not None) == ("denoiser" in needed)
        assert (made.value is not None) == ("critic" in needed)


WRONG = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(string.printable, max_size=8)
    | JSON.map(json.dumps)
)
STRANGE = [
    "model.lam",
    "model.steps",
    "model.moves",
    "model.moves.size",
    "model.sampler",
    "model.sampler.particles",
    "model.sampler.moves",
    "model.sampler.moves.levels",
    "model.sampler.guidance.window",
    "model.sampler.solver",
    "model.reward",
]
STRANGE += [
    "model.denoiser",
    "data.n_texts",
    "data.prompts",
    "data.fields",
    "data.length",
    "data.template",
    "trainer.precision",
]
STRANGE += [
    "trainer.callbacks",
    "trainer.callbacks.folder",
    "trainer.max_steps",
    "seed_everything",
    "ckpt_path",
    "model",
    "data",
]


@fuzz_slowly
@given(
    st.lists(
        st.tuples(
            st.sampled_from(STRANGE) | st.text(string.ascii_letters + "._-", max_size=8), WRONG
        ),
        max_size=2,
    )
)
@example([("model.sampler.moves", "{size: 0}")])
@example([("model.sampler", "Diffusion"), ("model.sampler.guidance.window", "[0.5]")])
@example([("data.fields", "[1, {]")])
@example([("model.reward", "os.system")])
def test_options_of_any_type(given: list[tuple[str, Any]]) -> None:
    arguments = [f"--{option}={value}" for option, value in given]
    with one_line():
        parser.run(cli.prepare_arguments(["predict", *arguments]), options_only=True)


# Metrics

TEXTS = st.lists(st.text("ab .,'\n\u00e9", max_size=12) | st.text(max_size=6), max_size=6)


@fuzz
@given(TEXTS, st.integers(1, 5), st.randoms())
@example(["", ""], 4, None)
@example(["\ud800", "\ud800"], 4, None)
@example(["便宜便宜", "便宜的店", "a"], 2, None)
def test_self_bleu_is_sacrebleus(texts: list[str], n_gram: int, random: Any) -> None:
    found = float(self_bleu(texts, n_gram))
    name = resolve("auto", texts)
    bleu = sacrebleu.BLEU(max_ngram_order=n_gram, effective_order=True, tokenize=name)
    if len(texts) < 2 or not any(bleu.tokenizer(text.rstrip()).strip() for text in texts):
        assert math.isnan(found)
        return
    scores = [
        bleu.sentence_score(text, texts[:i] + texts[i + 1 :]).score for i, text in enumerate(texts)
    ]
    assert found == pytest.approx(sum(scores) / len(scores), abs=1e-6)
    shuffled = list(texts)
    if random is not None:
        random.shuffle(shuffled)
    metric = SelfBLEU(n_gram)
    for text in shuffled:
        metric.update([text])
    assert float(metric.compute()) == pytest.approx(found, abs=1e-6)


@fuzz
@given(TEXTS, st.integers(1, 5))
@example(["{\u3400"], 2)
def test_distinct_n_is_a_count(texts: list[str], n: int) -> None:
    name = resolve("auto", texts)
    cut = str if name == "13a" else sacrebleu.BLEU(tokenize=name).tokenizer
    words = [cut(text).split() for text in texts]
    grams = Counter(
        chain.from_iterable(zip(*(row[i:] for i in range(n)), strict=False) for row in words)
    )
    found, metric = float(distinct_n(texts, n)), DistinctN(n)
    metric.update(texts)
    assert found == float(metric.compute()) or math.isnan(found)
    assert math.isnan(found) if not grams else found == len(grams) / grams.total()


@fuzz
@given(st.lists(st.tuples(st.floats(-1e6, 0, width=32), st.integers(0, 1000)), max_size=8))
def test_perplexity_is_of_the_whole_corpus(pairs: list[tuple[float, int]]) -> None:
    log_p, n_tokens = (
        torch.tensor([p for p, _ in pairs]),
        torch.tensor([n for _, n in pairs], dtype=torch.int64),
    )
    found, total = float(perplexity(log_p, n_tokens)), sum(n for _, n in pairs)
    nats = -sum(p for p, _ in pairs)
    if not total:
        assert math.isnan(found) or found == math.inf
    elif nats / total < 700:
        assert found == pytest.approx(math.exp(nats / total), rel=1e-6)
