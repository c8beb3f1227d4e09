"""The report: one HTML page that needs nothing beside it, and the same in Markdown."""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

from paper.manifest import Manifest
from paper.render.marks import behind
from paper.render.pictures import Picture, draw, undrawn
from paper.render.tables import blocks
from paper.render.values import Block, Value
from paper.specs import Spec

TABLES = ("accuracy", "settings", "counts", "noise", "prediction", "human", "overhead")
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:1480px;margin:2rem auto;padding:0 1rem;color:#1b1b1b;background:#fff}
h1{font-size:1.7rem}h2{margin-top:2.6rem;border-top:1px solid #ddd;padding-top:1rem}h3{font-size:1rem;margin-bottom:.3rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .6rem;text-align:right;white-space:nowrap;border-bottom:1px solid #e5e5e5;vertical-align:top}th:first-child,td:first-child{text-align:left;min-width:13rem;white-space:normal}
td small{display:block;color:#555;white-space:nowrap;font-weight:400;line-height:1.3}tr.ours td:first-child{font-style:italic}.best{font-weight:700}
img{max-width:100%;height:auto;border:1px solid #eee}nav a{margin-right:.8rem;white-space:nowrap}.missing{color:#8a3b00}
code{background:#f4f4f4;padding:.1rem .25rem}pre{background:#f4f4f4;padding:.8rem;overflow-x:auto}
@media(prefers-color-scheme:dark){body{background:#16181c;color:#e8e8e8}td small{color:#aaa}th,td{border-color:#333}
code,pre{background:#24272d}h2{border-color:#333}img{background:#fff}a{color:#7ab8ff}.missing{color:#ffb37a}}
"""
KEY = (
    "Accuracy in %, [95 % Wilson interval]; a control shows the median and the range of its draws. Settings were chosen on "
    "validation items, never on the test split, unless a row says so. * differs from vanilla (exact McNemar, Holm-adjusted "
    "over the block, p < 0.05). Bold: better than every other row of its column, and than every draw of its controls (the same "
    "test, Holm-adjusted over all such comparisons of the block). Columns that are training seeds have a mean gain with a t "
    "interval over seeds instead. AUs: how many a row changes, least to most over its columns and draws; where it is more than a "
    "quarter of the site, as false-discovery control takes on tiny models, the table says so. Italics: rows that are not in the "
    "paper. Gains over vanilla with paired bootstrap intervals and all adjusted p values are folded up below each table. A dash "
    "has its reason below the table."
)
BEHIND = "Gains over vanilla in points, 95 % interval, adjusted p"
CITE = """@inproceedings{feng2026austeer,
  title     = {Fine-Grained Activation Steering: Steering Less, Achieving More},
  author    = {Feng, Zijian and Li, Tianjiao and Zhu, Zixiao and Zhou, Hanzhang and Qian, Junlang and Zhang, Li and
               Chua, Jia Jim Deryl and Mak, Lee Onn and Ng, Gee Wah and Mao, Kezhi},
  booktitle = {International Conference on Learning Representations},
  year      = {2026}
}"""


def write(specs: Sequence[Spec], manifest: Manifest) -> Path:
    """report.html, report.md and figures/ in the manifest's folder."""
    folder = manifest.folder
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    parts = [
        (spec, draw(spec, manifest, folder / "figures"), blocks(spec, manifest) if spec.kind in TABLES else [])
        for spec in specs
    ]
    (folder / "report.md").write_text(_markdown(parts, manifest))
    (folder / "report.html").write_text(_html(parts, manifest))
    return folder / "report.html"


def _environment(manifest: Manifest) -> str:
    """Where the numbers were made, by which commits of this repository."""
    found: dict[str, Counter] = {}
    for record in filter(None, map(manifest.record, manifest.ids)):
        known = dict(record["environment"])
        commit = known.pop("commit")[:10] + (" and changes" if known.pop("changed", False) else "")
        where = ", ".join(f"{key} {value}" for key, value in known.items() if value)
        found.setdefault(f"{where}, {record['device']}", Counter())[commit] += 1
    commits = {
        where: ", ".join(f"{count} by {commit}" for commit, count in sorted(counts.items()))
        for where, counts in found.items()
    }
    return "; ".join(f"{where}; records: {commits[where]}" for where in sorted(found)) or "nothing was run"


def _head(manifest: Manifest) -> str:
    limit = manifest.how.get("limit")
    limited = f" With at most {limit} items a split: a quick look, not a result." if limit else ""
    what = {
        "embedded": "Everything on the tiny embedded models of this repository. No number here is about a real model, and none "
        "of the paper's stands beside one.",
        "small": "Two of the paper's models on one GPU of 24 GB, with at most 300 items a split.",
        "paper": "All of the paper's models.",
    }[manifest.scale]
    if manifest.dry_run:
        return "DRY RUN on tiny random checkpoints, two items a split: it shows that the code runs, and no result."
    return f"{what}{limited} Command: bash reproduce.sh --scale {manifest.scale}."


def _missing(spec: Spec, found: Sequence[Block], pictures: Sequence[Picture], manifest: Manifest) -> list[str]:
    """Every dash with its reason, alike ones together."""
    whys: dict[str, list[str]] = {}
    for block in found:
        for label, _, values in block.rows:
            for column, value in zip(block.columns, values, strict=True):
                if value.why:
                    whys.setdefault(value.why, []).append(f"{label} / {column}")
    failed = [(picture.caption, picture.note) for picture in pictures if picture.path is None]
    for what, why in (*undrawn(spec, manifest), *failed):
        whys.setdefault(why, []).append(what)
    return [f"{_briefly(where)}: {why}" for why, where in whys.items() if not why.startswith("a part is missing")]


def _briefly(places: Sequence[str]) -> str:
    return ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")


def _markdown(parts, manifest: Manifest) -> str:
    lines = [f"# AUSteer, scale {manifest.scale}", "", _head(manifest), "", KEY, ""]
    for spec, pictures, found in parts:
        lines += [f"## {spec.label}: {spec.title}", "", spec.says, ""]
        for block in found:
            lines += [
                f"**{block.name}**",
                "",
                "| | " + " | ".join(block.heads) + " |",
                "|---|" + "--:|" * len(block.heads),
            ]
            for label, ours, values in block.rows:
                name = f"*{label}*" if ours else label
                lines.append(f"| {name} | " + " | ".join(map(_cell_markdown, values)) + " |")
            lines += ["", *(f"{note}\n" for note in block.notes)]
            if tests := behind(block):
                lines += [
                    f"<details><summary>{BEHIND}</summary>",
                    "",
                    *(f"- {line}" for line in tests),
                    "",
                    "</details>",
                    "",
                ]
        for picture in (picture for picture in pictures if picture.path):
            lines += [
                f"![{picture.caption}](figures/{picture.path.name})",
                "",
                *([picture.note, ""] if picture.note else []),
            ]
        missing = _missing(spec, found, pictures, manifest)
        lines += ["Missing:", "", *[f"- {line}" for line in missing], ""] if missing else []
    lines += ["## Environment", "", _environment(manifest), "", "## How to cite", "", "```bibtex", CITE, "```", ""]
    return "\n".join(lines)


def _cell_markdown(value: Value) -> str:
    text = f"**{value.text}**" if value.best else value.text
    return " ".join(filter(None, (text + ("\\*" if value.sure else ""), value.detail, _beside_the_paper(value))))


def _beside_the_paper(value: Value) -> str:
    if value.printed is None:
        return ""
    printed = f"paper {value.printed}" if isinstance(value.printed, str) else f"paper {value.printed:g}"
    return printed if value.difference is None else f"{printed}, difference {value.difference:+.1f}"


def _html(parts, manifest: Manifest) -> str:
    title = f"AUSteer, scale {manifest.scale}"
    out = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>",
        f"<p>{escape(_head(manifest))}</p><p>{escape(KEY)}</p><nav>",
        *(f'<a href="#{spec.name}">{escape(spec.label)}</a>' for spec, _, _ in parts),
        "</nav>",
    ]
    for spec, pictures, found in parts:
        out.append(f'<h2 id="{spec.name}">{escape(spec.label)}: {escape(spec.title)}</h2><p>{_prose(spec.says)}</p>')
        for block in found:
            heads = "".join(f"<th>{escape(head)}</th>" for head in block.heads)
            out.append(f'<h3>{escape(block.name)}</h3><div class="scroll"><table><tr><th></th>{heads}</tr>')
            for label, ours, values in block.rows:
                cells = "".join(map(_cell_html, values))
                out.append(f"<tr{' class=ours' if ours else ''}><td>{escape(label)}</td>{cells}</tr>")
            out.append("</table></div>" + "".join(f"<p>{escape(note)}</p>" for note in block.notes))
            if tests := behind(block):
                lines = "".join(f"<li>{escape(line)}</li>" for line in tests)
                out.append(f"<details><summary>{BEHIND}</summary><ul>{lines}</ul></details>")
        for picture in (picture for picture in pictures if picture.path):
            data = base64.b64encode(picture.path.read_bytes()).decode()
            out.append(f'<figure><img alt="{escape(picture.caption)}" src="data:image/png;base64,{data}">')
            out.append(f"<figcaption>{escape(picture.caption)}. {_prose(picture.note)}</figcaption></figure>")
        missing = _missing(spec, found, pictures, manifest)
        if missing:
            lines = "".join(f"<li>{_prose(line)}</li>" for line in missing)
            out.append(f'<div class="missing">Missing:<ul>{lines}</ul></div>')
    out.append(
        f"<h2>Environment</h2><p>{escape(_environment(manifest))}</p><h2>How to cite</h2><pre>{escape(CITE)}</pre>"
    )
    out.append("<p>Any number: <code>python main.py trace TABLE ROW COLUMN</code> prints its record and how to compute it "
               "again.</p></body></html>")  # fmt: skip
    return "\n".join(out)


def _prose(text: str) -> str:
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def _cell_html(value: Value) -> str:
    star = "*" if value.sure else ""
    parts = [part for part in (*value.detail.split("; "), _beside_the_paper(value)) if part]
    small = "".join(f"<small>{escape(part)}</small>" for part in parts)
    return f"<td{' class=best' if value.best else ''}>{escape(value.text)}{star}{small}</td>"
