"""Forty and more architectures of transformers: loaded, checked, written, scored and moved, or refused in one line.

What comes out is the table in docs/models.md.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dia_lightning.errors import UserError
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.rewards import Length
from dia_lightning.sampling.drafts import SuffixDrafts
from dia_lightning.sampling.ensemble import EnsembleKernel
from dia_lightning.target import TargetDensity
from dia_lightning.types import Batch, fill_after_end, text_mask
from tests.test_row_cache import full_pass, in_pieces

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = {
    "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "head_dim": 8, "first_k_dense_replace": 1,
}  # fmt: skip
LATENT = EXPERTS | {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip
LINEAR = {
    "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
WITH, WITHOUT, REFUSED = "with cache", "without", "refused"
# Of each architecture what its config needs besides SIZES, and how it is written.
ARCHITECTURES: dict[str, tuple[dict[str, Any], str]] = {
    "apertus": ({}, WITH), "arcee": ({}, WITH), "biogpt": ({}, WITH), "bitnet": ({}, WITH), "bloom": ({}, WITH),
    "codegen": ({"rotary_dim": 4}, WITH), "cohere": ({}, WITH), "cohere2": ({"head_dim": 8}, WITH),
    "diffllama": ({}, WITH), "ernie4_5": ({"head_dim": 8}, WITH), "exaone4": ({}, WITH), "falcon": ({}, WITH),
    "gemma": ({"head_dim": 8}, WITH), "gemma2": ({"head_dim": 8}, WITH), "gemma3_text": ({"head_dim": 8}, WITH),
    "glm": ({"head_dim": 8}, WITH), "glm4": ({"head_dim": 8}, WITH), "gpt2": ({}, WITH),
    "gpt_bigcode": ({}, WITH),
    "gpt_neo": ({"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4}, WITH),
    "gpt_neox": ({}, WITH), "gpt_oss": (EXPERTS, WITH), "gptj": ({"rotary_dim": 4}, WITH), "granite": ({}, WITH),
    "granitemoe": (EXPERTS, WITH), "helium": ({"head_dim": 8}, WITH), "jetmoe": (EXPERTS, WITH),
    "llama": ({}, WITH), "minicpm3": (LATENT, WITH), "mistral": ({"sliding_window": 4}, WITH),
    "mixtral": (EXPERTS, WITH), "modernbert-decoder": ({}, WITH), "mpt": ({}, WITH), "nemotron": ({}, WITH),
    "olmo": ({}, WITH), "olmo2": ({}, WITH), "olmo3": ({}, WITH), "olmoe": (EXPERTS, WITH),
    "opt": ({"word_embed_proj_dim": 32, "ffn_dim": 64}, WITH), "persimmon": ({}, WITH), "phi": ({}, WITH),
    "phi3": ({}, WITH), "phimoe": (EXPERTS, WITH), "qwen2": ({}, WITH), "qwen2_moe": (EXPERTS, WITH),
    "qwen3": ({"head_dim": 8}, WITH), "qwen3_moe": (EXPERTS, WITH), "seed_oss": ({"head_dim": 8}, WITH),
    "smollm3": ({}, WITH), "stablelm": ({}, WITH), "starcoder2": ({}, WITH),
    "xglm": ({"ffn_dim": 64, "attention_heads": 4, "num_layers": 2}, WITH),
    "deepseek_v3": (LATENT, WITH),
    # Attention and recurrent state mixed.
    "qwen3_5_text": (LINEAR, WITH), "qwen3_next": (LINEAR | EXPERTS, WITH), "olmo_hybrid": (LINEAR, WITH),
    "lfm2": ({"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}, WITH),
    "jamba": ({**EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}, WITH),
    "falcon_h1": ({"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}, WITH),
    # No cache of keys and values, or one of their own.
    "openai-gpt": ({}, WITHOUT), "mamba": ({"state_size": 8}, WITHOUT), "falcon_mamba": ({"state_size": 8}, WITHOUT),
    "rwkv": ({}, WITHOUT), "xlstm": ({"num_heads": 4, "num_blocks": 2}, WITHOUT), "minimax": (EXPERTS, WITHOUT),
    "xlm": ({"causal": True}, WITHOUT),
    # Encoders, unless their config says that they decode.
    "bert": ({}, REFUSED), "roberta": ({}, REFUSED), "electra": ({}, REFUSED), "xlm-roberta": ({}, REFUSED),
    "rembert": ({}, REFUSED), "camembert": ({}, REFUSED), "megatron-bert": ({}, REFUSED),
    "xmod": ({}, REFUSED),
    "bert-generation": ({"is_decoder": True}, WITH),
}  # fmt: skip
# Rows of different lengths are read again: alibi, local attention and recurrent states go by the
# place in the cache, or logits are scaled on top of the head.
WITHOUT_SLOTS = {
    "bloom", "cohere", "cohere2", "falcon_h1", "gemma2", "gpt_neo", "jamba", "lfm2", "minicpm3",
    "modernbert-decoder", "olmo_hybrid", "qwen3_5_text", "qwen3_next",
}  # fmt: skip
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, lm: BaseLM) -> Make:
    def folder(kind: str, **more: Any) -> Path:
        """A tiny random model of this kind whose texts end after some tokens, with the tokenizer of `lm`."""
        path = tmp_path_factory.mktemp(kind)
        ends = {"bos_token_id": lm.end_id, "eos_token_id": lm.end_id, "pad_token_id": 1}
        sizes = {"vocab_size": len(lm.tokenizer)} | SIZES | ends | more
        config = AutoConfig.for_model(kind, **sizes)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            head = model.get_output_embeddings()
            if head is not None:
                head.weight.mul_(3)
        model.save_pretrained(path)
        lm.tokenizer.save_pretrained(path)
        return path

    return folder


def plain_greedy(model: Any, rows: torch.Tensor, given: int, end: int) -> torch.Tensor:
    """(B, T) the likeliest tokens after the first `given`, by full passes over each row alone."""
    out = torch.full_like(rows, end)
    for row, done in zip(rows, out, strict=True):
        done[:given] = row[:given]
        for i in range(given, len(row)):
            inputs = torch.cat([torch.tensor([end]), done[:i]])[None]
            with torch.no_grad():
                done[i] = model(inputs, use_cache=False).logits[0, -1].argmax()
            if done[i] == end:
                break
    return out


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_it_is_read_and_written_or_refused(
    kind: str, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Greedy texts and log p against full passes by transformers alone, and a suffix move that keeps its accounts."""
    more, how = ARCHITECTURES[kind]
    folder = make(kind, **more)
    if how == REFUSED:
        with pytest.raises(
            UserError, match=r"^base_lm: \S+ (is no causal|cannot be read)"
        ) as refusal:
            BaseLM.load(str(folder))
        assert "\n" not in str(refusal.value)
        return
    lm = BaseLM.load(str(folder))
    assert lm.has_cache == (how == WITH)
    assert ("without a key-value cache" in caplog.text) == (how == WITHOUT)
    tokens = torch.full((3, 12), lm.end_id)
    tokens[:, :2] = torch.tensor([[5, 6], [7, 8], [9, 10]])
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, :2] = True
    assert lm.has_slots == (how == WITH and kind not in WITHOUT_SLOTS)
    rows = torch.randint(1, lm.vocab_size, (3, 12), generator=torch.Generator().manual_seed(0))
    got = in_pieces(lm, rows, 0)
    torch.testing.assert_close(got, full_pass(lm, rows), atol=1e-3, rtol=1e-3)
    greedy = lm.generate(tokens, mask, torch.Generator().manual_seed(0), top_k=1)
    assert greedy.tolist() == plain_greedy(lm.model, tokens, 2, lm.end_id).tolist()

    drawn = lm.generate(tokens, mask, torch.Generator().manual_seed(1))
    inputs = torch.nn.functional.pad(drawn[:, :-1], (1, 0), value=lm.end_id)
    with torch.no_grad():
        log_p = lm.model(inputs, use_cache=False).logits.double().log_softmax(-1)
    keep = text_mask(drawn, mask, lm.end_id) & ~mask
    want = (log_p.gather(-1, drawn[..., None])[..., 0] * keep).sum(1)
    torch.testing.assert_close(lm.log_prob(drawn, mask), want, atol=1e-3, rtol=1e-4)

    batch = Batch(0, [0, 1, 2], ["a", "b", "c"], tokens, mask)
    target = TargetDensity(lm, Length(3), 1.0, batch)
    kernel = EnsembleKernel(target, SuffixDrafts(lm))
    state = kernel.init(drawn, mask, torch.ones(3))
    state, _ = kernel.step(state, torch.Generator().manual_seed(2))
    assert torch.equal(state.tokens, fill_after_end(state.tokens, mask, lm.end_id))
    assert torch.equal(state.tokens[mask], tokens[mask])
    torch.testing.assert_close(state.reward, target.terms(state.tokens).reward)


def test_the_table_of_models_says_what_these_tests_found() -> None:
    page = Path(__file__).parents[1].joinpath("docs/models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.-]+)` \| ([a-z ]+) \|", page, re.MULTILINE)
    assert dict(rows) == {kind: how for kind, (_, how) in ARCHITECTURES.items()}
    assert len(rows) >= 40
