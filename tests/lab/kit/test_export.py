"""A kit samples what its settings did, wherever it lies; its card tells what it is; mistakes leave
nothing behind.
"""

import datetime
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dia_lightning import cli
from dia_lightning import files as resources
from dia_lightning.diffusion.checkpoint import read_network
from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.errors import UserError
from dia_lightning.lab.kit import export as exporting
from dia_lightning.lab.kit.export import export
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.samplers.networks import load_critic, load_denoiser
from dia_lightning.settings import parser

ROOT = Path(cli.__file__).parents[1]
TINY = ROOT / "checkpoints/tiny"
SMALL = ["--data.n_texts=3", "--data.batch_size=2", "--trainer.precision=32-true"]
COSTS = {"flops": 2.5e13, "seconds": 754.0, "peak_memory_mib": 812.0, "networks": {}}
DENOISE = {"class_path": "Annealed", "init_args": {"moves": ["Suffix", "DenoiseAccept"]}}
SUFFIX = {"class_path": "Annealed", "init_args": {"moves": ["Suffix"]}}
Change = Callable[..., str]


def predict(config: str, folder: str, *options: str) -> list[Any]:
    """Tokens and rewards of the texts that are drawn."""
    arguments = [
        "predict",
        "--config",
        config,
        *SMALL,
        f"--trainer.callbacks.folder={folder}",
        *options,
    ]
    parser.run(cli.prepare_arguments(arguments))
    lines = [
        json.loads(line)
        for line in Path(folder, "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [(line["tokens"], line["text"], line["reward"], line["log_p"]) for line in lines]


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped kit with its base model, in bf16 (`rounded`) and as stored (`whole`)."""
    folder = tmp_path_factory.mktemp("kits")
    export("configs/dia_tiny.yaml", folder / "whole", with_base_lm=True)
    export("configs/dia_tiny.yaml", folder / "rounded", bf16=True, with_base_lm=True)
    return folder


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Change:
    """Writes dia_tiny.yaml with other options of model, data or the file's top into an empty
    folder; `mine.yaml`.
    """
    monkeypatch.chdir(tmp_path)

    def write(
        model: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **top: Any
    ) -> str:
        content = yaml.safe_load((ROOT / "configs/dia_tiny.yaml").read_text(encoding="utf-8")) | top
        content["model"]["init_args"] |= model or {}
        content["data"]["init_args"] |= data or {}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        return "mine.yaml"

    return write


def test_a_moved_kit_samples_the_same_texts(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its folder and by its file, relative and absolute, from a folder with a quote in its name,
    and by its parts alone.
    """
    monkeypatch.chdir(tmp_path)
    want = predict("configs/dia_tiny.yaml", "original")
    home = tmp_path / "anna's kits, 2"
    home.mkdir()
    shutil.copytree(kit / "whole", home / "renamed")
    monkeypatch.setattr(resources, "shipped_roots", list)
    assert predict("anna's kits, 2/renamed", "moved") == want
    assert predict(str(home / "renamed/dia.yaml"), "absolute") == want
    saved = yaml.safe_load((tmp_path / "runs/whole/config.yaml").read_text(encoding="utf-8"))
    assert saved["model"]["init_args"]["denoiser"] == f"{home}/renamed/denoiser"
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"dia_tiny", "whole"}


def test_a_kit_of_a_kit_is_the_same_kit(kit: Path, tmp_path: Path) -> None:
    export(str(kit / "whole"), tmp_path / "whole", with_base_lm=True)
    for file in kit.glob("whole/**/*"):
        if file.is_file():
            assert (tmp_path / file.relative_to(kit)).read_bytes() == file.read_bytes(), file
    with pytest.raises(
        UserError, match=r"--with-base-lm: needed, as base_lm is a folder of this machine"
    ):
        export(str(kit / "whole"), tmp_path / "other")


def test_it_holds_no_pickle_and_nothing_of_this_machine(kit: Path) -> None:
    files = [path for path in (kit / "whole").rglob("*") if path.is_file()]
    assert {path.relative_to(kit / "whole").parts[0] for path in files} == {
        "README.md",
        "dia.yaml",
        "denoiser",
        "critic",
        "lm",
    }
    for path in files:
        assert path.suffix in (".safetensors", ".json", ".yaml", ".md")
        assert path.stat().st_mode & 0o777 == 0o644
        if path.suffix != ".safetensors":
            text = path.read_text(encoding="utf-8")
            assert not [
                root for root in (str(ROOT), str(kit), str(Path.home())) if f"{root}/" in text
            ], path
    assert (kit / "whole").stat().st_mode & 0o777 == 0o755
    assert {path.name for path in kit.iterdir()} == {"whole", "rounded"}
    for part in ("denoiser", "critic"):
        assert (
            json.loads((kit / "whole" / part / "config.json").read_text(encoding="utf-8"))[
                "base_lm"
            ]
            == "whole/lm"
        )
        assert {
            k: w.dtype for k, w in load_file(kit / "whole" / part / "model.safetensors").items()
        } == {k: w.dtype for k, w in load_file(TINY / part / "model.safetensors").items()}


def test_bf16_halves_the_networks_and_leaves_their_answers_and_p_theta(kit: Path) -> None:
    for part in ("denoiser", "critic"):
        sizes = [
            (kit / name / part / "model.safetensors").stat().st_size
            for name in ("rounded", "whole")
        ]
        assert 0.5 <= sizes[0] / sizes[1] < 0.52
    assert (kit / "rounded/lm/model.safetensors").read_bytes() == (
        TINY / "lm/model.safetensors"
    ).read_bytes()
    lm = BaseLM.load(str(kit / "rounded/lm"))
    embedding = TokenEmbedding(lm.embedding_table(), len(lm.tokenizer))
    tokens = lm.generate(
        torch.full((32, 24), lm.end_id),
        torch.zeros(32, 24, dtype=torch.bool),
        torch.Generator().manual_seed(0),
    )
    generator = torch.Generator().manual_seed(1)
    t = torch.rand(32, 24, generator=generator)
    denoisers = [
        load_denoiser(str(kit / name / "denoiser"), embedding) for name in ("whole", "rounded")
    ]
    knots = [network.schedule.state_dict()["knots"] for network in denoisers]
    assert torch.equal(*knots)
    schedule = denoisers[0].schedule
    z = schedule.alpha(t)[..., None] * embedding(tokens) + schedule.sigma(t)[
        ..., None
    ] * torch.randn(32, 24, embedding.dim, generator=generator)
    log_p = [network(z, t, None).log_softmax(-1) for network in denoisers]
    off = (log_p[1] - log_p[0]).gather(-1, tokens[..., None]).abs()
    print(
        f"|Δ log p| of the text's tokens: mean {float(off.mean()):.4f}, "
        f"largest {float(off.max()):.4f} nats"
    )
    assert 0 < float(off.mean()) < 0.002
    assert float(off.max()) < 0.1
    values = [
        load_critic(str(kit / name / "critic"), embedding)[0] for name in ("whole", "rounded")
    ]
    off = (values[1](z, t) - values[0](z, t)).abs()
    assert 0 < float(off.mean()) < 0.02 * float(values[0].scale)


# The card


def front_matter(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def test_the_card_says_what_is_known(settings: Change, tmp_path: Path) -> None:
    """Of a run by these settings, with costs beside a denoiser; `.ckpt` of a critic has none."""
    shutil.copytree(TINY / "denoiser", tmp_path / "own/denoiser")
    (tmp_path / "own/denoiser/costs.json").write_text(json.dumps(COSTS), encoding="utf-8")
    embedding = TokenEmbedding(BaseLM.load(str(TINY / "lm")).embedding_table(), 2000)
    kept, weights = read_network(str(TINY / "critic"), "critic", "", embedding)
    torch.save(
        {"dia": kept, "state_dict": {f"network.{k}": w for k, w in weights.items()}},
        tmp_path / "critic.ckpt",
    )
    options = {"denoiser": "own/denoiser", "critic": "critic.ckpt", "lam": 5.5}
    predict(settings(options), "runs/dia_tiny", "--data.n_texts=4", "--model.seed=3")
    config = settings(options | {"shard_base_lm": True})
    export(config, tmp_path / "cafés", run=Path("runs/dia_tiny"), license="cc-by-sa-4.0")
    assert "shard_base_lm" not in (tmp_path / "cafés/dia.yaml").read_text(encoding="utf-8")
    text = (tmp_path / "cafés/README.md").read_text(encoding="utf-8")
    head = front_matter(text)
    assert head["license"] == "cc-by-sa-4.0"
    assert (head["library_name"], head["pipeline_tag"]) == ("dia-lightning", "text-generation")
    assert "base_model" not in head
    assert "dia-lightning" in head["tags"]
    assert "# cafés\n" in text
    assert (
        "with λ = 5.5, where p_θ is the language model `checkpoints/tiny/lm`, which is not in "
        "this folder" in text
    )
    assert "| 1.61 M | float32 | 6.1 |" in text
    assert "`c3d6348b1e1189e8` (2000 tokens, 128 wide)" in text
    assert "class_path: dia_lightning.rewards.VaderSentiment" in text
    assert "| `denoiser` | 25 T | 754 | 812 |" in text
    assert "| `critic` | 25" not in text
    metrics = json.loads(Path("runs/dia_tiny/metrics.json").read_text(encoding="utf-8"))
    assert (
        f"| reward | {metrics['base']['reward']:.3f} | {metrics['reward']:.3f} |".replace("-", "−")
        in text
    )
    assert f"| log p_θ per token (nats) | −{-metrics['base']['log_p_per_token']:.3f} |" in text
    assert f"key `{metrics['config_hash']}`" in text
    assert "were not compared" not in text
    Path(f"runs/dia_tiny/parts/{metrics['config_hash']}/config.yaml").unlink()
    export(config, tmp_path / "unknown", run=Path("runs/dia_tiny"))
    assert "were not compared" in (tmp_path / "unknown/README.md").read_text(encoding="utf-8")
    assert datetime.date.today().isoformat() in text
    assert f"torch {torch.__version__}" in text
    assert json.loads((tmp_path / "cafés/denoiser/costs.json").read_text(encoding="utf-8")) == COSTS
    exported = load_file(tmp_path / "cafés/critic/model.safetensors")
    assert all(torch.equal(exported[name], weight) for name, weight in weights.items())


def test_the_card_says_what_is_not_known(kit: Path, settings: Change, tmp_path: Path) -> None:
    text = (kit / "whole/README.md").read_text(encoding="utf-8")
    assert "license" not in front_matter(text)
    for said in (
        "No licence is stated",
        "No run was named",
        "the language model in `lm`",
        "| `denoiser` | 432 T | – | – |",
    ):
        assert said in text
    shutil.copytree(
        TINY / "denoiser", tmp_path / "own", ignore=shutil.ignore_patterns("costs.json")
    )
    export(settings({"denoiser": "own", "critic": None}), tmp_path / "kit")
    assert "What it cost is not known" in (tmp_path / "kit/README.md").read_text(encoding="utf-8")


def test_what_a_kit_does_not_hold_is_said(
    settings: Change,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(TINY / "lm", tmp_path / "my_lm")
    (tmp_path / "kit_test_reward.py").write_text(
        "import torch\nfrom dia_lightning.types import Reward\n\n\n"
        "class Sentiment(Reward):\n    name = 'sentiment'\n\n"
        "    def __call__(self, texts):\n        return torch.zeros(len(texts))\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "prompts.txt").write_text("The\n", encoding="utf-8")
    reward = {"class_path": "kit_test_reward.Sentiment"}
    config = settings(
        {"base_lm": "my_lm", "reward": reward}, {"base_lm": "my_lm", "prompts": "prompts.txt"}
    )
    command = ["lightning", "kit", "export", "--config", config, "--out", "new/kit"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "--allow kit_test_reward" in capsys.readouterr().err
    assert not Path("new").exists()
    monkeypatch.setattr(sys, "argv", [*command, "--allow", "kit_test_reward"])
    cli.main()
    out, text = capsys.readouterr().out, Path("new/kit/README.md").read_text(encoding="utf-8")
    assert "Wrote new/kit: denoiser, critic (9.8 MiB)" in out
    assert re.findall("Not in the kit: (.*)", out) == [
        "--data.prompts, which was prompts.txt.",
        "kit_test_reward.Sentiment, whose code has to be where the kit is used.",
        "the base model my_lm (--with-base-lm puts it there).",
    ]
    assert "Use it:   lightning predict --config new/kit --allow kit_test_reward\n" in out
    assert "the command has to allow it (`--allow kit_test_reward`)" in text
    for said in (
        "`--data.prompts` was `prompts.txt`",
        "`kit_test_reward.Sentiment`, code that is not",
        "`my_lm` is where the",
    ):
        assert said in text
    content = yaml.safe_load(Path("new/kit/dia.yaml").read_text(encoding="utf-8"))
    assert content["data"]["init_args"]["prompts"] is None
    assert content["model"]["init_args"]["base_lm"] == "my_lm"


def test_a_base_model_of_the_hub_stays_one(
    settings: Change, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dia_lightning.lm.files._fetched", lambda *_: TINY / "lm")
    config = settings(
        {"base_lm": "ann/restaurants", "critic": None}, {"base_lm": "ann/restaurants"}
    )
    for name, with_base_lm in (("named", False), ("copied", True)):
        export(config, tmp_path / name, with_base_lm=with_base_lm)
        assert (
            front_matter((tmp_path / name / "README.md").read_text(encoding="utf-8"))["base_model"]
            == "ann/restaurants"
        )
        network = json.loads((tmp_path / name / "denoiser/config.json").read_text(encoding="utf-8"))
        assert network["base_lm"] == "ann/restaurants"
        assert not (tmp_path / name / "critic").exists()
    assert "`ann/restaurants`, a copy of which is in `lm`" in (
        tmp_path / "copied/README.md"
    ).read_text(encoding="utf-8")


# Mistakes


def test_a_run_of_other_settings_gives_no_figures(settings: Change, tmp_path: Path) -> None:
    config = settings({"critic": None})
    with pytest.raises(UserError, match=r"--run: cannot read .*metrics.json"):
        export(config, tmp_path / "kit", run=Path("runs"))
    predict(config, "runs/dia_tiny", "--model.lam=2", "--data.n_texts=1")
    parser.run(
        cli.prepare_arguments(
            ["predict", "--config", config, *SMALL, "--trainer.callbacks.folder=runs/later"]
        )
    )
    with pytest.raises(
        UserError,
        match=r"--run: runs/dia_tiny was made with --model.init_args.lam 2.0, --config has 8.0",
    ):
        export(config, tmp_path / "kit", run=Path("runs/dia_tiny"))
    stopped = json.loads(Path("runs/dia_tiny/metrics.json").read_text(encoding="utf-8")) | {
        "complete": False
    }
    Path("runs/dia_tiny/metrics.json").write_text(json.dumps(stopped), encoding="utf-8")
    with pytest.raises(UserError, match=r"--run: .* is of a run that was stopped"):
        export(config, tmp_path / "kit", run=Path("runs/dia_tiny"))
    assert not (tmp_path / "kit").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model": {"denoiser": "none", "sampler": DENOISE}},
            r"--model.init_args.denoiser \(in mine.yaml\): no such file or folder: none",
        ),
        (
            {"model": {"critic": "checkpoints/tiny/denoiser"}},
            "^critic: .* holds a denoiser",
        ),
        (
            {
                "model": {
                    "reward": {
                        "class_path": "dia_lightning.rewards.Length",
                        "init_args": {"target": 9},
                    }
                }
            },
            "^critic: .* for the reward 'length'; it was trained on the reward 'sentiment'",
        ),
        (
            {"model": {"denoiser": None, "critic": None, "sampler": SUFFIX}},
            "--config: mine.yaml names no denoiser and no critic",
        ),
        ({"ckpt_path": "best"}, "--config: ckpt_path is set"),
        ({"model": {"lam": "much"}}, "--model.init_args.lam .*mine.yaml.*much"),
    ],
)
def test_settings_that_make_no_kit(
    settings: Change, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        export(settings(**options), tmp_path / "kit")
    assert {path.name for path in tmp_path.iterdir()} == {"mine.yaml"}


def test_files_that_no_kit_holds_are_named(settings: Change, tmp_path: Path) -> None:
    shutil.copytree(TINY / "lm", tmp_path / "models/judge")
    reward = {
        "class_path": "dia_lightning.rewards.Perplexity",
        "init_args": {"model": "models/judge"},
    }
    with pytest.raises(
        UserError,
        match=r"--config: --model.init_args.reward.init_args.model names models/judge, which no",
    ):
        export(settings({"critic": None, "reward": reward}), tmp_path / "kit")
    assert not (tmp_path / "kit").exists()


def test_nothing_is_replaced_unasked_and_nothing_is_left_of_a_failure(
    settings: Change, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = settings({"critic": None}), tmp_path / "kit"
    export(config, out)
    with pytest.raises(
        UserError, match=r"--out: .*kit is there already; give another folder, or --overwrite"
    ):
        export(config, out)
    (out / "denoiser/old").touch()

    def full(*_: object) -> str:
        raise OSError("disk full")

    with monkeypatch.context() as broken:
        broken.setattr(exporting, "card", full)
        with pytest.raises(OSError, match="disk full"):
            export(config, out, overwrite=True)
    assert (out / "denoiser/old").exists()
    export(config, out, overwrite=True)
    assert not (out / "denoiser/old").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"mine.yaml", "kit"}
    (tmp_path / "letters").mkdir()
    with pytest.raises(
        UserError, match=r"letters is no kit \(it holds no dia.yaml\), so it is not replaced"
    ):
        export(config, tmp_path / "letters", overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out: cannot write to .*file/kit"):
        export(config, tmp_path / "file/kit")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["kit"], ["kit: the following arguments are required: COMMAND", "dia kit --help"]),
        (["kit", "import"], ["kit: argument COMMAND: invalid choice: 'import'"]),
        (
            ["kit", "export", "--out", "x"],
            ["kit export: the following arguments are required: --config"],
        ),
        (
            ["kit", "export", "--config", "nope.yaml", "--out", "x"],
            ["--config: no such file or folder: nope.yaml"],
        ),
        (["kit", "export", "--config", "configs", "--out", "x"], ["--config", "is a folder"]),
        (
            [
                "kit",
                "export",
                "--config",
                "configs/dia_tiny.yaml",
                "--out",
                "x",
                "--weights",
                "int4",
            ],
            ["--weights", "'int4'"],
        ),
        (
            ["kit", "export", "--config", "configs/dia_tiny.yaml", "--out", "x", "--run", "y"],
            ["--run: cannot read y/metrics"],
        ),
        (
            ["kit", "export", "--config", "configs/ddpm_tiny.yaml", "--out", "x"],
            ["--model: DenoiserModule", "predict_step"],
        ),
    ],
)
def test_wrong_calls_end_in_one_line(
    arguments: list[str],
    parts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert all(part in err for part in parts), err
    assert not list(tmp_path.iterdir())


def test_help_names_every_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning", "kit", "export", "--help"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    out = capsys.readouterr().out
    for option in (
        "--config",
        "--out",
        "--weights",
        "--with-base-lm",
        "--run",
        "--license",
        "--overwrite",
    ):
        assert re.search(rf"^  {option}\b", out, re.MULTILINE), option
