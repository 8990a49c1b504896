"""Expert parallelism: dispatch rows to the ranks that hold their experts, and back, by variable-size all-to-all."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups
from torch import Tensor, nn

from megamoe.model.experts import Experts
from megamoe.model.moe import SparseMLP
from megamoe.model.parameter import info_of
from megamoe.parallel.layout import Layout


class AllToAllExchange:
    """Dropless dispatch within an expert-parallel group, whose i-th rank holds the i-th part of the experts."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.size = dist.get_world_size(group)

    def agree(self, counts_E: Tensor) -> AllToAllDispatch:
        """Exchange the row counts. Host and device synchronise here, once per sparse block."""
        counts_E = counts_E.contiguous()
        received_E = torch.empty_like(counts_E)  # [source rank, expert held here]
        dist.all_to_all_single(received_E, counts_E, group=self.group)
        per_rank = torch.stack((counts_E.view(self.size, -1).sum(1), received_E.view(self.size, -1).sum(1)))
        send, receive = per_rank.tolist()
        return AllToAllDispatch(self.group, send, receive, received_E)


class AllToAllDispatch:
    """Dispatch of the rows of one sparse block.

    Args:
        group: The expert-parallel group.
        send: Rows for each rank of the group.
        receive: Rows from each rank of the group.
        received_E: Rows by (source rank, expert held here).
    """

    def __init__(self, group: dist.ProcessGroup, send: list[int], receive: list[int], received_E: Tensor):
        self._group, self._send, self._receive, self._received_E = group, send, receive, received_E
        self.rows = sum(send)

    def __call__(self, rows_ND: Tensor, experts: Experts) -> Tensor:
        """Send rows sorted by global expert to their experts; return results in the same order. The whole group calls."""
        arrived_MD = _all_to_all(rows_ND, self._send, self._receive, self._group)
        # Rows arrive by source, then by expert; the experts need them by expert.
        by_source = self._received_E.view(len(self._receive), -1)
        expert_M = torch.arange(by_source.shape[1], device=rows_ND.device).repeat(len(self._receive))
        expert_M = expert_M.repeat_interleave(self._received_E, output_size=sum(self._receive))
        order_M = expert_M.argsort(stable=True)
        done_MD = experts(_permute(arrived_MD, order_M), by_source.sum(0).cumsum(0).to(torch.int32))
        back_MD = _permute(done_MD, order_M.argsort())
        return _all_to_all(back_MD, self._receive, self._send, self._group)


def _all_to_all(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    result: Tensor = _AllToAll.apply(rows, send, receive, group)
    return result


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        out = rows.new_empty(sum(receive), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        out = grad.new_empty(sum(ctx.send), grad.shape[1])
        dist.all_to_all_single(out, grad.contiguous(), ctx.send, ctx.receive, group=ctx.group)
        return out, None, None, None


def _permute(rows: Tensor, order: Tensor) -> Tensor:
    result: Tensor = _Permute.apply(rows, order)
    return result


class _Permute(torch.autograd.Function):
    """``rows[order]`` for a permutation: backward is a copy, not an accumulation."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return torch.empty_like(grad).index_copy_(0, order, grad), None


class _ExpertMarker(AutoEPMoELayer):
    """Tell the DeepSpeed engine that a module tree has expert-parallel parameters.

    The engine looks for its own layer classes. Our layer owns routing, losses and dispatch and borrows only the class.
    """

    def __init__(self, experts: int):
        nn.Module.__init__(self)
        self.num_experts = experts

    def set_deepspeed_parallelism(self, *_: object, **__: object) -> None:
        """The groups exist already."""

    def forward(self, *_: object, **__: object) -> None:
        """Never called."""
        raise AssertionError("the marker computes nothing")


def group_name(layout: Layout) -> str:
    """Return DeepSpeed's name of the expert-parallel groups."""
    return f"ep_size_{layout.expert}"


def create_expert_groups(layout: Layout) -> None:
    """Create the expert-parallel and expert-data-parallel groups. All ranks must call."""
    groups._create_expert_and_data_parallel(layout.expert, pp_size=layout.pipeline)


def connect_experts(module: nn.Module, layout: Layout) -> None:
    """Connect the sparse blocks of ``module`` to the experts of other ranks, and mark expert parameters for ZeRO."""
    if layout.expert == 1:
        return  # all experts are here: to DeepSpeed they are parameters like any other
    name = group_name(layout)
    exchange = AllToAllExchange(groups._get_expert_parallel_group(name))
    for block in [m for m in module.modules() if isinstance(m, SparseMLP)]:
        block.exchange = exchange
        block.deepspeed_marker = _ExpertMarker(block.router.experts)
    for parameter in module.parameters():
        if info_of(parameter).is_expert:
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = name  # type: ignore[attr-defined]
            parameter.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
            parameter.ds_zero_partition_group_name = name  # type: ignore[attr-defined]
