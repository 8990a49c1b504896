"""How well a model captions held-out pictures: loss under the true captions, and captions that are exactly right."""

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
from megamoe.data.sample.tokenizer import Tokenizer
from megamoe.data.shards.from_config import open_cache
from megamoe.data.shards.sequential import Sample, read_samples
from megamoe.evaluate.greedy import greedy_decode, hidden_states
from megamoe.evaluate.results import check_name, png_base64, results_folder, write_results
from megamoe.model.batch import IGNORE
from megamoe.model.stack import HeadLayer, Stack

EXAMPLES = 64  # samples that are kept with picture and generated caption
MAX_NEW_TOKENS = 64  # of a generated caption, unless a true one is longer

logger = logging.getLogger(__name__)


def evaluate_caption(
    source: Path, data: list[str] | None = None, name: str = "validation", limit: int | None = None, batch: int = 64
) -> dict[str, Any]:
    """Caption the pictures of ``data`` greedily, compare with their captions, and write the figures of split ``name``.

    Args:
        source: Run folder (its newest checkpoint) or checkpoint folder.
        data: Shards, in the forms of ``data.train``; none: ``data.validation`` of the run's config, or else what its
            ``data.held_out`` kept from training.
        name: Name of the split. ``validation`` is the top level of eval.json, others are under ``splits``.
        limit: Most samples to look at; default all.
        batch: Pictures at a time. It changes no result but the memory and time that are needed.

    Returns:
        What eval.json has for the split: ``exact_match`` (share of captions that are right to the letter), ``loss``
        (mean over caption and end tokens in nats; None if not finite), ``samples``, ``name``, ``step``, ``data``,
        ``lost`` (samples that could not be used), ``lost_samples`` (which and why) and ``bad_shards`` (shards of which the
        rest was left out, and why; only if the run's ``data.bad_shards`` says to go on without them).

    Raises:
        UserError: no such checkpoint or shards, a name that cannot be a file's, or no sample that can be used.
        DataError: a shard cannot be used, and the run's ``data.bad_shards`` says to stop, or there are too many.
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
    loaded.stack.to(device)
    lost: list[str] = []
    bad: list[str] = []

    def set_aside(shard: str, reason: str) -> None:
        """By the rule of training, which stops at the first of them or at one more than it may leave out."""
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

    # Nothing is written to where the data lies; indexes that training made are used.
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
    """Adds up, batch by batch, what :func:`evaluate_caption` reports. Works on the device of the model."""

    def __init__(self, loaded: LoadedModel):
        self._stack, self._tokenizer = loaded.stack, loaded.tokenizer
        self._device = next(loaded.stack.parameters()).device
        self._patches = loaded.config.model.vision.patches
        # Training cuts longer captions to this; their loss is that of what training sees of them.
        self._room = loaded.config.data.sequence_length - self._patches - 1
        self._loss_sum, self._targets, self._matches = 0.0, 0, 0
        self.samples = 0
        self.examples: list[dict[str, Any]] = []  # of the first EXAMPLES samples

    @property
    def exact_match(self) -> float:
        """Share of samples whose generated caption is the true one, white space around it aside."""
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
        self._loss_sum += _summed_loss(self._stack, pixels_BHWC, text_B3L.to(self._device))
        self._targets += int((text_B3L[:, 2] != IGNORE).sum())
        # Room for the true caption and its end. Cut per row, so that the neighbours in a batch change nothing.
        most = [max(MAX_NEW_TOKENS, len(ids) + 1) for ids in captions]
        decoded = greedy_decode(self._stack, self._tokenizer, pixels_BHWC, max_new_tokens=max(most))
        for sample, ids, length in zip(samples, decoded, most, strict=True):
            self._compare(sample, self._tokenizer.decode(ids[:length]))

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
    """One sample per row as training lays it out, padded on the right.

    Returns:
        int64 (B, 3, L): ids, segment ids (1, padding 0), labels. The last picture token predicts the first word.
    """
    length = patches + max(len(ids) for ids in captions) + 1
    text_B3L = torch.zeros(len(captions), 3, length, dtype=torch.int64)
    text_B3L[:, 0], text_B3L[:, 2] = tokenizer.pad_id, IGNORE
    for row, caption in zip(text_B3L, captions, strict=True):
        targets = torch.tensor([*caption, tokenizer.eos_id])
        end = patches + len(targets)
        row[0, :patches], row[0, patches:end] = tokenizer.image_id, targets
        row[1, :end] = 1
        row[2, patches - 1 : end - 1] = targets
    return text_B3L


def _summed_loss(stack: Stack, pixels_BHWC: Tensor, text_B3L: Tensor) -> float:
    head = stack.layers[-1]
    assert isinstance(head, HeadLayer)
    with torch.inference_mode():
        hidden_BLD = hidden_states(stack, pixels_BHWC, text_B3L)
        total, _ = head((hidden_BLD, torch.zeros(2, device=hidden_BLD.device), text_B3L))
    return float(total)


def _batches(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    iterator = iter(samples)
    while batch := list(islice(iterator, size)):
        yield batch
