"""The wheel holds what `lightning predict` needs, and runs where no source tree is."""

import json
import os
import site
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from dia_lightning import __version__, files

ROOT = Path(files.__file__).parents[1]
pytestmark = pytest.mark.slow


def done(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that has to succeed, without this process's own paths."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }
    result = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    done(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--quiet",
        "--wheel-dir",
        folder,
        ROOT,
        cwd=folder,
    )
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel; its dependencies are those of this one, its source
    tree is not seen.
    """
    folder = tmp_path_factory.mktemp("fresh") / "env"
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    done(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
        wheel,
        cwd=folder,
    )
    own = Path(
        done(
            python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
        ).strip()
    )
    # Folders only: the .pth files in them, an editable install's among them, are not read.
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
    (own / "dependencies.pth").write_text(
        "".join(f"{path}\n" for path in sorted(paths)), encoding="utf-8"
    )
    return folder


def test_it_holds_code_configs_and_the_kit_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert not [
            info.filename
            for info in archive.infolist()
            if (info.external_attr >> 16) & 0o044 != 0o044
        ]
    share = "dia_lightning/share"
    kits = ("tiny", "tiny_labelled", "tiny_comments", "ablations")
    for folder in ("configs", *(f"checkpoints/{kit}" for kit in kits)):
        shipped = {
            path.relative_to(ROOT).as_posix()
            for path in (ROOT / folder).rglob("*")
            if path.is_file()
        }
        assert {
            name.removeprefix(f"{share}/")
            for name in names
            if name.startswith(f"{share}/{folder}/")
        } == shipped
    rest = {name for name in names if not name.startswith(f"{share}/")}
    assert {name.partition("/")[0] for name in rest} == {
        "dia_lightning",
        f"dia_lightning-{__version__}.dist-info",
    }
    assert {Path(name).suffix for name in rest if name.startswith("dia_lightning/")} <= {
        ".py",
        ".typed",
        ".json",
    }
    assert f"dia_lightning-{__version__}.dist-info/licenses/LICENSE" in names


def test_predict_runs_from_an_empty_folder(environment: Path, tmp_path: Path) -> None:
    where = done(
        environment / "bin/python",
        "-c",
        "import dia_lightning; print(dia_lightning.__file__)",
        cwd=tmp_path,
    )
    assert Path(where.strip()).is_relative_to(environment)
    lightning = environment / "bin/lightning"
    settings = done(lightning, "predict", "--print_config", cwd=tmp_path)
    assert "checkpoints/tiny/lm" in settings
    small = ["--data.n_texts=4", "--data.batch_size=4", "--model.sampler.rounds=1"]
    out = done(lightning, "predict", *small, cwd=tmp_path)
    assert "reward, mean" in out
    assert str(ROOT) not in out
    lines = (tmp_path / "runs/dia_tiny/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["id"] for line in lines] == [0, 1, 2, 3]
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}
