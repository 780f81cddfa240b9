"""What a user names is read as weights and plain values: pickles and code in it are not run,
damage is said in one line.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from dia_lightning.callbacks.export import training_costs
from dia_lightning.data import ModelSamples, TextFiles
from dia_lightning.diffusion.checkpoint import read_network
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.errors import UserError
from dia_lightning.lab.study.grid import Cell, read_study
from dia_lightning.lab.study.worker import run_cell
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.rewards import Length
from dia_lightning.samplers.networks import load_critic, load_denoiser
from dia_lightning.settings import parser
from dia_lightning.training import CriticModule, DenoiserModule
from tests.oracles.in_parts import in_parts

SIZE = {"width": 16, "layers": 1, "heads": 2, "max_length": 12, "init_from_lm": False}


class Bomb:
    """Makes the folder `ran` where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.ran = folder / "ran"

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.ran),)


def zipped(path: Path) -> None:
    torch.save({"state_dict": {}, "dia": Bomb(path.parent)}, path)


def bare(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb(path.parent)))


each_bomb = pytest.mark.parametrize("write", [zipped, bare], ids=["zip", "pickle"])


def flip(path: Path) -> None:
    """One bit in the middle of the file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def options(*arguments: str) -> None:
    parser.run(
        ["predict", "--config", "configs/zero_shot_tiny.yaml", *arguments], options_only=True
    )


@each_bomb
def test_the_bombs_go_off(write: Callable[[Path], None], tmp_path: Path) -> None:
    """Where they are read as they should not be."""
    write(tmp_path / "x.ckpt")
    (
        torch.load(tmp_path / "x.ckpt", weights_only=False)
        if write is zipped
        else pickle.loads((tmp_path / "x.ckpt").read_bytes())
    )
    assert (tmp_path / "ran").is_dir()


@each_bomb
def test_no_checkpoint_runs_code(
    write: Callable[[Path], None],
    lm_folder: Path,
    lm: BaseLM,
    embedding: TokenEmbedding,
    tmp_path: Path,
) -> None:
    file = tmp_path / "x.ckpt"
    write(file)
    reason = r"mkdir\), which could run code" if write is zipped else "not a zip file"
    base: dict[str, Any] = {"base_lm": str(lm_folder), **SIZE}
    loads: dict[str, Callable[[], Any]] = {
        "denoiser": lambda: load_denoiser(str(file), embedding, lm),
        "critic": lambda: load_critic(str(file), embedding, None, lm),
        "init_from": lambda: DenoiserModule(
            **in_parts(DenoiserModule, **base, init_from=str(file))
        ),
        "--ckpt_path": lambda: options(f"--ckpt_path={file}"),
    }
    for option, use in loads.items():
        with pytest.raises(UserError, match=rf"^{option}: {file} .*{reason}\)*$"):
            use()
    with pytest.raises(UserError, match=rf"^denoiser: {file} .*{reason}"):
        CriticModule(Length(3), denoiser=str(file), **in_parts(CriticModule, **base))
    assert not (tmp_path / "ran").exists()


def test_no_option_reads_pickles(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--weights_only: false given, allowed: true"):
        options("--weights_only=false")
    with pytest.raises(
        UserError, match=rf"^--ckpt_path: {tmp_path} is a folder, a .ckpt file is needed$"
    ):
        options(f"--ckpt_path={tmp_path}")


@pytest.mark.parametrize("where", ["config", "tokenizer", "weights"])
def test_no_base_model_runs_code(where: str, lm_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lm"
    shutil.copytree(lm_folder, folder)
    (folder / "mine.py").write_text(
        f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n", encoding="utf-8"
    )
    names = {
        "AutoConfig": "mine.C",
        "AutoModelForCausalLM": "mine.M",
        "AutoTokenizer": ["mine.T", "mine.F"],
    }

    def change(name: str, kind: str) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(
            json.dumps({**content, kind: "mine", "auto_map": names}), encoding="utf-8"
        )

    if where == "weights":
        (folder / "model.safetensors").unlink()
        zipped(tmp_path / "x.bin")
        (tmp_path / "x.bin").replace(folder / "pytorch_model.bin")
    if where == "config":
        change("config.json", "model_type")
    if where == "tokenizer":
        change("tokenizer_config.json", "tokenizer_class")
        BaseLM.load(str(folder))  # by the class that goes with its config.json
        (folder / "config.json").unlink()
        (tmp_path / "texts.txt").write_text("the food is good\n" * 9, encoding="utf-8")
        with pytest.raises(UserError, match=rf"^tokenizer: cannot load {folder} \(.*custom code"):
            TextFiles(str(tmp_path / "texts.txt"), tokenizer=str(folder)).setup("fit")
    else:
        with pytest.raises(UserError, match=rf"^base_lm: cannot load {folder} \(.+\)$"):
            BaseLM.load(str(folder))
    assert not (tmp_path / "ran").exists()


def test_a_damaged_cache_of_samples_is_named(lm_folder: Path, tmp_path: Path) -> None:
    def made() -> ModelSamples:
        return ModelSamples(str(lm_folder), 8, 2, 8, 4, cache=str(tmp_path / "cache"), shard_size=8)

    data = made()
    data.setup("fit")
    shard, other = data.shard_path(data.folder, 0), data.shard_path(data.folder, 1)
    whole, kept = shard.read_bytes(), other.stat().st_mtime_ns

    def foreign(path: Path) -> None:
        save_file(
            {
                "tokens": torch.full((8, 8), 9999, dtype=torch.int32),
                "prompt_length": torch.zeros(8).int(),
            },
            path,
        )

    def bomb(path: Path) -> None:
        path.write_bytes(pickle.dumps(Bomb(tmp_path)))

    for damage in (cut, foreign, bomb):
        damage(shard)
        with pytest.raises(
            UserError,
            match=rf"^cache: {shard} is damaged \(.*\); delete it, and the same",
        ):
            made().setup("fit")
        shard.write_bytes(whole)
    shard.unlink()
    made().setup("fit")
    assert torch.equal(load_file(shard)["tokens"], load(whole)["tokens"])
    assert other.stat().st_mtime_ns == kept
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", [cut, flip])
def test_a_damaged_network_is_named(
    damage: Callable[[Path], None], lm_folder: Path, tmp_path: Path
) -> None:
    """As exported, and as a checkpoint; one bit in the weights is enough."""
    module = DenoiserModule(str(lm_folder), **in_parts(DenoiserModule, **SIZE))  # type: ignore[arg-type]
    module.export(tmp_path / "denoiser")
    assert (
        read_network(str(tmp_path / "denoiser"), "denoiser", "--d", module.embedding)[0]["kind"]
        == "denoiser"
    )
    weights = {f"network.{name}": value for name, value in module.network.state_dict().items()}
    settings = json.loads((tmp_path / "denoiser/config.json").read_text(encoding="utf-8"))
    torch.save({"state_dict": weights, "dia": settings}, tmp_path / "x.ckpt")
    read_network(str(tmp_path / "x.ckpt"), "denoiser", "--d", module.embedding)
    damage(tmp_path / "denoiser/model.safetensors")
    damage(tmp_path / "x.ckpt")
    for name in ("denoiser", "x.ckpt"):
        with pytest.raises(
            UserError,
            match=rf"^--d: {tmp_path / name} is no checkpoint of a denoiser, or it is damaged \(.+",
        ):
            read_network(str(tmp_path / name), "denoiser", "--d", module.embedding)
    with pytest.raises(
        UserError,
        match=rf"^--ckpt_path: {tmp_path}/x.ckpt is no checkpoint, or it is damaged \(.+\)$",
    ):
        options(f"--ckpt_path={tmp_path}/x.ckpt")


def test_what_is_of_another_program_or_version_is_named(
    embedding: TokenEmbedding, tmp_path: Path
) -> None:
    torch.save({"weights": torch.ones(2)}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"^--ckpt_path: .* \(it has no state_dict\)$"):
        options(f"--ckpt_path={tmp_path}/x.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"x.ckpt was not written by this package$"):
        read_network(str(tmp_path / "x.ckpt"), "denoiser", "--d", embedding)
    torch.save({"state_dict": {}, "dia": {"kind": "denoiser", "schema": 9}}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"^--d: .*x.ckpt has schema 9, this version reads 1$"):
        read_network(str(tmp_path / "x.ckpt"), "denoiser", "--d", embedding)
    (tmp_path / "costs.json").write_bytes(pickle.dumps(Bomb(tmp_path)))
    with pytest.raises(UserError, match=r"^critic: cannot read .*costs.json"):
        training_costs({"critic": str(tmp_path)})
    assert not (tmp_path / "ran").exists()


def test_a_resumed_study_and_a_resumed_run_run_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(
        "title: t\nquestion: q\nconfig: configs/zero_shot_tiny.yaml\nset: {data.n_texts: 1,"
        " data.max_length: 6}\nseeds: [0]\ngrid: {m: {a: {fit: {config:"
        " configs/ddpm_tiny.yaml}}}}\n",
        encoding="utf-8",
    )
    [cell] = read_study(tmp_path / "small.yaml", tmp_path / "out").cells
    assert cell.fit is not None
    folder = cell.folder / "fit"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "fit.json").write_text(
        json.dumps({"key": cell.fit.key(0), "finished": False}), encoding="utf-8"
    )
    zipped(folder / "checkpoints/last.ckpt")
    error = run_cell(cell).error
    assert error.startswith(f"--ckpt_path: {folder}/checkpoints/last.ckpt")
    assert "could run code" in error
    sampling = Cell(cell.study, cell.setting, 0, cell.name, tmp_path / "sampled", cell.run)
    assert run_cell(sampling).error == ""
    [part] = (tmp_path / "sampled").glob("parts/*/*.json")
    part.write_bytes(pickle.dumps(Bomb(tmp_path)))
    error = run_cell(sampling).error
    assert error.startswith(f"--trainer.callbacks.folder: {part.resolve()} is damaged")
    assert error.endswith("delete it, and the same command draws it again")
    assert not list(tmp_path.rglob("ran"))
    part.unlink()
    assert run_cell(sampling).error == ""
