"""What a launcher believes of the reports that ranks leave."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest

from launcher.workers.rank_group import RankGroup
from megamoe.core.rank_end import EndKind
from megamoe.core.run_folder import RunFolder


class Ended(RankGroup):
    """Ranks that have ended with these statuses; rank R was process 100 + R."""

    def __init__(self, run: Path, statuses: Mapping[int, int]) -> None:
        self.folder = RunFolder(run).attempt(1)
        self.folder.path.mkdir(parents=True)
        self.logs = {rank: self.folder.log(rank) for rank in statuses}
        self.pids = {rank: 100 + rank for rank in statuses}
        self._statuses = statuses

    def ended(self) -> Mapping[int, int]:
        return self._statuses

    def signal(self, signum: int) -> None: ...

    def frozen(self) -> Mapping[int, list[int]]:
        return {}

    def pause(self, seconds: float) -> None: ...


def write(ranks: Ended, rank: int, status: int, pid: int) -> None:
    end = {"kind": "hung", "status": status, "message": "hangs", "pid": pid, "phase": "computes", "step": 3}
    ranks.folder.end(rank).write_text(json.dumps(end))


@pytest.mark.parametrize(
    ("ended", "reported", "pid", "believed"),
    [
        (76, 76, 101, True),
        (76, 76, 99, False),  # of another process
        (1, 76, 101, False),  # it ended in another way after all
        (-signal.SIGKILL, 76, 101, True),  # its launcher killed it on its way out
    ],
)
def test_a_report_counts_if_its_rank_wrote_it_and_the_status_bears_it_out(
    ended: int, reported: int, pid: int, believed: bool, tmp_path: Path
) -> None:
    ranks = Ended(tmp_path, {0: 0, 1: ended})
    write(ranks, 1, reported, pid)
    end = ranks.end_of(1)
    assert (end is not None and end.kind is EndKind.HUNG) == believed


def test_a_rank_without_a_report_or_still_at_work_has_none(tmp_path: Path) -> None:
    ranks = Ended(tmp_path, {0: 0})
    assert ranks.end_of(0) is None and ranks.end_of(1) is None
    ranks.pids[1] = 101
    write(ranks, 1, 76, 101)
    assert ranks.end_of(1) is None, "it has not ended"
