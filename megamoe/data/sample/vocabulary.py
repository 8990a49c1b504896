"""A sentencepiece vocabulary from captions: what `megamoe data tokenizer` makes, and benchmarks for themselves."""

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
    """``OUT.model``; a name that already ends so stays."""
    return out if out.suffix == ".model" else out.with_name(f"{out.name}.model")


def check_size(vocab_size: int) -> None:
    """Refuse a vocabulary that has no room for the bytes.

    Raises:
        UserError: it is too small.
    """
    if vocab_size < SMALLEST:
        raise UserError(f"--vocab-size {vocab_size}: the least is {SMALLEST} (special pieces and the 256 bytes)")


def train_tokenizer(captions: Iterable[str], out: Path, vocab_size: int) -> Tokenizer:
    """Train on ``captions``, write :func:`model_path` of ``out``, and return the result.

    BPE, because with few and much repeated captions it makes whole words of them (unigram keeps single letters: half as
    many tokens more for the same vocabulary), and because merges depend on counts alone, so that the same captions give
    the same file. Text is taken as it is (no normalisation, no white space collapsed or added) and what was never seen
    is spelled in bytes, so that decoding gives back what was encoded.

    Raises:
        UserError: ``vocab_size`` has no room for the bytes.
        DataError: the file cannot be written.
    """
    check_size(vocab_size)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,  # few captions may not have that many pieces in them
        byte_fallback=True,
        character_coverage=1.0,
        pad_id=0,
        unk_id=1,
        eos_id=2,
        bos_id=-1,  # nothing begins a text here but the picture before it
        pad_piece=PAD,
        unk_piece=UNKNOWN,
        eos_piece=EOS,
        user_defined_symbols=[IMAGE],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        max_sentence_length=1 << 24,  # longer captions would be left out without a word
        num_threads=1,
        minloglevel=2,
    )
    path = model_path(out)
    with atomic_file(path) as file:
        file.write(model.getvalue())
    return Tokenizer(path)
