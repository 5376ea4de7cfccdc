"""Text from tokens as they come: what any tokenizer's decoder makes of them, and never half a character."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from adapters.prompts import TextStream
from serving.text import AnswerText
from tests.tiny_base import byte_tokenizer

MODELS = Path(__file__).resolve().parents[2] / "shared" / "models"
WORDS = ["▁", "▁▁", "▁a", "▁the", "a", "b", "the", "é", "€", "😀", "▁é", "\n"]


def byte_fallback(*last: decoders.Decoder) -> Tokenizer:
    """SentencePiece as Llama 2 (which drops a first space) and Gemma have it: words, and bytes for the rest."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    made = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    made.add_special_tokens([AddedToken("</s>", special=True)])
    return made


def metaspace() -> Tokenizer:
    """SentencePiece as T5 has it."""
    pieces = ["<unk>", "</s>", *WORDS]
    made = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.add_special_tokens([AddedToken("</s>", special=True)])
    return made


TOKENIZERS = {
    "bytes": byte_tokenizer().backend_tokenizer,
    "llama": byte_fallback(decoders.Strip(" ", 1, 0)),
    "gemma": byte_fallback(),
    "t5": metaspace(),
}


def streamed(tokenizer: Tokenizer, ids: Sequence[int], skip: bool = True, after: Sequence[int] = ()) -> list[str]:
    stream = TextStream(tokenizer, skip, after)
    return [*(stream.push(token) for token in ids), stream.flush()]


def spelled(tokenizer: Tokenizer, parts: Sequence[str]) -> list[int]:
    """Ids of these parts: a token where there is one, else the bytes of each character."""
    ids: list[int] = []
    vocabulary = tokenizer.get_vocab()
    for part in parts:
        ids += [
            vocabulary[p] for p in ([part] if part in vocabulary else [f"<0x{byte:02X}>" for byte in part.encode()])
        ]
    return ids


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
@pytest.mark.parametrize("skip", [True, False])
def test_the_pieces_of_a_text_make_what_a_whole_decode_makes(name: str, skip: bool) -> None:
    tokenizer = TOKENIZERS[name]
    parts = st.sampled_from([*WORDS, "</s>"]) if name == "t5" else st.sampled_from([*WORDS, "</s>", "ß", "漢", "👩‍🚀"])

    @seed(20261122)
    @settings(max_examples=300, deadline=None)
    @given(st.lists(parts, max_size=24))
    def check(drawn: list[str]) -> None:
        if name == "bytes":
            ids = [t for part in drawn for t in tokenizer.encode(part, add_special_tokens=False).ids]
        else:
            ids = spelled(tokenizer, drawn)
        pieces = streamed(tokenizer, ids, skip)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)
        assert not any("\ufffd" in piece for piece in pieces)

    check()


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_no_sequence_of_ids_breaks_a_stream(name: str) -> None:
    """tokenizers' own stream raised after bytes that are no text: the request ended in a 500."""
    tokenizer = TOKENIZERS[name]

    @seed(20261122)
    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=80))
    def check(ids: list[int]) -> None:
        whole = tokenizer.decode(ids)
        text = "".join(streamed(tokenizer, ids))
        if name in ("bytes", "t5"):
            assert text == whole
        else:  # byte fallback gives a whole run of bytes up when one is wrong; what was shown before stays shown
            assert len(text) <= len(whole)

    check()


@pytest.mark.parametrize("name", ["bytes", "llama", "gemma"])
def test_bytes_that_are_no_text_do_not_hold_a_stream_up_for_ever(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    wrong = tokenizer.token_to_id("ÿ" if name == "bytes" else "<0xFF>")
    stream = TextStream(tokenizer, True)
    shown = "".join(stream.push(wrong) for _ in range(5000))
    assert 5000 - 20 <= len(shown) <= 5000
    assert shown + stream.flush() == "\ufffd" * 5000


@pytest.mark.parametrize("name", ["llama", "gemma", "bytes"])
def test_what_goes_on_from_a_prompt_keeps_its_space(name: str) -> None:
    """A raw completion of `the` by `▁the` is ` the`: prompt and text together read as the model wrote them."""
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(" the").ids if name == "bytes" else spelled(tokenizer, ["▁the"])
    before = tokenizer.encode("the").ids if name == "bytes" else spelled(tokenizer, ["▁", "the"])
    assert "".join(streamed(tokenizer, ids, after=before)) == " the"
    assert "".join(streamed(tokenizer, ids)) == ("the" if name == "llama" else " the")


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_a_stop_text_is_found_however_the_tokens_cut_it(name: str) -> None:
    """SentencePiece-style decoders too: the text before the first stop is shown, and no more."""
    tokenizer = TOKENIZERS[name]
    parts = ["a", "b", "▁a", "▁the", "é", "▁"]

    @seed(20261122)
    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.sampled_from(parts), max_size=16), st.sampled_from(["a b", "the", " a", "é a", "ab", "éé"]))
    def check(drawn: list[str], stop: str) -> None:
        plain = [part.replace("▁", " ") for part in drawn]
        ids = tokenizer.encode("".join(plain)).ids if name == "bytes" else spelled(tokenizer, drawn)
        text = AnswerText(
            TextStream(tokenizer, True), (stop,), include_stop=False, stop_ids=frozenset(), min_tokens=0, describe=None
        )
        shown = ""
        for token in ids:
            emission = text.push([token], ())
            shown += emission.text
            if emission.stopped:
                break
        else:
            shown += text.finish().text
        whole = tokenizer.decode(ids)
        assert shown == whole.partition(stop)[0]

    check()


@pytest.mark.skipif(not MODELS.is_dir(), reason="the real tokenizers are not here")
@pytest.mark.parametrize("name", ["stories260k-llama", "flan-t5-tokenizer", "bart-g2p-en-us"])
def test_real_tokenizers_stream_what_they_decode(name: str) -> None:
    tokenizer = Tokenizer.from_file(str(MODELS / name / "tokenizer.json"))
    for text in ("Once upon a time, there was  a girl.", "Ein Größenwahn, 42 €", "ɡˈAtwA", "naïve 漢字 😀!"):
        ids = tokenizer.encode(text).ids
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)
