"""Study files: what they say becomes these cells; mistakes are found before anything runs."""

import os
from pathlib import Path

import pytest

from dia_lightning.errors import UserError
from dia_lightning.lab.study import command
from dia_lightning.lab.study.grid import StudyGrid, read_study
from dia_lightning.settings import parser

ROOT = Path(parser.__file__).parents[2]
STUDIES = sorted(
    path
    for folder in ("ablations", "ablations/full", "comparison")
    for path in (ROOT / "configs" / folder).glob("*.yaml")
)
HEAD = "title: T\nquestion: Q?\nconfig: configs/dia_{kit}.yaml\n"


@pytest.fixture(autouse=True)
def _come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path.cwd())


def read(folder: Path, text: str, kit: str = "tiny", seeds: list[int] | None = None) -> StudyGrid:
    os.chdir(folder)  # else the shipped files are named as they are here
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    return read_study(folder / "mine.yaml", folder / "out", kit, seeds)


def test_axes_make_the_product_and_options_of_one_axis_go_together(tmp_path: Path) -> None:
    study = read(
        tmp_path,
        HEAD + "set: {data.n_texts: 8, model.lam: 3}\nseeds: [5]\nbaseline: {λ: 2}\n"
        "grid:\n  λ: {model.lam: [1, 2], model.sampler.steps: [1, 4]}\n"
        "  solver: {model.sampler.solver: [DDIM, DPMpp2M]}\n",
    )
    assert [cell.setting for cell in study.cells] == [
        {"λ": 1, "solver": "DDIM"},
        {"λ": 1, "solver": "DPMpp2M"},
        {"λ": 2, "solver": "DDIM"},
        {"λ": 2, "solver": "DPMpp2M"},
    ]
    last = study.cells[-1]
    assert last.folder == tmp_path / "out/mine/lam=2,solver=DPMpp2M/seed=5"
    assert last.run.arguments(last.folder, 5) == [
        "predict",
        "--config",
        str(ROOT / "configs/dia_tiny.yaml"),
        "--data.n_texts=8",
        "--model.lam=2",
        "--model.sampler.steps=4",
        "--model.sampler.solver=DPMpp2M",
        f"--trainer.default_root_dir={last.folder}",
        f"--trainer.callbacks.folder={last.folder}",
        "--seed_everything=5",
        "--model.seed=5",
    ]
    assert (study.axes, study.baseline) == ({"λ": [1, 2], "solver": ["DDIM", "DPMpp2M"]}, {"λ": 2})


def test_named_values_have_a_config_and_a_training_of_their_own(tmp_path: Path) -> None:
    study = read(
        tmp_path,
        HEAD + "command: test\nset: {model.lam: 3}\ngrid:\n  method:\n    ours: {}\n"
        "    P P/O:\n"
        "      fit: {config: configs/baselines/ppo_{kit}.yaml, set: {trainer.max_steps: 4}}\n"
        "      config: configs/zero_shot_{kit}.yaml\n"
        '      set: {model.base_lm: "{fit}", model.lam: null, x: "{cell}/{seed}"}\n',
    )
    assert [(cell.setting["method"], cell.seed) for cell in study.cells] == [
        (method, seed) for method in ("ours", "P P/O") for seed in (0, 1, 2)
    ]
    ours, ppo = study.cells[0], study.cells[-1]
    assert ours.fit is None
    assert ppo.fit is not None
    assert ppo.name == "mine/P_P_O/seed=2"
    run = ppo.run.arguments(ppo.folder, 2)
    assert run[:3] == ["test", "--config", str(ROOT / "configs/zero_shot_tiny.yaml")]
    assert {
        "--model.lam=null",
        f"--model.base_lm={ppo.folder}/fit/export",
        f"--x={ppo.folder}/2",
    } <= set(run)
    fit = ppo.fit.arguments(ppo.folder, 2)
    assert fit[:4] == [
        "fit",
        "--config",
        str(ROOT / "configs/baselines/ppo_tiny.yaml"),
        "--trainer.max_steps=4",
    ]
    assert {
        f"--trainer.callbacks.folder={ppo.folder}/fit/export",
        "--trainer.logger=false",
        "--model.seed=2",
    } <= set(fit)


def test_a_cell_is_known_by_what_it_does_not_by_where(tmp_path: Path) -> None:
    text = HEAD + "grid: {λ: {model.lam: [1, 2]}}\n"
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    keys = [cell.key for cell in read(tmp_path / "a", text).cells]
    assert len(set(keys)) == 6
    assert [
        cell.key for cell in read(tmp_path / "b", text.replace("title: T", "title: U")).cells
    ] == keys
    assert keys[0] not in [
        cell.key for cell in read(tmp_path / "b", text + "set: {data.n_texts: 8}\n").cells
    ]
    (tmp_path / "dia.yaml").write_text(
        (ROOT / "configs/dia_tiny.yaml").read_text(encoding="utf-8"), encoding="utf-8"
    )
    own = text.replace("configs/dia_{kit}.yaml", str(tmp_path / "dia.yaml"))
    before = read(tmp_path, own).cells[0].key
    with (tmp_path / "dia.yaml").open("a") as file:
        file.write("# another\n")
    assert read(tmp_path, own).cells[0].key != before


def test_seeds_and_kit_can_be_given(tmp_path: Path) -> None:
    study = read(tmp_path, HEAD + "grid: {λ: {model.lam: [1]}}\n", "gpt2", [7, 9])
    assert [cell.seed for cell in study.cells] == [7, 9]
    assert study.cells[0].run.config == ROOT / "configs/dia_gpt2.yaml"
    assert "configs/dia_gpt2.yaml" in study.config


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("title: T\n", ["question: missing"]),
        (HEAD, ["grid: missing"]),
        (HEAD + "gird: {}\n", ["gird: unknown", "grid"]),
        (HEAD + "grid: {}\n", ["grid: empty"]),
        (HEAD + "grid: [1]\n", ["grid: [1] given", "dict"]),
        (HEAD + "grid: {λ: {model.lam: 3}}\n", ["grid: λ", "lists of values"]),
        (HEAD + "grid: {λ: {model.lam: []}}\n", ["grid: λ", "values must be there"]),
        (HEAD + "grid: {λ: {model.lam: [1, 1]}}\n", ["grid: λ", "differ"]),
        (
            HEAD + "grid: {λ: {model.lam: [1, 2], model.sampler.steps: [1]}}\n",
            ["grid: λ", "as many values"],
        ),
        (
            HEAD + "grid: {m: {a: {sets: {}}}}\n",
            ["grid: m: a", "sets: unknown", "config, set, fit"],
        ),
        (HEAD + "grid: {m: {a: {fit: {set: {}}}}}\n", ["grid: m: a: fit: config: missing"]),
        (HEAD + "grid: {m: {a: {config: nope.yaml}}}\n", ["config: no such file", "nope.yaml"]),
        (
            HEAD.replace("dia_{kit}", "nope_{kit}") + "grid: {λ: {model.lam: [1]}}\n",
            ["configs/nope_tiny.yaml"],
        ),
        ("title: T\nquestion: Q\ngrid: {λ: {model.lam: [1]}}\n", ["config: none given for 1"]),
        (
            HEAD + "command: fit\ngrid: {λ: {model.lam: [1]}}\n",
            ["command: fit given", "predict, test"],
        ),
        (HEAD + "seeds: [0, 0]\ngrid: {λ: {model.lam: [1]}}\n", ["seeds: [0, 0] given"]),
        (HEAD + "seeds: [a]\ngrid: {λ: {model.lam: [1]}}\n", ["seeds", "integers"]),
        (HEAD + "seconds: true\ngrid: {λ: {model.lam: [1]}}\n", ["seconds: True given"]),
        (
            HEAD + "baseline: {λ: 2}\ngrid: {λ: {model.lam: [1]}}\n",
            ["baseline: λ = 2 is not in the grid"],
        ),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        read(tmp_path, text)
    for part in ("mine.yaml" if "no such file" not in parts[0] else "nope", *parts):
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            HEAD + "set: {model.lmabda: 3}\ngrid: {λ: {model.lam: [1]}}\n",
            ["study mine/lam=1", "--model.lmabda: unknown option"],
        ),
        (
            HEAD + "grid: {λ: {model.lam: [1]}, stps: {model.stps: [4]}}\n",
            ["mine/lam=1,stps=4", "--model.stps: unknown option"],
        ),
        (
            HEAD + "grid: {λ: {model.lam: [many]}}\n",
            ["mine/lam=many", "--model.lam: many given, allowed: float"],
        ),
        (
            HEAD + "grid: {m: {a: {fit: {config: configs/baselines/ppo_tiny.yaml, "
            "set: {model.bet: 1}}}}}\n",
            ["mine/a", "--model.bet: unknown option"],
        ),
    ],
)
def test_mistakes_in_the_options_are_found_before_a_run(
    tmp_path: Path, text: str, parts: list[str]
) -> None:
    study = read(tmp_path, text)
    with pytest.raises(UserError) as raised:
        command.check_options([study])
    for part in parts:
        assert part in str(raised.value)


def test_there_are_studies() -> None:
    assert STUDIES


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_shipped_studies_have_what_they_name(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    study = read_study(Path(path), tmp_path)
    named = path.relative_to(ROOT).as_posix()
    command_of = named if "ablations" in path.parts else "make results"
    assert command_of in path.read_text(encoding="utf-8").partition("title:")[0]
    least = 1 if study.name == "smollm2" else 3  # an hour a seed
    assert all(
        len({cell.seed for cell in study.cells if cell.setting == setting.setting}) >= least
        for setting in study.cells
    )
    assert study.seconds is not None
    assert study.baseline.keys() == study.axes.keys()
    command.check_options([study])


@pytest.mark.parametrize("name", ["equal_time", "methods", "smollm2"])
def test_a_cell_of_suffix_moves_has_no_others(name: str, tmp_path: Path) -> None:
    """A file's moves stay where another sampler is chosen."""
    study = read_study(ROOT / f"configs/comparison/{name}.yaml", tmp_path)
    cells = [
        cell
        for cell in study.cells
        if "suffix M" in str(cell.setting) or "suffix m" in str(cell.setting)
    ]
    assert len(cells) >= 2
    for cell in cells:
        sampler = parser.options_of(
            cell.run.arguments(cell.folder, cell.seed)
        ).model.init_args.sampler
        assert [move.class_path for move in sampler.init_args.moves] == ["dia_lightning.Suffix"], (
            cell.name
        )
