"""ROUGE without the traps of its defaults; on ASCII, the very figures of rouge-score."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from adapters.errors import DataRefused
from adapters.reports import ROUGE_METRICS
from train.rouge import Rouge, WordTokenizer, sentences

ASCII = st.text(alphabet=string.ascii_letters + string.digits + " .,_-'\n", max_size=80)


@given(ASCII)
def test_ascii_is_tokenized_as_rouge_score_does(text: str) -> None:
    for stem in (False, True):
        assert WordTokenizer(stem).tokenize(text) == DefaultTokenizer(stem).tokenize(text)


@given(ASCII.filter(str.strip), ASCII)
def test_on_ascii_all_but_lsum_equal_rouge_score(reference: str, prediction: str) -> None:
    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(reference, prediction)
    ours = Rouge("en").score(prediction, [reference])
    for metric, score in theirs.items():
        assert ours[metric].f == score.fmeasure
        assert (ours[metric].precision, ours[metric].recall) == (score.precision, score.recall)


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("ru", "Быстрая лиса прыгает через собаку."),
        ("zh", "敏捷的狐狸跳过了懒狗。"),
        ("ja", "キツネが犬を飛び越える。"),
        ("th", "สุนัขจิ้งจอกกระโดด"),
        ("hi", "तेज़ लोमड़ी कूदती है"),
        ("ar", "الثعلب السريع يقفز"),
        ("de", "Ärger über größere Füße"),
        ("el", "Η γρήγορη αλεπού"),
    ],
)
def test_identical_texts_of_any_script_score_one(language: str, text: str) -> None:
    scores = Rouge(language).score(text, [text])
    assert [scores[m].f for m in ROUGE_METRICS] == pytest.approx([1.0] * 4)


def test_texts_without_spaces_are_compared_by_character() -> None:
    assert WordTokenizer(False).tokenize("东京 is 東京2") == ["东", "京", "is", "東", "京", "2"]


def test_vowel_signs_belong_to_their_words() -> None:
    assert len(WordTokenizer(False).tokenize("तेज़ लोमड़ी")) == 2


def test_forms_that_look_alike_are_alike() -> None:
    assert Rouge("fr").score("cafe\u0301", ["caf\u00e9"])["rouge1"].f == pytest.approx(1.0)


def test_swapped_sentences_keep_lsum_and_lower_l() -> None:
    """rouge-score splits at newlines only, so a paragraph's Lsum was its plain L."""
    scores = Rouge("en").score("The dog sleeps. A fox jumps.", ["A fox jumps. The dog sleeps."])
    assert scores["rougeLsum"].f == pytest.approx(1.0)
    assert scores["rougeL"].f < 0.7


def test_abbreviations_do_not_end_a_sentence() -> None:
    assert sentences("Dr. Smith came. He left.\nDone", "en") == ["Dr. Smith came.", "He left.", "Done"]


def test_the_stemmer_is_for_english_alone() -> None:
    assert Rouge("en").score("running dogs", ["run dog"])["rouge1"].f == pytest.approx(1.0)
    assert Rouge("de").score("running dogs", ["run dog"])["rouge1"].f == 0.0


def test_an_empty_answer_scores_zero_and_an_empty_reference_is_refused() -> None:
    assert Rouge("en").score("", ["a"])["rouge1"].f == 0.0
    for references in ([""], [" \n"], [], ["a", ""]):
        with pytest.raises(DataRefused, match="reference is empty"):
            Rouge("en").score("a", references)


def test_of_several_references_the_best_counts() -> None:
    assert Rouge("en").score("a cat", ["a dog", "a cat"])["rouge1"].f == pytest.approx(1.0)
