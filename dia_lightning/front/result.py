"""What `dia.sample` returns: one row a text, ordered by prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dia_lightning.callbacks.batch_files import from_json, records, to_json
from dia_lightning.callbacks.run_files import write_atomically, write_run
from dia_lightning.errors import UserError
from dia_lightning.metrics.repeats import with_unique_texts
from dia_lightning.terminal import one_line
from dia_lightning.types import Generations, Record

if TYPE_CHECKING:
    import pandas as pd

_SHOWN = 8


class Run(NamedTuple):
    """What `save` writes besides the texts.

    known: the record of each text. key: the hash of the settings, None where they have none.
    training: costs of the networks' training. settings: as a config file has them.
    """

    known: Sequence[Record]
    key: str | None
    training: Mapping[str, Any]
    settings: Mapping[str, Any]


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """N texts, all of the first prompt, then all of the second, and so on.

    Attributes:
        prompts: the prompt of each text, "" where there is none; prompt + text is the whole.
        texts: without their prompts; whole, where a prompt has blanks.
        rewards: (N,) float32, r of each.
        parts: (N,) float32 by name: what a reward made of rewards consists of.
        log_p: (N,) float64, log p_θ(text | prompt) in nats, end token included.
        n_tokens: (N,) int64, end token included.
        method: the sampler's name in the outputs.
        accept_rate: (N,) share of accepted moves; None where the sampler has no moves.
        log_z: (N,) estimate of log E_{p_θ}[exp(λ r)] in nats by the particles that a text comes
            from, equal for texts that share them; None where the sampler gives none.
        ess: (N,) effective share of the weighted candidates of a text, 0 to 1, the least of all
            reweightings; None likewise.
        diagnostics: (N,) further figures by name; `unique_texts`, the share of different texts
            among those of a prompt, always.
        fills: the texts that fill the blanks of a prompt, in order; empty where it has none.
        base: as many texts of p_θ itself for the same prompts; None without `compare_base`.
        n: texts for each prompt.
    """

    prompts: list[str]
    texts: list[str]
    rewards: Tensor
    parts: dict[str, Tensor]
    log_p: Tensor
    n_tokens: Tensor
    method: str
    accept_rate: Tensor | None
    log_z: Tensor | None
    ess: Tensor | None
    diagnostics: dict[str, Tensor]
    fills: list[list[str]]
    base: Result | None
    n: int
    _batches: list[Generations] = field(default_factory=list)
    _run: Run | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)

    def best(self) -> list[str]:
        """The text of largest reward for each prompt."""
        best = self.rewards.view(-1, self.n).argmax(1).tolist()
        return [self.texts[i * self.n + k] for i, k in enumerate(best)]

    def to_pandas(self) -> pd.DataFrame:
        """One row a text: fields of predictions.jsonl, `rewards.NAME` of each part, diagnostics."""
        import pandas as pd

        rows = pd.json_normalize([row for batch in self._batches for row in records(batch)])
        own = {name: values.numpy() for name, values in self.diagnostics.items()}
        return rows.assign(**own)

    def save(self, folder: str | Path) -> Path:
        """Write what `lightning predict` writes, and return the folder.

        `predictions.jsonl`, `base_predictions.jsonl` (with `compare_base`), `metrics.json`, and the
        settings as `config.yaml`, which `lightning predict --config` runs again where reward and
        model can be named in a file.

        Raises:
            UserError: if the folder cannot be written, or this is the `base` of another result.
        """
        if self._run is None:
            raise UserError(
                "save: this is the base of a result, which saves it beside its own texts"
            )
        runs = [self._batches] if self.base is None else [self._batches, self.base._batches]
        # Through the form in which the command keeps them between runs, for the same numbers.
        runs = [[from_json(to_json(batch)) for batch in run] for run in runs]
        path, run = Path(folder), self._run
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_run(path, runs, run.known, run.key, run.training)
            write_atomically(path / "config.yaml", _yaml(run.settings, path))
        except OSError as error:
            raise UserError(f"folder: cannot write to {path} ({error.strerror})") from error
        return path

    def __repr__(self) -> str:
        shown = [f"  {reward:+.3f}  {_short(text)}" for reward, text in self._rows(3)]
        more = [f"  … {len(self) - 3} more"] if len(self) > 3 else []
        return "\n".join([f"Result: {self._summary()}", *shown, *more])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{reward:+.3f}</td><td>{escape(text)}</td></tr>"
            for reward, text in self._rows(_SHOWN)
        )
        head = "<tr><th>reward</th><th>text</th></tr>"
        return f"<p>{escape(self._summary())}</p><table>{head}{rows}</table>"

    def _rows(self, n: int) -> list[tuple[float, str]]:
        return list(zip(self.rewards[:n].tolist(), self.texts[:n], strict=True))

    def _summary(self) -> str:
        base = "" if self.base is None else f" (base model {self.base.rewards.mean():.3f})"
        return f"{len(self)} texts by {self.method}, mean reward {self.rewards.mean():.3f}{base}"


def result_of(batches: Sequence[Sequence[Generations]], n: int, run: Run) -> Result:
    """The result of a run's batches: of each the method's texts and, if there, those of p_θ."""
    method, *others = (with_unique_texts(made, run.known) for made in zip(*batches, strict=True))
    base = _joined(others[0], n, None, None) if others else None
    return _joined(method, n, base, run)


def _joined(batches: list[Generations], n: int, base: Result | None, run: Run | None) -> Result:
    def joined(values: list[Any]) -> Any:
        return None if any(value is None for value in values) else torch.cat(values)

    first = batches[0]
    diagnostics = {
        name: joined([b.diagnostics.get(name, b.log_p * torch.nan) for b in batches])
        for name in dict.fromkeys(name for b in batches for name in b.diagnostics)
    }
    return Result(
        prompts=[prompt for batch in batches for prompt in batch.prompts],
        texts=[text for batch in batches for text in batch.texts],
        rewards=joined([batch.reward for batch in batches]),
        parts={name: joined([batch.rewards[name] for batch in batches]) for name in first.rewards},
        log_p=joined([batch.log_p for batch in batches]),
        n_tokens=joined([batch.n_tokens for batch in batches]),
        method=first.method,
        accept_rate=joined([batch.accept_rate for batch in batches]),
        log_z=diagnostics.get("log_z"),
        ess=diagnostics.get("ess"),
        diagnostics=diagnostics,
        fills=[row for b in batches for row in b.fills or [[] for _ in b.texts]],
        base=base, n=n, _batches=batches, _run=run,
    )  # fmt: skip


def _short(text: str) -> str:
    line = one_line(text)
    return line if len(line) <= 80 else f"{line[:79]}…"


def _yaml(settings: Mapping[str, Any], folder: Path) -> str:
    import yaml  # type: ignore[import-untyped]

    writer = {
        "class_path": "dia_lightning.callbacks.PredictionWriter",
        "init_args": {"folder": str(folder)},
    }
    trainer = {"default_root_dir": str(folder), **settings["trainer"], "callbacks": [writer]}
    text: str = yaml.safe_dump(
        {**settings, "trainer": trainer}, sort_keys=False, allow_unicode=True
    )
    return text
