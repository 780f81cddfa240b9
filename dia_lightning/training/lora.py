"""Low-rank adapters (LoRA, Hu et al., arXiv:2106.09685) by way of peft, which is an optional
extra.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch

from dia_lightning.errors import UserError, require


def add_adapters(model: Any, rank: int, seed: int) -> Any:
    """A peft model around `model`, whose linear layers but the head become W + 2 B A, in place;
    only A and B are trained.

    B begins at zero, so that nothing changes yet; A is drawn from `seed`.

    Args:
        rank: columns of B and rows of A.

    Raises:
        UserError: if rank is below 1, or peft cannot be imported.
    """
    require("lora_rank", rank, rank >= 1, "1 or more, or null to train all weights")
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError(
            f"lora_rank: {rank} given, allowed: null; peft is not installed ({error}), pip install"
            " 'dia-lightning[lora]'"
        ) from error
    from transformers.pytorch_utils import Conv1D

    # GPT-2's layers keep their weights as (in, out).
    transposed = any(isinstance(layer, Conv1D) for layer in model.modules())
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", fan_in_fan_out=transposed
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def merged(adapted: Any) -> Any:
    """A model of the plain architecture with the adapters added to its weights; `adapted` stays
    as it is.
    """
    return deepcopy(adapted).merge_and_unload()
