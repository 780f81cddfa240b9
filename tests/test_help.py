"""`--model.help CLASS` and its like have a text for every option of every public class."""

import inspect
from collections.abc import Iterator
from types import ModuleType

import pytest
from jsonargparse import ArgumentParser

from dia_lightning import callbacks, data, rewards, samplers, training
from dia_lightning.sampling import positions

# Their arguments are being regrouped: remove a name when its Args are whole.
PARTS = (samplers, positions, data, callbacks, rewards, training)


def public(module: ModuleType) -> Iterator[type]:
    names = getattr(module, "__all__", [name for name in vars(module) if name[0] != "_"])
    for name in names:
        cls = getattr(module, name)
        if inspect.isclass(cls) and cls.__module__.startswith("dia_lightning"):
            yield cls


CLASSES = sorted(
    {cls for part in PARTS for cls in public(part) if not issubclass(cls, Exception | tuple)},
    key=lambda cls: cls.__name__,
)


def without_text(cls: type) -> list[str]:
    """The options of `cls` that its help names and does not explain."""
    parser = ArgumentParser()
    parser.add_class_arguments(cls, "part", fail_untyped=False)
    actions = [a for a in parser._actions if a.dest.startswith("part.")]
    return [a.dest for a in actions if len((a.help or "").split()) < 2]


def test_the_classes_are_there() -> None:
    names = {cls.__name__ for cls in CLASSES}
    assert {"GuidedSamplerModule", "PromptData", "Export", "Annealed", "Suffix", "Spans"} <= names
    assert {"DDIM", "CriticGuidance", "WeightedSum", "PPOModule"} <= names


def test_an_option_without_text_is_found() -> None:
    class Two:
        """Of two options one is explained.

        Args:
            first: some number.
        """

        def __init__(self, first: int = 1, second: int = 2) -> None:
            pass

    assert without_text(Two) == ["part.second"]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_option_has_text(cls: type) -> None:
    assert without_text(cls) == []
