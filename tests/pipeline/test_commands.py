"""The command line: what it lists, what it refuses, and how fast it is."""

import resource
import subprocess
import sys
import time

import pytest

import pipeline.__main__


def test_plan_says_what_is_done_and_how_long_it_took(kitchen) -> None:
    assert kitchen.pipeline("plan", "c.yaml") == 0
    assert kitchen.out.splitlines()[-1] == "0 done, 4 to run"
    assert kitchen.took() == []
    kitchen.pipeline("run", "c.yaml", "--to", "bread", "--set", "stages.bread.seconds=0.1")
    kitchen.pipeline("plan", "c.yaml")
    lines = kitchen.out.splitlines()
    assert lines[0].split()[:2] == ["flour", "done"]
    assert lines[2].split()[:2] == ["bread", "run"]
    assert lines[2].endswith("took 0.2 s last time")
    assert lines[-1] == "2 done, 2 to run, about 0.2 s by the last times"
    kitchen.pipeline("plan", "c.yaml", "--to", "dough")
    assert kitchen.out.splitlines()[-1] == "2 done, 0 to run"


def test_show_says_how_a_result_was_made(kitchen) -> None:
    kitchen.pipeline("show", "c.yaml", "bread")
    assert "not made yet" in kitchen.out
    assert "loaves: 2" in kitchen.out
    kitchen.pipeline("run", "c.yaml")
    assert kitchen.pipeline("show", "c.yaml", "bread", "--verify") == 0
    for text in ("bread: bake, key ", "input  dough: dough (", "loaves: 2", "loaf-1.txt", "1 artifacts"):
        assert text in kitchen.out
    assert kitchen.pipeline("show", "c.yaml") == 0
    assert "verdict: taste" in kitchen.out
    loaf = kitchen.artifact("bread") / "loaf-1.txt"
    loaf.write_text(loaf.read_text().replace("8", "9"))
    assert kitchen.pipeline("show", "c.yaml", "--verify") == 3
    assert "loaf-1.txt: its content has changed since it was published; make it again with --force" in kitchen.err
    assert kitchen.pipeline("show", "c.yaml", "bred") == 2
    assert "did you mean 'bread'?" in kitchen.err


def test_stages_lists_every_setting_with_default_and_meaning(kitchen) -> None:
    assert kitchen.pipeline("stages") == 0
    for text in ("bake: Bake dough into loaves", "grind: Grind grain", "taste: Taste all bread"):
        assert text in kitchen.out
    assert kitchen.pipeline("stages", "knead") == 0
    assert kitchen.out.splitlines() == [
        "knead: Knead flour into dough.",
        "  takes  flour: Flour",
        "  takes  starter: Dough or nothing",
        "  gives  Dough",
        "  minutes: int = 5",
        "      How long.",
        "  temperature: float = 20.0",
        "      Of the room, in degrees Celsius.",
        '  recipe: one of rye, spelt, or a path = "rye"',
        "      How the dough is made.",
        "    rye: Sour and dark.",
        "      salt: float = 0.02",
        "          Salt by weight of flour.",
        "      days: int = 1",
        "          Days of souring.",
        "    spelt: Nutty.",
        "      honey: float  (needed)",
        "          Grams of honey.",
        "",
    ]
    kitchen.pipeline("stages", "grind")
    assert "grams: int (> 0) = 100" in kitchen.out
    assert kitchen.pipeline("stages", "nead") == 2
    assert "did you mean 'knead'?" in kitchen.err


def test_check_gives_every_problem_of_every_config(kitchen) -> None:
    assert kitchen.pipeline("check", "c.yaml") == 0
    assert kitchen.out == "c.yaml: fine, 4 nodes\n"
    kitchen.write("d.yaml", "stages: {flour: {uses: grind, grams: 0, gram: 1}}")
    assert kitchen.pipeline("check", "c.yaml", "d.yaml", "e.yaml") == 2
    assert kitchen.err.splitlines() == [
        "d.yaml: stages.flour.grams: should be greater than 0, was 0",
        "d.yaml: stages.flour.gram: unknown setting; did you mean 'grams'?",
        "e.yaml: e.yaml: no such file; did you mean 'd.yaml'?",
    ]
    assert not (kitchen.folder / "runs").exists()


def children_cpu_s() -> float:
    """CPU seconds of the processes waited for so far: unlike the wall clock, the same on a busy machine."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_five_mistakes_are_five_lines_in_a_second(kitchen) -> None:
    kitchen.write(
        "c.yaml", "stages:\n  a: {uses: grnd}\n  b: {uses: kned}\n  a: {uses: bak}\n  c: {uses: tast}\nq: 1\n"
    )
    before = children_cpu_s()
    process = kitchen.start("run", "c.yaml")
    _, err = process.communicate(timeout=90)
    assert children_cpu_s() - before < 2.0  # a half on a quiet machine; a busy one counts more for the same work
    assert (process.returncode, err.splitlines()) == (
        2,
        [
            "c.yaml: line 4: 'a' is given twice, first in line 2; keep one",
            "q: unknown key; there are: stages, jobs, targets",
            "stages.a.uses: no 'bak' in bakery; did you mean 'bake'?",
            "stages.b.uses: no 'kned' in bakery; did you mean 'knead'?",
            "stages.c.uses: no 'tast' in bakery; did you mean 'taste'?",
        ],
    )


def test_a_run_in_which_nothing_changed_takes_less_than_a_second(kitchen) -> None:
    kitchen.pipeline("run", "c.yaml")
    before = children_cpu_s()
    process = kitchen.start("run", "c.yaml")
    out, _ = process.communicate(timeout=90)
    assert children_cpu_s() - before < 0.6  # 0.2 on an idle machine
    assert out == kitchen.out


def test_clean_removes_what_no_named_config_reaches(kitchen) -> None:
    kitchen.pipeline("run", "c.yaml")
    kitchen.pipeline("run", "c.yaml", "--set", "stages.bread.loaves=1")  # a variant of the config by today's code
    kitchen.write("d.yaml", "stages: {flour: {uses: grind, grams: 5}}")
    kitchen.pipeline("run", "d.yaml")
    kitchen.pipeline("run", "d.yaml", "--set", "stages.flour.grams=6")
    assert kitchen.made() == ["bake", "bake", "grind", "grind", "grind", "knead", "taste", "taste"]
    assert kitchen.pipeline("clean", "c.yaml") == 0
    assert kitchen.out.count("would delete") == 2
    assert len(kitchen.made()) == 8
    assert kitchen.pipeline("clean", "c.yaml", "d.yaml", "--yes") == 0
    assert kitchen.out == "0 B freed\n"
    assert kitchen.pipeline("clean", "c.yaml", "--yes") == 0
    assert kitchen.made() == ["bake", "bake", "grind", "knead", "taste", "taste"]
    kitchen.edit("taste.py", '"taste"', '"tasted"')
    kitchen.pipeline("clean", "c.yaml")
    assert kitchen.out.count("taste-") == 2  # by older code: no run of today reaches them
    kitchen.took()
    assert kitchen.pipeline("run", "c.yaml") == 0
    assert kitchen.took() == ["tasted"]


def test_clean_needs_a_config_and_a_right_one(kitchen) -> None:
    kitchen.pipeline("run", "c.yaml")
    assert kitchen.pipeline("clean") == 2
    kitchen.write("d.yaml", "stages: {x: 1}")
    assert kitchen.pipeline("clean", "c.yaml", "d.yaml", "--yes") == 2
    assert len(kitchen.made()) == 4


def test_clean_removes_partial_directories_but_none_in_use(kitchen) -> None:
    assert kitchen.pipeline("run", "c.yaml", "--set", "stages.bread.trouble=data") == 2
    (partial,) = (kitchen.folder / "runs/.partial").glob("bake-????????????????")
    kitchen.write("d.yaml", "stages: {flour: {uses: grind}}")
    kitchen.pipeline("clean", "d.yaml")
    assert f".partial/{partial.name}" in kitchen.out
    process = kitchen.start("run", "c.yaml", "--set", "stages.bread.seconds=30")
    try:
        started = time.monotonic()
        while len(list(partial.parent.glob("bake-*/run.log"))) < 2:
            assert time.monotonic() - started < 20
            time.sleep(0.02)
        kitchen.pipeline("clean", "d.yaml", "--yes")
    finally:
        process.kill()
        process.communicate()
    assert "kept, in use: bake-" in kitchen.out
    assert not partial.exists()
    assert len(list(partial.parent.glob("bake-*/run.log"))) == 1


def test_init_hands_over_and_never_overwrites(kitchen) -> None:
    kitchen.write("bakery/starting/__init__.py", "")
    kitchen.write(
        "bakery/starting/starter.py",
        "def write(folder, out, **options):\n"
        "    out.write_text(f'{folder}')\n"
        "    return sorted(f'{name}={value}' for name, value in options.items())\n",
    )
    assert kitchen.pipeline("init", "photos", "--out", "mine.yaml", "--val-images", "v") == 0
    assert kitchen.out.splitlines() == [
        "gflops=None",
        "source=None",
        "target=None",
        "train_annotations=None",
        "train_images=None",
        "val_annotations=None",
        "val_images=v",
    ]
    assert (kitchen.folder / "mine.yaml").read_text() == "photos"
    assert kitchen.pipeline("init", "other", "--out", "mine.yaml") == 2
    assert "mine.yaml: is there already" in kitchen.err
    assert (kitchen.folder / "mine.yaml").read_text() == "photos"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--no"], "No such option"), (["rum"], "rum"), (["run"], "CONFIG"), (["run", "missing.yaml"], "no such file")],
)
def test_a_wrong_command_line_exits_2(kitchen, arguments: list[str], message: str) -> None:
    assert kitchen.pipeline(*arguments) == 2
    assert message in kitchen.err


def test_help_is_quick_and_imports_little() -> None:
    script = (
        "import sys; from pipeline.__main__ import main; main(['--help']);"
        "print([name for name in ('pydantic', 'yaml', 'rich', 'torch', 'stages') if name in sys.modules])"
    )
    before = children_cpu_s()
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert children_cpu_s() - before < 0.5  # 0.2 s on an idle machine, which is the promise of under 0.3 s
    assert ran.stdout.splitlines()[-1] == "[]"


NEEDS_EXTRA = (
    "pipeline: %s not installed, and training and export need the 'train' extra; "
    "in a copy of the repository: pip install '.[train,cpu]'\n"
)


def test_without_the_extra_it_says_which(monkeypatch, capsys) -> None:
    monkeypatch.setattr(pipeline.__main__, "find_spec", lambda name: None if name == "pydantic" else object())
    assert pipeline.__main__.main(["--help"]) == 2
    assert capsys.readouterr().err == NEEDS_EXTRA % "pydantic"


@pytest.mark.parametrize("command", [["run", "c.yaml"], ["plan", "c.yaml"], ["check", "c.yaml"], ["stages"]])
def test_without_what_a_stage_imports_it_says_the_same(kitchen, command: list[str]) -> None:
    kitchen.edit("bake.py", "import errno\n", "import errno\n\nimport oven_of_others.heat\n")
    assert kitchen.pipeline(*command) == 2
    assert kitchen.err == NEEDS_EXTRA % "oven_of_others"


@pytest.mark.parametrize("missing", ["bakery.oven", "stages.oven", "pydantic.oven"])
def test_a_module_missing_from_what_is_there_is_a_bug(kitchen, missing: str) -> None:
    kitchen.edit("bake.py", "import errno\n", f"import errno\n\nimport {missing}\n")
    with pytest.raises(ModuleNotFoundError, match=r"\.oven"):
        kitchen.pipeline("check", "c.yaml")
