"""p_θ shared out over the processes of a run: each keeps a part of every block's weights,
gathered while the block runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dia_lightning.data.shared import Together
from dia_lightning.errors import UserError
from dia_lightning.lm.base_lm import BaseLM

_GIVEN = "shard_base_lm: true given,"


class ShardedBaseLM:
    """Keeps 1/W of the weights of p_θ's blocks on each of W processes (fully sharded data
    parallelism, `fully_shard`).

    All processes must gather a block at the same time, but their texts need different numbers of
    passes through p_θ. So before a pass each waits until every other has come to one too, or to
    `serve`, in which it reads a single token each time that another needs it (as torch's `Join`
    does for DDP). Between two passes a process may do anything. Embeddings, head and what else lies
    outside the blocks stay whole on each.

    A process that ends with an error closes its connections, by which those that wait for it end
    too.
    """

    def __init__(self, lm: BaseLM, device: torch.device, world: int) -> None:
        """Share out `lm` over all `world` processes of the run, in place; its blocks are moved to
        `device`.

        Raises:
            UserError: if there is but one process, or the model keeps its blocks in no list.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        if world == 1:
            raise UserError(
                f"{_GIVEN} allowed: with several processes (trainer.devices, trainer.num_nodes);"
                " there is one"
            )
        self._body: nn.Module = getattr(lm.model, "base_model", lm.model)
        self._token = torch.full((1, 1), lm.bos_id, device=device)
        blocks = blocks_of(self._body)
        whole = set(self._body.parameters()) - set(blocks.parameters())
        mesh = init_device_mesh(device.type, (world,))
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        # With one root above them, a GPU gathers the next block while it computes this one.
        fully_shard(self._body, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        # On the CPU: no GPU is waited for, and a process that has ended is noticed at once.
        self._together = Together(world)
        self._serving = False
        self._body.register_forward_pre_hook(self._before_pass, with_kwargs=True, prepend=True)

    def serve(self) -> None:
        """Run p_θ's blocks for the other processes until all of them are here."""
        self._serving = True
        with torch.no_grad():
            while self._is_needed(False):
                self._body(self._token, use_cache=False)
        self._serving = False

    def _before_pass(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and any(
            isinstance(x, Tensor) and x.requires_grad for x in (*args, *kwargs.values())
        ):
            raise UserError(
                f"{_GIVEN} allowed: false; a gradient is wanted through p_θ, which must"
                " then be whole"
            )
        if not self._serving:
            self._is_needed(True)

    def _is_needed(self, here: bool) -> bool:
        """Whether a process is before a pass, this one if `here`; when all have come to one or
        to `serve`.
        """
        try:
            return self._together.total(int(here)) > 0
        except RuntimeError as error:
            raise UserError(
                f"{_GIVEN} but another process has ended, which is needed to run p_θ; see what"
                " it says"
            ) from error


def blocks_of(body: nn.Module) -> nn.ModuleList:
    """The blocks of a transformer: the outermost of its lists of modules that holds the most
    weights.

    Raises:
        UserError: if it has none.
    """
    lists = [module for module in body.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise UserError(
            f"{_GIVEN} allowed: false; {type(body).__name__} keeps its blocks in no list"
        )
    return max(lists, key=lambda blocks: sum(weight.numel() for weight in blocks.parameters()))
