"""Show methods at the same KL on neutral text: the tables of `main.py --at-kl`, a block per model and task, and a picture of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eval.statistics import holm
from experiments import kl_report, parts_report, plots
from experiments.report import CONTROLS, LABELS, vanilla_of
from paper.manifest import Manifest
from paper.render.significance_marks import LEVEL
from paper.render.values import Block, Row, Value
from paper.specs import Spec

NOTE = (
    "Gains over vanilla at the KL that stands beside a method, with 95 % intervals over items and draws of pairs; on tasks with two "
    "words as options, what the gains are made of."
)


def equal_kl(spec: Spec, manifest: Manifest, block: str) -> list[Block]:
    """Return the tables of one model and task: the gains, then the parts that they consist of."""
    rows = records_of(spec, manifest, block)
    if not rows:
        return []
    made = [_gains(spec, block, same_rows) for same_rows in parts_report.measures(rows)]
    if parts_report.has_parts(rows):
        made.append(_parts(spec, block, parts_report.lines_of(rows, LABELS)))
    if likelihoods := parts_report.likelihood_parts(rows, LABELS):
        made.append(_likelihoods(spec, block, likelihoods))
    made[0].notes += [kl_report.heading(rows, LABELS), _weights(rows)]
    return made


def records_of(spec: Spec, manifest: Manifest, block: str) -> list[dict]:
    """Return the block's records, each once; none where vanilla is missing."""
    found = {
        record["id"]: record
        for row in spec.rows
        for column in spec.columns
        for record in manifest.records(spec.name, block, row, column)
    }
    records = sorted(found.values(), key=lambda row: row["method"] != "vanilla")
    return records if records and records[0]["method"] == "vanilla" else []


def _gains(spec: Spec, block: str, rows: Sequence[dict]) -> Block:
    """Return the table of gains. Stars are for gains of methods, Holm-adjusted for all of them; a control is not tested."""
    heads = [head for head in kl_report.HEADS if head != "method"]
    place, vanilla = kl_report.HEADS.index("method"), vanilla_of(rows)
    made, tested = [], []
    lines = kl_report.cells_of(rows, LABELS)
    for line, cells in lines:
        values = [Value(text) for text in (*cells[:place], *cells[place + 1 :])]
        gain = values[heads.index("gain")]
        gain.ids = [row["id"] for row in (*line.rows, *line.others)]
        if line.rows and line.method not in CONTROLS:
            gain.gain, gain.p = kl_report.estimate(line, vanilla), kl_report.p_of(line, vanilla)
            tested.append(gain)
        made.append(_row(spec, line.method, cells[place], values))
    for gain, p in zip(tested, holm([gain.p for gain in tested]), strict=True):
        gain.p, gain.significant = p, p < LEVEL
    reasons = kl_report.reasons([line for line, _ in lines])
    return Block(f"{block}: {kl_report.measure(rows)}", heads, heads, made, reasons)


def _parts(spec: Spec, block: str, lines: Sequence[parts_report.Line]) -> Block:
    heads, made = ["total", "skill", "bias", "format"], []
    for line in lines:
        spans = [Value(f"{part.gain:+.1f}", f"[{part.low:+.1f}, {part.high:+.1f}]") for part in line.parts.values()]
        made.append(_row(spec, line.rows[0]["method"], line.name, [Value(f"{line.total:+.1f}"), *spans]))
    return Block(f"{block}: what the gains are made of", heads, heads, made, [parts_report.PARTS])


def _likelihoods(spec: Spec, block: str, likelihoods: Sequence[tuple]) -> Block:
    heads, made = ["gain, nats", "skill", "p", "calibration"], []
    for name, method, skill, rest in likelihoods:
        spans = [Value(f"{part.gain:+.4f}", f"[{part.low:+.4f}, {part.high:+.4f}]") for part in (skill, rest)]
        values = [Value(f"{skill.gain + rest.gain:+.4f}"), spans[0], Value(f"{skill.p:.1g}"), spans[1]]
        made.append(_row(spec, method, name, values))
    return Block(f"{block}: likelihood", heads, heads, made, [parts_report.LIKELIHOODS])


def _row(spec: Spec, method: str, label: str, values: list[Value]) -> Row:
    ours = any(fields.get("ours") for fields in spec.rows.values() if fields["method"] == method)
    return Row(method, label, ours, values)


def _weights(rows: Sequence[dict]) -> str:
    """Say which weights the numbers belong to, and how they were computed."""
    found = {
        ", ".join(
            filter(
                None,
                (row.get("weights"), row.get("converted_from"), row["dtype"].removeprefix("torch."), row["device"]),
            )
        )
        for row in rows
    }
    return f"Weights: {'; '.join(sorted(found))}. Prompts: {rows[0]['wording']}."


def draw(spec: Spec, manifest: Manifest, path: Path) -> str | None:
    """Draw the gains of every block. Return a note on how to read the picture, or None without records."""
    by_block: dict[str, dict | list] = {}
    for block in spec.blocks:
        if rows := records_of(spec, manifest, block):
            parts = parts_report.lines_of(rows, LABELS) if parts_report.has_parts(rows) else None
            if shown := parts or kl_report.curves(rows, LABELS):
                by_block[block] = shown
    if not by_block:
        return None
    plots.gains(by_block, path)
    return NOTE
