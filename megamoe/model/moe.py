"""Sparse MLP: softmax top-k router in fp32 with renormalised weights, dropless dispatch, auxiliary losses.

The losses are taken per packed sequence and averaged over sequences. A sequence is never split between ranks or
micro-batches, so the losses do not depend on the layout. Losses per batch would, because they are products of means.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megamoe.config import MoEConfig
from megamoe.model.experts import Experts
from megamoe.model.parameter import ExpertShard, matrix


class Exchange(Protocol):
    """Takes rows to the ranks that hold their experts."""

    def agree(self, counts_E: Tensor) -> Dispatch:
        """Exchange with the other ranks how many rows go to each global expert. All ranks of the group must call it."""


class Dispatch(Protocol):
    """One exchange whose row counts all ranks of the group know."""

    rows: int
    """Rows that this rank sends."""

    def __call__(self, rows_ND: Tensor, experts: Experts) -> Tensor:
        """Take rows sorted by global expert to their experts; return the results in the same order."""


class Routing(NamedTuple):
    """What the router decided for T tokens."""

    weights_TK: Tensor  # fp32, sums to one over K
    experts_TK: Tensor  # global expert of each choice, best first
    losses_2: Tensor  # fp32: load-balancing loss, z-loss; each a mean over sequences
    counts_E: Tensor  # int64: choices per expert among valid tokens


class Router(nn.Module):
    """Scores each token against each expert (arXiv:1701.06538) and takes the best K."""

    def __init__(self, width: int, config: MoEConfig, std: float):
        super().__init__()
        self.top_k = config.top_k
        self.experts = config.experts
        self.weight = matrix(config.experts, width, std=std)

    def forward(self, x_BSD: Tensor, valid_BS: Tensor) -> Routing:
        """Route all tokens. Tokens that are not valid count in no loss and no load."""
        logits_BSE = F.linear(x_BSD.float(), self.weight.float())
        probs_BSE = logits_BSE.softmax(-1)
        top_BSK, experts_BSK = probs_BSE.topk(self.top_k, dim=-1)
        weights_BSK = top_BSK / top_BSK.sum(-1, keepdim=True)

        valid_BS1 = valid_BS.unsqueeze(-1).to(probs_BSE.dtype)
        tokens_B = valid_BS1.sum((1, 2)).clamp_min(1)
        chosen_BSE = torch.zeros_like(probs_BSE).scatter_(-1, experts_BSK, 1.0) * valid_BS1
        counts_BE = chosen_BSE.sum(1)
        share_BE = counts_BE / (tokens_B * self.top_k).unsqueeze(-1)
        mean_prob_BE = (probs_BSE * valid_BS1).sum(1) / tokens_B.unsqueeze(-1)
        balance = self.experts * (share_BE * mean_prob_BE).sum(-1).mean()  # 1 when balanced
        z_BS = logits_BSE.logsumexp(-1).square() * valid_BS1.squeeze(-1)
        z_loss = (z_BS.sum(1) / tokens_B).mean()
        return Routing(
            weights_BSK.flatten(0, 1),
            experts_BSK.flatten(0, 1),
            torch.stack((balance, z_loss)),
            counts_BE.detach().sum(0).long(),
        )

    def flops(self, tokens: int) -> int:
        """Forward FLOPs for this many tokens."""
        return 2 * tokens * self.weight.numel()


class SparseMLP(nn.Module):
    """Router and experts in place of an MLP. Dropless: every valid token visits its K experts."""

    def __init__(self, width: int, hidden: int, config: MoEConfig, shard: ExpertShard, std: float, out_std: float):
        super().__init__()
        self.router = Router(width, config, std)
        self.experts = Experts(width, hidden, config.experts, shard, std, out_std)
        self.exchange: Exchange | None = None  # set by megamoe.parallel where several ranks share the experts

    def forward(self, x_BSD: Tensor, valid_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Send each token to its experts and mix their results.

        Args:
            x_BSD: Normalised input.
            valid_BS: False for padding, which comes out as zero and leaves no gradient.

        Returns:
            Output (B, S, D), losses (2,) in fp32, choices per expert (E,) as int64.
        """
        B, S, D = x_BSD.shape
        routing = self.router(x_BSD, valid_BS)
        E, K = self.router.experts, self.router.top_k
        x_TD, weights_TK = x_BSD.reshape(B * S, D), routing.weights_TK
        if self.exchange is None and _keeps_padding(x_BSD):
            # Only the device knows how many rows are padding. They visit their experts with weight zero.
            weights_TK = weights_TK * valid_BS.reshape(-1, 1)
            sorted_N, order_N = routing.experts_TK.flatten().to(torch.int32).sort(stable=True)
            experts_E = torch.arange(E, dtype=torch.int32, device=x_BSD.device)
            ends_E = torch.searchsorted(sorted_N, experts_E, right=True, out_int32=True)
            routed_ND = self.experts(_take_rows(x_TD, order_N, K), ends_E)
        else:
            # The choices of padding sort after all experts and are cut off.
            choice_TK = routing.experts_TK.masked_fill(~valid_BS.reshape(-1, 1), E)
            order_N = choice_TK.flatten().argsort(stable=True)
            if self.exchange is None:
                ends_E = routing.counts_E.cumsum(0).to(torch.int32)
                routed_ND = self.experts(_take_rows(x_TD, order_N[: int(ends_E[-1])], K), ends_E)
            else:
                dispatch = self.exchange.agree(routing.counts_E)
                routed_ND = dispatch(_take_rows(x_TD, order_N[: dispatch.rows], K), self.experts)
        choices_TKD = _put_back(routed_ND, order_N).view(B * S, K, D)
        out_TD = (weights_TK.to(choices_TKD.dtype).unsqueeze(1) @ choices_TKD).squeeze(1)
        return out_TD.view(B, S, D), routing.losses_2, routing.counts_E

    def flops(self, tokens: int) -> int:
        """Forward FLOPs for this many tokens, each of which visits K experts."""
        return self.router.flops(tokens) + self.experts.flops(tokens * self.router.top_k)


def _keeps_padding(x: Tensor) -> bool:
    # On a CPU the number of rows is known at no cost, so padding need not be routed.
    return x.is_cuda


def _take_rows(x_TD: Tensor, order_N: Tensor, copies: int) -> Tensor:
    rows: Tensor = _TakeRows.apply(x_TD, order_N, copies)
    return rows


class _TakeRows(torch.autograd.Function):
    """Compute ``x[order // K]``. Its backward adds the K copies in a fixed order; atomics would not be deterministic."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_N: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(order_N)
        ctx.copies, ctx.tokens = copies, x_TD.shape[0]
        return x_TD.index_select(0, order_N // copies)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        (order_N,) = ctx.saved_tensors
        each = grad_ND.new_zeros(ctx.tokens * ctx.copies, grad_ND.shape[1]).index_copy_(0, order_N, grad_ND)
        return each.view(ctx.tokens, ctx.copies, -1).sum(1), None, None


def _put_back(routed_ND: Tensor, order_N: Tensor) -> Tensor:
    choices: Tensor = _PutBack.apply(routed_ND, order_N)
    return choices


class _PutBack(torch.autograd.Function):
    """Put row i in place ``order[i]``, of as many places as ``order`` has. Places that get no row are zero."""

    @staticmethod
    def forward(ctx: Any, routed_ND: Tensor, order_N: Tensor) -> Tensor:
        order_N, places = order_N[: routed_ND.shape[0]], order_N.shape[0]
        ctx.save_for_backward(order_N)
        shape = (places, routed_ND.shape[1])
        choices = routed_ND.new_empty(shape) if order_N.shape[0] == places else routed_ND.new_zeros(shape)
        return choices.index_copy_(0, order_N, routed_ND)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (order_N,) = ctx.saved_tensors
        return grad.index_select(0, order_N), None
