"""DeepSpeed's pipeline module, cut where the layout says and with one backward pass per micro-batch."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.pipe import LayerSpec as DeepSpeedLayerSpec
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe import schedule
from torch import nn

from megamoe.model.loss import CaptionLoss
from megamoe.model.parameter import ExpertShard
from megamoe.model.vlm import LayerSpec, build_layer
from megamoe.parallel.layout import Layout


class PipelineStage(PipelineModule):
    """The layers of this rank's stage; DeepSpeed would cut them by a method of its own."""

    def __init__(self, specs: list[LayerSpec], layout: Layout, shard: ExpertShard, seed: int, loss: CaptionLoss):
        self._bounds = layout.bounds
        super().__init__(
            layers=[_BuildLater(spec, shard, seed) for spec in specs], num_stages=layout.pipeline, loss_fn=loss
        )

    def _partition_layers(self, method: str = "uniform") -> None:
        stage = self._topo.get_coord(self.global_rank).pipe
        self.parts = list(self._bounds)
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])


class _BuildLater(DeepSpeedLayerSpec):
    """A layer that only its own stage builds."""

    def __init__(self, spec: LayerSpec, shard: ExpertShard, seed: int):
        self.typename = nn.Module
        self._spec, self._shard, self._seed = spec, shard, seed

    def build(self, log: bool = False) -> nn.Module:
        """Build this rank's part of the layer."""
        return build_layer(self._spec, self._shard, self._seed)


def backward_once(engine: Any) -> None:
    """Make each stage of a pipeline engine run one backward pass per micro-batch.

    DeepSpeed 0.19.8 calls ``backward`` once per output tensor. Our activations and auxiliary losses share a graph, so
    that would go twice through all layers below the last router.
    """

    def backward(self: Any, buffer_id: int) -> None:
        if self.is_last_stage():
            type(self)._exec_backward_pass(self, buffer_id)
            return
        outputs = [t for t in self.pipe_buffers["outputs"][buffer_id] if t.is_floating_point()]
        if self.using_bf16_optimizer:
            self.optimizer.clear_lp_grads()
        self._running_engine_backward = True
        try:
            torch.autograd.backward(outputs, list(self.grad_layer))
        finally:
            self._running_engine_backward = False
        if self.using_bf16_optimizer and not self._config.bfloat16_config.immediate_grad_update:
            self.optimizer.update_hp_grads(clear_lp_grads=False)
        self.pipe_buffers["output_tensors"][buffer_id] = None
        self.pipe_buffers["outputs"][buffer_id] = None

    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, schedule.BackwardPass: backward}
