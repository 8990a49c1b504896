"""Make pictures and captions that both encode their number, so that a wrong pair is detected."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image

from megamoe.config.data import DataConfig
from megamoe.config.model import VisionConfig
from megamoe.data.loader.lane import LostSample
from megamoe.data.loader.step_loader import StepBatch, StepLoader
from megamoe.data.remote.cache import ShardCache
from megamoe.data.sample.tokenizer import Tokenizer
from megamoe.data.shards.catalog import DataSet
from tests.data.shard_factory import caption

_GRID = 4  # 16 squares, dark or light: the bits of a number


def grid(n: int, side: int = 64) -> npt.NDArray[np.uint8]:
    """Return uint8 (side, side): the number ``n`` as squares, light ones for zeros."""
    bits = [[n >> (row * _GRID + column) & 1 for column in range(_GRID)] for row in range(_GRID)]
    squares = np.where(np.array(bits, dtype=bool), 30, 225).astype(np.uint8)
    return squares.repeat(side // _GRID, axis=0).repeat(side // _GRID, axis=1)


def picture(n: int, kind: str = "JPEG", mode: str = "RGB", side: int = 64, **options: object) -> bytes:
    """Encode the number ``n`` as a picture file."""
    buffer = io.BytesIO()
    Image.fromarray(grid(n, side)).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def number_in(pixels: npt.NDArray[np.uint8]) -> int:
    """Read the number from a decoded picture, uint8 (H, W, 3)."""
    side = len(pixels) // _GRID
    squares = pixels.astype(float).mean(axis=2).reshape(_GRID, side, _GRID, side).mean(axis=(1, 3))
    return sum(1 << at for at, light in enumerate(squares.flatten().tolist()) if light < 128)


def pair(n: int, key: str | None = None, image: bytes | None = None, ext: str = "jpg") -> list[tuple[str, bytes]]:
    """Return the members of a sample whose picture and caption both encode ``n``."""
    name = f"{n:05d}" if key is None else key
    return [(f"{name}.{ext}", picture(n) if image is None else image), (f"{name}.txt", caption(n).encode())]


def make_loader(
    data: DataSet, tokenizer: Tokenizer, *, rank: int = 0, ranks: int = 1, workers: int = 0, cache: ShardCache | None = None
) -> StepLoader:
    """Make a loader of 4 lanes whose sequences have room for every caption."""
    return StepLoader(
        DataConfig(sequence_length=96, images_per_sequence=3, workers=workers, shuffle_shards=2),
        vision=VisionConfig(image_size=16, patch_size=8),
        tokenizer=tokenizer,
        dataset=data,
        seed=3,
        global_batch=4,
        micro_batch=1,
        dp_rank=rank,
        dp_size=ranks,
        cache=cache,
    )


@dataclass
class Seen:
    """What a loader handed out: how often each id was used, why each was lost, and what the counters add up to."""

    tokenizer: Tokenizer
    used: Counter[str] = field(default_factory=Counter)
    lost: dict[str, str] = field(default_factory=dict)
    losses: list[LostSample] = field(default_factory=list)
    counters: Counter[tuple[int, str]] = field(default_factory=Counter)
    reading: Counter[str] = field(default_factory=Counter)
    numbers: dict[str, int] = field(default_factory=dict)

    def add(self, step: StepBatch) -> None:
        """Take a step, and fail if any pair is wrong or a loss is not counted."""
        ids = [name for _, name in step.samples]
        for (image, text), name in zip(pairs_in(step, self.tokenizer), ids, strict=True):
            assert image == text, f"{name}: picture {image} beside caption {text}"
            assert self.numbers.setdefault(name, image) == image
        self.used.update(ids)
        self.lost |= {each.id: each.reason for each in step.lost}
        self.losses += step.lost
        self.counters += step.counters
        self.reading += step.reading
        causes = Counter(each.reason.partition(":")[0] for each in step.lost)
        assert causes == Counter(
            {what.removeprefix("lost_"): n for (_, what), n in step.counters.items() if what.startswith("lost_")}
        )
        assert step.counters[0, "samples"] == len(ids)


def pairs_in(step: StepBatch, tokenizer: Tokenizer) -> Iterable[tuple[int, int]]:
    """Return the numbers of picture and caption of each sample in a step, in order."""
    for images, text in step.micro_batches:
        for images_I, (ids, segments, _) in zip(images, text, strict=True):
            for segment in range(1, int(segments.max()) + 1):
                words = ids[(segments == segment) & (ids != tokenizer.image_id) & (ids != tokenizer.eos_id)]
                yield number_in(images_I[segment - 1].numpy()), int(tokenizer.decode(words.tolist()).rpartition(" ")[2])


def see(loader: StepLoader, tokenizer: Tokenizer, steps: int) -> Seen:
    """Take the next ``steps`` steps of a loader."""
    seen = Seen(tokenizer)
    for _ in range(steps):
        seen.add(next(loader))
    return seen
