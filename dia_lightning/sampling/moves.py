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
REFINE = {"none": (), "denoise_accept": ("denoise_accept",), "suffix": ("suffix",), "cycle": ("suffix", "denoise_accept")}


@dataclass
class Moves:
    """What a move of denoise-and-accept does.

    Attributes:
        positions: what is redrawn: `span`, `shuffled_span`, `random` tokens or the `whole` text.
        size: how many positions. rounds: reveal rounds, each one pass of the denoiser in both directions.
        levels: noise u of the redrawn positions in the denoiser's warped time; one is drawn a step. 1 = hidden.
    """

    positions: str = "span"
    size: int = 4
    rounds: int = 4
    levels: list[float] = field(default_factory=lambda: [1.0])

    def __post_init__(self) -> None:
        option = "--model.init_args.moves"
        if self.positions not in POSITIONS:
            raise UserError(f"{option}.positions: {self.positions!r} given, allowed are {', '.join(POSITIONS)}")
        if self.size < 1 or self.rounds < 1:
            raise UserError(f"{option}: size {self.size}, rounds {self.rounds} given, at least 1 allowed")
        if not self.levels or not all(0 < u <= 1 for u in self.levels):
            raise UserError(f"{option}.levels: {self.levels} given, allowed are numbers above 0 up to 1")


def check_refine(refine: str, denoiser: str | None) -> bool:
    """Whether `refine` needs the denoiser; UserError for an unknown name or a denoiser that is missing."""
    if refine not in REFINE:
        raise UserError(f"--model.init_args.refine: {refine!r} given, allowed are {', '.join(REFINE)}")
    needed = "denoise_accept" in REFINE[refine]
    if needed and denoiser is None:
        raise UserError(f"--model.init_args.denoiser: none given, needed for --model.init_args.refine {refine}")
    return needed


def make_kernels(
    refine: str, moves: Moves, target: TargetDensity, proposal: Proposal | None, embedding: TokenEmbedding,
    schedule: Schedule | None,
) -> list[Kernel]:  # fmt: skip
    """The kernels called `refine`; `proposal` and `schedule` are needed for denoise-and-accept only."""
    made: list[Kernel] = []
    for name in REFINE[refine]:
        if name == "suffix":
            made.append(SuffixRegeneration(target))
            continue
        assert proposal is not None
        assert schedule is not None
        levels = schedule.warp(schedule.knots.new_tensor(moves.levels)).tolist()
        positions = POSITIONS[moves.positions](moves.size)
        made.append(DenoiseAccept(target, proposal, embedding, schedule, positions, levels, moves.rounds, target.lm.end_id))
    return made
