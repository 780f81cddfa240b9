"""`Formality`: pairs of one content in two styles, its three outputs, its features by hand."""

from __future__ import annotations

import math

import pytest
import torch

from dia_lightning.errors import UserError
from dia_lightning.rewards import Formality, check_reward
from dia_lightning.rewards.formality import FEATURES, features

# Not among the pairs that the model was trained on.
PAIRS = [
    ("The delivery has been delayed until Monday.", "ur delivery's late, it'll come monday"),
    (
        "I was unable to locate the document that you requested.",
        "i couldn't find that doc u wanted",
    ),
    (
        "The restaurant provides traditional Italian cuisine at reasonable prices.",
        "omg the pizza here is so good and cheap!!",
    ),
    (
        "Visitors are requested to remain silent during the ceremony.",
        "Hey, please shut up while it's going on.",
    ),
    (
        "This vessel was constructed in the eighteenth century.",
        "They built that boat ages ago I guess",
    ),
    (
        "We have received numerous complaints concerning the noise.",
        "Loads of people keep whining about the noise",
    ),
    (
        "The establishment is located near the river and welcomes families.",
        "it's right by the river and kids are ok",
    ),
    ("Further information may be obtained from the department.", "Wanna know more? Just ask them!"),
]


@pytest.mark.parametrize("lower", [False, True])
def test_the_formal_text_of_a_pair_is_the_more_formal(lower: bool) -> None:
    formal, informal = (
        [text.lower() if lower else text for text in texts] for texts in zip(*PAIRS, strict=True)
    )
    reward = Formality(output="logit")
    assert (reward(formal) > reward(informal) + 1).all()


def test_log_odds_0_lies_between_the_two() -> None:
    formal, informal = zip(*PAIRS, strict=True)
    assert (Formality(output="prob")(formal) > 0.5).all()
    assert (Formality(output="prob")(informal) < 0.5).all()


def test_the_outputs_are_one_model_and_formal_false_is_the_complement() -> None:
    texts = [text for pair in PAIRS for text in pair]
    logit = Formality(output="logit")(texts).double()
    expected = [1 / (1 + math.exp(-x)) for x in logit.tolist()]
    torch.testing.assert_close(
        Formality(output="prob")(texts).double(), torch.tensor(expected).double(), rtol=0, atol=1e-6
    )
    log_prob = [math.log(p) for p in expected]
    torch.testing.assert_close(
        Formality()(texts).double(), torch.tensor(log_prob).double(), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        Formality(output="prob", formal=False)(texts), 1 - Formality(output="prob")(texts)
    )
    torch.testing.assert_close(
        Formality(output="logit", formal=False)(texts), -Formality(output="logit")(texts)
    )


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("contractions", "it's true that they don't and we'll see", math.log(4)),
        ("contractions", "It is John's dog", 0.0),
        ("contractions", "they do n't know", math.log(2)),
        ("exclamations", "wow!!", math.log(3)),
        ("emoticons", "nice :-) 😀", math.log(3)),
        ("first_person", "I saw my dog", 2 / math.sqrt(6)),
        ("passives", "The boat was slowly built and it was painted.", math.log(2)),
        ("log_sentence_length", "One two three. Four five six!", math.log(4)),
        ("log_sentence_length", "a " * 500, math.log(41)),
        ("latinate", "the information is available", 2 / 6),
        ("no_capitals", "a pub.", 1.0),
        ("no_capitals", "A pub.", 0.0),
        ("no_full_stop", "A pub", 1.0),
        ("no_full_stop", 'He said "A pub."', 0.0),
        ("lower_start", "the NHS", 1.0),
    ],
)
def test_features_by_hand(name: str, text: str, expected: float) -> None:
    assert features([text])[0, FEATURES.index(name)].item() == pytest.approx(expected)


def test_it_obeys_the_laws() -> None:
    check_reward(Formality(), [text for pair in PAIRS for text in pair])


def test_more_of_the_same_does_not_make_a_text_more_formal() -> None:
    once = PAIRS[0][0]
    values = Formality(output="logit")([once, " ".join([once] * 50)])
    assert values[1] - values[0] < 1


def test_an_unknown_output_is_named() -> None:
    with pytest.raises(UserError, match=r"^output: 'score' given, allowed: log_prob, logit, prob"):
        Formality(output="score")  # type: ignore[arg-type]
