"""What can be seen is finished, whole and found by its key."""

import json
import os
import shutil
from pathlib import Path

import pytest

from pipeline.artifact import Artifact
from pipeline.cleaning import remove
from pipeline.errors import UserError
from pipeline.store import Store

KEY = "0123456789abcdef" * 4
PROVENANCE = {"inputs": {}, "key": KEY}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


def publish(
    store: Store, text: str = "loaf", record: str = '{"failures": []}', incidental: tuple[str, ...] = ()
) -> Path:
    partial = store.begin("bake", KEY, fresh=True, inputs={})
    (partial / "crumbs").mkdir()
    (partial / "crumbs/a.txt").write_text(text)
    (partial / "run.log").write_text(str(os.urandom(4)))
    return store.publish("bake", KEY, record.encode(), PROVENANCE, incidental).directory


def test_published_is_found_with_its_files(store: Store) -> None:
    assert store.finished("bake", KEY) is None
    directory = publish(store, record='{"failures": ["burnt"]}')
    finished = store.finished("bake", KEY)
    assert finished
    assert finished.directory == directory == store.root / "bake-0123456789abcdef"
    assert finished.failures == ("burnt",)
    assert finished.files["crumbs/a.txt"]["bytes"] == 4
    assert set(finished.files) == {"crumbs/a.txt", "run.log", "provenance.json"}
    assert not list((store.root / ".partial").iterdir())


def test_nothing_is_seen_before_the_rename(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        publish(store)
    assert store.finished("bake", KEY) is None
    assert [path.name for path in store.root.iterdir()] == [".partial"]
    monkeypatch.undo()
    assert publish(store).exists()


def test_the_content_is_the_same_when_only_the_log_differs(store: Store) -> None:
    def content(text: str) -> str:
        publish(store, text)
        finished = store.finished("bake", KEY)
        assert finished
        return finished.content

    assert content("loaf") == content("loaf")
    assert content("loaf") != content("cake")


def test_incidental_fields_are_no_content_but_files_are(store: Store) -> None:
    def content(text: str, crumbs: int, seconds: float, *incidental: str) -> str:
        publish(store, text, f'{{"crumbs": {crumbs}, "seconds": {seconds}, "loss": NaN}}', incidental)
        finished = store.finished("bake", KEY)
        assert finished
        return finished.content

    assert content("loaf", 1, 2.5) != content("loaf", 1, 2.6)
    timed = content("loaf", 1, 2.5, "seconds")
    assert content("loaf", 1, 2.6, "seconds") == timed
    assert len({content("cake", 1, 2.5, "seconds"), content("loaf", 2, 2.5, "seconds"), timed}) == 3


def test_a_file_or_folder_named_by_an_incidental_field_is_no_content(store: Store) -> None:
    def content(text: str, log: str, *incidental: str) -> str:
        publish(store, text, f'{{"log": "{log}"}}', incidental)
        finished = store.finished("bake", KEY)
        assert finished
        return finished.content

    assert content("loaf", "crumbs", "log") == content("cake", "crumbs", "log")
    assert content("loaf", "crumbs/a.txt", "log") == content("cake", "crumbs/a.txt", "log")
    assert content("loaf", "crumb", "log") != content("cake", "crumb", "log")
    assert content("loaf", "crumbs") != content("cake", "crumbs")


@pytest.mark.parametrize("exchange", [True, False])
def test_publishing_again_replaces(store: Store, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:  # as on a system without renameat2
        monkeypatch.setattr("pipeline.store.ctypes.CDLL", lambda *_, **__: object())
    publish(store, "old")
    directory = publish(store, "new")
    assert (directory / "crumbs/a.txt").read_text() == "new"
    assert not list((store.root / ".partial").iterdir())


def test_damage_is_seen_at_a_look_and_by_verifying(store: Store) -> None:
    directory = publish(store)
    assert store.verify(directory) == []
    (directory / "crumbs/a.txt").write_text("cake")
    assert store.finished("bake", KEY)  # as long as before: a look does not see it
    assert "content has changed" in store.verify(directory)[0]
    (directory / "crumbs/a.txt").write_text("crumb")
    assert "has 5 bytes, had 4" in store.damage(directory)
    assert store.finished("bake", KEY) is None
    (directory / "crumbs/a.txt").unlink()
    assert "a.txt is missing" in store.damage(directory)
    (directory / "artifact.json").write_text("{")
    assert "damaged" in store.verify(directory)[0]


def test_links_are_refused(store: Store) -> None:
    partial = store.begin("bake", KEY, fresh=True, inputs={})
    (partial / "link").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="not links; copy"):
        store.publish("bake", KEY, b"{}", PROVENANCE)


def test_a_partial_directory_is_kept_only_for_the_same_inputs(store: Store) -> None:
    def begun(fresh: bool, inputs: object) -> list[str]:
        partial = store.begin("bake", KEY, fresh=fresh, inputs=inputs)
        names = sorted(path.name for path in partial.iterdir())
        (partial / "loaf").write_text("x")
        (partial / "artifact.json").write_text("{}")  # as a run killed while it published leaves it
        (partial / ".metrics.jsonl.123.tmp").write_text("{}")
        return names

    assert begun(False, {"dough": 1}) == []
    assert begun(False, {"dough": 1}) == ["loaf"]
    assert begun(False, {"dough": 2}) == []
    assert begun(True, {"dough": 2}) == []


def test_what_was_begun_by_force_goes_on_and_nothing_else_does_by_force(store: Store) -> None:
    def begun(forced: bool, inputs: object = 1) -> list[str]:
        partial = store.begin("bake", KEY, fresh=False, inputs=inputs, forced=forced)
        names = sorted(path.name for path in partial.iterdir())
        (partial / "loaf").write_text("x")
        return names

    assert begun(False) == []
    assert begun(True) == []  # what an ordinary run left is no beginning of making it again
    assert begun(True) == ["loaf"]
    assert begun(False) == ["loaf"]
    assert begun(True, inputs=2) == []
    assert begun(True, inputs=2) == ["loaf"]


def test_killed_after_the_exchange_what_was_replaced_is_not_gone_on_with(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, "old")
    partial = store.begin("bake", KEY, fresh=False, inputs={}, forced=True)
    (partial / "new.txt").write_text("new")
    with monkeypatch.context() as killed:
        killed.setattr("pipeline.store.shutil.rmtree", lambda *_, **__: None)
        killed.setattr("pipeline.store._read", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.publish("bake", KEY, b"{}", PROVENANCE)
    assert (store.root / ".partial" / f"{partial.name}.new/crumbs/a.txt").read_text() == "old"
    assert (store.directory("bake", KEY) / "new.txt").exists()
    again = store.begin("bake", KEY, fresh=False, inputs={}, forced=True)
    assert list(again.iterdir()) == []


def test_a_lock_is_held_by_one(store: Store) -> None:
    with store.lock("bake-x", None) as first, store.lock("bake-x", None) as second, store.lock("bake-y", None) as other:
        assert (first, second, other) == (True, False, True)
    with store.lock("bake-x", None) as again:
        assert again


def test_latest_is_a_relative_link_that_is_replaced(store: Store) -> None:
    directory = publish(store)
    store.link_latest("bread[oven=./a.py]", store.root)
    store.link_latest("bread[oven=./a.py]", directory)
    link = store.root / "latest/bread[oven=._a.py]"
    assert os.readlink(link) == "../bake-0123456789abcdef"
    assert link.resolve() == directory


def test_nothing_in_use_and_nothing_foreign_is_removed(store: Store) -> None:
    directory = publish(store)
    (store.root / "my-notes").mkdir()
    assert store.directories() == [directory]
    with store.lock(directory.name, None):
        assert not remove(store, directory)
    assert directory.exists()
    store.link_latest("bread", directory)
    assert remove(store, directory)
    assert sorted(path.name for path in store.root.rglob("*") if not path.is_dir()) == []
    assert (store.root / "my-notes").is_dir()


class Loaf(Artifact):
    """For loading."""

    crumbs: int = 0


def test_artifacts_are_loaded_placed_and_refused(store: Store, tmp_path: Path) -> None:
    directory = publish(store, record='{"crumbs": 3}')
    loaf = Loaf.load(directory, name="bread[seed=0]", key=KEY)
    assert (loaf.crumbs, loaf.name, loaf.key, loaf.directory) == (3, "bread[seed=0]", KEY, directory)
    assert loaf.path("crumbs/a.txt").read_text() == "loaf"
    assert loaf.provenance == PROVENANCE
    with pytest.raises(RuntimeError, match="lies in no directory"):
        Loaf().path("x")
    assert Loaf().placed(tmp_path).provenance == {}
    (directory / "artifact.json").write_text(json.dumps({"crumb": 3}))
    with pytest.raises(UserError, match="not a Loaf; run its stage again"):
        Loaf.load(directory)
    shutil.rmtree(directory)
    with pytest.raises(UserError, match="missing; this is not a finished artifact"):
        Loaf.load(directory)
