"""The front door in Python: the command's texts by one call, and nothing else touched."""

import asyncio
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import dia_lightning as dia
from dia_lightning import progress
from dia_lightning.callbacks.run_key import describe
from dia_lightning.front import arguments
from dia_lightning.front import sample as front
from tests.conftest import Run

LINES = ["The Mill is", "Near the river", "A cheap place"]
KIT = [
    "--model.seed=3",
    "--model.lam=5",
    "--data.n_texts=2",
    "--data.batch_size=4",
    "--data.max_length=16",
]
SAME: dict[str, Any] = {
    "seed": 3,
    "lam": 5,
    "n": 2,
    "batch_size": 4,
    "max_length": 16,
    "progress": False,
}
TIMES = ("latency_s_per_100_tokens", "seconds_per_text", "peak_memory_mib")


def shortness(texts: list[str]) -> list[float]:
    return [-len(text) / 10 for text in texts]


@pytest.fixture
def draw(
    lm_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., dia.Result]:
    """`dia.sample` of a random model, two short texts of it, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(**given: Any) -> dia.Result:
        small = {"n": 2, "max_length": 8, "progress": False, "compare_base": False}
        return dia.sample(**{"base_lm": str(lm_folder), "reward": shortness, **small, **given})

    return call


def lines(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def metrics(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "metrics.json").read_text(encoding="utf-8"))
    for figures in (found, found["base"]):
        for name in TIMES:
            assert figures.pop(name) is not None
    return found


def test_it_is_the_command(lightning: Run) -> None:
    """The same texts, numbers, files and hash; the saved settings run the command again."""
    Path("prompts.txt").write_text("\n".join(LINES), encoding="utf-8")
    code, _, err = lightning(
        "predict", "--data.prompts=prompts.txt", *KIT, "--trainer.callbacks.folder=command"
    )
    assert code == 0, err
    named = {part: f"checkpoints/tiny/{part}" for part in ("denoiser", "critic")}  # in its file
    found = dia.sample(reward="VaderSentiment", prompts=LINES, **named, **SAME)
    for result, file in ((found, "predictions"), (found.base, "base_predictions")):
        assert result is not None
        rows = lines(f"command/{file}.jsonl")
        assert [row["text"] for row in rows] == result.texts
        assert (
            [row["prompt"] for row in rows]
            == result.prompts
            == [line for line in LINES for _ in range(2)]
        )
        assert [row["reward"] for row in rows] == result.rewards.tolist()
        assert [row["log_p"] for row in rows] == result.log_p.tolist()
        assert [row["n_tokens"] for row in rows] == result.n_tokens.tolist()
    assert found.accept_rate is not None
    assert [
        row["accept_rate"] for row in lines("command/predictions.jsonl")
    ] == found.accept_rate.tolist()
    assert found.save("saved") == Path("saved")
    for name in ("predictions.jsonl", "base_predictions.jsonl"):
        assert Path("saved", name).read_bytes() == Path("command", name).read_bytes()
    assert metrics("saved") == metrics("command")
    assert found.log_z is not None
    assert metrics("saved")["log_z"] == pytest.approx(found.log_z.mean().item(), abs=1e-5)
    code, _, err = lightning(
        "predict", "--config", "saved/config.yaml", "--trainer.callbacks.folder=again"
    )
    assert code == 0, err
    assert metrics("again") == metrics("command")
    by_path = dia.sample(reward="VaderSentiment", prompts=Path("prompts.txt"), **SAME)
    assert by_path.texts == found.texts


def test_a_seed_is_a_text(draw: Callable[..., dia.Result]) -> None:
    first, again, other = draw(), draw(), draw(seed=1)
    assert first.texts == again.texts != other.texts
    assert torch.equal(first.log_p, again.log_p)


VALUES: list[Callable[[list[float]], Any]] = [
    list,
    tuple,
    np.array,
    torch.tensor,
    lambda v: np.array(v, np.float32),
    lambda v: torch.tensor(v, dtype=torch.bfloat16),
    lambda v: torch.tensor(v, requires_grad=True),
    lambda v: [np.float16(x) for x in v],
    lambda v: [torch.tensor(x) for x in v],
]
WHOLE: list[Callable[[list[int]], Any]] = [
    list,
    np.array,
    lambda v: torch.tensor(v, dtype=torch.int16),
    lambda v: [x > 4 for x in v],
]


@pytest.mark.parametrize("kind", VALUES)
def test_a_function_returns_numbers_of_any_kind(draw: Callable[..., dia.Result], kind: Any) -> None:
    found = draw(reward=lambda texts: kind([len(text) / 4 for text in texts]))
    assert found.rewards.dtype == torch.float32
    assert not found.rewards.is_inference()  # a tensor like others
    assert found.rewards.tolist() == [len(text) / 4 for text in found.texts]
    assert {name: part.tolist() for name, part in found.parts.items()} == {
        "reward": found.rewards.tolist()
    }


@pytest.mark.parametrize("kind", WHOLE)
def test_a_function_returns_whole_numbers(draw: Callable[..., dia.Result], kind: Any) -> None:
    found = draw(reward=lambda texts: kind([len(text) for text in texts]))
    assert found.rewards.tolist() == [
        float(value) for value in kind([len(text) for text in found.texts])
    ]


def wrong_length(texts: list[str]) -> list[float]:
    return [0.0]


def not_a_number(texts: list[str]) -> list[float]:
    return [float("nan")] * len(texts)


def words(texts: list[str]) -> list[str]:
    return texts


def failing(texts: list[str]) -> list[float]:
    return [1 / 0 for _ in texts]


def nothing(texts: list[str]) -> None:
    return None


def column(texts: list[str]) -> Any:
    return torch.zeros(len(texts), 1)


def changing(texts: list[str]) -> list[int]:
    texts.append("")
    return [0] * len(texts)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (wrong_length, "'one value a text'"),
        (column, "'one value a text'"),
        (not_a_number, "'finite'"),
        (lambda texts: [1e39] * len(texts), "'finite'"),
        (lambda texts: -np.inf * np.ones(len(texts)), "'finite'"),
        (words, "'real numbers'"),
        (nothing, "'real numbers'"),
        (lambda texts: {"a": 1}, "'real numbers'"),
        (failing, "failed on the text"),
        (lambda texts: [t.nothing for t in texts], "failed on the text"),
        (lambda texts: Path("nothing").read_text(), "failed on"),
        (changing, "'texts unchanged'"),
    ],
)
def test_a_wrong_function_is_one_line(
    draw: Callable[..., dia.Result], function: Any, said: str
) -> None:
    with pytest.raises(dia.UserError, match=r"^reward '") as found:
        draw(reward=function)
    message = str(found.value)
    assert said in message
    assert "\n" not in message
    assert repr({"<lambda>": "reward"}.get(function.__name__, function.__name__)) in message
    assert os.listdir() == []


def test_the_records_go_to_a_function_that_wants_them(draw: Callable[..., dia.Result]) -> None:
    def by_prompt(texts: Sequence[str], records: Sequence[Any]) -> list[int]:
        return [len(record["prompt"]) for record in records]

    found = draw(reward=by_prompt, prompts=["the", "a"], n=1)
    assert (found.rewards.tolist(), [*found.parts]) == ([3.0, 1.0], ["by_prompt"])


class Longer(dia.Reward):
    """Keeps its argument under another name, so that runs cannot be told apart."""

    name = "longer"

    def __init__(self, per: float) -> None:
        self.divisor = per

    def __call__(self, texts: Sequence[str]) -> list[float]:
        return [len(text) / self.divisor for text in texts]


def test_a_reward_of_ones_own_needs_no_ceremony(draw: Callable[..., dia.Result]) -> None:
    found = draw(reward=Longer(2.0))
    assert found.rewards.tolist() == [len(text) / 2 for text in found.texts]
    saved = json.loads((found.save("out") / "metrics.json").read_text(encoding="utf-8"))
    assert (saved["config_hash"], saved["n"]) == (None, 2)


def test_the_module_takes_functions_and_loaded_models(lm_folder: Path, lm: dia.BaseLM) -> None:
    module = dia.GuidedSamplerModule(shortness, dia.BaseModel(), lm)  # type: ignore[arg-type]
    assert (module.reward.name, module.base_lm, module.lm.end_ids) == (
        "shortness",
        str(lm_folder),
        lm.end_ids,
    )
    assert module.lm.model is not lm.model


def test_functions_are_told_apart_by_what_they_do() -> None:
    """So that a run with another one does not go on with this one's batches."""

    def made(power: int, code: str) -> Any:
        scope: dict[str, Any] = {"K": power, "__name__": "__main__"}
        exec(f"def f(texts): return {code}\ng = lambda texts: f(texts)", scope)
        return scope["f"], scope["g"]

    f, g = made(1, "[K for t in texts]")
    same = made(1, "[K for t in texts]")
    assert describe([f, g]) == describe([*same])
    for other in (
        made(2, "[K for t in texts]"),
        made(1, "[K + 1 for t in texts]"),
        made(1, "[K for t in texts if t]"),
    ):
        assert describe(f) != describe(other[0])
    assert describe(g) != describe(made(1, "[0 for t in texts]")[1])
    assert describe(Longer.__call__)["path"] == "tests.test_sample.Longer.__call__"
    arrays = [
        (lambda a: lambda texts: a)(a)
        for a in (torch.zeros(2), torch.ones(2), np.ones(2), np.zeros(2))
    ]
    assert len({json.dumps(describe(array)) for array in arrays}) == 4
    with pytest.raises(dia.UserError, match=r"^reward: the function .* uses m, a Linear"):
        describe((lambda m: lambda texts: m(texts))(torch.nn.Linear(1, 1)))
    closed = [(lambda k: lambda texts: [k])(k) for k in (1, 2)]
    assert describe(closed[0]) != describe(closed[1])


@pytest.fixture
def pair(lm_folder: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(lm_folder)
    return model, AutoTokenizer.from_pretrained(lm_folder)


def test_a_loaded_model_is_used_and_left_alone(
    draw: Callable[..., dia.Result], pair: tuple[Any, Any], lm: dia.BaseLM
) -> None:
    model, tokenizer = pair
    model.train()
    model.transformer.h[0].eval()
    model.transformer.wte.requires_grad_(False)
    modes = [part.training for part in model.modules()]
    kept = {
        name: (weight, weight.clone(), weight.requires_grad)
        for name, weight in model.named_parameters()
    }
    hooks = [len(part._forward_hooks) for part in [*model.modules(), *lm.model.modules()]]
    by_name = draw()
    assert draw(base_lm=Path(lm.name)).texts == by_name.texts
    assert (
        by_name.texts
        == draw(base_lm=pair).texts
        == draw(base_lm=lm).texts
        == draw(base_lm=lm).texts
    )
    assert torch.equal(by_name.log_p, draw(base_lm=[model, tokenizer]).log_p)
    assert [part.training for part in model.modules()] == modes
    for name, weight in model.named_parameters():
        before, value, grad = kept[name]
        assert weight is before
        assert torch.equal(weight, value)
        assert weight.requires_grad == grad
    assert [len(part._forward_hooks) for part in [*model.modules(), *lm.model.modules()]] == hooks
    with torch.no_grad():
        model.transformer.wte.weight.mul_(0.1)
    assert draw(base_lm=pair).texts != by_name.texts


def test_a_loaded_model_is_tried_like_a_checkpoint(
    draw: Callable[..., dia.Result], pair: tuple[Any, Any]
) -> None:
    model, tokenizer = pair
    for wrong in (model, (model,), (tokenizer, model), (model, "tokenizer"), 3, None, {}):
        with pytest.raises(dia.UserError, match=r"^base_lm: .* given, allowed: "):
            draw(base_lm=wrong)
    for block in model.transformer.h:
        block.attn.is_causal = False
    model.config.is_causal = False
    model.resize_token_embeddings(100)
    with pytest.raises(dia.UserError, match=r"^base_lm: the tokenizer of"):
        draw(base_lm=pair)
    with torch.no_grad():
        model.transformer.wpe.weight.fill_(float("nan"))
    model.resize_token_embeddings(len(tokenizer))
    with pytest.raises(dia.UserError, match=r"^base_lm: .* NaN or infinite"):
        draw(base_lm=pair)


TEMPLATE = (
    "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{{ bos_token }}"
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
DENOISED = dia.Chains(moves=[dia.DenoiseAccept()])
ASKED = [{"role": "user", "content": "food"}]


def test_messages_go_through_the_chat_template(
    draw: Callable[..., dia.Result], pair: tuple[Any, Any]
) -> None:
    tokenizer = pair[1]
    with pytest.raises(
        dia.UserError,
        match=r"^prompts: messages given, but the tokenizer of .* has no chat template",
    ):
        draw(base_lm=pair, prompts=ASKED)
    tokenizer.chat_template = TEMPLATE
    seen: list[str] = []

    def reward(texts: list[str]) -> list[int]:
        seen.extend(texts)
        return [0] * len(texts)

    one = draw(base_lm=pair, prompts=ASKED, reward=reward, max_length=16)
    assert one.prompts == ["u:food;a:"] * 2
    assert set(one.texts) <= set(seen)
    assert not any(text.startswith("u:") for text in seen)
    begun = [[*ASKED, {"role": "assistant", "content": "good"}], ASKED]
    assert draw(base_lm=pair, prompts=begun, n=1, max_length=16).prompts == [
        "u:food;a:good",
        "u:food;a:",
    ]
    written = draw(base_lm=pair, prompts="u:food;a:", reward=reward, max_length=16)
    assert written.texts == one.texts
    with pytest.raises(
        dia.UserError, match=r"^prompts: the chat template of .* refuses .*\(no tools\)"
    ):
        draw(base_lm=pair, prompts=[{"role": "tool", "content": ""}])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lam": -1}, "lam: -1.0 given, allowed: 0 or more"),
        ({"lam": "4"}, "lam: '4' given, allowed: a number"),
        ({"lam": float("nan")}, "lam: nan given"),
        ({"lam": True}, "lam: True given"),
        ({"n": 0}, "n: 0 given, allowed: a whole number, 1 or more"),
        ({"n": 2.0}, "n: 2.0 given"),
        ({"n": True}, "n: True given"),
        ({"batch_size": -3}, "batch_size: -3 given"),
        ({"max_length": "8"}, "max_length: '8' given"),
        ({"max_length": 99}, "max_length: 99 given, "),
        ({"seed": -1}, "seed: -1 given"),
        ({"seed": 1 << 32}, "seed: 4294967296 given"),
        (
            {"sampler": dia.BestOfN},
            "sampler: the class BestOfN given, allowed: a sampler, as dia.BestOfN(16)",
        ),
        ({"sampler": "BestOfN"}, "sampler: 'BestOfN' given"),
        ({"sampler": dia.Suffix()}, "sampler: Suffix"),
        ({"sampler": dia.Diffusion()}, "denoiser: none given, needed for the sampler Diffusion"),
        ({"denoiser": 3}, "denoiser: 3 given"),
        ({"denoiser": "./no", "sampler": DENOISED}, "denoiser: "),
        ({"critic": 0.5}, "critic: 0.5 given, allowed: a folder or .ckpt file, or None"),
        ({"compare_base": 1}, "compare_base: 1 given, allowed: True or False"),
        ({"progress": "off"}, "progress: 'off' given"),
        ({"device": "tpu"}, "device: tpu given, allowed: cpu, cuda"),
        ({"device": "meta"}, "device: meta given"),
        ({"device": "cuda:99"}, "device: cuda:99 given, there are"),
        (
            {"reward": "VaderSentimnt"},
            "reward: 'VaderSentimnt' given, which no shipped reward is called; did you mean Vader",
        ),
        ({"reward": "nothing like it"}, "allowed: ChrFSimilarity"),
        ({"reward": "Keyword"}, "reward: 'Keyword' given, which needs arguments"),
        ({"reward": None}, "reward: None given, allowed: a function"),
        ({"reward": Longer}, "reward: the class Longer given"),
        (
            {"reward": lambda a, b: [0]},
            "reward: <lambda>(a, b) given, allowed: (texts) or (texts, records)",
        ),
        ({"reward": lambda: [0]}, "reward: <lambda>() given"),
        ({"reward": lambda texts, *, k: [0]}, "reward: <lambda>(texts, k) given"),
        ({"prompts": []}, "prompts: an empty list given"),
        ({"prompts": 3}, "prompts: int given"),
        ({"prompts": ["a", 3]}, "prompts: 3 in the list"),
        ({"prompts": ["a", ASKED]}, "prompts: [{'role'"),
        ({"prompts": [ASKED, "a"]}, "prompts: 'a' among messages"),
        ({"prompts": [{"role": "user"}]}, "prompts: [{'role': 'user'}]"),
        ({"prompts": {"role": "user", "content": ""}}, "prompts: dict given"),
        ({"prompts": [None]}, "prompts: None in the list"),
        (
            {"prompts": "the food is good near the river."},
            "allowed: at most 7 (max_length is 8)",
        ),
        ({"prompts": "the \ud800"}, "prompts: "),
        (
            {"prompts": "the [blank:2] is", "sampler": dia.BestOfN(2)},
            "prompts: blanks or a length given, but BestOfN writes from left to right",
        ),
        ({"prompts": Path("none.txt")}, "prompts: no such file"),
        ({"prompts": "asked.txt"}, "prompts: asked.txt is a file"),
        ({"base_lm": "./none"}, "base_lm: no such folder: ./none"),
        ({"base_lm": ""}, "base_lm: "),
        ({"base_lm": "asked.txt"}, "base_lm: asked.txt given, which is a file"),
    ],
)
def test_a_wrong_argument_is_one_line(
    draw: Callable[..., dia.Result], given: Any, said: str
) -> None:
    Path("asked.txt").write_text("the food", encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(said)) as found:
        draw(**given)
    message = str(found.value)
    assert isinstance(found.value, dia.UserError)
    assert message.startswith((*given, "denoiser"))
    assert "\n" not in message
    assert "--" not in message
    assert os.listdir() == ["asked.txt"]


def test_every_argument_is_used(
    draw: Callable[..., dia.Result], llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = draw(n=3, prompts=["the", "the food"])
    assert draw(n=3, prompts=["the", "the food"]).texts == plain.texts
    for changed in (
        {"base_lm": str(llama_folder)},
        {"lam": 0},
        {"batch_size": 2},
        {"max_length": 12},
        {"seed": 5},
    ):
        assert draw(**{"n": 3, "prompts": ["the", "the food"], **changed}).texts != plain.texts, (
            changed
        )
    assert (len(draw(n=1)), len(draw(n=3)), len(plain)) == (1, 3, 6)
    assert plain.prompts == ["the"] * 3 + ["the food"] * 3
    assert draw().prompts == [""] * 2
    assert int(draw(max_length=4, n=8).n_tokens.max()) <= 4
    assert (plain.method, draw(sampler=dia.BestOfN(2)).method) == ("annealed", "best_of_n")
    assert plain.base is None
    base = draw(compare_base=True).base
    assert base is not None
    assert (len(base), base.method, base.base) == (2, "zero_shot", None)
    capsys.readouterr()
    draw(device="cpu", progress=False)
    assert capsys.readouterr() == ("", "")
    draw(device=torch.device("cpu"), progress=True)
    assert "Predicting" in "".join(capsys.readouterr())


def test_bars_within_a_batch_go_with_the_others(
    draw: Callable[..., dia.Result],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shown without a terminal, as in a notebook, and hidden on one."""
    monkeypatch.setattr(progress, "_DELAY", 0)
    draw(progress=True)
    assert "tokens" in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    draw(progress=False)
    assert capsys.readouterr() == ("", "")


def test_the_device_goes_to_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        front.L, "Trainer", lambda **given: (given["accelerator"], given["devices"])
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for given, device in (("cuda:2", [2]), ("cuda", [1]), (torch.device("cuda", 0), [0])):
        assert front._trainer(arguments.device_of(given, "gpt2"), False) == ("gpu", device)  # type: ignore[comparison-overlap]
    assert front._trainer(arguments.device_of("cpu", "gpt2"), False) == ("cpu", 1)  # type: ignore[comparison-overlap]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert arguments.device_of(None, "gpt2") == torch.device("cuda", 1)
    loaded = torch.nn.Linear(1, 1)
    loaded.device = torch.device("cpu")  # type: ignore[assignment]
    assert arguments.device_of(None, (loaded, None)) == torch.device("cpu")


def test_denoiser_and_critic_are_used() -> None:
    small: dict[str, Any] = {"n": 2, "max_length": 8, "progress": False, "compare_base": False}
    steered = dia.Diffusion(steps=2, guidance=dia.CriticGuidance())
    with pytest.raises(
        dia.UserError,
        match=r"^critic: .* was trained on the reward 'sentiment'",
    ):
        dia.sample(reward=shortness, sampler=steered, **small)
    with pytest.raises(dia.UserError, match=r"^denoiser: .*critic"):
        dia.sample(
            reward="VaderSentiment", sampler=steered, denoiser="checkpoints/tiny/critic", **small
        )
    with pytest.raises(dia.UserError, match=r"^critic: .*denoiser"):
        dia.sample(
            reward="VaderSentiment", sampler=steered, critic="checkpoints/tiny/denoiser", **small
        )
    assert dia.sample(reward="VaderSentiment", sampler=steered, **small).method == "dia"


def test_the_result_is_a_table(draw: Callable[..., dia.Result]) -> None:
    found = draw(
        prompts=["the", "a"], n=3, compare_base=True, sampler=dia.BestOfN(4, weighted=True)
    )
    table = found.to_pandas()
    assert table.text.tolist() == found.texts == list(found)
    assert table.prompt.tolist() == found.prompts
    for name, values in (
        ("reward", found.rewards),
        ("rewards.shortness", found.parts["shortness"]),
        ("log_p", found.log_p),
    ):
        assert table[name].tolist() == values.tolist()
    assert table.log_z.tolist() == found.log_z.tolist()  # type: ignore[union-attr]
    assert found.ess is not None
    assert bool(((found.ess > 0) & (found.ess <= 1)).all())
    assert found.accept_rate is None
    assert found.base is not None
    assert len(found.base.to_pandas()) == 6
    rows = found.rewards.view(2, 3)
    assert found.best() == [
        found.texts[int(rows[0].argmax())],
        found.texts[3 + int(rows[1].argmax())],
    ]
    assert found.base.best()[1] in found.base.texts[3:]
    shown = repr(found)
    assert shown.startswith("Result: 6 texts by best_of_n, mean reward ")
    assert "… 3 more" in shown
    assert shown.count("\n") == 4


def test_html_shows_texts_as_texts(draw: Callable[..., dia.Result]) -> None:
    found = draw(n=1)
    found.texts[0] = "<script>\x1b[2J & co"
    assert "<script>" not in found._repr_html_()
    assert "&lt;script&gt;" in found._repr_html_()
    assert "\x1b" not in repr(found)


def test_save_says_where_it_cannot(draw: Callable[..., dia.Result]) -> None:
    found = draw(compare_base=True)
    Path("file").write_text("", encoding="utf-8")
    for folder in ("file", "file/below", Path("file")):
        with pytest.raises(dia.UserError, match=r"^folder: cannot write to file"):
            found.save(folder)
    assert found.base is not None
    with pytest.raises(dia.UserError, match=r"^save: "):
        found.base.save("base")
    Path("out").mkdir()
    Path("out/hacking.jsonl").write_text("an earlier run's", encoding="utf-8")
    assert sorted(os.listdir(found.save("out"))) == [
        "base_predictions.jsonl", "config.yaml", "metrics.json", "predictions.jsonl"
    ]  # fmt: skip
    draw().save("out")
    assert "base_predictions.jsonl" not in os.listdir("out")


def state() -> list[Any]:
    """What a call must leave as it was."""
    loggers = [
        logging.getLogger(name)
        for name in ("", "lightning.pytorch", "lightning.fabric", "transformers", "dia_lightning")
    ]
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # type: ignore[index]
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        list(warnings.filters),
        transformers_logging.is_progress_bar_enabled(),
        [(logger.level, logger.handlers, logger.propagate) for logger in loggers],
        signal.getsignal(signal.SIGINT),
        signal.getsignal(signal.SIGTERM),
        dict(os.environ),
        os.listdir(),
    ]


def test_nothing_else_is_touched(
    draw: Callable[..., dia.Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw()  # what is imported or made once is there
    torch.use_deterministic_algorithms(True, warn_only=True)
    transformers_logging.enable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    torch.set_default_dtype(torch.float64)
    try:
        before = state()
        found = draw()
        assert state() == before
        with pytest.raises(dia.UserError):
            draw(reward=failing)
        assert state() == before
        with pytest.raises(dia.UserError):
            draw(base_lm="./none")
        assert state() == before
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
    assert found.texts == draw().texts
    before = state()
    draw(base_lm="checkpoints/tiny/lm", n=1)  # its denoiser is initialised at random
    assert state() == before
    with pytest.raises(dia.UserError):
        draw(reward=not_a_number, prompts="the")
    assert os.listdir() == []


def test_control_c_is_an_interrupt(draw: Callable[..., dia.Result]) -> None:
    def pressed(texts: list[str]) -> list[float]:
        os.kill(os.getpid(), signal.SIGINT)
        return [0.0] * len(texts)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        draw(reward=pressed)
    assert signal.getsignal(signal.SIGINT) is before
    draw()


def test_it_runs_where_a_notebook_does(draw: Callable[..., dia.Result]) -> None:
    """Inside a running event loop, and in a thread."""
    plain = draw().texts

    async def cell() -> list[str]:
        return draw().texts

    assert asyncio.run(cell()) == plain
    found: list[list[str]] = []
    thread = threading.Thread(target=lambda: found.append(draw().texts))
    thread.start()
    thread.join()
    assert found == [plain]


def test_importing_is_cheap_and_names_are_listed() -> None:
    code = (
        "import sys, dia_lightning as dia; assert 'torch' not in sys.modules; "
        "assert {'sample', 'BestOfN', 'rewards'} <= {*dir(dia)}; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert len(dia.__all__) <= 45
    for name in dia.__all__:
        assert getattr(dia, name) is not None
    assert dia.rewards.Length.__name__ == "Length"
    with pytest.raises(AttributeError, match="nothing"):
        _ = dia.nothing  # type: ignore[attr-defined]


def test_copies_are_told(draw: Callable[..., dia.Result], caplog: pytest.LogCaptureFixture) -> None:
    """One particle of 32 carries all the weight at λ = 1000; p_θ's texts differ."""
    sampler = dia.Annealed([], particles=8)
    given: dict[str, Any] = {"prompts": ["the", "a"], "n": 4, "compare_base": True, "lam": 1000}
    found = draw(
        reward=lambda texts: [sum(t.encode()) / 9 for t in texts], sampler=sampler, **given
    )
    assert found.base is not None
    for result in (found, found.base):
        rows = [result.texts[:4], result.texts[4:]]
        want = torch.tensor([len(set(row)) / 4 for row in rows]).repeat_interleave(4)
        assert torch.equal(result.diagnostics["unique_texts"], want)
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"prompt {i}: 4 of 4 texts are the same; raise particles (8)" for i in (1, 2)]
    caplog.clear()
    assert draw(n=4, sampler=dia.BaseModel()).diagnostics["unique_texts"].shape == (4,)
    assert not caplog.records
