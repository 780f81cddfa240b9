"""The arguments of `dia.sample`: what they may be, and prompts as the data module wants them."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from dia_lightning.errors import UserError
from dia_lightning.files import require_path
from dia_lightning.lm.base_lm import BaseLM
from dia_lightning.samplers import Sampler

_PROMPTS = "a string, a list of strings, messages, a list of messages, a Path to a file, or None"


def check_kinds(sampler: Any, flags: Mapping[str, Any]) -> None:
    """Raises the UserError of a sampler or flag that is none."""
    if sampler is not None and not isinstance(sampler, Sampler):
        shown = f"the class {sampler.__name__}" if isinstance(sampler, type) else f"{sampler!r:.60}"
        raise UserError(f"sampler: {shown} given, allowed: a sampler, as dia.BestOfN(16), or None")
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise UserError(f"{name}: {value!r:.60} given, allowed: True or False")


def path_of(name: str, value: Any) -> str | None:
    """`value` as a string; UserError where it is no path."""
    if value is not None and not isinstance(value, str | Path):
        raise UserError(f"{name}: {value!r:.60} given, allowed: a folder or .ckpt file, or None")
    return None if value is None else str(value)


def numeric(name: str, value: Any) -> float:
    """`value` as a float; UserError where it is no real number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UserError(f"{name}: {value!r:.60} given, allowed: a number")
    return float(value)


def whole(name: str, value: Any, least: int = 1) -> int:
    """`value` as an int; UserError where it is none, or below `least`."""
    try:
        found = operator.index(value)
    except TypeError:
        found = least - 1
    if isinstance(value, bool) or found < least:
        raise UserError(f"{name}: {value!r:.60} given, allowed: a whole number, {least} or more")
    return found


def device_of(given: Any, base_lm: Any) -> torch.device:
    """The device `given`; where it is None, a loaded model's own, else CUDA where there is one."""
    if given is None:
        loaded = base_lm[0] if isinstance(base_lm, list | tuple) and base_lm else base_lm
        given = getattr(loaded, "device", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(given)
    except (RuntimeError, TypeError):
        device = torch.device("meta")
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(f"device: {given!s:.60} given, allowed: cpu, cuda or cuda:NUMBER")
    found = torch.cuda.device_count()
    if (device.index or 0) >= found:
        raise UserError(f"device: {device} given, there are {found} CUDA devices")
    return torch.device(
        "cuda", torch.cuda.current_device() if device.index is None else device.index
    )


def prompt_list(prompts: Any) -> Any:
    """A list of strings or of conversations, the path of a file, or None.

    Raises:
        UserError: if `prompts` is none of these.
    """
    if prompts is None:
        return None
    if isinstance(prompts, Path):
        return str(require_path(prompts, "prompts"))
    if isinstance(prompts, str):
        prompts = [prompts]
    if isinstance(prompts, Mapping) or not hasattr(prompts, "__iter__"):
        raise UserError(f"prompts: {type(prompts).__name__} given, allowed: {_PROMPTS}")
    listed = list(prompts)
    if listed and all(isinstance(item, Mapping) for item in listed):
        listed = [listed]  # one conversation
    for item in listed:
        if not isinstance(item, str) and (isinstance(listed[0], str) or not _is_conversation(item)):
            raise UserError(f"prompts: {item!r:.60} in the list, allowed: {_PROMPTS}")
        if isinstance(item, str) and not isinstance(listed[0], str):
            raise UserError(f"prompts: {item!r:.60} among messages, allowed: {_PROMPTS}")
    if len(listed) == 1 and isinstance(listed[0], str) and _is_file(listed[0]):
        raise UserError(
            f"prompts: {listed[0]} is a file; to read prompts from it, give Path({listed[0]!r})"
        )
    return listed


def _is_conversation(item: Any) -> bool:
    return isinstance(item, list | tuple) and bool(item) and all(map(_is_message, item))


def _is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and all(
        isinstance(item.get(key), str) for key in ("role", "content")
    )


def _is_file(text: str) -> bool:
    return len(text) < 256 and "\0" not in text and Path(text).suffix != "" and Path(text).is_file()


def is_chat(listed: Any) -> bool:
    """Whether `prompt_list` gave conversations."""
    return isinstance(listed, list) and bool(listed) and not isinstance(listed[0], str)


def chat_prompts(listed: Any, lm: BaseLM) -> Any:
    """Conversations as the chat template writes them, up to the answer; all else as it is.

    The start token is left out: p_θ gets it anyway. An answer that is begun goes on.

    Raises:
        UserError: if there is no such template, or it refuses a conversation.
    """
    if not is_chat(listed):
        return listed
    tokenizer = lm.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"prompts: messages given, but the tokenizer of {lm.name} has no chat template; "
            "allowed: strings"
        )
    first = tokenizer.convert_ids_to_tokens(lm.bos_id)
    written = []
    for messages in listed:
        begun = messages[-1]["role"] == "assistant"
        try:
            text = tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=not begun,
                continue_final_message=begun,
            )
        except Exception as error:  # whatever the template raises
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"prompts: the chat template of {lm.name} refuses {messages!r:.60} ({reason:.120})"
            ) from error
        written.append(text.removeprefix(first))
    return written
