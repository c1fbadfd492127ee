"""Nodes that run side by side: in processes of their own, with a share of the cores, and stopped with the run."""

import signal
import subprocess
import time

import pytest

BESIDE = """
jobs: 2
stages:
  flour: {uses: grind}
  dough: {uses: knead}
  bread: {uses: bake, seconds: SECONDS, loaves: 3}
  rolls: {uses: bake, seconds: SECONDS, loaves: 4, trouble: "TROUBLE"}
  verdict: {uses: taste}
"""


@pytest.fixture
def two_ovens(kitchen):
    """A kitchen whose `bake` may run beside others; `config(seconds, trouble)` writes its config."""
    kitchen.edit("bake.py", "RESUMES = True", "RESUMES = SIDE_BY_SIDE = True")

    def config(seconds: float = 0.0, trouble: str = "") -> None:
        kitchen.write("c.yaml", BESIDE.replace("SECONDS", str(seconds)).replace("TROUBLE", trouble))

    kitchen.two = config
    return kitchen


def started(kitchen, *lines: str) -> None:
    """Wait until the diary has these lines."""
    for _ in range(600):
        text = kitchen.diary.read_text().splitlines() if kitchen.diary.exists() else []
        if all(line in text for line in lines):
            return
        time.sleep(0.05)
    raise AssertionError(f"{lines} never came: {text}")


def test_two_run_at_once_and_what_needs_both_comes_last(two_ovens) -> None:
    two_ovens.two(seconds=1.0)
    assert two_ovens.pipeline("run", "c.yaml") == 0
    lines = two_ovens.took()
    both = max(lines.index("bake 3"), lines.index("bake 4"))
    assert both < max(i for i, line in enumerate(lines) if line.startswith("loaf"))
    assert [line for line in lines if line.startswith("loaf 0")] == ["loaf 0"] * 2
    first_end = next(i for i, line in enumerate(lines) if line == "loaf 2")
    assert both < first_end  # the second began before the first had ended
    assert "bread: bake: 3/3 loaf" in two_ovens.err
    assert "rolls: bake: 4/4 loaf" in two_ovens.err
    assert two_ovens.pipeline("run", "c.yaml") == 0
    assert two_ovens.took() == []


def test_one_after_the_other_makes_the_same(two_ovens) -> None:
    two_ovens.two()
    assert two_ovens.pipeline("run", "c.yaml") == 0
    content = {path.name for path in (two_ovens.folder / "runs").glob("*-*")}
    assert two_ovens.pipeline("run", "c.yaml", "--set", "jobs=1", "--store", "other") == 0
    assert {path.name for path in (two_ovens.folder / "other").glob("*-*")} == content


def test_each_gets_its_share_of_the_cores(two_ovens, monkeypatch) -> None:
    monkeypatch.setattr("pipeline.beside.cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    two_ovens.edit(
        "bake.py", 'note(f"bake {config.loaves}")', 'import os; note("threads " + os.environ["OMP_NUM_THREADS"])'
    )
    two_ovens.two()
    assert two_ovens.pipeline("run", "c.yaml") == 0
    assert two_ovens.took().count("threads 3") == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # the user's word is the last
    assert two_ovens.pipeline("run", "c.yaml", "--store", "other") == 0
    assert two_ovens.took().count("threads 5") == 2


@pytest.mark.parametrize(("trouble", "code", "said"), [("data", 2, "mouldy"), ("proof", 3, "raw"), ("bug", 1, "oops")])
def test_a_failure_keeps_its_exit_code_and_the_other_ends_well(two_ovens, trouble: str, code: int, said: str) -> None:
    two_ovens.two(seconds=0.3, trouble=trouble)
    assert two_ovens.pipeline("run", "c.yaml") == code
    assert said in two_ovens.err
    assert two_ovens.err.splitlines()[-1] == "rolls: not made: its process said why above"
    assert two_ovens.made() == ["bake", "grind", "knead"]


def test_force_makes_both_again_once(two_ovens) -> None:
    two_ovens.two()
    assert two_ovens.pipeline("run", "c.yaml") == 0
    two_ovens.took()
    assert two_ovens.pipeline("run", "c.yaml", "--force", "bread", "--force", "rolls") == 0
    assert sorted(line for line in two_ovens.took() if line.startswith("bake")) == ["bake 3", "bake 4"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_the_run_ends_both_and_the_same_command_goes_on(two_ovens, number) -> None:
    two_ovens.two(seconds=1.0)
    process = two_ovens.start("run", "c.yaml")
    started(two_ovens, "bake 3", "bake 4", "loaf 0")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 130), err
    time.sleep(1.5)
    before = two_ovens.diary.read_text()
    time.sleep(1.5)
    assert two_ovens.diary.read_text() == before  # nobody bakes on
    two_ovens.took()
    assert two_ovens.pipeline("run", "c.yaml") == 0
    assert len([line for line in two_ovens.took() if line.startswith("loaf")]) < 7
    assert not list((two_ovens.folder / "runs").glob(".partial/*"))


def test_a_killed_process_is_reported(two_ovens) -> None:
    two_ovens.edit("bake.py", 'note(f"bake {config.loaves}")', "import os; os.kill(os.getpid(), 9)")
    two_ovens.two()
    assert two_ovens.pipeline("run", "c.yaml") == 1
    assert "killed by signal 9; is there enough memory" in two_ovens.err


def test_code_that_changes_under_a_run_is_noticed(two_ovens) -> None:
    two_ovens.two()
    assert two_ovens.pipeline("run", "c.yaml", "--to", "dough") == 0
    command = two_ovens.command("make", "c.yaml", "bread", "0" * 64)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.wait(60) == 2
        assert "bread: config or code changed since the run began" in process.stderr.read()


@pytest.mark.parametrize("jobs", ["0", "two", "true", "1.5"])
def test_jobs_is_a_whole_number(kitchen, jobs: str) -> None:
    kitchen.write("c.yaml", f"jobs: {jobs}\nstages: {{flour: {{uses: grind}}}}")
    assert kitchen.pipeline("check", "c.yaml") == 2
    assert "jobs: how many stages may train at once" in kitchen.err
