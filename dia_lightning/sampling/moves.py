"""The exact moves by name, for modules that refine or anneal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from dia_lightning.diffusion.schedule import Schedule
from dia_lightning.embedding import TokenEmbedding
from dia_lightning.guidance import LogValue
from dia_lightning.resources import UserError
from dia_lightning.sampling.adaptation import Adapted
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
        size: how many positions. rounds: reveal rounds, each one pass of the denoiser in both directions (but the first,
            which they share).
        levels: noise u of the redrawn positions in the denoiser's warped time; one is drawn a step. 1 = hidden.
        tilt: trust κ in the critic's gradient, which makes proposals aware of the reward; 0 = off, without a critic.
        tilt_level: noise u at which the critic sees the redrawn positions, around the denoiser's expectation of them; null:
            as they are noised for the move (useless at level 1).
        expert: weight of p_θ's own next-token probabilities in the proposal; 0 = off. For denoisers that know little: a good
            one has them already, and multiplied in once more they propose the same text again.
        adapt: steps of burn-in in which span length and level are adapted to an acceptance of 0.35, for `span` and
            `shuffled_span`, then frozen; 0 = off. `size` is then the longest span, and texts of those steps are not yet
            distributed as the target: refine for longer, or in an annealed population end before the last temperature.
    """

    positions: str = "span"
    size: int = 4
    rounds: int = 4
    levels: list[float] = field(default_factory=lambda: [1.0])
    tilt: float = 0.0
    tilt_level: float | None = 0.4
    expert: float = 0.0
    adapt: int = 0

    def __post_init__(self) -> None:
        option = "--model.init_args.moves"
        if self.positions not in POSITIONS:
            raise UserError(f"{option}.positions: {self.positions!r} given, allowed are {', '.join(POSITIONS)}")
        if self.size < 1 or self.rounds < 1:
            raise UserError(f"{option}: size {self.size}, rounds {self.rounds} given, at least 1 allowed")
        if not self.levels or not all(0 < u <= 1 for u in self.levels):
            raise UserError(f"{option}.levels: {self.levels} given, allowed are numbers above 0 up to 1")
        for name in ("tilt", "expert", "adapt"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{option}.{name}: {getattr(self, name)} given, allowed: 0 or more")
        if self.tilt_level is not None and not 0 <= self.tilt_level <= 1:
            raise UserError(f"{option}.tilt_level: {self.tilt_level} given, allowed: null, or from 0 to 1")
        if self.adapt and "span" not in self.positions:
            raise UserError(f"{option}.adapt: {self.adapt} given, allowed with positions span or shuffled_span only")


def check_refine(refine: str, denoiser: str | None, moves: Moves | None = None, critic: str | None = None) -> bool:
    """Whether `refine` needs the denoiser; UserError for an unknown name, or a denoiser or critic that is missing."""
    if refine not in REFINE:
        raise UserError(f"--model.init_args.refine: {refine!r} given, allowed are {', '.join(REFINE)}")
    needed = "denoise_accept" in REFINE[refine]
    if needed and denoiser is None:
        raise UserError(f"--model.init_args.denoiser: none given, needed for --model.init_args.refine {refine}")
    if needed and moves is not None and moves.tilt and critic is None:
        raise UserError(f"--model.init_args.critic: none given, needed for --model.init_args.moves.tilt {moves.tilt}")
    return needed


def make_kernels(
    refine: str, moves: Moves, target: TargetDensity, proposal: Proposal | None, embedding: TokenEmbedding,
    schedule: Schedule | None, critic: LogValue | None = None,
) -> list[Kernel]:  # fmt: skip
    """The kernels called `refine`; `proposal` and `schedule` are for denoise-and-accept only, `critic` for its tilt."""
    made: list[Kernel] = []
    for name in REFINE[refine]:
        if name == "suffix":
            made.append(SuffixRegeneration(target))
            continue
        assert proposal is not None
        assert schedule is not None
        times = schedule.warp(schedule.knots.new_tensor([*moves.levels, moves.tilt_level or 0.0])).tolist()
        # There is no critic where λ = 0, and then no tilt either.
        tilt = 0.0 if critic is None else moves.tilt
        tilt_level = None if moves.tilt_level is None else times[-1]
        ladder: list[Kernel] = [
            DenoiseAccept(
                target, proposal, embedding, schedule, POSITIONS[moves.positions](size), levels, moves.rounds,
                target.lm.end_id, critic, tilt, tilt_level, moves.expert,
            )
            for size, levels in _difficulties(moves, times[:-1])
        ]  # fmt: skip
        made.append(Adapted(ladder, moves.adapt) if moves.adapt else ladder[0])
    return made


def _difficulties(moves: Moves, levels: list[float]) -> list[tuple[int, list[float]]]:
    """(Size, noise times) of the moves, the easiest first; one unless they are adapted."""
    if not moves.adapt:
        return [(moves.size, levels)]
    sizes = [2**k for k in range(moves.size.bit_length()) if 2**k < moves.size] + [moves.size]
    return [(size, [t]) for size in sizes for t in sorted(set(levels))]
