"""The table of students in docs/methods.md is what benchmarks/students.py counts."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_documented_table_is_the_counted_one():
    spec = importlib.util.spec_from_file_location("students", ROOT / "benchmarks" / "students.py")
    students = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(students)
    found = students.counted(80, [320, 640])
    assert "\n".join(students.table(found)) in (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    flops = {name: one["flops"][320] for name, one in found.items()}
    heaviest = flops.pop("RetinaNet, ResNet-18")
    assert max(flops.values()) < heaviest / 3
