"""Write the report: one self-contained HTML page, and the same in Markdown, from one context."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from paper.manifest import Manifest
from paper.render import gains, words
from paper.render.findings import findings
from paper.render.places import main_table
from paper.render.record_list import record_list
from paper.render.sections import section
from paper.specs import Spec

TEMPLATES = Path(__file__).parent / "templates"


def write(specs: Sequence[Spec], manifest: Manifest) -> Path:
    """Write report.html, report.md and figures/ into the manifest's folder."""
    folder = manifest.folder
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    context = _context(specs, manifest)
    for name in ("report.md", "report.html"):
        (folder / name).write_text(_environment().get_template(f"{name}.j2").render(context))
    return folder / "report.html"


def _context(specs: Sequence[Spec], manifest: Manifest) -> dict:
    sections = [section(spec, manifest) for spec in specs]
    verdicts = [] if manifest.dry_run else findings(sections)
    main = None if manifest.dry_run else main_table(sections)
    return {
        "title": f"AUSteer: results at the {manifest.scale} scale",
        "intro": words.INTRO,
        "head": words.head(manifest),
        "findings": verdicts,
        "findings_note": words.FINDINGS_NOTE if verdicts else words.NO_FINDING,
        "picture": gains.draw(main, manifest.folder / "figures") if main else None,
        "key": words.KEY,
        "sections": sections,
        "environment": words.environment(manifest),
        "cite": words.CITE,
        "records": record_list(specs, manifest),
    }


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=select_autoescape(["html.j2"]), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"code": _code, "inline": _inline}
    return environment


def _code(text: str) -> Markup:
    """Escape prose, with `words` set as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _inline(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
