"""AUSteerError, the one error that users see: a single line that says what is wrong and what to do."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# extra of pyproject.toml -> the command that installs it in a checkout
IN_THE_CHECKOUT = {
    "evaluation": "pip install lm-eval==0.4.13",
    "export": "pip install -r requirements2.txt",
    "images": "pip install -r requirements.txt",
    "quantization": "pip install -r requirements2.txt",
    "sae": "pip install -r scripts/requirements-sae.txt",
    "serve": "bash scripts/setup-vllm.sh",
}
STOPPING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class AUSteerError(ValueError):
    """Report a mistake in the input, not in the program. Command lines print it without a traceback."""


class Overflow(AUSteerError):
    """Report hidden states that became inf or nan under a change of the model."""


def missing_extra(package: str, extra: str) -> AUSteerError:
    """Return the error for an optional package that is not installed."""
    return AUSteerError(
        f'this needs {package}: pip install "austeer[{extra}]" (in the checkout: {IN_THE_CHECKOUT[extra]})'
    )


def one_of(table: dict[str, T], name: str, what: str) -> T:
    """Look up a name that the user gave."""
    if name not in table:
        raise AUSteerError(f"{what} {name!r} is unknown; use one of {', '.join(table)}")
    return table[name]


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(error: Exception) -> str:
    """Return an error as one line, with its type unless it is the user's mistake."""
    named = isinstance(error, AUSteerError) or not str(error).strip()
    return first_line(error) if named else f"{type(error).__name__}: {first_line(error)}"


def run_command(command: Callable[[], int | None]) -> None:
    """Run a command line's body: exit 1 with one clear line on an AUSteerError, and 130 on Ctrl-C.

    On SIGTERM, or when its terminal closes, its `finally` blocks still run.
    """
    process = os.getpid()

    def stop(number: int, frame) -> None:
        if os.getpid() != process:  # a forked worker: its pool would mistake an exit for the end of a job, and go on
            os._exit(128 + number)
        for other in STOPPING:  # a closing terminal sends several, which would interrupt the cleaning up
            signal.signal(other, signal.SIG_IGN)
        for worker in multiprocessing.active_children():  # a pool would wait for all its jobs
            worker.terminate()
        sys.exit(128 + number)

    for number in STOPPING:
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores a closing terminal: leave that
            signal.signal(number, stop)
    try:
        code = command() or 0
        sys.stdout.flush()
        sys.exit(code)
    except AUSteerError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # `... | head` has seen enough; what is still buffered must not fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
