"""What changes how a step is computed and not what: blocks run again, compiled blocks,
accumulated gradients.
"""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from dia_lightning.data import ModelSamples
from dia_lightning.diffusion.trunk import Block
from dia_lightning.errors import UserError
from dia_lightning.rewards import Regex
from dia_lightning.training import CriticModule, DenoiserModule
from tests.diffusion.test_module import TINY, at, rows
from tests.oracles.in_parts import in_parts

SMALL = {**TINY, "layers": 3}
QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
    "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0,
}  # fmt: skip


def made(kind: str, lm_folder: Path, **options: Any) -> Any:
    """The same weights at every call."""
    torch.manual_seed(0)
    if kind == "denoiser":
        module: Any = DenoiserModule(
            str(lm_folder), **in_parts(DenoiserModule, **{**SMALL, **options})
        )
    else:
        module = CriticModule(
            Regex("a"), str(lm_folder), **in_parts(CriticModule, **{**SMALL, **options})
        )
        module._rewards = lambda batch: torch.arange(16.0)
    # Blocks that do nothing yet would hide what happens in them.
    torch.manual_seed(1)
    for weight in module.network.trunk.parameters():
        nn.init.normal_(weight, std=0.2)
    return module


def gradients(module: Any, batch: int) -> tuple[Tensor, dict[str, Tensor]]:
    module.zero_grad()
    loss = at(module, batch).training_step(rows(), 0)
    loss.backward()
    return loss.detach(), {
        name: w.grad.clone() for name, w in module.named_parameters() if w.grad is not None
    }


def assert_same_step(plain: Any, other: Any, **tolerance: float) -> None:
    """Loss and gradients, of a batch without and one with the denoiser's own estimate."""
    for batch in range(2):
        (loss, want), (other_loss, found) = gradients(plain, batch), gradients(other, batch)
        torch.testing.assert_close(other_loss, loss, **tolerance)
        torch.testing.assert_close(found, want, **tolerance)
        assert any(
            bool(gradient.abs().sum() > 0) for name, gradient in want.items() if "blocks.0" in name
        )


def saved_bytes(module: Any) -> int:
    """What one step keeps for its backward pass, weights left out."""
    kept: dict[int, int] = {}
    weights = {w.untyped_storage().data_ptr() for w in [*module.parameters(), *module.buffers()]}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = at(module, 0).training_step(rows(), 0)
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("kind", ["denoiser", "critic"])
def test_blocks_that_run_again_keep_less_and_give_the_same_gradients(
    kind: str, lm_folder: Path
) -> None:
    plain, again = made(kind, lm_folder), made(kind, lm_folder, activation_checkpointing=True)
    assert_same_step(plain, again, rtol=0, atol=0)
    assert saved_bytes(again) < 0.5 * saved_bytes(plain)


def compile_with(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    monkeypatch.setattr(Block, "compile", lambda self: nn.Module.compile(self, backend=backend))


@pytest.mark.parametrize("kind", ["denoiser", "critic"])
def test_compiled_blocks_give_the_same_loss_and_gradients(
    kind: str, lm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced, with autograd of the trace, but without a compiler."""
    compile_with(monkeypatch, "aot_eager")
    torch._dynamo.reset()
    plain, compiled = (
        made(kind, lm_folder),
        made(kind, lm_folder, compile=True, activation_checkpointing=True),
    )
    assert_same_step(plain, compiled, rtol=1e-4, atol=1e-5)
    assert all(block._compiled_call_impl is not None for block in compiled.network.trunk.blocks)
    assert set(compiled.state_dict()) == set(plain.state_dict())


def test_blocks_that_are_compiled_wrongly_are_refused(
    lm_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(graph: Any, inputs: Any) -> Any:
        return lambda *args: [x.cos() for x in graph.forward(*args)]

    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no working C++ compiler")

    for backend, message in (
        (
            wrong,
            "compile: true given, .*the first batch has a loss of .* compiled and .* as it is",
        ),
        (broken, "compile: true given, allowed: false; torch cannot compile here .*no working C"),
    ):
        compile_with(monkeypatch, backend)
        torch._dynamo.reset()
        with pytest.raises(UserError, match=message):
            at(made("denoiser", lm_folder, compile=True), 0).training_step(rows(), 0)


@pytest.mark.slow
def test_the_compiler_gives_the_same_loss_and_gradients(lm_folder: Path) -> None:
    torch._dynamo.reset()
    for precision in (torch.float32, torch.bfloat16):
        plain, compiled = made("denoiser", lm_folder), made("denoiser", lm_folder, compile=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
            tolerance = (
                {"rtol": 1e-4, "atol": 1e-5}
                if precision == torch.float32
                else {"rtol": 0.1, "atol": 0.05}
            )
            assert_same_step(plain, compiled, **tolerance)


@pytest.mark.parametrize("kind", ["denoiser", "critic"])
def test_accumulated_batches_make_the_step_of_their_mean(kind: str, lm_folder: Path) -> None:
    """Two batches a step, each with noise of its own, against AdamW on the mean of their losses."""
    cache, n = str(lm_folder.parent / "samples"), 2
    data = ModelSamples(str(lm_folder), 40, 8, 8, 8, cache=cache, shard_size=16)
    options = {"warmup_steps": 0, "lr": 1e-2, **({"time_warp": 0} if kind == "denoiser" else {})}
    trained = made(kind, lm_folder, **options)
    if kind == "critic":
        trained._rewards = lambda batch: batch["tokens"][:, 0].float()
    L.Trainer(max_steps=2, accumulate_grad_batches=n, **QUIET).fit(trained, datamodule=data)
    alone = made(kind, lm_folder, **options)
    if kind == "critic":
        alone._rewards = trained._rewards
        for name in ("mean", "scale"):
            getattr(alone.network, name).copy_(getattr(trained.network, name))
    optimizer = torch.optim.AdamW(alone.network.parameters(), 1e-2, (0.9, 0.98), weight_decay=0.0)
    decayed = [p for p in alone.network.parameters() if p.ndim >= 2 and p.requires_grad]
    batches = [data.train_rows[list(range(8 * k, 8 * (k + 1)))] for k in range(2 * n)]
    for step in range(2):
        # Cosine from 1 to 0.05 over two steps.
        optimizer.param_groups[0]["lr"] = lr = 1e-2 * (1.0, 0.525)[step]
        for k in range(n * step, n * (step + 1)):
            (at(alone, k, step).training_step(batches[k], 0) / n).backward()
        for weight in decayed:
            weight.data.mul_(1 - lr * 0.01)
        optimizer.step()
        optimizer.zero_grad()
    for (name, want), found in zip(
        alone.network.named_parameters(), trained.network.parameters(), strict=True
    ):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5, msg=name)
