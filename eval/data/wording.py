"""How tasks put their questions: templates as data, this project's own or those read out of the authors' code.

A template names a row's fields in braces, {passage}; nothing else in it means anything. The project's own
templates are `datasets/wording.json`. A `wording.json` in the user's data folder, as `import-authors` writes
it, takes their place, task by task.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from austeer.errors import AUSteerError

OWN = Path(__file__).parents[2] / "datasets" / "wording.json"


@dataclass(frozen=True)
class Wording:
    """One task's templates for `train`, which makes pairs, and `test`, which is asked."""

    source: str
    train: dict
    test: dict
    instruction: str  # asks for the behaviour outright: the prompt-only control. Always this project's

    @property
    def label(self) -> str:
        """For records: whose wording, and exactly which."""
        text = json.dumps([self.train, self.test], sort_keys=True)
        return f"{self.source}; {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def read_wording(task: str, data_dir: Path | None = None) -> Wording:
    theirs = data_dir / "wording.json" if data_dir else OWN
    instruction = json.loads(OWN.read_text(encoding="utf-8")).get(task, {}).get("instruction", "")
    for path in (theirs, OWN):
        if not path.exists():
            continue
        try:
            whole = json.loads(path.read_text(encoding="utf-8"))
            if task in whole:
                return Wording(
                    whole[task].get("source", whole["source"]), whole[task]["train"], whole[task]["test"], instruction
                )
        except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
            raise AUSteerError(f"{path} is not a wording file ({type(error).__name__}: {error})") from None
    raise AUSteerError(f"there is no wording for {task!r} in {OWN.name}")


def fill(template: str, row: dict) -> str:
    def value(match: re.Match) -> str:
        if match[1] not in row:
            raise AUSteerError(f"the template names {{{match[1]}}}; a row has {', '.join(row)}")
        return str(row[match[1]])

    return re.sub(r"\{(\w+)\}", value, template)
