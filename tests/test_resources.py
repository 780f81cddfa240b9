"""Where a path leads: the current folder first, then what ships."""

from pathlib import Path

import pytest

from dia_lightning import files
from dia_lightning.errors import UserError
from dia_lightning.files import find_path, require_path, shipped_roots


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
