"""Judge samples for `megamoe data filter`, and name the condition under which a dropped sample is counted."""

from __future__ import annotations

import io
import json
import math
import operator
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from PIL import Image

from data_tools.checks.sample_parts import caption_of, picture_of
from data_tools.writing.records import Record
from megamoe.core.errors import UserError

_WHERE = re.compile(r"\s*([A-Za-z_][\w.-]*)\s*(>=|<=|==|!=|>|<)\s*(\S+)\s*")
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


class Where(NamedTuple):
    """A condition on a numeric column of the sample's json, such as ``similarity>=0.28``."""

    column: str
    operator: str
    number: float

    def __str__(self) -> str:
        return f"{self.column}{self.operator}{self.number:.15g}"


def parse_where(text: str) -> Where:
    """Parse ``COLUMN OP NUMBER``, where OP is one of >= <= == != > <.

    Raises:
        UserError: the text does not have that form, or the number is not finite.
    """
    match = _WHERE.fullmatch(text)
    try:
        number = float(match.group(3)) if match else math.nan
    except ValueError:
        number = math.nan
    if match is None or not math.isfinite(number):
        raise UserError(f'--where {text!r}: not COLUMN OP NUMBER; write for example --where "similarity>=0.28"')
    return Where(match.group(1), match.group(2), number)


@dataclass(frozen=True)
class Conditions:
    """The conditions on a sample; None and empty mean no condition.

    Attributes:
        min_size: minimum shorter side of the picture in pixels.
        max_size: maximum longer side in pixels.
        max_aspect: maximum ratio of the longer side to the shorter.
        min_caption_length: minimum length of the caption in characters, without surrounding white space.
        max_caption_length: maximum length of the caption.
        languages: allowed languages of the caption, as codes.
        where: conditions on columns of the json.
        keep_missing: whether a sample that lacks such a column is kept.
    """

    min_size: int | None = None
    max_size: int | None = None
    max_aspect: float | None = None
    min_caption_length: int | None = None
    max_caption_length: int | None = None
    languages: tuple[str, ...] = ()
    where: tuple[Where, ...] = ()
    keep_missing: bool = False

    def judge(self, record: Record) -> tuple[str | None, list[str]]:
        """Return the first condition that ``record`` fails (None if it satisfies all), and the columns that it lacks.

        The order is columns, picture, caption, language: the cheapest first.
        """
        cause, missing = self._column_cause(record)
        return cause or self._picture_cause(record) or self._caption_cause(record), missing

    def _column_cause(self, record: Record) -> tuple[str | None, list[str]]:
        if not self.where:
            return None, []
        columns = _columns(record)
        missing = []
        for where in self.where:
            value = columns.get(where.column)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or value != value:  # not equal to itself: NaN
                if not self.keep_missing:
                    return f"missing {where.column}", []
                missing.append(where.column)
            elif not _OPERATORS[where.operator](value, where.number):
                return f"not {where}", []
        return None, missing

    def _picture_cause(self, record: Record) -> str | None:
        if self.min_size is None and self.max_size is None and self.max_aspect is None:
            return None
        picture = picture_of(record)
        if picture is None:
            return "no_picture"
        size = picture_size(picture)
        if size is None:
            return "unreadable_picture"
        shorter, longer = sorted(size)
        if self.min_size is not None and shorter < self.min_size:
            return "too_small"
        if self.max_size is not None and longer > self.max_size:
            return "too_large"
        if self.max_aspect is not None and longer > self.max_aspect * shorter:
            return "aspect_ratio"
        return None

    def _caption_cause(self, record: Record) -> str | None:
        if self.min_caption_length is None and self.max_caption_length is None and not self.languages:
            return None
        caption = caption_of(record)
        if caption is None:
            return "no_caption"
        if self.min_caption_length is not None and len(caption) < self.min_caption_length:
            return "caption_too_short"
        if self.max_caption_length is not None and len(caption) > self.max_caption_length:
            return "caption_too_long"
        if self.languages:
            from data_tools.checks.language import language_of

            if language_of(caption) not in self.languages:
                return "language"
        return None


def picture_size(data: bytes) -> tuple[int, int] | None:
    """Return width and height in pixels of a JPEG, PNG or WebP from its header; None if there is no such header."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # nothing is decoded here
            with Image.open(io.BytesIO(data), formats=["JPEG", "PNG", "WEBP"]) as image:
                return (image.width, image.height) if min(image.size) > 0 else None
    except Exception:  # Pillow raises errors of many types for bad bytes
        return None


def _columns(record: Record) -> dict[str, Any]:
    try:
        content = json.loads(record.members.get("json", b"{}"))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
