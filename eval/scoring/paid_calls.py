"""Make remote calls that cost money or quota: each once, spaced, repeated where that can help, the answers kept.

Every answer is one line of a JSON Lines file, named by a hash of its request and flushed the moment it arrives. A request
whose answer is in the file is never sent again, so a killed run resumes when it is started again. The file holds no request
and no key.

One thing no client can promise: a call that is under way when the process is killed, or that the server answers after
the time limit, may be billed and its answer lost. So time limits are generous, and Ctrl-C waits for calls under way.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path

from tqdm import tqdm

from austeer.errors import AUSteerError

TIMEOUT = 120.0  # seconds for one answer: generous, since a second call would be paid again


class Again(Exception):
    """Report a failed attempt that is worth repeating: 429, 5xx, garbage, a dropped connection."""

    def __init__(self, problem: str, after: float = 0.0):
        super().__init__(problem)
        self.after = after  # seconds that the server tells all clients to wait


class Refused(Exception):
    """Report a request that will never be answered; others may be. An AUSteerError, in contrast, stops the run."""


@dataclass(frozen=True)
class Limits:
    at_once: int = 8
    per_second: float = 5.0
    attempts: int = 8
    first_wait: float = 1.0  # doubled at every further attempt
    longest_wait: float = 60.0
    longest_obeyed: float = 600.0  # if the server wants a longer pause, the request fails: run again later

    def __post_init__(self):
        if self.at_once < 1 or not self.per_second > 0 or self.attempts < 1:
            raise AUSteerError("--at-once must be at least 1 and --per-second above 0, with at least one attempt")


class AnswerCache:
    """Hold the file of answers open and locked: two runs on one file would pay twice."""

    def __init__(self, path: str | Path):
        self.path, self._answers, self._writing = Path(path), {}, threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
            self._lock()
        except OSError as error:
            raise AUSteerError(f"cannot write {path}: {error.strerror}") from None
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another run to finish with {self.path}", file=sys.stderr)
            fcntl.flock(self._file, fcntl.LOCK_EX)

    def _read(self) -> None:
        self._file.seek(0)
        *lines, tail = self._file.read().split(b"\n")
        for number, line in enumerate(lines, 1):
            if not self._take(line):
                raise AUSteerError(f"line {number} of {self.path} is damaged: delete it, and its request is sent again")
        if tail:  # torn by a kill; a whole line that lacks only its end was paid for, so it stays
            if self._take(tail):
                self._file.write(b"\n")
            else:
                self._file.truncate(self._file.tell() - len(tail))
            self._file.flush()

    def _take(self, line: bytes) -> bool:
        try:
            entry = json.loads(line)
            self._answers[entry["key"]] = entry["answer"]
        except (ValueError, KeyError, TypeError):
            return False
        return True

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> dict:
        return self._answers[key]

    def add(self, key: str, answer: dict) -> None:
        line = json.dumps({"key": key, "answer": answer}).encode() + b"\n"
        with self._writing:
            try:
                self._file.write(line)
                self._file.flush()
            except OSError as error:
                raise AUSteerError(f"cannot write {self.path}: {error.strerror}") from None
            self._answers[key] = answer

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> AnswerCache:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def key_of(request: dict) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def missing(requests: Sequence[dict], cache: AnswerCache) -> dict[str, dict]:
    """Return key -> request of those that have no answer yet: each once, however often it occurs."""
    keyed = {key_of(request): request for request in requests}
    return {key: request for key, request in keyed.items() if key not in cache}


def ask_all(
    requests: Sequence[dict],
    call: Callable[[dict], dict],
    cache: AnswerCache,
    limits: Limits = Limits(),
    what: str = "requests",
) -> list[dict]:
    """Return one answer per request, from the cache or from `call`, which makes one attempt: it returns JSON data or raises.

    Failures do not hold up the others; they are counted and reported in one AUSteerError at the end.
    """
    todo, failed = missing(requests, cache), []
    if not todo:
        return [cache[key_of(request)] for request in requests]
    queue = _Queue(limits)
    pool = ThreadPoolExecutor(limits.at_once)
    with tqdm(total=len(todo), desc=what, unit="call") as bar:

        def one(key: str, request: dict) -> str | None:
            try:
                return queue.attempts(lambda: cache.add(key, call(request)), bar)
            except BaseException:
                queue.stop.set()  # now, since every other call would meet the same problem
                raise

        try:
            running = [pool.submit(one, key, request) for key, request in todo.items()]
            for done in as_completed(running):
                problem = done.result()
                if problem:
                    failed.append(problem)
                bar.update()
        finally:
            queue.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)  # calls under way are paid for: keep their answers
    if failed:
        raise AUSteerError(
            f"{len(failed)} of {len(todo)} {what} failed (last: {failed[-1]}); run again to repeat only these"
        )
    return [cache[key_of(request)] for request in requests]


class _Queue:
    """Let the attempts of all threads pass one by one: one every 1/per_second seconds, none while the server wants a pause."""

    def __init__(self, limits: Limits):
        try:
            import tenacity
        except ImportError:
            raise AUSteerError("paid calls need the tenacity package: pip install -r requirements2.txt") from None
        self.tenacity, self.limits, self.stop = tenacity, limits, threading.Event()
        self._next, self._lock = 0.0, threading.Lock()

    def attempts(self, call: Callable[[], None], bar: tqdm) -> str | None:
        """Return None once `call` has succeeded, else why it did not."""
        again, first, longest = self.tenacity, self.limits.first_wait, self.limits.longest_wait
        retrying = again.Retrying(
            retry=again.retry_if_exception_type(Again),
            # a random part, so that calls which failed together do not come again together
            wait=again.wait_exponential(first, longest) + again.wait_random(0, first),
            stop=again.stop_after_attempt(self.limits.attempts) | again.stop_when_event_set(self.stop),
            sleep=again.sleep_using_event(self.stop),
            before_sleep=lambda state: bar.set_postfix_str(f"again after: {state.outcome.exception()}"[:60]),
            reraise=True,
        )
        try:
            return retrying(self._attempt, call)
        except (Again, Refused) as error:
            return str(error)

    def _attempt(self, call: Callable[[], None]) -> None:
        self._wait_for_turn()
        if self.stop.is_set():
            raise Refused("stopped")
        try:
            call()
        except Again as error:
            if error.after > self.limits.longest_obeyed:
                raise Refused(f"{error}; the server asks to wait {error.after:.0f} s") from None
            self._hold(error.after)
            raise

    def _hold(self, seconds: float) -> None:
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def _wait_for_turn(self) -> None:
        while not self.stop.is_set():
            with self._lock:
                wait = self._next - time.monotonic()
                if wait <= 0:
                    self._next = time.monotonic() + 1 / self.limits.per_second
                    return
            self.stop.wait(wait)


def retry_after(header: str | None) -> float:
    """Return the seconds of a Retry-After header, which is a number or a date; 0 where it is neither."""
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(timezone.utc)).total_seconds())
    except (TypeError, ValueError):
        return 0.0


def status_problem(status: int, header: str | None, service: str) -> Again | Refused:
    """Return what a refusal's status code means for one request."""
    if status in (408, 409, 429) or status >= 500:
        return Again(f"{service} answered {status}", retry_after(header))
    return Refused(f"{service} answered {status}")
