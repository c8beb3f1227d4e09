"""Say when the numbers of one table come from different library versions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

NO_LIBRARY = ("commit", "changed", "machine")


def mixed(records: Iterable[dict], what: str) -> str:
    """Name every library that has several versions among the records, with how many records each; "" if none has."""
    counts: dict[str, Counter] = {}
    for record in records:
        for library, version in record["environment"].items():
            if library not in NO_LIBRARY:
                counts.setdefault(library, Counter())[version] += 1
    several = [
        ", ".join(f"{library} {version} ({count})" for version, count in sorted(versions.items(), key=str))
        for library, versions in counts.items()
        if len(versions) > 1
    ]
    return f"Records of this {what} come from different library versions: {'; '.join(several)}." if several else ""
