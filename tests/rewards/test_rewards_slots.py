"""Slot errors by hand: what is said, what is missed, what is invented, in the words people use."""

from __future__ import annotations

import random

import pytest

from dia_lightning.rewards import SlotConsistency, check_reward
from dia_lightning.rewards.base import RewardError, call_reward
from dia_lightning.rewards.slots import slot_errors

MR = (
    "name[The Vaults], eatType[pub], priceRange[more than £30], customer rating[5 out of 5],"
    " near[Café Adriatic], familyFriendly[yes], area[riverside], food[French]"
)
RIGHT = (
    "The Vaults is a French pub by the river, close to Café Adriatic. It is child-friendly, rated 5"
    " out of 5 stars, and costs more than £30."
)


def pairs() -> list[tuple[str, str]]:
    """Twelve representations with a text written for each."""
    return [
        (MR, RIGHT),
        (MR, RIGHT.lower().replace("é", "e")),
        (
            "name[Cocum], eatType[coffee shop], familyFriendly[no]",
            "Cocum is a coffee shop that does not welcome children.",
        ),
        (
            "name[Aromi], customer rating[low], priceRange[cheap]",
            "Aromi has low prices, but its reviews are poor.",
        ),
        (
            "name[Aromi], customer rating[1 out of 5], priceRange[high]",
            "The expensive Aromi got one star out of five, 1 star.",
        ),
        (
            "name[The Mill], priceRange[£20-25], area[city centre]",
            "In the centre of the city, The Mill asks £20 – £25.",
        ),
        (
            "name[The Mill], priceRange[moderate], food[English]",
            "the mill serves british food at a reasonable price",
        ),
        (
            "name[Zizzi], customer rating[average], near[Burger King]",
            "Zizzi, near Burger King, has an average rating.",
        ),
        (
            "name[Wildwood], near[Raja Indian Cuisine], eatType[restaurant]",
            "Wildwood, a restaurant near Raja Indian Cuisine.",
        ),
        (
            "name[Giraffe], near[Rainbow Vegetarian Café]",
            "You find Giraffe beside the Rainbow Vegetarian Café.",
        ),
        (
            "name[Green Man], familyFriendly[no], food[Fast food]",
            "The fast food at Green Man isn't for families: adults only.",
        ),
        (
            "name[Strada], priceRange[less than £20], familyFriendly[yes]",
            "Strada is family friendly and under £20.",
        ),
    ]


@pytest.mark.parametrize(("mr", "text"), pairs())
def test_a_text_written_for_its_representation_has_no_error(mr: str, text: str) -> None:
    errors = slot_errors(mr, text)
    assert errors == (0, 0, mr.count("["))


def test_texts_for_others_have_errors() -> None:
    mrs, texts = zip(*pairs()[1:], strict=True)
    for shift in range(1, len(mrs)):
        for mr, text in zip(mrs, texts[shift:] + texts[:shift], strict=True):
            assert sum(slot_errors(mr, text)[:2]) > 0, (mr, text)


@pytest.mark.parametrize(
    ("said", "instead", "missed", "wrong"),
    [
        ("French ", "", 1, 0),
        ("French", "Italian", 0, 1),
        ("French", "French and Italian", 0, 1),
        ("pub", "restaurant", 0, 1),
        ("The Vaults", "It", 1, 0),
        ("The Vaults", "The Eagle", 0, 1),
        ("Café Adriatic", "Café Rouge", 0, 1),
        ("child-friendly", "not child-friendly", 0, 1),
        ("child-friendly", "not suitable for families with young children", 0, 1),
        ("child-friendly", "quiet", 1, 0),
        ("5 out of 5", "1 out of 5", 0, 1),
        ("5 out of 5 stars", "highly", 0, 0),
        ("by the river", "in the city centre", 0, 1),
        ("costs more than £30", "is cheap", 0, 1),
        ("costs more than £30", "is expensive", 0, 0),
        (RIGHT, "", 8, 0),
        (RIGHT, RIGHT + RIGHT, 0, 0),
    ],
)
def test_each_change_counts_once(said: str, instead: str, missed: int, wrong: int) -> None:
    assert said in RIGHT
    assert slot_errors(MR, RIGHT.replace(said, instead)) == (missed, wrong, 8)


def test_an_invented_slot_is_wrong() -> None:
    assert slot_errors("name[Aromi]", "Aromi is a family friendly coffee shop.") == (0, 2, 1)


def test_a_slot_with_two_values_wants_both() -> None:
    mr = "name[Aromi], eatType[pub], eatType[restaurant]"
    assert slot_errors(mr, "Aromi is a pub and a restaurant.") == (0, 0, 3)
    assert slot_errors(mr, "Aromi is a pub.") == (1, 0, 3)
    assert slot_errors(mr, "Aromi is a pub and a coffee shop.") == (0, 1, 3)


def test_a_value_without_pattern_is_looked_for_as_written() -> None:
    mr = "name[The Snug], food[Thai], developer[Valve]"
    assert slot_errors(mr, "the snug, by VALVE, serves Thai food") == (0, 0, 3)
    assert slot_errors(mr, "The Snuggery serves Thailand") == (3, 0, 3)


def test_no_order_of_the_slots_matters() -> None:
    slots = MR.split(", ")
    random.Random(0).shuffle(slots)
    assert slot_errors(", ".join(slots), RIGHT.replace("French", "Italian")) == (0, 1, 8)


def test_the_reward_by_hand_and_never_below_0() -> None:
    texts = [
        RIGHT,
        RIGHT.replace("French", "Italian"),
        "",
        "The Vaults is a restaurant with French food.",
        "A pub.",
    ]
    assert SlotConsistency()(texts, [{"mr": MR}] * 5).tolist() == pytest.approx(
        [1, 7 / 8, 0, 2 / 8, 1 / 8]
    )
    assert SlotConsistency()(["A cheap pub."], [{"mr": "name[Aromi]"}]).tolist() == [0]


def test_it_obeys_the_laws() -> None:
    check_reward(SlotConsistency(), [RIGHT, "Aromi is a pub."], [{"mr": MR}, {"mr": "name[Aromi]"}])


def test_a_field_without_slots_is_named() -> None:
    with pytest.raises(
        RewardError,
        match=r"'slots' needs slots in the field 'mr', .*: no slot\[value\] pair in 'A pub\.'",
    ):
        call_reward(SlotConsistency(), ["A pub."], [{"mr": "A pub."}])
    with pytest.raises(RewardError, match="needs the field 'mr'"):
        call_reward(SlotConsistency(), ["A pub."])
