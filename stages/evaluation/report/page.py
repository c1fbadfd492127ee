"""Page: what a report says, as sections of sentences, tables and pictures, written as HTML and as Markdown.

The template is a string of this module, not a file beside it: so it is part of the code that the result's key covers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from stages.artifacts.reports import Gate
from stages.evaluation.report.pictures import Strip
from stages.evaluation.report.wording import sentence


@dataclass(frozen=True)
class Table:
    """Cells are printed as they are. The first `words` columns are text, the others numbers, set to the right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    title: str = ""


@dataclass(frozen=True)
class Plot:
    """An SVG element and what it shows."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Section:
    """One heading. Sentences first, of which `strong` is the one to remember."""

    title: str
    strong: str = ""
    sentences: Sequence[str] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    strips: Sequence[Strip] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Page:
    """The whole report, verdict first."""

    title: str
    verdict: str
    passed: bool | None
    """None where no gate was asked for."""
    lead: Sequence[str]
    facts: Sequence[tuple[str, str]]
    """Number and what it is: the few to see at once."""
    gates: Sequence[Gate]
    sections: Sequence[Section] = field(default=())


def html(page: Page) -> str:
    """One file that needs nothing else: no network, no scripts."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["prose"] = lambda text: code(sentence(text))
    environment.filters["code"] = code
    return environment.from_string(_HTML).render(page=page, css=Markup(_CSS), svg=Markup)


def code(text: str) -> Markup:
    """Escaped, and what stands between backticks, which is to be typed, as code that no line breaks."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def markdown(page: Page) -> str:
    """The same without plots and pictures."""
    lines = [f"# {page.title}", "", f"**{sentence(page.verdict)}**", ""]
    lines += [sentence(one) for one in page.lead]
    if page.gates:
        gates = [(gate.name, gate.asked, gate.measured, "passed" if gate.passed else "FAILED") for gate in page.gates]
        lines += ["", *_markdown_table(Table(("gate", "asked", "measured", "verdict"), gates, words=4))]
    for section in page.sections:
        lines += ["", f"## {section.title}", ""]
        lines += [f"**{sentence(section.strong)}**", ""] if section.strong else []
        lines += [f"- {_cell(sentence(one))}" for one in section.sentences]
        for table in section.tables:
            lines += [""] if not table.title else ["", f"{table.title}:", ""]
            lines += _markdown_table(table)
        lines += ["", *(f"- {_cell(sentence(one))}" for one in section.notes)] if section.notes else []
        if section.plots or section.strips:
            lines += ["", "Plots and images of this section are in report.html."]
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def _markdown_table(table: Table) -> list[str]:
    marks = ["---" if column < table.words else "---:" for column in range(len(table.head))]
    return ["| " + " | ".join(map(_cell, row)) + " |" for row in (table.head, marks, *table.rows)]


def _cell(text: str) -> str:
    """What Markdown would take for a column, a tag or emphasis is escaped."""
    for special in "\\|<*`":
        text = text.replace(special, f"\\{special}")
    return text.replace("\n", " ")


_CSS = """
:root { color-scheme: light; --ink: #111827; --soft: #4b5563; --rule: #e5e7eb; --good: #15803d; --bad: #b91c1c; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 15px/1.55 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 36px 28px 72px; }
h1 { font-size: 15px; font-weight: 600; color: var(--soft); margin: 0 0 6px; }
h2 { font-size: 20px; line-height: 1.3; margin: 52px 0 10px; padding-top: 14px; border-top: 2px solid var(--ink); }
h3 { font-size: 14px; margin: 22px 0 4px; }
p { margin: 6px 0; max-width: 46em; }
.verdict { font-size: 32px; line-height: 1.2; font-weight: 700; margin: 0 0 12px; max-width: none; }
.good { color: var(--good); } .bad { color: var(--bad); } .none { color: var(--soft); }
.strong { font-size: 17px; line-height: 1.4; font-weight: 600; max-width: 56em; }
.facts { display: flex; flex-wrap: wrap; gap: 10px 44px; margin: 22px 0 26px; padding: 0; }
.facts div { min-width: 96px; } .facts dt { font-size: 28px; font-weight: 650; line-height: 1.15; }
.facts dd { margin: 0; color: var(--soft); font-size: 13px; }
.scroll { overflow-x: auto; margin: 10px 0 14px; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; min-width: 50%; }
th, td { padding: 5px 14px 5px 0; text-align: right; vertical-align: top;
 border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); border-bottom: 1px solid #9ca3af; vertical-align: bottom; }
.w { text-align: left; white-space: normal; }
td.w:first-child { font-weight: 550; white-space: nowrap; }
.gates td:nth-child(2) { min-width: 12em; }
code { font-size: 0.93em; white-space: nowrap; background: #f3f4f6; padding: 1px 5px; border-radius: 3px; }
.mark { font-weight: 700; white-space: nowrap; }
.note { color: var(--soft); font-size: 13.5px; }
figure { margin: 16px 0 22px; } figure svg { display: block; width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: 13px; margin-top: 4px; }
.strip { display: grid; gap: 2px 10px; margin: 0 0 18px; break-inside: avoid; }
.strip img { width: 100%; display: block; border: 1px solid var(--rule); }
.strip .file { grid-column: 1 / -1; font-size: 12.5px; color: var(--soft); }
.strip span { font-size: 12.5px; }
@media print { body { font-size: 10.5pt; } main { max-width: none; padding: 0; } h2 { break-after: avoid; margin-top: 28px; }
 tr, figure { break-inside: avoid; } .scroll { overflow: visible; } td, th { white-space: normal; } }
"""

_HTML = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ page.title }}: {{ page.verdict }}</title>
<style>{{ css }}</style>
</head>
<body>
<main>
{% macro draw(table) %}
{% if table.title %}
<h3>{{ table.title }}</h3>
{% endif %}
<div class="scroll"><table>
<thead><tr>
{% for cell in table.head %}
<th{% if loop.index <= table.words %} class="w"{% endif %}>{{ cell }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>{% for cell in row %}<td{% if loop.index <= table.words %} class="w"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% endmacro %}
<h1>{{ page.title }}</h1>
<p class="verdict {{ {true: 'good', false: 'bad'}.get(page.passed, 'none') }}">{{ page.verdict | prose }}</p>
{% for one in page.lead %}
<p class="strong">{{ one | prose }}</p>
{% endfor %}
<dl class="facts">
{% for number, what in page.facts %}
<div><dt>{{ number }}</dt><dd>{{ what }}</dd></div>
{% endfor %}
</dl>
{% if page.gates %}
<div class="scroll"><table class="gates">
<thead><tr><th class="w">gate</th><th class="w">asked</th><th class="w">measured</th><th class="w">verdict</th></tr></thead>
<tbody>
{% for gate in page.gates %}
<tr><td class="w">{{ gate.name }}</td><td class="w">{{ gate.asked }}</td><td class="w">{{ gate.measured | code }}</td>
{% if gate.passed %}
<td class="w mark good">&#10003; passed</td></tr>
{% else %}
<td class="w mark bad">&#10007; failed</td></tr>
{% endif %}
{% endfor %}
</tbody>
</table></div>
{% endif %}
{% for section in page.sections %}
<section>
<h2>{{ section.title }}</h2>
{% if section.strong %}
<p class="strong">{{ section.strong | prose }}</p>
{% endif %}
{% for one in section.sentences %}
<p>{{ one | prose }}</p>
{% endfor %}
{% for table in section.tables %}
{{ draw(table) }}
{% endfor %}
{% for plot in section.plots %}
<figure role="img" aria-label="{{ plot.caption }}">{{ svg(plot.svg) }}
<figcaption>{{ plot.caption | prose }}</figcaption></figure>
{% endfor %}
{% for strip in section.strips %}
<div class="strip" style="grid-template-columns: repeat({{ strip.panels | length }}, 1fr)">
{% for panel in strip.panels %}
<div><img src="{{ panel.uri }}" alt="{{ strip.file_name }}, {{ panel.caption }}"><span>{{ panel.caption }}</span></div>
{% endfor %}
<div class="file">{{ strip.file_name }}</div>
</div>
{% endfor %}
{% for one in section.notes %}
<p class="note">{{ one | prose }}</p>
{% endfor %}
</section>
{% endfor %}
</main>
</body>
</html>
"""
