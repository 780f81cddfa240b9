"""What a base model must obey is tried when it is loaded: right, or refused in one line."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPTJConfig, GPTJForCausalLM

from dia_lightning.data.prompts import prompt_rows
from dia_lightning.errors import UserError
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.lm.files import positions_of
from dia_lightning.rewards import Perplexity
from dia_lightning.types import fill_after_end, text_mask
from tests.test_cli import assert_one_line

Weights = dict[str, torch.Tensor]
Run = Callable[..., tuple[int, str, str]]


def damaged(folder: Path, to: Path, change: Callable[[Weights], Weights], **config: Any) -> str:
    """A copy of a model's folder with other weights, or another config."""
    shutil.copytree(folder, to)
    save_file(
        change(load_file(folder / "model.safetensors")),
        to / "model.safetensors",
        metadata={"format": "pt"},
    )
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (to / "config.json").write_text(json.dumps(settings | config), encoding="utf-8")
    return str(to)


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: weight for name, weight in weights.items() if part not in name}


def renamed(weights: Weights) -> Weights:
    return {f"_orig_mod.{name}": weight for name, weight in weights.items()}


def with_one_more(weights: Weights) -> Weights:
    return weights | {"model.layers.0.self_attn.gate.weight": torch.zeros(3)}


FAULTS: dict[str, tuple[Callable[[Weights], Weights], dict[str, Any], str]] = {
    "an MLP": (
        without(".layers.1.mlp."),
        {},
        "no weights 'model.layers.1.mlp.down_proj.weight' and 2 more",
    ),
    "a head": (dict, {"tie_word_embeddings": False}, "no weights 'lm_head.weight'"),
    "a norm": (without("model.norm"), {}, "no weights 'model.norm.weight'"),
    "a prefix": (renamed, {}, r"no weights 'lm_head.weight' and \d+ more"),
    "more layers": (dict, {"num_hidden_layers": 1}, "no place for the weights 'model.layers.1."),
    "a stranger": (
        with_one_more,
        {},
        "no place for the weights 'model.layers.0.self_attn.gate.weight'",
    ),
    "another width": (
        dict,
        {"intermediate_size": 32},
        "another shape to the weights 'model.layers.0.mlp.down_proj.weight' and 5 more",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_weight_comes_from_the_checkpoint(
    fault: str, llama_folder: Path, tmp_path: Path
) -> None:
    change, config, said = FAULTS[fault]
    folder = damaged(llama_folder, tmp_path / "lm", change, **config)
    for load, argument in ((BaseLM.load, "base_lm"), (Perplexity, "model")):
        with pytest.raises(UserError, match=f"^{argument}: cannot load .*{said}") as error:
            load(folder)
        assert "\n" not in str(error.value)


def test_a_whole_checkpoint_has_old_buffers_and_is_loaded(
    llama_folder: Path, tmp_path: Path
) -> None:
    old = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
        "model.position_ids": torch.arange(4),
    }
    folder = damaged(llama_folder, tmp_path / "lm", lambda weights: weights | old)
    tokens = torch.arange(3, 8)[None]
    assert torch.equal(
        BaseLM.load(folder).log_prob(tokens), BaseLM.load(str(llama_folder)).log_prob(tokens)
    )


def test_the_command_says_it_in_one_line(
    lightning: Run, llama_folder: Path, tmp_path: Path
) -> None:
    folder = damaged(llama_folder, tmp_path / "lm", without("q_proj"))
    run = lightning("predict", "--config", "configs/zero_shot_tiny.yaml", "--model.base_lm", folder)
    assert_one_line(run, "base_lm", "no weights 'model.layers.0.self_attn.q_proj.weight'")


def with_tokens(folder: Path, to: Path, change: Callable[[Any], Any]) -> str:
    shutil.copytree(folder, to)
    tokenizer = AutoTokenizer.from_pretrained(to)
    change(tokenizer)
    tokenizer.save_pretrained(to)
    return str(to)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.add_tokens(["lighthouse"]),
        lambda t: t.add_special_tokens({"bos_token": "<s>"}),
        lambda t: t.add_special_tokens({"eos_token": "</s>"}),
    ],
    ids=["word", "bos", "eos"],
)
def test_a_tokenizer_beyond_the_table_is_refused(
    change: Any, lm_folder: Path, lm: BaseLM, tmp_path: Path
) -> None:
    folder, rows = with_tokens(lm_folder, tmp_path / "lm", change), lm.vocab_size
    with pytest.raises(
        UserError,
        match=rf"base_lm: .* tokens up to number {rows} .*table {rows} rows \(0 to {rows - 1}\)",
    ):
        BaseLM.load(folder)


def test_a_special_token_that_nobody_asks_for_may_lie_beyond(
    lm_folder: Path, tmp_path: Path
) -> None:
    """Gemma 3's image token; a prompt that has it is refused before a text is drawn."""
    more = {"additional_special_tokens": ["<image>"]}
    lm = BaseLM.load(with_tokens(lm_folder, tmp_path / "lm", lambda t: t.add_special_tokens(more)))
    with pytest.raises(UserError, match=r"^texts: 'the <image>' has the token '<image>'"):
        lm.token_ids(["the <image>"])
    with pytest.raises(UserError, match=r"^prompts: 'the <image>' has the token '<image>'"):
        prompt_rows(lm, ["the <image>"], 10)


@pytest.mark.parametrize("value", [-1, 0])
def test_position_limits_that_mean_none(value: int, llama: BaseLM) -> None:
    model = llama.model
    limit, model.config.max_position_embeddings = model.config.max_position_embeddings, value
    try:
        assert BaseLM(model, llama.tokenizer).max_length == (1 << 20) - 1
    finally:
        model.config.max_position_embeddings = limit


def test_a_config_without_a_position_limit() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2))
    assert positions_of(model) == 1 << 20


def test_weights_that_are_not_finite_are_refused(llama_folder: Path, tmp_path: Path) -> None:
    def spoil(weights: Weights) -> Weights:
        weights["model.norm.weight"][0] = math.nan
        return weights

    with pytest.raises(UserError, match="logits that are NaN or infinite"):
        BaseLM.load(damaged(llama_folder, tmp_path / "lm", spoil))


ENDS, P_ENDS = [0, 1, 5], [0.05, 0.15, 0.1]


@pytest.fixture(scope="module")
def several_ends(lm: BaseLM, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Every token from one fixed law: three ends, of which the tokenizer knows the first, and
    four words.
    """
    config = GPTJConfig(
        vocab_size=lm.vocab_size, n_embd=16, n_layer=1, n_head=2, n_positions=64, rotary_dim=4,
        bos_token_id=0, eos_token_id=0
    )  # fmt: skip
    model = GPTJForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.lm_head.bias.fill_(-40.0)
        model.lm_head.bias[[20, 21, 22, 23]] = math.log(0.7 / 4)
        model.lm_head.bias[ENDS] = torch.tensor(P_ENDS).log()
    model.generation_config.eos_token_id = ENDS
    folder = tmp_path_factory.mktemp("ends") / "lm"
    model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return str(folder)


def test_all_ends_of_the_generation_config_end_a_text(several_ends: str) -> None:
    """Lengths are geometric with the sum of the ends' probabilities: mean of 8,000 at 5 standard
    errors, 6·10⁻⁷.
    """
    lm = BaseLM.load(several_ends)
    assert lm.end_ids == ENDS
    tokens = torch.full((8000, 60), lm.end_id)
    drawn = lm.generate(
        tokens, torch.zeros_like(tokens, dtype=torch.bool), torch.Generator().manual_seed(0)
    )
    assert not set(ENDS[1:]) & set(drawn.flatten().tolist())
    p = sum(P_ENDS)
    words = (drawn != lm.end_id).sum(1).double()
    assert abs(float(words.mean()) - (1 - p) / p) < 5 * ((1 - p) / p**2 / 8000) ** 0.5


def test_an_end_has_the_probability_of_all_of_them(several_ends: str) -> None:
    lm = BaseLM.load(several_ends)
    rows = torch.tensor([[20, 21, 0, 0], [0, 0, 0, 0], [20, 5, 20, 0], [20, 21, 22, 23]])
    rows = fill_after_end(rows, torch.zeros_like(rows, dtype=torch.bool), 0)
    word, end = math.log(0.7 / 4), math.log(sum(P_ENDS))
    want = torch.tensor([2 * word + end, end, -math.inf, 4 * word], dtype=torch.float64)
    torch.testing.assert_close(lm.log_prob(rows), want, atol=1e-4, rtol=0)
    read = lm.read(rows, torch.zeros_like(rows, dtype=torch.bool))
    torch.testing.assert_close(read.log_p.double().sum(1), want, atol=1e-4, rtol=0)
    words = text_mask(rows, torch.zeros_like(rows, dtype=torch.bool), 0)
    goes_on = torch.full((int(words.sum()),), math.log(1 - sum(P_ENDS)))
    torch.testing.assert_close(read.log_goes_on[words], goes_on, atol=1e-4, rtol=0)


def test_an_option_names_other_ends(lightning: Run, several_ends: str, lm: BaseLM) -> None:
    word = lm.tokenizer.decode([20])
    base = [
        "--model.base_lm",
        several_ends,
        "--data.base_lm",
        several_ends,
        "--data.n_texts=6",
        "--data.max_length=30",
    ]
    run = [
        "predict",
        "--config",
        "configs/zero_shot_tiny.yaml",
        *base,
        "--trainer.callbacks.folder=out",
    ]
    code, _, err = lightning(*run, f"--data.end_tokens={json.dumps([word])}")
    assert (code, err) == (0, "")
    lines = [
        json.loads(line)
        for line in Path("out/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert not any({20, *ENDS[1:]} & set(line["tokens"]) for line in lines)
    assert_one_line(
        lightning(*run, '--data.end_tokens=["no such token at all"]'), "end_tokens", "is one token"
    )


def test_a_cache_that_forgets_is_not_used(llama: BaseLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a cache that stay where they were when others are dropped: seen, said once, and
    written right without.
    """
    from dia_lightning.lm import contract, decoding

    monkeypatch.setattr(decoding._AllocatedLayer, "reorder_cache", lambda self, rows: None)
    assert not contract.writes_as_it_reads(llama)
    lm = BaseLM(llama.model, llama.tokenizer)
    assert not lm.has_cache
    tokens = torch.full((4, 9), lm.end_id)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    slow = lm.generate(tokens, mask, torch.Generator().manual_seed(3))
    monkeypatch.undo()
    assert torch.equal(slow, llama.generate(tokens, mask, torch.Generator().manual_seed(3)))


def test_a_model_that_answers_differently_each_time_is_refused(
    llama: BaseLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = llama.model.lm_head.forward
    monkeypatch.setattr(llama.model.lm_head, "forward", lambda x: plain(x) + torch.randn(()))
    with pytest.raises(UserError, match="reads the same tokens differently"):
        BaseLM(llama.model, llama.tokenizer)
