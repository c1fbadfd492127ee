"""Keys: what changes them, and what does not."""

import os
import sys

import pytest

from pipeline import plan
from pipeline.digest import Digests
from pipeline.plan import Memory, Plan
from pipeline.store import Store

TEXT = """
stages:
  flour: {uses: grind}
  dough: {uses: knead, recipe: {name: rye}}
  bread: {uses: bake, matrix: {loaves: [1, 2]}}
  verdict: {uses: taste}
  sell: {}
"""
ALL = {"flour", "dough", "bread[loaves=1]", "bread[loaves=2]", "verdict", "sell"}


def keys(kitchen, text: str = TEXT, *overrides: str) -> dict[str, str]:
    return {step.name: step.key for step in made(kitchen, text, *overrides).steps}


def made(kitchen, text: str = TEXT, *overrides: str) -> Plan:
    graph = kitchen.load(text, *overrides)
    return plan.make(graph, Digests(kitchen.folder / "digests.json"), "bakery")


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name, key in after.items() if before.get(name) != key}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.flour.grams=99", ALL),
        ("stages.flour.grams=100", set()),  # the default, said aloud
        ("stages.dough.temperature=20", set()),  # 20 is 20.0
        ("stages.dough.temperature=21", ALL - {"flour"}),
        ("stages.dough.recipe.salt=2e-2", set()),
        ("stages.dough.recipe.salt=0.03", ALL - {"flour"}),
        ("stages.verdict.min_loaves=1", {"verdict", "sell"}),
        ("stages.bread.matrix.loaves=[1, 3]", {"bread[loaves=3]", "verdict", "sell"}),
        ("stages.sell.till=right", {"sell"}),
    ],
)
def test_keys_change_only_downstream(kitchen, override: str, expected: set[str]) -> None:
    assert changed(keys(kitchen), keys(kitchen, TEXT, override)) == expected


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("bake.py", '"""Bake."""', '"""Bake well."""', set()),
        ("bake.py", "dough.grams / config.loaves", "dough.grams // config.loaves", ALL - {"flour", "dough"}),
        ("baking/water.py", "0.7", "0.8", ALL - {"flour"}),  # reached through the choice alone
        ("baking/recipes/spelt.py", "1.5", "1.6", set()),  # not chosen
        ("baking/diary.py", '+ "\\n"', '+ "\\n\\n"', ALL),
    ],
)
def test_changed_code_changes_what_it_makes(kitchen, file: str, old: str, new: str, expected: set[str]) -> None:
    before = keys(kitchen)
    kitchen.edit(file, old, new)
    assert changed(before, keys(kitchen)) == expected


def test_a_stage_names_code_that_counts_as_its_own(kitchen) -> None:
    kitchen.edit("bake.py", "RESUMES = True", 'RESUMES = True\nCODE = ("bakery.baking.recipes.spelt",)')
    before = keys(kitchen)
    kitchen.edit("baking/recipes/spelt.py", "1.5", "1.6")
    assert changed(before, keys(kitchen)) == ALL - {"flour", "dough"}


def test_what_is_imported_late_is_what_was_hashed(kitchen) -> None:
    kitchen.edit("grind.py", '    note("grind")', "    from bakery.baking.water import WATER\n\n    note(WATER)")
    graph = kitchen.load(TEXT)
    plan.make(graph, Digests(kitchen.folder / "digests.json"), "bakery")
    kitchen.edit("baking/water.py", "0.7", "'edited while it runs'")
    assert sys.modules["bakery.baking.water"].WATER == 0.7


def test_list_slots_know_their_inputs_by_name(kitchen) -> None:
    text = TEXT.replace("bread: {uses: bake, matrix: {loaves: [1, 2]}}", "bread: {uses: bake}")
    renamed = text.replace("bread:", "loaf:")
    before, after = keys(kitchen, text), keys(kitchen, renamed)
    assert after["loaf"] == before["bread"]  # the same work under another name
    assert changed(before, after) == {"loaf", "verdict", "sell"}  # but these print the name


def test_an_outside_file_counts_by_content_not_by_path(kitchen) -> None:
    text = "stages: {flour: {uses: grind, grain: %s}}"
    kitchen.write("a.txt", "rye")
    kitchen.write("b/c.txt", "rye")
    before = keys(kitchen, text % "a.txt")
    assert keys(kitchen, text % "b/c.txt") == before
    kitchen.write("a.txt", "oat")
    assert keys(kitchen, text % "a.txt") != before


def test_an_outside_folder_counts_by_names_sizes_and_times(kitchen) -> None:
    text = "stages: {flour: {uses: grind, field: barn}}"
    file = kitchen.write("barn/deep/a.txt", "rye")
    os.utime(file, (1, 1))
    before = keys(kitchen, text)
    kitchen.write("barn/deep/a.txt", "oat")
    os.utime(file, (1, 1))
    assert keys(kitchen, text) == before  # contents are not read: the stage that uses them does that once
    os.utime(file, (2, 2))
    second = keys(kitchen, text)
    file.rename(file.with_name("b.txt"))
    assert len({*before.values(), *second.values(), *keys(kitchen, text).values()}) == 3


def test_identity_is_part_of_the_key(kitchen) -> None:
    before = keys(kitchen)
    kitchen.write("till.txt", "the old one")
    assert changed(before, keys(kitchen)) == {"sell"}


def test_a_digest_is_remembered_by_path_size_and_time(kitchen) -> None:
    path = kitchen.write("a.txt", "rye")
    memory = kitchen.folder / "digests.json"

    def digest() -> str:
        digests = Digests(memory)
        found = digests.file(path)
        digests.save()
        return found

    os.utime(path, (1000, 1000))
    first = digest()
    path.write_text("oat")
    os.utime(path, (1000, 1000))
    assert digest() == first  # which shows that the memory is used
    os.utime(path, (1001, 1001))
    assert digest() != first
    path.write_text("now")  # too fresh to be remembered: it may be written again within the clock's grain
    digest()
    stamp = path.stat().st_mtime_ns
    path.write_text("new")
    os.utime(path, ns=(stamp, stamp))
    assert digest() == digest()
    memory.write_text("{")
    assert digest() != first


def test_a_plan_is_recalled_until_anything_it_was_made_from_changes(kitchen) -> None:
    grain = kitchen.write("a.txt", "rye")
    mine = (kitchen.folder / "bakery/baking/recipes/rye.py").read_text().replace("class Rye", "class Mine")
    path = kitchen.write("mine.py", mine)
    text = TEXT.replace("grind}", "grind, grain: a.txt}").replace("{name: rye}", "./mine.py")
    store = Store(kitchen.folder / "runs")

    def recalled(overrides: tuple[str, ...] = ()) -> Plan | None:
        return Memory(store, "bakery").recall(text.encode(), overrides, Digests(kitchen.folder / "d.json"))

    def remember() -> Plan:
        planned = made(kitchen, text)
        Memory(store, "bakery").remember(text.encode(), (), planned)
        return planned

    assert recalled() is None
    planned = remember()
    assert recalled() == planned
    assert recalled(("stages.flour.grams=3",)) is None
    kitchen.edit("baking/water.py", "0.7", "0.8")
    assert recalled() is None
    assert remember() != planned
    path.write_text(mine.replace("1 + WATER", "2 + WATER"))
    assert recalled() is None
    remember()
    grain.write_text("oats")
    assert recalled() is None
    remember()
    assert recalled() is not None
    grain.unlink()
    assert recalled() is None


def test_another_processor_or_fewer_cores_make_a_remembered_plan_stale(kitchen, monkeypatch) -> None:
    cpus, board = kitchen.write("cpuinfo", "processor: 0\nmodel name: one\ncpu MHz: 1\n"), kitchen.folder / "board"
    monkeypatch.setattr(plan, "_CPUS", cpus)
    monkeypatch.setattr(plan, "_BOARD", board)
    found = [plan.surroundings("bakery")]
    cpus.write_text(cpus.read_text().replace("MHz: 1", "MHz: 2"))
    assert plan.surroundings("bakery") == found[0]
    cpus.write_text(cpus.read_text().replace("one", "two"))
    found.append(plan.surroundings("bakery"))
    cpus.write_text("processor: 0\n")
    board.write_text("Pi")
    found.append(plan.surroundings("bakery"))
    board.unlink()
    cpus.unlink()
    found.append(plan.surroundings("bakery"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(1000), raising=False)
    found.append(plan.surroundings("bakery"))
    assert len(set(found)) == 5
