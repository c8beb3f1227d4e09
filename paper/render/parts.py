"""Take the gains of another table apart: skill, bias and format (eval/decomposition.py)."""

from __future__ import annotations

from eval.decomposition import UNBIASED
from eval.statistics import holm
from experiments.parts_report import answered_by, has_parts, line_of, readings_of
from experiments.records import unpack
from experiments.report import CONTROLS
from paper.manifest import Manifest
from paper.render.selection import better_site
from paper.render.significance_marks import LEVEL
from paper.render.values import Block, Row, Value
from paper.specs import Spec


def parts(spec: Spec, manifest: Manifest, block: str) -> Block:
    rows, tested = [], []
    for row, fields in spec.rows.items():
        both = [_value(spec, manifest, block, row, column) for column in spec.columns]
        rows.append(Row(row, fields["label"], fields.get("ours", False), [value for value, _ in both]))
        tested += [(value, p) for value, p in both if p is not None]
    for (value, _), p in zip(tested, holm([p for _, p in tested]), strict=True):
        value.significant = p < LEVEL
        value.facts.append(f"p of skill {p:.2g}")
    return Block(block, list(spec.columns), list(spec.columns), rows)


def _value(spec: Spec, manifest: Manifest, block: str, row: str, column: str) -> tuple[Value, float | None]:
    """Return a cell of the table, and the p-value of its skill if it is a single steered run."""
    vanilla = manifest.records(spec.source, block, "vanilla", column)
    unsteered = spec.show["unsteered"].get(row)
    records = vanilla if unsteered else manifest.records(spec.source, block, row, column)
    if records and vanilla and not has_parts([*vanilla, *records]):
        return Value(why="computed before gains were taken apart"), None
    if not records or not vanilla:
        return Value(why=manifest.why_missing(spec.source, block, "vanilla" if unsteered else row, column)), None
    base = vanilla[0]
    if row == "vanilla":
        share = 100 * sum(unpack(base["columns"][UNBIASED])) / base["n"]
        area = base["extras"].get("AUC")
        return Value(f"{share:.1f} %", "" if area is None else f"AUC {area:.3f}", number=share, ids=[base["id"]]), None
    if unsteered:
        records = [answered_by(base, unsteered)]
    elif len({record["site"] for record in records}) > 1:
        records = [better_site(records)]
    line = line_of(row, readings_of(base), records, tested=not unsteered and records[0]["method"] not in CONTROLS)
    skill, bias, form = line.parts.values()
    span = "95 % interval" if len(records) == 1 else f"range of {len(records)} draws"
    shown = Value(
        f"{skill.gain:+.1f}", f"bias {bias.gain:+.1f}, format {form.gain:+.1f}",
        [f"gain {line.total:+.1f}; {span} of skill [{skill.low:+.1f}, {skill.high:+.1f}]"],
        number=skill.gain, ids=[record["id"] for record in records],
    )  # fmt: skip
    return shown, line.p
