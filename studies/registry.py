"""Every study by the name that specs use."""

from __future__ import annotations

from types import ModuleType

from studies import overhead

STUDIES: dict[str, ModuleType] = {"overhead": overhead}
