"""Defaults of functions and classes that others call: a changed default changes results and
raises nothing.
"""

import inspect
from typing import Any

import pytest

from dia_lightning import guidance, target, testing
from dia_lightning.diffusion import loss
from dia_lightning.metrics import functional
from dia_lightning.samplers import base, guided_decoding, twisted_smc
from dia_lightning.sampling import (
    adaptation,
    annealing,
    decode,
    denoise_accept,
    drafts,
    ensemble,
    langevin,
    particle_gibbs,
    particles,
    resampling,
    solvers,
)

DEFAULTS: dict[Any, dict[str, Any]] = {
    guidance.unguided: {"temperature": 1.0},
    guidance.classifier_free: {"temperature": 1.0},
    guidance.guided: {"window": (0.0, 1.0)},
    guidance.true_gradient: {"straight_through": False, "temperature": 1.0},
    target.TargetDensity: {"alpha": 1.0},
    testing.check_target: {"atol": 1e-3},
    loss.warp_knots: {"floor": 0.2},
    functional.self_bleu: {"n_gram": 4, "tokenizer": "auto"},
    functional._self_bleu_update: {"n_gram": 4, "tokenizer": "auto"},
    functional.distinct_n: {"tokenizer": "auto"},
    adaptation.Adapted: {"rate": 0.35},
    decode.starting_point: {"strength": 1.0},
    decode.draw_texts: {"sample": True, "strength": 1.0},
    denoise_accept.DenoiserDrafts: {"levels": (1.0,), "rounds": 1},
    drafts.SuffixDrafts: {"cut": "uniform"},
    drafts.WindowDrafts: {"cut": "uniform", "vary": False},
    drafts.write_on: {"may_end": True},
    ensemble.EnsembleKernel: {"tries": 1, "form": "metropolis"},
    testing.check_kernel: {"steps": 5, "n_errors": 5.0},
    langevin.ula: {"scale": 1.0},
    langevin.mala: {"scale": 1.0, "points": 2},
    particle_gibbs.ParticleGibbsKernel: {"n_groups": 1},
    particles.Potential: {"start": 0.0, "tempered": False},
    particles.smc: {"n_groups": 1, "keep": False},
    annealing.anneal: {"ess": 0.5, "moves": 1, "islands": 1},
    solvers.ddim: {"eta": 0.0},
    solvers.dia: {"corrector_steps": 1, "eta": 0.1, "corrector": "ula"},
    solvers.dia_literal: {"eta": 0.1, "reading": "marginal"},
    base.Models: {"n_labels": 0, "alpha": 1.0},
    base.draw_base: {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
    guided_decoding.decode_guided: {"final": "sample"},
    twisted_smc.Twist: {"every": 1, "ess": 0.5, "resampling": "systematic", "alpha": 1.0},
}


@pytest.mark.parametrize("called", DEFAULTS, ids=lambda x: x.__name__)
def test_defaults(called: Any) -> None:
    found = {name: given.default for name, given in inspect.signature(called).parameters.items()}
    assert {
        name: value for name, value in found.items() if value not in (None, inspect.Parameter.empty)
    } == DEFAULTS[called]


def test_defaults_of_the_package() -> None:
    """Limits and shares that stand alone."""
    assert (guidance.CAP_MAX, resampling.LAM_MAX) == (1e15, 1e100)
    assert loss._MIXTURE == (0.15, 0.1, 0.1, 0.3, 0.35)
    assert sum(loss._MIXTURE) == pytest.approx(1)
