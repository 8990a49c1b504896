"""The training loop: thin, since each part has its own file."""

from __future__ import annotations

import importlib.metadata
import json
import time

import torch
import torch.distributed as dist

from megamoe import __version__
from megamoe.checkpoint.checkpointer import Checkpointer
from megamoe.checkpoint.train_state import TrainState
from megamoe.config import Config
from megamoe.config.size import model_size
from megamoe.core.errors import DataError, DisagreementError, NonFiniteError, SpikeError
from megamoe.data.loader.step_loader import StepBatch, StepLoader
from megamoe.data.order.position import DataState
from megamoe.data.sample.tokenizer import Tokenizer
from megamoe.data.shards.catalog import DataSet, data_fingerprint
from megamoe.data.shards.from_config import open_cache
from megamoe.parallel.consistency import check_agreement
from megamoe.parallel.deepspeed.engine import StepResult, TrainEngine
from megamoe.parallel.deepspeed.main_parameter_sums import MainParameterSums
from megamoe.parallel.layout import Layout
from megamoe.parallel.memory import peak_memory, predict_memory
from megamoe.train.next_batch import next_batch
from megamoe.train.records import RunRecords
from megamoe.train.resume import Resume
from megamoe.train.rollback import go_back
from megamoe.train.schedule import learning_rate
from megamoe.train.spikes import SpikeWatch
from megamoe.train.stop_request import StopRequest
from megamoe.train.totals import StepTotals, check_losses
from megamoe.train.watchdog import Watchdog

_PACKAGES = ("torch", "deepspeed")


class Trainer:
    """One rank of a run, from the first step or from a checkpoint to the last step."""

    def __init__(
        self,
        config: Config,
        layout: Layout,
        tokenizer: Tokenizer,
        data: DataSet,
        device: torch.device,
        resume: str,
        stop: StopRequest,
        watchdog: Watchdog,
    ):
        self.stop, self.watchdog = stop, watchdog
        self.config, self.layout, self.device = config, layout, device
        self.rank = dist.get_rank()
        self.tokenizer = tokenizer
        self.fingerprints = {"tokenizer": tokenizer.fingerprint, "data": data_fingerprint(data)}
        _same_everywhere(self.fingerprints)
        self.flops_per_step = model_size(config).flops_per_sequence * config.train.global_batch
        history = Resume(config, resume, self.fingerprints)  # before minutes are spent on building the model
        self.engine = TrainEngine(config, layout, tokenizer.image_id, device)
        self.loader = self._build_loader(data) if self.engine.loads_data else None
        self.checkpointer = Checkpointer(config.run.folder, config.checkpoint, config.optim, self.engine)
        self._dumped = config.model_dump(mode="json")
        self._versions = {"megamoe": __version__, **{name: importlib.metadata.version(name) for name in _PACKAGES}}
        self.step, self.tokens, self.samples, self.lost, self.lost_shard = 0, 0, 0, 0, 0
        self.recomputed, self.skipped, self._skipped_in_a_row, self.spikes, self.drawn = 0, 0, 0, 0, 0
        self.watch = SpikeWatch(config.train)
        self.masters = MainParameterSums(self.engine, enabled=config.train.check_every > 0)
        state = history.load(self.checkpointer)
        if state is not None:
            self._go_on_from(state)
        self.masters.note()
        if history.elsewhere:
            self.checkpointer.write(self._state(), self._position)  # from here on, the run's own folder is enough to go on
        history.leave_the_rest(self.step)
        self.records = RunRecords(config, self.rank, None if resume == "none" else self.step, tokenizer)

    def run(self) -> bool:
        """Train until ``train.steps`` steps are done, or until some rank is asked to stop; then all have saved.

        Returns:
            Whether all steps are done.

        Raises:
            NonFiniteError: loss or gradient of more than ``train.max_skipped`` steps in a row is NaN or Inf.
            DisagreementError: what must be equal on several ranks is not.
            DataError: too many samples cannot be used, or a shard cannot be read.
            SpikeError: the loss spikes again and again, and going back does not help.
            CheckpointError: a checkpoint cannot be written.
        """
        self.stop.started()
        stopped, steps = False, self.config.train.steps
        try:
            while self.step < steps and not stopped:
                stopped = self._step()
                self.checkpointer.poll()
                if len(self.watch.in_a_row) > self.config.train.max_spikes:
                    self._roll_back()
                    continue
                last = stopped or self.step == steps
                # None while spikes come: a checkpoint from before them may be needed.
                if last or (self.step % self.config.checkpoint.every == 0 and not self.watch.in_a_row):
                    self.watch.saved(self.step)
                    if self.config.train.check_every:
                        self._check_agreement()  # or the next start would go on from the fault
                    self.watchdog.enter("saves a checkpoint", self.step, slow=True)
                    self.checkpointer.save(self._state(), self._position, last)
                self.watchdog.started()
            if self.step == steps:
                self._report_memory()
            return self.step == steps
        except (NonFiniteError, DisagreementError, SpikeError, DataError):  # on all ranks alike: they can wait together
            self.watchdog.enter("waits for the checkpoint under way", self.step, slow=True)
            self.checkpointer.finish()
            raise
        finally:
            self.records.close()
            if self.loader is not None:
                self.loader.close()

    def _step(self) -> bool:
        """One step; whether some rank was asked to stop before it, which all ranks learn alike."""
        started = time.perf_counter()
        batch, totals = next_batch(
            self.loader, self.config.data, self.records, self.step + 1, self.device, self.stop, self.watchdog
        )
        self.lost += totals.lost
        self.drawn += totals.drawn
        self.lost_shard += totals.lost_shard
        if totals.lost:
            if batch is not None:
                self.records.write_lost(self.step + 1, batch)
            # for shards in quarantine there is a limit of its own, data.max_bad_shards
            check_losses(self.lost - self.lost_shard, self.samples + totals.samples, self.config.data.max_corrupt)
        lr = learning_rate(self.config.optim, self.step + 1, self.config.train.steps)
        self.watchdog.enter("computes with the other ranks", self.step + 1)
        result = self._compute(batch, totals, lr)
        self.step += 1
        if result.applied:
            self.samples += totals.samples
            self.tokens += totals.tokens
        if self.config.train.check_every and self.step % self.config.train.check_every == 0:
            self._check_agreement()
        record = self._record(result, totals, lr, batch, time.perf_counter() - started)
        self.records.write(
            record | {"sources": totals.sources, "reading": totals.reading}, batch if result.applied else None
        )
        return totals.stops > 0

    def _compute(self, batch: StepBatch | None, totals: StepTotals, lr: float) -> StepResult:
        """Take the step. One that is not finite, or a spike, leaves the state as it was and is computed once more.

        A fault that passes so leaves no trace. If it comes again, all ranks go on without the update, and the samples
        are named. So they are for a step that the run goes past.
        """
        micro_batches = batch.micro_batches if batch is not None else []
        if self.step + 1 in self.watch.past:
            result = self.engine.step(micro_batches, totals.targets, lr, lambda _: False)
            self._leave_out(batch, "gone past after a rollback")
            self.spikes += 1
            return result
        result = self.engine.step(micro_batches, totals.targets, lr, self._accepts)
        if not result.applied:
            self.recomputed += 1
            result = self.engine.step(micro_batches, totals.targets, lr, self._accepts)
        if result.applied:
            self._skipped_in_a_row = 0
            self.masters.note()
            self.watch.updated(result.loss, result.grad_norm)
        elif result.finite:
            self.spikes += 1
            self.watch.in_a_row.append(self.step + 1)
            self._leave_out(batch, str(self.watch.what(result.loss, result.grad_norm)))
        else:
            what = f"loss {result.loss}, gradient norm {result.grad_norm}"
            self.skipped += 1
            self._skipped_in_a_row += 1
            if self._skipped_in_a_row > self.config.train.max_skipped:
                raise NonFiniteError(
                    f"step {self.step + 1}: {what}, twice, and no update for {self._skipped_in_a_row - 1} steps before it "
                    f"(train.max_skipped); lower optim.lr or look at the samples in the run's folder lost/"
                )
            self._leave_out(batch, what)
        return result

    def _accepts(self, result: StepResult) -> bool:
        self.masters.check()
        return self.watch.what(result.loss, result.grad_norm) is None

    def _leave_out(self, batch: StepBatch | None, why: str) -> None:
        if batch is not None:
            self.records.write_skipped(self.step + 1, batch, why)

    def _roll_back(self) -> None:
        """Go on from before the spikes in a row and past them. A checkpoint is made of that: later starts do the same.

        Raises:
            SpikeError: no checkpoint is older, or this was done too often.
        """
        self.watchdog.enter("goes back to a checkpoint", self.step, slow=True)
        self.checkpointer.finish()
        self.records.close()
        before = self.watch
        state, past = go_back(self.config, self.fingerprints, self.checkpointer, before)
        self._go_on_from(state)
        self.masters.note()
        self.watch.go_past(past, before)
        self.checkpointer.write(self._state(), self._position)
        self.records = RunRecords(self.config, self.rank, self.step, self.tokenizer)

    def _check_agreement(self) -> None:
        counters = [self.tokens, self.samples, self.lost, self.lost_shard, self.recomputed, self.skipped, self.spikes]
        check_agreement(
            self.layout,
            self.engine.parameters,
            self.step,
            [*counters, self._skipped_in_a_row, self.watch.to_json()],
            self.drawn,
            self.loader.state if self.loader is not None else None,
            self.masters.changed,
            self.device,
        )

    def _record(
        self, result: StepResult, totals: StepTotals, lr: float, batch: StepBatch | None, seconds: float
    ) -> dict[str, object]:
        return {
            "step": self.step,
            "loss": result.loss,
            "lm_loss": result.lm_loss,
            "aux_loss": result.aux_loss,
            "z_loss": result.z_loss,
            "grad_norm": result.grad_norm,
            "lr": lr,
            "tokens": self.tokens,
            "samples": self.samples,
            "lost": self.lost,
            "bad_shards": len(self.loader.state.quarantine) if self.loader is not None else 0,
            "truncated": totals.truncated,
            "recomputed": self.recomputed,
            "skipped": self.skipped,
            "spikes": self.spikes,
            "rolled_back": self.watch.rollbacks,
            "step_seconds": seconds,
            "data_seconds": batch.wait_seconds if batch is not None else 0.0,
            "tokens_per_second": totals.tokens / seconds,
            "model_flops_per_second": self.flops_per_step / seconds,
            "world_size": self.layout.world_size,
            "load": result.load,
        }

    def _report_memory(self) -> None:
        """Write RUN/memory.json: for each rank the predicted and the measured peak, in bytes."""
        predicted = predict_memory(self.config, self.layout, self.layout.stage(self.rank))
        mine = torch.tensor([predicted.on(self.device), peak_memory(self.device)], dtype=torch.int64, device=self.device)
        everyone = [torch.zeros_like(mine) for _ in range(self.layout.world_size)]
        dist.all_gather(everyone, mine)
        if self.rank == 0:
            rows = [{"rank": rank, "predicted": p, "peak": m} for rank, (p, m) in enumerate(t.tolist() for t in everyone)]
            (self.config.run.folder / "memory.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")

    def _build_loader(self, data: DataSet) -> StepLoader:
        config = self.config
        return StepLoader(
            config.data,
            vision=config.model.vision,
            tokenizer=self.tokenizer,
            dataset=data,
            cache=open_cache(config.data),
            seed=config.run.seed,
            global_batch=config.train.global_batch,
            micro_batch=config.train.micro_batch,
            dp_rank=self.layout.data_rank(self.rank),
            dp_size=self.layout.data,
        )

    @property
    def _position(self) -> DataState | None:
        return self.loader.state if self.loader is not None else None

    def _state(self) -> TrainState:
        return TrainState(
            step=self.step,
            tokens=self.tokens,
            samples=self.samples,
            lost=self.lost,
            recomputed=self.recomputed,
            skipped=self.skipped,
            skipped_in_a_row=self._skipped_in_a_row,
            lost_shard=self.lost_shard,
            spikes=self.spikes,
            spike_watch=self.watch.to_json(),
            position={},  # each rank has a part of it
            config=self._dumped,
            versions=self._versions,
            **self.fingerprints,
        )

    def _go_on_from(self, state: TrainState) -> None:
        self.step, self.tokens, self.samples = state.step, state.tokens, state.samples
        self.lost, self.lost_shard = state.lost, state.lost_shard
        self.recomputed, self.skipped, self._skipped_in_a_row = state.recomputed, state.skipped, state.skipped_in_a_row
        self.spikes = state.spikes
        self.drawn = sum(DataState.from_json(state.position, "checkpoint").cursors.values())
        self.watch = SpikeWatch(self.config.train, state.spike_watch)
        if self.loader is not None:
            self.loader.go_on_from(DataState.from_json(state.position, "checkpoint"))


def _same_everywhere(fingerprints: dict[str, str]) -> None:
    """All ranks must have the same tokenizer and list of shards, or they would train on different data.

    Raises:
        DataError: they do not.
    """
    everyone: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, fingerprints)
    for rank, theirs in enumerate(everyone):
        for what, value in theirs.items():
            if value != everyone[0][what]:
                raise DataError(
                    f"data.{'train' if what == 'data' else what}: rank {rank} does not see what rank 0 sees ({value}, "
                    f"{everyone[0][what]}); are the files on a shared file system, and complete?"
                )
