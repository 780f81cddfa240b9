"""The front door in Python: `dia.sample`, texts of π(x) ∝ p_θ(x) exp(λ r(x)) by one call."""

from __future__ import annotations

import logging
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from transformers.utils import logging as transformers_logging

from dia_lightning.callbacks.export import training_costs
from dia_lightning.callbacks.run_key import describe, run_key
from dia_lightning.callbacks.table import repeats
from dia_lightning.data.prompts import PromptData
from dia_lightning.errors import OTHERS, UserError
from dia_lightning.front.arguments import (
    chat_prompts,
    check_kinds,
    device_of,
    is_chat,
    numeric,
    path_of,
    prompt_list,
    whole,
)
from dia_lightning.front.result import Result, Run, result_of
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.numerics import float32_default
from dia_lightning.progress import SHOWN
from dia_lightning.samplers import Annealed, GuidedSamplerModule, Sampler
from dia_lightning.terminal import ignore_warnings
from dia_lightning.types import Reward

_LOG = logging.getLogger(__name__)
Messages = Sequence[Mapping[str, str]]
# As in every shipped config: denoiser and critic propose in bfloat16, p_θ keeps its own.
_PRECISION: Literal["bf16-mixed"] = "bf16-mixed"


def sample(
    base_lm: str | Path | BaseLM | tuple[Any, Any] = "checkpoints/tiny/lm",
    *,
    reward: Reward | Callable[..., Any] | str,
    prompts: str | Path | Sequence[str] | Messages | Sequence[Messages] | None = None,
    lam: float = 6.0,
    alpha: float = 1.0,
    n: int = 8,
    sampler: Sampler | None = None,
    denoiser: str | Path | None = None,
    critic: str | Path | None = None,
    max_length: int = 40,
    batch_size: int = 64,
    compare_base: bool = True,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Result:
    """Draw `n` texts for each prompt from π(x) ∝ p_θ(x) exp(λ r(x)).

    The texts are those of `lightning predict` with the same settings. Nothing is written, and the
    state of torch and of the caller's model is as before.

    Args:
        base_lm: p_θ: hub id, folder or `.gguf` file, `smollm2`, by default the shipped kit's; or a
            loaded model, `(model, tokenizer)` of transformers or a `BaseLM`.
        reward: r: a function from B texts, or from B texts and their `records`, to B numbers; a
            `Reward`; or a shipped one's name. Reads prompt and text; of messages the answer alone.
        prompts: beginnings of texts; messages `{"role": …, "content": …}`, or a list of such lists,
            for the tokenizer's chat template; a `Path` of a file as the command reads it; None:
            from nothing.
        lam: λ ≥ 0, inverse temperature of the reward; 0 is p_θ itself.
        alpha: α > 0 of the power target p_θ^α exp(λ r), for exact samplers; 1 is p_θ itself.
        n: texts for each prompt.
        sampler: how texts are drawn, for example `dia.BestOfN(16)`; None: `Annealed()`.
        denoiser, critic: folders or `.ckpt`, where the sampler needs them; None: base_lm's kit.
        max_length: longest text in tokens, prompt and end token included.
        batch_size: texts drawn together; with the seed it decides the texts.
        compare_base: draw as many texts of p_θ too, into `Result.base`; cheap for most samplers.
        seed: of all randomness, 0 to 4294967295.
        device: "cpu", "cuda", "cuda:1"; None: a loaded model's own, else cuda where there is one.
        progress: show bars.

    Raises:
        UserError: a ValueError that names the argument, what was given and what is allowed.
    """
    with _named_arguments(), _undisturbed(), float32_default():
        check_kinds(sampler, {"compare_base": compare_base, "progress": progress})
        listed, place = prompt_list(prompts), device_of(device, base_lm)
        sizes = {"n_texts": whole("n", n), "batch_size": whole("batch_size", batch_size)}
        sizes["max_length"] = whole("max_length", max_length)
        module = GuidedSamplerModule(
            reward, sampler or Annealed(), base_lm,  # type: ignore[arg-type]
            path_of("denoiser", denoiser), path_of("critic", critic), numeric("lam", lam),
            numeric("alpha", alpha), compare_base, seed=whole("seed", seed, 0),
        )  # fmt: skip
        texts, sees = chat_prompts(listed, module.lm), not is_chat(listed)
        data = PromptData(module.base_lm, texts, **sizes, reward_sees_prompt=sees)  # type: ignore
        return _drawn(module, data, place, progress)


def _drawn(
    module: GuidedSamplerModule, data: PromptData, device: torch.device, progress: bool
) -> Result:
    module.keeps_faults = False
    trainer = _trainer(device, progress)
    shown = SHOWN.set(progress)
    try:
        batches = _predict(trainer, module, data)
    finally:
        SHOWN.reset(shown)
    for line in repeats(module.sampler, list(zip(*batches, strict=True)), data.records):
        _LOG.warning("%s", line)
    return result_of(batches, data.n_texts, _run(trainer, module, data))


def _trainer(device: torch.device, progress: bool) -> L.Trainer:
    cuda = device.type == "cuda"
    return L.Trainer(
        accelerator="gpu" if cuda else "cpu", devices=[device.index] if cuda else 1,
        precision=_PRECISION, logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=progress, plugins=[LightningEnvironment()],
    )  # fmt: skip


def _predict(trainer: L.Trainer, module: GuidedSamplerModule, data: PromptData) -> list[Any]:
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT)
    try:
        return trainer.predict(module, datamodule=data) or []
    except SystemExit as end:  # the Trainer ends the program on Ctrl-C
        if isinstance(end.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        if in_main and handler is not None:
            signal.signal(signal.SIGINT, handler)


def _run(trainer: L.Trainer, module: GuidedSamplerModule, data: PromptData) -> Run:
    """What a saved result tells of its settings; without a hash where they cannot be told apart."""
    try:
        key = run_key(trainer, module, data)
    except (UserError, RecursionError):
        key = None
    options = {"precision": _PRECISION, "logger": False, "enable_checkpointing": False}
    settings = {
        "seed_everything": 0,
        "trainer": {**options, "enable_model_summary": False},
        "model": _settings(module),
        "data": _settings(data),
    }
    return Run(data.records, key, training_costs(module.trained_parts()), settings)


def _settings(part: Any) -> Any:
    """A part as a config file has it; one that does not keep its arguments as its `repr`."""
    try:
        return _as_config(describe(part))
    except (UserError, RecursionError):
        fields = {
            n: _settings(getattr(part, n))
            for n in ("reward", "sampler", "lam", "alpha")
            if hasattr(part, n)
        }
        return {
            "class_path": f"{type(part).__module__}.{type(part).__qualname__}",
            "init_args": fields,
        }


def _as_config(described: Any) -> Any:
    if isinstance(described, list):
        return [_as_config(item) for item in described]
    if not isinstance(described, dict):
        return described
    if "class" in described:
        given = {name: _as_config(value) for name, value in described.items() if name != "class"}
        return {"class_path": described["class"], "init_args": given}
    if "dict" in described:
        return {str(key): _as_config(value) for key, value in described["dict"]}
    return described.get("function") or next(iter(described.values()))


@contextmanager
def _named_arguments() -> Iterator[None]:
    """Messages name arguments of this function: `max_length`, not `data.max_length`."""
    try:
        yield
    except UserError as error:
        error.args = (OTHERS.sub(_argument, str(error)),)
        raise


def _argument(found: re.Match[str]) -> str:
    name = found[0].partition(".")[2]
    return {"n_texts": "n"}.get(name, name)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Lightning and transformers say nothing of themselves; afterwards all is as before."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    bars = transformers_logging.is_progress_bar_enabled()
    cuda = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.random.fork_rng([]):
            ignore_warnings()
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if cuda is not None:  # Lightning makes the one that it uses the current one
            torch.cuda.set_device(cuda)
        if bars:
            transformers_logging.enable_progress_bar()
