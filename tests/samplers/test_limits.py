"""Every limit of every part, from both sides, and every default: a changed default changes all
texts and raises nothing.
"""

import math
from dataclasses import MISSING, fields
from typing import Any

import pytest

from dia_lightning import samplers
from dia_lightning.errors import UserError
from dia_lightning.samplers import (
    DDIM,
    Annealed,
    BaseModel,
    BestOfN,
    Chains,
    ClassifierFree,
    CriticGuidance,
    DenoiseAccept,
    DiaLiteral,
    Diffusion,
    GuidedDecoding,
    ParticleGibbs,
    ParticleSteering,
    PredictorCorrector,
    RandomTokens,
    RewardGradient,
    RewardOnPrefix,
    Spans,
    Suffix,
    TwistedSMC,
    WholeText,
    Window,
)
from dia_lightning.sampling.langevin import Constant, DualAveraging, Polynomial
from dia_lightning.sampling.particles import Steering
from dia_lightning.sampling.resampling import LAM_MAX

TINY, INF, NAN = 1e-9, math.inf, math.nan
COUNT = ([1, 2], [0, -1])
NUMBER = ([0, 1, 2.5], [-1, -TINY])
SHARE = ([0, TINY, 1], [-TINY, 1 + TINY, NAN])
INSIDE = ([TINY, 1 - TINY], [0, 1, -TINY, 1 + TINY])
ABOVE_0_TO_1 = ([TINY, 1], [0, -TINY, 1 + TINY])
REVERSE = {
    "steps": COUNT,
    "stagger": ([0, 1e4], [-TINY, 1e4 + 1, NAN]),
    "temperature": ([TINY, 2], [0, -TINY]),
}
GRADIENT = {
    "scale": ([TINY, 1e30], [0, -TINY, INF]),
    "decay": ([0, 1e30], [-TINY, INF]),
    "cap": ([TINY, 1e15], [0, -TINY, 1e15 + 1, INF]),
    "window": ([(0, 1), (0, TINY), (0.5, 1)], [(-TINY, 1), (0, 1 + TINY), (0.5, 0.5), (0.6, 0.5)]),
}
ENSEMBLE = {"tries": COUNT, "form": (["metropolis", "gibbs"], ["barker", ""])}
CUT = {"cut": (["uniform", "entropy", "jump"], ["random", ""])}
ETA = {"eta": ([0, 1], [-TINY, 1 + TINY])}
# part: {option: (values that are allowed, values that are not)}
LIMITS: dict[Any, dict[str, tuple[list[Any], list[Any]]]] = {
    Annealed: {
        "particles": COUNT,
        "least": COUNT,
        "pool": COUNT,
        "ess": INSIDE,
        "rounds": ([0, 1], [-1]),
        "texts": ([0, 1], [-1]),
    },
    BaseModel: {
        "temperature": REVERSE["temperature"],
        "top_k": ([0, 1], [-1]),
        "top_p": ABOVE_0_TO_1,
    },
    BestOfN: {"n": COUNT},
    Chains: {"rounds": ([0, 1], [-1]), "temperatures": COUNT},
    ClassifierFree: {"scale": ([-1, 0, 1e30], [-1 - TINY, INF, NAN])},
    CriticGuidance: GRADIENT,
    RewardGradient: GRADIENT,
    DDIM: ETA,
    DiaLiteral: ETA | {"reading": (["marginal", "per_step"], ["neither", ""])},
    PredictorCorrector: (
        ETA
        | {
            "eta_decay": ([0, 0.5 + TINY, 1], [TINY, 0.5, 1 + TINY, -1]),
            "steps": ([0, 1], [-1]),
        }
    ),
    Suffix: ENSEMBLE | CUT,
    Window: ENSEMBLE | CUT | {"length": COUNT},
    DenoiseAccept: ENSEMBLE
    | {
        "rounds": COUNT,
        "levels": ([[TINY], [1], [0.5, 1]], [[], [0], [1, 1 + TINY], [0.5, 0]]),
        "tilt": NUMBER,
        "adapt": ([0, 1], [-1]),
        "tilt_level": ([None, 0, 1], [-TINY, 1 + TINY]),
    },
    Diffusion: REVERSE | {"strength": ABOVE_0_TO_1, "final": (["sample", "argmax"], ["best", ""])},
    GuidedDecoding: {"top_k": ([0, 1], [-1]), "final": (["sample", "argmax"], ["best", ""])},
    ParticleSteering: (
        REVERSE
        | {
            "particles": COUNT,
            "every": COUNT,
            "ess": SHARE,
            "resampling": (["systematic", "stratified", "multinomial"], ["none"]),
            "potential": (["difference", "max", "sum", "das"], ["best"]),
        }
    ),
    ParticleGibbs: (
        REVERSE
        | {
            "particles": ([2, 3], [1, 0]),
            "rounds": ([0, 1], [-1]),
            "every": COUNT,
            "ess": SHARE,
            "potential": (["difference", "max", "sum", "das"], ["best"]),
        }
    ),
    TwistedSMC: {
        "particles": COUNT,
        "every": ([*COUNT[0], "word"], [*COUNT[1], "token"]),
        "ess": SHARE,
        "resampling": (["systematic", "stratified", "multinomial"], ["none"]),
    },
    Spans: {"length": COUNT},
    RandomTokens: {"count": COUNT},
    Constant: {"eta": ([0, 2], [-TINY, INF, NAN])},
    Polynomial: {
        "eta_0": ([TINY, 2], [0, -TINY, INF]),
        "k_0": ([TINY, 2], [0, -TINY, INF]),
        "gamma": ([0.5 + TINY, 1], [0.5, 1 + TINY]),
    },
    DualAveraging: {"eta_0": ([TINY, 2], [0, -TINY, INF]), "burn_in": COUNT, "target": INSIDE},
    Steering: {"lam": ([0, 2, LAM_MAX], [-TINY, 2 * LAM_MAX, NAN]), "every": COUNT, "ess": SHARE},
}
NEEDED: dict[Any, dict[str, Any]] = {
    Constant: {"eta": 1.0},
    Polynomial: {"eta_0": 1.0},
    DualAveraging: {"eta_0": 1.0, "burn_in": 1},
    Steering: {"reward": len, "value": None, "lam": 1.0},
}
CASES = [
    (part, option, *limits)
    for part, options in LIMITS.items()
    for option, limits in options.items()
]


@pytest.mark.parametrize(
    ("part", "option", "allowed", "refused"), CASES, ids=lambda x: getattr(x, "__name__", "")
)
def test_limits(part: Any, option: str, allowed: list[Any], refused: list[Any]) -> None:
    for value in allowed:
        assert getattr(part(**NEEDED.get(part, {}) | {option: value}), option) == value
    for value in refused:
        with pytest.raises((UserError, ValueError), match=rf"^{option}: .* given, allowed: "):
            part(**NEEDED.get(part, {}) | {option: value})


def test_no_option_without_a_limit() -> None:
    """Numbers and choices of all parts are in the table; the rest are parts, flags, labels and
    paths.
    """
    free = {
        "moves",
        "start",
        "solver",
        "guidance",
        "positions",
        "twist",
        "straight_through",
        "weighted",
        "shuffle",
        "accept",
        "vary",
    }
    free |= {"policy", "label"}
    for name in samplers.__all__:
        part = getattr(samplers, name)
        options = (
            {field.name for field in fields(part)}
            if hasattr(part, "__dataclass_fields__")
            else set()
        )
        assert options - free == set(LIMITS.get(part, {})), name


def test_limits_of_two_options_together() -> None:
    for wrong, option in (
        (lambda: PredictorCorrector(eta=0.0, eta_decay=0.6), "eta"),
        (lambda: DenoiseAccept(RandomTokens(), adapt=1), "adapt"),
        (lambda: DenoiseAccept(WholeText(), adapt=3), "adapt"),
        (lambda: BaseModel(label="ppo"), "label"),
        (lambda: BaseModel(policy="folder"), "label"),
        (lambda: BaseModel(label=""), "label"),
        (lambda: BaseModel(policy="folder", label=""), "label"),
    ):
        with pytest.raises(UserError, match=rf"^{option}: .* given, allowed: "):
            wrong()
    assert PredictorCorrector(eta=0.0).options()["eta"] == 0.0
    assert PredictorCorrector(eta=TINY, eta_decay=0.6).eta == TINY
    assert DenoiseAccept(Spans(2), adapt=1).adapt == 1
    assert BaseModel(policy="folder", label="ppo").method == "ppo"


DEFAULTS: dict[Any, dict[str, Any]] = {
    Annealed: {"moves": None, "particles": 2, "least": 8, "pool": 1, "ess": 0.5, "rounds": 1,
     "texts": 0, "start": BaseModel()},
    BaseModel: {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "policy": None, "label": "zero_shot"},
    BestOfN: {"n": 16, "weighted": False},
    Chains: {"start": BaseModel(), "moves": [Suffix()], "rounds": 20, "temperatures": 1},
    ClassifierFree: {"label": None, "scale": 1.0},
    CriticGuidance: {"scale": 1.0, "decay": 0.0, "cap": 100.0, "window": (0.0, 1.0)},
    RewardGradient: {"scale": 1.0, "decay": 0.0, "cap": 100.0, "window": (0.0, 1.0),
     "straight_through": False},
    DDIM: {"eta": 0.0},
    DiaLiteral: {"eta": 0.1, "reading": "marginal"},
    PredictorCorrector: {"eta": 0.1, "eta_decay": 0.0, "steps": 1, "accept": False},
    Suffix: {"tries": 1, "form": "metropolis", "cut": "uniform"},
    Window: {
        "length": 4, "vary": False, "tries": 4, "form": "metropolis", "cut": "uniform",
    },
    DenoiseAccept: {
        "positions": Spans(4), "rounds": 4, "levels": [1.0], "tilt": 0.0, "tilt_level": 0.4,
        "tries": 1, "form": "metropolis", "adapt": 0,
    },
    Diffusion: {
        "solver": PredictorCorrector(), "guidance": CriticGuidance(), "steps": 64, "stagger": 40.0,
        "strength": 1.0, "temperature": 1.0, "final": "sample",
    },
    GuidedDecoding: {"top_k": 10, "final": "sample"},
    ParticleSteering: {
        "guidance": CriticGuidance(), "potential": "das", "particles": 4, "every": 1, "ess": 0.5,
        "resampling": "systematic", "steps": 64, "stagger": 4.0, "temperature": 1.0,
    },
    ParticleGibbs: {
        "guidance": CriticGuidance(), "potential": "das", "particles": 4, "rounds": 10, "every": 1,
        "ess": 0.5, "steps": 64, "stagger": 4.0, "temperature": 1.0,
    },
    TwistedSMC: {
        "twist": RewardOnPrefix(), "particles": 4, "every": 4, "ess": 0.5,
        "resampling": "systematic",
    },
    Spans: {"length": 4, "shuffle": False},
    RandomTokens: {"count": 4},
    Polynomial: {"k_0": 1.0, "gamma": 0.55},
    DualAveraging: {"target": 0.574, "gamma": 0.05, "m_0": 10.0, "kappa": 0.75},
}  # fmt: skip


@pytest.mark.parametrize("part", DEFAULTS, ids=lambda part: part.__name__)
def test_defaults(part: Any) -> None:
    made = part(**NEEDED.get(part, {}))
    given = {
        f.name for f in fields(part) if f.default is not MISSING or f.default_factory is not MISSING
    }
    assert {name: getattr(made, name) for name in given} == DEFAULTS[part]
