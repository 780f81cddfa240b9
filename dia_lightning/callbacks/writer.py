"""Writes what `predict` and `test` draw, batch by batch, and continues where a stopped run left
off.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from typing import Any

import lightning as L
from filelock import BaseFileLock, FileLock, Timeout

from dia_lightning.callbacks.batch_files import from_json, to_json
from dia_lightning.callbacks.export import training_costs
from dia_lightning.callbacks.run_files import write_atomically, write_run
from dia_lightning.callbacks.run_key import run_key
from dia_lightning.callbacks.table import print_results, print_unfinished, repeats
from dia_lightning.callbacks.tensorboard import write_events
from dia_lightning.data.prompts import PromptData
from dia_lightning.data.shared import Together, wait_for_files
from dia_lightning.errors import INTERRUPTS, UserError
from dia_lightning.metrics.evaluation import Evaluator
from dia_lightning.metrics.repeats import with_unique_texts
from dia_lightning.rewards.base import reported_names
from dia_lightning.samplers import GuidedSamplerModule, Sampler
from dia_lightning.terminal import visible
from dia_lightning.types import Generations, Record
from dia_lightning.words import Tokenizer, check_tokenizer


class PredictionWriter(L.Callback):
    """`predictions.jsonl`, `metrics.json`, `tensorboard/` and the table at the end; with an
    evaluation `hacking.jsonl` too.

    Every batch goes to a file of its own under `parts/<hash of the settings>`; at the end rank zero
    merges them in order, and puts the settings beside them (`config.yaml`). A rerun with the same
    settings draws only the batches that are missing. A run that ends early, by an error, Ctrl-C or
    a limit on batches, leaves the texts that it has in `predictions.jsonl`, and a `metrics.json`
    with `complete: false` and without figures.

    Args:
        folder: Folder to write to; the trainer's `default_root_dir` (`--out`) by default.
        n_shown: Sample texts under the table, 0 or more.
        evaluation: Further figures of the task. A rerun with another evaluation draws nothing
            again.
        tokenizer: Word tokenizer of self-BLEU, distinct-n, BLEU and ROUGE, by sacrebleu's names;
            `auto` goes by the script of all texts and references. A rerun with another one draws
            nothing again.

    Raises:
        UserError: if the tokenizer is not installed.
    """

    def __init__(
        self, folder: str | None = None, n_shown: int = 3, evaluation: Evaluator | None = None,
        tokenizer: Tokenizer = "auto",
    ) -> None:  # fmt: skip
        check_tokenizer(tokenizer)
        self._given, self.folder = folder, Path(folder or ".")
        self.n_shown, self.evaluation, self.tokenizer = n_shown, evaluation, tokenizer
        self._hash = ""
        self._training: dict[str, Any] = {}
        self._records: Sequence[Record] = []
        self._sampler: Sampler
        self._n_batches = self._n_resumed = self._n_written = 0
        self._config = Path()
        self._together: Together
        self._lock: BaseFileLock | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._hash = ""
        if stage not in ("predict", "test"):
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(pl_module, GuidedSamplerModule) or not isinstance(data, PromptData):
            raise UserError(
                f"model: {type(pl_module).__name__} given, allowed: GuidedSamplerModule, with"
                " PromptData as data (see configs/dia_tiny.yaml)"
            )
        if sum(isinstance(callback, PredictionWriter) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise UserError(
                "trainer.callbacks: PredictionWriter given twice, allowed: once; a run has one"
                " folder"
            )
        self.folder = Path(trainer.default_root_dir if self._given is None else self._given)
        self._records, self._sampler = data.records, pl_module.sampler
        if self.evaluation is not None:
            has_base = pl_module.compare_base or pl_module.method == "zero_shot"
            names = reported_names(pl_module.reward)
            self.evaluation.check(
                data.texts.items, data.records.items, has_base, names, data.n_texts
            )
        # Here, where every process asks: a logger's folder is told to all of them.
        self._config = Path(trainer.log_dir or trainer.default_root_dir) / "config.yaml"
        key = run_key(trainer, pl_module, data)
        if trainer.is_global_zero:
            self._lock = self._locked()
        self._hash = key
        self._training = training_costs(pl_module.trained_parts())
        try:
            self._parts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self._option}: cannot write to {self.folder} ({error.strerror})"
            ) from error
        self._together = Together(trainer.world_size)
        # The first process looks, before any of them writes, so that all share out the same
        # batches.
        done = self._together.agree({int(path.stem) for path in self._parts.glob("*.json")})
        self._n_batches, self._n_resumed, self._n_written = data.n_batches, len(done), 0
        data.skip(done)

    def _locked(self) -> BaseFileLock:
        """The folder is this run's until it ends, in whatever way: the system takes the lock
        back.
        """
        lock = FileLock(self.folder / "parts" / ".lock")
        try:
            (self.folder / "parts").mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"{self._option}: another run is writing to {self.folder};"
                " wait, or give another folder"
            ) from error
        except OSError as error:
            raise UserError(
                f"{self._option}: cannot write to {self.folder} ({error.strerror})"
            ) from error
        return lock

    @contextmanager
    def _unlocked(self) -> Iterator[None]:
        """What is done in it is the last that this run does in its folder, whether it fails or
        not.
        """
        try:
            yield
        finally:
            if self._lock is not None:
                self._lock.release()

    @property
    def _option(self) -> str:
        return "out" if self._given is None else "folder"

    @property
    def _parts(self) -> Path:
        return self.folder / "parts" / self._hash

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any,
        batch_idx: int, dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        outputs = outputs["generations"] if isinstance(outputs, dict) else outputs
        text = json.dumps([to_json(generations) for generations in outputs])
        write_atomically(self._parts / f"{outputs[0].index:06d}.json", text)
        self._n_written += 1
        INTERRUPTS.check()
        if (
            trainer.received_sigterm
        ):  # of a program of one's own, where Lightning notes it and goes on
            raise KeyboardInterrupt

    on_test_batch_end = on_predict_batch_end

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Merge on rank zero, when every process has finished."""
        with self._unlocked():
            if self._hash:
                assert isinstance(pl_module, GuidedSamplerModule)
                pl_module.finish()  # before anything else that waits for the others
                n = self._n_resumed + self._together.total(self._n_written)
                if trainer.is_global_zero:
                    wait_for_files(
                        lambda: len(list(self._parts.glob("*.json"))) >= n,
                        self._option,
                        self.folder,
                    )
                self._merge(trainer, self.evaluation)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Make the finished batches readable; without an evaluation, which may be what failed."""
        with self._unlocked():
            if self._hash:
                self._merge(trainer, None)

    def _merge(self, trainer: L.Trainer, evaluation: Evaluator | None) -> None:
        paths = (
            sorted(self._parts.glob("*.json"), key=lambda path: int(path.stem))
            if trainer.is_global_zero
            else []
        )
        if not paths:
            return
        parts = [self._read(path) for path in paths]
        runs = [with_unique_texts(run, self._records) for run in zip(*parts, strict=True)]
        rmtree(self.folder / "tensorboard", ignore_errors=True)
        complete = len(paths) == self._n_batches
        metrics = write_run(
            self.folder,
            runs,
            self._records,
            self._hash,
            self._training,
            complete,
            self.tokenizer,
            evaluation,
        )
        if not complete:
            print_unfinished(self.folder, len(paths), self._n_batches)
            return
        with _optional("there is no copy of the settings"):
            if self._config.is_file():  # the next run may write its own there
                write_atomically(
                    self._parts / "config.yaml", self._config.read_text(encoding="utf-8")
                )
        with _optional(f"{self.folder / 'tensorboard'} is not whole"):
            write_events(self.folder / "tensorboard", runs, metrics)
        with _optional("the logger did not take the figures"):
            if trainer.logger:
                trainer.logger.log_metrics(
                    {k: v for k, v in metrics[0].items() if isinstance(v, float)}
                )
        with _optional("the table is not whole"):
            rows = [] if evaluation is None else evaluation.rows()
            print_results(
                metrics, runs, self.folder, self.n_shown, self._n_resumed, self._n_batches, rows
            )
        for line in repeats(self._sampler, runs, self._records):
            print(f"warning: {line}", file=sys.stderr)
        if trainer.state.fn == "test":
            with _optional("there is no report"):
                from dia_lightning.lab.report.run import write_run_report

                print(visible(f"Wrote {write_run_report(self.folder, self._config)}"))

    def _read(self, path: Path) -> list[Generations]:
        try:
            return [from_json(fields) for fields in json.loads(path.read_text(encoding="utf-8"))]
        except (ValueError, TypeError, KeyError) as error:
            mend = "delete it, and the same command draws it again"
            raise UserError(f"{self._option}: {path} is damaged ({error}); {mend}") from error


@contextmanager
def _optional(lost: str) -> Iterator[None]:
    """What fails in it is a warning: texts and figures are in their files, and the run is whole
    without it.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or "no message"
        print(f"warning: {lost}: {type(error).__name__}: {reason:.200}", file=sys.stderr)
