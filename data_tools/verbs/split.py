"""Split a set into parts, such as training and validation, by the keys of the samples: `megamoe data split`."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from data_tools.writing.account import Account, whole_records
from data_tools.writing.lazy_writer import LazyWriter
from data_tools.writing.out_folder import OutFolder, open_source, output_names
from megamoe.core.errors import UserError
from megamoe.data.shards.held_out import bounds, key_hash


@dataclass(frozen=True)
class _Shard:
    name: str
    source: Path
    label: str
    parts: tuple[str, ...]
    targets: tuple[Path | None, ...]
    bounds: tuple[int, ...]


def split_shards(
    spec: str,
    out: Path,
    names: Sequence[str],
    shares: Sequence[str],
    *,
    processes: int | None = None,
    dry_run: bool = False,
) -> Account:
    """Write each sample of the shards ``spec`` to ``out/<name>`` of the part that its key belongs to.

    Within a part, shards keep their names and samples their order. The part depends on the key alone
    (:mod:`megamoe.data.shards.held_out`), so sets that share keys are split alike, however they are sharded.

    Args:
        spec: the shards.
        out: receives a folder per part.
        names: names of the parts.
        shares: shares of the parts, as decimal numbers; their sum is 1.
        processes: see :func:`data_tools.distribute.jobs.map_jobs`.
        dry_run: count without writing anything.

    Raises:
        UserError: names and shares do not define a split.
        DataError: the shards cannot be read, or ``out`` belongs to something else.
    """
    exact = _checked(names, shares)
    source = open_source(spec)
    shards = output_names(source)
    request = {"source": source.state, "names": list(names), "shares": [str(share) for share in exact]}
    folder = OutFolder(out, "split", request, parts=names, dry_run=dry_run)
    folder.refuse_others({f"{part}/{shard}" for part in names for shard in shards})
    if (result := folder.finished()) is None:
        ends = tuple(bounds(exact))
        jobs = [
            _Shard(name, shard, label, tuple(names), tuple(folder.target(f"{part}/{name}") for part in names), ends)
            for name, shard, label in zip(shards, source.shards, source.labels, strict=True)
        ]
        result = folder.do(_split_shard, jobs, label="split", processes=processes)
        folder.close(result)
    return result


def _split_shard(job: _Shard) -> Account:
    account = Account()
    with ExitStack() as stack:
        writers = [stack.enter_context(LazyWriter(target)) for target in job.targets]
        for record in whole_records(job.source, job.label, account):
            writers[bisect_right(job.bounds, key_hash(record.key))].write(record)
    for part, writer in zip(job.parts, writers, strict=True):
        writer.count(account, f"{part}/{job.name}")
        account.kept_as[part] += writer.samples
    return account


def _checked(names: Sequence[str], shares: Sequence[str]) -> list[Fraction]:
    if bad := [name for name in names if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name)]:
        raise UserError(f"--names {bad[0]!r}: a name becomes a folder; use letters, digits, _ - and .")
    if len(set(names)) < len(names):
        raise UserError(f"--names {','.join(names)}: a name repeats; give each part its own")
    if len(names) != len(shares):
        raise UserError(f"--shares {','.join(shares)}: {len(shares)} for {len(names)} names; give one share per name")
    try:
        exact = [Fraction(share) for share in shares]
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"--shares {','.join(shares)}: not numbers; write for example 0.99,0.01") from error
    if min(exact) <= 0 or sum(exact) != 1:
        total = float(sum(exact))
        raise UserError(f"--shares {','.join(shares)}: their sum is {total:g}; each must be above 0, and their sum 1")
    return exact
