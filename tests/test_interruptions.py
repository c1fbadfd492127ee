"""A run that was killed, wherever, and started again ends with the same student, bit for bit, as one left alone.

The reduced quickstart; teacher and data are made once, the distilled student is killed and continued. Each run is a
process of its own in which one function is replaced by one that kills the process at that point.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
SMALL = {
    "data.source.train": 48,
    "data.source.val": 8,
    "teacher.steps": 2,
    "teacher.validate_every": 2,
    "distilled.images": 32,
    "distilled.steps": 6,
    "distilled.checkpoint_every": 2,
    "distilled.validate_every": 3,
}

# What is run before the command line: each kills the process, or interrupts it, at one enumerated point.
POINTS = {
    "between steps, after a checkpoint": """
        from stages.training import loop
        step = loop.Trainer._step
        def killed(self, images, targets, iteration):
            if iteration == 3 and self.milestones is not None and "distill" in str(self.directory):
                die()
            return step(self, images, targets, iteration)
        loop.Trainer._step = killed
    """,
    "inside a checkpoint, half written": """
        import os
        fsync, seen = os.fsync, []
        def killed(handle):
            name = os.readlink(f"/proc/self/fd/{handle}")
            seen.append("distill" in name and name.endswith("last.partial"))
            if sum(seen) == 2:
                os.truncate(name, os.path.getsize(name) // 2)
                die()
            fsync(handle)
        os.fsync = killed
    """,
    "before a checkpoint is on the disk": """
        import os
        fsync, seen = os.fsync, []
        def killed(handle):
            name = os.readlink(f"/proc/self/fd/{handle}")
            seen.append("distill" in name and name.endswith("last.partial"))
            if sum(seen) == 2:
                die()
            fsync(handle)
        os.fsync = killed
    """,
    "between the two renames of a checkpoint": """
        from pathlib import Path
        replace = Path.replace
        def killed(self, target):
            if self.name == "last.partial" and "distill" in str(self) and self.with_name("previous.ckpt").exists():
                die()
            return replace(self, target)
        Path.replace = killed
    """,
    "before publication, all files written": """
        from pipeline import store
        publish = store.Store.publish
        def killed(self, uses, *rest, **more):
            if uses == "distill":
                die()
            return publish(self, uses, *rest, **more)
        store.Store.publish = killed
    """,
    "between stages, after publication": """
        from pipeline import store
        publish = store.Store.publish
        def killed(self, uses, *rest, **more):
            made = publish(self, uses, *rest, **more)
            if uses == "distill":
                die()
            return made
        store.Store.publish = killed
    """,
}
KILL = (
    "def die():\n    import os, signal\n    os.kill(os.getpid(), signal.{name})\n    import time\n    time.sleep(30)\n"
)


def started(folder, before=""):
    """`pipeline run` of the student alone in a process, just begun."""
    code = f"{before}\nfrom pipeline.__main__ import main\nimport sys\nsys.exit(main())\n"
    overrides = [part for key, value in SMALL.items() for part in ("--set", f"stages.{key}={value}")]
    overrides += ["--set", "jobs=1"]  # in this very process, where the points are planted
    command = [sys.executable, "-P", "-c", code, "run", str(QUICKSTART), "--to", "student", *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **streams)


def run(folder, before=""):
    """The same, finished; with a planted kill it may be killed."""
    process = started(folder, before)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def unmade(folder):
    """Takes the student away, and what it was pruned from."""
    for stage in ("distill", "prune"):
        for artifact in (folder / "runs").glob(f"{stage}-*"):
            shutil.rmtree(artifact)


def planted(point, name):
    lines = POINTS[point].strip("\n").splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    return KILL.format(name=name) + "\n".join(line[indent:] for line in lines)


def student(folder):
    return (folder / "runs" / "latest" / "student" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store with data and teacher, and the student of an undisturbed run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run(folder)
    assert done.returncode == 0, done.stderr
    assert not list((folder / "runs").rglob("*.ckpt"))  # what only a killed run needs is in no artifact
    weights = student(folder)
    unmade(folder)
    return folder, weights


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made[0] / "runs", tmp_path / "runs", symlinks=True)
    return tmp_path


@pytest.mark.parametrize("point", POINTS)
def test_killed_and_continued(made, folder, point):
    killed = run(folder, planted(point, "SIGKILL"))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    if point != "between stages, after publication":
        assert not list((folder / "runs").glob("distill-*"))  # nothing that can be seen is unfinished
    again = run(folder)
    assert again.returncode == 0, again.stderr
    assert student(folder) == made[1]


def test_killed_at_random_moments(made, folder):
    """Wherever it is then: what the next run finds is continued, and what comes of it is always the same student.

    `KILLS=10 pytest tests/test_interruptions.py -k random` kills ten times and takes four minutes.
    """
    begun = time.monotonic()
    assert run(folder).returncode == 0
    whole = time.monotonic() - begun
    unmade(folder)
    moments, kills = random.Random(0), 0
    while kills < int(os.environ.get("KILLS", "2")):
        process = started(folder)
        try:
            _, err = process.communicate(timeout=whole * moments.uniform(0.3, 1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, err
        assert student(folder) == made[1]
        unmade(folder)
    again = run(folder)
    assert again.returncode == 0, again.stderr
    assert student(folder) == made[1]


def test_interrupted_and_continued(made, folder):
    """It comes within the fourth step, which is finished and saved first. SIGINT has the same handler."""
    within = planted("between steps, after a checkpoint", "SIGTERM").replace(
        "    import time\n    time.sleep(30)\n", ""
    )
    stopped = run(folder, within)
    assert stopped.returncode == 130, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert "interrupted: step 4 is saved" in stopped.stderr
    again = run(folder)
    assert again.returncode == 0, again.stderr
    assert "train: 6/6 step" in again.stderr
    assert student(folder) == made[1]


def test_the_last_good_checkpoint_is_used_when_the_newest_is_damaged(made, folder):
    run(folder, planted("before publication, all files written", "SIGKILL"))
    (newest,) = (folder / "runs").rglob("last.ckpt")
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    again = run(folder)
    assert again.returncode == 0, again.stderr
    assert "last.ckpt is damaged" in again.stderr
    assert student(folder) == made[1]
