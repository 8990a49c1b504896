"""Keep the samples of a set that satisfy conditions, one output shard per input shard: `megamoe data filter`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from data_tools.checks.conditions import Conditions
from data_tools.writing.account import Account, whole_records
from data_tools.writing.lazy_writer import LazyWriter
from data_tools.writing.out_folder import OutFolder, open_source, output_names
from megamoe.core.errors import UserError


@dataclass(frozen=True)
class _Shard:
    name: str
    source: Path
    label: str
    target: Path | None
    conditions: Conditions


def filter_shards(
    spec: str, out: Path, conditions: Conditions, *, processes: int | None = None, dry_run: bool = False
) -> Account:
    """Write the samples of the shards ``spec`` that satisfy ``conditions`` to shards of the same names in ``out``.

    A dropped sample is counted under the first condition that it fails. Shards without any kept sample are not written.

    Raises:
        UserError: no condition is given.
        DataError: the shards cannot be read, or ``out`` belongs to something else.
    """
    if conditions in (Conditions(), Conditions(keep_missing=True)):
        raise UserError("filter: no condition is given; name at least one, such as --min-size 256")
    source = open_source(spec)
    names = output_names(source)
    folder = OutFolder(out, "filter", {"source": source.state, **asdict(conditions)}, dry_run=dry_run)
    folder.refuse_others(names)
    if (result := folder.finished()) is None:
        jobs = [
            _Shard(name, shard, label, folder.target(name), conditions)
            for name, shard, label in zip(names, source.shards, source.labels, strict=True)
        ]
        result = folder.do(_filter_shard, jobs, label="filter", processes=processes)
        folder.close(result)
    return result


def _filter_shard(job: _Shard) -> Account:
    account = Account()
    with LazyWriter(job.target) as writer:
        for record in whole_records(job.source, job.label, account):
            cause, missing = job.conditions.judge(record)
            if cause is not None:
                account.dropped[cause] += 1
                continue
            account.kept_as.update(f"missing {column}" for column in missing)
            writer.write(record)
    writer.count(account, job.name)
    return account
