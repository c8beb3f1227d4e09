"""What cheaper searches cost and lose (Table 7), site by site: the better of two sites would hide the worse one."""

from __future__ import annotations

from eval.statistics import wilson
from paper.manifest import Manifest
from paper.render.values import Block, Row, Value
from paper.specs import Spec

COST = "cost, share of the full grid"


def searches(spec: Spec, manifest: Manifest, block: str) -> Block:
    """show["searches"]: cheaper row -> the row of the full grid."""
    columns = [column for column, says in spec.columns.items() if not says.get("judge")]
    rows, inside, costs = [], {}, {}  # of the sentences: by kind of search
    for cheap, full in spec.show["searches"].items():
        kind = spec.rows[cheap]["search"]
        for site in spec.rows[cheap]["sites"]:
            values, shares = [], []
            for column in columns:
                mine, whole = (_at(manifest, spec, block, row, column, site) for row in (cheap, full))
                if mine is None or whole is None:
                    missing = cheap if mine is None else full
                    values.append(Value(why=manifest.why_missing(spec.name, block, missing, column)))
                    continue
                value, is_inside = _against(mine, whole)
                values.append(value)
                inside.setdefault(kind, []).append(is_inside)
                shares.append(mine["asked"] / whole["asked"])
            costs.setdefault(kind, []).extend(shares)
            label = spec.rows[cheap]["label"].replace(" (better of two sites)", "")
            ours = spec.rows[cheap].get("ours", False)
            rows.append(Row(f"{cheap} {site}", f"{label}, {site}", ours, [Value(span(shares)), *values]))
    notes = [
        f"Search {kind}: {sum(found)} of {len(found)} test results (methods, tasks and sites) lie inside the 95 % interval "
        f"of the full grid, at {span(costs[kind])} of its cost."
        for kind, found in inside.items()
    ]
    return Block(f"{block}: against the full grid, site by site", [COST, *columns], [COST, *columns], rows, notes)


def _at(manifest: Manifest, spec: Spec, block: str, row: str, column: str, site: str) -> dict | None:
    return next((one for one in manifest.records(spec.name, block, row, column) if one["site"] == site), None)


def _against(mine: dict, whole: dict) -> tuple[Value, bool]:
    low, high = wilson(whole["right"], whole["n"])
    share = mine["right"] / mine["n"]
    inside = low <= share <= high
    small = "✓ inside" if inside else "✗ below" if share < low else "✗ above"
    facts = [f"full grid {100 * whole['right'] / whole['n']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"]
    ids = [mine["id"], whole["id"]]
    return Value(f"{100 * share:.1f}", small, facts, number=100 * share, ids=ids), inside


def span(shares: list[float]) -> str:
    if not shares:
        return ""
    low, high = round(100 * min(shares)), round(100 * max(shares))
    return f"{low} %" if low == high else f"{low} to {high} %"
