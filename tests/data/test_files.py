"""Files as other programs write them: line ends, quotes, encodings, JSON lists and parquet."""

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from dia_lightning.callbacks.batch_files import dumps
from dia_lightning.data import HubSource, HubText, PromptData, TextFiles
from dia_lightning.data.records import read_records
from dia_lightning.data.text import read_texts
from dia_lightning.errors import UserError
from dia_lightning.files import json_lines, no_formula
from dia_lightning.lm.base_lm import BaseLM

PUBS = ["The Eagle is", "The Mill is", "The Vaults is"]


def written(folder: Path, name: str, content: str | bytes) -> Path:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


def prompts_of(source: str | Path) -> list[str]:
    return [str(record["prompt"]) for record in read_records(source, needs=["prompt"])]


def refusal(source: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        prompts_of(source)
    message = str(caught.value)
    assert message.startswith("prompts: ")
    assert "\n" not in message
    assert len(message) < 400
    return message


# Line ends


@pytest.mark.parametrize("ends", ["\n\n\n", "\r\r\r", ["\r\n"] * 3, "\r\n\r", ["\r", "\r\n", ""]])
@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.csv", "a.tsv"])
def test_each_line_is_a_prompt_whatever_ends_it(tmp_path: Path, name: str, ends: Any) -> None:
    header = "" if name.lower().endswith("txt") else f"prompt{ends[0]}"
    text = header + "".join(pub + end for pub, end in zip(PUBS, ends, strict=True))
    file = written(tmp_path, name, text)
    assert prompts_of(file) == PUBS
    assert read_texts(file, "prompt") == PUBS


def test_line_numbers_count_every_kind_of_end(tmp_path: Path) -> None:
    assert "line 4 as UTF-8" in refusal(written(tmp_path, "a.txt", b"a\rb\r\nc\ncaf\xe9\r"))
    assert "line 3 has 2 cells" in refusal(written(tmp_path, "a.csv", "prompt\ra\rb,c\r"))
    assert "line 3 has 2 cells" in refusal(written(tmp_path, "a.tsv", "prompt\ra\rb\tc\r"))


def test_corpora_of_the_line_ends_of_old_macs_are_several_texts(
    lm_folder: Path, tmp_path: Path
) -> None:
    file = written(tmp_path, "a.txt", "\r".join(f"the food number {i}" for i in range(20)))
    data = TextFiles(str(file), tokenizer=str(lm_folder), max_length=16)
    data.setup("fit")
    assert len(data.train_rows) + len(data.val_rows) == 20


SEPARATORS = ["\u2028", "\u2029", "\u0085", "\f", "\x1c", "\x0b", "\r", "\r\n"]


@pytest.mark.parametrize("separator", SEPARATORS)
def test_json_lines_end_at_line_feeds_alone(tmp_path: Path, separator: str) -> None:
    """As the product writes them, and as other programs do, escaped and raw."""
    prompts = [f"one{separator}two ", "three"]
    text = "".join(dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    file = written(tmp_path, "a.jsonl", text)
    assert prompts_of(file) == prompts
    assert [row for _, row in json_lines(file, "--x")] == [{"prompt": p} for p in prompts]
    assert prompts_of(written(tmp_path, "a.json", json.dumps(prompts))) == prompts
    if separator.isprintable() or ord(separator[0]) > 31:
        assert separator in text


def test_a_carriage_return_does_not_end_a_json_line(tmp_path: Path) -> None:
    rows = ['{"prompt":\r"a"}', '{"prompt": "b"}\r']
    assert prompts_of(written(tmp_path, "a.jsonl", "\n".join(rows))) == ["a", "b"]
    for content in ('{"prompt": "a"}\r{"prompt": "b"}\r', '{"prompt": "a"}\u2028{"prompt": "b"}'):
        assert "line 1 is no JSON object: Extra data" in refusal(
            written(tmp_path, "a.jsonl", content)
        )


# Tables


@pytest.mark.parametrize(
    "cells",
    [
        ['"The Eagle', "The Mill is", "The Vaults is", 'said the cook"', "The Punter is"],
        ['"The Eagle"', 'said ""the"" cook', '"'],
        ["'The Eagle", '"a, b"', 'the 6" pipe', '""'],
    ],
)
def test_a_quotation_mark_in_a_tsv_is_a_character(tmp_path: Path, cells: list[str]) -> None:
    rows = [f"{i}\t{cell}\n" for i, cell in enumerate(cells)]
    file = written(tmp_path, "a.tsv", "id\tprompt\n" + "".join(rows))
    assert prompts_of(file) == cells
    assert read_texts(file, "prompt") == cells


def test_quotes_in_a_tsv_are_read_where_that_is_said(tmp_path: Path) -> None:
    content = '"id"\t"prompt"\r\n"1"\t"said ""no""\tor\nso"\r\n2\tno\r\n'
    file = written(tmp_path, "a.tsv", content)
    assert "line 1: the header is in quotation marks; quoted:FILE.tsv" in refusal(file)
    texts = ['said "no"\tor\nso', "no"]
    assert prompts_of(f"quoted:{file}") == read_texts(f"quoted:{file}", "prompt") == texts
    assert "allowed: files" in refusal(f"quoted:{written(tmp_path, 'a.csv', content)}")
    assert "line 2" in refusal(f"quoted:{written(tmp_path, 'a.tsv', 'prompt' + chr(10) + chr(34))}")


def test_a_csv_is_read_by_rfc_4180(tmp_path: Path) -> None:
    content = 'prompt,n\r\n"a, ""b""\r\nc",1\r\nplain,2\r\n"",3\r\n'
    records = read_records(written(tmp_path, "a.csv", content), {"n": "n"})
    assert [record["n"] for record in records] == ["1", "2", "3"]
    assert read_texts(tmp_path / "a.csv", "prompt") == ['a, "b"\r\nc', "plain"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-8"])
def test_a_spreadsheet_s_unicode_text_is_read(tmp_path: Path, encoding: str) -> None:
    for name, separator in (("a.tsv", "\t"), ("a.csv", ",")):
        text = f"prompt{separator}n\r\nCafé über{separator}1\r\n“東京”{separator}2\r\n"
        assert prompts_of(written(tmp_path, name, text.encode(encoding))) == ["Café über", "“東京”"]
    big = written(tmp_path, "a.txt", b"\xfe\xff" + "Café\rb".encode("utf-16-be"))
    assert prompts_of(big) == ["Café", "b"]


def test_broken_utf_16_is_one_line(tmp_path: Path) -> None:
    for broken in ("a\nb".encode("utf-16")[:-1], b"\xff\xfe\x00\xd8a\0", "a".encode("utf-32")):
        assert "a.txt" in refusal(written(tmp_path, "a.txt", broken))


# JSON lists and parquet


ROWS: list[dict[str, Any]] = [
    {
        "prompt": " the good ",
        "n": 1,
        "references": ["x", "y"],
        "of": {"text": "inner", "deep": [1]},
    },
    {"prompt": "caf\u00e9\u2028bar", "n": None, "references": [], "of": {"text": "q", "deep": []}},
]


def rows_as(folder: Path, ending: str) -> Path:
    file = folder / f"a{ending}"
    if ending == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), file, row_group_size=1)
    elif ending == ".json":
        file.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return file


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_rows_are_the_same_in_each_file_that_keeps_types(
    lm_folder: Path, tmp_path: Path, ending: str
) -> None:
    file = rows_as(tmp_path, ending)
    assert read_records(file) == ROWS
    assert read_records(file, {"source": "of.text"}) == [{"source": "inner"}, {"source": "q"}]
    assert read_records(file, {"prompt": "references[]"}) == [{"prompt": "x"}, {"prompt": "y"}]
    assert read_texts(file, "prompt") == ["the good", "caf\u00e9\u2028bar"]
    data = PromptData(str(lm_folder), str(file), n_texts=1, max_length=20)
    data.setup("predict")
    assert list(data.texts) == [row["prompt"] for row in ROWS]


def test_lengths_are_drawn_from_every_kind_of_file(lm_folder: Path, tmp_path: Path) -> None:
    seen = BaseLM.load(str(lm_folder)).tokenizer(["the food"], add_special_tokens=False)
    written(tmp_path, "a.json", '["the food"]')
    written(tmp_path, "a.tsv", "text\nthe food\n")
    written(tmp_path, "A.CSV", "ref\nthe food\n")
    parquet.write_table(pyarrow.table({"text": ["the food"]}), tmp_path / "a.parquet")
    for name in ("a.json", "a.tsv", "A.CSV", "a.parquet"):
        length = str(tmp_path / name)
        data = PromptData(str(lm_folder), n_texts=2, max_length=12, length=length)
        data.setup("predict")
        assert data.lengths == [len(seen["input_ids"][0])] * 2, name


def test_a_list_of_strings_is_a_list_of_prompts(lm_folder: Path, tmp_path: Path) -> None:
    file = written(tmp_path, "a.json", json.dumps(["the ", {"prompt": "a"}, "food"]))
    assert prompts_of(file) == ["the ", "a", "food"]
    texts = written(tmp_path, "b.json", json.dumps([f"the food {i}" for i in range(20)]))
    data = TextFiles(str(texts), tokenizer=str(lm_folder), max_length=16)
    data.setup("fit")
    assert len(data.train_rows) == 19


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "element 1 is no JSON object or string but of type int"),
        ('["a", ["b"]]', "element 2 is no JSON object or string but of type list"),
        ('[{"prompt": "a"}, null]', "element 2 is no JSON object or string but of type NoneType"),
        ('{"prompt": "a"}\n{"prompt": "b"}\n', "JSON lines belong in a .jsonl file"),
        ("[]", "holds no prompt"),
        ('"a"', "no JSON list of objects or strings"),
        ('[{"text": "a"}]', "element 1 has no text in the field 'prompt', fields there: text"),
    ],
)
def test_other_json_is_refused(tmp_path: Path, content: str, message: str) -> None:
    assert message in refusal(written(tmp_path, "a.json", content))


def test_damaged_and_foreign_parquet_is_refused(tmp_path: Path) -> None:
    whole = rows_as(tmp_path, ".parquet").read_bytes()
    for content in (b"", b"prompt\na\n", whole[:-9], whole[:4] + bytes(200) + whole[204:]):
        assert "cannot read" in refusal(written(tmp_path, "b.parquet", content))
    (tmp_path / "folder.parquet").mkdir()
    assert "cannot read" in refusal(tmp_path / "folder.parquet")
    numbers = pyarrow.table({"prompt": [1], "when": [datetime.date(2024, 1, 2)]})
    parquet.write_table(numbers, tmp_path / "b.parquet")
    assert "row 1: the prompt is no string but 1" in refusal(tmp_path / "b.parquet")
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["prompt", "prompt"])
    parquet.write_table(twice, tmp_path / "b.parquet")
    assert "names the column 'prompt' twice" in refusal(tmp_path / "b.parquet")


def test_a_text_that_is_none_is_no_training_text(lm_folder: Path, tmp_path: Path) -> None:
    """Neither `None` nor `['a', 'b']` is a sentence; no text at all is passed over."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for value in (["a", "b"], 3, {"text": "a"}):
        file = written(folder, "train.jsonl", json.dumps({"text": value}) + "\n")
        with pytest.raises(UserError, match=r"the field 'text' is no string but"):
            read_texts(file, "text")
        with pytest.raises(UserError, match=r"the field 'text' is no string but"):
            HubText(HubSource(str(folder)), tokenizer=str(lm_folder)).setup("fit")
    rows = [{"text": None}, *({"text": f"the food {i}"} for i in range(9))]
    file = written(folder, "train.jsonl", "\n".join(map(json.dumps, rows)))
    assert len(read_texts(file, "text")) == 9
    data = HubText(HubSource(str(folder)), tokenizer=str(lm_folder), max_length=16)
    train, val = data.train_and_val_texts()
    assert sorted(train + val) == [f"the food {i}" for i in range(9)]


# Spreadsheets


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", " =1", "\r\n=1", "\uff1d1"]
)
def test_a_formula_gets_an_apostrophe(text: str) -> None:
    assert no_formula(text) == f"'{text}"


@pytest.mark.parametrize("cell", ["a=1", "", "'=1", -0.5, 3, "pair-12e4"])
def test_what_is_no_formula_stays(cell: Any) -> None:
    assert no_formula(cell) == cell
