"""The training loop. It reads from top to bottom; each part has a file of its own."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from megamoe.checkpoint.checkpointer import Checkpointer
from megamoe.config import Config
from megamoe.core.errors import DataError, DisagreementError, NonFiniteError, SpikeError
from megamoe.data.loader.step_loader import StepBatch
from megamoe.data.sample.tokenizer import Tokenizer
from megamoe.data.shards.catalog import DataSet
from megamoe.model.size import model_size
from megamoe.parallel.consistency import check_agreement
from megamoe.parallel.deepspeed.engine import StepResult, TrainEngine
from megamoe.parallel.deepspeed.main_parameter_sums import MainParameterSums
from megamoe.parallel.layout import Layout
from megamoe.train.fingerprints import agreed_fingerprints
from megamoe.train.guard import Accepts, Action, Outcome
from megamoe.train.live_state import LiveState
from megamoe.train.memory_report import write_memory_report
from megamoe.train.next_batch import next_batch, open_loader
from megamoe.train.records import RunRecords, step_record
from megamoe.train.resume import Resume
from megamoe.train.rollback import go_back
from megamoe.train.schedule import learning_rate
from megamoe.train.stop_request import StopRequest
from megamoe.train.totals import StepTotals, check_losses
from megamoe.train.watchdog import Watchdog


class Trainer:
    """Train as one rank, from the first step or from a checkpoint to the last step."""

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
        self.config, self.layout, self.tokenizer, self.device = config, layout, tokenizer, device
        self.stop, self.watchdog, self.rank = stop, watchdog, dist.get_rank()
        self.fingerprints = agreed_fingerprints(tokenizer, data)
        history = Resume(config, resume, self.fingerprints)  # may refuse, before minutes are spent on building the model
        self.engine = TrainEngine(config, layout, tokenizer.image_id, device)
        self.loader = open_loader(config, layout, tokenizer, data) if self.engine.loads_data else None
        self.checkpointer = Checkpointer(config.run.folder, config.checkpoint, config.optim, self.engine)
        self.main_sums = MainParameterSums(self.engine, enabled=config.train.check_every > 0)
        self.state = LiveState(config, self.fingerprints, self.loader)
        self.flops_per_step = model_size(config).flops_per_sequence * config.train.global_batch
        if (saved := history.load(self.checkpointer)) is not None:
            self.state.restore(saved)
        self.main_sums.note()
        if history.elsewhere:  # from here on, the run's own folder is enough to resume
            self.checkpointer.write(self.state.snapshot(), self.state.position)
        history.abandon_after(self.step)
        self.records = RunRecords(config, self.rank, None if resume == "none" else self.step, tokenizer)

    @property
    def step(self) -> int:
        """Steps done, including the skipped ones."""
        return self.state.counters.step

    def run(self) -> bool:
        """Train until ``train.steps`` steps are done or some rank is asked to stop. Either way a checkpoint is saved.

        Returns:
            Whether all steps are done.

        Raises:
            NonFiniteError: loss or gradient of more than ``train.max_skipped`` steps in a row is NaN or infinite.
            DisagreementError: what must be equal on several ranks is not.
            DataError: too many samples cannot be used, or a shard cannot be read.
            SpikeError: the loss spikes again and again, and going back does not help.
            CheckpointError: a checkpoint cannot be written.
        """
        self.stop.started()
        steps, stopped = self.config.train.steps, False
        try:
            while self.step < steps and not stopped:
                stopped, action = self._step()
                self.checkpointer.poll()
                if action is Action.GO_BACK:
                    self._go_back()
                    continue
                self._save_if_due(last=stopped or self.step == steps)
                self.watchdog.started()
            if self.step == steps:
                write_memory_report(self.config, self.layout, self.device)
            return self.step == steps
        except (NonFiniteError, DisagreementError, SpikeError, DataError):  # on all ranks alike: they can wait together
            self.watchdog.enter("waits for the checkpoint under way", self.step, slow=True)
            self.checkpointer.finish()
            raise
        finally:
            self.records.close()
            if self.loader is not None:
                self.loader.close()

    def _step(self) -> tuple[bool, Action]:
        """Do one step; return whether some rank was asked to stop before it, and what became of the step."""
        started = time.perf_counter()
        batch, totals = self._next_batch()
        lr = learning_rate(self.config.optim, self.step + 1, self.config.train.steps)
        outcome = self._compute(batch, totals, lr)
        self.state.counters = outcome.count(self.state.counters, totals.tokens, totals.samples)
        if batch is not None and not outcome.applied:
            self.records.write_skipped(self.step, batch, outcome.reason)
        if self._is_due(self.config.train.check_every):
            self._check_agreement()
        seconds = time.perf_counter() - started
        record = step_record(self.state, outcome.result, totals, batch, lr=lr, seconds=seconds, flops=self.flops_per_step)
        self.records.write(record, batch if outcome.applied else None)
        return totals.stops > 0, outcome.action

    def _next_batch(self) -> tuple[StepBatch | None, StepTotals]:
        """Get this rank's part of the next step and the sums over all ranks; count and name the samples that were lost."""
        data = self.config.data
        batch, totals = next_batch(self.loader, data, self.records, self.step + 1, self.device, self.stop, self.watchdog)
        counters = self.state.counters.plus(lost=totals.lost, drawn=totals.drawn, lost_shard=totals.lost_shard)
        self.state.counters = counters
        if totals.lost:
            if batch is not None:
                self.records.write_lost(self.step + 1, batch)
            # Samples of shards in quarantine do not count here: data.max_bad_shards limits those.
            check_losses(counters.lost - counters.lost_shard, counters.samples + totals.samples, data.max_corrupt)
        return batch, totals

    def _compute(self, batch: StepBatch | None, totals: StepTotals, lr: float) -> Outcome:
        """Compute the next step under the guard, which may have it computed twice."""
        self.watchdog.enter("computes with the other ranks", self.step + 1)
        micro_batches = batch.micro_batches if batch is not None else []

        def attempt(accepts: Accepts) -> StepResult:
            def check_and_ask(result: StepResult) -> bool:
                self.main_sums.check()  # before the update spreads a flipped bit
                return accepts(result)

            return self.engine.step(micro_batches, totals.targets, lr, check_and_ask)

        outcome = self.state.guard.compute(self.state.counters, attempt)
        if outcome.applied:
            self.main_sums.note()
        return outcome

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _check_agreement(self) -> None:
        check_agreement(
            self.layout,
            self.engine.parameters,
            self.step,
            [self.state.counters, self.state.guard.to_json()],
            self.state.counters.drawn,
            self.state.position,
            self.main_sums.changed,
            self.device,
        )

    def _save_if_due(self, last: bool) -> None:
        """Save a checkpoint every ``checkpoint.every`` steps and at the end.

        Do not save during a row of spikes: a checkpoint from before it may be needed.
        """
        if last or (self._is_due(self.config.checkpoint.every) and not self.state.guard.spikes_in_a_row):
            self.state.guard.saved(self.step)
            if self.config.train.check_every:  # never save a fault, which every later start would resume from
                self._check_agreement()
            self.watchdog.enter("saves a checkpoint", self.step, slow=True)
            self.checkpointer.save(self.state.snapshot(), self.state.position, last)

    def _go_back(self) -> None:
        """Resume from before the spikes in a row and pass over them. Save a checkpoint, so that later starts do the same.

        Raises:
            SpikeError: there is no older checkpoint, or the run has gone back too often.
        """
        self.watchdog.enter("goes back to a checkpoint", self.step, slow=True)
        self.checkpointer.finish()
        self.records.close()
        before = self.state.guard
        saved, steps = go_back(self.config, self.fingerprints, self.checkpointer, before)
        self.state.restore(saved)
        self.main_sums.note()
        self.state.guard.pass_over(steps, before)
        self.checkpointer.write(self.state.snapshot(), self.state.position)
        self.records = RunRecords(self.config, self.rank, self.step, self.tokenizer)
