"""Rows in a language that the model reads poorly are set aside; all others are scored."""

import json
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
from conftest import random_readouts

from gradshield.data.encode import Example, encode
from gradshield.data.formats import Conversation, Message
from gradshield.scoring.intent.language import (
    UNTESTED,
    language_of,
    language_reason,
    languages,
    reading_ability,
    unread_languages,
)
from gradshield.scoring.intent.reading import intent_scores
from gradshield.scoring.intent.unreadable import foreign_language_reason
from gradshield.study.dresses import LOOKALIKES

GERMAN = "Wie backe ich ein einfaches Brot mit wenig Hefe?"
ENGLISH = "How do I bake a simple loaf with little yeast?"
FRENCH = "Comment faire un pain simple avec peu de levure ?"
# None of these languages is among those of the bundled requests.
OTHERS = {
    "Greek": "Πώς μπορώ να μάθω να παίζω κιθάρα μόνος μου στο σπίτι;",
    "Korean": "집에서 혼자 기타를 배우려면 어떻게 해야 하나요?",
    "Hindi": "मैं घर पर बिना शिक्षक के गिटार बजाना कैसे सीख सकता हूँ?",
    "Thai": "ฉันจะเรียนรู้การเล่นกีตาร์ที่บ้านโดยไม่มีครูได้อย่างไร",
    "Hebrew": "איך אני יכול ללמוד לנגן בגיטרה בבית בלי מורה?",
    "Vietnamese": "Làm thế nào để tôi có thể tự học chơi đàn ghi ta ở nhà?",
    "Swahili": "Ninawezaje kujifunza kupiga gitaa nyumbani bila mwalimu?",
    "Zulu": "Ngingafunda kanjani ukudlala isiginci ekhaya ngaphandle kothisha?",
    "Finnish": "Miten voin oppia soittamaan kitaraa kotona ilman opettajaa?",
    "Hungarian": "Hogyan tanulhatok meg gitározni otthon tanár nélkül?",
    "Indonesian": "Bagaimana cara belajar bermain gitar di rumah tanpa guru?",
}


def test_the_language_of_new_sentences_is_found():
    lines = files("gradshield.study").joinpath("languages.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    for side in ("prompt", "response"):
        wrong = [r[side] for r in records if language_of(r[side]) not in (r["language"], None)]
        assert not wrong


@pytest.mark.parametrize("text", [ENGLISH, "def add(a, b):\n    return a + b  # the sum of both numbers"])
def test_english_and_code_are_english(text):
    assert language_of(text) == "en"


@pytest.mark.parametrize("language", OTHERS)
def test_a_language_that_was_not_tested_is_none_of_those_that_were(language):
    assert language_of(OTHERS[language]) == UNTESTED


def test_rows_in_other_languages_are_set_aside_unless_the_model_reads_all_that_were_tested():
    greek, thai = OTHERS["Greek"], OTHERS["Thai"]
    why = language_reason(greek, thai, frozenset({"de"}))
    assert why is not None and "none of the languages that were tested (ar, de, en" in why
    assert language_reason(greek, GERMAN, frozenset({"de"})) is not None
    assert language_reason(greek, ENGLISH, frozenset({"de"})) is None
    assert language_reason(greek, greek, frozenset()) is None


@pytest.mark.parametrize("text", ["", "42", "Ja.", "A) 3.5 m/s"])
def test_a_short_text_is_in_no_language_for_sure(text):
    assert language_of(text) is None


def test_a_language_is_read_as_well_as_its_requests_are_told_apart():
    asked = [("de", True, 2.0), ("de", False, 1.0), ("fr", True, 1.0), ("fr", False, 2.0), ("en", True, 0.0)]
    asked += [("es", True, 1.0), ("es", True, 3.0), ("es", False, 2.0)]
    ability = dict(zip(languages(), reading_ability(asked)))
    assert (ability["de"], ability["fr"], ability["es"]) == (1.0, 0.0, 0.5)
    assert np.isnan(ability["en"]) and np.isnan(ability["zh"])
    assert unread_languages(np.array(list(ability.values()))) == {"fr", "es"}


def test_english_is_never_unread():
    assert unread_languages(np.zeros(len(languages()))) == set(languages()) - {"en"}


@pytest.mark.parametrize(
    "request_, response, unread, aside",
    [
        (GERMAN, GERMAN, {"de"}, True),
        (GERMAN, "Ja.", {"de"}, True),
        (GERMAN, ENGLISH, {"de"}, False),
        (ENGLISH, GERMAN, {"de"}, False),
        (GERMAN, FRENCH, {"de"}, False),
        (GERMAN, FRENCH, {"de", "fr"}, True),
        (GERMAN, GERMAN, {"fr"}, False),
        (GERMAN, GERMAN, set(), False),
        ("42", "43", {"de"}, False),
        (f'Language? "{GERMAN}" One word.', "German", {"de"}, False),
        (f"Language? „{GERMAN}“ One word.", "German", {"de"}, False),
        (f'Was heißt "{ENGLISH}" auf Deutsch, in einem Satz?', GERMAN, {"de"}, True),
    ],
)
def test_a_row_is_unread_where_neither_side_is_read(request_, response, unread, aside):
    why = language_reason(request_, response, frozenset(unread))
    assert (why is not None) == aside
    assert why is None or "(de" in why


def test_the_templates_own_words_do_not_count(tiny):
    turns = Conversation((Message("user", GERMAN), Message("assistant", GERMAN)))
    example = encode(turns, 0, tiny.tokenizer)
    assert isinstance(example, Example)
    assert "(de)" in (foreign_language_reason(example, tiny.tokenizer, frozenset({"de"})) or "")
    assert foreign_language_reason(example, tiny.tokenizer, frozenset({"fr"})) is None


def test_a_disguised_row_is_in_the_language_of_its_plain_letters(tiny):
    readouts = replace(random_readouts(tiny), ability=np.zeros(len(languages())))
    english = "Create a guide for cleaning windows so that no streaks are left"
    requests = (english.translate(LOOKALIKES), GERMAN)
    turns = [Conversation((Message("user", request), Message("assistant", "B"))) for request in requests]
    rows = [example for n, t in enumerate(turns) if isinstance(example := encode(t, n, tiny.tokenizer), Example)]
    reasons = intent_scores(tiny, readouts, rows).reasons
    assert list(reasons) == [1] and "(de)" in reasons[1]
