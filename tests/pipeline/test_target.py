"""Work for another machine: written, carried by hand or by ssh, taken back, refused when it is another's."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time

import pytest

from pipeline import ssh
from pipeline.errors import UserError

COUNT = """
import json, os, pathlib
loaves = json.loads(pathlib.Path("bread.json").read_text())
pathlib.Path("results").mkdir(exist_ok=True)
device = {"name": "Oven 7", "doors": 2}
print("counting", flush=True)
pathlib.Path("results/total.json").write_text(json.dumps({"total": sum(loaves), "device": device}))
"""
DELIVER = f'''"""Deliver bread: whoever gets it counts the loaves."""
import json
from pathlib import Path
from bakery.baking.diary import note
from bakery.goods.bread import Bread
from bakery.goods.flour import Flour
from bakery.goods.verdict import Receipt
from pipeline.config import BaseConfig
from pipeline.errors import Waiting

COUNT = {COUNT!r}

class Config(BaseConfig):
    """Settings."""
    tip: int = 0
    """For the courier."""

def run(config: Config, directory: Path, *, breads: list[Bread], flour: Flour) -> Receipt:
    note("deliver here")
    return Receipt(total=-1)

def work(config: Config, folder: Path, *, breads: list[Bread]) -> list[str]:
    note("pack")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bread.json").write_text(json.dumps([bread.loaves for bread in breads]))
    (folder / "count.py").write_text(COUNT)
    return ["count.py"]

def take(config: Config, directory: Path, folder: Path, target: str, *, breads: list[Bread]):
    file = folder / "results" / "total.json"
    if not file.exists():
        raise Waiting("nobody has counted")
    found = json.loads(file.read_text())
    return Receipt(total=found["total"] + config.tip), found["device"]
'''
CONFIG = """
stages:
  flour: {uses: grind}
  dough: {uses: knead}
  bread: {uses: bake}
  delivered: {uses: deliver, target: shop}
  again: {uses: deliver, target: shop, tip: 3}
  verdict: {uses: taste}
targets:
  shop: {python: PYTHON}
"""


@pytest.fixture
def shop(kitchen):
    """A kitchen that delivers to a shop, without ssh."""
    kitchen.write("bakery/deliver.py", DELIVER)
    kitchen.write("c.yaml", CONFIG.replace("PYTHON", sys.executable))
    return kitchen


def folders(kitchen):
    return sorted((kitchen.folder / "runs/work").glob("deliver-*"))


def count(folder) -> None:
    subprocess.run([sys.executable, "count.py"], cwd=folder, check=True, capture_output=True)


def test_by_hand_the_run_says_what_to_do_and_goes_on_with_the_rest(shop) -> None:
    assert shop.pipeline("run", "c.yaml") == 4
    assert shop.took() == ["grind", "knead 5", "bake 2", "loaf 0", "loaf 1", "pack", "pack", "taste"]
    assert shop.made() == ["bake", "grind", "knead", "taste"]
    one, two = folders(shop)
    lines = [line for line in shop.err.splitlines() if "waits for shop: nobody has counted; copy the folder" in line]
    assert len(lines) == 2
    assert all(any(str(folder) in line for line in lines) for folder in (one, two))
    assert f"cd {one.name} && {sys.executable} count.py" in shop.err
    for folder in (one, two):  # carried there, done, and its results carried back
        shutil.copytree(folder, shop.folder / "stick" / folder.name)
        count(shop.folder / "stick" / folder.name)
        shutil.copytree(shop.folder / "stick" / folder.name / "results", folder / "results")
    assert shop.pipeline("run", "c.yaml") == 0
    assert shop.took() == ["pack", "pack"]
    assert json.loads((shop.artifact("delivered") / "artifact.json").read_text())["total"] == 2
    assert json.loads((shop.artifact("again") / "artifact.json").read_text())["total"] == 5
    provenance = json.loads((shop.artifact("again") / "provenance.json").read_text())
    assert provenance["target"] == {"name": "shop", "device": {"name": "Oven 7", "doors": 2}}
    assert folders(shop) == []  # what was carried is not kept
    assert shop.pipeline("run", "c.yaml") == 0
    assert shop.took() == []


def test_what_hangs_on_work_elsewhere_is_left_out_with_the_reason(shop) -> None:
    shop.write(
        "bakery/audit.py", DELIVER.partition("def work")[0].replace("breads: list[Bread], flour: Flour", "r: Receipt")
    )
    shop.write("c.yaml", CONFIG.replace("  again:", "  audit: {needs: {r: delivered}}\n  again:"))
    assert shop.pipeline("run", "c.yaml") == 4
    assert "audit: not made, because it waits for work on another machine" in shop.out


def test_the_slots_are_those_of_the_work(shop) -> None:
    """`run` takes flour too, which the shop does not need; wiring it is a mistake that is named."""
    node = shop.load((shop.folder / "c.yaml").read_text()).by_name["delivered"]
    assert set(node.inputs) == {"breads"}
    assert node.target == "shop"
    with pytest.raises(UserError, match=r"stages.delivered.needs.flour: deliver has no such slot"):
        shop.load(CONFIG.replace("target: shop}", "target: shop, needs: {flour: flour}}", 1))
    shop.pipeline("stages", "deliver")
    assert "  target  another machine can do it, of breads" in shop.out
    shop.pipeline("stages")
    assert '  python: str = "python3"' in shop.out


def test_the_target_is_part_of_the_key_and_where_it_lies_is_not(shop) -> None:
    def key() -> str:
        shop.pipeline("plan", "c.yaml")
        (line,) = (line for line in shop.out.splitlines() if line.startswith("delivered"))
        return line.split()[2]

    first = key()
    text = (shop.folder / "c.yaml").read_text()
    shop.write("c.yaml", text.replace("{python: ", "{ssh: me@there, folder: elsewhere, python: "))
    assert key() == first
    shop.write("c.yaml", text.replace("shop", "market"))
    assert key() != first
    shop.write("c.yaml", text.replace(", target: shop", ""))
    assert key() != first


def test_plan_knows_the_machine_once_it_has_told(shop) -> None:
    shop.pipeline("plan", "c.yaml")
    assert "on shop (its device: decided on the target)" in shop.out
    shop.pipeline("run", "c.yaml")
    for folder in folders(shop):
        count(folder)
    shop.pipeline("run", "c.yaml")
    shop.pipeline("plan", "c.yaml", "--set", "stages.again.tip=4")
    (line,) = (line for line in shop.out.splitlines() if line.startswith("again"))
    assert "on shop (Oven 7)" in line


def test_results_of_another_machine_are_refused(shop) -> None:
    shop.pipeline("run", "c.yaml")
    one, two = folders(shop)
    count(one)
    assert shop.pipeline("run", "c.yaml") == 4  # the first tells which machine the shop is
    count(two)
    file = two / "results/total.json"
    file.write_text(file.read_text().replace("Oven 7", "Oven 8"))
    assert shop.pipeline("run", "c.yaml") == 2
    assert (
        "targets.shop: the results are of another machine than before: {'name': 'Oven 8'}, was {'name': 'Oven 7'}"
        in shop.err
    )
    assert shop.made().count("deliver") == 1
    file.write_text(file.read_text().replace("Oven 8", "Oven 7"))
    assert shop.pipeline("run", "c.yaml") == 0


def test_a_machine_that_is_not_the_one_asked_for_is_refused_the_first_time(shop) -> None:
    shop.write("c.yaml", (shop.folder / "c.yaml").read_text().replace("shop: {", "shop: {device: Oven 9, "))
    shop.pipeline("run", "c.yaml")
    for folder in folders(shop):
        count(folder)
    assert shop.pipeline("run", "c.yaml") == 2
    assert "targets.shop.device: the results are of 'Oven 7', and 'Oven 9' is asked for" in shop.err
    assert not (shop.folder / "runs/targets").exists()


def test_forced_work_begins_anew_and_then_takes_what_came_back(shop) -> None:
    shop.pipeline("run", "c.yaml")
    for folder in folders(shop):
        count(folder)
    shop.pipeline("run", "c.yaml")
    before = shop.artifact("delivered").stat().st_ino
    assert shop.pipeline("run", "c.yaml", "--force", "delivered") == 4
    (folder,) = folders(shop)
    assert not (folder / "results").exists()
    count(folder)
    assert shop.pipeline("run", "c.yaml", "--force", "delivered") == 0
    assert shop.artifact("delivered").stat().st_ino != before


def test_clean_keeps_work_that_waits_and_removes_what_no_config_wants(shop) -> None:
    shop.pipeline("run", "c.yaml")
    assert shop.pipeline("clean", "c.yaml", "--yes") == 0
    assert len(folders(shop)) == 2
    shop.write("d.yaml", "stages: {flour: {uses: grind}}")
    assert shop.pipeline("clean", "d.yaml", "--yes") == 0
    assert folders(shop) == []


@pytest.fixture
def by_ssh(shop, ssh_server):
    """The same with ssh to this machine."""
    target = f"shop: {{ssh: box, ssh_config: {ssh_server.config}, folder: {shop.folder / 'there'}, "
    shop.write("c.yaml", (shop.folder / "c.yaml").read_text().replace("shop: {", target))
    return shop


def test_over_ssh_one_command_does_it_all(by_ssh) -> None:
    assert by_ssh.pipeline("run", "c.yaml", "--to", "delivered") == 0
    assert "shop: counting" in by_ssh.err
    assert json.loads((by_ssh.artifact("delivered") / "artifact.json").read_text())["total"] == 2
    (there,) = (by_ssh.folder / "there").iterdir()
    assert sorted(path.name for path in there.iterdir()) == ["bread.json", "count.py", "results"]


def test_what_was_sent_is_not_sent_again(by_ssh) -> None:
    by_ssh.write("there/x", "")
    count_py = "import sys; sys.exit('the oven is cold')"
    by_ssh.edit(
        "deliver.py", '(folder / "count.py").write_text(COUNT)', f'(folder / "count.py").write_text({count_py!r})'
    )
    assert by_ssh.pipeline("run", "c.yaml", "--to", "delivered") == 2
    assert "sending 2 of 2 files" in by_ssh.err
    assert "targets" in by_ssh.err
    assert "the oven is cold" in by_ssh.err.splitlines()[-1]
    assert by_ssh.pipeline("run", "c.yaml", "--to", "delivered") == 2
    assert "sending 0 of 2 files" in by_ssh.err


COPY = "import pathlib; p = pathlib.Path('results'); p.mkdir(exist_ok=True); (p / 'b').write_text(open('a').read())"


@pytest.fixture
def copied(ssh_server, tmp_path):
    """A function that has a text carried there, copied, and the copy carried back."""
    folder, host = tmp_path / "work", ssh.Host("shop", "box", sys.executable, ssh_server.config)
    folder.mkdir()
    (folder / "copy.py").write_text(COPY)

    def do(text):
        (folder / "a").write_text(text)
        ssh.do(host, str(tmp_path / "there"), folder, [sys.executable, "copy.py"])
        return (folder / "results/b").read_text()

    return do


def test_a_file_that_changed_is_sent_again_whatever_its_size(copied) -> None:
    assert [copied("one"), copied("two")] == ["one", "two"]


def test_results_that_came_half_are_not_seen(copied, tmp_path, monkeypatch) -> None:
    extract = tarfile.TarFile.extractall

    def cut_off(self, *words, **named):
        extract(self, *words, **named)
        raise tarfile.ReadError("unexpected end of data")

    with monkeypatch.context() as patched:
        patched.setattr(tarfile.TarFile, "extractall", cut_off)
        with pytest.raises(UserError, match=r"reading the results in .*unexpected end of data"):
            copied("one")
    assert not (tmp_path / "work/results").exists()
    assert copied("one") == "one"
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["a", "copy.py", "results"]
    assert sorted(path.name for path in (tmp_path / "there/work").iterdir()) == ["a", "copy.py", "results"]


def test_a_host_that_cannot_be_reached_is_said_so(shop, ssh_server, tmp_path) -> None:
    """Nobody listens at the port; nothing hangs and nothing is asked."""
    config = tmp_path / "config"
    config.write_text("Host box\n  HostName 127.0.0.1\n  Port 1\n")
    with pytest.raises(UserError, match=r"targets.shop.ssh: box cannot be reached: .*refused.*; see whether `ssh -F"):
        ssh.do(ssh.Host("shop", "box", "python3", config), "work", tmp_path, ["python3"])


def test_a_host_without_that_python_is_said_so(ssh_server, tmp_path) -> None:
    host = ssh.Host("shop", "box", "python9", ssh_server.config)
    with pytest.raises(
        UserError, match=r"targets.shop: looking for work with python9 on box ended with 127: .*python9"
    ):
        ssh.do(host, "work", tmp_path, ["python9"])


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(what) -> None:
    until = time.monotonic() + 60
    while not what():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_work_there_ends_when_the_connection_does(ssh_server, tmp_path, monkeypatch) -> None:
    """Otherwise two would soon be at the same work, and disturb each other's times."""
    folder, there = tmp_path / "work", tmp_path / "there" / "work"
    folder.mkdir()
    script = "import os, pathlib, time; pathlib.Path('begun.tmp').write_text(str(os.getpid())); "
    (folder / "count.py").write_text(
        script + "os.rename('begun.tmp', 'begun'); print('begun', flush=True); time.sleep(600)"
    )
    host = ssh.Host("shop", "box", sys.executable, ssh_server.config)
    logged = []

    def interrupt(*words: object) -> None:
        logged.append(words)
        if words[-1] == "begun":
            raise KeyboardInterrupt

    monkeypatch.setattr(ssh._logger, "info", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ssh.do(host, str(there.parent), folder, [sys.executable, "count.py"])
    worker = int((there / "begun").read_text())
    wait_for(lambda: not alive(worker))
