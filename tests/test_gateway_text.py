"""From tokens to text: stop strings, unfinished characters, log-probabilities."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from serving.engine.request import TokenLogprob
from serving.text import AnswerText, Emission, StopScanner
from tests.fakes import EOS, ByteTokenizer

LETTERS = st.text("ab\n", max_size=24)


def scan(pieces: list[str], stops: list[str], include: bool = False) -> tuple[str, bool]:
    """What a scanner shows of a text in pieces, and whether it met a stop."""
    scanner = StopScanner(stops, include)
    shown = ""
    for piece in pieces:
        shown += scanner.feed(piece)
        if scanner.hit:
            return shown, True
    return shown + scanner.flush(), False


def reference(text: str, stops: list[str], include: bool) -> tuple[str, bool]:
    """Slow and obvious: the first prefix that ends with a stop, cut where the longest such stop begins."""
    for end in range(1, len(text) + 1):
        met = [stop for stop in stops if text[:end].endswith(stop)]
        if met:
            return (text[:end] if include else text[: end - max(map(len, met))]), True
    return text, False


@seed(20261121)
@settings(max_examples=300, deadline=None)
@given(LETTERS, st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=4), st.booleans(), st.data())
def test_what_is_shown_does_not_depend_on_how_the_text_was_cut(
    text: str, stops: list[str], include: bool, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]
    assert scan(pieces, stops, include) == reference(text, stops, include)


@seed(20261121)
@settings(max_examples=200, deadline=None)
@given(LETTERS, st.lists(st.text("ab\n", min_size=2, max_size=4), min_size=1, max_size=3))
def test_only_what_could_begin_a_stop_is_held_back(text: str, stops: list[str]) -> None:
    scanner = StopScanner(stops)
    shown = "".join(scanner.feed(letter) for letter in text)
    if not scanner.hit:
        held = text[len(shown) :]
        tails = [text[len(text) - size :] for size in range(1, len(text) + 1)]
        could = [tail for tail in tails if any(stop.startswith(tail) for stop in stops)]
        assert held == (could[-1] if could else "")


def make(
    stops: tuple[str, ...] = (), *, logprobs: bool = False, include: bool = False, min_tokens: int = 0
) -> AnswerText:
    tokenizer = ByteTokenizer()
    return AnswerText(
        tokenizer.stream(),
        stops,
        include_stop=include,
        stop_ids=frozenset({EOS}),
        min_tokens=min_tokens,
        describe=(lambda token: tokenizer.decode([token], skip_special_tokens=False)) if logprobs else None,
    )


def test_a_character_of_several_tokens_appears_whole() -> None:
    text = make()
    shown = [text.push([byte], ()).text for byte in "é€😀".encode()]
    assert [part for part in shown if part] == ["é", "€", "😀"]


def test_an_unfinished_character_shows_as_a_replacement_at_the_end() -> None:
    text = make()
    assert text.push("a€".encode()[:-1], ()).text == "a"
    assert text.finish().text == "\ufffd"


def test_a_stop_string_over_token_borders_is_not_shown() -> None:
    text = make(("END",))
    shown = ""
    for byte in b"one EN":
        shown += text.push([byte], ()).text
    assert shown == "one "
    last = text.push(b"D two", ())
    assert last.stopped
    assert last.text == ""


def test_a_false_beginning_of_a_stop_is_shown_after_all() -> None:
    text = make(("END",))
    assert text.push(b"EN", ()).text == ""
    assert text.push(b"t", ()).text == "ENt"


def test_a_stop_string_is_part_of_the_text_when_asked_for() -> None:
    emission = make(("END",), include=True).push(b"oneENDtwo", ())
    assert (emission.text, emission.stopped) == ("oneEND", True)


def test_stops_count_only_after_min_tokens() -> None:
    text = make(("a",), min_tokens=2)
    assert text.push(b"aa", ()).text == "aa"
    assert text.push(b"ba", ()) == Emission("b", (), True)


def test_the_end_token_is_no_text_and_no_logprob() -> None:
    text = make(logprobs=True)
    emission = text.push([104, EOS], [TokenLogprob(-0.1), TokenLogprob(-0.2)])
    assert emission.text == "h"
    assert [t.text for t in emission.tokens] == ["h"]
    assert text.num_tokens == 2


def test_a_stop_token_shows_when_asked_for() -> None:
    text = AnswerText(
        ByteTokenizer().stream(), (), include_stop=True, stop_ids=frozenset({33}), min_tokens=0, describe=chr
    )
    emission = text.push([104, 33], [TokenLogprob(-0.1), TokenLogprob(-0.2)])
    assert emission.text == "h!"
    assert [t.text for t in emission.tokens] == ["h", "!"]


def test_logprobs_come_with_their_text_and_stop_with_it() -> None:
    text = make(("ND",), logprobs=True)
    first = text.push(b"oN", [TokenLogprob(-1.0)] * 2)
    assert [(t.text, t.offset) for t in first.tokens] == [("o", 0)]
    last = text.push(b"Dx", [TokenLogprob(-1.0)] * 2)
    assert last.stopped
    assert last.tokens == ()


def test_every_token_without_text_is_told_of_at_the_end() -> None:
    text = make(logprobs=True)
    half = "€".encode()[:2]
    assert text.push(half, [TokenLogprob(-1.0)] * 2).tokens == ()
    assert len(text.finish().tokens) == 2


@pytest.mark.parametrize("value", [float("-inf"), -20000.0])
def test_an_impossible_logprob_is_a_finite_number(value: float) -> None:
    emission = make(logprobs=True).push(b"a", [TokenLogprob(-0.5, ((98, value),))])
    assert emission.tokens[0].top == (("b", -9999.0),)
