"""Read shards as a PyTorch data set: webdataset's samples, in an order that does not depend on ranks or workers.

dataset = ShardDataset("shards/{00000..00063}.tar", global_batch=1024)
pipeline = dataset.decode("pil").rename(image="jpg;png", text="txt").to_tuple("image", "text").batched(dataset.micro_batch)
loader = wds.WebLoader(pipeline, batch_size=None, num_workers=8)
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info

from megamoe.core.errors import DataError, UserError
from megamoe.core.urls import masked
from megamoe.data.library.arguments import Shards, at_least, checked_settings, plain_names, which_rank, whole_micro_batch
from megamoe.data.library.dataset_position import Progress, Share, from_state
from megamoe.data.library.pipeline import ShardPipeline
from megamoe.data.order.sample_order import Anchor, SampleOrder, SampleRef
from megamoe.data.remote.download import ShardUnavailable
from megamoe.data.sample.decode import CorruptSample
from megamoe.data.shards.catalog import BadShard, Catalog, DataSet, InQuarantine, data_fingerprint, learnt_count
from megamoe.data.shards.expand import is_remote
from megamoe.data.shards.from_config import open_cache, open_data_set
from megamoe.data.shards.storage import Storage

Handler = Callable[[Exception], bool]


class ShardDataset(IterableDataset[dict[str, Any]], wds.FluidInterface):
    """Yield samples ``{"__key__": ..., "__url__": ..., ext: bytes, ...}``, each once per epoch over all ranks and workers.

    It is the first stage of a :class:`webdataset.DataPipeline` and has webdataset's methods itself: ``.decode(...)``,
    ``.map(...)`` and ``.batched(...)`` return a pipeline that has the state of this data set. Its samples are those of
    :mod:`megamoe.data.shards.index`, with all their members: a picture and a caption are required.

    R ranks take the samples of the order in turn, so step t has the same ``global_batch`` samples for any R. The workers
    of a rank take its samples in turn, ``micro_batch`` at a time. If the pipeline makes batches of that size, the loader
    returns the same batches in the same order for any number of workers.

    ``iter()`` resumes at the position of this object. In a worker process that is the position which the main process's
    object had when the worker started. So take one ``iter()`` of a loader for the whole run, or set
    ``persistent_workers``.

    Args:
        urls: shards as :func:`megamoe.data.shards.expand.expand_shards` takes them, or several sources as
            ``{"shards": ..., "weight": 1.0, "name": ...}``; the weight is the share of the samples read.
        global_batch: samples per step over all ranks.
        micro_batch: samples taken from a worker at a time; default the rank's part of the global batch.
        seed: seed of the order.
        shuffle_shards: window size in shards: shards are shuffled over the epoch, samples within a window. At least 1,
            which shuffles the samples of each shard: there is no unshuffled order.
        epochs: epochs of one ``iter()``; None: endless. Needs a single source, as each source has its own epochs.
        held_out: share of the samples, chosen by a hash of their keys, that is held out.
        rank: number of this rank; default that of torch.distributed if it is initialised, else ``$RANK``, else 0.
        world_size: number of ranks; default likewise.
        index_dir: folder of the indexes that do not lie beside their shards; new indexes are written there. Default: in
            the cache.
        cache: folder on this node for shards that are not local files. Default ``$MEGAMOE_CACHE``, else
            ``~/.cache/megamoe/shards``.
        cache_gb: maximum size of the cache in GB.
        handler: called as webdataset's with the exception when a shard (:class:`.BadShard`) or a sample
            (:class:`.CorruptSample`) cannot be read. If it returns True, the iteration continues without it; False ends
            the iteration.

    Attributes:
        micro_batch: as above.
        lost: samples that this process could not read, by cause: ``shard``, ``incomplete``.

    Raises:
        UserError: an argument is not valid.
        DataError: a shard is missing or named twice.
    """

    def __init__(
        self,
        urls: Shards,
        *,
        global_batch: int,
        micro_batch: int | None = None,
        seed: int = 0,
        shuffle_shards: int = 8,
        epochs: int | None = None,
        held_out: float = 0.0,
        rank: int | None = None,
        world_size: int | None = None,
        index_dir: str | Path | None = None,
        cache: str | Path | None = None,
        cache_gb: float = 100.0,
        handler: Handler = wds.reraise_exception,
    ) -> None:
        if not urls:
            raise UserError("urls: no shards are named; give a folder, a glob, path/{00000..00063}.tar or a URL")
        if not shuffle_shards:
            raise UserError(
                f"shuffle_shards {shuffle_shards}: there is no unshuffled order; 1 shuffles within each shard, and "
                "megamoe.data.read_samples or webdataset.WebDataset read shards front to back"
            )
        config = checked_settings(
            train=plain_names(urls), shuffle_shards=shuffle_shards, held_out=held_out, cache=cache, cache_gb=cache_gb
        )
        self._cache = open_cache(config)
        self._data = open_data_set(config, Path(index_dir) if index_dir is not None else self._cache.folder / "index")
        self._rank, self._ranks = which_rank(rank, world_size)
        self.micro_batch = whole_micro_batch(global_batch, micro_batch, self._ranks)
        self._seed = at_least("seed", seed, 0)
        self._shuffle_shards = shuffle_shards
        self._epochs = None if epochs is None else at_least("epochs", epochs, 1)
        if epochs is not None and len(self._data.sources) > 1:
            raise UserError(
                f"epochs {epochs}: {len(self._data.sources)} sources each have epochs of their own length; "
                "omit epochs, or name all shards as one source"
            )
        self._handler = handler
        self._order = {"shards": data_fingerprint(self._data), "seed": seed, "shuffle_shards": shuffle_shards}
        self._progress = Progress(0, tuple(Anchor(0, 0) for _ in self._data.sources))
        self._running: SampleOrder | None = None

    @property
    def lost(self) -> Counter[str]:
        return self._progress.lost

    def __iter__(self) -> Iterator[dict[str, Any]]:
        progress = self._here()
        progress.anchors = self._anchors()
        if progress.end is not None:
            progress = self._progress = progress.next_pass()
        progress.taken, progress.lost = progress.whole, Counter(progress.lost_before)
        storage = Storage(self._cache)
        # The same dict: a shard is out of use as soon as it is quarantined.
        data = self._data.with_quarantine(progress.quarantine)
        catalog = Catalog(data, storage)
        order = self._running = SampleOrder(
            [len(source.shards) for source in data.sources],
            [source.weight for source in data.sources],
            catalog.count,
            seed=self._seed,
            lanes=1,  # ranks take turns on a single lane, which therefore knows nothing of the global batch
            shuffle_shards=self._shuffle_shards,
            anchors=progress.anchors,
            is_read=catalog.is_read,
        )
        try:
            yield from self._samples(progress, data, catalog, order)
        except _Stop:
            return
        finally:
            storage.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the position at the last whole micro-batch of this process, as lists and numbers.

        It is equal on all ranks, except for what they lost, when all have taken the same number of micro-batches.
        """
        progress = self._here()
        return progress.to_state(self._order, self._anchors())

    def load_state_dict(self, state: Any) -> None:
        """Resume from ``state`` with any number of ranks and workers, any global batch and any micro-batch.

        Args:
            state: the state of one rank, a list of the states of several ranks, or the state of a ``StatefulDataLoader``
                over this data set or a pipeline of it. Of several states, the earliest position counts.

        Raises:
            DataError: it is not a state, or it belongs to other shards, another seed or another window.
        """
        # A StatefulDataLoader gives each worker that worker's own state only.
        self._progress = from_state(state, self._order, self._share() if get_worker_info() is not None else None)
        self._running = None

    def compose(self, *stages: Any) -> ShardPipeline:
        """Return a pipeline of this data set and ``stages``."""
        return ShardPipeline(self).compose(*stages)

    def __getstate__(self) -> dict[str, Any]:
        # The running iterator and its open files cannot be copied; the copy begins at the last whole micro-batch.
        return {**self.__dict__, "_progress": replace(self._progress, anchors=self._anchors()), "_running": None}

    def _share(self) -> Share:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        return Share(self._rank, self._ranks, worker, workers, self.micro_batch)

    def _here(self) -> Progress:
        """Return the progress of this process; a worker takes its share of the main process's progress."""
        share = self._share()
        if self._progress.share != share:
            self._progress = replace(self._progress, anchors=self._anchors()).by(share)
            self._running = None
        return self._progress

    def _anchors(self) -> tuple[Anchor, ...]:
        if self._running is None:
            return self._progress.anchors
        return tuple(self._running.anchors(0, self._progress.position))

    def _samples(self, progress: Progress, data: DataSet, catalog: Catalog, order: SampleOrder) -> Iterator[dict[str, Any]]:
        share = progress.share
        assert share is not None

        def locate(position: int) -> SampleRef:
            while True:
                try:
                    return order.locate(0, position)
                except BadShard as bad:
                    self._quarantine(bad, progress, data)

        if self._epochs is not None and progress.until is None:
            progress.until = (locate(progress.began).epoch // self._epochs + 1) * self._epochs
        while True:
            position = share.position(progress.began, progress.taken)
            ref = locate(position)
            if progress.until is not None and ref.epoch >= progress.until:
                places = range(max(progress.began, progress.anchors[0].start), position + 1)
                progress.end = places[bisect.bisect_left(places, progress.until, key=lambda place: locate(place).epoch)]
                progress.lost_before = Counter(progress.lost)
                progress.taken += -progress.taken % share.batch  # no more samples come: count the last micro-batch as whole
                return
            sample = self._read(ref, progress, data, catalog)
            progress.taken += 1
            if progress.taken % share.batch == 0:
                progress.lost_before = Counter(progress.lost)
            if sample is not None:
                yield sample

    def _read(self, ref: SampleRef, progress: Progress, data: DataSet, catalog: Catalog) -> dict[str, Any] | None:
        """Return the sample; None if it is lost and the handler says to continue."""
        shard = data.sources[ref.source].shards[ref.shard]
        try:
            key, members, lost = catalog.read_all(ref.source, ref.shard, ref.sample)
            for name, why in lost:
                self._handle(CorruptSample(f"sample {name}: {why}"))
                progress.lost["incomplete"] += 1
        except BadShard as bad:
            self._quarantine(bad, progress, data)
        except InQuarantine:
            pass
        else:
            return {"__key__": key, "__url__": masked(shard) if is_remote(shard) else shard, **members}
        progress.lost["shard"] += 1
        return None

    def _quarantine(self, bad: BadShard, progress: Progress, data: DataSet) -> None:
        """Quarantine a shard if the handler agrees. The samples it is known to have keep their places in the order."""
        self._handle(bad)
        count = max(bad.count, learnt_count(data, bad.shard, self._cache, fetch=False))
        share = progress.share
        assert share is not None
        if count < 0 and isinstance(bad.__cause__, ShardUnavailable) and share.ranks * share.workers > 1:
            raise DataError(
                f"{bad}; its samples have not been counted, so readers that can read it would be at other samples: "
                "index all shards before the run or omit this one"
            ) from bad
        progress.quarantine[bad.shard] = max(0, count)
        if len(progress.quarantine) == sum(len(source.shards) for source in data.sources):
            raise DataError(f"{bad}; all shards are quarantined") from bad

    def _handle(self, error: Exception) -> None:
        if not self._handler(error):
            raise _Stop from error


class _Stop(Exception):
    """The handler said to end the iteration."""
