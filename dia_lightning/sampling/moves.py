"""The exact moves by name, for modules that refine or anneal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from dia_lightning.diffusion.schedule import Schedule
from dia_lightning.embedding import TokenEmbedding
from dia_lightning.resources import UserError
from dia_lightning.sampling.denoise_accept import DenoiseAccept, Kernel, Proposal
from dia_lightning.sampling.positions import Positions, RandomTokens, Spans
from dia_lightning.sampling.suffix import SuffixRegeneration
from dia_lightning.target import TargetDensity

POSITIONS: dict[str, Callable[[int], Positions]] = {
    "span": Spans,
    "shuffled_span": lambda size: Spans(size, shuffle=True),
    "random": RandomTokens,
    "whole": lambda size: RandomTokens(None),
}
KERNELS = ("suffix", "denoise_accept")


@dataclass
class Moves:
    """Exact moves of tokens under π.

    Attributes:
        kernels: `suffix` (the end of a text redrawn from p_θ) and `denoise_accept`, taken in turn.
        positions: what denoise_accept redraws: `span`, `shuffled_span`, `random` tokens or the `whole` text.
        size: how many positions. rounds: reveal rounds, each one pass of the denoiser in both directions.
        levels: noise u of the redrawn positions in the denoiser's warped time; one is drawn a step. 1 = hidden.
    """

    kernels: list[str] = field(default_factory=lambda: ["suffix", "denoise_accept"])
    positions: str = "span"
    size: int = 4
    rounds: int = 4
    levels: list[float] = field(default_factory=lambda: [1.0])

    def __post_init__(self) -> None:
        option = "--model.init_args.moves"
        if not self.kernels or not set(self.kernels) <= set(KERNELS):
            raise UserError(f"{option}.kernels: {self.kernels} given, allowed are {', '.join(KERNELS)}")
        if self.positions not in POSITIONS:
            raise UserError(f"{option}.positions: {self.positions!r} given, allowed are {', '.join(POSITIONS)}")
        if self.size < 1 or self.rounds < 1:
            raise UserError(f"{option}: size {self.size}, rounds {self.rounds} given, at least 1 allowed")
        if not self.levels or not all(0 < u <= 1 for u in self.levels):
            raise UserError(f"{option}.levels: {self.levels} given, allowed are numbers above 0 up to 1")

    def make(
        self, target: TargetDensity, proposal: Proposal | None, embedding: TokenEmbedding, schedule: Schedule | None
    ) -> list[Kernel]:
        """The kernels for a target; `proposal` and `schedule` are needed for `denoise_accept` only."""
        made: list[Kernel] = []
        for name in self.kernels:
            if name == "suffix":
                made.append(SuffixRegeneration(target))
                continue
            assert proposal is not None
            assert schedule is not None
            levels = schedule.warp(schedule.knots.new_tensor(self.levels)).tolist()
            positions = POSITIONS[self.positions](self.size)
            end_id = target.lm.end_id
            made.append(DenoiseAccept(target, proposal, embedding, schedule, positions, levels, self.rounds, end_id))
        return made
