"""Train a sentencepiece vocabulary on captions, for `megamoe data tokenizer` and benchmarks."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from megamoe.core.errors import UserError
from megamoe.core.files import atomic_file
from megamoe.data.sample.tokenizer import EOS, IMAGE, PAD, UNKNOWN, Tokenizer

SMALLEST = 4 + 256 + 1  # the special pieces, all bytes, one piece of text


def model_path(out: Path) -> Path:
    """Return ``OUT.model``; a name that already ends in .model is unchanged."""
    return out if out.suffix == ".model" else out.with_name(f"{out.name}.model")


def check_size(vocab_size: int) -> None:
    """Refuse a vocabulary that is too small for the 256 bytes.

    Raises:
        UserError: it is too small.
    """
    if vocab_size < SMALLEST:
        raise UserError(f"--vocab-size {vocab_size}: the minimum is {SMALLEST} (special pieces and the 256 bytes)")


def train_tokenizer(captions: Iterable[str], out: Path, vocab_size: int) -> Tokenizer:
    """Train on ``captions``, write :func:`model_path` of ``out``, and return the result.

    The model is BPE for two reasons. On few, repetitive captions it merges whole words, where unigram keeps single letters
    and needs 1.5 times as many tokens for the same vocabulary. And merges depend on counts alone, so the same captions
    give the same file. Text is not normalised, and no white space is collapsed or added. Unseen characters are encoded as
    bytes, so decoding returns exactly what was encoded.

    Raises:
        UserError: ``vocab_size`` is too small for the 256 bytes.
        DataError: the file cannot be written.
    """
    check_size(vocab_size)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,  # few captions may not contain that many pieces
        byte_fallback=True,
        character_coverage=1.0,
        pad_id=0,
        unk_id=1,
        eos_id=2,
        bos_id=-1,  # the picture in front begins a text
        pad_piece=PAD,
        unk_piece=UNKNOWN,
        eos_piece=EOS,
        user_defined_symbols=[IMAGE],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        max_sentence_length=1 << 24,  # longer captions would be ignored silently
        num_threads=1,
        minloglevel=2,
    )
    path = model_path(out)
    with atomic_file(path) as file:
        file.write(model.getvalue())
    return Tokenizer(path)
