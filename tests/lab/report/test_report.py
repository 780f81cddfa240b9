"""The page: its structure, what a browser makes of it, what it escapes; and the same tables as CSV,
Markdown and hparams.
"""

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import lightning as L
import pytest

from dia_lightning.callbacks import PredictionWriter
from dia_lightning.data import PromptData
from dia_lightning.lab.report.export import write_csv
from dia_lightning.lab.report.labels import number, setting_name
from dia_lightning.lab.report.plots import Panel, Series, curves, scale_of
from dia_lightning.lab.report.results import CellResult, Study
from dia_lightning.lab.report.run import write_run_report
from dia_lightning.lab.report.study import write_report
from dia_lightning.rewards import Keyword
from dia_lightning.samplers import BaseModel, GuidedSamplerModule
from tests.lab.report.made_up import made_up, write_run

SCRIPT = "<script>alert('x')</script> & $x_1$ |"
VOID = {"meta", "link", "br", "use", "path", "rect", "img"}


class Page(HTMLParser):
    """What the tests ask of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tables: list[list[int]] = []
        self.figures: list[dict[str, int]] = []
        self._open: list[str] = []
        self.unbalanced: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.append(tag)
        if tag not in VOID:
            self._open.append(tag)
        self.ids += [named["id"] or ""] if "id" in named else []
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append(0)
        elif tag in ("th", "td"):
            self.tables[-1][-1] += 1
        elif tag == "figure":
            self.figures.append({})
        if self.figures and "figure" in self._open:
            self.figures[-1][tag] = self.figures[-1].get(tag, 0) + 1
            if tag == "svg":
                self.figures[-1]["label"] = len(named.get("aria-label") or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID and (not self._open or self._open.pop() != tag):
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data
        if "figcaption" in self._open and self.figures:
            self.figures[-1]["caption"] = self.figures[-1].get("caption", 0) + len(data)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    return write_report(folder / "out", "Made up", *made_up(folder / "runs", f" {SCRIPT}"))


@pytest.fixture(scope="module")
def run_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return a_run(folder)


def a_run(folder: Path) -> Path:
    _, results = made_up(folder / "runs")
    write_run(folder, next(r for r in results if r.study == "lam").metrics, extra=f" {SCRIPT}")
    (folder / "config.yaml").write_text("model: {lam: 4.0}  # <b>λ</b>\n")
    return write_run_report(folder, folder / "config.yaml")


def check_structure(page: Page) -> None:
    assert not page.unbalanced
    assert "script" not in page.tags
    assert len(page.ids) == len(set(page.ids))
    assert [link for link in page.links if not link.startswith(("#", "data:,"))] == []
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    for figure in page.figures:
        assert figure["svg"] == 1
        assert figure["path"] > 5
        assert figure["caption"] > 60
        assert figure["label"] > 5
    for table in page.tables:
        assert len(table) > 1
        assert len(set(table)) == 1


def test_the_page_is_whole_and_needs_nothing_from_outside(report: Path) -> None:
    page = Page(report.read_text(encoding="utf-8"))
    check_structure(page)
    assert len(page.figures) == 9
    # Every kind of figure, and the failed run with its reason.
    for said in (
        "FLOPs per text",
        "reward hacking",
        "ESS",
        "acceptance",
        "1 failed",
        "allowed: a number below 1000",
        "(default)",
    ):
        assert said in page.text
    # Nothing is loaded: neither by style nor by a file in the drawing.
    assert not re.search(r"url\((?!#)|@import|<image", report.read_text(encoding="utf-8"))


def test_what_texts_and_names_hold_is_escaped(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert "<script" not in text
    assert Page(text).text.count(SCRIPT) > 50
    for svg in (report.parent / "plots").glob("*.svg"):
        assert "<script" not in svg.read_text(encoding="utf-8")
    # A name with dollars is no formula.
    assert "$x_1$ |</text>" in (report.parent / "plots" / "methods-dots.svg").read_text(
        encoding="utf-8"
    )


def test_csv_has_a_row_a_run_and_markdown_every_table(report: Path) -> None:
    with (report.parent / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    studies = made_up(report.parent.parent / "runs", f" {SCRIPT}")[1]
    assert len(rows) == len(studies) == 82
    for row, result in zip(rows, studies, strict=True):
        assert (row["study"], row["seed"], row["error"]) == (
            result.study,
            str(result.seed),
            result.error,
        )
        assert row["reward"] == ("" if result.error else str(result.metrics["reward"]))
        for axis in ("λ", "steps", "method"):  # whole numbers stay whole beside missing ones
            assert row[f"setting/{axis}"] == str(result.setting.get(axis, ""))
    markdown = (report.parent / "results.md").read_text(encoding="utf-8")
    tables = [block.splitlines() for block in markdown.split("\n\n") if block.startswith("| ")]
    assert len(tables) == len(Page(report.read_text(encoding="utf-8")).tables)
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1


def test_no_cell_of_the_csv_runs_as_a_formula(tmp_path: Path) -> None:
    """Errors begin with the option; numbers below zero stay numbers."""
    errors = ["--model.lam: -1 given", "=1+1", "@x", "it broke"]
    results = [
        CellResult("+b", {"x": -2.0, "name": "=y"}, 0, tmp_path, {"reward": -0.5}, e)
        for e in errors
    ]
    write_csv(tmp_path / "results.csv", results)
    with (tmp_path / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["error"] for row in rows] == [f"'{e}" for e in errors[:3]] + errors[3:]
    for row in rows:
        found = [row[k] for k in ("study", "setting/x", "setting/name", "reward")]
        assert found == ["'+b", "-2.0", "'=y", "-0.5"]


def test_hparams_come_back_from_tensorboard(report: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    runs = sorted(path for path in (report.parent / "tensorboard").iterdir() if path.is_dir())
    assert len(runs) == 81
    events = EventAccumulator(
        str(next(path for path in runs if "λ=16.0" in path.name and "seed=2" in path.name))
    )
    events.Reload()
    rows = list(csv.DictReader((report.parent / "results.csv").open(encoding="utf-8", newline="")))
    row = next(row for row in rows if (row["setting/λ"], row["seed"]) == ("16.0", "2"))
    assert events.Scalars("reward")[0].value == pytest.approx(float(row["reward"]), rel=1e-6)
    assert events.Scalars("nfe/base_lm")[0].value == pytest.approx(
        float(row["nfe/base_lm"]), rel=1e-6
    )
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    options = HParamsPluginData.FromString(content).session_start_info.hparams
    assert (
        options["λ"].number_value,
        options["seed"].number_value,
        options["study"].string_value,
    ) == (16.0, 2.0, "lam")


def test_a_second_report_replaces_the_first_and_is_the_same(tmp_path: Path) -> None:
    studies, results = made_up(tmp_path / "runs")
    chosen = [r for r in results if r.study == "lam" and r.seed == 0]
    (tmp_path / "out" / "plots").mkdir(parents=True)
    (tmp_path / "out" / "plots" / "old.svg").write_text("<svg/>")
    first = write_report(tmp_path / "out", "t", studies[1:2], chosen).read_text(encoding="utf-8")
    second = write_report(tmp_path / "out", "t", studies[1:2], chosen).read_text(encoding="utf-8")
    assert first == second
    assert len(list((tmp_path / "out" / "tensorboard").iterdir())) == 6 + 1
    assert sorted(p.name for p in (tmp_path / "out" / "plots").iterdir()) == [
        f"lam-{n}.svg" for n in ("cost", "curves", "frontier")
    ]


def test_figures_of_the_run_alone_are_enough(tmp_path: Path) -> None:
    """Runs without base, costs or texts; and a study of which all runs failed."""
    studies = [Study("a", "A", "Why?", ["method"]), Study("b", "B", "How?", ["x"])]
    lone = CellResult(
        "a", {"method": "m"}, 0, tmp_path, {"method": "m", "n": 2, "reward": 0.5, "self_bleu": None}
    )
    other = CellResult(
        "a",
        {"method": "k"},
        0,
        tmp_path,
        {"method": "k", "n": 2, "reward": 0.6, "log_p_per_token": -1.0},
    )
    third = CellResult(
        "a",
        {"method": "l"},
        0,
        tmp_path,
        {"method": "l", "n": 2, "reward": 0.7, "log_p_per_token": -2.0},
    )
    failed = CellResult("b", {"x": 1}, 0, tmp_path, error="it broke")
    page = Page(
        write_report(tmp_path / "out", "t", studies, [lone, other, third, failed]).read_text(
            encoding="utf-8"
        )
    )
    check_structure(page)
    assert "No run of this study has finished." in page.text
    assert "it broke" in page.text
    # Without p_θ's own likelihood the frontier is over log p_θ as it is.
    assert "Upper right is better" in page.text


def test_the_report_of_a_run_has_both_methods_and_its_configuration(run_report: Path) -> None:
    page = Page(run_report.read_text(encoding="utf-8"))
    check_structure(page)
    assert len(page.figures) == 1
    for said in (
        "p_θ itself",
        "annealed",
        "model: {lam: 4.0}  # <b>λ</b>",
        "2.13.0",
        "good good good good",
        "log Z",
        "different texts of a prompt",
        "By prompt, in the order of the run",
    ):
        assert said in page.text
    written = (run_report.parent / "results.md").read_text(encoding="utf-8")
    for row in ("| – | 128 | 0.294 | 0.912 | 0.100 |", "| \\<b>x | 128 | 0.000 | 0.123 | – |"):
        assert row in written
    metrics = json.loads((run_report.parent / "metrics.json").read_text(encoding="utf-8"))
    assert f"{metrics['reward']:.3f} ± {1.96 * 0.2 / 16:.3f}" in page.text
    assert f"{metrics['base']['reward']:.3f} ± " in page.text


def test_lightning_test_ends_in_a_report_and_predict_in_none(
    tmp_path: Path, lm_folder: Path
) -> None:
    """And a report of earlier texts goes when others take their place."""
    for command in ("test", "predict"):
        data = PromptData(str(lm_folder), None, n_texts=4, batch_size=4, max_length=12)
        quiet: dict[str, Any] = {
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "accelerator": "cpu",
        }
        trainer = L.Trainer(
            default_root_dir=tmp_path,
            callbacks=[PredictionWriter(str(tmp_path))],
            enable_checkpointing=False,
            **quiet,
        )
        (tmp_path / "config.yaml").write_text("the: settings\n")
        module = GuidedSamplerModule(
            Keyword(["good"]), BaseModel(), str(lm_folder), compare_base=False
        )
        getattr(trainer, command)(module, datamodule=data)
        assert (tmp_path / "report.html").exists() == (command == "test")
        if command == "test":
            page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
            check_structure(page)
            assert "the: settings" in page.text
            assert "zero_shot" in page.text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
@pytest.mark.parametrize("name", ["report", "run_report"])
def test_a_browser_draws_every_figure_without_an_error(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The page with a probe of ours, which writes each figure's size, and how far anything juts
    out, into the document.
    """
    text = request.getfixturevalue(name).read_text(encoding="utf-8")
    probe = (
        "<script>const seen=[...document.querySelectorAll('figure svg')].map(s=>{"
        "const b=s.getBoundingClientRect(),"
        "p=[...s.querySelectorAll('path,use,text')].map(e=>e.getBoundingClientRect()).filter(r=>r.width+r.height>0).length;"
        "return [Math.round(b.width),Math.round(b.height),p]});"
        "const wide=document.documentElement.scrollWidth-document.documentElement.clientWidth;"
        "document.body.insertAdjacentHTML('beforeend','<output>'+JSON.stringify({seen,wide})+'</output>')</script></body>"
    )
    path = tmp_path / "probed.html"
    path.write_text(text.replace("</body>", probe), encoding="utf-8")
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command += ["--enable-logging=stderr", "--window-size=420,900", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, [
        line for line in done.stderr.splitlines() if "CONSOLE" in line
    ]
    found = json.loads(re.findall(r"<output>(.*?)</output>", done.stdout)[-1])
    assert len(found["seen"]) == text.count("<figure ") > 0
    for width, height, parts in found["seen"]:
        assert width > 300
        assert height > 100
        assert parts > 20
    # On a telephone the page itself does not scroll sideways.
    assert found["wide"] <= 0


def test_axes_are_logarithmic_beyond_a_decade() -> None:
    assert [scale_of(xs) for xs in ([1, 2, 10], [1, 20], [0, 1, 20], [-1, 20], [0, 0])] == [
        "linear",
        "log",
        "symlog",
        "linear",
        "linear",
    ]


def test_lines_differ_without_colour() -> None:
    """24 lines in one plot: no two share marker, dashes and filling."""
    from dia_lightning.lab.report.plots import style

    looks = {
        (style(i)["marker"], style(i)["linestyle"], style(i)["markerfacecolor"] == "white")
        for i in range(24)
    }
    assert len(looks) == 24


def test_intervals_are_drawn_where_there_are_some() -> None:
    def drawn(half: float) -> str:
        return curves([Panel("x", "y", [Series("", [1.0, 2.0], [0.1, 0.2], [half, half])])])

    nan, some, other = drawn(float("nan")), drawn(0.05), drawn(0.06)
    assert nan != some != other
    assert drawn(0.05) == some


def test_numbers_read_as_people_write_them() -> None:
    assert [number(x, 3) for x in (-1.5, 0.0, 0.0001, 12345.0, float("nan"))] == [
        "−1.500",
        "0.000",
        "1.0e−04",
        "12 345.000",
        "–",
    ]
    assert [number(x, -1) for x in (999.9, 1234.0, 2.1e9, 3e14, 0.5)] == [
        "1 k",
        "1.23 k",
        "2.1 G",
        "300 T",
        "0.5",
    ]
    assert setting_name({"method": "DIA", "λ": 4.0, "stop": True}) == "DIA, λ = 4, stop = yes"
