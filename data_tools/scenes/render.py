"""Draw scenes with Pillow. Each shape is drawn once, eight times as large, scaled down, and then only pasted."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import simplejpeg
from PIL import Image, ImageDraw

from data_tools.scenes.scene import COLOURS, RADII, Scene, Thing

_SUPERSAMPLE = 8
_SUBPIXELS = 4  # positions per pixel: finer ones are not visible, and each needs its own mask
_RADIUS_STEPS = 8  # radii per size, between its smallest and its largest


def render(scene: Scene, side: int) -> Image.Image:
    """Draw ``scene`` as an RGB picture of ``side`` x ``side`` pixels."""
    picture = Image.new("RGB", (side, side), (scene.grey,) * 3)
    for thing in scene.things:
        mask, x, y = _place(thing, side)
        picture.paste(COLOURS[thing.combination.colour], (x, y), mask)
    return picture


def encode(scene: Scene, side: int, quality: int) -> bytes:
    """Encode ``scene`` as JPEG, damaged if the scene says so. Chroma subsampling would blur small objects: it is off."""
    data = simplejpeg.encode_jpeg(np.asarray(render(scene, side)), quality=quality, colorsubsampling="444")
    return data if scene.corruption is None else _spoil(data, scene.corruption)


def _place(thing: Thing, side: int) -> tuple[Image.Image, int, int]:
    """Return the mask of an object and the pixel of its upper left corner."""
    scale = side / 64
    smallest, largest = RADII[thing.combination.size]
    step = round((thing.radius - smallest) / (largest - smallest) * _RADIUS_STEPS)
    radius = (smallest + step * (largest - smallest) / _RADIUS_STEPS) * scale
    half = math.ceil(radius) + 1
    left, top = (round((centre * scale - half) * _SUBPIXELS) for centre in (thing.x, thing.y))
    mask = _mask(thing.combination.shape, radius, half, left % _SUBPIXELS, top % _SUBPIXELS)
    return mask, left // _SUBPIXELS, top // _SUBPIXELS


@lru_cache(maxsize=4096)
def _mask(shape: str, radius: float, half: int, right: int, down: int) -> Image.Image:
    """Return the coverage (0 to 255) of a shape centred at ``half``, moved right and down by quarters of a pixel."""
    big = Image.new("L", ((2 * half + 1) * _SUPERSAMPLE,) * 2)
    centre_x, centre_y = (half + right / _SUBPIXELS, half + down / _SUBPIXELS)
    corners = ((centre_x + x * radius, centre_y + y * radius) for x, y in _outline(shape))
    points = [(x * _SUPERSAMPLE, y * _SUPERSAMPLE) for x, y in corners]
    ImageDraw.Draw(big).polygon(points, fill=255)
    return big.reduce(_SUPERSAMPLE)


@lru_cache(maxsize=16)
def _outline(shape: str) -> tuple[tuple[float, float], ...]:
    """Return the corners of a shape in the square from -1 to 1, y downwards. All shapes look about equally large."""
    if shape == "circle":
        return _star(96, 0.95, 0.95)
    if shape == "square":
        return ((-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84))
    if shape == "triangle":
        return ((0.0, -0.95), (1.0, 0.82), (-1.0, 0.82))
    if shape == "star":
        return _star(5, 1.0, 0.4)
    if shape == "diamond":  # narrow, to differ from a rotated square
        return ((0.0, -1.0), (0.68, 0.0), (0.0, 1.0), (-0.68, 0.0))
    arm, end = 0.3, 0.95  # cross
    return (
        *((-arm, -end), (arm, -end), (arm, -arm), (end, -arm), (end, arm), (arm, arm)),
        *((arm, end), (-arm, end), (-arm, arm), (-end, arm), (-end, -arm), (-arm, -arm)),
    )


def _star(points: int, outer: float, inner: float) -> tuple[tuple[float, float], ...]:
    corners = []
    for n in range(2 * points):
        reach, angle = (inner if n % 2 else outer), math.pi * n / points
        corners.append((reach * math.sin(angle), -reach * math.cos(angle)))
    return tuple(corners)


def _spoil(data: bytes, how: str) -> bytes:
    """Damage a file as crawls do: make it empty, a web page, half a file, or a file with overwritten bytes."""
    if how == "empty":
        return b""
    if how == "html":
        return b"<!DOCTYPE html><html><body><h1>404 Not Found</h1></body></html>"
    middle = (len(data) + data.index(b"\xff\xda")) // 2  # in the compressed pixels, behind the start of the scan
    if how == "truncated":
        return data[:middle]
    return data[:middle] + b"\xff\xc4" * 4 + data[middle + 8 :]  # a marker where none is allowed
