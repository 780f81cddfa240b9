"""NaN and infinity: met where they arise, with the quantity, the step and the rows in one line
and the batch in a file.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dia_lightning.diffusion.loss import LOSSES
from dia_lightning.guidance import Prediction, Watched
from dia_lightning.numerics import FirstTime, NotFinite, named_rows
from dia_lightning.rewards import Regex, VaderSentiment
from dia_lightning.sampling.annealing import cycle
from dia_lightning.sampling.ensemble import Drafts, EnsembleKernel
from dia_lightning.sampling.resampling import effective_size, next_temperature
from dia_lightning.sampling.state import State
from dia_lightning.target import Terms
from dia_lightning.training import CriticModule, DenoiserModule
from tests.conftest import CORPUS
from tests.diffusion.test_module import TINY, at, rows
from tests.oracles.in_parts import in_parts
from tests.reliability.test_edges import DIFFUSED, FIT, PLAIN
from tests.test_cli import assert_one_line

Run = Callable[..., tuple[int, str, str]]


# Training


@pytest.mark.parametrize("kind", ["denoiser", "critic"])
def test_a_loss_that_is_lost_ends_the_training(lightning: Run, kind: str) -> None:
    """Before any checkpoint or export of the weights that are lost with it."""
    fit = [
        *FIT,
        "--data.n_texts=16",
        "--data.batch_size=4",
        "--trainer.max_steps=6",
        "--trainer.val_check_interval=6",
    ]
    if kind == "critic":
        fit[2] = "configs/critic_tiny.yaml"
        fit += ["--model.denoiser=null", "--data.n_val=16"]
    result = lightning(*fit, "--model.optimizer.lr=1e30", "--model.optimizer.warmup_steps=0")
    parts = [
        "train/loss is NaN or infinite in ",
        "batch 1",
        "lower --model.optimizer.lr, ",
        "--trainer.gradient_clip_val",
    ]
    assert_one_line(result, *parts)
    folder = Path("runs") / ("ddpm_tiny" if kind == "denoiser" else "critic_tiny")
    saved = folder / "not_finite_batch_1.safetensors"
    assert str(saved) in result[2]
    assert load_file(saved)["tokens"].shape[0] == 4
    assert load_file(saved)["wrong"].any()
    assert not list(folder.rglob("*.tmp*"))
    assert not list(folder.rglob("*.ckpt"))
    assert not (folder / kind).exists()


def test_a_base_model_from_nothing(lightning: Run) -> None:
    Path("texts.txt").write_text("".join(f"{line}\n" for line in CORPUS), encoding="utf-8")
    data = [
        "--data.path=texts.txt",
        "--data.val_path=texts.txt",
        "--data.train_vocab_size=280",
        "--data.max_length=16",
    ]
    size = [
        "--model.vocab_size=280",
        "--model.width=16",
        "--model.layers=1",
        "--model.heads=2",
        "--data.batch_size=4",
    ]
    lost = [
        "--model.optimizer.lr=1e30",
        "--model.optimizer.warmup_steps=0",
        "--trainer.max_steps=6",
        "--trainer.val_check_interval=null",
    ]
    result = lightning("fit", "--config", "configs/lm_tiny.yaml", *data, *size, *lost)
    assert_one_line(
        result,
        "train/loss is NaN or infinite in all 4 rows",
        "batch 1",
        "gradient_clip_val",
    )
    assert not list(Path().rglob("*.ckpt"))
    assert not Path("runs/lm_tiny/lm").exists()


def test_a_policy_in_training(lightning: Run, lm_folder: Path) -> None:
    size = [
        f"--model.base_lm={lm_folder}",
        f"--data.base_lm={lm_folder}",
        "--data.batch_size=4",
        "--data.max_length=8",
    ]
    lost = [
        "--model.optimizer.lr=1e30",
        "--model.optimizer.warmup_steps=0",
        "--trainer.max_steps=200",
        "--model.updates.minibatches=1",
    ]
    result = lightning(
        "fit", "--config", "configs/baselines/ppo_tiny.yaml", *size, *lost, "--data.n_texts=4"
    )
    assert_one_line(result, "train/loss is NaN or infinite in ", "batch ", "updates.gradient_clip")
    assert not Path("runs/ppo_tiny/lm").exists()
    [saved] = Path().rglob("not_finite_batch_*.safetensors")
    assert load_file(saved)["tokens"].shape[0] == 4


def test_the_rows_that_lost_it_are_named(
    lm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a loss that is infinite wherever token 7 is to be told; several steps are looked at
    together.
    """
    monkeypatch.setitem(
        LOSSES,
        "ce",
        lambda network, hidden, query, targets, t: torch.where(targets == 7, torch.inf, t),
    )
    module = DenoiserModule(str(lm_folder), **in_parts(DenoiserModule, **TINY))
    plain = {"tokens": torch.full((4, 8), 5), "prompt_mask": torch.zeros(4, 8, dtype=torch.bool)}
    broken = plain | {"tokens": plain["tokens"].clone()}
    broken["tokens"][1] = broken["tokens"][3] = 7
    for number, batch in ((3, plain), (4, broken), (5, plain)):
        at(module, number).training_step(batch, 0)
    module.trainer.default_root_dir = str(tmp_path)  # type: ignore[misc]
    file = tmp_path / "not_finite_batch_4.safetensors"
    with pytest.raises(
        NotFinite,
        match=r"train/loss is NaN or infinite in rows 1, 3 of 4 \(batch 4; the batch is in ",
    ) as raised:
        module.check_noted()
    assert str(file) in str(raised.value)
    assert torch.equal(load_file(file)["tokens"], broken["tokens"])
    assert load_file(file)["wrong"].tolist() == [False, True, False, True]
    module.check_noted()  # said once


def test_a_file_that_cannot_be_written_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    error = NotFinite("the loss is NaN")
    error.complete("batch 3", tmp_path / "file", {"tokens": torch.ones(2)}, "; try again")
    assert str(error).startswith("the loss is NaN (batch 3; the batch could not be saved: ")
    assert str(error).endswith("; try again")


def test_a_batch_without_noise_teaches_nothing(lm_folder: Path) -> None:
    """As short texts have it, one row a batch: 0 of 0 positions would be NaN, and the weights
    with it.
    """
    module, batch = DenoiserModule(str(lm_folder), **in_parts(DenoiserModule, **TINY)), rows(1)
    batch["prompt_mask"][:] = True
    loss = at(module, 1).training_step(batch, 0)
    assert loss.item() == 0
    loss.backward()
    assert all(not w.grad.any() for w in module.network.parameters() if w.grad is not None)
    module.check_noted()


def test_no_step_waits_for_the_device(lm_folder: Path) -> None:
    """Noting does not: on the device `meta`, which has nothing to hand out, that would be an
    error. A look does.
    """
    critic = at(CriticModule(Regex("a"), str(lm_folder), **in_parts(CriticModule, **TINY)), 0)
    watched, first = Watched(lambda z, t, z0_prev: Prediction(z, z, z)), FirstTime()
    values = torch.ones(4, 3, 2, device="meta")
    for step in range(1, 9):
        critic.note_rows({}, ~values[:, 0, 0].isfinite())
        watched(values, values[..., 0], None)
        first.note("x", values[:, 0, 0] > 0, step)
    for look in (critic.check_noted, watched.check, lambda: first.check("step")):
        with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
            look()


# Sampling


def test_guidance_beyond_what_numbers_hold(lightning: Run) -> None:
    result = lightning(*DIFFUSED, "--model.lam=1e60")
    file = "runs/dia_tiny/not_finite_dia_batch_0.safetensors"
    assert_one_line(
        result,
        "the guided estimate of the text is NaN",
        "call 1",
        "all 2 rows",
        "dia batch 0",
        file,
    )
    assert load_file(file)["tokens"].shape == (2, 12)
    assert load_file(file)["ids"].tolist() == [0, 1]


def test_a_reward_that_fails_late_loses_nothing(
    lightning: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def sometimes(self: VaderSentiment, texts: list[str]) -> torch.Tensor:
        asked.extend(texts)
        return torch.full((len(texts),), torch.nan if len(asked) > 2 else 0.0)

    monkeypatch.setattr(VaderSentiment, "__call__", sometimes)
    batches = [
        "--data.batch_size=1",
        "--data.n_texts=3",
        "--model.sampler=Chains",
        "--model.sampler.moves=[]",
        "--model.seed=5",
    ]
    result = lightning(*PLAIN, *batches)
    assert_one_line(
        result,
        "'sentiment'",
        "'finite'",
        "returned nan",
        "base_lm batch 2",
        "not_finite_base_lm_batch_2",
    )
    kept = Path("out/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(kept) == 2
    assert '"complete": false' in Path("out/metrics.json").read_text(encoding="utf-8")
    assert not [path for path in Path().rglob("*.tmp*") if path.is_file()]


def test_a_base_model_that_is_no_number(
    lightning: Run, lm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused where it is loaded; and where it is found later only, the batch is named."""
    shutil.copytree(lm_folder, "lm")
    weights = load_file("lm/model.safetensors")
    weights["transformer.h.1.ln_1.weight"][:] = torch.nan
    save_file(weights, "lm/model.safetensors", {"format": "pt"})
    options = [
        "--model.base_lm=lm",
        "--data.base_lm=lm",
        "--data.n_texts=3",
        "--data.max_length=8",
        "--trainer.callbacks.folder=out",
    ]
    run = ["predict", "--config", "configs/zero_shot_tiny.yaml", *options]
    assert_one_line(lightning(*run), "base_lm", "logits that are NaN or infinite")
    monkeypatch.setattr("dia_lightning.lm.contract.check_reading", lambda lm: None)
    result = lightning(*run)
    assert_one_line(
        result, "log p_θ of the text is NaN or infinite in all 3 rows", "batch 0", "not_finite_"
    )


class Kernel(EnsembleKernel):
    """Log ratios as given, one (B,) a step."""

    def __init__(self, ratios: list[list[float]], log_base: float = 0.0) -> None:
        super().__init__(self, self.drafts)  # type: ignore[arg-type]
        self.ratios, self.log_base = iter(ratios), log_base

    def terms(self, tokens: Tensor) -> Terms:
        zeros = torch.zeros(len(tokens), dtype=torch.float64)
        return Terms(zeros + self.log_base, zeros)

    def drafts(self, state: State, n: int, generator: torch.Generator) -> Drafts:
        ratio = torch.tensor([next(self.ratios)], dtype=torch.float64).T
        return Drafts(state.tokens[:, None], torch.cat([ratio, torch.zeros_like(ratio)], 1))


def test_an_acceptance_ratio_that_is_no_number() -> None:
    zeros = torch.zeros(3, dtype=torch.float64)
    state = State(
        torch.zeros(3, 2, dtype=torch.int64),
        torch.zeros(3, 2, dtype=torch.bool),
        zeros,
        zeros,
        zeros,
    )
    nan, inf = float("nan"), float("inf")
    generator = torch.Generator().manual_seed(0)
    fine = [[0.0, -inf, inf]] * 2
    assert cycle([Kernel(fine)], state, 2, generator)[1].accepted[0].tolist() == [1, 0, 1]
    with pytest.raises(
        NotFinite,
        match=r"^the acceptance ratio of Kernel is NaN or infinite in round 2, rows 0, 2 of 3$",
    ):
        cycle(
            [Kernel(fine), Kernel([[0, 0, 0], [nan, 0, nan], [0, nan, 0]])], state, 3 - 1, generator
        )
    # A text of probability 0, proposed where there is another one, is no fault.
    cycle([Kernel([[nan, nan, nan]], log_base=-inf)], state, 1, generator)


def test_rows_in_words() -> None:
    assert named_rows([0], 1) == "row 0 of 1"
    assert named_rows([2, 5], 6) == "rows 2, 5 of 6"
    assert named_rows([0, 1], 2) == "all 2 rows"
    assert named_rows(list(range(12)), 64) == "rows 0, 1, 2, 3, 4, 5, 6, 7 and 4 more of 64"


# The annealed population


def test_lambda_rises_whatever_the_scale_of_the_rewards() -> None:
    """Where no step of bisection is small enough it took none, for ever: a reward of −1e30 for
    what is forbidden, say.
    """
    forbidden = torch.tensor([[0.0] * 3 + [-1e30] * 7], dtype=torch.float64)
    lam = torch.zeros(1, dtype=torch.float64)
    risen = next_temperature(forbidden, torch.zeros_like(forbidden), lam, 8.0, 0.5)
    assert 0 < float(risen) < 1e-15
    equal = torch.zeros_like(forbidden)
    assert float(next_temperature(equal, equal, lam, 8.0, 0.5)) == 8
    huge = torch.tensor([[1e308, 1e308, -1e308]], dtype=torch.float64)
    assert float(effective_size(huge)) == pytest.approx(2)
