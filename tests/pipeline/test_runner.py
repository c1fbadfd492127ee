"""Running: once, in order, surviving kills, two at a time, stopping at failed gates."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import ClassVar

import pytest

from pipeline.artifact import Artifact
from pipeline.store import Store

EVERYTHING = ["grind", "knead 5", "bake 2", "loaf 0", "loaf 1", "taste"]


def wait_for(path: Path, line: str) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if path.exists() and line in path.read_text().splitlines():
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} never said {line}")


def test_a_run_makes_everything_once(kitchen) -> None:
    assert kitchen.pipeline("run", "c.yaml") == 0
    assert kitchen.took() == EVERYTHING
    first = kitchen.out
    assert first.startswith("bread 2 64\n\nruns/latest/flour")
    assert kitchen.pipeline("run", "c.yaml") == 0
    assert kitchen.took() == []
    assert kitchen.out == first
    assert kitchen.artifact("bread").name.startswith("bake-")
    provenance = json.loads((kitchen.artifact("bread") / "provenance.json").read_text())
    assert provenance["settings"] == {"loaves": 2, "seconds": 0.0, "trouble": ""}
    assert [fed["node"] for fed in provenance["inputs"]["dough"]] == ["dough"]
    assert {"commit", "python", "host", "argv", "started", "seconds", "versions", "parts"} <= set(provenance)
    log = (kitchen.artifact("bread") / "run.log").read_text()
    assert "the oven is hot" in log
    assert "bake: 2/2 loaf" in log


def test_the_end_says_where_a_report_lies(kitchen) -> None:
    kitchen.edit("taste.py", "    failed =", '    (directory / "report.html").write_text("<p>Good.")\n    failed =')
    for took in (EVERYTHING, []):  # the second time from the remembered plan
        assert kitchen.pipeline("run", "c.yaml") == 0
        assert kitchen.took() == took
        assert kitchen.out.startswith("bread 2 64\nreport: runs/latest/verdict/report.html\n\nruns/latest/flour")
    assert (kitchen.folder / "runs/latest/verdict/report.html").read_text() == "<p>Good."


def test_a_run_where_nothing_has_changed_imports_no_stage(kitchen) -> None:
    assert kitchen.pipeline("run", "c.yaml") == 0
    script = (
        "import sys; from pipeline.__main__ import main; code = main(sys.argv[1:]);"
        "print(code, [name for name in sys.modules if name.split('.')[0] in ('bakery', 'pydantic', 'torch', 'yaml')])"
    )
    for command in (["run", "c.yaml"], ["plan", "c.yaml"]):
        process = kitchen.command(*command)
        ran = subprocess.run([process[0], "-c", script, *process[3:]], capture_output=True, text=True, check=True)
        assert ran.stdout.splitlines()[-1] == "0 []"


def test_only_what_changed_runs_again(kitchen) -> None:
    kitchen.pipeline("run", "c.yaml")
    kitchen.took()
    assert kitchen.pipeline("run", "c.yaml", "--set", "stages.bread.loaves=1") == 0
    assert kitchen.took() == ["bake 1", "loaf 0", "taste"]
    assert kitchen.pipeline("run", "c.yaml") == 0
    assert kitchen.took() == []  # the older results are still there
    kitchen.edit("taste.py", '"\\n".join(lines)', '"; ".join(lines)')
    assert kitchen.pipeline("run", "c.yaml") == 0
    assert kitchen.took() == ["taste"]


def test_to_runs_a_stage_and_what_feeds_it(kitchen) -> None:
    assert kitchen.pipeline("run", "c.yaml", "--to", "dough") == 0
    assert kitchen.took() == ["grind", "knead 5"]
    assert kitchen.pipeline("run", "c.yaml", "--to", "dugh", "--to", "dough[x=1]") == 2
    assert kitchen.err.splitlines() == [
        "--to dugh: no such stage; did you mean 'dough'?",
        "--to dough[x=1]: no such stage; did you mean 'dough'?",
    ]


def test_force_of_what_is_not_reached_is_a_mistake(kitchen) -> None:
    assert kitchen.pipeline("run", "c.yaml", "--to", "dough", "--force", "bread") == 2
    assert "--to: does not reach bread" in kitchen.err
    assert kitchen.took() == []


def test_force_replaces_and_what_came_out_equal_is_kept(kitchen) -> None:
    kitchen.pipeline("run", "c.yaml")
    kitchen.took()
    before = kitchen.artifact("dough").stat().st_ino
    assert kitchen.pipeline("run", "c.yaml", "--force", "dough") == 0
    assert kitchen.took() == ["knead 5"]  # the same dough: bread and verdict stay
    assert kitchen.artifact("dough").stat().st_ino != before
    assert kitchen.pipeline("run", "c.yaml", "--force", "bread") == 0
    assert kitchen.took() == ["bake 2", "loaf 0", "loaf 1"]  # from the beginning, though the stage resumes


def test_force_with_another_result_makes_what_hangs_on_it_again(kitchen) -> None:
    source = "import time\nfrom pathlib import Path\n"
    kitchen.edit("grind.py", "from pathlib import Path\n", source)
    kitchen.edit(
        "grind.py", '"." * config.grams)', '"." * config.grams); (directory / "t").write_text(str(time.time()))'
    )
    kitchen.pipeline("run", "c.yaml")
    kitchen.took()
    assert kitchen.pipeline("run", "c.yaml", "--force", "flour", "--to", "flour") == 0
    assert kitchen.took() == ["grind"]
    kitchen.pipeline("plan", "c.yaml")
    assert kitchen.out.splitlines()[-1].startswith(
        "3 done, 1 to run"
    )  # dough is stale; what follows it depends on how dough comes out
    assert kitchen.pipeline("run", "c.yaml") == 0
    assert kitchen.took() == ["knead 5"]


def test_what_was_only_measured_while_it_was_made_does_not_make_what_hangs_on_it_again(kitchen) -> None:
    kitchen.edit("goods/bread.py", "    loaves: int\n", "    loaves: int\n    seconds: float\n")
    kitchen.edit("bake.py", "loaves=config.loaves)", "loaves=config.loaves, seconds=time.time())")
    kitchen.pipeline("run", "c.yaml")
    kitchen.pipeline("run", "c.yaml", "--force", "bread")
    assert kitchen.took()[-1] == "taste"
    kitchen.edit("goods/bread.py", "    loaves: int\n", '    incidental = ("seconds",)\n    loaves: int\n')
    kitchen.pipeline("run", "c.yaml")
    kitchen.took()
    assert kitchen.pipeline("run", "c.yaml", "--force", "bread") == 0
    assert kitchen.took() == ["bake 2", "loaf 0", "loaf 1"]


def test_an_incidental_field_must_be_one() -> None:
    with pytest.raises(TypeError, match=r"Loaf.incidental: second is no field of it"):

        class Loaf(Artifact):
            incidental: ClassVar[tuple[str, ...]] = ("second",)
            seconds: float = 0.0


def test_what_older_code_made_is_kept_on_request_and_recorded(kitchen) -> None:
    kitchen.pipeline("run", "c.yaml")
    old = kitchen.artifact("dough")
    kitchen.took()
    kitchen.edit("baking/water.py", "0.7", "0.8")
    kitchen.pipeline("plan", "c.yaml")
    assert "its code changed: --keep-older-code dough" in kitchen.out
    assert kitchen.pipeline("run", "c.yaml", "--keep-older-code", "dough") == 0
    assert kitchen.took() == ["bake 2", "loaf 0", "loaf 1", "taste"]  # the code of these has not changed: keys have
    kept = kitchen.artifact("dough")
    provenance = json.loads((kept / "provenance.json").read_text())
    assert kept != old
    assert provenance["adopted_from"]["key"][:16] == old.name[-16:]
    assert kitchen.pipeline("run", "c.yaml") == 0  # from now on without the option
    assert kitchen.took() == []
    kitchen.pipeline("show", "c.yaml", "dough")
    assert f"from older code, {old.name[-16:]}" in kitchen.out


def test_keeping_older_code_goes_along_a_chain_but_not_over_other_settings(kitchen) -> None:
    kitchen.pipeline("run", "c.yaml")
    kitchen.took()
    kitchen.edit("baking/water.py", "0.7", "0.8")
    kitchen.edit("bake.py", "loaf-{i}", "bread-{i}")
    options = [word for stage in ("dough", "bread", "verdict") for word in ("--keep-older-code", stage)]
    assert kitchen.pipeline("run", "c.yaml", *options) == 0
    assert kitchen.took() == []
    old = kitchen.artifact("dough").name
    assert kitchen.pipeline("run", "c.yaml", *options, "--set", "stages.dough.minutes=6") == 2
    assert kitchen.took() == []
    assert kitchen.err.splitlines()[-1] == (
        f"dough: --keep-older-code: more than the code of {old} differs: minutes: was 5, is 6; "
        "leave the option out to make it"
    )


def test_keeping_older_code_where_there_is_none_is_a_mistake_before_anything_runs(kitchen) -> None:
    assert kitchen.pipeline("run", "c.yaml", "--keep-older-code", "dough", "--keep-older-code", "bread") == 2
    assert kitchen.took() == []
    assert kitchen.err.splitlines() == [
        f"{name}: --keep-older-code: there is no older result of {uses} in {kitchen.folder / 'runs'}; "
        "leave the option out to make it"
        for name, uses in (("dough", "knead"), ("bread", "bake"))
    ]


def test_keeping_older_code_over_other_inputs_or_another_machine_says_which(kitchen) -> None:
    kitchen.write("c.yaml", (kitchen.folder / "c.yaml").read_text() + "  sell: {}\n")
    kitchen.pipeline("run", "c.yaml")
    kitchen.took()
    kitchen.edit("bake.py", "loaf-{i}", "bread-{i}")
    flour = ["--set", "stages.flour.grams=7"]
    assert kitchen.pipeline("run", "c.yaml", *flour, "--keep-older-code", "bread") == 2
    assert kitchen.took() == ["grind", "knead 5"]
    assert re.search(r"differs: input dough: was dough with content \w{8}, is dough with content \w{8};", kitchen.err)
    kitchen.write("till.txt", "the new one")
    assert kitchen.pipeline("run", "c.yaml", "--keep-older-code", "sell") == 2
    assert kitchen.took() == []
    assert 'differs: identity.till: was "left", is "the new one"; leave' in kitchen.err


def test_a_setting_that_is_new_in_the_code_may_stand_at_its_default(kitchen) -> None:
    kitchen.pipeline("run", "c.yaml")
    kitchen.took()
    kitchen.edit("bake.py", "    trouble: str", "    heat: tuple[int, ...] = (1, 2)\n    trouble: str")
    kitchen.edit("baking/recipes/rye.py", "        days: int", "        malt: int = 3\n        days: int")
    keep = ["--keep-older-code", "dough", "--keep-older-code", "bread"]
    assert kitchen.pipeline("run", "c.yaml", *keep, "--set", "stages.bread.heat=[2, 2]") == 2
    assert "differs: heat: was not there, is [2, 2]; leave" in kitchen.err
    assert kitchen.pipeline("run", "c.yaml", *keep, "--set", "stages.dough.recipe={name: rye, malt: 2}") == 2
    assert "differs: recipe.malt: was not there, is 2; leave" in kitchen.err
    assert kitchen.took() == []
    assert kitchen.pipeline("run", "c.yaml", *keep, "--set", "stages.dough.recipe={name: rye, malt: 3}") == 0
    assert kitchen.took() == ["taste"]  # the key of what it tastes is another one


def test_a_failed_gate_is_published_stops_what_follows_and_exits_3_every_time(kitchen) -> None:
    kitchen.write("c.yaml", (kitchen.folder / "c.yaml").read_text() + "  sell: {}\n")
    for took in ([*EVERYTHING], []):
        assert kitchen.pipeline("run", "c.yaml", "--set", "stages.verdict.min_loaves=3") == 3
        assert kitchen.took() == took
        assert "failed: verdict: bread has too few" in kitchen.err
        assert "sell: not made, because a gate before it failed" in kitchen.out
    kitchen.pipeline("plan", "c.yaml", "--set", "stages.verdict.min_loaves=3")
    assert "4 done, 0 to run, 1 left out" in kitchen.out
    assert kitchen.pipeline("run", "c.yaml") == 0
    assert kitchen.took() == ["taste", "sell"]


@pytest.mark.parametrize(
    ("trouble", "code", "message"),
    [
        ("data", 2, "bread: grain: mouldy; buy another"),
        ("proof", 3, "bread: the loaf is raw"),
        ("disk", 2, "bread: the disk is full at loaf.txt; nothing finished was lost"),
    ],
)
def test_a_stage_that_refuses_publishes_nothing_and_keeps_its_partial(kitchen, trouble, code, message) -> None:
    assert kitchen.pipeline("run", "c.yaml", "--set", f"stages.bread.trouble={trouble}") == code
    assert kitchen.err.splitlines()[-1].startswith(message)
    assert kitchen.took() == EVERYTHING[:4]
    assert kitchen.made() == ["grind", "knead"]
    kitchen.pipeline("run", "c.yaml", "--set", f"stages.bread.trouble={trouble}")
    assert kitchen.took() == ["bake 2"]  # the first loaf is still there
    (partial,) = (kitchen.folder / "runs/.partial").glob("bake-*/run.log")
    assert "the oven is hot" in partial.read_text()


def test_a_bug_keeps_its_traceback_and_names_the_node(kitchen) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        kitchen.pipeline("run", "c.yaml", "--set", "stages.bread.trouble=bug")
    assert "while running the node bread" in caught.value.__notes__[0]
    (log,) = (kitchen.folder / "runs/.partial").glob("bake-*/run.log")
    assert "ZeroDivisionError: oops" in log.read_text()
    process = kitchen.start("run", "c.yaml", "--set", "stages.bread.trouble=bug")
    _, err = process.communicate(timeout=90)
    assert (process.returncode, "Traceback" in err) == (1, True)


def test_a_result_of_another_type_is_a_bug(kitchen) -> None:
    kitchen.edit("grind.py", "return Flour(grams=config.grams)", "return 3")
    with pytest.raises(TypeError, match=r"grind.run returned 3, not a Flour"):
        kitchen.pipeline("run", "c.yaml")
    assert kitchen.made() == []


def test_damage_is_repaired_by_making_it_again(kitchen) -> None:
    kitchen.pipeline("run", "c.yaml")
    (kitchen.artifact("flour") / "flour.txt").unlink()
    kitchen.took()
    assert kitchen.pipeline("run", "c.yaml") == 0
    assert kitchen.took() == ["grind"]
    assert "flour.txt is missing; it is made again" in kitchen.err
    assert (kitchen.artifact("flour") / "flour.txt").exists()


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_no_artifact_and_goes_on(kitchen, stop: signal.Signals) -> None:
    options = ["--set", "stages.bread.loaves=3", "--set", "stages.bread.seconds=0.3"]
    process = kitchen.start("run", "c.yaml", *options)
    wait_for(kitchen.diary, "loaf 0")
    process.send_signal(stop)
    _, err = process.communicate(timeout=90)
    assert kitchen.made() == ["grind", "knead"]
    if stop is signal.SIGKILL:
        assert process.returncode == -9
    else:
        assert process.returncode == 130
        assert err.splitlines()[-1] == "interrupted; what is finished stays, the same command continues"
        assert "Traceback" not in err
    before = kitchen.took()
    assert kitchen.pipeline("run", "c.yaml", *options) == 0
    took = kitchen.took()
    assert took[0] == "bake 3"
    assert sorted(line for line in before + took if line.startswith("loaf")) == ["loaf 0", "loaf 1", "loaf 2"]
    assert "bread: going on with bake" in kitchen.err


def test_an_interrupted_force_goes_on_by_the_same_command_and_the_finished_stays_valid(kitchen) -> None:
    options = ["--set", "stages.bread.loaves=3", "--set", "stages.bread.seconds=0.3"]
    assert kitchen.pipeline("run", "c.yaml", *options) == 0
    kitchen.took()
    process = kitchen.start("run", "c.yaml", *options, "--force", "bread")
    wait_for(kitchen.diary, "loaf 0")
    process.kill()
    process.communicate(timeout=90)
    before = kitchen.took()
    assert "loaf 2" not in before
    assert kitchen.pipeline("run", "c.yaml", *options) == 0
    assert kitchen.took() == []  # without the option nothing is made again
    old = kitchen.artifact("bread").stat().st_ino
    assert kitchen.pipeline("run", "c.yaml", *options, "--force", "bread") == 0
    assert "bread: going on with bake" in kitchen.err
    took = kitchen.took()
    assert [line for line in before + took if line != "bake 3"] == ["loaf 0", "loaf 1", "loaf 2"]
    assert kitchen.artifact("bread").stat().st_ino != old
    assert kitchen.pipeline("run", "c.yaml", *options, "--force", "bread") == 0
    assert kitchen.took() == ["bake 3", "loaf 0", "loaf 1", "loaf 2"]  # once finished, from the beginning
    assert not list((kitchen.folder / "runs/.partial").iterdir())


KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.__main__ import main

left = int(sys.argv.pop(1))

def counted(call):
    def wrapper(*arguments, **named):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **named)
    return wrapper

for place, name in [(os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "write_text"), (Path, "unlink")]:
    setattr(place, name, counted(getattr(place, name)))
main(sys.argv[1:])
print(f"calls left {left}")
"""


def test_killed_at_any_write_the_store_is_whole_and_the_end_is_the_same(kitchen) -> None:
    """SIGKILL at the first, ninth, ... of all calls that write, rename or remove, until none is left."""
    store = Store(kitchen.folder / "runs")

    def contents() -> dict[str, str]:
        directories = [path for path in store.directories() if path.parent == store.root]
        assert [store.verify(path) for path in directories] == [[]] * len(directories)
        files = [json.loads((path / "files.json").read_text()) for path in directories]
        return {path.name: file["content"] for path, file in zip(directories, files, strict=True)}

    process = kitchen.command("run", "c.yaml", "--to", "bread")
    assert kitchen.pipeline(*process[3:-2]) == 0
    expected = contents()
    ends = []
    for point in range(1, 100, 8):
        shutil.rmtree(store.root)
        command = [process[0], "-c", KILLED, str(point), *process[3:]]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        ends.append(ran.returncode)
        assert contents().items() <= expected.items()
        if "calls left" in ran.stdout:
            break
        assert kitchen.pipeline(*process[3:-2]) == 0
        assert contents() == expected
        assert not [path for path in (store.root / ".partial").iterdir() if path.is_dir()]
    assert ends[:3] == [-9] * 3
    assert ends[-1] == 0


def test_a_stage_that_does_not_resume_begins_again(kitchen) -> None:
    kitchen.edit("bake.py", "RESUMES = True", "")
    for _ in range(2):
        assert kitchen.pipeline("run", "c.yaml", "--set", "stages.bread.trouble=data") == 2
        assert "loaf 0" in kitchen.took()


def test_two_runs_in_one_store_do_the_work_once(kitchen) -> None:
    options = ["--set", "stages.bread.seconds=3"]
    first = kitchen.start("run", "c.yaml", *options)
    wait_for(kitchen.diary, "bake 2")
    second = kitchen.start("run", "c.yaml", *options)
    outs = [process.communicate(timeout=90) for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert kitchen.took() == EVERYTHING
    assert "waiting for another run that makes bake-" in outs[1][1]
    assert outs[0][0] == outs[1][0]


def test_the_lock_of_a_killed_run_is_free(kitchen) -> None:
    first = kitchen.start("run", "c.yaml", "--set", "stages.bread.seconds=30")
    wait_for(kitchen.diary, "bake 2")
    second = kitchen.start("run", "c.yaml", "--set", "stages.bread.seconds=30")
    time.sleep(0.2)
    first.kill()
    first.communicate()
    until = time.monotonic() + 60
    while kitchen.diary.read_text().count("bake 2") < 2:  # the second takes over
        assert time.monotonic() < until
        time.sleep(0.02)
    second.kill()
    second.communicate()


def test_matrix_results_are_labelled_and_linked(kitchen) -> None:
    text = (kitchen.folder / "c.yaml").read_text().replace("{uses: bake}", "{uses: bake, matrix: {loaves: [1, 2]}}")
    kitchen.write("c.yaml", text)
    assert kitchen.pipeline("run", "c.yaml", "--to", "bread[loaves=2]") == 0
    assert sorted(os.listdir("runs/latest")) == ["bread[loaves=2]", "dough", "flour"]
    assert kitchen.pipeline("run", "c.yaml") == 0
    assert kitchen.out.startswith("bread[loaves=1] 1 64\nbread[loaves=2] 2 64\n")
