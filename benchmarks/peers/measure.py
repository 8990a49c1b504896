"""Measure one loader, in a process of its own; run as ``python -m peers.NAME PHASE ...`` from benchmarks/.

This module must not import megamoe: it runs in the peers' environments. Each phase prints one line of JSON at the end:

- ``prepare``: make the loader's own format from the JPEGs;
- ``rate``: time to the first batch, then samples per second over ``--seconds`` (new epochs included), then memory;
- ``stop``: read half an epoch, save the loader's state, read the other half;
- ``resume``: in a new process, time from the state to the first batch, then the same half again.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

SIDE = 224
WARM = 10  # batches before ``rate`` starts its clock

Item = tuple[Tensor, str, str]  # uint8 (224, 224, 3), key, caption
Batch = tuple[Tensor, list[str], list[str]]


@dataclass(frozen=True)
class Setting:
    """How to open a loader. ``data``: the loader's own format; ``decoder``: pillow or simplejpeg."""

    data: Path
    workers: int
    batch: int
    decoder: str
    seconds: float


class Loader(ABC):
    """A library's loader, used as its documentation says: endless, epoch after epoch, shuffled."""

    resumable = True

    @abstractmethod
    def __init__(self, setting: Setting, state: Any) -> None:
        """Open the loader, and resume from ``state`` if that is not None."""

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[Tensor, list[str]]]:
        """Yield pixels uint8 (batch, 224, 224, 3) and sample keys; the last batch of an epoch may be smaller."""

    def state(self) -> Any:
        """Return the current position, for pickling."""
        raise NotImplementedError


def run(prepare: Callable[[Sequence[Path], Path], None], loader: type[Loader]) -> None:
    """Run the phase that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("phase", choices=["prepare", "rate", "stop", "resume"])
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--decoder", choices=sorted(DECODERS), default="pillow")
    parser.add_argument("--seconds", type=float, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    jpegs = sorted(arguments.pictures.glob("*.jpg"))
    setting = Setting(arguments.data, arguments.workers, arguments.batch, arguments.decoder, arguments.seconds)
    batches = len(jpegs) // setting.batch
    if arguments.phase == "prepare":
        start = time.perf_counter()
        prepare(jpegs, arguments.data)
        result: dict[str, Any] = {"prepare_seconds": time.perf_counter() - start}
    elif arguments.phase == "rate":
        result = _rate(loader, setting)
    elif arguments.phase == "stop" and not loader.resumable:
        result = {"state_bytes": None}
    elif arguments.phase == "stop":
        stream = loader(setting, None)
        iterator = iter(stream)
        _keys(iterator, setting, batches // 2)
        state = pickle.dumps(stream.state())
        arguments.state.write_bytes(state)
        result = {"state_bytes": len(state), "keys": _keys(iterator, setting, batches - batches // 2)}
    else:
        state = pickle.loads(arguments.state.read_bytes())
        start = time.perf_counter()
        iterator = iter(loader(setting, state))
        first = _keys(iterator, setting, 1)
        seconds = time.perf_counter() - start
        result = {"resume_seconds": seconds, "keys": first + _keys(iterator, setting, batches - batches // 2 - 1)}
    print(json.dumps(result), flush=True)
    os._exit(0)  # some loaders' threads and workers do not end by themselves in mid-epoch


def collate(items: Sequence[Item]) -> Batch:
    """Stack the pictures into one tensor, and list the rest."""
    return torch.stack([item[0] for item in items]), [item[1] for item in items], [item[2] for item in items]


def with_pillow(jpeg: bytes) -> Tensor:
    """Decode to uint8 (224, 224, 3)."""
    with Image.open(BytesIO(jpeg)) as image:
        return _tensor(np.array(image.convert("RGB")))


def with_simplejpeg(jpeg: bytes) -> Tensor:
    """Decode to uint8 (224, 224, 3)."""
    return _tensor(simplejpeg.decode_jpeg(jpeg, colorspace="RGB"))


DECODERS: dict[str, Callable[[bytes], Tensor]] = {"pillow": with_pillow, "simplejpeg": with_simplejpeg}


def _tensor(pixels: npt.NDArray[np.uint8]) -> Tensor:
    assert pixels.shape == (SIDE, SIDE, 3), "the pictures need no resize"
    return torch.from_numpy(pixels)


def _rate(loader: type[Loader], setting: Setting) -> dict[str, Any]:
    start = time.perf_counter()
    iterator = iter(loader(setting, None))
    _keys(iterator, setting, 1)
    first = time.perf_counter() - start
    _keys(iterator, setting, WARM)
    samples, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < setting.seconds:
        samples += len(_keys(iterator, setting, 1)[0])
    return {"first_seconds": first, "samples_per_second": samples / seconds, **_memory()}


def _keys(iterator: Iterator[tuple[Tensor, list[str]]], setting: Setting, batches: int) -> list[list[str]]:
    found = []
    for _ in range(batches):
        pixels, keys = next(iterator)
        assert pixels.dtype == torch.uint8 and pixels.shape == (len(keys), SIDE, SIDE, 3), pixels.shape
        assert 0 < len(keys) <= setting.batch
        found.append(list(keys))
    return found


def _memory() -> dict[str, float]:
    """Return MB of this process and its descendants; ``pss`` divides each shared page among its users."""
    main = psutil.Process()
    others = main.children(recursive=True)
    infos = [process.memory_full_info() for process in (main, *others)]
    return {
        "main_mb": infos[0].rss / 1e6,
        "workers_mb": sum(info.rss for info in infos[1:]) / 1e6,
        "pss_mb": sum(info.pss for info in infos) / 1e6,
        "processes": len(infos),
    }
