"""`check_reward` on rewards that each break one law; `call_reward`; the cache against the reward
that it wraps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dia_lightning.errors import UserError
from dia_lightning.rewards import check_reward
from dia_lightning.rewards.base import CachedReward, RewardError, call_reward
from dia_lightning.types import Record, Reward

FIRST, SECOND = "A first text.", "Another, SECOND text."
TEXTS = (FIRST, SECOND, "Short.")
GENERATOR = torch.Generator().manual_seed(0)


class FromFunction(Reward):
    """A reward out of any function, which may be wrong; counts what it was asked."""

    def __init__(self, function: Callable[[list[str]], object], deterministic: bool = True) -> None:
        self.function, self.name, self.deterministic = function, "mine", deterministic
        self.asked: list[list[str]] = []

    def __call__(self, texts: Sequence[str]) -> Tensor:
        self.asked.append(list(texts))
        return self.function(texts)  # type: ignore[arg-type, return-value]


def lengths(texts: Sequence[str]) -> Tensor:
    return torch.tensor([len(text) for text in texts], dtype=torch.float32)


def nan_where(text: str) -> Callable[[list[str]], Tensor]:
    return lambda texts: torch.tensor([float("nan") if t == text else 0.0 for t in texts])


def infinite_where(text: str) -> Callable[[list[str]], Tensor]:
    return lambda texts: torch.tensor([float("-inf") if t == text else 0.0 for t in texts])


def lower_in_place(texts: list[str]) -> Tensor:
    texts[:] = [text.lower() if text != FIRST else text for text in texts]
    return lengths(texts)


def append_in_place(texts: list[str]) -> Tensor:
    values = lengths(texts)
    texts.append("appended")
    return values


def sort_in_place(texts: list[str]) -> Tensor:
    texts.sort(reverse=True)
    return lengths(texts)


def centred(texts: list[str]) -> Tensor:
    return lengths(texts) - lengths(texts).mean() if texts else torch.zeros(0)


def padded(texts: list[str]) -> Tensor:
    """Depends on the longest text of the batch, as a network without an attention mask does."""
    return (
        lengths(texts) / max((len(text) for text in texts), default=1)
        if any(texts)
        else torch.zeros(len(texts))
    )


class Drifting:
    """The same batch gets another value at every call."""

    calls = 0

    def __call__(self, texts: list[str]) -> Tensor:
        self.calls += 1
        return lengths(texts) + self.calls


def distinct(texts: list[str]) -> Tensor:
    return lengths(sorted(set(texts)))


BROKEN = {
    "nothing": (lambda texts: None, "real numbers", FIRST),
    "a number": (lambda texts: 0.0, "real numbers", FIRST),
    "complex": (lambda texts: lengths(texts) * 1j, "real numbers", FIRST),
    "words": (lambda texts: [str(len(text)) for text in texts], "real numbers", FIRST),
    "array of words": (lambda texts: np.array([str(len(text)) for text in texts]), "real numbers",
     FIRST),
    "holes": (lambda texts: [None if text == SECOND else 0 for text in texts], "real numbers",
     FIRST),
    "list of rows": (lambda texts: [lengths([text]) for text in texts], "real numbers", FIRST),
    "array of rows": (lambda texts: np.zeros((len(texts), 1)), "one value a text", FIRST),
    "integer beyond float64": (lambda texts: [10**400 for _ in texts], "real numbers", FIRST),
    "beyond float32": (lambda texts: [1e300 if text == SECOND else 0.0 for text in texts], "finite",
     SECOND),
    "column": (lambda texts: lengths(texts)[:, None], "one value a text", FIRST),
    "scalar": (lambda texts: lengths(texts).sum(), "one value a text", FIRST),
    "duplicates merged": (distinct, "one value a text", FIRST),
    "other device": (lambda texts: lengths(texts).to("meta"), "real numbers", FIRST),
    "nan": (nan_where(SECOND), "finite", SECOND),
    "infinite": (infinite_where(SECOND), "finite", SECOND),
    "changes texts": (lower_in_place, "texts unchanged", SECOND),
    "appends a text": (append_in_place, "texts unchanged", "appended"),
    "sorts the texts": (sort_in_place, "texts unchanged", FIRST),
    "first character": (lambda texts: torch.tensor([float(ord(t[0])) for t in texts]),
     "empty string", ""),
    "mean word length": (
        lambda texts: lengths(texts) / torch.tensor([float(len(t.split())) for t in texts]),
                         "empty string", ""),
    "stacks": (lambda texts: torch.stack([torch.tensor(float(len(t))) for t in texts]),
     "empty batch", None),
    "at least one": (lambda texts: lengths(texts or [""]), "empty batch", None),
    "random": (lambda texts: torch.rand(len(texts), generator=GENERATOR), "deterministic", FIRST),
    "drifting": (Drifting(), "deterministic", FIRST),
    "position": (lambda texts: torch.arange(len(texts), dtype=torch.float32), "any order", FIRST),
    "centred": (centred, "batch = one by one", FIRST),
    "padded": (padded, "batch = one by one", FIRST),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_reward_is_named_with_its_law_and_the_first_text(case: str) -> None:
    function, law, text = BROKEN[case]
    with pytest.raises(RewardError) as caught:
        check_reward(FromFunction(function), TEXTS)
    message = str(caught.value)
    assert message.startswith(f"reward 'mine' breaks the law {law!r} on ")
    assert (f"the text {text!r}:" if text is not None else "the empty batch:") in message
    assert "\n" not in message


NUMBERS = {
    "float64": lambda texts: lengths(texts).double(),
    "float16": lambda texts: lengths(texts).half(),
    "bfloat16": lambda texts: lengths(texts).bfloat16(),
    "int64": lambda texts: lengths(texts).long(),
    "bool": lambda texts: lengths(texts) > 20,
    "with a gradient": lambda texts: lengths(texts).requires_grad_(),
    "list of float": lambda texts: [len(text) / 10 for text in texts],
    "list of int": lambda texts: [len(text) for text in texts],
    "tuple of 0-d tensors": lambda texts: tuple(torch.tensor(len(text)) for text in texts),
    "list of NumPy numbers": lambda texts: [np.float64(len(text)) for text in texts],
    "NumPy float64": lambda texts: np.array([len(text) / 10 for text in texts]),
    "NumPy float16": lambda texts: np.array([len(text) for text in texts], dtype=np.float16),
    "NumPy int": lambda texts: np.array([len(text) for text in texts]),
    "NumPy bool": lambda texts: np.array([len(text) > 20 for text in texts], dtype=bool),
}


@pytest.mark.parametrize("form", NUMBERS)
@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_numbers_of_any_type_and_form_become_float32(form: str, default: torch.dtype) -> None:
    """Also while a trainer has another precision as torch's default, which stays what it was."""
    torch.set_default_dtype(default)
    try:
        check_reward(FromFunction(NUMBERS[form]), TEXTS)
        values = call_reward(FromFunction(NUMBERS[form]), TEXTS)
        assert torch.get_default_dtype() == default
    finally:
        torch.set_default_dtype(torch.float32)
    assert (values.dtype, values.device.type, values.requires_grad) == (torch.float32, "cpu", False)
    assert values.tolist() == pytest.approx([float(value) for value in NUMBERS[form](TEXTS)])


def test_a_value_beyond_float32_says_so() -> None:
    with pytest.raises(RewardError, match=r"returned 1e\+300, beyond what float32 holds"):
        call_reward(FromFunction(lambda texts: np.full(len(texts), 1e300)), TEXTS)


def test_a_reward_that_obeys_passes_with_the_default_texts_and_with_ones_own() -> None:
    check_reward(FromFunction(lengths))
    check_reward(FromFunction(lengths), TEXTS)


def test_the_check_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    check_reward(FromFunction(lengths))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "function", [lambda texts: torch.rand(len(texts), generator=GENERATOR), Drifting(), centred]
)
def test_deterministic_false_excuses_from_the_laws_that_compare_calls(
    function: Callable[[list[str]], Tensor],
) -> None:
    check_reward(FromFunction(function, deterministic=False), TEXTS)


@pytest.mark.parametrize(
    "case", [c for c, (_, law, _) in BROKEN.items() if law in ("finite", "empty batch")]
)
def test_deterministic_false_excuses_from_no_other_law(case: str) -> None:
    function, law, _ = BROKEN[case]
    with pytest.raises(RewardError, match=f"the law '{law}'"):
        check_reward(FromFunction(function, deterministic=False), TEXTS)


@pytest.mark.parametrize(
    ("scale", "error", "passes"), [(1.0, 5e-6, True), (1.0, 5e-5, False), (1e4, 5e-2, True)]
)
def test_the_tolerance_is_1e_5_and_relative_for_large_values(
    scale: float, error: float, passes: bool
) -> None:
    reward = FromFunction(lambda texts: torch.full((len(texts),), scale + error * (len(texts) > 1)))
    if passes:
        check_reward(reward, TEXTS)
    else:
        with pytest.raises(RewardError, match="batch = one by one"):
            check_reward(reward, TEXTS)


@pytest.mark.parametrize("texts", [[], [""], [FIRST], [FIRST, FIRST, ""]])
def test_too_few_texts_to_tell_are_refused(texts: list[str]) -> None:
    with pytest.raises(ValueError, match="two different texts"):
        check_reward(FromFunction(lengths), texts)


def test_what_is_no_reward_is_refused() -> None:
    class Nameless(Reward):
        def __call__(self, texts: Sequence[str]) -> Tensor:
            return lengths(texts)

    with pytest.raises(RewardError, match=r"Nameless: must be a subclass .* sets `name`"):
        check_reward(Nameless())
    with pytest.raises(RewardError, match="function: must be a subclass"):
        check_reward(lengths)  # type: ignore[arg-type]


def test_an_error_of_the_rewards_own_names_the_text_that_raises_it() -> None:
    def fragile(texts: list[str]) -> Tensor:
        if SECOND in texts:
            raise ConnectionError("no answer\nand more")
        return lengths(texts)

    message = re.escape(f"failed on the text {SECOND!r}: ConnectionError: no answer")
    with pytest.raises(UserError, match=f"{message}$"):
        call_reward(FromFunction(fragile), TEXTS)
    with pytest.raises(UserError, match=message):
        check_reward(FromFunction(fragile), TEXTS)

    def small(texts: list[str]) -> Tensor:
        if len(texts) > 1:
            raise MemoryError
        return lengths(texts)

    with pytest.raises(UserError, match="failed on a batch of 3 that begins with"):
        call_reward(FromFunction(small), TEXTS)


def test_call_reward_returns_the_values_and_leaves_the_texts_alone() -> None:
    texts = list(TEXTS)
    torch.testing.assert_close(
        call_reward(FromFunction(lengths), texts), torch.tensor([13.0, 21.0, 6.0]), rtol=0, atol=0
    )
    with pytest.raises(RewardError, match="texts unchanged"):
        call_reward(FromFunction(lower_in_place), texts)
    assert texts == list(TEXTS)


def test_a_reward_error_is_a_users_error_and_cuts_a_long_text() -> None:
    long = "x" * 10_000
    with pytest.raises(UserError, match="the law 'finite' on the text 'xxx") as caught:
        call_reward(FromFunction(nan_where(long)), [FIRST, long])
    assert len(str(caught.value)) < 200


@given(st.lists(st.lists(st.sampled_from(["", "a", "bb", "ccc", "dddd"]), max_size=6), max_size=5))
def test_the_cache_equals_its_reward_and_asks_for_each_text_once(batches: list[list[str]]) -> None:
    inner = FromFunction(lengths)
    cached = CachedReward(inner)
    for batch in batches:
        torch.testing.assert_close(cached(batch), lengths(batch), rtol=0, atol=0)
    asked = [text for call in inner.asked for text in call]
    assert sorted(asked) == sorted({text for batch in batches for text in batch})
    assert [] not in inner.asked


def test_the_cache_keeps_the_name_the_exact_value_and_the_laws() -> None:
    third = CachedReward(FromFunction(lambda texts: torch.full((len(texts),), 1 / 3)))
    assert third.name == "mine"
    assert third([FIRST])[0].item() == torch.tensor(1 / 3).item()
    check_reward(CachedReward(FromFunction(lengths)))


def test_the_cache_remembers_nothing_of_a_call_that_failed() -> None:
    cached = CachedReward(FromFunction(nan_where(SECOND)))
    for _ in range(2):
        with pytest.raises(RewardError, match="'finite'"):
            cached([FIRST, SECOND])
    assert cached([FIRST]).tolist() == [0.0]


RECORDS: list[Record] = [{"source": "a first"}, {"source": "second"}, {"source": "third one"}]


class Conditional(Reward):
    """A conditional reward out of any function of texts and sources, which may be wrong; counts
    what it was asked.
    """

    name, conditional = "mine", True

    def __init__(self, function: Callable[[Sequence[str], list[Any]], Tensor]) -> None:
        self.function, self.asked = function, 0

    def __call__(self, texts: Sequence[str], records: Sequence[Record] = ()) -> Tensor:
        self.asked += len(texts)
        return self.function(texts, list(records))


def difference(texts: Sequence[str], records: list[Any]) -> Tensor:
    return lengths(texts) - lengths([record["source"] for record in records])


def first_record_for_all(texts: Sequence[str], records: list[Any]) -> Tensor:
    return lengths(texts) - (len(records[0]["source"]) if records else 0)


def records_by_position(texts: Sequence[str], records: list[Any]) -> Tensor:
    return lengths(texts) - lengths(
        [RECORDS[i % len(RECORDS)]["source"] for i in range(len(texts))]
    )


class ByTextInABatch:
    """Merges equal texts of a batch before it looks at the records."""

    def __call__(self, texts: Sequence[str], records: list[Any]) -> Tensor:
        by_text = dict(zip(texts, difference(texts, records).tolist(), strict=True))
        return torch.tensor([by_text[text] for text in texts])


def taken_off(texts: Sequence[str], records: list[Any]) -> Tensor:
    values = difference(texts, records)
    for record in records:
        record["seen"] = True
    return values


BROKEN_WITH_RECORDS = {
    "first record for all": (first_record_for_all, "any order"),
    "records by position": (records_by_position, "any order"),
    "merged by text": (ByTextInABatch(), "any order"),
    "records changed": (taken_off, "records unchanged"),
    "needs a text": (lambda t,
     r: difference([x[1:] for x in t], r) / torch.tensor([float(len(x) > 0) for x in t]),
                     "empty string"),
    "needs a batch": (lambda t, r: difference(t, r) - len(r[0]["source"]), "empty batch"),
    "not finite": (lambda t, r: difference(t, r) / 0.0, "finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_WITH_RECORDS)
def test_a_broken_conditional_reward_is_named_with_its_law(case: str) -> None:
    function, law = BROKEN_WITH_RECORDS[case]
    with pytest.raises(RewardError, match=f"reward 'mine' breaks the law '{law}' on "):
        check_reward(Conditional(function), TEXTS, [dict(record) for record in RECORDS])


def test_a_conditional_reward_that_obeys_passes() -> None:
    check_reward(Conditional(difference), TEXTS, RECORDS)
    check_reward(CachedReward(Conditional(difference)), TEXTS, RECORDS)


@pytest.mark.parametrize("records", [None, RECORDS[:2], [RECORDS[0]] * 3, []])
def test_too_few_records_to_tell_are_refused(records: list[Record] | None) -> None:
    with pytest.raises(
        ValueError, match="'mine' needs a record a text, two of them different; given"
    ):
        check_reward(Conditional(difference), TEXTS, records)


def test_records_are_for_conditional_rewards_only() -> None:
    check_reward(FromFunction(lengths), TEXTS, RECORDS)
    assert call_reward(FromFunction(lengths), [FIRST], RECORDS[:1]).tolist() == [13.0]


@given(st.lists(st.tuples(st.sampled_from(["", "a", "bb"]), st.sampled_from(RECORDS)), max_size=8))
def test_the_cache_tells_one_text_with_two_records_apart(pairs: list[tuple[str, Record]]) -> None:
    inner = Conditional(difference)
    cached = CachedReward(inner)
    texts, records = [text for text, _ in pairs], [dict(record) for _, record in pairs]
    for _ in range(2):
        torch.testing.assert_close(
            cached(texts, records), difference(texts, records), rtol=0, atol=0
        )
    assert inner.asked == len({(text, record["source"]) for text, record in pairs})


def test_the_cache_of_a_reward_without_condition_goes_by_the_text() -> None:
    inner = FromFunction(lengths)
    CachedReward(inner)([FIRST, FIRST], RECORDS[:2])
    assert inner.asked == [[FIRST]]
