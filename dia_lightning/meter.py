"""What a run costs, counted alike for every method: rows and positions through each network,
FLOPs from its parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dia_lightning.types import Cost, Reward


@runtime_checkable
class Metered(Protocol):
    """A network that says what of it to watch: `network_name`, and by `multiplied` each part with
    its multiply–adds for one position; the first part is the one that sees every position.
    """

    network_name: str

    def multiplied(self) -> list[tuple[nn.Module, int]]: ...


def weights_of(module: nn.Module) -> int:
    """Entries of the weight matrices of all linear layers in `module`: its multiply–adds for one
    position.
    """
    return sum(layer.weight.numel() for layer in _linear_layers(module))  # type: ignore[operator, misc]


def _linear_layers(module: nn.Module) -> Iterator[nn.Module]:
    # transformers' Conv1D, GPT-2's layer, is a linear one with its matrix turned round.
    return (
        layer
        for layer in module.modules()
        if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"
    )


class Meter:
    """Counts what passes through networks, by hooks that cost some microseconds for each pass and
    never wait for a device.

    A pass forward is 2 N FLOPs for a position, N the multiply–adds; with a gradient to come, 2 N
    more for that of the inputs and 2 N for that of the weights that are trained (Kaplan et al.,
    arXiv:2001.08361, § 2.1: 6 N in training). Attention's products of queries, keys and values, and
    what else has no parameters, are left out.
    """

    def __init__(self) -> None:
        self._costs: dict[str, Cost] = {}

    def watch(self, name: str, parts: Iterable[tuple[nn.Module, int]]) -> None:
        """Count the passes of `parts`, see `Metered.multiplied`, under `name`."""
        for i, (part, weights) in enumerate(parts):
            layers = list(_linear_layers(part))
            trained = sum(layer.weight.numel() for layer in layers if layer.weight.requires_grad)  # type: ignore[union-attr, operator, misc]
            share = trained / max(1, weights_of(part))
            part.register_forward_hook(
                self._hook(name, weights, share, main=i == 0), with_kwargs=True
            )

    def watch_all(self, module: nn.Module) -> None:
        """Count every `Metered` network in `module` under its own name."""
        for part in module.modules():
            if isinstance(part, Metered):
                self.watch(part.network_name, part.multiplied())

    def _hook(self, name: str, weights: int, share: float, main: bool) -> Any:
        self._costs.setdefault(name, Cost())

        def count(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
        ) -> None:
            given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            result = next((value for value in _values(out) if isinstance(value, Tensor)), None)
            # A network is given tokens (B, T) or states (B, T, d), a read-out any rows of states.
            rows, positions = (
                len(given),
                (given.numel() if not given.is_floating_point() else given[..., 0].numel()),
            )
            flops = (
                2.0
                * weights
                * positions
                * (2 + share if result is not None and result.requires_grad else 1)
            )
            self._costs[name] = self._costs[name].plus(Cost(rows * main, positions * main, flops))

        return count

    def read(self) -> dict[str, Cost]:
        """Everything so far, by network."""
        return dict(self._costs)


def _values(out: Any) -> Iterable[Any]:
    return out.values() if isinstance(out, Mapping) else out if isinstance(out, tuple) else (out,)


def difference(after: Mapping[str, Cost], before: Mapping[str, Cost]) -> dict[str, Cost]:
    """What was spent between two readings, without networks that were not asked."""
    spent = {name: cost.plus(before.get(name, Cost()), -1) for name, cost in after.items()}
    return {name: cost for name, cost in spent.items() if any(cost)}


def networks_of(reward: Reward) -> Iterator[nn.Module]:
    """The networks that a reward, or rewards in it, keep as attributes."""
    for value in vars(reward).values():
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, nn.Module):
                yield item
            elif isinstance(item, Reward):
                yield from networks_of(item)


def reset_peak_memory(device: torch.device) -> None:
    """Begin to measure `peak_memory_mib` anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def peak_memory_mib(device: torch.device) -> float:
    """Largest memory since `reset_peak_memory`, in MiB: of a GPU what tensors took, else the
    process's resident memory (where the system cannot begin anew, since its start; NaN where it
    does not tell).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10
    except (OSError, StopIteration):
        return _since_start_mib()


def _since_start_mib() -> float:
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    # In bytes on macOS, in KiB elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )
