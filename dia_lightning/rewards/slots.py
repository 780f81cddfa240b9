"""Whether a text says what its meaning representation says: slot errors on the E2E restaurant
data.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dia_lightning.rewards.base import RewardError, field_of
from dia_lightning.types import Record, Reward

_PAIR = re.compile(r"([^\[\],]+)\[([^\]]*)\]")
_KIDS = (
    r"(?:kids?|child(?:ren)?s?|famil(?:y|ies)(?: with (?:\w+ )?(?:kids|children))?|all ages|young"
    r" ones)"
)
_FRIENDLY = r"(?:friendly|orient(?:at)?ed|suitable|appropriate|welcoming)"
_NOT = r"(?:not|\w+n't|non|no|isnt|never|un)"
_RATED = r"(?:ratings?|rated|rates?|reviews?|reviewed|scores?|scored|quality|standards?|feedback)"
_PRICED = r"(?:prices?|priced|pricing|costs?|cost range)"
_LOW, _MID, _HIGH = ("cheap", "less than £20"), ("moderate", "£20-25"), ("high", "more than £30")
_POOR, _FAIR, _GOOD = ("low", "1 out of 5"), ("average", "3 out of 5"), ("high", "5 out of 5")


def _of(number: str) -> str:
    return (
        rf"{number}(?:(?:[- ]out)?[- ](?:of|from)(?: a)?|[- ]out| ?/)[- ]?(?:5|five)(?:[-"
        rf" ]stars?)?|{number}[- ]stars?"
    )


def _near_words(words: str, noun: str) -> str:
    """`words` a few words before or after `noun`, in one clause."""
    between = r"(?:[- ]+(?!and\b|but\b)\w+)"
    return (
        rf"(?:{words})(?:ly)?{between}{{0,2}}?[- ]+{noun}|{noun}{between}{{0,3}}?[- ]+(?:{words})"
    )


_TO_KIDS = rf"(?:to|for|with|towards?) (?:\w+ )?{_KIDS}"
_WELCOME = r"(?:\w+ )?(?:welcomed?|allowed|accepted)"
_TAKES = r"(?:for|with|brings?|welcom\w+|allow\w*|accept\w*|accommodat\w+|suits?|enjoy\w*)"
_PLACE = r"(?:places?|venues?|environments?|establishments?|atmospheres?)"
_POUNDS = r"(?:£|pounds?)? ?"
_MIDDLE = "moderate|reasonable|reasonably|average|averagely|mid|middle|medium|fair|ok|okay|decent"
_BEST = (
    "high|highly|highest|higher|excellent|great|very good|very well|top|outstanding|best|perfect"
)

# slot → [(pattern, the values that it may stand for)]. What a pattern leaves open is read as the
# record's value.
_PATTERNS: dict[str, list[tuple[str, tuple[str, ...]]]] = {
    "eattype": [
        (r"coffee[- ]*(?:shops?|house|place|bar)|cafes?|coffee", ("coffee shop",)),
        (r"pubs?", ("pub",)),
        (r"restaurants?", ("restaurant",)),
    ],
    "food": [
        (r"chinese", ("Chinese",)),
        (r"english|british", ("English",)),
        (r"fast[- ]?foods?", ("Fast food",)),
        (r"french", ("French",)),
        (r"indian", ("Indian",)),
        (r"italian", ("Italian",)),
        (r"japanese|sushi", ("Japanese",)),
    ],
    "area": [
        (r"(?:city|town)[- ]*(?:cent(?:re|er)|central)|(?:cent(?:re|er)|middle|heart) of (?:the |a )?(?:city|town)"
         r"|in the cent(?:re|er)|central(?:ly)? (?:in|of) (?:the )?(?:city|town)|downtown",
         ("city centre",)),
        (r"river[- ]?sides?|(?:near|by|at|to|along|on|off|beside|alongside|of|overlooking) (?:the )?river(?:[- ]?bank)?",
         ("riverside",)),
    ],
    "familyfriendly": [
        (rf"{_KIDS}[- ]*(?:and {_KIDS}[- ]*)?{_FRIENDLY}|{_FRIENDLY} {_TO_KIDS}|{_TAKES} (?:\w+ ){{0,2}}{_KIDS}"
         rf"|{_KIDS} (?:\w+ )?(?:are|is) {_WELCOME}|{_KIDS} {_PLACE}|all ages", ("yes",)),
        (rf"{_NOT}[- ]*(?:\w+ ){{0,4}}?(?:{_KIDS}[- ]*)?{_FRIENDLY}(?: {_TO_KIDS})?"
         rf"|{_NOT} (?:\w+ ){{0,5}}?{_KIDS}(?:[- ]{_FRIENDLY})?|{_KIDS}[- ]*(?:un|non[- ]?|not[- ]){_FRIENDLY}"
         rf"|{_KIDS} (?:are|is)(?:n't| not| never) {_WELCOME}|un{_FRIENDLY} {_TO_KIDS}|only (?:for )?adults?"
         rf"|adults?[- ](?:oriented )?(?:only|pub|restaurant|{_PLACE})", ("no",)),
    ],
    "pricerange": [
        (rf"(?:inexpensive|cheap(?:er|est)?)(?:ly)?|low[- ]*(?:er[- ])?cost|budget|{_near_words('low|lower', _PRICED)}", _LOW),
        (r"affordabl[ey]|not expensive", (*_LOW, *_MID)),
        (rf"{_near_words(_MIDDLE, _PRICED)}|mid[- ]?(?:dle)?[- ]?(?:priced?|range)",
         (*_MID, "less than £20")),
        (rf"(?:less than|under|below|lower than|cheaper than|up to|maximum of) {_POUNDS}20(?: ?pounds)?", ("less than £20",)),
        (rf"{_POUNDS}20 ?(?:-|to|and) ?{_POUNDS}25(?: ?pounds)?", ("£20-25",)),
        (rf"(?:more than|over|above|upwards of|higher than|greater than|exceed\w*) {_POUNDS}30(?: ?pounds)?|£ ?30",
         ("more than £30",)),
        (rf"(?:expensive|pricey|pricy|costly|high[- ]end|upscale)(?:ly)?|{_near_words('high|higher', _PRICED)}", _HIGH),
        (r"not cheap", (*_HIGH, *_MID)),
    ],
    "customerrating": [
        (_of("(?:1|one)"), _POOR),
        (_of("(?:3|three)"), _FAIR),
        (_of("(?:5|five)"), _GOOD),
        (_near_words("low|lowest|lower|poor|poorest|bad|badly|terrible|not good|not well|n't good|n't well", _RATED), _POOR),
        (_near_words("average|mediocre|decent|medium|ok|okay|mid|middle|moderate", _RATED), _FAIR),
        (_near_words("good|well", _RATED), (*_FAIR, *_GOOD)),
        (_near_words(_BEST, _RATED), _GOOD),
    ],
}  # fmt: skip
_VENUES = {
    "name": (
        "Alimentum|Aromi|Bibimbap House|Blue Spice|Browns"
        " Cambridge|Clowns|Cocum|Cotto|Fitzbillies|Giraffe|Green Man|Loch Fyne|Midsummer"
        " House|Strada|Taste of Cambridge|The Cambridge Blue|The Cricketers|The Dumpling Tree|The"
        " Eagle|The Golden Curry|The Golden Palace|The Mill|The Olive Grove|The Phoenix|The"
        " Plough|The Punter|The Twenty Two|The Vaults|The Waterman|The Wrestlers|Travellers Rest"
        " Beefeater|Wildwood|Zizzi"
    ),
    "near": (
        "All Bar One|Avalon|Burger King|Café Adriatic|Café Brazil|Café Rouge|Café Sicilia|Clare"
        " Hall|Crowne Plaza Hotel|Express by Holiday Inn|Rainbow Vegetarian Café|Raja Indian"
        " Cuisine|Ranch|The Bakers|The Portland Arms|The Rice Boat|The Six Bells|The"
        " Sorrento|Yippee Noodle Bar"
    ),
}


class SlotErrors(NamedTuple):
    """Errors of a text against its meaning representation; the slot error rate is (missed + wrong)
    / n_slots.

    missed: slots of which the text says nothing. wrong: slots with another value than they should
        have, and values said
    of slots that the representation does not have. n_slots: slot-value pairs in the representation.
    """

    missed: int
    wrong: int
    n_slots: int


def parse_mr(mr: str) -> list[tuple[str, str]]:
    """The (slot, value) pairs of "name[The Vaults], food[French]", both without accents, in
    lower case, slots unspaced.
    """
    return [
        (re.sub(r"[\s_]", "", _plain(slot)), _plain(value)) for slot, value in _PAIR.findall(mr)
    ]


def slot_errors(mr: str, text: str) -> SlotErrors:
    """Compare what `text` says with the meaning representation `mr`, by patterns for each slot and
    value; case is ignored.

    The method is that of Dušek, Howcroft and Rieser (INLG 2019) for cleaning the E2E data, with
    patterns of our own. A phrase that may stand for several values ("low price": cheap, or less
    than £20) is read as the right one of them, and a phrase within a longer one ("family friendly"
    in "not family friendly") does not count. Unlike there, saying a thing twice is no error. A
    value without pattern is looked for as it is written.

    Raises:
        ValueError: if `mr` holds no slot[value] pair.
    """
    pairs = parse_mr(mr)
    if not pairs:
        raise ValueError(f"no slot[value] pair in {mr!r:.60}")
    wanted: defaultdict[str, set[str]] = defaultdict(set)
    for slot, value in pairs:
        wanted[slot].add(value)
    said: defaultdict[str, set[str]] = defaultdict(set)
    for slot, values in _mentions(_plain(text), frozenset(pairs)):
        said[slot].add(next((value for value in values if value in wanted[slot]), values[0]))
    missed = wrong = 0
    for slot in wanted.keys() | said.keys():
        n_absent, n_other = len(wanted[slot] - said[slot]), len(said[slot] - wanted[slot])
        # One wrong value in the place of a right one is one error.
        missed, wrong = missed + max(n_absent - n_other, 0), wrong + n_other
    return SlotErrors(missed, wrong, sum(map(len, wanted.values())))


class SlotConsistency(Reward):
    """1 − slot error rate, at least 0: 1 where the text says every slot of the meaning
    representation and no other.

    Args:
        field: Field of the record with the meaning representation, such as "name[The Vaults],
            food[French]".
        name: Label in outputs.
    """

    conditional = True
    on_prefix = False

    def __init__(self, field: str = "mr", name: str = "slots") -> None:
        self.field, self.name = field, name

    def __call__(self, texts: Sequence[str], records: Sequence[Record] = ()) -> Tensor:
        mrs = [field_of(record, self.field, self) for record in records]
        rates = torch.tensor(
            [self._rate(mr, text) for text, mr in zip(texts, mrs, strict=True)], dtype=torch.float32
        )
        return 1 - rates.clamp_max(1)

    def _rate(self, mr: str, text: str) -> float:
        try:
            missed, wrong, n_slots = slot_errors(mr, text)
        except ValueError as error:
            raise RewardError(
                f"reward {self.name!r} needs slots in the field {self.field!r}, as in name[Aromi]:"
                f" {error}"
            ) from error
        return (missed + wrong) / n_slots


class SlotErrorRate(SlotConsistency):
    """−(missed + wrong) / slots, 0 for a text without error: `SlotConsistency` without its lower
    bound.

    Args:
        field: Field of the record with the meaning representation, such as "name[The Vaults],
            food[French]".
        name: Label in outputs.
    """

    def __init__(self, field: str = "mr", name: str = "slot_error_rate") -> None:
        super().__init__(field, name)

    def __call__(self, texts: Sequence[str], records: Sequence[Record] = ()) -> Tensor:
        mrs = [field_of(record, self.field, self) for record in records]
        return -torch.tensor(
            [self._rate(mr, text) for text, mr in zip(texts, mrs, strict=True)], dtype=torch.float32
        )


def _plain(text: str) -> str:
    """Lower case without accents, white space and apostrophes of one kind; £ and dashes as
    written most often.
    """
    text = unicodedata.normalize("NFKD", text.casefold().replace("’", "'"))
    text = "".join(character for character in text if not unicodedata.combining(character))
    return " ".join(re.sub("[‐-―−]", "-", text).split())


@lru_cache(maxsize=1)
def _compiled() -> list[tuple[str, re.Pattern[str], tuple[str, ...]]]:
    venues = [
        (slot, re.escape(_plain(v)), (_plain(v),))
        for slot, names in _VENUES.items()
        for v in names.split("|")
    ]
    phrases = [
        (slot, pattern, tuple(map(_plain, values)))
        for slot, rows in _PATTERNS.items()
        for pattern, values in rows
    ]
    return [(slot, _whole(pattern), values) for slot, pattern, values in [*venues, *phrases]]


@lru_cache(maxsize=4096)
def _literal(value: str) -> re.Pattern[str]:
    return _whole(re.escape(value))


def _whole(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w)(?:{pattern})(?!\w)")


def _mentions(text: str, pairs: frozenset[tuple[str, str]]) -> list[tuple[str, tuple[str, ...]]]:
    """(slot, values that it may be) of every phrase found that is not part of a longer one."""
    known = {(slot, value) for slot, _, values in _compiled() for value in values}
    literals = [
        (slot, _literal(value), (value,)) for slot, value in pairs if (slot, value) not in known
    ]
    found = [
        (match.start(), match.end(), slot, values)
        for slot, pattern, values in [*literals, *_compiled()]
        for match in pattern.finditer(text)
    ]
    found.sort(key=lambda mention: (mention[0], -mention[1]))
    kept: list[tuple[str, tuple[str, ...]]] = []
    span = (0, 0)
    for start, end, slot, values in found:
        if end > span[1] or (start, end) == span:
            kept.append((slot, values))
            span = (start, end)
    return kept
