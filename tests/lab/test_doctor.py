"""`make doctor` tells who owns the script `lightning`."""

from pathlib import Path

import pytest

from dia_lightning.lab import doctor


def install(folder: Path, name: str, script: str) -> None:
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8"
    )
    (info / "entry_points.txt").write_text(
        f"[console_scripts]\n{script} = {name}:main\n", encoding="utf-8"
    )


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment with this package's script alone."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/lightning").write_text("from dia_lightning.cli import main", encoding="utf-8")
    install(tmp_path, "dia-lightning", "lightning")
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin/python"))
    return tmp_path


def test_alone(scripts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(scripts, "harmless", "other")
    assert doctor.diagnose() == 0
    out = capsys.readouterr().out
    assert "claimed by: dia-lightning\n" in out
    assert "mend:" not in out


def test_a_second_owner(scripts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(scripts, "lightning-sdk", "lightning")
    assert doctor.diagnose() == 1
    out = capsys.readouterr().out
    assert "claimed by: dia-lightning, lightning-sdk\n" in out
    root = Path(doctor.__file__).parents[2]
    assert (
        f"mend: {scripts}/bin/python -m pip install --force-reinstall --no-deps --editable {root} "
        in out
    )


@pytest.mark.parametrize(
    ("content", "state"), [(None, "missing"), ("from lightning_sdk import main", "another's")]
)
def test_a_script_that_was_replaced_or_deleted(
    scripts: Path, capsys: pytest.CaptureFixture[str], content: str | None, state: str
) -> None:
    (scripts / "bin/lightning").unlink()
    if content:
        (scripts / "bin/lightning").write_text(content, encoding="utf-8")
    assert doctor.diagnose() == 1
    assert f"script {scripts}/bin/lightning: {state}\n" in capsys.readouterr().out
