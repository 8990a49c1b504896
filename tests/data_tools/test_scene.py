"""Synthetic scenes: captions are true, places are unambiguous, combinations are held out."""

from __future__ import annotations

import re
from itertools import combinations

import numpy as np
import pytest

from data_tools.scenes.render import render
from data_tools.scenes.scene import (
    COLOURS,
    COUNTS,
    HELD_OUT,
    PLACES,
    RADII,
    SHAPES,
    Scene,
    Scenes,
    all_combinations,
    held_out_combinations,
)

MANY = 400


def scenes(split: str, level: int, seed: int = 1) -> list[Scene]:
    source = Scenes(seed, split, level)
    return [source[i] for i in range(MANY)]


def box(scene: Scene, side: int = 64) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of what differs from the background."""
    pixels = np.asarray(render(scene, side)).astype(int)
    rows, columns = np.nonzero(np.abs(pixels - scene.grey).max(axis=2) > 8)
    return int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max())


@pytest.mark.parametrize("side", [64, 96])
def test_level_1_shows_what_its_caption_says(side: int) -> None:
    pattern = re.compile(rf"a (small|large) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) at the ({'|'.join(PLACES)})")
    for scene in scenes("train", 1):
        match = pattern.fullmatch(scene.caption)
        assert match is not None
        size, colour, _, place = match.groups()
        left, top, right, bottom = (edge * 64 / side for edge in box(scene, side))
        assert left > 0 and top > 0 and right < 63 and bottom < 63  # a rim of background on every side
        extent = max(right - left, bottom - top) + 1
        assert (extent < 18) if size == "small" else (extent > 19)
        words = place.split()
        column = "left" if (left + right) / 2 < 24 else "right" if (left + right) / 2 > 40 else ""
        row = "top" if (top + bottom) / 2 < 24 else "bottom" if (top + bottom) / 2 > 40 else ""
        assert {word for word in (row, column) if word} == set(words) - {"center"}
        x, y = (int((low + high) / 2 * side / 64) for low, high in ((left, right), (top, bottom)))
        middle = np.asarray(render(scene, side))[y, x]
        assert np.abs(middle.astype(int) - COLOURS[colour]).max() < 30


def test_level_2_shows_as_many_as_it_says_and_none_touch() -> None:
    for scene in scenes("train", 2):
        count = COUNTS.index(scene.caption.split()[0]) + 1
        assert len(scene.things) == count
        assert scene.caption.endswith("s") == (count > 1) or scene.caption.endswith("cross")
        assert_apart(scene)


def test_level_3_relations_are_true() -> None:
    for scene in scenes("train", 3):
        first, second = scene.things
        dx, dy = second.x - first.x, second.y - first.y
        relation = scene.facts["relation"]
        assert scene.caption == f"a {' '.join(first.combination)} {relation} a {' '.join(second.combination)}"
        axes = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}
        along, across = axes[str(relation)]
        assert along > 20 and along > 2 * abs(across)
        assert_apart(scene)


def assert_apart(scene: Scene) -> None:
    for thing in scene.things:
        assert thing.radius < thing.x < 64 - thing.radius and thing.radius < thing.y < 64 - thing.radius
    for a, b in combinations(scene.things, 2):
        assert max(abs(a.x - b.x), abs(a.y - b.y)) > a.radius + b.radius


@pytest.mark.parametrize("seed", range(20))
def test_held_out_combinations_leave_every_word_in_training(seed: int) -> None:
    held_out = held_out_combinations(seed)
    assert len(held_out) == HELD_OUT and held_out == held_out_combinations(seed)
    trained = set(all_combinations()) - set(held_out)
    for word in (*RADII, *COLOURS, *SHAPES):
        assert sum(word in each for each in trained) >= 10
    assert {shape for _, _, shape in held_out} == set(SHAPES)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_held_out_combinations_are_in_no_other_split(level: int) -> None:
    shown = {split: {thing.combination for s in scenes(split, level) for thing in s.things} for split in SPLITS}
    held_out = set(held_out_combinations(1))
    assert shown["combinations"] == held_out
    assert not shown["train"] & held_out and not shown["validation"] & held_out
    assert shown["validation"] <= set(all_combinations()) - held_out


SPLITS = ("train", "validation", "combinations")


def test_no_validation_picture_is_a_training_picture() -> None:
    # greys of the two are never the same, so that no picture can be, however many are made
    assert not {scene.grey for scene in scenes("train", 1)} & {scene.grey for scene in scenes("validation", 1)}
    assert [scene.caption for scene in scenes("train", 1)] != [scene.caption for scene in scenes("validation", 1)]


def test_colours_and_background_are_well_apart() -> None:
    points = [np.array(colour) for colour in COLOURS.values()] + [np.array([200] * 3), np.array([248] * 3)]
    distances = [np.linalg.norm(a - b) for i, a in enumerate(points[:-2]) for b in points[i + 1 :]]
    assert min(distances) > 90
