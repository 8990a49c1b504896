"""`megamoe bench data`: our loader beside webdataset, and both beside what the cores can decode, on the same tars.

All readers use two processes and give the training process pixels and captions; ours also makes token ids and packs
sequences. Rounds of the readers alternate, and each figure is the median of its rounds, so that what else the machine
does falls on all alike.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from megamoe.bench.pictures import SIDE, caption, write_shards
from megamoe.config.schema import DataConfig, VisionConfig
from megamoe.data.catalog import DataSet, Source
from megamoe.data.decode import decode_image
from megamoe.data.index import build_index
from megamoe.data.loader import StepLoader
from megamoe.data.storage import Storage
from megamoe.data.tokenizer import Tokenizer
from megamoe.data.vocabulary import train_tokenizer

Decode = Callable[[bytes], torch.Tensor]
PROCESSES = 2
_IN_SEQUENCE = 8
_BATCH = 64


def bench_data(folder: Path, samples: int = 8000, rounds: int = 3, side: int = SIDE) -> dict[str, Any]:
    """Measure and return all figures, by name.

    Args:
        folder: where the shards are made, or lie from the last time.
        samples: pictures of an epoch; 224x224 JPEGs have about 27 KB.
        rounds: of each reader; the first of all is not counted.
        side: of the pictures in pixels. All readers give them at 224x224.

    Returns:
        ``samples_per_second`` by reader, and the ratios: ``ratio_webdataset`` (ours over webdataset with Pillow),
        ``ratio_webdataset_simplejpeg`` (with our decoder), ``ratio_decode_limit`` (ours over decoding alone), and
        ``kilobytes_per_picture``.
    """
    shards = write_shards(folder / f"shards-{side}", samples, side=side)
    model = folder / "tokenizer.model"
    if not model.exists():
        train_tokenizer([caption(i) for i in range(3000)], folder / "tokenizer", 400)
    dataset = DataSet([Source("0", [str(shard) for shard in shards])], folder / "index")
    readers: dict[str, Callable[[], float]] = {
        "decode_limit": partial(_decode_limit, shards),
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
    """As open_clip builds it: shards and samples shuffled, decoded and put into batches by the workers."""
    stages = [
        webdataset.SimpleShardList([str(shard) for shard in shards]),
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


def _decode_limit(shards: list[Path]) -> float:
    """Pictures that two processes decode in a second, the bytes in memory, into batches of the same size as ours."""
    with get_context("forkserver").Pool(PROCESSES) as pool:
        parts = [shards[process::PROCESSES][:2] for process in range(PROCESSES)]
        return sum(pool.map(_decode_all, parts, chunksize=1))


def _decode_all(shards: list[Path]) -> float:
    storage = Storage()
    indexes = [(str(shard), build_index(shard)) for shard in shards]
    pictures = [storage.read(name, [index.sample(i).image])[0] for name, index in indexes for i in range(index.samples)]
    batch = np.zeros((_BATCH, SIDE, SIDE, 3), dtype=np.uint8)
    for timed in (False, True):
        started, done = time.perf_counter(), 0
        for number, data in enumerate(pictures if timed else pictures[:_BATCH]):
            decode_image(data, SIDE, batch[number % _BATCH])
            done += 1
    return done / (time.perf_counter() - started)


def _rate(counts: Iterator[int], samples: int) -> float:
    """Samples per second from the third batch on, over about an epoch: what was prepared before is not counted."""
    for _ in range(2):
        next(counts)
    started, seen = time.perf_counter(), 0
    for count in counts:
        seen += count
        if seen >= samples * 0.7:
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
