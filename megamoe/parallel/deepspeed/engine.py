"""DeepSpeed's engines behind one small interface: one optimizer step over a list of micro-batches."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megamoe.config import Config
from megamoe.core.packed_batch import PackedBatch
from megamoe.model.batch import announce_labels
from megamoe.model.loss import CaptionLoss
from megamoe.model.parameter import ExpertShard
from megamoe.model.pipeline_layer import BlockLayer
from megamoe.model.size import model_size
from megamoe.model.vlm import (
    VisionLanguageModel,
    layer_specs,
    named_parameters,
)
from megamoe.parallel.deepspeed.engine_config import build_optimizer, deepspeed_config
from megamoe.parallel.deepspeed.expert_parallel import connect_experts, create_expert_groups
from megamoe.parallel.deepspeed.pipeline_module import PipelineStage, backward_once
from megamoe.parallel.layout import Layout
from megamoe.parallel.recompute import apply_recompute

MicroBatch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step computed, equal on all ranks; losses are means over the global batch.

    Attributes:
        load: For each sparse layer, the share of all routing choices that each expert received.
        applied: Whether the weights were updated. If not, weights and optimizer state are unchanged.
    """

    loss: float
    lm_loss: float
    aux_loss: float
    z_loss: float
    grad_norm: float
    load: dict[str, list[float]]
    applied: bool = False

    @property
    def finite(self) -> bool:
        """Return whether both the loss and the norm are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


Accepts = Callable[[StepResult], bool]


class TrainEngine:
    """This rank's part of the model and of the optimizer, and the optimizer step over all ranks.

    Building it needs the sections model, data, train, optim, parallel and run, hence the whole config.

    Attributes:
        layout: The layout of all ranks.
        rank: This rank.
        device: This rank's device.
        module: The layers on this rank.
        parameters: Global name -> the parameter's part on this rank.
        deepspeed: DeepSpeed's engine; only files of this folder use it.
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
                module = PipelineStage(specs, layout, shard, config.run.seed, self._loss)
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
            self.module = module.to(device)
            connect_experts(module, layout)
            apply_recompute(module, config.parallel.recompute)
            self.deepspeed, *_ = deepspeed.initialize(
                model=module,
                optimizer=build_optimizer(config.optim, self.parameters.values(), layout),
                config=deepspeed_config(config.train, config.optim.clip, layout),
                dist_init_required=False,
            )
        if layout.pipeline > 1:
            backward_once(self.deepspeed)
        torch.manual_seed(config.run.seed)  # building draws more or fewer numbers under each layout
        self._accepts: Accepts
        self._result: StepResult | None
        self._ask_before_update()

    @property
    def loads_data(self) -> bool:
        """Return whether this rank needs micro-batches: only the first stage does."""
        return self.layout.stage(self.rank) == 0

    def step(
        self, micro_batches: Sequence[MicroBatch], targets: int, lr: float, accepts: Accepts = lambda _: True
    ) -> StepResult:
        """Run forward and backward over the micro-batches, clip by the global norm, and update.

        Args:
            micro_batches: This rank's part of the global batch; ignored by later stages.
            targets: Caption tokens in the whole global batch.
            lr: Learning rate of this step.
            accepts: Decides whether to make the update; called before it if loss and norm are finite. Its argument is
                equal on all ranks, and its answer must be too.

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
        # If the norm is not finite, DeepSpeed makes no update and does not call the optimizer.
        return self._result or self._collect()

    def _ask_before_update(self) -> None:
        """Wrap the optimizer's ``step`` so that it first asks whether to update; DeepSpeed does all else as usual.

        DeepSpeed calls the optimizer once per parameter group, on every rank, after it has computed the norm and clipped.
        If the call does nothing, weights and moments stay bit for bit unchanged.
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
        """Copy a micro-batch to the device from pinned memory, so that neither host nor device waits."""
        pixels, text = micro_batch
        labels = PackedBatch.of(text).targets
        if self.device.type == "cuda":
            pixels, text = (part.pin_memory().to(self.device, non_blocking=True) for part in micro_batch)
        announce_labels(text, labels)
        return pixels, text

    def _collect(self) -> StepResult:
        sparse = [layer.name for layer in self._size.layers if layer.sparse]
        # Everything stays on the device until one read at the end: each read waits for all queued kernels.
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
        # Rank 0 provides the norm: decisions depend on it, and other ranks may differ in the last bit.
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep DeepSpeed's banner and prints out of the run's log, but not its warnings."""
    if os.environ.get("MEGAMOE_DEEPSPEED_LOG"):
        yield
        return
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):
        yield


__all__ = ["MicroBatch", "StepResult", "TrainEngine"]
