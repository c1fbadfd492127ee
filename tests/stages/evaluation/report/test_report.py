"""The report stage: what it writes, what it says when something is missing, and which gates end a run."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from stages import report
from stages.artifacts.reports import Report
from stages.evaluation.report.page import code

FILES = {"report.html", "report.md", "report.json", "junit.xml", "summary.txt"}


def made(story: Any, folder: Path, **settings: Any) -> Report:
    """Run the stage into an empty folder."""
    folder.mkdir()
    return report.run(report.Config(images=settings.pop("images", 2), **settings), folder, **story.inputs())


ASKED = {"min_teacher_ap": 0.999, "max_ap_drop": 0.01, "max_p99_ms": 1.0}


@pytest.fixture(scope="module")
def folder(whole: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the stage writes for a whole story, of whose gates one passes."""
    out = tmp_path_factory.mktemp("report") / "out"
    result = made(whole, out, gates=ASKED)
    assert [gate.passed for gate in result.gates] == [False, True, False]
    assert [failure.partition(":")[0] for failure in result.failures] == ["gate min_teacher_ap", "gate max_p99_ms"]
    return out


class Page(HTMLParser):
    """What a page loads, which tags it uses, and its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect addresses that a browser would fetch."""
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        """Collect text."""
        self.words.append(data)


def test_what_is_to_be_typed_is_code() -> None:
    assert code("give `run A --force b` & <c>") == "give <code>run A --force b</code> &amp; &lt;c&gt;"
    assert code("`<script>`") == "<code>&lt;script&gt;</code>"


def test_writes_every_file_and_only_those(folder: Path) -> None:
    assert {file.name for file in folder.iterdir()} == FILES


def test_page_needs_nothing_else(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.loads
    assert all(address.startswith(("data:image/jpeg;base64,", "#")) for address in page.loads)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert page.tags.count("img") == 6  # 2 images, 3 panels each
    assert page.tags.count("svg") == 4  # AP, while training, losses, latency


def test_names_from_outside_are_escaped(folder: Path) -> None:
    assert "&lt;cow|calf&gt;" in (folder / "report.html").read_text()
    assert "<cow" not in (folder / "report.html").read_text()
    assert "\\<cow\\|calf>" in (folder / "report.md").read_text()


def test_verdict_stands_before_everything(folder: Path) -> None:
    words = " ".join(Page((folder / "report.html").read_text()).words)
    assert 0 < words.index("Failed: min_teacher_ap and max_p99_ms.") < words.index("Models")
    assert (folder / "report.md").read_text().splitlines()[2] == "**Failed: min_teacher_ap and max_p99_ms.**"


def test_junit_tells_every_gate(folder: Path) -> None:
    suite = ElementTree.parse(folder / "junit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("3", "2")
    cases = {case.get("name"): case.find("failure") for case in suite.iter("testcase")}
    assert cases["max_ap_drop"] is None
    assert cases["min_teacher_ap"] is not None
    assert str(cases["min_teacher_ap"].text).startswith("gate min_teacher_ap: asked at least 99.9 AP; teacher: ")


def test_json_holds_rows_gates_hops_and_gain(folder: Path, whole: Any) -> None:
    record = json.loads((folder / "report.json").read_text())
    assert {"rows", "gates", "hops", "gain"} <= record.keys()
    rows = {row["name"]: row for row in record["rows"]}
    assert list(rows) == ["teacher", "control", "control_equal_time", "distilled", "student", "onnx"]
    aps = {row.name: row.statistics["ap"] for row in whole.rows}
    assert {name: row["statistics"]["ap"] for name, row in rows.items()} == {
        name: round(ap, 3) for name, ap in aps.items()
    }
    assert rows["teacher"]["latency"] is None
    assert rows["onnx"]["latency"]["steps"]["end_to_end"]["p99"] == 5.5
    assert [(hop["source"], hop["target"], hop["kind"]) for hop in record["hops"]] == [
        ("teacher", "distilled", "gap"),
        ("distilled", "student", "loss"),
        ("student", "onnx", "loss"),
    ]
    gain = record["gain"]
    assert gain["mean"] == round(aps["student"] - aps["control"], 3)
    assert gain["low"] < gain["mean"] < gain["high"]
    assert gain["equal_time"]["mean"] == round(aps["student"] - aps["control_equal_time"], 3)
    assert [gate["passed"] for gate in record["gates"]] == [False, True, False]


def test_summary_has_table_gain_and_gates(folder: Path) -> None:
    lines = (folder / "summary.txt").read_text().splitlines()
    assert lines[0].split() == ["model", "AP", "AP50", "parameters", "MB", "p50", "ms", "p99", "ms"]
    assert lines[6].split()[0] == "onnx"
    assert lines[6].split()[-3:] == ["2.26", "4.40", "5.50"]
    assert any(line.startswith("Against control: gain ") for line in lines)
    assert re.fullmatch(r"  FAILED  max_p99_ms +asked at most 1.00 ms +onnx: 5.50 ms; to measure again.*", lines[-1])
    assert not any("report.html" in line for line in lines)  # the engine says where it lies


def test_says_what_the_teacher_had(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    assert "learnt from 3,000 labelled images, the student from 100: the teacher had 30 times as many" in text
    assert "800 iterations (90 s), the student for 950 (180 s" in text


def test_same_inputs_give_the_same_bytes(folder: Path, whole: Any, tmp_path: Path) -> None:
    made(whole, tmp_path / "again", gates=ASKED)
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name


def test_reports_nothing_without_a_control(story: Any, tmp_path: Path) -> None:
    story.rows = [row for row in story.rows if not row.name.startswith("control")]
    story.checkpoints = [one for one in story.checkpoints if one.metrics is None]  # no plots: they take time
    result = made(story, tmp_path / "out", gates={"min_gain_over_control": 0.1, "gain_interval_excludes_zero": True})
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert record["gain"]["mean"] is None
    assert [gate.passed for gate in result.gates] == [False, False]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Gain over control not measured: no AP of control is among the rows" in text


def without(story: Any, *stages: str) -> Any:
    """The story without the nodes of those stages."""
    story.rows = [row for row in story.rows if row.name not in stages]
    story.checkpoints = [one for one in story.checkpoints if one.name not in stages]
    return story


def test_a_control_that_nobody_expects_is_no_complaint(story: Any, tmp_path: Path) -> None:
    made(without(story, "control_equal_time"), tmp_path / "out")
    assert not [name for name in FILES if "control_equal_time" in (tmp_path / "out" / name).read_text()]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["gain"]["equal_time"] is None


@pytest.mark.parametrize(
    "settings",
    [{"equal_time_control": "control_equal_time"}, {"gates": {"min_gain_over_equal_time_control": 0.0}}],
)
def test_a_control_that_is_asked_for_is_missed(story: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    made(without(story, "control_equal_time"), tmp_path / "out", **settings)
    said = "Gain over control_equal_time not measured: no AP of control_equal_time is among the rows."
    assert said in (tmp_path / "out" / "report.md").read_text()


def test_a_control_that_is_wired_and_not_measured_is_missed(story: Any, tmp_path: Path) -> None:
    story.rows = [row for row in story.rows if row.name != "control_equal_time"]
    made(story, tmp_path / "out")
    assert "no AP of control_equal_time is among the rows" in (tmp_path / "out" / "report.md").read_text()


def test_a_detector_alone_reads_well(story: Any, tmp_path: Path) -> None:
    made(without(story, "teacher", "control", "control_equal_time", "distilled"), tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert not [word for word in ("not measured", "Gain over", "What the teacher had\n") if word in text]
    said = "Not told here: a gain over a control (there is no stage control) and what the teacher had that the student"
    assert f"{said} had not (there is no stage teacher)." in text
    assert "student - control" not in text


def test_survives_when_nothing_was_measured(empty: Any, tmp_path: Path) -> None:
    asked = {"min_teacher_ap": 0.1, "min_ap": 0.1, "max_ap_drop": 0.1, "max_p99_ms": 9, "max_megabytes": 9}
    result = made(empty, tmp_path / "out", gates=asked)
    assert len(result.failures) == 5
    assert all("not measured" in failure for failure in result.failures)
    assert "No AP was measured" in (tmp_path / "out" / "report.md").read_text()


def test_no_gates_is_no_pass(story: Any, tmp_path: Path) -> None:
    story.checkpoints.clear()
    result = made(story, tmp_path / "out", images=0)
    assert result.gates == ()
    assert "No gates were asked for." in (tmp_path / "out" / "summary.txt").read_text()
    assert '<p class="verdict none">' in (tmp_path / "out" / "report.html").read_text()


def wired(*names: str) -> dict[str, Any]:
    """Nodes as `check` sees them."""
    return {"checkpoints": [SimpleNamespace(name=name) for name in names]}


def test_check_finds_parts_that_nobody_plays() -> None:
    config = report.Config(teacher="teecher", gates={"min_gain_over_control": 0.1})
    problems = list(report.check(config, wired("teacher", "student[seed=0]")))
    assert problems == [
        "teacher: no stage teecher is wired to checkpoints; there are: student, teacher",
        "gates: one asks about the control, and no stage control is wired to checkpoints; set control",
    ]
    assert not list(report.check(report.Config(), wired()))


def test_check_wants_the_equal_time_control_of_a_gate() -> None:
    config = report.Config(gates={"min_gain_over_equal_time_control": 0.1})
    assert list(report.check(config, wired("student", "control"))) == [
        "gates: one asks about the equal_time_control, and no stage control_equal_time is wired to checkpoints; "
        "set equal_time_control"
    ]


def test_the_int8_hop_is_told_on_the_page_in_the_json_and_on_the_terminal(tmp_path: Path, story: Any) -> None:
    before = json.loads((story.folder / "onnx.json").read_text())
    story.measure("int8", "exported", before[::2], "onnx")
    story.export("int8", "onnx", precision="int8", float_layers=("head.a",))
    made(story, tmp_path / "out")
    told = "The INT8 hop (onnx to int8) lost"
    for name in ("summary.txt", "report.md"):
        assert told in (tmp_path / "out" / name).read_text()
    hop = next(one for one in json.loads((tmp_path / "out/report.json").read_text())["hops"] if one["target"] == "int8")
    assert hop["precision"] == "int8"
    assert hop["lost_low"] < hop["lost"] < hop["lost_high"]
    assert hop["lost_by_size"]["small"] > 0
    assert hop["float_layers"] == ["head.a"]
