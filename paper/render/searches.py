"""Show what cheaper searches cost and lose (Table 7), site by site: the better of two sites would hide the worse."""

from __future__ import annotations

from eval.statistics import wilson
from paper.manifest import Manifest
from paper.render.values import Block, Row, Value
from paper.specs import Spec

COST = "cost, share of the full grid"


def searches(spec: Spec, manifest: Manifest, block: str) -> Block:
    """Compare rows with the full grid. show["searches"]: cheaper row -> row of the full grid."""
    columns = [column for column, fields in spec.columns.items() if not fields.get("judge")]
    rows, inside, costs = [], {}, {}  # both by kind of search
    for cheap, full in spec.show["searches"].items():
        if full not in spec.rows:  # too costly at this scale
            continue
        kind = spec.rows[cheap]["search"]
        for site in spec.rows[cheap]["sites"]:
            values, shares = [], []
            for column in columns:
                cheaper, full_record = (_at(manifest, spec, block, row, column, site) for row in (cheap, full))
                if cheaper is None or full_record is None:
                    missing = cheap if cheaper is None else full
                    values.append(Value(why=manifest.why_missing(spec.name, block, missing, column)))
                    continue
                value, is_inside = _against(cheaper, full_record)
                values.append(value)
                inside.setdefault(kind, []).append(is_inside)
                shares.append(cheaper["asked"] / full_record["asked"])
            costs.setdefault(kind, []).extend(shares)
            label = spec.rows[cheap]["label"].replace(" (better of two sites)", "")
            ours = spec.rows[cheap].get("ours", False)
            rows.append(Row(f"{cheap} {site}", f"{label}, {site}", ours, [Value(span(shares)), *values]))
    notes = [
        f"Search {kind}: {sum(are_inside)} of {len(are_inside)} test results (methods, tasks and sites) lie inside the 95 % interval "
        f"of the full grid, at {span(costs[kind])} of its cost."
        for kind, are_inside in inside.items()
    ]
    return Block(f"{block}: against the full grid, site by site", [COST, *columns], [COST, *columns], rows, notes)


def _at(manifest: Manifest, spec: Spec, block: str, row: str, column: str, site: str) -> dict | None:
    return next((record for record in manifest.records(spec.name, block, row, column) if record["site"] == site), None)


def _against(cheaper: dict, full_record: dict) -> tuple[Value, bool]:
    low, high = wilson(full_record["right"], full_record["n"])
    share = cheaper["right"] / cheaper["n"]
    inside = low <= share <= high
    small = "✓ inside" if inside else "✗ below" if share < low else "✗ above"
    facts = [f"full grid {100 * full_record['right'] / full_record['n']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"]
    ids = [cheaper["id"], full_record["id"]]
    return Value(f"{100 * share:.1f}", small, facts, number=100 * share, ids=ids), inside


def span(shares: list[float]) -> str:
    if not shares:
        return ""
    low, high = round(100 * min(shares)), round(100 * max(shares))
    return f"{low} %" if low == high else f"{low} to {high} %"
