"""Choose at random what a synthetic picture shows, and write its caption; ``render`` draws it.

Level 1 is one object at a place, level 2 several equal objects, level 3 two objects in a relation. Lengths are for a
picture 64 pixels wide and scale with it. Everything about sample i of a split depends on (seed, split, i) alone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

import numpy as np

RADII = {"small": (6.0, 8.0), "large": (12.0, 15.0)}  # half the side of the box around an object
COLOURS = {
    "red": (214, 24, 32),
    "orange": (255, 132, 0),
    "yellow": (250, 228, 0),
    "green": (20, 140, 50),
    "cyan": (0, 200, 225),
    "blue": (24, 50, 210),
    "purple": (150, 40, 180),
    "black": (16, 16, 16),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = ("one", "two", "three", "four")
SPLITS = ("train", "validation", "combinations")
CORRUPTIONS = ("empty", "html", "truncated", "damaged")
HELD_OUT = 12  # of 96 combinations: each shape twice, each size six times, no colour more than twice
_SIDE = 64.0
_RIM = 1.25  # background between an object and the edge of the picture, or the line between two objects
_EDGE = 20.0  # up to this distance from the edge is "left"; 28 to 36 is the middle; the gaps separate the places
_MIDDLE = (28.0, 36.0)


class Combination(NamedTuple):
    """The words that describe an object. Combinations, not single words, are held out."""

    size: str
    colour: str
    shape: str


@dataclass(frozen=True)
class Thing:
    """One object: what it is, its centre and its radius, for a picture 64 pixels wide."""

    combination: Combination
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """One picture: its objects, the grey behind them, its caption, and how its file is damaged, if it is."""

    caption: str
    grey: int
    things: list[Thing]
    corruption: str | None = None
    facts: dict[str, str | int] = field(default_factory=dict)


class Scenes:
    """All scenes of a split. ``corrupt`` is the share of files that are damaged."""

    def __init__(self, seed: int, split: str, level: int, corrupt: float = 0.0) -> None:
        self._key = np.array([seed & (1 << 64) - 1, SPLITS.index(split)], dtype=np.uint64)
        self._split = split
        self._level = level
        self._corrupt = corrupt
        held_out = held_out_combinations(seed)
        if split == "combinations":
            self._combinations = held_out
        else:
            self._combinations = [each for each in all_combinations() if each not in set(held_out)]

    def __getitem__(self, i: int) -> Scene:
        """Return scene number ``i``."""
        draw = _Draw(self._key, i)
        # Train has even greys and validation odd ones, so no picture is in both.
        grey = 200 + 2 * draw.below(24) + (self._split == "validation")
        corruption = CORRUPTIONS[draw.below(len(CORRUPTIONS))] if draw.unit() < self._corrupt else None
        caption, things, facts = (self._one, self._several, self._pair)[self._level - 1](draw)
        return Scene(caption, grey, things, corruption, facts)

    def _one(self, draw: _Draw) -> tuple[str, list[Thing], dict[str, str | int]]:
        what = self._pick(draw)
        radius = draw.between(*RADII[what.size])
        place = draw.below(len(PLACES))
        x, y = _third(draw, place % 3, radius), _third(draw, place // 3, radius)
        caption = f"a {what.size} {what.colour} {what.shape} at the {PLACES[place]}"
        return caption, [Thing(what, x, y, radius)], {"place": PLACES[place]}

    def _several(self, draw: _Draw) -> tuple[str, list[Thing], dict[str, str | int]]:
        what = self._pick(draw)
        count = 1 + draw.below(len(COUNTS))
        across = 2 if what.size == "large" else 3  # cells wide enough that objects cannot touch
        cell = _SIDE / across
        things = []
        for place in draw.choose(across * across, count):
            radius = draw.between(*RADII[what.size])
            slack = cell / 2 - radius - _RIM / 2
            x = (place % across + 0.5) * cell + draw.between(-slack, slack)
            y = (place // across + 0.5) * cell + draw.between(-slack, slack)
            things.append(Thing(what, x, y, radius))
        plural = "" if count == 1 else "es" if what.shape == "cross" else "s"
        return f"{COUNTS[count - 1]} {what.size} {what.colour} {what.shape}{plural}", things, {"count": count}

    def _pair(self, draw: _Draw) -> tuple[str, list[Thing], dict[str, str | int]]:
        first, second = (self._combinations[n] for n in draw.choose(len(self._combinations), 2))
        relation = draw.below(len(RELATIONS))
        vertical, near = relation >= 2, relation % 2 == 0  # near: the first is the one to the left or above
        things = []
        for what, low in ((first, near), (second, not near)):
            radius = draw.between(*RADII[what.size])
            along = _third(draw, 0 if low else 2, radius, most=_SIDE / 2 - _RIM / 2)  # each in its half: they cannot touch
            across = _third(draw, 1, radius)
            x, y = (across, along) if vertical else (along, across)
            things.append(Thing(what, x, y, radius))
        name = RELATIONS[relation]
        return f"a {' '.join(first)} {name} a {' '.join(second)}", things, {"relation": name}

    def _pick(self, draw: _Draw) -> Combination:
        return self._combinations[draw.below(len(self._combinations))]


def all_combinations() -> list[Combination]:
    """Return every size with every colour and shape."""
    return [Combination(*each) for each in product(RADII, COLOURS, SHAPES)]


def held_out_combinations(seed: int) -> list[Combination]:
    """Return the combinations that only the split ``combinations`` shows, chosen by hash and spread over all words."""
    left = {shape: 2 for shape in SHAPES} | {size: 6 for size in RADII} | {colour: 2 for colour in COLOURS}
    chosen: list[Combination] = []
    for each in sorted(all_combinations(), key=lambda each: hashlib.sha256(f"{seed} {each}".encode()).digest()):
        if len(chosen) < HELD_OUT and all(left[word] for word in each):
            chosen.append(each)
            for word in each:
                left[word] -= 1
    return sorted(chosen)


def _third(draw: _Draw, third: int, radius: float, most: float = _SIDE) -> float:
    """Draw a coordinate in the low, middle or high third that keeps an object inside the picture.

    ``most`` is the maximum distance from the edge that an object of the low or high third may reach.
    """
    if third == 1:
        return draw.between(*_MIDDLE)
    low = draw.between(radius + _RIM, min(_EDGE, most - radius))
    return low if third == 0 else _SIDE - low


class _Draw:
    """Draw the random numbers of one sample from its own part of a Philox stream, independent of other samples."""

    def __init__(self, key: np.ndarray, sample: int) -> None:
        self._raw = iter(np.random.Philox(key=key, counter=sample << 64).random_raw(32).tolist())

    def below(self, n: int) -> int:
        return int(next(self._raw) * n >> 64)

    def unit(self) -> float:
        return float(next(self._raw) / 2.0**64)

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.unit()

    def choose(self, n: int, count: int) -> list[int]:
        """Draw ``count`` different numbers below ``n``."""
        rest = list(range(n))
        return [rest.pop(self.below(len(rest))) for _ in range(count)]
