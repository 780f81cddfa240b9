"""The evaluation of a task: judges, references and reward hacking."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from dia_lightning.errors import UserError
from dia_lightning.lab.judges.hacking import Hacking, flagged_texts, hacking_figures
from dia_lightning.lab.judges.judge import OPTION, Judge, RunTexts, prompt_groups, run_texts
from dia_lightning.metrics.evaluation import Evaluated, Evaluator, Row
from dia_lightning.metrics.reference import ReferenceBLEU, reference_rouge
from dia_lightning.terminal import one_line
from dia_lightning.types import Generations, Record

# Every other key of `metrics.json`.
_RESERVED = {
    "schema", "complete", "method", "config_hash", "versions", "base", "n", "reward",
    "reward_std", "perplexity", "nfe", "log_p_per_token", "self_bleu",
    "latency_s_per_100_tokens", "accept_rate", "distinct_1", "distinct_2", "distinct_3",
    "distinct_4", "seconds_per_text", "flops_per_text", "peak_memory_mib", "tokens", "flops",
    "training", "bleu_signature", "hacking_reasons", "log_z", "log_z_reverse", "ess", "roots",
    "resampled", "temperatures", "tokenizer", "reasons", "unique_texts", "by_prompt",
}  # fmt: skip
_REFERENCE_ROWS = [
    ("bleu", "BLEU (0 – 100)", "{:.2f}"),
    *((f"rouge_{x}", f"ROUGE-{x.upper()}", "{:.3f}") for x in "12l"),
]


def references_of(records: Sequence[Record], field: str) -> list[list[str]]:
    """The references of each text: a text or a list of texts in a field of its record.

    Raises:
        UserError: naming the first text without a reference.
    """
    found = []
    for i, record in enumerate(records):
        value = record.get(field)
        references = [value] if isinstance(value, str) else value
        whole = isinstance(references, list) and all(isinstance(r, str) for r in references)
        if not whole or not references:
            has = ", ".join(record) or "none"
            raise UserError(
                f"{OPTION}.references: {field!r} given, allowed: a field with a text or a list of "
                f"texts for every prompt; text {i} has {value!r:.60} there (fields: {has})"
            )
        found.append(references)
    return found


class Evaluation(Evaluator):
    """The measures of a task, an option of `PredictionWriter`; another one needs no new sampling.

    Args:
        judges: reported scores.
        references: field of the prompt file with a reference or a list of them, for BLEU
            (sacrebleu) and ROUGE (rouge-score).
        hacking: the checks for reward hacking; without them there is no `hacking_rate`.

    Raises:
        UserError: if two figures would have one name.
    """

    def __init__(
        self,
        judges: list[Judge] | None = None,
        references: str | None = None,
        hacking: Hacking | None = None,
    ) -> None:
        self.judges, self.references, self.hacking = judges or [], references, hacking
        keys = [key for key, _, _ in self.rows()]
        for judge in self.judges:
            if not judge.name.strip() or one_line(judge.name) != judge.name:
                allowed = "visible characters in one line"
                raise UserError(
                    f"{OPTION}.judges: the name {judge.name!r} given, allowed: {allowed}"
                )
        # "nfe/base_lm" is the name of `nfe`'s entry "base_lm" in reports.
        reserved = {key for key in keys if key.partition("/")[0] in _RESERVED}
        if taken := sorted(reserved | {key for key, n in Counter(keys).items() if n > 1}):
            advice = "give one judge another init_args.name"
            raise UserError(f"{OPTION}.judges: two figures named {taken[0]!r}; {advice}")

    def rows(self) -> list[Row]:
        rows = [row for judge in self.judges for row in judge.rows()]
        rows += [] if self.references is None else _REFERENCE_ROWS
        return rows + ([] if self.hacking is None else self.hacking.rows())

    def check(
        self,
        prompts: Sequence[str],
        records: Sequence[Record],
        has_base: bool,
        rewards: Sequence[str] = (),
        n_texts: int = 1,
    ) -> None:
        for key in {key for key, _, _ in self.rows()} & {f"reward_{name}" for name in rewards}:
            advice = "give the judge another init_args.name"
            raise UserError(f"{OPTION}.judges: {key!r} is a figure of the reward too; {advice}")
        fewest = n_texts * min(Counter(prompt_groups(prompts, records)).values())
        for judge in self.judges:
            judge.check(records, fewest)
        if self.references is not None:
            references_of(records, self.references)
        if self.hacking is not None:
            self.hacking.check(records, has_base)

    def __call__(
        self,
        runs: Sequence[Sequence[Generations]],
        records: Sequence[Record],
        tokenizer: str = "auto",
    ) -> Evaluated:
        given = [run_texts(run, records) for run in runs]
        figures = [self._figures(run, tokenizer) for run in given]
        if self.hacking is None:
            return Evaluated(figures)
        # The base model's run is the last one, or the only one.
        scores = [self.hacking.scores(run) for run in given]
        flags = [
            self.hacking.flags(run, score, given[-1], scores[-1])
            for run, score in zip(given, scores, strict=True)
        ]
        figures = [
            {**found, **hacking_figures(flag)} for found, flag in zip(figures, flags, strict=True)
        ]
        return Evaluated(figures, flagged_texts(given[0], scores[0], flags[0]))

    def _figures(self, run: RunTexts, tokenizer: str) -> dict[str, Any]:
        figures = {key: value for judge in self.judges for key, value in judge.figures(run).items()}
        if self.references is not None:
            references = references_of(run.records, self.references)
            bleu = ReferenceBLEU(tokenizer, sync_on_compute=False)
            bleu.update(run.texts, references)
            figures |= {"bleu": float(bleu.compute()), "bleu_signature": bleu.signature()}
            rouge = reference_rouge(run.texts, references, tokenizer)
            figures |= {name: float(value) for name, value in rouge.items()}
        return figures
