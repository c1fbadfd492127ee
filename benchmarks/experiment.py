"""Keep what an experiment has shown: tables and pictures of its report, with command, machine and date.

    pipeline run configs/experiments/digits_methods.yaml
    python benchmarks/experiment.py runs/latest/report --config configs/experiments/digits_methods.yaml \
        --out benchmarks/results/digits_methods

Writes OUT-DATE.md, OUT-DATE.json and one OUT-DATE-N.svg a picture, from the report and its provenance alone.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

SECTIONS = ("Arms against the control", "Where distillation pays", "Accuracy against latency")


def section_of(markdown: str, title: str) -> str:
    """A section of report.md with its heading; empty where there is none."""
    found = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", markdown, re.MULTILINE | re.DOTALL)
    return found[0].rstrip() + "\n" if found else ""


def pictures_of(html: str, title: str) -> list[str]:
    """The SVG elements of a section of report.html, each a file of its own."""
    found = re.search(rf"<h2>{re.escape(title)}</h2>.*?</section>", html, re.DOTALL)
    return re.findall(r"<svg.*?</svg>", found[0], re.DOTALL) if found else []


def machine_of(record: dict[str, Any]) -> dict[str, Any]:
    """On which machine the AP was measured."""
    machine: dict[str, Any] = record["rows"][0]["machine"]
    return machine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="folder of the finished report")
    parser.add_argument("--config", required=True, help="what was run")
    parser.add_argument("--out", type=Path, required=True, help="beginning of the files' names")
    arguments = parser.parse_args()
    record = json.loads((arguments.report / "report.json").read_text())
    provenance = json.loads((arguments.report / "provenance.json").read_text())
    if not record["arms"]:
        print(f"{arguments.report}: the report has no arms; run an experiment of configs/experiments", file=sys.stderr)
        return 2
    command, date = f"pipeline run {arguments.config}", str(provenance["started"])
    stem = f"{arguments.out}-{date[:10]}"
    machine, commit = machine_of(record), provenance["commit"] or {}
    html, markdown = ((arguments.report / f"report.{kind}").read_text() for kind in ("html", "md"))
    pictures = [svg for title in SECTIONS for svg in pictures_of(html, title)]
    told = [section for title in SECTIONS if (section := section_of(markdown, title))]
    code = f"{commit.get('id', 'unknown')[:12]}{' with changes' if commit.get('dirty') else ''}"
    names = [f"{Path(stem).name}-{number}.svg" for number in range(1, len(pictures) + 1)]
    for name, svg in zip(names, pictures, strict=True):
        Path(stem).with_name(name).write_text(svg + "\n")
    head = [
        f"# {Path(arguments.config).stem}",
        "",
        f"- `{command}`",
        f"- report made {date}, code {code}",
        f"- {machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 1e9:.1f} GB, {machine['os']}",
        *(f"- picture: [{name}]({name})" for name in names),
        "",
    ]
    Path(f"{stem}.md").write_text(
        "\n".join([*head, *told]).replace("Plots and images of this section are in report.html.", "")
    )
    kept = {"command": command, "date": date, "machine": machine, "code": code}
    kept |= {name: record[name] for name in ("arms", "arms_between")}
    Path(f"{stem}.json").write_text(json.dumps(kept, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
