"""Draws from categorical distributions, exact also where the vocabulary is large."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dia_lightning.errors import UserError
from dia_lightning.files import in_place


def draw_categorical(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One draw from softmax(logits) per row, (…, V) → (…) int64, by inversion in float64.

    `torch.multinomial` gives the same law at twenty times the cost on a CPU; float32 sums would
    lower the temperature. Of a large vocabulary, sums of 256 tokens (float32, as few add up no
    error) are inverted first, then one such block.
    """
    u = torch.rand(
        logits.shape[:-1], generator=generator, device=logits.device, dtype=torch.float64
    )
    n_tokens = logits.shape[-1]
    if n_tokens < 4096:
        cumulative = logits.double().softmax(-1).cumsum(-1)
        # Scaled by the last value, which is 1 but for rounding, so that no draw falls beyond the
        # vocabulary.
        return _invert(cumulative, u * cumulative[..., -1])
    logits = logits if logits.dtype == torch.float64 else logits.float()
    weights = (logits - logits.amax(-1, keepdim=True)).float().exp()
    blocks = F.pad(weights, (0, -n_tokens % 256)).unflatten(-1, (-1, 256))
    cumulative = blocks.sum(-1).double().cumsum(-1)
    u = u * cumulative[..., -1]
    block = _invert(cumulative, u)
    before = F.pad(cumulative, (1, 0)).gather(-1, block[..., None])[..., 0]
    inner = (
        blocks.gather(-2, block[..., None, None].expand(*block.shape, 1, 256))[..., 0, :]
        .double()
        .cumsum(-1)
    )
    return (256 * block + _invert(inner, u - before)).clamp_max(n_tokens - 1)


def _invert(cumulative: Tensor, u: Tensor) -> Tensor:
    """The first index whose cumulative sum (…, N) exceeds u (…)."""
    found = torch.searchsorted(cumulative, u[..., None], right=True)[..., 0]
    return found.clamp_max(cumulative.shape[-1] - 1)


_N_NAMED = 8


class NotFinite(UserError):
    """A quantity that must be finite is not."""

    def complete(
        self, place: str, folder: str | Path, tensors: Mapping[str, Tensor], hint: str = ""
    ) -> None:
        """Add to the message where in the run that was, and put `tensors` into a file in
        `folder`, which it names.
        """
        from safetensors.torch import save_file

        file = Path(folder) / f"not_finite_{place.replace(' ', '_')}.safetensors"
        kept, on_cpu = (
            f"the batch is in {file}",
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
        )
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with in_place(file) as partial:
                save_file(on_cpu, partial, {"error": str(self)})
        except OSError as error:
            kept = f"the batch could not be saved: {error}"
        self.args = (f"{self} ({place}; {kept}){hint}",)


class FirstTime:
    """When rows of a batch were first not finite, by quantity; noted on the device, so that
    nothing waits until `check`.
    """

    def __init__(self) -> None:
        self._steps: dict[str, Tensor] = {}

    def note(self, quantity: str, wrong: Tensor, step: int) -> None:
        """`wrong` (B,) bool: the rows in which the quantity is not finite in this step, counted
        from 1.
        """
        first = self._steps.get(quantity, torch.zeros_like(wrong, dtype=torch.int64))
        self._steps[quantity] = torch.where(wrong & (first == 0), step, first)

    def check(self, unit: str) -> None:
        """Waits for the device, once.

        Raises:
            NotFinite: naming the quantity, the step, in `unit`s, and the rows that were the first,
                if any were.
        """
        steps = torch.stack(list(self._steps.values())).tolist() if self._steps else []
        found = [
            (min(filter(None, row)), quantity, row)
            for quantity, row in zip(self._steps, steps, strict=True)
            if any(row)
        ]
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


@contextmanager
def float32_default() -> Iterator[None]:
    """New tensors are float32: a step of such a trainer has its own precision as torch's
    default.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


class KeepsBuffers(nn.Module):
    """A module whose buffers, also those of its parts, keep their precision when its weights change
    theirs.

    They are p_θ's embeddings, noise schedules, rotary frequencies and running means: too coarse for
    16 bits.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = [
            (part, name, kept) for part in self.modules() for name, kept in part._buffers.items()
        ]
        super()._apply(fn, recurse)
        for part, name, kept in before:
            moved = part._buffers[name]
            if kept is not None and moved is not None and moved.dtype != kept.dtype:
                part._buffers[name] = kept.to(moved.device)
        return self
