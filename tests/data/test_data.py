"""Data modules: the sample cache, corpora, prompts; and their refusals."""

import json
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dia_lightning.data import HubSource, HubText, ModelSamples, PromptData, Reading, TextFiles
from dia_lightning.data.prompts import prompt_rows
from dia_lightning.data.rollouts import RolloutData
from dia_lightning.data.text import read_texts
from dia_lightning.errors import UserError
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.types import fill_after_end


def samples(lm_folder: Path, cache: Path, **options: object) -> ModelSamples:
    defaults = {"n_texts": 20, "n_val": 4, "max_length": 12, "shard_size": 8, "batch_size": 4}
    data = ModelSamples(str(lm_folder), cache=str(cache), **{**defaults, **options})  # type: ignore[arg-type]
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
    variants: list[dict[str, object]] = [
        {},
        {"seed": 1},
        {"temperature": 0.5},
        {"max_length": 10},
        {"prompts": str(prompts)},
    ]
    assert len({samples(lm_folder, tmp_path, **options).folder for options in variants}) == len(
        variants
    )
    data = samples(lm_folder, tmp_path)
    folder = data.folder
    data.lm.encode(["a call that changes the tokenizer's state"], 5)
    assert data.folder == folder


def test_samples_with_prompts_start_with_them(lm_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("the good\n\nthe cheap food\n")
    data = samples(lm_folder, tmp_path, prompts=str(prompts))
    batch = data.train_rows[list(range(20))]
    starts = [
        data.lm.tokenizer.decode(row[mask])
        for row, mask in zip(batch["tokens"], batch["prompt_mask"], strict=True)
    ]
    assert set(starts) == {"the good", "the cheap food"}
    assert torch.equal(
        fill_after_end(batch["tokens"], batch["prompt_mask"], data.lm.end_id), batch["tokens"]
    )


def test_text_files_of_every_kind_give_the_same_rows(lm_folder: Path, tmp_path: Path) -> None:
    texts = [f"the food number {i} is good" for i in range(20)]
    (tmp_path / "a.txt").write_text("\n".join(texts) + "\n")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"ref": t}) for t in texts) + "\n")
    (tmp_path / "a.csv").write_text("mr,ref\n" + "\n".join(f"x,{t}" for t in texts) + "\n")
    rows = []
    for kind in ("txt", "jsonl", "csv"):
        data = TextFiles(
            str(tmp_path / f"a.{kind}"), "ref", tokenizer=str(lm_folder), max_length=16
        )
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
        ("a.pdf", "x", "allowed: files ending in"),
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
            PromptData(str(lm_folder), prompts=str(tmp_path / name), max_length=16).setup("predict")
    data = PromptData(str(lm_folder), prompts=["the " * 30], max_length=16)
    with pytest.raises(UserError, match="at most 15"):
        data.setup("predict")


def test_blanks_and_lengths_are_fixed_where_they_should_be(lm_folder: Path) -> None:
    lm = BaseLM.load(str(lm_folder))
    the, food, good = (
        lm.tokenizer(w, add_special_tokens=False)["input_ids"] for w in ("the", " food", " good")
    )
    tokens, mask = prompt_rows(lm, ["the [blank:2] food", "the good", "[blank:3]"], 12)
    n = [len(the) + 2 + len(food), len(the) + len(good), 3]
    assert tokens[0].tolist() == [*the, lm.end_id, lm.end_id, *food, *[lm.end_id] * (12 - n[0])]
    free = [[len(the), len(the) + 1], list(range(n[1], 12)), [0, 1, 2]]
    assert [(~row).nonzero()[:, 0].tolist() for row in mask] == free
    data = PromptData(str(lm_folder), prompts=["the"], n_texts=2, max_length=12, length=4)
    data.setup("predict")
    [batch] = list(data.predict_dataloader())
    assert [(~row).nonzero()[:, 0].tolist() for row in batch.prompt_mask] == [
        list(range(len(the), len(the) + 4))
    ] * 2
    assert batch.prompts == ["the", "the"]
    with pytest.raises(UserError, match=r"length: 0 given, allowed: 1 or more"):
        PromptData(str(lm_folder), length=0, max_length=12).setup("predict")
    with pytest.raises(UserError, match="allowed: at most"):
        PromptData(str(lm_folder), length=12, max_length=12, prompts=["the"]).setup("predict")


def test_lengths_are_drawn_from_a_file_s(lm_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("the\nthe food\n")
    lm = BaseLM.load(str(lm_folder))
    seen = {
        len(ids) for ids in lm.tokenizer(["the", "the food"], add_special_tokens=False)["input_ids"]
    }
    data = PromptData(str(lm_folder), n_texts=40, max_length=12, length=str(tmp_path / "texts.txt"))
    data.setup("predict")
    free = torch.cat([(~batch.prompt_mask).sum(1) for batch in data.predict_dataloader()])
    assert set(free.tolist()) == seen  # chance of one missing: 2⁻³⁹


def test_a_template_makes_prompts_of_records(lm_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"source": "food", "references": ["x", "y"]}\n{"source": "place", "references": ["z"]}\n'
    )
    data = PromptData(
        str(lm_folder),
        str(tmp_path / "a.jsonl"),
        reading=Reading(template="the {source}"),
        n_texts=2,
        max_length=12,
    )
    data.setup("predict")
    assert list(data.texts) == ["the food"] * 2 + ["the place"] * 2
    assert [r["references"] for r in data.records] == [["x", "y"]] * 2 + [["z"]] * 2
    none = PromptData(
        str(lm_folder),
        str(tmp_path / "a.jsonl"),
        reading=Reading(template="", limit=1),
        n_texts=1,
        max_length=12,
    )
    none.setup("predict")
    assert list(none.texts) == [""]
    with pytest.raises(UserError, match="prompt"):
        PromptData(str(lm_folder), str(tmp_path / "a.jsonl"), max_length=12).setup("predict")


def test_prompt_batches_are_numbered_and_skipped(lm_folder: Path) -> None:
    data = PromptData(
        str(lm_folder), prompts=["the good", "the"], n_texts=3, batch_size=4, max_length=16
    )
    data.setup("predict")
    batches = list(data.predict_dataloader())
    assert [b.ids for b in batches] == [[0, 1, 2, 3], [4, 5]]
    assert [b.prompts for b in batches] == [["the good"] * 3 + ["the"], ["the", "the"]]
    data.skip({0})
    assert [b.index for b in data.predict_dataloader()] == [1]
    assert data.n_batches == 2


def in_a_run(data: Any, steps: int, done: int = 0, accumulate: int = 1, device: str = "cpu") -> Any:
    """`data` as a trainer sees it that has `done` batches behind it."""
    data.trainer = SimpleNamespace(
        max_steps=steps, accumulate_grad_batches=accumulate, num_nodes=1, num_devices=1,
        world_size=1, global_rank=0, fit_loop=SimpleNamespace(total_batch_idx=done - 1),
        strategy=SimpleNamespace(root_device=torch.device(device)),
    )  # fmt: skip
    return data


def test_a_short_run_draws_what_it_uses_and_can_be_prolonged(
    lm_folder: Path, tmp_path: Path
) -> None:
    """4 held-out rows and 3 steps of 4 rows: two shards of 8 (200 rows are 26), whose order a
    longer run keeps.
    """

    def batches(steps: int, accumulate: int = 1) -> tuple[int, list[Any]]:
        made = ModelSamples(str(lm_folder), 200, 4, 12, 4, cache=str(tmp_path), shard_size=8)
        data = in_a_run(made, steps, accumulate=accumulate)
        data.setup("fit")
        return len(list(data.folder.glob("*.safetensors"))), [
            b["tokens"] for b in data.train_dataloader()
        ]

    n_short, short = batches(3)
    assert n_short == 2
    n_long, long = batches(3, accumulate=2)
    assert n_long == 4
    assert len(short) == 3
    assert all(torch.equal(a, b) for a, b in zip(short, long, strict=False))
    assert in_a_run(ModelSamples(str(lm_folder), 200, 4, shard_size=8), -1).n_shards == 26
    assert in_a_run(ModelSamples(str(lm_folder), 200, 4, shard_size=8), 10**6).n_shards == 26


def test_what_a_batch_holds_depends_on_its_number_alone(lm_folder: Path, tmp_path: Path) -> None:
    texts = tmp_path / "a.txt"
    texts.write_text("\n".join(f"the food number {i} is good" for i in range(20)) + "\n")
    for data in (
        samples(lm_folder, tmp_path),
        TextFiles(str(texts), tokenizer=str(lm_folder), batch_size=4),
    ):
        data.setup("fit")
        n = len(data.train_dataloader())

        def rows(done: int) -> list[list[list[int]]]:
            return [b["tokens"].tolist() for b in in_a_run(data, -1, done).train_dataloader()]

        epochs = [rows(0), rows(n)]
        assert epochs[0] != epochs[1]
        assert rows(2) == epochs[0][2:]
        assert rows(n + 1) == epochs[1][1:]


def test_samples_of_a_gpu_are_kept_apart(lm_folder: Path, tmp_path: Path) -> None:
    folders = [
        in_a_run(ModelSamples(str(lm_folder), cache=str(tmp_path)), 1, device=kind).folder
        for kind in ("cpu", "cuda")
    ]
    assert folders[0] != folders[1]


def test_a_data_set_is_streamed_and_its_tokenizer_found(lm_folder: Path, tmp_path: Path) -> None:
    """A folder of jsonl files in the place of a data set of the hub; as many texts as asked for,
    none on both sides.
    """
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "train.jsonl").write_text(
        "\n".join(json.dumps({"body": f"the food number {i} is good"}) for i in range(50))
    )
    data = HubText(
        HubSource(str(folder), column="body"),
        n_texts=20,
        tokenizer=str(lm_folder),
        max_length=16,
        batch_size=4,
    )
    data.prepare_data()
    data.setup("fit")
    texts = data.tokenizer.batch_decode(
        torch.cat([data.train_rows.tokens, data.val_rows.tokens]), skip_special_tokens=True
    )
    assert sorted(texts) == sorted(f"the food number {i} is good" for i in range(20))
    with pytest.raises(UserError, match=r"^dataset: cannot stream .*\(.*text"):
        HubText(HubSource(str(folder)), tokenizer=str(lm_folder)).setup("fit")


def test_a_tokenizer_is_looked_up_on_the_hub(
    lm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`gpt2`, the default, is no path: the hub's copy is used, or the option is named."""
    (tmp_path / "a.txt").write_text("the good food\nthe bad food\n")
    asked: list[str] = []

    def fetch(repo_id: str, *_: str) -> Path:
        asked.append(repo_id)
        return lm_folder

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dia_lightning.lm.files._fetched", fetch)
    data = TextFiles("a.txt", tokenizer="gpt2")
    data.setup("fit")
    assert asked == ["gpt2"]
    assert data.train_rows.end_id == data.tokenizer.eos_token_id

    def unreachable(repo_id: str, folder: str, file: str, argument: str) -> Path:
        raise UserError(f"{argument}: cannot fetch {repo_id!r}")

    monkeypatch.setattr("dia_lightning.lm.files._fetched", unreachable)
    with pytest.raises(UserError, match=r"^tokenizer: cannot fetch 'gpt2'"):
        TextFiles("a.txt", tokenizer="gpt2").setup("fit")


def test_impossible_data_options_are_named(lm_folder: Path) -> None:
    for options, message in (
        ({"seed": 1 << 70}, "seed: .* allowed: 0 to"),
        ({"seed": -1}, "seed"),
        ({"max_length": 999}, "max_length: 999 given, allowed: up to 31 for"),
    ):
        with pytest.raises(UserError, match=message):
            ModelSamples(str(lm_folder), **options).setup("fit")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^n_texts: 0 given"):
        HubText(HubSource("x"), n_texts=0)


def test_a_batch_that_was_copied_has_the_very_records(tmp_path: Path) -> None:
    """A true precision of the trainer copies them, and populations are told apart by them;
    rollouts too.
    """
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "the", "n": 1}\n{"prompt": "the", "n": 2}\n{"prompt": "a"}\n', encoding="utf-8"
    )
    for data in (
        PromptData("checkpoints/tiny/lm", str(tmp_path / "p.jsonl"), n_texts=2, batch_size=4),
        RolloutData("checkpoints/tiny/lm", str(tmp_path / "p.jsonl"), n_texts=2, batch_size=4),
    ):
        data.setup("predict")
        for index in range(2):
            batch = data.rollout(index) if isinstance(data, RolloutData) else data.batch(index)
            moved = data.transfer_batch_to_device(deepcopy(batch), torch.device("cpu"), 0)
            assert len(moved.records) == len(batch.ids)
            assert all(a is b for a, b in zip(moved.records, batch.records, strict=True))
