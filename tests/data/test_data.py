"""Data modules: the sample cache, corpora, prompts; and their refusals."""

import json
from pathlib import Path

import pytest
import torch

from dia_lightning.data import ModelSamples, PromptData, TextFiles
from dia_lightning.data.prompts import read_prompts
from dia_lightning.data.text import read_texts
from dia_lightning.resources import UserError
from dia_lightning.types import fill_after_end


def samples(lm_folder: Path, cache: Path, **options: object) -> ModelSamples:
    defaults = {"n_texts": 20, "n_val": 4, "max_length": 12, "shard_size": 8, "batch_size": 4}
    data = ModelSamples(str(lm_folder), cache=str(cache), **{**defaults, **options})  # type: ignore[arg-type]
    data.prepare_data()
    data.setup("fit")
    return data


def test_a_stopped_run_continues_with_the_same_rows(lm_folder: Path, tmp_path: Path) -> None:
    whole = samples(lm_folder, tmp_path / "a")
    shards = sorted(whole.folder.glob("*.safetensors"))
    assert [s.name for s in shards] == [f"shard-{i:05d}.safetensors" for i in range(3)]
    shards[1].unlink()
    before = shards[0].stat().st_mtime_ns
    again = samples(lm_folder, tmp_path / "a")
    assert torch.equal(again.train_rows.tokens, whole.train_rows.tokens)
    assert shards[0].stat().st_mtime_ns == before
    assert not list(whole.folder.glob("*.tmp*"))


def test_more_texts_only_add_shards(lm_folder: Path, tmp_path: Path) -> None:
    few, many = samples(lm_folder, tmp_path), samples(lm_folder, tmp_path, n_texts=36)
    assert few.folder == many.folder
    assert torch.equal(many.train_rows.tokens[:20], few.train_rows.tokens)


def test_the_key_knows_what_determines_the_rows(lm_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("the good\n")
    variants: list[dict[str, object]] = [{}, {"seed": 1}, {"temperature": 0.5}, {"max_length": 10}, {"prompts": str(prompts)}]
    assert len({samples(lm_folder, tmp_path, **options).folder for options in variants}) == len(variants)
    data = samples(lm_folder, tmp_path)
    folder = data.folder
    data.lm.encode(["a call that changes the tokenizer's state"], 5)
    assert data.folder == folder


def test_samples_with_prompts_start_with_them(lm_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("the good\n\nthe cheap food\n")
    data = samples(lm_folder, tmp_path, prompts=str(prompts))
    batch = data.train_rows[list(range(20))]
    starts = [data.lm.tokenizer.decode(row[mask]) for row, mask in zip(batch["tokens"], batch["prompt_mask"], strict=True)]
    assert set(starts) == {"the good", "the cheap food"}
    assert torch.equal(fill_after_end(batch["tokens"], batch["prompt_mask"], data.lm.end_id), batch["tokens"])


def test_text_files_of_every_kind_give_the_same_rows(lm_folder: Path, tmp_path: Path) -> None:
    texts = [f"the food number {i} is good" for i in range(20)]
    (tmp_path / "a.txt").write_text("\n".join(texts) + "\n")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"ref": t}) for t in texts) + "\n")
    (tmp_path / "a.csv").write_text("mr,ref\n" + "\n".join(f"x,{t}" for t in texts) + "\n")
    rows = []
    for kind in ("txt", "jsonl", "csv"):
        data = TextFiles(str(tmp_path / f"a.{kind}"), "ref", tokenizer=str(lm_folder), max_length=16)
        data.prepare_data()
        data.setup("fit")
        rows.append(data.train_rows.tokens)
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])
    assert len(rows[0]) == 19


def test_unusable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x\n1\n")
    (tmp_path / "a.pdf").write_text("")
    for path, column, message in (
        ("missing.csv", "x", "no such file"),
        ("a.csv", "ref", "no column 'ref', it has x"),
        ("a.pdf", "x", "allowed are files ending in"),
    ):
        with pytest.raises(UserError, match=message):
            read_texts(tmp_path / path, column)


def test_unusable_prompts_are_named(lm_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    for name, message in (
        ("empty.txt", "no prompt"),
        ("bad.jsonl", "line 2"),
        ("latin.txt", "UTF-8"),
        ("none.txt", "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            read_prompts(tmp_path / name)
    data = PromptData(str(lm_folder), prompts=["the " * 30], max_length=16)
    with pytest.raises(UserError, match="at most 15"):
        data.setup("predict")


def test_prompt_batches_are_numbered_and_skipped(lm_folder: Path) -> None:
    data = PromptData(str(lm_folder), prompts=["the good", "the"], n_texts=3, batch_size=4, max_length=16)
    data.setup("predict")
    batches = list(data.predict_dataloader())
    assert [b.ids for b in batches] == [[0, 1, 2, 3], [4, 5]]
    assert [b.prompts for b in batches] == [["the good"] * 3 + ["the"], ["the", "the"]]
    data.skip({0})
    assert [b.index for b in data.predict_dataloader()] == [1]
    assert data.n_batches == 2
