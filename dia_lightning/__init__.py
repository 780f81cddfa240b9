"""Sample text from π(x) ∝ p_θ(x) exp(λ r(x)) with a frozen language model: diffusion-based inference-time alignment."""

from typing import Optional, Union

# `typing` hands out whichever order of a union was made first. Where floats come first, as some versions of what Lightning
# imports have it, `limit_predict_batches: 1` is read as 1.0, which is all of them.
_INT_FIRST = Optional[Union[int, float]]  # noqa: UP007, UP045

__version__ = "0.1.0"
