"""Values that flow between the parts, and the protocols that a user's own parts obey."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

# Of predictions.jsonl and metrics.json.
SCHEMA = 1
# In a prompt, places that are free: N tokens, or any number.
BLANK = re.compile(r"\[blank(?::(\d+))?\]")


def has_blank(prompt: str) -> bool:
    """Whether a prompt has blanks to fill in, `[blank]` or `[blank:N]`."""
    return BLANK.search(prompt) is not None


def leading(prompt_mask: Tensor) -> Tensor:
    """(B, T) bool, the prompt at the left: what is given before the first position that is free."""
    return prompt_mask.long().cumprod(1).bool()


def text_mask(tokens: Tensor, prompt_mask: Tensor, end_id: int) -> Tensor:
    """(B, T) bool, True up to and including the first end token after the leading prompt: what
    counts as text.
    """
    ended = (tokens == end_id) & ~leading(prompt_mask)
    return (ended.cumsum(1) - ended.long()) == 0


def scored_mask(tokens: Tensor, prompt_mask: Tensor, end_id: int) -> Tensor:
    """(B, T) bool, the text after the leading prompt and its end token: what log p_θ(x | c) counts.

    Fixed words after a blank belong to it, since their probability depends on what fills the blank.
    """
    return text_mask(tokens, prompt_mask, end_id) & ~leading(prompt_mask)


def must_go_on(prompt_mask: Tensor) -> Tensor:
    """(B, T) bool, free positions where the text may not end, since a fixed one follows."""
    fixed = prompt_mask.long()
    return ~prompt_mask & (fixed.flip(1).cumsum(1).flip(1) > 0)


def segments(prompt_mask: Tensor) -> Tensor:
    """(N, T) int64: which run of free places, from the left, a place belongs to or follows; −1
    before the first.
    """
    free = ~prompt_mask
    before = torch.cat([torch.zeros_like(free[:, :1]), free[:, :-1]], 1)
    return (free & ~before).long().cumsum(1) - 1


def has_blanks(batch: Batch) -> bool:
    """Whether something given follows a free position in any row."""
    return bool(must_go_on(batch.prompt_mask).any())


def fill_after_end(tokens: Tensor, prompt_mask: Tensor, end_id: int) -> Tensor:
    """(B, T) tokens with everything after the first end token set to the end token (the
    canonical form of a text).
    """
    return torch.where(text_mask(tokens, prompt_mask, end_id), tokens, end_id)


# What is known of a text beforehand: a line of the prompts file, with fields such as prompt,
# source, mr, references.
Record = Mapping[str, Any]


@dataclass
class Batch:
    """One batch of work for a sampler.

    index: number of the batch in the whole run; with the seed it determines every random draw.
    ids: number of each text in the whole run.
    prompts: the prompt of each text ("" where there is none).
    tokens: (B, T) int64 with the prompt at the left and end tokens after it; prompt_mask: (B, T)
        bool.
    records: the record of each text, for rewards that compare with it.
    whole: rewards read prompt and text as one; False: the text alone.
    elastic: (B, S) bool, of the row's runs of free positions, from the left, whether a run has any
        length, one token or more; None: those have that nothing follows.
    """

    index: int
    ids: list[int]
    prompts: list[str]
    tokens: Tensor
    prompt_mask: Tensor
    records: list[Record] = field(default_factory=list)
    whole: bool = True
    elastic: Tensor | None = None

    def __post_init__(self) -> None:
        self.records = self.records or [{}] * len(self.prompts)

    def take(self, rows: Tensor) -> Batch:
        """The prompts numbered `rows` (N,), which may name one several times."""
        chosen = rows.tolist()
        return replace(
            self, ids=[self.ids[i] for i in chosen], prompts=[self.prompts[i] for i in chosen],
            tokens=self.tokens[rows], prompt_mask=self.prompt_mask[rows],
            records=[self.records[i] for i in chosen],
            elastic=None if self.elastic is None else self.elastic[rows],
        )  # fmt: skip


class Cost(NamedTuple):
    """What passed through one network (see `cost.Meter`).

    calls: rows that it was given; a text that is written token by token is a row for each token; of
        a reward, texts.
    tokens: positions in those rows. flops: floating-point operations of its matrix products.
    """

    calls: float = 0
    tokens: float = 0
    flops: float = 0

    def plus(self, other: Cost, sign: int = 1) -> Cost:
        return Cost(*(a + sign * b for a, b in zip(self, other, strict=True)))


@dataclass
class Generations:
    """What a method returns from `predict_step`, one entry a text.

    tokens (B, T) int64 in canonical form; texts, without the prompt; log_p (B,) nats of the text
    and its end token under p_θ given the prompt; n_tokens (B,) int64 of the same; latency_s,
    seconds for the whole batch; costs of the whole batch by network, and its peak_memory_mib;
    accept_rate (B,), share of accepted moves where the method has moves; diagnostics, further
    figures (B,) by name; warm, False for the first batch of a process, whose time includes
    compilation and caches; seen, the texts as rewards read them where that is with their prompts,
    else empty; canonical (B,) bool, whether prompt and text are cut into just these tokens; fills,
    the texts that fill a prompt's blanks, in order, empty where none of the prompts has any.
    """

    index: int
    ids: list[int]
    prompts: list[str]
    texts: list[str]
    tokens: Tensor
    log_p: Tensor
    n_tokens: Tensor
    rewards: dict[str, Tensor]
    reward: Tensor
    method: str
    seed: int
    latency_s: float
    costs: dict[str, Cost] = field(default_factory=dict)
    peak_memory_mib: float = float("nan")
    accept_rate: Tensor | None = None
    diagnostics: dict[str, Tensor] = field(default_factory=dict)
    warm: bool = True
    seen: list[str] = field(default_factory=list)
    canonical: Tensor | None = None
    fills: list[list[str]] = field(default_factory=list)


class Denoiser(Protocol):
    """A network over noised embeddings: z (B, T, d), t (B, T) in [0, 1], one time per token →
    logits (B, T, V).
    """

    def __call__(self, z: Tensor, t: Tensor, z0_prev: Tensor | None = None) -> Tensor: ...


class Reward(ABC):
    """r: a batch of texts → B numbers, finite as float32, larger is better. `name` labels it in
    every output.

    They come as a tensor or NumPy array (B,) of any real type on any device, or as a list or tuple.

    Your own is a subclass, named by `class_path` in a YAML file; `rewards.check_reward` tries its
    laws. A subclass sets `deterministic = False` where two calls may differ, and `conditional =
    True` where a value depends on the text's record
    too (a source text, say): it is then called as `reward(texts, records)`, records a sequence of B
        mappings. `on_prefix` says whether the value of an unfinished text tells of the whole:
        False where that is known to mislead (a length, say), None where nobody has looked.
    """

    name: str
    deterministic: bool = True
    conditional: bool = False
    on_prefix: bool | None = None

    @abstractmethod
    def __call__(self, texts: Sequence[str]) -> Tensor | np.ndarray | Sequence[float]:
        """(B,) numbers for B texts."""
