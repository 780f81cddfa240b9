"""Kits of the hub, from a hub on this machine."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dia_lightning import cli
from dia_lightning import files as resources
from dia_lightning.callbacks.export import training_costs
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.errors import UserError
from dia_lightning.files import read_yaml
from dia_lightning.lab.kit.export import export
from dia_lightning.lab.kit.files import settings_file
from dia_lightning.lm import files as lm_files
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.samplers.networks import load_denoiser
from dia_lightning.settings import parser
from tests.lab.kit.fake_hub import COMMIT, fake_hub

PICKLES = ("lm/pytorch_model.bin", "denoiser/denoiser.ckpt", "reward.py")
COSTS = {"flops": 1e12, "seconds": 60.0, "peak_memory_mib": 512.0, "networks": {}}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit as somebody might upload it, with files that nobody should fetch."""
    folder = tmp_path_factory.mktemp("hub") / "kit"
    export("configs/dia_tiny.yaml", folder, with_base_lm=True)
    (folder / "denoiser/costs.json").write_text(json.dumps(COSTS), encoding="utf-8")
    for name in PICKLES:
        (folder / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    return folder


@pytest.fixture
def fetched(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[str]]:
    """The names of files that were fetched from the hub, which has one repository, `ann/kit`."""
    lm_files._fetched.cache_clear()
    with fake_hub("ann/kit", repository) as (address, names):
        at_hub(address, tmp_path, monkeypatch)
        yield names
    lm_files._fetched.cache_clear()


def at_hub(address: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in (
        ("ENDPOINT", address),
        ("HUGGINGFACE_CO_URL_TEMPLATE", template),
        ("HF_HUB_CACHE", str(folder / "hf")),
    ):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)


def test_a_kit_of_the_hub_is_fetched_without_pickles_and_code(
    fetched: list[str], repository: Path
) -> None:
    file = settings_file("hub:ann/kit", "--config")
    assert file.parent.name == COMMIT
    whole = {
        path.relative_to(repository).as_posix() for path in repository.rglob("*") if path.is_file()
    }
    assert sorted(fetched) == sorted(whole - {*PICKLES, "README.md"})
    options = read_yaml(file, "--config")["model"]["init_args"]
    assert [options[name] for name in ("base_lm", "denoiser", "critic")] == [
        f"{file.parent}/{name}" for name in ("lm", "denoiser", "critic")
    ]
    lm = BaseLM.load(options["base_lm"])
    load_denoiser(options["denoiser"], TokenEmbedding(lm.embedding_table(), len(lm.tokenizer)))
    assert cli.prepare_arguments(["predict", "--config", "hub:ann/kit"]) == [
        "predict",
        "--config",
        str(file),
    ]


def test_one_network_of_a_kit_is_fetched_alone(fetched: list[str], repository: Path) -> None:
    lm = BaseLM.load("checkpoints/tiny/lm")
    embedding = TokenEmbedding(lm.embedding_table(), len(lm.tokenizer))
    network = load_denoiser("hub:ann/kit/denoiser", embedding)
    assert sorted(fetched) == [
        "denoiser/config.json",
        "denoiser/costs.json",
        "denoiser/model.safetensors",
    ]
    own = load_denoiser("checkpoints/tiny/denoiser", embedding).state_dict()
    assert all(torch.equal(weight, own[name]) for name, weight in network.state_dict().items())
    assert training_costs({"denoiser": "hub:ann/kit/denoiser"}) == {"denoiser": COSTS}
    assert len(fetched) == 3
    assert BaseLM.load("hub:ann/kit/lm").vocab_size == lm.vocab_size


def test_a_kit_of_one_version(fetched: list[str]) -> None:
    file = settings_file("hub:ann/kit@v1", "--config")
    assert read_yaml(file, "--config") == read_yaml(
        settings_file("hub:ann/kit", "--config"), "--config"
    )
    assert fetched.count("dia.yaml") == 1
    with pytest.raises(UserError, match="--config: cannot fetch 'ann/kit@v2' from the hub"):
        settings_file("hub:ann/kit@v2", "--config")
    assert BaseLM.load("hub:ann/kit@v1/lm").vocab_size == 2000


def test_what_was_fetched_is_used_when_the_hub_is_gone(
    fetched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = settings_file("hub:ann/kit", "--config")
    lm_files._fetched.cache_clear()
    at_hub("http://127.0.0.1:9", tmp_path, monkeypatch)
    assert settings_file("hub:ann/kit", "--config") == file
    with pytest.raises(
        UserError,
        match=r"--config: cannot fetch 'ann/other' from the hub \(.*\); give a local folder",
    ):
        settings_file("hub:ann/other", "--config")


def test_what_the_hub_does_not_have(fetched: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^denoiser: cannot fetch none of 'ann/kit' from the hub"):
        load_denoiser("hub:ann/kit/none", TokenEmbedding(torch.eye(4)))
    with pytest.raises(
        UserError, match=r"--config: hub:kit given, allowed: hub:USER/REPO or hub:USER/REPO/FOLDER"
    ):
        settings_file("hub:kit", "--config")
    with pytest.raises(UserError, match=r"hub:ann/kit/\.\./x given, allowed"):
        load_denoiser("hub:ann/kit/../x", TokenEmbedding(torch.eye(4)))
    with pytest.raises(
        UserError, match=r"no such file or folder: ann/kit; a kit of the hub is named hub:ann/kit"
    ):
        settings_file("ann/kit", "--config")
    assert fetched == []


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("ckpt_path: weights.ckpt", "sets ckpt_path"),
        (
            "model: {init_args: {reward: {class_path: mine.Reward}}}",
            r"names the class mine.Reward \(--model.init_args.reward",
        ),
        (
            "model: {init_args: {reward: torch.hub.load}}",
            r"names the class torch.hub.load \(--model.init_args.reward",
        ),
        ("trainer: {callbacks: [torch.hub.load]}", "names the class torch.hub.load"),
        (
            "trainer: {callbacks: [{class_path: dia_lightningx.Callback}]}",
            "names the class dia_lightningx.Callback",
        ),
        (
            "data: {init_args: {prompts: '${oc.env:SECRET}'}}",
            r"reads \$\{oc.env:SECRET\} \(--data.init_args.prompts\)",
        ),
    ],
)
def test_a_strangers_settings_run_only_what_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, fault: str
) -> None:
    """The same settings are taken from a folder, which was downloaded on purpose."""
    lm_files._fetched.cache_clear()
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "dia.yaml").write_text(f"seed_everything: 0\n{line}\n", encoding="utf-8")
    with fake_hub("bob/kit", folder) as (address, _):
        at_hub(address, tmp_path, monkeypatch)
        with pytest.raises(
            UserError,
            match=f"--config: dia.yaml of hub:bob/kit {fault}.*download its folder, read it",
        ):
            settings_file("hub:bob/kit", "--config")
    assert settings_file(str(folder), "--config") == folder / "dia.yaml"
    lm_files._fetched.cache_clear()


def test_a_kit_of_the_hub_samples(
    fetched: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From an empty folder, and with nothing of what ships."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resources, "shipped_roots", list)
    small = [
        "--data.n_texts=2",
        "--data.batch_size=2",
        "--model.sampler.moves=[Suffix]",
        "--model.compare_base=false",
    ]
    parser.run(cli.prepare_arguments(["predict", "--config", "hub:ann/kit", *small]))
    assert (
        len((tmp_path / "runs/kit/predictions.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    )
