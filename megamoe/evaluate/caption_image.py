"""Caption one picture file."""

from __future__ import annotations

from pathlib import Path

import torch

from megamoe.checkpoint import load_model
from megamoe.core.errors import UserError
from megamoe.data.sample.decode import CorruptSample, decode_image
from megamoe.evaluate.greedy import greedy_decode


def caption_image(source: Path, image: Path, prompt: str = "") -> str:
    """Caption a JPEG, PNG or WebP file.

    Args:
        source: Run folder (its newest checkpoint) or checkpoint folder.
        image: The picture.
        prompt: Beginning of the caption, which the model continues. White space around it is stripped, as it is from
            captions in training.

    Returns:
        The whole caption, the prompt included.

    Raises:
        UserError: the file is missing or is not a picture, or the checkpoint does not exist.
    """
    try:
        data = image.read_bytes()
    except OSError as error:
        raise UserError(f"image {image}: cannot be read ({error.strerror}); give a JPEG, PNG or WebP file") from error
    loaded = load_model(source)
    try:
        pixels = decode_image(data, loaded.config.model.vision.image_size)
    except CorruptSample as corrupt:
        reason = str(corrupt).removeprefix("image: ")
        raise UserError(f"image {image}: no picture ({reason}); give a whole JPEG, PNG or WebP file") from corrupt
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded.model.to(device)
    ids = loaded.tokenizer.encode(prompt.strip())
    pixels_BHWC = torch.from_numpy(pixels.copy()).unsqueeze(0).to(device)
    (new,) = greedy_decode(loaded.model, loaded.tokenizer, pixels_BHWC, [ids])
    return loaded.tokenizer.decode(ids + new)
