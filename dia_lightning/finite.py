"""NaN and infinity where a number is needed: said in one line, with the batch in which they arose saved for a look."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dia_lightning.resources import UserError, in_place

_N_NAMED = 8


class NotFinite(UserError):
    """A quantity that must be finite is not."""

    def complete(self, place: str, folder: str | Path, tensors: Mapping[str, Tensor], hint: str = "") -> None:
        """Add to the message where in the run that was, and put `tensors` into a file in `folder`, which it names."""
        from safetensors.torch import save_file

        file = Path(folder) / f"not_finite_{place.replace(' ', '_')}.safetensors"
        kept, on_cpu = f"the batch is in {file}", {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with in_place(file) as partial:
                save_file(on_cpu, partial, {"error": str(self)})
        except OSError as error:
            kept = f"the batch could not be saved: {error}"
        self.args = (f"{self} ({place}; {kept}){hint}",)


class FirstTime:
    """When rows of a batch were first not finite, by quantity; noted on the device, so that nothing waits until `check`."""

    def __init__(self) -> None:
        self._steps: dict[str, Tensor] = {}

    def note(self, quantity: str, wrong: Tensor, step: int) -> None:
        """`wrong` (B,) bool: the rows in which the quantity is not finite in this step, counted from 1."""
        first = self._steps.get(quantity, torch.zeros_like(wrong, dtype=torch.int64))
        self._steps[quantity] = torch.where(wrong & (first == 0), step, first)

    def check(self, unit: str) -> None:
        """Waits for the device, once.

        Raises:
            NotFinite: naming the quantity, the step, in `unit`s, and the rows that were the first, if any were.
        """
        steps = torch.stack(list(self._steps.values())).tolist() if self._steps else []
        found = [(min(filter(None, row)), quantity, row) for quantity, row in zip(self._steps, steps, strict=True) if any(row)]
        if found:
            first, quantity, row = min(found, key=lambda item: item[0])
            rows = named_rows([i for i, step in enumerate(row) if step == first], len(row))
            raise NotFinite(f"{quantity} is NaN or infinite in {unit} {first}, {rows}")


def named_rows(rows: list[int], n: int) -> str:
    """Which of a batch's `n` rows, counted from 0, for a message."""
    if len(rows) == n > 1:
        return f"all {n} rows"
    more = f" and {len(rows) - _N_NAMED} more" if len(rows) > _N_NAMED else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:_N_NAMED]))}{more} of {n}"
