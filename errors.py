"""The one error type a person meets: a single line that says what is wrong and what to do."""

from __future__ import annotations

import sys
from collections.abc import Callable


class AUSteerError(ValueError):
    """A mistake in the input, not in the program. Command lines print it without a traceback."""


def one_line(error: Exception) -> str:
    """For a table or a record; of what is not a person's mistake, with its type."""
    line = (str(error).strip().splitlines() or [""])[0]
    return line if isinstance(error, AUSteerError) else f"{type(error).__name__}: {line}".removesuffix(": ")


def run_command(command: Callable[[], int | None]) -> None:
    """Run a command line's body; exit 1 with one clear line on an AUSteerError, 130 on Ctrl-C."""
    try:
        sys.exit(command() or 0)
    except AUSteerError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
