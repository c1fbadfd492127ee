"""YAML 1.2 scalars, equal keys, and --set."""

import pytest

from pipeline.document import override, parse
from pipeline.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("on", "on"),
        ("no", "no"),
        ("true", True),
        ("010", 10),
        ("1:30", "1:30"),
        ("0x10", 16),
        ("0o17", 15),
        ("2020-01-01", "2020-01-01"),
        ("~", None),
        ("", None),
        (".5", 0.5),
        ("-3", -3),
        ("'3'", "3"),
        ("[1., .inf]", [1.0, float("inf")]),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    assert parse(f"a: {text}", "c.yaml") == ({"a": value}, [])
    if isinstance(value, str):
        assert parse(f"{text}: 1", "c.yaml")[0] == {value: 1}


def test_equal_keys_are_all_named_with_their_lines() -> None:
    _, problems = parse("a: 1\nb: {x: 1, x: 2}\na: 2\n", "c.yaml")
    assert problems == [
        "c.yaml: line 3: 'a' is given twice, first in line 1; keep one",
        "c.yaml: line 2: 'x' is given twice, first in line 2; keep one",
    ]


def test_anchors_and_merges_work() -> None:
    assert parse("a: &a {x: 1}\nb: {<<: *a, y: 2}", "c") == ({"a": {"x": 1}, "b": {"x": 1, "y": 2}}, [])


def test_set_changes_one_place_though_an_anchor_gave_it_to_many() -> None:
    values, _ = parse("a: {o: &o {lr: 1, steps: [1, 2]}}\nb: {o: *o}\nc: {<<: {o: *o}}", "c")
    assert override(values, ["a.o.lr=2", "b.o.steps.0=3"]) == []
    assert values == {
        "a": {"o": {"lr": 2, "steps": [1, 2]}},
        "b": {"o": {"lr": 1, "steps": [3, 2]}},
        "c": {"o": {"lr": 1, "steps": [1, 2]}},
    }


def test_an_alias_of_what_holds_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="c: an alias stands inside what it stands for"):
        parse("a: &a {b: [*a]}", "c")


@pytest.mark.parametrize("text", ["a: [1", "a: b: c", "a: !!python/object:os.system x", "\x00"])
def test_what_is_not_yaml_says_so(text: str) -> None:
    with pytest.raises(ConfigError, match=r"c.yaml.*not valid YAML"):
        parse(text, "c.yaml")


def test_set_changes_what_is_there() -> None:
    values = {"stages": {"a": {"detector": "retina", "b": [1, 2]}, "c": None}}
    settings = ["stages.a.detector.w=3", "stages.a.b.1=on", "stages.c.x={y: 1e-3}", "stages.a.z=a=b"]
    assert override(values, settings) == []
    assert values == {
        "stages": {"a": {"detector": {"name": "retina", "w": 3}, "b": [1, "on"], "z": "a=b"}, "c": {"x": {"y": 1e-3}}}
    }


def test_set_names_every_unknown_path() -> None:
    values = {"stages": {"teacher": {"b": [1]}}}
    assert override(
        values,
        [
            "stages.teecher.x=2",
            "x",
            "stages.teacher.b.7=2",
            "stages.teacher.b.\N{SUPERSCRIPT TWO}=2",
            "stages.teacher.q=[1",
        ],
    ) == [
        "--set stages.teecher.x=2: stages has no 'teecher'; did you mean 'teacher'?",
        "--set x: give a setting as stages.NAME.SETTING=VALUE",
        "--set stages.teacher.b.7=2: stages.teacher.b has no '7'",
        "--set stages.teacher.b.\N{SUPERSCRIPT TWO}=2: stages.teacher.b has no '\N{SUPERSCRIPT TWO}'",
        "--set stages.teacher.q=[1: line 1, column 3: not valid YAML: expected ',' or ']', but got '<stream end>'",
    ]
