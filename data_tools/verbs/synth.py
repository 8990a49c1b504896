"""Draw image-text shards with known captions for demos and tests, reproducible from a seed: `megamoe data synth`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import webdataset
from tqdm import tqdm

from data_tools.scenes.render import encode
from data_tools.scenes.scene import Scene, Scenes
from megamoe.core.errors import DataError
from megamoe.core.files import atomic_file


def synthesize(
    out: Path,
    *,
    samples: int,
    seed: int,
    level: int = 1,
    image_size: int = 64,
    shard_size: int = 2000,
    validation: int = 1000,
    quality: int = 90,
    corrupt: float = 0.0,
    dry_run: bool = False,
) -> list[Path]:
    """Write ``out/train``, ``out/validation`` and ``out/combinations`` (``validation`` samples each of the latter two).

    The content of sample i does not depend on ``shard_size`` or the number of samples. ``corrupt`` is the share of
    training pictures whose bytes are damaged; their JSON says how. With ``dry_run`` nothing is written.

    Returns:
        The shards.

    Raises:
        DataError: a folder holds shards that this call would not replace, or cannot be written.
    """
    jobs = (("train", samples, corrupt), ("validation", validation, 0.0), ("combinations", validation, 0.0))
    for split, count, _ in jobs:
        _refuse_others(out / split, -(-count // shard_size))
    shards = [out / split / f"{number:05d}.tar" for split, count, _ in jobs for number in range(-(-count // shard_size))]
    if dry_run:
        return shards
    total = sum(count for _, count, _ in jobs)
    with tqdm(total=total, desc="synth", unit="sample", file=sys.stderr, disable=None) as bar:
        for split, count, share in jobs:
            scenes = Scenes(seed, split, level, share)
            for number, first in enumerate(range(0, count, shard_size)):
                shard = out / split / f"{number:05d}.tar"
                shard.with_name(f"{shard.name}.idx").unlink(missing_ok=True)  # it describes the replaced shard
                with atomic_file(shard) as file, webdataset.TarWriter(file, encoder=False, mtime=0) as tar:
                    for i in range(first, min(first + shard_size, count)):
                        tar.write(_sample(i, scenes[i], level, image_size, quality))
                        bar.update()
    return shards


def _refuse_others(folder: Path, shards: int) -> None:
    """Refuse a folder with other shards: those of an earlier, larger set would silently become part of this one."""
    ours = {f"{number:05d}.tar" for number in range(shards)}
    others = sorted(path for path in folder.glob("*.tar") if path.name not in ours)
    if others:
        raise DataError(f"{others[0]}: not part of this set ({shards} shards); remove it or write to another folder")


def _sample(i: int, scene: Scene, level: int, side: int, quality: int) -> dict[str, str | bytes]:
    scale = side / 64
    objects = [
        {
            **thing.combination._asdict(),
            "x": round(thing.x * scale, 2),
            "y": round(thing.y * scale, 2),
            "radius": round(thing.radius * scale, 2),
        }
        for thing in scene.things
    ]
    record = {
        "caption": scene.caption,
        "width": side,
        "height": side,
        "level": level,
        "objects": objects,
        **scene.facts,
    }
    if scene.corruption is not None:
        record["corrupt"] = scene.corruption
    return {
        "__key__": f"{i:09d}",
        "jpg": encode(scene, side, quality),
        "json": json.dumps(record).encode("utf-8"),
        "txt": scene.caption.encode("utf-8"),
    }
