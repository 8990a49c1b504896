"""The one kind of error that a user, not the program, has to fix."""

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
    """A checkpoint is not what was written: cut, flipped, or a file is missing. Another one may be good."""


class SpikeError(UserError):
    """The loss spikes again and again, and going back to a checkpoint and past the samples has not helped."""


class PortTakenError(RuntimeError):
    """Another process listens on the port of rank 0; with another port the same start may succeed."""


class NonFiniteError(RuntimeError):
    """Loss or gradient became NaN or Inf; the weights were left as they were before the step."""


class DisagreementError(RuntimeError):
    """What must be equal on several ranks is not; training on would spread the fault."""
