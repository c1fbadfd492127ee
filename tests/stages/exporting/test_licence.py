"""What a detector brings is on every bundle that came of it, or the user says why not."""

import pytest

from stages.exporting.licence import settled


def test_where_nothing_is_brought_the_user_alone_says():
    assert settled("cc-by-4.0", "", ()).name == "cc-by-4.0"
    assert settled("unknown", "", ()).sentences == ()


def test_what_a_detector_brings_is_taken_and_said():
    found = settled("unknown", "", {"AGPL-3.0"})
    assert found.name == "agpl-3.0"
    assert "taught by, comes under AGPL-3.0" in found.sentences[0]
    assert settled("agpl-3.0", "", {"AGPL-3.0"}).name == "agpl-3.0"


def test_a_contradiction_is_refused_until_a_reason_is_given():
    with pytest.raises(ValueError, match=r"MIT is asked for, and a detector of the chain comes under AGPL-3.0; leave"):
        settled("MIT", "", {"AGPL-3.0"})
    found = settled("MIT", "Ultralytics Enterprise, contract 7", {"AGPL-3.0"})
    assert found.name == "MIT"
    assert "MIT holds instead, says who made the bundle: Ultralytics Enterprise, contract 7" in found.sentences[1]


def test_of_two_brought_ones_nobody_guesses():
    with pytest.raises(ValueError, match=r"AGPL-3\.0 and GPL-2\.0; say which"):
        settled("unknown", "", {"GPL-2.0", "AGPL-3.0"})
