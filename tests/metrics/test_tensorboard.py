"""TensorBoard, read back with TensorBoard's own reader."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megamoe.metrics import TensorBoardSink
from megamoe.metrics.tensorboard import heat_map


def record(step: int) -> dict[str, object]:
    return {
        "step": step,
        "loss": 1.0 / step,
        "grad_norm": None,
        "tokens_per_second": 10.0,
        "load": {"decoder.blocks.0": [0.5, 0.25, 0.25, 0.0], "vision.blocks.1": [0.5, 0.5]},
    }


def read(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


def test_scalars_come_at_the_first_step_and_at_every_nth(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path, None, every=5)
    for step in range(1, 13):
        sink.write(record(step))
    sink.close()
    events = read(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("loss/total")] == [
        (1, 1.0),
        (5, pytest.approx(0.2)),
        (10, pytest.approx(0.1)),
    ]
    assert "optimizer/grad_norm" not in events.Tags()["scalars"], "null is no number"


def test_what_the_data_gave_is_added_up_between_the_steps_written(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path, None, every=5)
    for step in range(1, 11):
        sources = {"laion": {"samples": 8, "lost_image": int(step == 3)}}
        sink.write(record(step) | {"sources": sources, "reading": {"downloads": 2, "seconds": 0.5}})
    sink.close()
    events = read(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("data_laion/samples")] == [(1, 8), (5, 32), (10, 40)]
    assert [e.value for e in events.Scalars("data_laion/lost_image")] == [0, 1, 0]
    assert [e.value for e in events.Scalars("data_reading/seconds")] == [0.5, 2.0, 2.5]


def test_expert_load_is_relative_to_the_mean_by_layer_and_as_a_picture(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path, None, every=1)
    for step in range(1, 12):
        sink.write(record(step))
    sink.close()
    events = read(tmp_path)
    largest, mean, least = (
        events.Scalars(f"expert_load/decoder.blocks.0/{name}")[0].value for name in ("max", "mean", "min")
    )
    assert (largest, mean, least) == (2.0, 1.0, 0.0)
    pictures = events.Images("expert_load")
    assert [picture.step for picture in pictures] == [1, 10]
    assert Image.open(BytesIO(pictures[0].encoded_image_string)).size == (4 * 16, 2 * 16)


def test_heat_map_is_darkest_without_load_and_grey_where_a_layer_has_no_expert() -> None:
    pixels = heat_map([np.array([2.0, 1.0, 0.0]), np.array([1.0])], cell=1)
    assert pixels.shape == (2, 3, 3) and pixels.dtype == np.uint8
    brightness = pixels[0].sum(axis=-1)
    assert brightness[0] > brightness[1] > brightness[2]
    assert (pixels[1, 0] == pixels[0, 1]).all(), "the mean has one colour in all layers"
    assert len(set(pixels[1, 1].tolist())) == 1


def test_pictures_come_with_their_captions(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path, None, every=1)
    pixels = np.zeros((5, 32, 32, 3), np.uint8)
    captions = ["a red fox", "costs $3 or $4 {x}_^", "<b>bold</b>", "猫", "long " * 60]
    sink.pictures(7, pixels, captions)
    sink.close()
    events = read(tmp_path)
    assert [image.step for image in events.Images("train/pictures")] == [7]
    text = events.Tensors("train/captions/text_summary")[0].tensor_proto.string_val[0].decode()
    assert all(" ".join(caption.split()) in text for caption in captions)


def test_steps_after_the_resumed_one_are_replaced(tmp_path: Path) -> None:
    first = TensorBoardSink(tmp_path, None, every=1)
    for step in range(1, 7):
        first.write({"step": step, "loss": 9.0})
    first.close()
    second = TensorBoardSink(tmp_path, 3, every=1)
    for step in range(4, 6):
        second.write({"step": step, "loss": 1.0})
    second.close()
    assert [(e.step, e.value) for e in read(tmp_path).Scalars("loss/total")] == [
        (1, 9.0),
        (2, 9.0),
        (3, 9.0),
        (4, 1.0),
        (5, 1.0),
    ]
