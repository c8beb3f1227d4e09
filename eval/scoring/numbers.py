"""Read the number in a reply twice: robustly, and as the authors' code reads it.

Both columns are printed side by side, because the authors' rule misreads forms that are frequent in replies: 1,250 becomes
250, 3/4 becomes 4, and 5-3 becomes -3.
"""

from __future__ import annotations

import re
import unicodedata

TOLERANCE = 1e-4  # relative to the right number, absolute below 1

# a comma belongs to the number only before exactly three digits: 1,250 but not 1,25
_PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
# after a digit, a letter or a closing bracket a minus subtracts: it is not a sign
_SIGN = r"(?<![\w)\].])[-+](?:[$€£¥]\s?)?(?=\.?\d)"
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN})?"
    rf"(?:(?P<whole>\d+)\s+(?P<part>\d+)/(?P<parts>\d+)"  # 3 1/2
    rf"|(?P<over>{_PLAIN})\s?/\s?(?P<under>{_PLAIN})"  # 3/4
    rf"|(?P<plain>{_PLAIN})(?P<power>[eE][-+]?\d{{1,3}}(?![\w.]))?)"  # 1,250 or .5 or 1e3
)
_ODD_MINUS = dict.fromkeys(map(ord, "\u2212\u2013\u2014\ufe63\uff0d"), "-")
_AUTHORS_NUMBER = r"[-+]?\d+(?:\.\d+)?"


def robust_number(reply: str) -> float | None:
    """Return the number that a reader would take for the answer, or None.

    It is the one after the last ####, else after the last "answer", else the last number in the reply.
    """
    text = _plain_characters(reply)
    for marker in ("####", r"\banswer\b"):
        parts = re.split(marker, text, flags=re.IGNORECASE)
        stated = _stated(parts[-1]) if len(parts) > 1 else None
        if stated is not None:
            return stated
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def authors_number(text: str) -> float | None:
    """Return the number right after ####, else the last one, as the authors' code does."""
    marked = re.search(rf"####\s*({_AUTHORS_NUMBER})", text)
    numbers = [marked.group(1)] if marked else re.findall(_AUTHORS_NUMBER, text)
    return float(numbers[-1]) if numbers else None


def authors_trim(reply: str, trigger: str) -> str:
    """Cut a reply one word after its first trigger: the authors' code reads the number from what is left.

    Right answers are not trimmed.
    """
    reply = reply.strip()
    at = reply.find(trigger)
    return reply if at < 0 else reply[:at] + " ".join(reply[at:].split()[:2])


def same_number(number: float | None, gold: float) -> bool:
    return number is not None and abs(number - gold) <= TOLERANCE * max(1.0, abs(gold))


def _stated(text: str) -> float | None:
    """Return the first number of a statement; of "3 plus 4 = 7", the one after the equals sign."""
    for line in text.splitlines():
        numbers = _numbers(line)
        if numbers:
            behind = _numbers(line.rsplit("=", 1)[1]) if "=" in line else []
            return behind[0] if behind else numbers[0]
    return None


def _numbers(text: str) -> list[float]:
    values = (_value(match) for match in _NUMBER.finditer(text))
    return [value for value in values if value is not None]


def _value(match: re.Match) -> float | None:
    def number(name: str) -> float:
        return float(match[name].replace(",", ""))

    if match["whole"]:
        size = number("whole") + number("part") / number("parts") if number("parts") else None
    elif match["over"]:
        size = number("over") / number("under") if number("under") else None
    else:
        size = float(match["plain"].replace(",", "") + (match["power"] or ""))
    negative = (match["sign"] or "").startswith("-")
    return None if size is None else -size if negative else size


def _plain_characters(text: str) -> str:
    """Replace digits of other scripts, odd minus signs, fraction signs and invisible spaces by those of a keyboard."""
    out = []
    for char in text.translate(_ODD_MINUS):
        digit = unicodedata.decimal(char, None)
        if digit is not None:
            out.append(str(digit))
        elif unicodedata.category(char) == "No" and "\u2044" in (fraction := unicodedata.normalize("NFKC", char)):
            out.append(" " + fraction.replace("\u2044", "/"))  # 3½ is 3 1/2
        elif unicodedata.category(char) == "Cf":
            continue
        else:
            out.append(" " if char.isspace() and char != "\n" else "/" if char == "\u2044" else char)
    return "".join(out)
