"""Decide which samples of a damaged shard can be saved, and what is lost.

A picture and a caption become a sample only if their names, in headers whose checksums are right, say the same key
*and* they lie in one stretch of the tar without damage or an end between them (:mod:`.salvage`). Members on two sides of
damage are never combined: in a joined file the same key may name another sample there. Within a stretch, members that are
not adjacent are combined only if no extension of that key repeats. A caption must fill its place in the tar exactly, and
pictures are decoded to the last byte: both checks fail where blocks are missing without a damaged header. A text that was
replaced by one of the same length cannot be detected from the tar; ``megamoe data checksum`` detects it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

from data_tools.checks.contents import (
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
from data_tools.checks.salvage import Salvage, Stretch
from megamoe.data.sample.decode import CorruptSample
from megamoe.data.shards.index import IMAGE_EXTENSIONS, groups
from megamoe.data.shards.tar import BLOCK, Member

PASSED_OVER, DISTRUSTED, AMBIGUOUS, OVERSIZE = "bytes passed over", "next to damage", "ambiguous members", "too large"
NO_SAMPLE = "belongs to no sample"
MAX_SAMPLE = 1 << 30  # bytes of a sample that is held in memory


@dataclass(frozen=True)
class Lost:
    """Something that is not in the repaired shard: its key if known, where its bytes are, and why it is lost."""

    key: str | None
    ranges: list[tuple[int, int]]  # byte ranges [start, end) in the shard, headers included
    cause: str
    reason: str


class Candidate(NamedTuple):
    """Members that may form a sample, by extension."""

    key: str
    members: dict[str, Member]
    apart: bool  # combined from several places


@dataclass
class Plan:
    """The samples to save, in the order of the shard, and what is lost."""

    chosen: list[Candidate] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)
    changed: bool = False  # the chosen samples do not lie properly in the shard
    strays: list[Lost] = field(default_factory=list)  # lost only if the shard must be rewritten

    def lose(self, key: str | None, members: Sequence[Member], cause: str, reason: str) -> None:
        """Count ``members`` as lost."""
        ranges = [(member.offset - BLOCK, member.offset + member.size) for member in members]
        self.lost.append(Lost(key, sorted(ranges), cause, reason))


def plan_repair(found: Salvage) -> Plan:
    """Decide which members may form samples, from their names and places alone."""
    plan = Plan(changed=found.parts > 1)
    for member in found.distrusted:
        reason = "right after damage, which may have destroyed its true name"
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


def _plan_stretch(stretch: Stretch, plan: Plan) -> None:
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
            plan.chosen.append(Candidate(key, together, len(own) > 1))
            continue
        plan.changed = True
        doubtful = False
        for i, part in enumerate(parts):
            # jpg jpg txt, all with one key: it is unknown to which picture the caption belongs
            doubtful = i > 0 and own[i] == own[i - 1] + 1 and (doubtful or not _complete(parts[i - 1]))
            if doubtful or not _complete(part):
                plan.lose(key, list(part.values()), AMBIGUOUS, f"the key occurs {len(parts)} times, not always complete")
            else:
                plan.chosen.append(Candidate(key, part, False))


def check_contents(plan: Plan, file: BinaryIO, decode: bool) -> None:
    """Read every candidate, and keep in the plan only good ones that are the first of their key."""
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
        plan.chosen.append(Candidate(key, members, apart))
        plan.changed = plan.changed or apart


def _fault(plan: Plan, file: BinaryIO, key: str, members: dict[str, Member], decode: bool) -> tuple[str, str] | None:
    """Return why a sample cannot be used. Damaged members that it does not need are removed from ``members``."""
    image = next((ext for ext in members if ext in IMAGE_EXTENSIONS), None)
    if image is None:
        return NO_PICTURE, f"has only {', '.join(members)}"
    if "txt" not in members and "json" not in members:
        return NO_CAPTION, f"has only {', '.join(members)}"
    if sum(member.size for member in members.values()) > MAX_SAMPLE:
        return OVERSIZE, f"larger than {MAX_SAMPLE} bytes"
    text = "txt" if "txt" in members else "json"
    for ext in [ext for ext in CHECKED if ext in members]:
        try:
            data = read_member(file, members[ext])
        except CorruptSample as corrupt:
            return OVERSIZE, f"{ext}: {corrupt}"
        if ext == text and not _is_own(file, members[ext], data):
            return CAPTION, f"{ext}: zeros in it, or no zeros after it: bytes of another member"
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
    """Return whether a text fills its place exactly. Where blocks are missing, other members' bytes seldom do."""
    file.seek(member.offset + member.size)
    filling = file.read(-member.size % BLOCK)
    return 0 not in text and filling.count(0) == len(filling)


def _complete(members: dict[str, Member]) -> bool:
    return any(ext in members for ext in IMAGE_EXTENSIONS) and ("txt" in members or "json" in members)


def _key(name: str) -> str:
    return next((key for key, _ in groups(iter([Member(name, 0, 0, 0)]))), name)


def _end(stretch: Stretch) -> int:
    last = stretch.members[-1]
    return last.offset + -(-last.size // BLOCK) * BLOCK
