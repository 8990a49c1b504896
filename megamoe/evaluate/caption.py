"""Score how well a model captions held-out pictures: loss of the true captions, and captions that match exactly."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from megamoe.checkpoint import LoadedModel, load_model
from megamoe.core.errors import DataError, UserError
from megamoe.core.packed_batch import PackedBatch, empty_text, write_sample
from megamoe.data.sample.tokenizer import Tokenizer
from megamoe.data.shards.from_config import open_cache
from megamoe.data.shards.sequential import Sample, read_samples
from megamoe.evaluate.greedy import greedy_decode
from megamoe.evaluate.results import check_name, png_base64, results_folder, write_results

EXAMPLES = 64  # samples whose picture and generated caption are kept
MAX_NEW_TOKENS = 64  # of a generated caption, unless the true one is longer

logger = logging.getLogger(__name__)


def evaluate_caption(
    source: Path, data: list[str] | None = None, name: str = "validation", limit: int | None = None, batch: int = 64
) -> dict[str, Any]:
    """Caption the pictures of ``data`` greedily, compare with the true captions, and write the figures of split ``name``.

    Args:
        source: Run folder (its newest checkpoint) or checkpoint folder.
        data: Shards, in the forms of ``data.train``. Default: ``data.validation`` of the run's config, else the share
            of the training shards that ``data.held_out`` kept from training.
        name: Name of the split. ``validation`` is the top level of eval.json, others are under ``splits``.
        limit: Maximum number of samples; default all.
        batch: Pictures per batch. It changes memory and time, not the results.

    Returns:
        The entry of the split in eval.json: ``exact_match`` (share of captions that match to the letter), ``loss``
        (mean over caption and end tokens in nats; None if not finite), ``samples``, ``name``, ``step``, ``data``,
        ``lost`` (number of unusable samples), ``lost_samples`` (which and why) and ``bad_shards`` (shards whose remaining
        samples were skipped, and why; only if the run's ``data.bad_shards`` allows it).

    Raises:
        UserError: the checkpoint or shards do not exist, the name cannot be a file name, or no sample is usable.
        DataError: a shard is unusable and the run's ``data.bad_shards`` says to stop, or too many are.
    """
    check_name(name)
    loaded = load_model(source)
    settings, share = loaded.config.data, 1.0
    data = data or settings.validation
    if not data and settings.held_out:
        data, share = [shards for source in settings.train for shards in source.shards], settings.held_out
    if not data:
        raise UserError("data.validation of the run is empty: name the held-out shards with --data SHARDS")
    folder = results_folder(source)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded.model.to(device)
    lost: list[str] = []
    bad: list[str] = []

    def set_aside(shard: str, reason: str) -> None:
        """Apply the rule of training: stop at the first bad shard, or at one more than ``max_bad_shards``."""
        if settings.bad_shards == "stop":
            raise DataError(reason)
        logger.warning("going on without shard %s: %s", shard, reason)
        bad.append(f"{shard}: {reason}")
        if len(bad) > settings.max_bad_shards:
            raise DataError(
                f"data.max_bad_shards {settings.max_bad_shards}: {len(bad)} shards cannot be used, the last {bad[-1]}; "
                "mend them or evaluate others with --data"
            )

    def lose(sample: str, reason: str) -> None:
        logger.warning("sample %s was left out: %s", sample, reason)
        lost.append(f"{sample}: {reason}")

    # Use the indexes that training made, and write nothing beside the data.
    index_dir = settings.index or folder / "index"
    image_size = loaded.config.model.vision.image_size
    cache = open_cache(settings)
    stream = read_samples(data, index_dir, image_size, limit, lose, on_bad=set_aside, cache=cache, share=share)
    scorer = CaptionScorer(loaded)
    with tqdm(total=limit, desc=f"eval {name}", unit="sample", file=sys.stderr, disable=None) as bar:
        for samples in _batches(stream, batch):
            scorer.add(samples)
            bar.update(len(samples))
    if not scorer.samples:
        first = f", the first: {(lost + bad)[0]}" if lost or bad else ""
        raise UserError(f"--data {' '.join(data)}: has no sample that can be used ({len(lost)} lost{first})")
    result = {
        "exact_match": scorer.exact_match,
        "loss": scorer.loss if math.isfinite(scorer.loss) else None,
        "samples": scorer.samples,
        "name": name,
        "step": loaded.step,
        "data": list(data),
        "lost": len(lost),
        "lost_samples": lost,
        "bad_shards": bad,
    }
    write_results(folder, result, scorer.examples)
    return result


class CaptionScorer:
    """Accumulate over batches what :func:`evaluate_caption` reports. Work on the device of the model."""

    def __init__(self, loaded: LoadedModel):
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self._device = next(loaded.model.parameters()).device
        self._patches = loaded.config.model.vision.patches
        # Training cuts captions to this length, so the loss counts the same part of them.
        self._room = loaded.config.data.sequence_length - self._patches - 1
        self._loss_sum, self._targets, self._matches = 0.0, 0, 0
        self.samples = 0
        self.examples: list[dict[str, Any]] = []  # of the first EXAMPLES samples

    @property
    def exact_match(self) -> float:
        """Share of samples whose generated caption equals the true one, ignoring white space around them."""
        return self._matches / self.samples

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats of caption and end tokens, each predicted from the true ones before it."""
        return self._loss_sum / self._targets

    def add(self, samples: Sequence[Sample]) -> None:
        """Score a batch."""
        pixels_BHWC = torch.from_numpy(np.stack([sample.image for sample in samples])).to(self._device)
        captions = [self._tokenizer.encode(sample.caption) for sample in samples]
        text_B3L = teacher_text([ids[: self._room] for ids in captions], self._patches, self._tokenizer)
        self._loss_sum += self._summed_loss(pixels_BHWC, text_B3L.to(self._device))
        self._targets += PackedBatch.of(text_B3L).targets
        # Leave room for the true caption and its end. Cut each row by itself, so that no result depends on the batch.
        most = [max(MAX_NEW_TOKENS, len(ids) + 1) for ids in captions]
        decoded = greedy_decode(self._model, self._tokenizer, pixels_BHWC, max_new_tokens=max(most))
        for sample, ids, length in zip(samples, decoded, most, strict=True):
            self._compare(sample, self._tokenizer.decode(ids[:length]))

    def _summed_loss(self, pixels_BHWC: Tensor, text_B3L: Tensor) -> float:
        # A compiled attention kernel would be built anew for each length, and the rows are short.
        with torch.inference_mode():
            total, _ = self._model(pixels_BHWC.unsqueeze(1), text_B3L, kernel="sdpa")
        return float(total)

    def _compare(self, sample: Sample, generated: str) -> None:
        match = generated.strip() == sample.caption.strip()
        self._matches += match
        self.samples += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(
                {
                    "id": sample.id,
                    "caption": sample.caption,
                    "generated": generated,
                    "match": match,
                    "image": png_base64(sample.image),
                }
            )


def teacher_text(captions: Sequence[Sequence[int]], patches: int, tokenizer: Tokenizer) -> Tensor:
    """Lay out one sample per row as training does, padded on the right.

    Returns:
        Packed text, int64 (B, 3, L), with labels for captions and ends of sequence.
    """
    length = patches + max(len(ids) for ids in captions) + 1
    text_B3L = empty_text(len(captions), length, tokenizer.pad_id)
    for row_3L, caption in zip(text_B3L, captions, strict=True):
        write_sample(row_3L, 0, 1, tokenizer.image_id, patches, [*caption, tokenizer.eos_id])
    return torch.from_numpy(text_B3L)


def _batches(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    iterator = iter(samples)
    while batch := list(islice(iterator, size)):
        yield batch
