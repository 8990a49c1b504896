"""The vocabulary: lossless, refuses files that are not our vocabularies, can be sent to another process."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from megamoe.core.errors import DataError
from megamoe.data.sample.tokenizer import Tokenizer


@given(st.text(st.characters(codec="utf-8")))
@example("  two  spaces\tand\r\n lines ")
@example("\u2581 sentencepiece's own space \u2581\u2581")
@example("an <image> in words, </s> <pad> <unk> <0x41>")
@example("<image><image>")
@example("é 漢字 🙂 \x00 \ufeff")
def test_decoding_gives_back_any_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {tokenizer.image_id, tokenizer.pad_id, tokenizer.eos_id} & set(ids)


def test_special_pieces_have_their_ids(tokenizer: Tokenizer, tokenizer_path: Path) -> None:
    assert tokenizer.pad_id == 0 and tokenizer.eos_id == 2 and tokenizer.image_id == 3
    assert tokenizer.decode([tokenizer.pad_id, tokenizer.eos_id]) == ""
    assert tokenizer.fingerprint == hashlib.sha256(tokenizer_path.read_bytes()).hexdigest()
    assert 261 < tokenizer.size <= 320


def test_it_can_be_sent_to_another_process(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("a red thing") == tokenizer.encode("a red thing") and copy.image_id == tokenizer.image_id


def test_what_is_no_vocabulary_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.model: cannot be read"):
        Tokenizer(tmp_path / "none.model")
    (tmp_path / "text.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"text.model: not a sentencepiece model; make one with"):
        Tokenizer(tmp_path / "text.model")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d"]), model_writer=model, vocab_size=20, hard_vocab_limit=False, minloglevel=2
    )
    (tmp_path / "other.model").write_bytes(model.getvalue())
    with pytest.raises(DataError, match=r"other.model: has no piece <pad>; make one with"):
        Tokenizer(tmp_path / "other.model")
