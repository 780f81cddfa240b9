"""p_θ as a caller in Python gives it: by name, or as a model that is loaded already."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn

from dia_lightning.errors import UserError
from dia_lightning.lm.base_lm import BaseLM

_ALLOWED = "a name or folder, a pair (model, tokenizer) of transformers, or a BaseLM"


def as_base_lm(given: Any) -> BaseLM:
    """The `BaseLM` that `given` names or is.

    A loaded model is tried like a checkpoint (see `contract`). It is used through a copy that
    shares its weights: mode, `requires_grad`, device and hooks of the caller's stay as they are.

    Args:
        given: as for `BaseLM.load`; a causal language model and its tokenizer, as a pair; or a
            `BaseLM`.

    Raises:
        UserError: if it is none of these, or as for `BaseLM`.
    """
    if isinstance(given, str | Path):
        return BaseLM.load(str(given))
    if isinstance(given, BaseLM):
        lm = copy.copy(given)
        lm.model, lm.end_ids, lm._head = _sharing(given.model), list(given.end_ids), {}
        return lm
    pair = given if isinstance(given, list | tuple) else ()
    if (
        len(pair) != 2
        or not isinstance(pair[0], nn.Module)
        or not hasattr(pair[1], "backend_tokenizer")
    ):
        kinds = ", ".join(type(item).__name__ for item in pair) or type(given).__name__
        raise UserError(f"base_lm: {kinds} given, allowed: {_ALLOWED}")
    model, tokenizer = pair
    return BaseLM(
        _sharing(model), tokenizer, getattr(model, "name_or_path", "") or type(model).__name__
    )


def _sharing(model: nn.Module) -> Any:
    """A copy of `model` with the same weights in memory; those of a quantised one are copied."""
    memo: dict[int, Any] = {id(buffer): buffer.detach() for buffer in model.buffers()}
    for weight in model.parameters():
        if type(weight) is nn.Parameter:
            memo[id(weight)] = nn.Parameter(weight.detach(), requires_grad=False)
    return copy.deepcopy(model, memo)
