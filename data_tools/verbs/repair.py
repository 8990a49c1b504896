"""Write intact shards from damaged ones, with every good sample and a list of every lost one: `megamoe data repair`.

:mod:`data_tools.checks.repair_plan` explains how wrong pairs are ruled out. Source shards are only read.
Memory: names and offsets of one shard's members, and one sample.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data_tools.checks.repair_plan import Lost, Plan, check_contents, plan_repair
from data_tools.checks.salvage import salvage
from data_tools.distribute.jobs import map_jobs
from data_tools.writing.records import Record, ShardWriter
from megamoe.core.errors import DataError
from megamoe.core.files import atomic_file
from megamoe.data.shards.tar import Member, open_for_walk

COPIED, REWRITTEN, NOTHING, UNREADABLE = "copied", "rewritten", "nothing to save", "unreadable"
_EXAMPLES = 5


@dataclass(frozen=True)
class ShardRepair:
    """The outcome for one shard."""

    shard: str
    action: str
    saved: int
    lost: dict[str, int]  # by cause
    passed_over: int  # bytes
    notes: list[str]
    examples: list[Lost]  # the first few losses; NAME.lost.jsonl has all


class Job(NamedTuple):
    """A shard to repair, the folder for its repaired copy, and the options."""

    shard: Path
    out: Path
    decode: bool
    dry_run: bool


def repair_shards(
    shards: Sequence[Path], out: Path, decode: bool, dry_run: bool, processes: int | None = None
) -> Iterator[ShardRepair]:
    """Write an intact shard to ``out`` for each of ``shards``, and yield the outcomes in order.

    A shard without a fault is copied byte for byte. A shard that an earlier run finished is not read again.

    Raises:
        DataError: two shards have the same name, or ``out`` is the folder of the shards.
    """
    names = Counter(shard.stem for shard in shards)
    for shard in shards:
        if names[shard.stem] > 1:
            raise DataError(f"shard {shard}: another shard has the name {shard.stem}; repair each into its own folder")
        if os.path.realpath(out / shard.name) == os.path.realpath(shard):
            raise DataError(f"{out}: holds the source {shard.name} itself, which is never changed; name another folder")
    jobs = [Job(shard, out, decode, dry_run) for shard in shards]
    for _, result in map_jobs(repair_shard, jobs, label="repair", processes=processes):
        yield result


def repair_shard(job: Job) -> ShardRepair:
    """Repair one shard. The list of losses is written before it, and the note that it is finished after it."""
    try:
        file, state = open_for_walk(job.shard)
    except DataError as error:
        return ShardRepair(str(job.shard), UNREADABLE, 0, {UNREADABLE: 1}, 0, [], [Lost(None, [], UNREADABLE, str(error))])
    source = {"bytes": state.st_size, "mtime_ns": state.st_mtime_ns, "decode": job.decode}
    with file:
        if not job.dry_run and (done := _done(job, source)):
            return done
        found = salvage(job.shard, file, state.st_size)
        plan = plan_repair(found)
        check_contents(plan, file, job.decode)
        whole = found.whole and not plan.lost and not plan.changed
        if not whole:
            plan.lost += plan.strays
        if not plan.chosen and not plan.lost:
            plan.lost.append(Lost(None, [(0, state.st_size)], NOTHING, "no sample in it"))
        plan.lost.sort(key=lambda lost: lost.ranges)
        action = NOTHING if not plan.chosen else COPIED if whole else REWRITTEN
        if not job.dry_run:
            _write(job, file, plan, action)
        after = os.fstat(file.fileno())
        if (after.st_size, after.st_mtime_ns) != (state.st_size, state.st_mtime_ns):
            raise DataError(f"shard {job.shard}: changed while it was read; wait until it is written, then run this again")
    notes = [] if found.ended else ["has no end blocks: if it was cut there, what followed is unknown"]
    notes += [f"{found.parts} tars joined"] if found.parts > 1 else []
    result = ShardRepair(
        str(job.shard),
        action,
        len(plan.chosen),
        dict(Counter(lost.cause for lost in plan.lost)),
        sum(gap.end - gap.start for gap in found.gaps),
        notes,
        plan.lost[:_EXAMPLES],
    )
    if not job.dry_run:
        with atomic_file(_note(job)) as note:
            note.write(json.dumps({"source": source, "result": asdict(result)}).encode())
    return result


def _write(job: Job, file: BinaryIO, plan: Plan, action: str) -> None:
    target, losses = job.out / job.shard.name, job.out / f"{job.shard.stem}.lost.jsonl"
    if plan.lost:
        with atomic_file(losses) as out:
            for lost in plan.lost:
                out.write(json.dumps({"shard": job.shard.name, **asdict(lost)}).encode() + b"\n")
    else:
        losses.unlink(missing_ok=True)
    if action == REWRITTEN:
        with ShardWriter(target) as writer:
            for key, members, _ in plan.chosen:
                writer.write(Record(key, {ext: _whole(file, member) for ext, member in members.items()}))
        return
    target.with_name(f"{target.name}.idx").unlink(missing_ok=True)
    target.unlink(missing_ok=True)
    if action == COPIED:
        with atomic_file(target) as out:
            file.seek(0)
            shutil.copyfileobj(file, out, 1 << 20)


def _whole(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    data = file.read(member.size)
    if len(data) < member.size:
        raise DataError(f"{member.name}: its shard was truncated while it was read; run this again")
    return data


def _note(job: Job) -> Path:
    return job.out / f"{job.shard.stem}.repair.json"


def _done(job: Job, source: dict[str, Any]) -> ShardRepair | None:
    """Return the result of an earlier run, if it read exactly these bytes and its shard still exists."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        note = json.loads(_note(job).read_bytes())
        fields = note["result"]
        examples = [Lost(**each) for each in fields.pop("examples")]
        result = ShardRepair(**fields, examples=examples)
        if note["source"] == source and (not result.saved or (job.out / job.shard.name).exists()):
            return result
    return None
