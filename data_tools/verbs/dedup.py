"""Keep one of several equal or similar pictures, and none of an evaluation set: `megamoe data dedup`.

Every shard is read twice: once to fingerprint its samples, once to copy the kept ones. In between, all fingerprints are
compared in memory (32 bytes per sample, 8 with ``near``, and about as much again to sort them).
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

from data_tools.similar.duplicates import find_duplicates
from data_tools.similar.fingerprints import By, ShardToHash, hash_shard, load_fingerprints, load_keys
from data_tools.writing.account import Account, whole_records
from data_tools.writing.lazy_writer import LazyWriter
from data_tools.writing.out_folder import OutFolder, Source, open_source, output_names
from megamoe.core.errors import DataError
from megamoe.core.files import atomic_file

DROPPED = "dropped.jsonl"
_DUPLICATE, _EVALUATION = "duplicate", "in_evaluation_set"


@dataclass(frozen=True)
class _Shard:
    name: str
    source: Path
    label: str
    target: Path | None
    dropped: dict[int, str]  # number of the sample in the shard -> cause
    fingerprints: Path


def dedup_shards(
    spec: str,
    out: Path,
    *,
    by: By,
    distance: int = 0,
    against: str | None = None,
    processes: int | None = None,
    dry_run: bool = False,
) -> Account:
    """Write the samples of the shards ``spec`` to shards of the same names in ``out``, without duplicates.

    A sample is dropped if it is equal or near to a sample of ``against``, or to an earlier sample of the shards that is
    *kept*. So the first of equal samples is kept, and every dropped sample has a kept partner. Of a chain of pictures, each
    near the next, more than one may be kept. ``out/dropped.jsonl`` names each dropped sample, its partner (the first match,
    with those of ``against`` before all others) and the cause. Samples with nothing to compare (no picture; with ``near``
    also a damaged picture, or one of a single colour) are kept and counted as not compared.

    Args:
        spec: the shards.
        out: folder for the shards.
        by: ``image`` (sha256 of the picture's bytes), ``image+caption`` (its caption too), or ``near`` (perceptual hash).
        distance: with ``near``, maximum number of differing bits of 64.
        against: shards of an evaluation set; they are only read.
        processes: see :func:`data_tools.distribute.jobs.map_jobs`.
        dry_run: count without writing anything.

    Raises:
        DataError: the shards cannot be read, one is in both sets, or ``out`` belongs to something else.
    """
    source = open_source(spec)
    names = output_names(source)
    evaluation = open_source(against) if against is not None else Source([], [], "")
    if both := {shard.resolve() for shard in source.shards} & {shard.resolve() for shard in evaluation.shards}:
        raise DataError(f"--against: {min(both)} is in both sets, so all its samples would be dropped; name other shards")
    request = {"source": source.state, "against": evaluation.state, "by": by, "distance": distance}
    folder = OutFolder(out, "dedup", request, dry_run=dry_run)
    folder.refuse_others(names)
    if (result := folder.finished()) is not None and (out / DROPPED).exists():
        return result
    with folder.scratch() as place:
        result = Account()
        files: list[Path] = []
        for title, which in (("evaluation", evaluation), ("set", source)):
            jobs = [
                ShardToHash(f"{title}-{i:06d}", shard, label, by, place / f"{title}-{i:06d}.npz")
                for i, (shard, label) in enumerate(zip(which.shards, which.labels, strict=True))
            ]
            files += [job.target for job in jobs]
            hashed = folder.do(hash_shard, jobs, label=f"hash {title}", processes=processes)
            if which is evaluation:  # of the evaluation set, only losses matter
                for name, reason in hashed.lost:
                    result.lose(f"--against {name}", reason)
        copies = _jobs(folder, names, source, evaluation, files, distance if by == "near" else None)
        result.add(folder.do(_copy_shard, copies, label="write", processes=processes))
    folder.close(result)
    return result


def _jobs(
    folder: OutFolder, names: list[str], source: Source, evaluation: Source, files: list[Path], distance: int | None
) -> list[_Shard]:
    """Find the duplicates, name them in ``dropped.jsonl``, and return for each shard which of its samples to drop.

    ``files`` are the fingerprints of the evaluation set, then of the source.
    """
    labels = evaluation.labels + source.labels
    protected = len(evaluation.labels)
    causes: list[dict[int, str]] = [{} for _ in labels]
    keys = functools.lru_cache(maxsize=64)(lambda shard: load_keys(files[shard]))
    # A dry run does not keep the list: it goes into the temporary folder with the fingerprints.
    listing = files[0].with_name(DROPPED) if folder.dry_run else folder.path / DROPPED
    with atomic_file(listing) as file:
        for (shard, sample), (other_shard, other), bits in find_duplicates(files, protected, distance):
            cause = causes[shard][sample] = _EVALUATION if other_shard < protected else _DUPLICATE
            line = {
                "sample": f"{labels[shard]}#{keys(shard)[sample]}",
                "partner": f"{labels[other_shard]}#{keys(other_shard)[other]}",
                "cause": cause,
                "distance": bits,
            }
            file.write(f"{json.dumps(line)}\n".encode())
    return [
        _Shard(name, shard, label, folder.target(name), dropped, fingerprints)
        for name, shard, label, dropped, fingerprints in zip(
            names, source.shards, source.labels, causes[protected:], files[protected:], strict=True
        )
    ]


def _copy_shard(job: _Shard) -> Account:
    account = Account()
    comparable = load_fingerprints(job.fingerprints).comparable
    with LazyWriter(job.target) as writer:
        for i, record in enumerate(whole_records(job.source, job.label, account)):
            if i in job.dropped:
                account.dropped[job.dropped[i]] += 1
                continue
            if not comparable[i]:
                account.kept_as["not_compared"] += 1
            writer.write(record)
    writer.count(account, job.name)
    return account
