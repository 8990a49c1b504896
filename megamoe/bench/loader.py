"""`megamoe bench data`: compare our loader with webdataset, and both with what the cores can decode, on the same tars.

All readers use two processes and hand pixels and captions to the training process; ours also makes token ids and packs
sequences. Rounds of the readers alternate, and each figure is the median of its rounds, so that other load on the machine
affects all alike.

Two limits are measured as well. ``decode_limit`` only decodes, from memory to memory. ``shared_limit`` does what every
loader with worker processes has to do: it reads each picture from its tar, in random order, and decodes it into memory that
another process sees. It makes no order, index, captions or batches, so no such loader can exceed it.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from megamoe.bench.pictures import SIDE, caption, write_shards
from megamoe.config.data import DataConfig
from megamoe.config.model import VisionConfig
from megamoe.data.loader.step_loader import StepLoader
from megamoe.data.sample.decode import decode_image
from megamoe.data.sample.tokenizer import Tokenizer
from megamoe.data.sample.vocabulary import train_tokenizer
from megamoe.data.shards.catalog import DataSet, Source
from megamoe.data.shards.index import Extent, build_index
from megamoe.data.shards.storage import Storage

Decode = Callable[[bytes], torch.Tensor]
PROCESSES = 2
_IN_SEQUENCE = 8
_BATCH = 64
_RING = 5  # batches in memory at a time, as many as our loader keeps
_WARM_UP = 8  # batches not counted: after them every batch of the ring was touched and every shard opened
_PASSES = 3  # over the shards, so that a round takes seconds


def bench_data(folder: Path, samples: int = 8000, rounds: int = 3, side: int = SIDE) -> dict[str, Any]:
    """Measure and return all figures, by name.

    Args:
        folder: Where the shards are made; existing ones are reused.
        samples: Pictures of an epoch; each round reads about two epochs. 224x224 JPEGs have about 27 KB.
        rounds: Timed rounds per reader, after one warm-up round.
        side: Side of the pictures in pixels. All readers return them at 224x224.

    Returns:
        ``samples_per_second`` by reader, and the ratios: ``ratio_webdataset`` (ours over webdataset with Pillow),
        ``ratio_webdataset_simplejpeg`` (with our decoder), ``ratio_decode_limit`` (ours over decoding alone),
        ``ratio_shared_limit`` (ours over reading and decoding into shared memory), and ``kilobytes_per_picture``.
    """
    per_shard = min(1000, -(-samples // PROCESSES))
    shards = write_shards(folder / f"shards-{side}x{per_shard}", samples, per_shard, side)
    model = folder / "tokenizer.model"
    if not model.exists():
        train_tokenizer([caption(i) for i in range(3000)], folder / "tokenizer", 400)
    dataset = DataSet([Source("0", [str(shard) for shard in shards])], folder / "index")
    readers: dict[str, Callable[[], float]] = {
        "decode_limit": partial(_limit, shards, _decode_all),
        "shared_limit": partial(_limit, shards, _read_all),
        "ours": partial(_ours, dataset, Tokenizer(model), samples),
        "webdataset_pillow": partial(_webdataset, shards, _pillow, samples),
        "webdataset_simplejpeg": partial(_webdataset, shards, _simplejpeg, samples),
    }
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(rounds + 1):
        for name, read in readers.items():
            rates[name].append(read())
    middle = {name: statistics.median(each[1:]) for name, each in rates.items()}
    return {
        "samples": samples,
        "side": side,
        "processes": PROCESSES,
        "kilobytes_per_picture": sum(shard.stat().st_size for shard in shards) / samples / 1000,
        "samples_per_second": middle,
        "all_rounds": rates,
        "ratio_decode_limit": middle["ours"] / middle["decode_limit"],
        "ratio_shared_limit": middle["ours"] / middle["shared_limit"],
        "ratio_webdataset": middle["ours"] / middle["webdataset_pillow"],
        "ratio_webdataset_simplejpeg": middle["ours"] / middle["webdataset_simplejpeg"],
    }


def _ours(dataset: DataSet, tokenizer: Tokenizer, samples: int) -> float:
    data = DataConfig(sequence_length=2048, images_per_sequence=_IN_SEQUENCE, workers=PROCESSES, shuffle_shards=4)
    with StepLoader(
        data,
        vision=VisionConfig(image_size=SIDE, patch_size=16),
        tokenizer=tokenizer,
        dataset=dataset,
        seed=0,
        global_batch=16,
        micro_batch=8,
        dp_rank=0,
        dp_size=1,
    ) as loader:
        return _rate((len(step.samples) for step in loader), samples)


def _webdataset(shards: list[Path], decode: Decode, samples: int) -> float:
    """Read as open_clip does: workers shuffle shards and samples, decode, and make batches."""
    stages = [
        webdataset.SimpleShardList([str(shard) for shard in shards] * _PASSES),
        webdataset.shuffle(100),
        webdataset.split_by_worker,
        webdataset.tarfile_to_samples(),
        webdataset.shuffle(1000),
        webdataset.map_dict(jpg=decode, txt=bytes.decode),
        webdataset.to_tuple("jpg", "txt"),
        webdataset.batched(_BATCH, partial=False),
    ]
    pipeline = webdataset.DataPipeline(*stages)
    loader = DataLoader(pipeline, batch_size=None, num_workers=PROCESSES, multiprocessing_context="forkserver")
    return _rate((len(texts) for _, texts in loader), samples)


def _limit(shards: list[Path], work: Callable[[list[Path]], float]) -> float:
    """Return the pictures per second of two processes that share the shards."""
    with get_context("forkserver").Pool(PROCESSES) as pool:
        return sum(pool.map(work, [shards[process::PROCESSES] for process in range(PROCESSES)], chunksize=1))


def _decode_all(shards: list[Path]) -> float:
    """Decode bytes in memory into one batch, over and over."""
    storage = Storage()
    pictures = [storage.read(str(shard), [extent])[0] for shard, extent in _extents(shards)]
    return _decode_each(pictures.__getitem__, len(pictures), np.zeros((_BATCH, SIDE, SIDE, 3), dtype=np.uint8))


def _read_all(shards: list[Path]) -> float:
    """Read bytes at random places of the tars and decode them into as much shared memory as our loader uses."""
    files = {shard: os.open(shard, os.O_RDONLY) for shard in shards}
    places = [(files[shard], extent.size, extent.offset) for shard, extent in _extents(shards)]
    random = [places[i] for i in np.random.Generator(np.random.Philox(key=0)).permutation(len(places))]
    shape = (_RING * _BATCH, SIDE, SIDE, 3)
    batches = np.ndarray(shape, np.uint8, mmap.mmap(-1, math.prod(shape)))
    return _decode_each(lambda i: os.pread(*random[i]), len(random), batches)


def _extents(shards: list[Path]) -> list[tuple[Path, Extent]]:
    indexes = [(shard, build_index(shard)) for shard in shards]
    return [(shard, index.sample(i).image) for shard, index in indexes for i in range(index.samples)]


def _decode_each(picture: Callable[[int], Any], pictures: int, batch: npt.NDArray[np.uint8]) -> float:
    """Return the pictures per second, after a warm-up that writes all of ``batch`` once."""
    for i in range(len(batch)):
        decode_image(picture(i % pictures), SIDE, batch[i])
    started = time.perf_counter()
    for i in range(_PASSES * pictures):
        decode_image(picture(i % pictures), SIDE, batch[i % len(batch)])
    return _PASSES * pictures / (time.perf_counter() - started)


def _rate(counts: Iterator[int], samples: int) -> float:
    """Return the samples per second after the warm-up, over most of the passes."""
    for _ in range(_WARM_UP):
        next(counts)
    started, seen = time.perf_counter(), 0
    for count in counts:
        seen += count
        if seen >= samples * (_PASSES - 1):
            break
    return seen / (time.perf_counter() - started)


def _pillow(data: bytes) -> torch.Tensor:
    return _tensor(Image.open(io.BytesIO(data)).convert("RGB"))


def _simplejpeg(data: bytes) -> torch.Tensor:
    pixels = simplejpeg.decode_jpeg(data, min_height=SIDE, min_width=SIDE, strict=True)
    return torch.from_numpy(pixels) if pixels.shape[:2] == (SIDE, SIDE) else _tensor(Image.fromarray(pixels))


def _tensor(image: Image.Image) -> torch.Tensor:
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(image).copy())
