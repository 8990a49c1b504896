"""`megamoe data repair`: from damaged shards to whole ones, with every good sample and a list of every lost one.

A picture and a caption become a sample only if their names, in headers whose checksums are right, say the same key
*and* they lie in one stretch of the tar without damage or an end between them (:mod:`data_tools.salvage`). What is on
two sides of damage is never put together: in a joined file the same key may be another sample there. Within a stretch,
members that are not adjacent are put together only if no extension of that key comes twice. A caption must fill its place
in the tar exactly, and pictures are decoded to the last byte: both fail where blocks are missing without a damaged header.
What no tar can show is a text that was replaced by one of the same length; ``megamoe data checksum`` can.

Sources are only read. Memory: names and offsets of one shard's members, and one sample.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data_tools.jobs import map_jobs
from data_tools.records import Record, ShardWriter
from data_tools.salvage import Salvage, Stretch, salvage
from data_tools.validate import (
    CAPTION,
    CHECKED,
    DUPLICATE,
    EXTENSION,
    NO_CAPTION,
    NO_PICTURE,
    content_problem,
    json_caption,
    read_member,
)
from megamoe.data.decode import CorruptSample
from megamoe.data.files import atomic_file
from megamoe.data.index import IMAGE_EXTENSIONS, groups
from megamoe.data.tar import BLOCK, Member, open_for_walk
from megamoe.errors import DataError

COPIED, REWRITTEN, NOTHING, UNREADABLE = "copied", "rewritten", "nothing to save", "unreadable"
PASSED_OVER, DISTRUSTED, AMBIGUOUS, OVERSIZE = "bytes passed over", "next to damage", "ambiguous members", "too large"
NO_SAMPLE = "belongs to no sample"
MAX_SAMPLE = 1 << 30  # bytes of a sample that is held in memory
_EXAMPLES = 5


@dataclass(frozen=True)
class Lost:
    """Something of a shard that is not in the repaired one: whose (if known), where its bytes are, and why."""

    key: str | None
    ranges: list[tuple[int, int]]  # of the shard, the headers included; [start, end)
    cause: str
    reason: str


@dataclass(frozen=True)
class ShardRepair:
    """What became of one shard."""

    shard: str
    action: str
    saved: int
    lost: dict[str, int]  # by cause
    passed_over: int  # bytes
    notes: list[str]
    examples: list[Lost]  # the first few; NAME.lost.jsonl has all


class Job(NamedTuple):
    """A shard, the folder for its repaired copy, and how."""

    shard: Path
    out: Path
    decode: bool
    dry_run: bool


class _Candidate(NamedTuple):
    key: str
    members: dict[str, Member]
    apart: bool  # put together from several places


@dataclass
class _Plan:
    chosen: list[_Candidate] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)
    changed: bool = False  # the chosen samples do not lie in the shard as they should
    strays: list[Lost] = field(default_factory=list)  # lost only if the shard has to be written again

    def lose(self, key: str | None, members: Sequence[Member], cause: str, reason: str) -> None:
        ranges = [(member.offset - BLOCK, member.offset + member.size) for member in members]
        self.lost.append(Lost(key, sorted(ranges), cause, reason))


def repair_shards(
    shards: Sequence[Path], out: Path, decode: bool, dry_run: bool, processes: int | None = None
) -> Iterator[ShardRepair]:
    """Write to ``out`` a whole shard for each of ``shards``, and yield what became of it, in order.

    A shard without a fault is copied byte for byte. A shard that an earlier run finished is not read again.

    Raises:
        DataError: two shards have one name, or ``out`` is where the shards are.
    """
    names = Counter(shard.stem for shard in shards)
    for shard in shards:
        if names[shard.stem] > 1:
            raise DataError(f"shard {shard}: another one has the name {shard.stem}; repair each into a folder of its own")
        if os.path.realpath(out / shard.name) == os.path.realpath(shard):
            raise DataError(f"{out}: holds {shard.name} itself, and a source is never changed; name another folder")
    jobs = [Job(shard, out, decode, dry_run) for shard in shards]
    for _, result in map_jobs(repair_shard, jobs, label="repair", processes=processes):
        yield result


def repair_shard(job: Job) -> ShardRepair:
    """Repair one shard. Its list of the lost is written before it, and a note that it is done after it."""
    try:
        file, state = open_for_walk(job.shard)
    except DataError as error:
        return ShardRepair(str(job.shard), UNREADABLE, 0, {UNREADABLE: 1}, 0, [], [Lost(None, [], UNREADABLE, str(error))])
    source = {"bytes": state.st_size, "mtime_ns": state.st_mtime_ns, "decode": job.decode}
    with file:
        if not job.dry_run and (done := _done(job, source)):
            return done
        found = salvage(job.shard, file, state.st_size)
        plan = _plan(found)
        _check(plan, file, job.decode)
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
    notes = [] if found.ended else ["has no end blocks: if it was cut there, nothing tells what followed"]
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


def _plan(found: Salvage) -> _Plan:
    """Which members make samples, from their names and places alone."""
    plan = _Plan(changed=found.parts > 1)
    for member in found.distrusted:
        reason = "right after damage, and its true name may be lost with it"
        plan.lose(_key(member.name), [member], DISTRUSTED, reason)
    by_start = {stretch.start: stretch for stretch in found.stretches}
    by_end = {_end(stretch): stretch for stretch in found.stretches}
    for gap in found.gaps:
        near = [("after", by_end.get(gap.start), -1), ("before", by_start.get(gap.end), 0)]
        where = [f"{word} {stretch.members[place].name}" for word, stretch, place in near if stretch]
        reason = ", ".join([gap.reason, *where])
        plan.lost.append(Lost(gap.name and _key(gap.name), [(gap.start, gap.end)], PASSED_OVER, reason))
    for stretch in found.stretches:
        _plan_stretch(stretch, plan)
    plan.chosen.sort(key=lambda candidate: min(member.offset for member in candidate.members.values()))
    return plan


def _plan_stretch(stretch: Stretch, plan: _Plan) -> None:
    fragments = list(groups(iter(stretch.members)))
    grouped = {member for _, members in fragments for member in members.values()}
    for member in stretch.members:
        if member not in grouped:
            where = (member.offset - BLOCK, member.offset + member.size)
            plan.strays.append(Lost(member.name, [where], NO_SAMPLE, "its name is not KEY.EXTENSION, or starts with __"))
    places: dict[str, list[int]] = {}
    for place, (key, _) in enumerate(fragments):
        places.setdefault(key, []).append(place)
    for key, own in places.items():
        parts = [fragments[place][1] for place in own]
        together = {ext: member for part in parts for ext, member in part.items()}
        if len(together) == sum(map(len, parts)):
            plan.chosen.append(_Candidate(key, together, len(own) > 1))
            continue
        plan.changed = True
        doubtful = False
        for i, part in enumerate(parts):
            # jpg jpg txt, all of one key: nothing tells whose caption that is
            doubtful = i > 0 and own[i] == own[i - 1] + 1 and (doubtful or not _complete(parts[i - 1]))
            if doubtful or not _complete(part):
                plan.lose(key, list(part.values()), AMBIGUOUS, f"the key comes {len(parts)} times, not each time whole")
            else:
                plan.chosen.append(_Candidate(key, part, False))


def _check(plan: _Plan, file: BinaryIO, decode: bool) -> None:
    """Read every candidate; what remains in the plan is good, and the first of its key."""
    chosen, seen = plan.chosen, set[str]()
    plan.chosen = []
    for key, members, apart in chosen:
        if key in seen:
            plan.lose(key, list(members.values()), DUPLICATE, "an earlier sample has this key")
            continue
        if fault := _fault(plan, file, key, members, decode):
            plan.lose(key, list(members.values()), *fault)
            continue
        seen.add(key)
        plan.chosen.append(_Candidate(key, members, apart))
        plan.changed = plan.changed or apart


def _fault(plan: _Plan, file: BinaryIO, key: str, members: dict[str, Member], decode: bool) -> tuple[str, str] | None:
    """Why a sample cannot be used. Members that it can do without are taken out of ``members`` if they are damaged."""
    image = next((ext for ext in members if ext in IMAGE_EXTENSIONS), None)
    if image is None:
        return NO_PICTURE, f"has only {', '.join(members)}"
    if "txt" not in members and "json" not in members:
        return NO_CAPTION, f"has only {', '.join(members)}"
    if sum(member.size for member in members.values()) > MAX_SAMPLE:
        return OVERSIZE, f"of more than {MAX_SAMPLE} bytes"
    text = "txt" if "txt" in members else "json"
    for ext in [ext for ext in CHECKED if ext in members]:
        try:
            data = read_member(file, members[ext])
        except CorruptSample as corrupt:
            return OVERSIZE, f"{ext}: {corrupt}"
        if ext == text and not _is_own(file, members[ext], data):
            return CAPTION, f"{ext}: zeros in it, or none behind it: bytes of another member"
        wrong = content_problem(ext, data, decode) if decode or ext == "json" else None
        if wrong and wrong[0] != EXTENSION:  # decoders go by the content
            if ext in (image, text):
                return wrong
            plan.lose(key, [members.pop(ext)], *wrong)
        elif ext == text == "json":
            has, why = json_caption(data)
            if not has:
                return NO_CAPTION, "no txt, and no 'caption' in its json"
            if why and decode:
                return CAPTION, why
    return None


def _is_own(file: BinaryIO, member: Member, text: bytes) -> bool:
    """Whether a text fills its place exactly. Where blocks are missing from a tar, that of another member seldom does."""
    file.seek(member.offset + member.size)
    filling = file.read(-member.size % BLOCK)
    return 0 not in text and filling.count(0) == len(filling)


def _write(job: Job, file: BinaryIO, plan: _Plan, action: str) -> None:
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
        raise DataError(f"{member.name}: its shard became shorter while it was read; run this again")
    return data


def _note(job: Job) -> Path:
    return job.out / f"{job.shard.stem}.repair.json"


def _done(job: Job, source: dict[str, Any]) -> ShardRepair | None:
    """The result of an earlier run, if that was of these very bytes and its shard is still there."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        note = json.loads(_note(job).read_bytes())
        fields = note["result"]
        examples = [Lost(**each) for each in fields.pop("examples")]
        result = ShardRepair(**fields, examples=examples)
        if note["source"] == source and (not result.saved or (job.out / job.shard.name).exists()):
            return result
    return None


def _complete(members: dict[str, Member]) -> bool:
    return any(ext in members for ext in IMAGE_EXTENSIONS) and ("txt" in members or "json" in members)


def _key(name: str) -> str:
    return next((key for key, _ in groups(iter([Member(name, 0, 0)]))), name)


def _end(stretch: Stretch) -> int:
    last = stretch.members[-1]
    return last.offset + -(-last.size // BLOCK) * BLOCK
