"""Wiring, matrix and checks of a config, and every problem at once."""

import pytest

from pipeline.errors import ConfigError
from pipeline.graph import Node

RAISINS = '''"""Bake sweet bread."""
from pathlib import Path
from bakery.goods.bread import SweetBread
from bakery.goods.dough import Dough
from pipeline.config import BaseConfig

class Config(BaseConfig):
    raisins: int = 3
    """How many."""

def run(config: Config, directory: Path, *, dough: Dough) -> SweetBread: ...
'''
FILL = '''"""Fill bread with bread."""
from pathlib import Path
from bakery.goods.bread import Bread
from pipeline.config import BaseConfig

class Config(BaseConfig):
    """None."""

def run(config: Config, directory: Path, *, breads: list[Bread]) -> Bread: ...
'''


def problems(kitchen, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        kitchen.load(text, *overrides)
    return caught.value.problems


def nodes(kitchen, text: str, *overrides: str) -> dict[str, Node]:
    return {node.name: node for node in kitchen.load(text, *overrides).nodes}


def fed(node: Node) -> dict[str, list[str]]:
    return {slot: [other.name for other in node.feeding(slot)] for slot in node.inputs}


def test_slots_take_the_stage_of_their_name(kitchen) -> None:
    text = "stages: {verdict: {uses: taste}, bread: {uses: bake}, dough: {uses: knead}, flour: {uses: grind}}"
    made = nodes(kitchen, text)
    assert list(made) == ["flour", "dough", "bread", "verdict"]  # what feeds comes first
    assert fed(made["dough"]) == {"flour": ["flour"], "starter": []}
    assert fed(made["verdict"]) == {"breads": ["bread"]}


def test_needs_names_what_feeds(kitchen) -> None:
    text = """
stages:
  old: {uses: grind}
  flour: {uses: grind, grams: 7}
  first: {uses: knead, needs: {flour: old}}
  second: {uses: knead, needs: {starter: first}}
  loaf: {uses: bake, needs: {dough: second}}
  other: {uses: bake, needs: {dough: first}}
  verdict: {uses: taste, needs: {breads: [other, other]}}
"""
    made = nodes(kitchen, text)
    assert fed(made["first"]) == {"flour": ["old"], "starter": []}
    assert fed(made["second"]) == {"flour": ["flour"], "starter": ["first"]}
    assert fed(made["verdict"]) == {"breads": ["other"]}


def test_null_leaves_an_optional_slot_empty(kitchen) -> None:
    text = "stages: {flour: {uses: grind}, starter: {uses: knead}, dough: {uses: knead, needs: {starter: %s}}}"
    assert fed(nodes(kitchen, text % "null")["dough"])["starter"] == []
    assert fed(nodes(kitchen, text % "starter")["dough"])["starter"] == ["starter"]
    assert fed(nodes(kitchen, text.replace(", needs: {starter: %s}", ""))["dough"])["starter"] == ["starter"]


def test_lists_gather_what_fits_except_downstream(kitchen) -> None:
    kitchen.write("bakery/raisins.py", RAISINS)
    kitchen.write("bakery/fill.py", FILL)
    text = """
stages:
  flour: {uses: grind}
  dough: {uses: knead}
  fill: {}
  raisins: {}
  bread: {uses: bake}
  outer: {uses: fill}
  verdict: {uses: taste}
"""
    made = nodes(kitchen, text)
    assert fed(made["fill"]) == {"breads": ["raisins", "bread"]}  # not `outer`, which gathers it
    assert fed(made["outer"]) == {"breads": ["fill", "raisins", "bread"]}
    assert fed(made["verdict"]) == {"breads": ["fill", "raisins", "bread", "outer"]}


MATRIX = """
stages:
  flour: {uses: grind}
  dough: {uses: knead, matrix: {minutes: [1, 2], temperature: [20, 1e1]}}
  bread: {uses: bake}
  one: {uses: bake, needs: {dough: "dough[minutes=1,temperature=20]"}}
  row: {uses: bake, needs: {dough: "dough[minutes=2]"}}
  verdict: {uses: taste, needs: {breads: [bread, one, row]}}
"""


def test_matrix_fans_out_and_lists_gather(kitchen) -> None:
    made = nodes(kitchen, MATRIX)
    axes = ["minutes=1,temperature=20", "minutes=1,temperature=10.0"]
    axes += ["minutes=2,temperature=20", "minutes=2,temperature=10.0"]
    assert list(made)[1:5] == [f"dough[{axis}]" for axis in axes]
    assert made["dough[minutes=2,temperature=10.0]"].config.temperature == 10.0
    assert [name for name in made if name.startswith("bread")] == [f"bread[{axis}]" for axis in axes]
    assert fed(made["bread[minutes=2,temperature=20]"]) == {"dough": ["dough[minutes=2,temperature=20]"]}
    assert fed(made["one"]) == {"dough": ["dough[minutes=1,temperature=20]"]}
    assert fed(made["row[temperature=10.0]"]) == {"dough": ["dough[minutes=2,temperature=10.0]"]}
    assert len(fed(made["verdict"])["breads"]) == 7


def test_two_slots_are_joined_on_shared_axes(kitchen) -> None:
    text = """
stages:
  flour: {uses: grind, matrix: {grams: [1, 2]}}
  starter: {uses: knead, matrix: {minutes: [3, 4]}}
  dough: {uses: knead}
"""
    made = nodes(kitchen, text)
    assert fed(made["dough[grams=2,minutes=3]"]) == {
        "flour": ["flour[grams=2]"],
        "starter": ["starter[minutes=3,grams=2]"],
    }
    assert len([name for name in made if name.startswith("dough")]) == 4


def test_what_has_no_partner_is_a_problem(kitchen) -> None:
    text = """
stages:
  flour: {uses: grind, matrix: {grams: [1, 2]}}
  starter: {uses: knead, needs: {flour: flour}}
  dough: {uses: knead, needs: {flour: "flour[grams=3]"}}
  more: {uses: knead, needs: {flour: flour, starter: thin}}
  thick: {uses: grind, matrix: {grams: [2, 3]}}
  thin: {uses: knead, needs: {flour: thick, starter: null}}
"""
    found = problems(kitchen, text)
    assert found[0].startswith(
        "stages.dough.needs.flour: no node flour[grams=3]; there are: flour[grams=1], flour[grams=2]"
    )
    assert "stages.more.needs.starter: more[grams=1], thin[grams=3] have no partner" in found[1]


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        ("[1]", "matrix: give the values of settings, as {seed: [0, 1, 2]}"),
        ("{minute: [1]}", "matrix.minute: not a setting of this stage; there are: minutes, temperature, recipe"),
        ("{minutes: 3}", "matrix.minutes: give a list of numbers, words or true and false"),
        ("{minutes: [1, 1]}", "matrix.minutes: has a value twice: 1, 1"),
        ("{recipe: ['a b']}", "matrix.recipe: a value here is part of a node's name and may have no space"),
        ("{temperature: [1]}", "matrix.temperature: is also given as the setting temperature=3; keep one"),
        ("{minutes: [1, x]}", "matrix.minutes: should be a valid integer"),
    ],
)
def test_problems_of_a_matrix(kitchen, matrix: str, message: str) -> None:
    text = f"stages: {{flour: {{uses: grind}}, dough: {{uses: knead, temperature: 3, matrix: {matrix}}}}}"
    (found,) = problems(kitchen, text)
    assert found.startswith(f"stages.dough.{message}")


def test_five_mistakes_are_five_lines(kitchen) -> None:
    text = """
stages:
  flour: {uses: grind, grams: -1, grain: nothing.txt}
  dough: {uses: knaed}
  dough2: {uses: knead, minuts: 3}
  bread: {uses: bake, needs: {dough: flour}}
  bread: {uses: bake, needs: {dough: flour}}
"""
    assert problems(kitchen, text) == [
        "c.yaml: line 7: 'bread' is given twice, first in line 6; keep one",
        "stages.flour.grams: should be greater than 0, was -1",
        "stages.flour.grain: no file nothing.txt",
        "stages.dough.uses: no 'knaed' in bakery; did you mean 'knead'?",
        "stages.dough2.minuts: unknown setting; did you mean 'minutes'?",
        "stages.bread.needs.dough: takes a Dough, but 'flour' makes a Flour; would fit: dough2",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "c.yaml: must begin with 'stages:'"),
        ("stages: [a]", "c.yaml: must begin with 'stages:'"),
        ("stages: {flour: {uses: grind}}\nstage: 1", "stage: unknown key; did you mean 'stages'?"),
        ("stages: {flour: {uses: grind}}\ntargets: [orin]", "targets: give the machines by name, as {orin: {ssh:"),
        ("stages: {flour: {uses: grind}}\ntargets: {a/b: {}}", "targets.a/b: a target's name may have no space"),
        (
            "stages: {flour: {uses: grind}}\ntargets: {a: {shh: b}}",
            "targets.a.shh: unknown setting; did you mean 'ssh'?",
        ),
        ("stages: {flour: {uses: grind}}\ntargets: {a: {ssh: -oX}}", "targets.a.ssh: String should match pattern"),
        (
            "stages: {flour: {uses: grind}}\ntargets: {a: {folder: ~/w}}",
            "targets.a.folder: String should match pattern",
        ),
        ("stages: {flour: {uses: grind, target: orin}}", "stages.flour.target: no target 'orin'; describe it below"),
        (
            "stages: {flour: {uses: grind, target: orn}}\ntargets: {orin: {}}",
            "stages.flour.target: no target 'orn'; did you mean 'orin'?",
        ),
        (
            "stages: {flour: {uses: grind, target: orin}}\ntargets: {orin: }",
            "stages.flour.target: grind can only be done here; leave it out",
        ),
        ("stages: {flour: 3}", "stages.flour: give its settings as 'setting: value' lines"),
        ("stages: {flour: {uses: 3}}", "stages.flour.uses: give the name of a stage's file, was 3"),
        ("stages: {'a b': {uses: grind}}", "stages.a b: a stage's name may have no space"),
        ("stages: {flour: {uses: grind, needs: [x]}}", "stages.flour.needs: give {slot: stage}; slots: none"),
        (
            "stages: {dough: {uses: knead}}",
            "stages.dough.needs.flour: needs a Flour and no other stage is named 'flour'",
        ),
        (
            "stages: {f: {uses: grind}, d: {uses: knead}}",
            "stages.d.needs.flour: needs a Flour and no other stage is named",
        ),
        ("stages: {f: {uses: grind}, d: {uses: knead, needs: {flour: g}}}", "stages.d.needs.flour: no stage 'g'"),
        ("stages: {f: {uses: grind}, d: {uses: knead, needs: {flour: [f]}}}", "stages.d.needs.flour: takes one Flour"),
        (
            "stages: {f: {uses: grind}, d: {uses: knead, needs: {flour: 'f['}}}",
            "stages.d.needs.flour: 'f[' is no stage",
        ),
        (
            "stages: {verdict: {uses: taste, needs: {bread: x}}}",
            "stages.verdict.needs.bread: taste has no such slot; did",
        ),
    ],
)
def test_each_problem_says_what_would_do(kitchen, text: str, message: str) -> None:
    assert any(line.startswith(message) for line in problems(kitchen, text))


@pytest.mark.parametrize("value", ["5", "", "[]", "{}", "flour", "[{flour: {}}]"])
def test_stages_of_another_shape_given_by_set_are_one_line(kitchen, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        kitchen.load("stages: {flour: {uses: grind}}", f"stages={value}")
    assert caught.value.problems == [
        "--set stages: leaves no stages by name; set one, as stages.NAME={uses: FILE}",
    ]


def test_a_circle_is_named(kitchen) -> None:
    text = """
stages:
  flour: {uses: grind}
  a: {uses: knead, needs: {starter: b}}
  b: {uses: knead, needs: {starter: a}}
"""
    (found,) = problems(kitchen, text)
    assert "feed each other in a circle: " in found
    assert found.count("->") == 2


def test_a_stage_checks_settings_and_wiring_together(kitchen) -> None:
    text = """
stages:
  flour: {uses: grind}
  dough: {uses: knead}
  bread: {uses: bake}
  verdict: {uses: taste}
  sell: {till: none}
"""
    assert problems(kitchen, text) == ["stages.sell: no till for bread, a Bread; open one"]
    assert nodes(kitchen, text, "stages.sell.till=left")


def test_one_mistake_is_one_line_whatever_hangs_on_it(kitchen) -> None:
    text = """
stages:
  flour: {uses: grind, grams: x}
  dough: {uses: knead}
  bread: {uses: bake}
  verdict: {uses: taste}
  sell: {till: none}
"""
    assert len(problems(kitchen, text)) == 1


def test_a_wrong_slot_name_is_one_line(kitchen) -> None:
    text = "stages: {wheat: {uses: grind}, dough: {uses: knead, needs: {%s: wheat}}}"
    assert problems(kitchen, text % "flower") == [
        "stages.dough.needs.flower: knead has no such slot; did you mean 'flour'?"
    ]
    assert problems(kitchen, text % "oil") == [
        "stages.dough.needs.oil: knead has no such slot; there are: flour, starter",
        "stages.dough.needs.flour: needs a Flour and no other stage is named 'flour'; would fit: wheat",
    ]


def test_a_stage_by_path(kitchen) -> None:
    kitchen.write("my_oven.py", (kitchen.folder / "bakery/bake.py").read_text().replace("Bake dough", "My oven"))
    made = nodes(
        kitchen, "stages: {flour: {uses: grind}, dough: {uses: knead}, bread: {uses: ./my_oven.py, loaves: 5}}"
    )
    assert made["bread"].uses == "my_oven"
    assert made["bread"].stage.resumes


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("x = 1", "a stage is a `class Config"),
        ("{}def run(config, directory): ...", "run must say which Artifact it returns"),
        (
            "{}def run(config, directory, *, n: int) -> Artifact: ...",
            "run's 'n' must be an Artifact, one or None, or a list",
        ),
    ],
)
def test_a_file_that_is_no_stage_is_refused(kitchen, body: str, message: str) -> None:
    head = "from pipeline.artifact import Artifact\nfrom pipeline.config import BaseConfig as Config\n"
    kitchen.write("mine.py", body.format(head))
    (found,) = problems(kitchen, "stages: {a: {uses: ./mine.py}}")
    assert message in found


BLEND = '''"""Blend flours, or bake without."""
from pathlib import Path
from bakery.goods.bread import Bread
from bakery.goods.flour import Flour
from pipeline.config import BaseConfig

class Config(BaseConfig):
    grams: int = 1
    """How much of each."""

def run(config: Config, directory: Path, *, flour: list[Flour] | None = None) -> Bread: ...
'''


@pytest.mark.parametrize(
    ("needs", "wanted"),
    [
        ("", ["flour"]),  # by its own name, and not all that fits
        (", needs: {flour: rye}", ["rye"]),
        (", needs: {flour: [rye, flour]}", ["rye", "flour"]),
        (", needs: {flour: null}", []),
    ],
)
def test_an_optional_list_takes_what_is_named_or_the_stage_of_its_name(kitchen, needs, wanted) -> None:
    kitchen.write("bakery/blend.py", BLEND)
    text = f"stages: {{flour: {{uses: grind}}, rye: {{uses: grind, grams: 7}}, mix: {{uses: blend{needs}}}}}"
    assert fed(nodes(kitchen, text)["mix"]) == {"flour": wanted}


def test_an_optional_list_may_be_empty(kitchen) -> None:
    kitchen.write("bakery/blend.py", BLEND)
    assert fed(nodes(kitchen, "stages: {rye: {uses: grind}, mix: {uses: blend}}")["mix"]) == {"flour": []}


def test_each_of_an_optional_list_is_joined_on_shared_axes(kitchen) -> None:
    kitchen.write("bakery/blend.py", BLEND)
    text = """
stages:
  flour: {uses: grind, matrix: {grams: [1, 2]}}
  rye: {uses: grind}
  mix: {uses: blend, matrix: {grams: [1, 2]}, needs: {flour: [flour, rye]}}
"""
    made = nodes(kitchen, text)
    assert fed(made["mix[grams=2]"]) == {"flour": ["flour[grams=2]", "rye"]}
    text = text.replace("blend, matrix: {grams: [1, 2]}", "blend, matrix: {grams: [1, 3]}")
    assert "mix[grams=3], flour[grams=2] have no partner" in problems(kitchen, text)[0]
