"""Errors that a user has to fix (UserError and its kinds), and the few that name a fault while running."""

from __future__ import annotations


class UserError(Exception):
    """The request is wrong: a field, file, shard or layout.

    The message is one line that names the thing, its value, the reason and the remedy. The command line prints it
    without a traceback and exits with status 2.
    """


class DataError(UserError):
    """A shard, sample, index or tokenizer cannot be used as it is."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint differs from what was written: cut, a flipped bit, a missing file. Another one may be good."""


class SpikeError(UserError):
    """The loss spikes again and again; going back to a checkpoint and skipping the samples has not helped."""


class PortTakenError(RuntimeError):
    """Another process listens on the port of rank 0; with another port the same start may succeed."""


class NonFiniteError(RuntimeError):
    """Loss or gradient became NaN or Inf; the weights were left as they were before the step."""


class DisagreementError(RuntimeError):
    """Ranks disagree on what must be equal; to train on would spread the fault."""
