"""`LocalToxicity` against the package's own classifier in NumPy, and against what people call
toxic.
"""

from __future__ import annotations

import sys
import warnings

import pytest
import torch

from dia_lightning.callbacks.run_key import describe
from dia_lightning.errors import UserError
from dia_lightning.rewards import LocalToxicity, check_reward

pytest.importorskip("profanity_check")

REWARD = LocalToxicity()
CLEAN = [
    "Thank you so much, you are a wonderful person.",
    "The food was lovely and the waiter was kind.", "The Eagle is a cheap pub near the river.",
    "I respectfully disagree with the second paragraph.",
    "We walked along the beach until the sun went down.",
]  # fmt: skip
TOXIC = [
    "You are a fool.", "Shut up, you moron.", "What an asshole you are.",
    "You stupid idiot, go to hell.", "Fuck you, you worthless piece of shit.",
]  # fmt: skip
ODD = [
    "",
    " \n\t",
    "\0\0",
    "😀👍🏽",
    "Привет, как дела?",
    "你好，世界",
    "מה שלומך",
    "\ud800",
    "a" * 100_000,
    "idiot " * 16_667,
]


def test_it_obeys_the_laws() -> None:
    check_reward(REWARD)
    check_reward(REWARD, CLEAN + TOXIC + ODD)


def test_every_clean_text_beats_every_toxic_one() -> None:
    clean, toxic = REWARD(CLEAN), REWARD(TOXIC)
    assert float(clean.min()) > -0.2
    assert float(toxic.max()) < -0.8
    torch.testing.assert_close(LocalToxicity(sign=1)(TOXIC), -toxic)


def test_it_is_the_calibrated_margin_of_the_package() -> None:
    """P = mean over the folds of 1 / (1 + exp(a f + b)), f the margin of each fold's linear
    machine (Platt).
    """
    import numpy as np
    from profanity_check.profanity_check import model, vectorizer

    x = vectorizer.transform(CLEAN + TOXIC).toarray()
    p = np.zeros(len(x))
    for fold in model.calibrated_classifiers_:
        f = x @ fold.estimator.coef_[0] + fold.estimator.intercept_[0]
        (platt,) = fold.calibrators
        p += 1 / (1 + np.exp(platt.a_ * f + platt.b_)) / len(model.calibrated_classifiers_)
    torch.testing.assert_close(
        REWARD(CLEAN + TOXIC), -torch.tensor(p, dtype=torch.float32), rtol=0, atol=1e-6
    )


def test_a_text_without_a_known_word_gets_one_value() -> None:
    values = REWARD(["", "\0\0", "😀👍🏽", "你好，世界"])
    assert torch.equal(values, values[:1].expand(4))
    assert -0.1 < float(values[0]) < 0


def test_reading_the_weights_warns_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("profanity_check")]:
        monkeypatch.delitem(sys.modules, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LocalToxicity()(TOXIC[-1:]) < -0.9


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "profanity_check", None)
    with pytest.raises(UserError, match=r'pip install "dia-lightning\[toxicity\]"'):
        LocalToxicity()


@pytest.mark.parametrize("wrong", [lambda texts: [0.5] * len(texts), lambda texts: 1 / 0])
def test_weights_that_are_misread_are_an_error(
    monkeypatch: pytest.MonkeyPatch, wrong: object
) -> None:
    import profanity_check

    monkeypatch.setattr(profanity_check, "predict_prob", wrong)
    with pytest.raises(
        UserError,
        match=r"^LocalToxicity: the installed scikit-learn misreads the weights \([^\n]*$",
    ):
        LocalToxicity()


def test_its_arguments() -> None:
    assert describe(LocalToxicity(sign=1, name="rude"))["name"] == "rude"
    with pytest.raises(UserError, match=r"^sign: 2 given, allowed: -1 or 1"):
        LocalToxicity(sign=2)
