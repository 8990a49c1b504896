"""Choose which activations a block keeps for backward: all, only its input, or its input in host memory."""

from __future__ import annotations

from torch import nn
from torch.utils.checkpoint import checkpoint

from megamoe.model.pipeline_layer import BlockLayer


def apply_recompute(module: nn.Module, mode: str) -> None:
    """Apply ``parallel.recompute`` to all blocks of ``module``.

    ``block`` runs torch's non-reentrant checkpoint; ``offload`` runs fairscale's ``checkpoint_wrapper``, which keeps the
    block's input in host memory (arXiv:1604.06174). Both repeat the dispatch to experts in backward, in the same order on
    all ranks of a group.
    """
    if mode == "none":
        return
    for layer in [m for m in module.modules() if isinstance(m, BlockLayer)]:
        if mode == "block":
            layer.run = _checkpointed
        else:
            from fairscale.nn.checkpoint import checkpoint_wrapper

            checkpoint_wrapper(layer.block, offload_to_cpu=True)


def _checkpointed(block: nn.Module, *inputs: object):  # type: ignore[no-untyped-def]
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
