"""Keep answers on disk as they come: a killed run loses only the batch that was under way.

A line is an answer. While a run is under way, lines stand in the order of the batches; a finished file is in the order of
the items, so it is the same bytes however often the run was interrupted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from austeer.errors import AUSteerError
from austeer.files import write_whole


@dataclass(frozen=True)
class Answer:
    text: str
    options: tuple[float, ...] = ()  # log-probability of each option, over its spellings, where options were given


class AnswerFile:
    """Keep answers in lines {"item", "prompt", "answer", "options"}, which the judge and the raters' sheets read too."""

    def __init__(self, path: Path):
        self.path = path

    def read(self, prompts: Sequence[str]) -> dict[int, Answer]:
        """Return the answers to these prompts that are there already. A torn last line is cut off."""
        self.prompts = prompts
        if not self.path.exists():
            return {}
        whole, newline, torn = self.path.read_bytes().rpartition(b"\n")
        if torn:  # cut in place: if the file were written anew, a kill here would lose all
            os.truncate(self.path, len(whole) + len(newline))
        try:
            rows = [json.loads(line) for line in whole.splitlines()]
            answers = {row["item"]: Answer(row["answer"], tuple(row["options"])) for row in rows}
            same = all(row["item"] >= 0 and row["prompt"] == prompts[row["item"]] for row in rows)
        except (ValueError, TypeError, KeyError):
            raise AUSteerError(f"{self.path} is damaged; delete it, and its items are answered again") from None
        except IndexError:
            same = False
        if not same:
            raise AUSteerError(f"{self.path} holds answers to other prompts; move it away")
        return answers

    def append(self, fresh: dict[int, Answer]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(b"".join(self._line(*item) for item in fresh.items()))
            file.flush()
            os.fsync(file.fileno())

    def finish(self, ordered: Sequence[Answer]) -> None:
        lines = b"".join(self._line(*item) for item in enumerate(ordered))
        write_whole(self.path, lambda temporary: temporary.write_bytes(lines))

    def _line(self, item: int, answer: Answer) -> bytes:
        row = {"item": item, "prompt": self.prompts[item], "answer": answer.text, "options": answer.options}
        return (json.dumps(row, ensure_ascii=True) + "\n").encode()
