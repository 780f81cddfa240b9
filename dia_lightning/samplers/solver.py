"""The solvers of the reverse process with their settings; `sampling.solvers` has their formulas."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from dia_lightning.errors import require
from dia_lightning.sampling.langevin import Polynomial


class Solver(ABC):
    """One of `sampling.solvers.SOLVERS`, by `name`, and what it is called with."""

    name: ClassVar[str]

    def options(self) -> dict[str, Any]:
        """Arguments of the function called `name`."""
        return {}


@dataclass(frozen=True)
class Ancestral(Solver):
    """DDPM ancestral sampling (Ho et al., arXiv:2006.11239)."""

    name: ClassVar[str] = "ancestral"


@dataclass(frozen=True)
class DDIM(Solver):
    """DDIM (Song et al., arXiv:2010.02502).

    Args:
        eta: Share of fresh noise in a step, from 0 (the probability-flow ODE) to 1 (`Ancestral`).
    """

    eta: float = 0.0
    name: ClassVar[str] = "ddim"

    def __post_init__(self) -> None:
        require("eta", self.eta, 0 <= self.eta <= 1, "0 ≤ eta ≤ 1")

    def options(self) -> dict[str, Any]:
        return {"eta": self.eta}


@dataclass(frozen=True)
class DPMpp2M(Solver):
    """DPM-Solver++(2M) (Lu et al., arXiv:2211.01095): second order, no noise."""

    name: ClassVar[str] = "dpmpp_2m"


@dataclass(frozen=True)
class PredictorCorrector(Solver):
    """A posterior step to each level, then Langevin steps at it (Song et al., arXiv:2011.13456).

    Args:
        eta: Size η of the Langevin steps relative to σ², in [0, 1]; above 0 where it decays.
        eta_decay: Exponent γ of the size η/(k + 1)^γ of corrector step k, above ½ up to 1; 0 = η at
            every step.
        steps: Langevin steps at each noise level, 0 or more.
        accept: Accept or reject each step for the whole text (MALA; reports `accept_mala`) instead
            of taking all (ULA).
    """

    eta: float = 0.1
    eta_decay: float = 0.0
    steps: int = 1
    accept: bool = False
    name: ClassVar[str] = "dia"

    def __post_init__(self) -> None:
        require("eta", self.eta, 0 <= self.eta <= 1, "0 ≤ eta ≤ 1")
        decays = self.eta > 0 or not self.eta_decay
        require("eta", self.eta, decays, "above 0 where it decays (eta_decay)")
        fits = self.eta_decay == 0 or 0.5 < self.eta_decay <= 1
        require("eta_decay", self.eta_decay, fits, "0, or ½ < eta_decay ≤ 1")
        require("steps", self.steps, self.steps >= 0, "0 or more")

    def options(self) -> dict[str, Any]:
        eta = Polynomial(self.eta, gamma=self.eta_decay) if self.eta_decay else self.eta
        corrector = "mala" if self.accept else "ula"
        return {"eta": eta, "corrector_steps": self.steps, "corrector": corrector}


@dataclass(frozen=True)
class DiaLiteral(Solver):
    """The original proposal's update exactly as printed; wrong by design, kept for the ablation.

    Args:
        eta: Size η of its steps, in [0, 1].
        reading: Meaning of the printed α_t and σ_t: `marginal` or `per_step`.
    """

    eta: float = 0.1
    reading: Literal["marginal", "per_step"] = "marginal"
    name: ClassVar[str] = "dia_literal"

    def __post_init__(self) -> None:
        require("eta", self.eta, 0 <= self.eta <= 1, "0 ≤ eta ≤ 1")
        allowed = ("marginal", "per_step")
        require("reading", self.reading, self.reading in allowed, ", ".join(allowed))

    def options(self) -> dict[str, Any]:
        return {"eta": self.eta, "reading": self.reading}
