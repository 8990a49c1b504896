"""Settings of the layout: pipeline stages, expert-parallel degree, ZeRO stage, recomputation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megamoe.config.section import PositiveInt, Section


class ParallelConfig(Section):
    """How the ranks share the work. The data-parallel degree follows: ranks / pipeline."""

    pipeline: PositiveInt = Field(1, description="Pipeline stages.")
    expert: PositiveInt = Field(
        1, description="Expert-parallel degree: ranks that share the experts of a block; divides the data-parallel degree."
    )
    zero: Annotated[int, Field(ge=0, le=3, strict=True)] = Field(
        1,
        description="ZeRO stage of DeepSpeed: 1; or, without a pipeline, 2 or 3. 0 is refused because it clips gradients "
        "wrongly.",
    )
    recompute: Literal["none", "block", "offload"] = Field(
        "none",
        description="Activations kept for backward. none: all; block: only block inputs (torch checkpoint); offload: block "
        "inputs, moved to host memory (fairscale checkpoint_wrapper).",
    )
