"""Attention within segments of packed sequences, by a dense mask (any device) or a block mask (CUDA)."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from megamoe.core.packed_batch import PackedBatch
from megamoe.model.batch import once_per_batch

Mask = Tensor | BlockMask


def segment_positions(segments_BL: Tensor) -> Tensor:
    """Return the position of each token within its segment, counted from 0, int64 (B, L)."""
    index_L = torch.arange(segments_BL.shape[1], device=segments_BL.device)
    starts_BL = torch.ones_like(segments_BL, dtype=torch.bool)
    starts_BL[:, 1:] = segments_BL[:, 1:] != segments_BL[:, :-1]
    first_BL = torch.where(starts_BL, index_L, torch.zeros_like(index_L)).cummax(dim=1).values
    return index_L - first_BL


def packed_causal_mask(text_B3L: Tensor, kernel: str) -> Mask:
    """Say which tokens may see which: those of the same segment, not later. Padding sees padding, to stay finite."""
    if kernel == "auto":
        kernel = "flex" if text_B3L.is_cuda else "sdpa"
    make = _block_mask if kernel == "flex" else _dense_mask
    return once_per_batch(text_B3L, f"{kernel} mask", lambda: make(PackedBatch.of(text_B3L).segments))


def attend(q_BHLd: Tensor, k_BGLd: Tensor, v_BGLd: Tensor, mask: Mask | None) -> Tensor:
    """Return scaled dot-product attention (B, H, L, d). Each key/value head is shared by H / G query heads."""
    shared = q_BHLd.shape[1] != k_BGLd.shape[1]
    if isinstance(mask, BlockMask):
        # On CUDA it is compiled into one kernel; elsewhere the plain version computes the same.
        kernel = _compiled_flex() if q_BHLd.is_cuda else flex_attention
        out: Tensor = kernel(q_BHLd, k_BGLd, v_BGLd, block_mask=mask, enable_gqa=shared)  # type: ignore[operator]
        return out
    if shared and mask is not None and q_BHLd.is_cuda:
        # With a mask and shared heads, CUDA has a fused kernel (cuDNN) for bf16 only. The plain one keeps (B, H, L, L).
        copies = q_BHLd.shape[1] // k_BGLd.shape[1]
        k_BGLd, v_BGLd = (x.repeat_interleave(copies, dim=1) for x in (k_BGLd, v_BGLd))
        shared = False
    return F.scaled_dot_product_attention(q_BHLd, k_BGLd, v_BGLd, attn_mask=mask, enable_gqa=shared)


def _dense_mask(segments_BL: Tensor) -> Tensor:
    same_BLL = segments_BL.unsqueeze(1) == segments_BL.unsqueeze(2)
    return same_BLL.tril().unsqueeze(1)


def _block_mask(segments_BL: Tensor) -> BlockMask:
    B, L = segments_BL.shape
    # Copy the segments: the mask keeps them, and a view would keep its own key in the per-batch cache alive forever.
    segments_BL = segments_BL.clone()

    def visible(b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (segments_BL[b, q] == segments_BL[b, k])

    mask: BlockMask = create_block_mask(visible, B, None, L, L, device=segments_BL.device.type)
    return mask


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)
