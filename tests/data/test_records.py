"""Records: each kind of source, its odd and broken forms, templates; and the data written for
the shipped tasks.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dia_lightning.data.records import fill_template, read_records, template_fields
from dia_lightning.errors import UserError
from dia_lightning.files import shipped_roots
from dia_lightning.lm.base_lm import BaseLM

ROOT = shipped_roots()[0]
DATA = ROOT / "configs/tasks/data"
PARADETOX = {"source": "toxic", "references": ["neutral1", "neutral2", "neutral3"]}


def written(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        read_records(*arguments, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    return str(caught.value)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_and_byte_order_marks_do_not_matter(tmp_path: Path, end: str, mark: str) -> None:
    contents = {
        "a.txt": ["", " the good ", "   ", "caf\u00e9\u2028bar", ""],
        "a.jsonl": ['{"prompt": "the good"}', "", '{"prompt": "caf\u00e9\u2028bar"}', ""],
        "a.csv": ["prompt,n", "the good,1", "", "caf\u00e9\u2028bar,2", ""],
        "a.tsv": ["prompt\tn", "the good\t1", "caf\u00e9\u2028bar\t2"],
    }
    for name, content in contents.items():
        records = read_records(written(tmp_path, name, mark + end.join(content)))
        assert [record["prompt"] for record in records] == ["the good", "caf\u00e9\u2028bar"], name


def test_objects_keep_what_they_hold(tmp_path: Path) -> None:
    """Other fields are left alone; a prompt keeps its spaces, since they decide which tokens
    follow.
    """
    objects = [
        {"prompt": "a ", "id": 3, "mr": None, "tags": ["x"]},
        {"prompt": ""},
        {"source": ["One.", "Two."]},
    ]
    file = written(tmp_path, "a.jsonl", "\n".join(map(json.dumps, objects)))
    assert read_records(file) == [objects[0], objects[1], {"source": "One. Two."}]


def test_paradetox_rows_have_as_many_references_as_are_filled(tmp_path: Path) -> None:
    rows = [
        "toxic\tneutral1\tneutral2\tneutral3",
        "how rude\tnot kind\t\t",
        'a ""b\t"he said ""no"""\tthat, too\t',
        "short row\tonly one",
    ]
    file = written(tmp_path, "a.tsv", "\n".join(rows))
    for source, said in ((file, '"he said ""no"""'), (f"quoted:{file}", 'he said "no"')):
        assert read_records(source, PARADETOX) == [
            {"source": "how rude", "references": ["not kind"]},
            {"source": 'a ""b', "references": [said, "that, too"]},
            {"source": "short row", "references": ["only one"]},
        ]


def test_lists_of_sentences_are_joined_where_one_text_is_needed(tmp_path: Path) -> None:
    """SciTLDR: an abstract in sentences, several summaries."""
    row = {
        "source": ["We study x.", "It works."],
        "target": ["x works", "", "a study of x"],
        "paper_id": "p",
    }
    file = written(tmp_path, "a.jsonl", json.dumps(row))
    record = {"source": "We study x. It works.", "references": ["x works", "a study of x"]}
    assert read_records(file, {"source": "source", "references": "target"}) == [record]
    assert read_records(file) == [{**row, "source": record["source"]}]
    assert read_records(file, {"prompt": ["paper_id", "source"]}) == [
        {"prompt": "p We study x. It works."}
    ]


def test_nested_prompts_of_bold_are_taken_one_by_one(tmp_path: Path) -> None:
    content = {"judges": {"A_B": ["A B was ", "A B is "], "C": []}, "cooks": {"D": ["D cooks "]}}
    assert read_records(written(tmp_path, "a_prompt.json", json.dumps(content))) == [
        {"prompt": "A B was", "category": "judges", "name": "A_B"},
        {"prompt": "A B is", "category": "judges", "name": "A_B"},
        {"prompt": "D cooks", "category": "cooks", "name": "D"},
    ]


def gyafc(folder: Path) -> Path:
    for domain in ("Entertainment_Music", "Family_Relationships"):
        short = domain[0]
        for style, other in (("formal", "informal"), ("informal", "formal")):
            written(
                folder,
                f"{domain}/train/{style}",
                "".join(f"{short} train {style} {i}\n" for i in range(2)),
            )
            written(
                folder,
                f"{domain}/test/{style}",
                "".join(f"{short} test {style} {i}\n" for i in range(3)),
            )
            for k in range(4):
                lines = [f"{short} test {style} {i} made {other} {k}\n" for i in range(3)]
                written(folder, f"{domain}/test/{other}.ref{k}", "".join(lines))
    return folder


@pytest.mark.parametrize("style", ["formal", "informal"])
def test_gyafc_pairs_each_sentence_with_its_own_rewrites(tmp_path: Path, style: str) -> None:
    other = {"formal": "informal", "informal": "formal"}[style]
    folder = gyafc(tmp_path / "a:b")  # a colon in a folder's name is part of it
    records = read_records(f"gyafc:{folder}:{style}_to_{other}", split="test")
    assert [record["domain"] for record in records] == ["Entertainment_Music"] * 3 + [
        "Family_Relationships"
    ] * 3
    for i, record in enumerate(records):
        assert record["source"] == f"{record['domain'][0]} test {style} {i % 3}"
        assert record["references"] == [f"{record['source']} made {other} {k}" for k in range(4)]
    train = read_records(
        f"gyafc:{folder / 'Family_Relationships'}:{style}_to_{other}",
        {"prompt": "source", "references": "references"},
    )
    assert train == [
        {"prompt": f"F train {style} {i}", "references": [f"F train {other} {i}"]} for i in range(2)
    ]


def test_a_stray_carriage_return_keeps_parallel_lines_together(tmp_path: Path) -> None:
    written(tmp_path, "train/informal", "one\rtwo\r\nthree\n")
    written(tmp_path, "train/formal", "ONE TWO\nTHREE\n")
    records = read_records(f"gyafc:{tmp_path}:informal_to_formal")
    assert [record["references"] for record in records] == [["ONE TWO"], ["THREE"]]


def test_gyafc_is_refused_where_it_is_not_as_it_comes(tmp_path: Path) -> None:
    folder = gyafc(tmp_path)
    assert "allowed: gyafc:FOLDER:informal_to_formal or" in refusal(f"gyafc:{folder}:up")
    assert "tune" in refusal(f"gyafc:{folder}:formal_to_informal", split="tune")
    written(folder, "Entertainment_Music/test/formal.ref2", "one\n")
    message = refusal(f"gyafc:{folder}:informal_to_formal", split="test")
    assert "informal 3, formal.ref0 3, formal.ref1 3, formal.ref2 1, formal.ref3 3" in message


def test_a_data_set_is_streamed_by_name(tmp_path: Path) -> None:
    """A folder of jsonl files in the place of one of the hub, shaped as RealToxicityPrompts and
    as BOLD are there.
    """
    nested = [{"prompt": {"text": f"text {i}", "toxicity": 0.5}, "id": i} for i in range(5)]
    written(tmp_path, "rtp/train.jsonl", "\n".join(map(json.dumps, nested)))
    lists = [
        {"name": "A", "prompts": ["A was", "A is"], "wikipedia": ["x", "y"]},
        {"name": "B", "prompts": ["B"], "wikipedia": ["z"]},
    ]
    written(tmp_path, "bold/train.jsonl", "\n".join(map(json.dumps, lists)))
    assert read_records(f"hub:{tmp_path / 'rtp'}", {"prompt": "prompt.text", "n": "id"},
     limit=2) == [
        {"prompt": "text 0", "n": 0}, {"prompt": "text 1", "n": 1},
    ]  # fmt: skip
    fields: dict[str, str | list[str]] = {
        "prompt": "prompts[]",
        "references": "wikipedia[]",
        "name": "name",
    }
    assert read_records(f"hub:{tmp_path / 'bold'}", fields) == [
        {"prompt": "A was", "references": ["x"], "name": "A"},
        {"prompt": "A is", "references": ["y"], "name": "A"},
        {"prompt": "B", "references": ["z"], "name": "B"},
    ]
    assert "no column 'prompt.txt' in" in refusal(
        f"hub:{tmp_path / 'rtp'}", {"prompt": "prompt.txt"}
    )
    assert "'name[]' given, allowed: columns that hold lists of one length" in refusal(
        f"hub:{tmp_path / 'bold'}", {"prompt": "name[]"}
    )
    message = refusal(f"hub:{tmp_path / 'none'}")
    assert re.match(r"prompts: cannot stream '.*none' \(.+\)", message)


def test_a_configuration_and_a_split_reach_the_library_and_no_more_is_read_than_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    asked: list[Any] = []

    def load(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        yield from [{"article": "long text", "highlights": "short"}] * 2
        raise AssertionError("read on")

    monkeypatch.setattr(datasets, "load_dataset", load)
    fields: dict[str, str | list[str]] = {"source": "article", "references": "highlights"}
    records = read_records("hub:abisee/cnn_dailymail:3.0.0", fields, split="test", limit=2)
    assert records == [{"source": "long text", "references": ["short"]}] * 2
    assert asked == [(("abisee/cnn_dailymail", "3.0.0"), {"split": "test", "streaming": True})]
    assert "(read on)" in refusal("hub:abisee/cnn_dailymail:3.0.0", fields)
    assert asked[1] == (("abisee/cnn_dailymail", "3.0.0"), {"split": "train", "streaming": True})


def test_a_subset_is_the_beginning_or_seeded(tmp_path: Path) -> None:
    file = written(tmp_path, "a.txt", "\n".join(f"prompt {i:03d}" for i in range(200)))

    def numbers(**options: Any) -> list[int]:
        return [int(record["prompt"][-3:]) for record in read_records(file, **options)]

    assert numbers(limit=3) == [0, 1, 2]
    assert numbers(limit=999) == numbers(seed=1) == numbers(limit=200, seed=1) == list(range(200))
    few, more = numbers(limit=10, seed=1), numbers(limit=40, seed=1)
    assert few == numbers(limit=10, seed=1) == sorted(few)
    assert len(set(few)) == 10
    assert set(few) < set(more)
    assert few != numbers(limit=10, seed=2)
    # Each of 100 seeds draws 20 of 200; a half gets 1,000 ± 21 of 2,000 (hypergeometric), 5
    # standard errors: 6e-7.
    first = sum(number < 100 for seed in range(100) for number in numbers(limit=20, seed=seed))
    assert abs(first - 1000) < 106
    assert refusal(file, limit=0).startswith("limit: 0 given")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pdf", "x",
         "allowed: files ending in .txt, .jsonl, .csv, .tsv, .json or .parquet,"
         " quoted:FILE.tsv, hub:NAME and "
         "gyafc:FOLDER:DIRECTION"),
        ("a.txt", "\n \n", "holds no prompt"),
        ("a.jsonl", "", "holds no prompt"),
        ("a.csv", "prompt\n\n", "holds no prompt"),
        ("a.txt", b"ok\n\ncaf\xe9\n", "a.txt, line 3 as UTF-8"),
        ("a.txt", "the\n".encode("utf-16-le"), "line 1 holds a null byte"),
        ("a.txt", "good\nbad\0\n", "line 2 holds a null byte"),
        ("a.csv", "prompt\n\nbad\0\n", "line 3 holds a null byte"),
        ("a.jsonl", '{"prompt": "a"}\n\n[1]\n', "line 3 is no JSON object but '[1]'"),
        ("a.jsonl", '\n{"prompt": "a"}\n{"prompt": \n', "line 3 is no JSON object"),
        ("a.jsonl", "[" * 100_000, "line 1 is no JSON object"),
        ("a.jsonl", '{"prompt": "a"}\n\n{"text": "b"}\n',
         "line 3 has no text in the field 'prompt', fields there: text"),
        ("a.jsonl", '\n{"prompt": 3}\n', "line 2: the prompt is no string but 3"),
        ("a.jsonl", '{"prompt": ["a", 3]}\n', "line 1: the prompt is no string but 3"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": null}\n', "line 2: the field 'prompt' is empty"),
        ("a.jsonl", '{"prompt": "\\ud800"}\n', "line 1: the prompt is no text that UTF-8 can hold"),
        ("a.csv", "x,prompt\n\n1,ok\n2\n", "line 4: the field 'prompt' is empty"),
        ("a.csv", 'x,prompt\n"1\n2",ok\n3,\n', "line 4: the field 'prompt' is empty"),
        ("a.csv", "prompt,x\nok,1\nno,1,2\n", "line 3 has 3 cells, the header names 2 columns"),
        ("a.csv", "prompt,x,prompt\n1,2,3\n", "line 1: the header names the column 'prompt' twice"),
        ("a.csv", 'prompt\nok\n"never closed\n', "line 3 (unexpected end of data)"),
        ("a.json", '{"prompt": "a"}', "no JSON object of categories that hold names"),
        ("a.json", '{"a": {"b": "c"}}', "a/b is no list of prompts"),
        ("a.json", '{"a": {"b": [1]}}', "a/b: the prompt is no string but 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_with_its_line(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    found = refusal(written(tmp_path, name, content), needs=["prompt"])
    assert found.startswith("prompts: ")
    assert message in found


def test_missing_files_and_columns_are_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.txt", argument="--x").startswith("--x: no such file")
    (tmp_path / "folder.txt").mkdir()
    assert "Is a directory" in refusal(tmp_path / "folder.txt")
    file = written(tmp_path, "a.tsv", "toxic\tneutral1\nbad\tgood\nworse\t\n")
    message = refusal(file, {"source": "toxc"})
    assert message == f"fields: no column 'toxc' in {file}, line 2, columns there: toxic, neutral1"
    assert "line 3: the field 'references' is empty" in refusal(
        file, {"source": "toxic", "references": ["neutral1"]}
    )


def test_a_line_of_ten_megabytes_is_read_in_every_kind_of_file(tmp_path: Path) -> None:
    long = "word " * 2_000_000 + "end"
    for name, content in (
        ("a.txt", long),
        ("a.jsonl", json.dumps({"prompt": long})),
        ("a.csv", f"prompt\n{long}\n"),
    ):
        assert read_records(written(tmp_path, name, content)) == [{"prompt": long}], name
    assert "no JSON object but '\"word" in refusal(written(tmp_path, "a.jsonl", json.dumps(long)))


def test_a_template_is_filled_with_plain_fields_alone() -> None:
    record = {"source": "It {rained}.", "mr": "name[X]", "n": 3}
    assert fill_template("{source} TL;DR:", record) == "It {rained}. TL;DR:"
    assert fill_template("{{{mr}}} {mr}{source}", record) == "{name[X]} name[X]It {rained}."
    assert fill_template("{source:1} TL;DR:", record) == "It TL;DR:"
    assert fill_template("no field", record) == "no field"
    assert template_fields("{mr} {source} {mr} {{x}}") == ["mr", "source"]
    for template, message in (
        ("{text}:", "'text' is not there, fields: source, mr, n"),
        ("{n}", "'n' is no text"),
        ("{source.__class__}", "no plain name"),
        ("{source[0]}", "no plain name"),
        ("{}", "no plain name"),
        ("{0}", "no plain name"),
        ("{source!r}", "no plain name"),
        ("{source:>9}", "no plain name"),
        ("{source", "expected '}'"),
        ("source}", "Single '}'"),
    ):
        with pytest.raises(UserError) as caught:
            fill_template(template, record)
        assert str(caught.value).startswith(f"template: {template!r} given, "), template
        assert message in str(caught.value), template


def of_kit(name: str) -> list[dict[str, Any]]:
    return [dict(record) for record in read_records(DATA / name)]


@pytest.fixture(scope="module")
def kit_lm() -> BaseLM:
    return BaseLM.load(str(ROOT / "checkpoints/tiny/lm"))


def short_enough(lm: BaseLM, texts: list[str]) -> bool:
    return max(map(len, lm.tokenizer(texts, add_special_tokens=False)["input_ids"])) < 40


def test_comment_prompts_are_as_described(kit_lm: BaseLM) -> None:
    records = of_kit("comment_prompts.jsonl")
    prompts = [record["prompt"] for record in records]
    assert all(set(record) == {"prompt", "kind"} for record in records)
    assert {kind: sum(r["kind"] == kind for r in records) for kind in ("neutral", "heated")} == {
        "neutral": 64,
        "heated": 64,
    }
    assert len(set(prompts)) == len(prompts) == 128
    assert all(
        re.fullmatch(r"[a-z' ]+", prompt) and 2 <= len(prompt.split()) <= 6 for prompt in prompts
    )
    assert short_enough(kit_lm, prompts)


def test_formality_pairs_are_as_described(kit_lm: BaseLM) -> None:
    files = [of_kit(f"{name}.jsonl") for name in ("informal_to_formal", "formal_to_informal")]
    assert [len(records) for records in files] == [115, 115]
    records = files[0] + files[1]
    assert all(
        set(record) == {"source", "references"} and 1 <= len(record["references"]) <= 3
        for record in records
    )
    sentences = [text for record in records for text in (record["source"], *record["references"])]
    assert len(set(sentences)) == len(sentences)
    assert all(
        re.fullmatch(r"[a-z0-9',.:;?! -]+", text) and 5 <= len(text.split()) <= 14
        for text in sentences
    )
    assert short_enough(kit_lm, sentences)


def test_restaurants_are_as_described(kit_lm: BaseLM) -> None:
    """Each fact stands in the article and in every summary, in words that a slot-error count
    looks for.
    """
    values = {
        "eatType": r"pub|coffee shop|restaurant", "area": r"riverside|city centre",
        "familyFriendly": r"yes|no",
        "priceRange": r"cheap|moderate|high|less than £20|£20-25|more than £30",
        "customer rating": r"low|average|high|1 out of 5|3 out of 5|5 out of 5",
        "food": r"English|French|Italian|Chinese|Japanese|Indian|Fast food", "name": r".+",
        "near": r".+",
    }  # fmt: skip
    records = of_kit("restaurants.jsonl")
    assert (
        len(records)
        == len({record["mr"] for record in records})
        == len({record["source"] for record in records})
        == 64
    )
    for record in records:
        assert set(record) == {"name", "source", "mr", "references"}
        assert record["mr"].startswith(f"name[{record['name']}]")
        slots = re.findall(r"([A-Za-z ]+)\[([^]]+)\]", record["mr"])
        assert record["mr"] == ", ".join(f"{slot.strip()}[{value}]" for slot, value in slots)
        assert 3 <= len(slots) <= 6
        assert 3 <= len(re.findall(r"[.!?](?=\s|$)", record["source"])) <= 5
        assert 1 <= len(record["references"]) <= 2
        for text in (record["source"], *record["references"]):
            for slot, value in slots:
                assert re.fullmatch(values[slot.strip()], value), record
                if slot.strip() == "familyFriendly":
                    assert "family friendly" in text
                    assert ("not family friendly" in text) == (value == "no"), text
                else:
                    assert value.lower() in text.lower(), (slot, text)
    summaries = [text for record in records for text in record["references"]]
    assert len(set(summaries)) == len(summaries)
    assert all(len(text.split()) <= 30 and text.count(".") == 1 for text in summaries)
    assert short_enough(kit_lm, summaries)
