"""Imported first by the fork server of the data workers: what asks a training to stop is not meant for it.

A batch system sends its signals to every process of a job. The training process then saves, for which it needs its
workers, and takes them for dead as soon as their fork server is.
"""

from __future__ import annotations

import signal

for _number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(_number, signal.SIG_IGN)
