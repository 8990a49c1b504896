"""Share sources with all kinds of members, and plain readers, among the tests of filter, dedup, split and reshard."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner, Result
from PIL import Image

from megamoe.commands.data.group import data
from tests.data.shard_factory import caption, jpeg, write_tar

Members = dict[str, bytes]


def run(*arguments: object) -> Result:
    """Run the verb in this process unless ``--processes`` is given, since starting others takes time."""
    if "--processes" not in arguments:
        arguments += ("--processes", 1)
    return CliRunner().invoke(data, [str(each) for each in arguments])


def outcome(*arguments: object, status: int = 0) -> dict[str, Any]:
    """Return the JSON that the verb prints."""
    result = run(*arguments, "--json")
    assert result.exit_code == status, (result.output, result.exception)
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["read"] == found["kept"] + sum(found["dropped"].values()) + found["lost"]
    return found


def photo(seed: int, width: int = 320, height: int = 240, kind: str = "JPEG") -> bytes:
    """Make a picture with the spectrum of photographs (amplitudes fall as 1/f) that depends on the seed."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(240)[:, None] * 240, np.fft.fftfreq(320) * 320)
    frequency[0, 0] = 1
    planes = [np.fft.ifft2(np.fft.fft2(rng.normal(size=(240, 320))) / frequency).real for _ in range(3)]
    pixels = np.stack(planes, axis=2)
    pixels = (pixels - pixels.min()) / np.ptp(pixels) * 255
    out = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).resize((width, height)).save(out, kind)
    return out.getvalue()


def full_sample(n: int) -> Members:
    """Make a sample of four members, including some that training does not use."""
    fields = {"caption": caption(n), "similarity": n / 100, "n": n}
    return {
        "jpg": jpeg(n),
        "txt": caption(n).encode(),
        "json": json.dumps(fields).encode(),
        "seg.npy": bytes([n % 256]) * n,
    }


def make_shards(folder: Path, shards: Sequence[Iterable[tuple[str, Members]]]) -> Path:
    for number, samples in enumerate(shards):
        members = [(f"{key}.{ext}", content) for key, sample in samples for ext, content in sample.items()]
        write_tar(folder / f"{number:05d}.tar", members, tarfile.PAX_FORMAT)
    return folder


def numbered(folder: Path, counts: Sequence[int]) -> Path:
    """Write shards of ``counts`` full samples, numbered consecutively."""
    starts = [sum(counts[:i]) for i in range(len(counts))]
    shards = [[(f"{n:05d}", full_sample(n)) for n in range(a, a + count)] for a, count in zip(starts, counts, strict=True)]
    return make_shards(folder, shards)


def read_tar(path: Path) -> list[tuple[str, Members]]:
    """Read the samples of a tar in order, with the standard library alone."""
    samples: list[tuple[str, Members]] = []
    with tarfile.open(path) as tar:
        for info in tar:
            folder, _, base = info.name.rpartition("/")
            key, _, ext = base.partition(".")
            key = f"{folder}/{key}" if folder else key
            content = tar.extractfile(info).read()  # type: ignore[union-attr]
            if not samples or samples[-1][0] != key:
                samples.append((key, {}))
            samples[-1][1][ext] = content
    return samples


def read_folder(folder: Path) -> list[tuple[str, Members]]:
    return [sample for path in sorted(folder.glob("*.tar")) for sample in read_tar(path)]


def digests(folder: Path) -> dict[str, str]:
    """Return the digest of every file below ``folder``, including hidden ones."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
