"""Toxicity without a service."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dia_lightning.errors import UserError
from dia_lightning.rewards.options import require_sign
from dia_lightning.types import Reward

_CLEAN, _TOXIC = "The food was lovely and the staff were kind.", "You are a stupid idiot."


class LocalToxicity(Reward):
    """sign · P(toxic) by a linear classifier of English words; −P in [−1, 0] by default, so that 0
    is best.

    A bag of words: it knows no order, no negation and no word that its training texts lack, so that
    an empty text and one in another script get the same value as any text without a known word (P ≈
    0.04). Reads tens of thousands of texts a second.

    Source: package alt-profanity-check, TF-IDF and a calibrated linear SVM trained on about 200,000
    labelled comments; its weights come with the package.

    Args:
        sign: −1 = toxic is bad, 1 = toxic is good.
        name: Label in outputs.

    Raises:
        UserError: if the package is missing, or the installed scikit-learn does not read its
            weights right.
    """

    on_prefix = True

    def __init__(self, sign: float = -1.0, name: str = "toxicity") -> None:
        require_sign(sign)
        self.sign, self.name = sign, name
        self._probability = _load()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        if not texts:
            return torch.zeros(0)
        return self.sign * torch.tensor(self._probability(list(texts)), dtype=torch.float32)


def _load() -> Callable[[list[str]], Any]:
    """The package's P(toxic), after a look at two texts that anyone can tell apart."""
    try:
        with warnings.catch_warnings():
            # Weights pickled by another scikit-learn make it warn; whether they are still read
            # right is looked at below.
            warnings.simplefilter("ignore")
            from profanity_check import predict_prob

            clean, toxic = predict_prob([_CLEAN, _TOXIC])
    except ModuleNotFoundError as error:
        raise UserError(
            'LocalToxicity needs a package: pip install "dia-lightning[toxicity]"'
        ) from error
    except Exception as error:
        raise _unreadable(f"{type(error).__name__}: {error}") from error
    if not clean < 0.1 < 0.9 < toxic:
        raise _unreadable(f"P(toxic) of {_CLEAN!r} is {clean:.3f}, of {_TOXIC!r} {toxic:.3f}")
    return predict_prob  # type: ignore[no-any-return]


def _unreadable(why: str) -> UserError:
    why = " ".join(why.split())[:200]
    return UserError(
        f"LocalToxicity: the installed scikit-learn misreads the weights ({why}): pip install -U"
        ' "dia-lightning[toxicity]"'
    )
