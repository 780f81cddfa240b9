"""Where a path leads: the current folder first, then what ships."""

from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from dia_lightning import files
from dia_lightning.data.records import read_records
from dia_lightning.errors import UserError
from dia_lightning.files import find_path, require_path, shipped_roots
from dia_lightning.lab.preference.annotations import read_votes
from tests.conftest import Run


def test_the_current_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = find_path("configs/dia_tiny.yaml")
    assert shipped is not None
    assert shipped.is_absolute()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/dia_tiny.yaml").touch()
    assert find_path("configs/dia_tiny.yaml") == Path("configs/dia_tiny.yaml")
    # A folder of the same name hides none of the other shipped files.
    assert find_path("configs/ddpm_tiny.yaml") == shipped.parent / "ddpm_tiny.yaml"


def test_home_and_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").touch()
    assert find_path("~/mine") == tmp_path / "mine"
    assert find_path(tmp_path / "mine") == tmp_path / "mine"
    assert find_path("/configs/dia_tiny.yaml") is None


@pytest.mark.parametrize("path", ["", "nowhere", "x" * 5000, "a\0b", "~nobody-of-this-name/x"])
def test_what_is_no_path(path: str) -> None:
    assert find_path(path) is None
    with pytest.raises(UserError, match=r"--model\.lam: no such file or folder"):
        require_path(path, "--model.lam")


def test_an_installed_package_ignores_the_configs_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site-packages/dia_lightning"
    for folder in (package / "share/configs", package.parent / "configs"):
        folder.mkdir(parents=True)
        (folder / "a.yaml").touch()
    monkeypatch.setattr(files, "_PACKAGE", package)
    monkeypatch.chdir(tmp_path)
    assert shipped_roots() == [package / "share"]
    assert find_path("configs/a.yaml") == package / "share/configs/a.yaml"


def test_what_runs_wrote_in_the_source_tree_is_not_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("tree/runs/lm_tiny", "tree/configs", "tree/checkpoints/tiny", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "tree/pyproject.toml").touch()
    monkeypatch.setattr(files, "_PACKAGE", tmp_path / "tree/dia_lightning")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert find_path("checkpoints/tiny") == tmp_path / "tree/checkpoints/tiny"
    assert find_path("runs/lm_tiny") is None
    assert find_path("pyproject.toml") is None
    assert find_path("../tree/runs/lm_tiny") == Path("../tree/runs/lm_tiny")


def test_a_user_error_is_a_value_error_that_nothing_rewords(lightning: Run, tmp_path: Path) -> None:
    """Of places that catch ValueError around what may raise one."""
    assert issubclass(UserError, ValueError)
    Path("latin.json").write_bytes('[{"x": "é"}]'.encode("latin-1"))
    with pytest.raises(
        UserError, match=r"^--annotations: cannot read latin\.json, line 1 as UTF-8 text$"
    ):
        read_votes([Path("latin.json")], [])
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["prompt", "prompt"])
    parquet.write_table(twice, "twice.parquet")
    with pytest.raises(UserError) as found:
        read_records("twice.parquet")
    assert "the column 'prompt' twice" in str(found.value)
    assert "cannot read" not in str(found.value)
    for module in ("a-b", "jsonargparse", ""):
        code, _, err = lightning(
            "kit", "export", "--config", "x.yaml", "--out", "y", "--allow", module
        )
        said = f"error: --allow: {module or 'nothing'} given, allowed: the name of your module"
        assert (code, err) == (2, f"{said}, as in --allow my_rewards\n")
    Path("escaped.yaml").write_text(
        "data: {init_args: {reading: {template: '\\${x}'}}}", encoding="utf-8"
    )
    code, _, err = lightning(
        "predict", "--config", "configs/dia_tiny.yaml", "--config", "escaped.yaml"
    )
    assert (code, err.count("given")) == (2, 1), err
    assert err.startswith("error: --data.init_args.reading.template (in "), err
