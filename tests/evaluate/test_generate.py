"""The caption of one picture file."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from megamoe.core.errors import UserError
from megamoe.evaluate.caption_image import caption_image
from tests.data.shard_factory import jpeg
from tests.evaluate.conftest import LEARNT


def test_a_picture_of_any_size_and_kind_gets_its_caption(run: Path, tmp_path: Path) -> None:
    for kind, side in (("JPEG", 100), ("PNG", 32), ("WEBP", 17)):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(jpeg(500, side))).save(buffer, format=kind)
        (tmp_path / "picture").write_bytes(buffer.getvalue())
        assert caption_image(run, tmp_path / "picture") == LEARNT


@pytest.mark.parametrize("prompt", ["a", "a red", " a red ", LEARNT])
def test_a_prompt_is_the_beginning_of_the_caption(run: Path, tmp_path: Path, prompt: str) -> None:
    (tmp_path / "picture.jpg").write_bytes(jpeg(500))
    caption = caption_image(run, tmp_path / "picture.jpg", prompt)
    assert caption.startswith(prompt.strip())


def test_what_is_no_picture_is_a_user_error_that_names_it(run: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.jpg").write_bytes(jpeg(1)[:150])
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.jpg").touch()
    for name in ("cut.jpg", "text.jpg", "empty.jpg", "missing.jpg", "."):
        with pytest.raises(UserError, match=r"image .*give a.* JPEG") as raised:
            caption_image(run, tmp_path / name)
        assert str(tmp_path / name) in str(raised.value) and "\n" not in str(raised.value)
