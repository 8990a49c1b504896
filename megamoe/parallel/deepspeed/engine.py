"""DeepSpeed engines behind one small interface: one optimizer step over a list of micro-batches.

This file, ``experts.py`` and ``master.py`` are the only ones that know DeepSpeed's internals.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec as DeepSpeedLayerSpec
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe import schedule
from torch import Tensor, nn

from megamoe.config import Config, OptimConfig
from megamoe.core.packed_batch import PackedBatch
from megamoe.model.batch import announce_labels
from megamoe.model.loss import CaptionLoss
from megamoe.model.parameter import ExpertShard, info_of
from megamoe.model.pipeline_layer import BlockLayer
from megamoe.model.size import model_size
from megamoe.model.vlm import (
    LayerSpec,
    VisionLanguageModel,
    build_layer,
    layer_specs,
    named_parameters,
)
from megamoe.parallel.deepspeed.expert_parallel import connect_experts, create_expert_groups, group_name
from megamoe.parallel.layout import Layout
from megamoe.parallel.recompute import apply_recompute

MicroBatch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step computed, equal on all ranks. Losses are means over the global batch."""

    loss: float
    lm_loss: float
    aux_loss: float
    z_loss: float
    grad_norm: float
    load: dict[str, list[float]]  # sparse layer -> share of the choices that each expert got
    applied: bool = False  # whether the weights were updated; if not they are as before, and so is the optimizer

    @property
    def finite(self) -> bool:
        """Whether neither the loss nor the norm is NaN or Inf."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


Accepts = Callable[[StepResult], bool]


class TrainEngine:
    """The model's part on this rank, its optimizer, and one step.

    Attributes:
        layout: The layout of all ranks.
        rank: This rank.
        parameters: Global name -> the parameter's part on this rank.
        deepspeed: The DeepSpeed engine.
    """

    def __init__(self, config: Config, layout: Layout, image_token: int, device: torch.device):
        self.layout, self.rank, self.device = layout, dist.get_rank(), device
        self._size = model_size(config)
        self._experts = config.model.moe.experts
        self._loss = CaptionLoss(config.model.moe, self._size.sparse_blocks)
        specs = layer_specs(config.model, image_token)
        shard = ExpertShard(layout.expert_rank(self.rank), layout.expert)
        if layout.expert > 1:
            create_expert_groups(layout)
        with _quiet():
            module: nn.Module
            if layout.pipeline > 1:
                module = _Pipeline(specs, layout, shard, config.run.seed, self._loss)
                start, stop = layout.bounds[layout.stage(self.rank)], layout.bounds[layout.stage(self.rank) + 1]
                layers = list(module.forward_funcs)
            else:
                module = VisionLanguageModel(specs, shard, config.run.seed)
                start, stop = 0, len(specs)
                layers = list(module.layers)
            self._layers = dict(zip((spec.name for spec in specs[start:stop]), layers, strict=True))
            self.parameters = {
                name: parameter
                for layer_name, layer in self._layers.items()
                for name, parameter in named_parameters(layer_name, layer)
            }
            module.to(device)
            connect_experts(module, layout)
            apply_recompute(module, config.parallel.recompute)
            self.deepspeed, *_ = deepspeed.initialize(
                model=module,
                optimizer=_optimizer(config.optim, self.parameters.values(), layout, device),
                config=_deepspeed_config(config, layout),
                dist_init_required=False,
            )
        if layout.pipeline > 1:
            _backward_once(self.deepspeed)
        torch.manual_seed(config.run.seed)  # what the layout made this rank draw while building is forgotten
        self._accepts: Accepts
        self._result: StepResult | None
        self._ask_before_update()

    @property
    def loads_data(self) -> bool:
        """Whether this rank needs micro-batches: only the first stage does."""
        return self.layout.stage(self.rank) == 0

    def step(
        self, micro_batches: Sequence[MicroBatch], targets: int, lr: float, accepts: Accepts = lambda _: True
    ) -> StepResult:
        """Forward and backward over the micro-batches, clip by the global norm, update.

        Args:
            micro_batches: This rank's part of the global batch; ignored by later stages.
            targets: Caption tokens in the whole global batch.
            lr: Learning rate of this step.
            accepts: Whether to make the update, asked before it is made if loss and norm are finite. It must answer
                alike on all ranks; what it is given is equal on all of them.

        Returns:
            The losses and the norm, and whether the update was made.
        """
        layout = self.layout
        self._accepts, self._result = accepts, None
        self._loss.targets_per_micro_batch = targets / (layout.accumulation * layout.data)
        for group in self.deepspeed.basic_optimizer.param_groups:
            group["lr"] = lr
        if layout.pipeline > 1:
            self.deepspeed.train_batch(data_iter=self._pipeline_batches(micro_batches))
        else:
            self.deepspeed.train()
            for micro_batch in micro_batches:
                outputs = self.deepspeed(*self._on_device(micro_batch))
                self.deepspeed.backward(self._loss(outputs))
                self.deepspeed.step()
        # DeepSpeed itself makes no update, and asks for none, if the norm is not finite.
        return self._result or self._collect()

    def _ask_before_update(self) -> None:
        """Put a question before the optimizer: when it is not to update, all else that DeepSpeed does goes on as ever.

        DeepSpeed runs the optimizer once for each group of parameters, on every rank, when it knows the norm and has
        clipped by it. Weights and moments are left untouched, bit for bit, if it does not run.
        """
        optimizer = self.deepspeed.basic_optimizer
        update = optimizer.step

        def step() -> None:
            result = self._result or self._collect()
            if self._result is None:
                self._result = result = replace(result, applied=result.finite and self._accepts(result))
            if result.applied:
                update()

        optimizer.step = step

    def _pipeline_batches(self, micro_batches: Sequence[MicroBatch]) -> Iterator[tuple[MicroBatch | None, Tensor]]:
        # DeepSpeed's last stage wants labels; ours travel with the activations.
        unused = torch.zeros(1)
        if self.loads_data:
            return ((self._on_device(micro_batch), unused) for micro_batch in micro_batches)
        return ((None, unused) for _ in range(self.layout.accumulation))

    def _on_device(self, micro_batch: MicroBatch) -> MicroBatch:
        """Copy a micro-batch to the device. Neither the host nor the device waits: the copy starts from pinned memory."""
        pixels, text = micro_batch
        labels = PackedBatch.of(text).targets
        if self.device.type == "cuda":
            pixels, text = (part.pin_memory().to(self.device, non_blocking=True) for part in micro_batch)
        announce_labels(text, labels)
        return pixels, text

    def _collect(self) -> StepResult:
        sparse = [layer.name for layer in self._size.layers if layer.sparse]
        # All stays on the device until the one read at the end: each read waits until the device has nothing to do.
        zeros = partial(torch.zeros, dtype=torch.float64, device=self.device)
        sums_4 = self._loss.take()  # the last stage has them
        parts_4 = zeros(4) if sums_4 is None else sums_4.double() / (self.layout.accumulation * self.layout.data)
        loads: list[Tensor] = []
        for name in sparse:
            layer = self._layers.get(name)
            load_E = layer.load_E if isinstance(layer, BlockLayer) else None
            loads.append(zeros(self._experts) if load_E is None else load_E.double())
            if isinstance(layer, BlockLayer):
                layer.load_E = None
        norm = self.deepspeed.optimizer._global_grad_norm
        # One rank says what the norm is: decisions are taken from it, and the others may differ in the last bit.
        norm_1 = zeros(1)
        if self.rank == 0:
            norm_1 += float("nan") if norm is None else norm
        flat = torch.cat([parts_4, norm_1, *loads])
        dist.all_reduce(flat)
        loss, lm_loss, aux_loss, z_loss, grad_norm, *choices = flat.tolist()
        load = {}
        for i, name in enumerate(sparse):
            counts = choices[i * self._experts : (i + 1) * self._experts]
            load[name] = [count / max(1.0, sum(counts)) for count in counts]
        return StepResult(loss, lm_loss, aux_loss, z_loss, grad_norm, load)


class _Pipeline(PipelineModule):
    """Our layers, cut where the layout says."""

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
        """Make this rank's part of the layer."""
        return build_layer(self._spec, self._shard, self._seed)


def _backward_once(engine: Any) -> None:
    """One backward pass per micro-batch in every stage.

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


def _optimizer(
    config: OptimConfig, parameters: Iterable[nn.Parameter], layout: Layout, device: torch.device
) -> torch.optim.Optimizer:
    """Matrices decay, vectors do not; experts are a group of their own so that ZeRO shards them over their replicas."""
    decay, no_decay, experts = [], [], []
    for parameter in parameters:
        if info_of(parameter).is_expert and layout.expert > 1:
            experts.append(parameter)
        elif parameter.ndim > 1:
            decay.append(parameter)
        else:
            no_decay.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decay, "name": "matrices", "weight_decay": config.weight_decay},
        {"params": no_decay, "name": "vectors", "weight_decay": 0.0},
    ]
    if experts:
        name = group_name(layout)
        groups.append({"params": experts, "name": name, "moe": True, "weight_decay": config.weight_decay})
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _deepspeed_config(config: Config, layout: Layout) -> dict[str, Any]:
    bf16 = config.train.precision == "bf16"
    return {
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        "gradient_clipping": config.optim.clip,
        "bf16": {"enabled": bf16},
        # Sums of many micro-batches lose bits in bf16.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": layout.zero,
            "contiguous_gradients": True,
            "overlap_comm": False,  # its bucket order depends on timing
            "reduce_scatter": True,
        },
        # AdamW and SGD of torch: elementwise updates are the same on a shard.
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        # It waits for the device before and after each micro-batch; we time steps ourselves.
        "timers": {"throughput": {"enabled": False}},
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep DeepSpeed's banner and prints out of the run's log; its warnings stay."""
    if os.environ.get("MEGAMOE_DEEPSPEED_LOG"):
        yield
        return
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):
        yield


__all__ = ["MicroBatch", "StepResult", "TrainEngine"]
