"""Encode text with a sentencepiece model that has ``<pad>``, ``</s>``, ``<image>`` and all 256 bytes."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import sentencepiece

from megamoe.core.errors import DataError

PAD, UNKNOWN, EOS, IMAGE = "<pad>", "<unk>", "</s>", "<image>"
_SPACE = "\u2581"  # sentencepiece's own symbol for a space
_SPECIAL = re.compile(f"({_SPACE}|{IMAGE})")


class Tokenizer:
    """Map text to ids and back without loss. It can be sent to another process.

    Raises:
        DataError: the file does not exist, is not a sentencepiece model, or lacks a piece that training needs.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"tokenizer {path}: cannot be read ({error.strerror}); check data.tokenizer") from error
        remedy = "make one with `megamoe data tokenizer SHARDS OUT --vocab-size V`"
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise DataError(f"tokenizer {path}: not a sentencepiece model; {remedy}") from error
        for piece in (PAD, EOS, IMAGE, "<0x00>"):
            if self._pieces.piece_to_id(piece) == self._pieces.unk_id():
                raise DataError(f"tokenizer {path}: has no piece {piece}; {remedy}")
        self.pad_id: int = self._pieces.piece_to_id(PAD)
        self.eos_id: int = self._pieces.piece_to_id(EOS)
        self.image_id: int = self._pieces.piece_to_id(IMAGE)
        self.size: int = self._pieces.get_piece_size()
        self.path = Path(path)
        self.fingerprint = hashlib.sha256(model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without end of sequence. They never contain ``image_id``, which only pictures use.

        A literal ``<image>`` in the text is encoded as ordinary text. sentencepiece's symbol for a space is encoded as
        bytes; otherwise it would decode to a space.
        """
        if _SPACE not in text and IMAGE not in text:
            return list(self._pieces.encode(text))
        ids: list[int] = []
        for part in _SPECIAL.split(text):
            if part == _SPACE:
                ids += self._bytes(_SPACE)
            elif part == IMAGE:
                ids += self._bytes(IMAGE[0]) + self._pieces.encode(IMAGE[1:])
            else:
                ids += self._pieces.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of ``ids``; ``<pad>`` and ``</s>`` give nothing, ``<image>`` gives itself."""
        return str(self._pieces.decode(ids))

    def _bytes(self, text: str) -> list[int]:
        return [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode("utf-8")]
