"""`Length` by hand."""

import pytest

from dia_lightning.errors import UserError
from dia_lightning.rewards import Length, check_reward


def test_the_distance_to_the_target_by_hand() -> None:
    texts = ["one two three four", "one  two\nthree four five", "one", "", "a " * 12]
    assert Length(4)(texts).tolist() == [0.0, -0.25, -0.75, -1.0, -2.0]


def test_it_obeys_the_laws() -> None:
    check_reward(Length(3), ["A pub.", "A pub by the river.", "Food"])


@pytest.mark.parametrize("target", [0, -3])
def test_the_target_is_a_number_of_words(target: int) -> None:
    with pytest.raises(
        UserError,
        match=rf"^target: {target} given, allowed: a number of words from 1",
    ):
        Length(target)
