"""p_θ against transformers' own loss and generation, and against enumeration."""

import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dia_lightning.data.prompts import prompt_rows
from dia_lightning.errors import UserError
from dia_lightning.lm import base_lm as lm_module
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.lm.decoding import Decoding
from dia_lightning.meter import Meter
from dia_lightning.numerics import draw_categorical
from dia_lightning.types import fill_after_end, text_mask


def rows(lm: BaseLM, n: int = 5, length: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Random rows in canonical form; prompts of 0, 1, 2, … tokens."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, lm.vocab_size, (n, length), generator=generator)
    tokens[0, 4], tokens[1, 7] = lm.end_id, lm.end_id
    prompt_mask = torch.arange(length) < torch.arange(n)[:, None]
    return fill_after_end(tokens, prompt_mask, lm.end_id), prompt_mask


def test_log_prob_is_transformers_own_loss(lm: BaseLM) -> None:
    tokens, prompt_mask = rows(lm)
    got = lm.log_prob(tokens, prompt_mask)
    for row, mask, value in zip(tokens, prompt_mask, got, strict=True):
        length = int(text_mask(row[None], mask[None], lm.end_id).sum())
        ids = torch.cat([torch.tensor([lm.bos_id]), row[:length]])[None]
        labels = ids.clone()
        labels[0, 1:][mask[:length]] = -100
        n = int((labels[0, 1:] != -100).sum())
        assert abs(float(-lm.model(ids, labels=labels).loss) * n - float(value)) < 1e-4


def test_padding_and_company_do_not_matter(lm: BaseLM) -> None:
    tokens, prompt_mask = rows(lm)
    longer = torch.nn.functional.pad(tokens, (0, 5), value=lm.end_id)
    mask = torch.nn.functional.pad(prompt_mask, (0, 5), value=False)
    ended = text_mask(tokens, prompt_mask, lm.end_id).sum(1) < tokens.shape[1]
    torch.testing.assert_close(
        lm.log_prob(longer, mask)[ended], lm.log_prob(tokens, prompt_mask)[ended]
    )
    singles = torch.cat(
        [lm.log_prob(t[None], m[None]) for t, m in zip(tokens, prompt_mask, strict=True)]
    )
    torch.testing.assert_close(singles, lm.log_prob(tokens, prompt_mask))


def test_chunks_give_the_same(lm: BaseLM, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, prompt_mask = rows(lm)
    whole = lm.log_prob(tokens, prompt_mask)
    monkeypatch.setattr("dia_lightning.lm.base_lm._LOGITS_AT_ONCE", {"cpu": 1})
    monkeypatch.setattr("dia_lightning.lm.row_cache._POSITIONS_AT_ONCE", {"cpu": 1})
    torch.testing.assert_close(lm.log_prob(tokens, prompt_mask), whole)
    monkeypatch.setattr(lm, "has_body", False)
    torch.testing.assert_close(lm.log_prob(tokens, prompt_mask), whole)


def test_logits_of_a_model_in_bfloat16_are_not_rounded(lm: BaseLM) -> None:
    """Its last states times its own table, in float32; transformers' own logits are some
    hundredths off.
    """
    low = BaseLM(deepcopy(lm.model).bfloat16(), lm.tokenizer)
    tokens = torch.randint(1, lm.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))
    ids = torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=lm.bos_id)
    states, table = low.model.transformer(ids).last_hidden_state, low.model.transformer.wte.weight
    want = (states.float() @ table.float().T).log_softmax(-1)
    chosen = want.gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(low.token_log_probs(tokens), chosen, atol=1e-4, rtol=0)
    read = low.read(tokens, torch.zeros_like(tokens, dtype=torch.bool))
    torch.testing.assert_close(read.log_p, chosen, atol=1e-4, rtol=0)
    assert (low.model(ids).logits.float().log_softmax(-1) - want).abs().max() > 0.01


def test_greedy_is_transformers_greedy(lm: BaseLM) -> None:
    tokens, prompt_mask = rows(lm, 4, 8)
    got = lm.generate(tokens, prompt_mask, torch.Generator().manual_seed(0), top_k=1)
    for row, mask, out in zip(tokens, prompt_mask, got, strict=True):
        start = torch.cat([torch.tensor([lm.bos_id]), row[mask]])[None]
        want = lm.model.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=False,
            max_length=9,
            pad_token_id=lm.end_id,
        )
        want = torch.nn.functional.pad(want[0, 1:], (0, 9 - want.shape[1]), value=lm.end_id)
        assert out.tolist() == want.tolist()


def test_rows_that_end_early_do_not_disturb_the_others() -> None:
    """Greedy texts of the shipped model, which end between 20 and 40 tokens, one batch against
    transformers one by one.
    """
    lm = BaseLM.load("checkpoints/tiny/lm")
    prompts = [
        "The",
        "Near the",
        "Cheap",
        "There is a",
        "Aromi",
        "A family friendly pub",
        "Blue Spice",
        "For Chinese food",
    ]
    tokens, prompt_mask = prompt_rows(lm, prompts, 40)
    got = lm.generate(tokens, prompt_mask, torch.Generator().manual_seed(0), top_k=1)
    lengths = set()
    for row, mask, out in zip(tokens, prompt_mask, got, strict=True):
        start = torch.cat([torch.tensor([lm.bos_id]), row[mask]])[None]
        want = lm.model.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=False,
            max_length=41,
            eos_token_id=lm.end_id,
        )
        lengths.add(want.shape[1])
        assert (
            out.tolist()
            == torch.nn.functional.pad(
                want[0, 1:], (0, 41 - want.shape[1]), value=lm.end_id
            ).tolist()
        )
    assert len({n // 8 for n in lengths}) >= 2


def test_generate_draws_from_p(lm: BaseLM) -> None:
    """First tokens of 20,000 draws against p_θ; χ² at false-alarm rate 10⁻³ (Wilson–Hilferty),
    seed fixed.
    """
    n = 20_000
    tokens = torch.full((n, 1), lm.end_id)
    drawn = lm.generate(
        tokens, torch.zeros_like(tokens, dtype=torch.bool), torch.Generator().manual_seed(0)
    )
    want = lm.log_prob(torch.arange(lm.vocab_size)[:, None]).exp() * n
    got = torch.bincount(drawn[:, 0], minlength=lm.vocab_size)
    common = want >= 5
    chi2 = float(((got - want)[common] ** 2 / want[common]).sum()) + float(
        (got - want)[~common].sum() ** 2 / want[~common].sum()
    )
    df = int(common.sum())
    assert chi2 < df * (1 - 2 / (9 * df) + 3.09 * (2 / (9 * df)) ** 0.5) ** 3


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.6), (1.3, 40, 0.9)]
)
def test_the_next_token_is_drawn_as_transformers_would(
    temperature: float, top_k: int, top_p: float
) -> None:
    logits = 3 * torch.randn(64, 280, generator=torch.Generator().manual_seed(0))
    warpers: list[Any] = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    want = logits
    for warp in warpers:
        want = warp(torch.zeros(64, 1, dtype=torch.int64), want)
    found = lm_module._next_log_probs(logits, temperature, top_k, top_p)
    torch.testing.assert_close(found.softmax(1), want.softmax(1))


def test_generate_keeps_prompts_and_ends_rows(lm: BaseLM) -> None:
    tokens, prompt_mask = rows(lm, 6, 12)
    out = lm.generate(tokens, prompt_mask, torch.Generator().manual_seed(0))
    assert torch.equal(out[prompt_mask], tokens[prompt_mask])
    assert torch.equal(out, fill_after_end(out, prompt_mask, lm.end_id))


def test_draw_categorical_never_draws_what_has_no_probability() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]]).expand(50_000, 5)
    counts = torch.bincount(draw_categorical(logits, torch.Generator().manual_seed(0)), minlength=5)
    assert counts[[0, 2, 4]].tolist() == [0, 0, 0]
    # 7 standard errors: false-alarm rate 3e-12
    assert abs(counts[3] / 50_000 - 0.7310586) < 7 * (0.731 * 0.269 / 50_000) ** 0.5


def test_decode_leaves_out_prompt_and_end(lm: BaseLM) -> None:
    text = "the good food is great"
    tokens = lm.encode([text], 30)
    prompt_mask = torch.zeros_like(tokens, dtype=torch.bool)
    assert lm.decode(tokens, prompt_mask) == [text]
    prompt_mask[0, :3] = True
    assert lm.decode(tokens, prompt_mask) == [
        lm.tokenizer.decode(tokens[0, 3:], skip_special_tokens=True)
    ]


def test_a_hub_that_cannot_be_reached_is_said_within_30_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(UserError, match=r"base_lm.*no-such/model.*checkpoints/tiny/lm"):
        BaseLM.load("no-such/model")
    assert time.monotonic() - start < 30


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        BaseLM.load(str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        BaseLM.load(str(tmp_path / "missing"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot load"):
        BaseLM.load(str(tmp_path))


def test_a_pickle_is_not_loaded(lm_folder: Path, tmp_path: Path) -> None:
    for file in lm_folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot load"):
        BaseLM.load(str(tmp_path))


def test_writing_reads_what_stands_there_after_rows_were_resampled_and_dropped(lm: BaseLM) -> None:
    """Logits from the cache against a pass over the whole row; two rows are copied, then one has
    ended and is dropped.
    """
    tokens = torch.full((4, 6), lm.end_id)
    writing = Decoding(lm, tokens, torch.zeros_like(tokens, dtype=torch.bool))
    for written in ([1, 2, 3, 4], [5, 6, 7, 8]):
        writing.next_logits()
        writing.write(torch.tensor(written))
    writing.resample(torch.tensor([2, 1, 2, 0]))
    assert writing.tokens[:, :2].tolist() == [[3, 7], [2, 6], [3, 7], [1, 5]]
    for written in ([9, lm.end_id, 10, 11], [12, 13, 14, 15]):
        seen = torch.nn.functional.pad(writing.tokens[:, : writing.place], (1, 0), value=lm.bos_id)
        torch.testing.assert_close(
            writing.next_logits(), lm.model(seen).logits[:, -1], atol=1e-5, rtol=1e-5
        )
        writing.write(torch.tensor(written))
    assert writing.drop_ended()
    assert writing.rows.tolist() == [0, 2, 3]
    seen = torch.nn.functional.pad(writing.tokens[writing.rows, :4], (1, 0), value=lm.bos_id)
    torch.testing.assert_close(
        writing.next_logits(), lm.model(seen).logits[:, -1], atol=1e-5, rtol=1e-5
    )
    assert writing.text()[1].tolist() == [2, 6, *[lm.end_id] * 4]


def test_prompts_read_in_one_pass_give_the_same_texts(
    lm: BaseLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = torch.randint(1, lm.vocab_size, (6, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(12) < torch.tensor([5, 3, 4, 3, 7, 12])[:, None]
    read = lm.generate(prompt, mask, torch.Generator().manual_seed(1))
    passes: list[int] = []
    monkeypatch.setattr(Decoding, "read_prompts", lambda self: passes.append(1) or 0)
    assert torch.equal(lm.generate(prompt, mask, torch.Generator().manual_seed(1)), read)
    assert passes
    monkeypatch.undo()
    writing = Decoding(lm, prompt, mask)
    assert writing.read_prompts() == writing.place == 3


def test_rows_of_like_prompts_are_written_together(
    lm: BaseLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same texts (greedy ones, as parts draw other numbers), in fewer steps of rows."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(1, lm.vocab_size, (20, 12), generator=generator)
    mask = torch.arange(12) < torch.randint(1, 13, (20, 1), generator=generator)
    found = {}
    for busy in (1e12, 4 * sum(weights for _, weights in lm.multiplied())):
        monkeypatch.setitem(lm_module._BUSY, "cpu", busy)
        parts = lm._alike(mask)
        assert torch.cat(list(parts)).sort().values.tolist() == list(range(20))
        meter = Meter()
        meter.watch("base_lm", lm.multiplied()[:1])
        text = lm.generate(prompt, mask, generator, top_k=1)
        found[len(parts)] = text, meter.read()["base_lm"].calls
    (plain, many), (sorted_ones, few) = found[1], found[5]
    assert torch.equal(sorted_ones, plain)
    assert 0 < few < many
    assert len(lm._alike(mask[:, :1].expand_as(mask))) == 1  # all alike
