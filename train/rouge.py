"""ROUGE-1/2/L/Lsum by rouge-score, without the traps of its defaults.

Its tokenizer drops every letter beyond a-z, so that two identical Russian texts score 0; its Lsum splits at newlines
only, so that a paragraph is one sentence; its stemmer is for English. Here: words of any script, sentences found by
sentencex, the stemmer for English alone. A text in ASCII is tokenized by rouge-score's own code, bit for bit.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from adapters.errors import DataRefused, ExtraMissing, InvalidRequest
from adapters.reports import ROUGE_METRICS

TOKENIZER = "ascii: rouge-score 0.1.2; else: NFKC, lower case, words of letters, marks and numbers, Han/kana/Thai split"
STEMMED_LANGUAGES = frozenset({"en", "eng"})

_LANGUAGE = re.compile(r"[a-z]{2,3}")
# Scripts written without spaces between words: each character counts as a word.
_UNSPACED = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    r"\U00020000-\U0003ffff]"
)


@dataclass(frozen=True, slots=True)
class Score:
    """Precision, recall and F of one metric, each in 0..1."""

    precision: float
    recall: float
    f: float


class _Stemmer(Protocol):
    def stem(self, word: str) -> str: ...


class WordTokenizer:
    """rouge-score's tokenizer for ASCII texts, its natural extension for all others."""

    def __init__(self, stem: bool) -> None:
        from nltk.stem.porter import PorterStemmer

        self._stemmer: _Stemmer | None = PorterStemmer() if stem else None

    def tokenize(self, text: str) -> list[str]:
        """The words that are compared."""
        from rouge_score import tokenize

        if text.isascii():
            return list(tokenize.tokenize(text, self._stemmer))
        words = [w for word in _words(unicodedata.normalize("NFKC", text).lower()) for w in _unspaced(word)]
        # As rouge-score has it: only words of more than three characters are stemmed.
        return [self._stemmer.stem(w) if self._stemmer and w.isascii() and len(w) > 3 else w for w in words]


class Rouge:
    """Scores predictions. language: of the texts, as an ISO 639 code; it chooses the stemmer and the sentence rules.

    Raises InvalidRequest when the language is no such code.
    """

    def __init__(self, language: str = "en") -> None:
        if _LANGUAGE.fullmatch(language) is None:
            raise InvalidRequest(
                f"a language is an ISO 639 code of two or three small letters, such as en, de or ru, not {language!r}",
                "language",
            )
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError as error:
            raise ExtraMissing("eval", "ROUGE") from error
        self.language = language
        self.stemmed = language in STEMMED_LANGUAGES
        self._tokenizer = WordTokenizer(self.stemmed)
        self._scorer = RougeScorer(list(ROUGE_METRICS), tokenizer=self._tokenizer)

    def score(self, prediction: str, references: Sequence[str]) -> Mapping[str, Score]:
        """Metric -> score; of several references each metric takes its best. Raises DataRefused on an empty one."""
        if not references or not all(r.strip() for r in references):
            raise DataRefused("a reference is empty; ROUGE would score every answer 0 on it")
        found = self._scorer.score_multi([self._lines(r) for r in references], self._lines(prediction))
        return {m: Score(float(found[m].precision), float(found[m].recall), float(found[m].fmeasure)) for m in found}

    def length(self, text: str) -> int:
        """How many words the text has, as they are compared: of Chinese, Japanese and Thai its characters."""
        return len(self._tokenizer.tokenize(text))

    def _lines(self, text: str) -> str:
        """One sentence a line, as rougeLsum wants it; to the other metrics a newline is a space."""
        return "\n".join(sentences(text, self.language))


def sentences(text: str, language: str) -> list[str]:
    """The sentences of a text; a line's end ends a sentence too."""
    import sentencex

    return [s.strip() for line in text.splitlines() for s in sentencex.segment(language, line) if s.strip()]


def _words(text: str) -> list[str]:
    """Runs of letters, marks and numbers. Marks belong to words: Indic vowels are marks."""
    return "".join(c if _counts(c) else " " for c in text).split()


@lru_cache(maxsize=4096)
def _counts(char: str) -> bool:
    return unicodedata.category(char)[0] in "LMN"


def _unspaced(word: str) -> list[str]:
    """A word as it is, or, where it holds characters of unspaced scripts, those one by one and the rest between."""
    return _UNSPACED.sub(r" \g<0> ", word).split()
