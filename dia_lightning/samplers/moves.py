"""The exact moves of chains and populations, with their settings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, get_args

from dia_lightning.errors import require
from dia_lightning.samplers.base import Models, Part, require_counts
from dia_lightning.samplers.networks import DenoiserProposal
from dia_lightning.sampling.adaptation import Adapted
from dia_lightning.sampling.cuts import CUTS, Cut
from dia_lightning.sampling.denoise_accept import DenoiserDrafts, Tilt
from dia_lightning.sampling.drafts import SuffixDrafts, WindowDrafts
from dia_lightning.sampling.ensemble import EnsembleKernel, Form
from dia_lightning.sampling.positions import Positions, Spans
from dia_lightning.sampling.state import Kernel
from dia_lightning.target import TargetDensity


class Move(Part, ABC):
    """A kernel that leaves π invariant, for any λ.

    left_to_right: p_θ writes on to the end, so blanks cannot be filled.
    """

    left_to_right: ClassVar[bool] = False

    @property
    def varies(self) -> bool:
        """Whether it changes the lengths of blanks."""
        return False

    @abstractmethod
    def kernel(self, models: Models, target: TargetDensity) -> Kernel:
        """The kernel for this target."""


@dataclass(frozen=True)
class Suffix(Move):
    """Keeps the beginning of the text and draws the rest from p_θ (QUEST, arXiv:2406.00049).

    Args:
        tries: Drafts K of a step, 1 or more; one of them or the text as it is goes on. All share
            what p_θ has read of the beginning.
        form: `metropolis` picks a draft and accepts it (Metropolis–Hastings for one try), `gibbs`
            chooses among drafts and text.
        cut: Where the text is cut: `uniform`; `entropy`, rather where p_θ is unsure how to go on;
            `jump`, where it has become unsure.
    """

    tries: int = 1
    form: Form = "metropolis"
    cut: Cut = "uniform"
    name: ClassVar[str] = "suffix"
    left_to_right: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require_ensemble(self)

    def kernel(self, models: Models, target: TargetDensity) -> Kernel:
        return EnsembleKernel(target, SuffixDrafts(target.lm, self.cut), self.tries, self.form)


@dataclass(frozen=True)
class Window(Move):
    """Redraws a window of the text from p_θ and weighs each draft by how p_θ goes on with what
    stands on its right.

    Args:
        length: Tokens of the window, 1 or more; of the longest, where they vary.
        vary: Lengths of the window and of each draft are drawn from 1 to `length`, so that texts
            grow and shrink.
        tries: Drafts K of a step, 1 or more; one of them or the text as it is goes on.
        form: `metropolis` picks a draft and accepts it, `gibbs` chooses among drafts and text.
        cut: Where windows begin: `uniform`; `entropy`, rather where p_θ is unsure how to go on;
            `jump`, where it has become unsure.
    """

    length: int = 4
    vary: bool = False
    tries: int = 4
    form: Form = "metropolis"
    cut: Cut = "uniform"
    name: ClassVar[str] = "window"

    @property
    def varies(self) -> bool:
        return self.vary

    def __post_init__(self) -> None:
        _require_ensemble(self)
        require_counts(self, "length")

    def kernel(self, models: Models, target: TargetDensity) -> Kernel:
        elastic = None if target.batch is None else target.batch.elastic
        drafts = WindowDrafts(target.lm, self.length, self.cut, self.vary, elastic)
        return EnsembleKernel(target, drafts, self.tries, self.form)


@dataclass(frozen=True)
class DenoiseAccept(Move):
    """Redraws some positions with the denoiser, and accepts by the exact ratio.

    Args:
        positions: Positions that a step redraws.
        rounds: Reveal rounds, 1 or more. Each costs one denoiser pass for the text and one for
            each draft; the first is shared.
        levels: Noise levels u of the redrawn positions, each above 0 up to 1 in warped time; one is
            drawn a step. 1 = hidden.
        tilt: Trust κ in the critic's gradient, 0 or more, which makes proposals aware of the
            reward; 0 = no critic.
        tilt_level: Noise level u in [0, 1] at which the critic sees the redrawn positions, around
            the denoiser's expectation; null = as they are noised for the move (useless at level 1).
        tries: Drafts K of a step, 1 or more; one of them or the text as it is goes on.
        form: `metropolis` picks a draft and accepts it, `gibbs` chooses among drafts and text.
        adapt: Steps of burn-in, 0 or more, in which span length and level adapt to an acceptance of
            0.35; then they are frozen. For `Spans`, whose `length` is then the longest. Texts of
            those steps are not yet distributed as the target.
    """

    positions: Positions = field(default_factory=Spans)
    rounds: int = 4
    levels: list[float] = field(default_factory=lambda: [1.0])
    tilt: float = 0.0
    tilt_level: float | None = 0.4
    tries: int = 1
    form: Form = "metropolis"
    adapt: int = 0
    name: ClassVar[str] = "denoise_accept"

    def __post_init__(self) -> None:
        require_counts(self, "rounds", "tries")
        require("form", self.form, self.form in get_args(Form), ", ".join(get_args(Form)))
        levels = bool(self.levels) and all(0 < u <= 1 for u in self.levels)
        require("levels", self.levels, levels, "numbers above 0 up to 1")
        for name in ("tilt", "adapt"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        fits = self.tilt_level is None or 0 <= self.tilt_level <= 1
        require("tilt_level", self.tilt_level, fits, "null, or from 0 to 1")
        fits = not self.adapt or isinstance(self.positions, Spans)
        require("adapt", self.adapt, fits, "0 unless positions are Spans")

    def needs(self, lam: float) -> Set[str]:
        return {"denoiser", "critic"} if lam and self.tilt else {"denoiser"}

    def kernel(self, models: Models, target: TargetDensity) -> Kernel:
        assert models.denoiser is not None
        schedule, proposal = models.denoiser.schedule, DenoiserProposal(models.denoiser)
        levels = schedule.knots.new_tensor([*self.levels, self.tilt_level or 0.0])
        *times, tilt_time = schedule.warp(levels).tolist()
        # There is no critic where λ = 0, and then no tilt either.
        level = None if self.tilt_level is None else tilt_time
        tilt = (
            None if models.critic is None else Tilt(models.critic, self.tilt * target.unit, level)
        )
        ladder: list[Kernel] = []
        for positions, some in self._difficulties(times):
            drafts = DenoiserDrafts(
                proposal, models.embedding, schedule, positions, some, self.rounds,
                target.lm.end_id, tilt,
            )  # fmt: skip
            ladder.append(EnsembleKernel(target, drafts, self.tries, self.form))
        return Adapted(ladder, self.adapt) if self.adapt else ladder[0]

    def _difficulties(self, times: list[float]) -> list[tuple[Positions, list[float]]]:
        """Positions and noise times of the moves, the easiest first; one unless they are
        adapted.
        """
        spans = self.positions
        if not self.adapt or not isinstance(spans, Spans):
            return [(spans, times)]
        powers = [2**k for k in range(spans.length.bit_length()) if 2**k < spans.length]
        lengths = [*powers, spans.length]
        return [(replace(spans, length=n), [t]) for n in lengths for t in sorted(set(times))]


def _require_ensemble(move: Any) -> None:
    """Settings of every move with drafts by p_θ."""
    require_counts(move, "tries")
    require("form", move.form, move.form in get_args(Form), ", ".join(get_args(Form)))
    require("cut", move.cut, move.cut in CUTS, ", ".join(CUTS))


def needs_of(moves: Sequence[Move], lam: float) -> Set[str]:
    """The networks without which these moves cannot work."""
    return {network for move in moves for network in move.needs(lam)}


def names_of(moves: Sequence[Move]) -> list[str]:
    """A name for each, numbered from the second of a kind on."""
    names = [move.name for move in moves]
    seen = [names[:i].count(name) for i, name in enumerate(names)]
    return [f"{name}_{n + 1}" if n else name for name, n in zip(names, seen, strict=True)]
