"""The number in a reply: the printed table, cases of our own, and properties."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from eval.scoring.numbers import authors_number, authors_trim, robust_number, same_number

TABLE = [  # reply, as the authors' code reads it, as a reader does
    ("#### 1,000", 1, 1000),
    ("#### 1/2", 1, 0.5),
    ("#### 18.", 18, 18),
    ("#### $18", 18, 18),
    ("#### **72**", 72, 72),
    ("total is 1,250 dollars", 250, 1250),
    ("12+3=15", 15, 15),
    ("#### .5", 5, 0.5),
    ("#### 3 1/2", 3, 3.5),
    ("#### 1e3", 1, 1000),
    ("5-3", -3, 3),
    ("x = 3/4", 4, 0.75),
    ("", None, None),
    ("no digits here", None, None),
]


@pytest.mark.parametrize(("reply", "authors", "robust"), TABLE)
def test_the_table(reply, authors, robust):
    assert authors_number(authors_trim(reply, "####")) == authors
    assert robust_number(reply) == robust


@pytest.mark.parametrize(
    ("reply", "authors"),
    [("145\nAnswer: 12", 12), ("Answer is 3 plus 4 =7", None), ("The answer is 7. Answer: 9 apples", 9)],
)
def test_the_authors_trigger_of_svamp(reply, authors):
    assert authors_number(authors_trim(reply, "Answer")) == authors


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        ("Answer is 3 plus 4 =7", 7),
        ("The answer is 7. Answer: 9 apples", 9),
        ("2 + 4 = 6 #### 6", 6),
        ("first #### 3, no: #### 4", 4),
        ("#### \nThe answer is 5 of 9", 5),  # nothing behind the mark: the word counts
        ("answers are hard: 3 then 4", 4),  # "answers" is not "answer"
        ("the answer is -7", -7),
        ("the answer is −7", -7),  # a Unicode minus
        ("it is -$5", -5),
        ("(8)-3", 3),
        ("a - 5", 5),  # a space behind it: an operator, or a bullet
        ("3½ cups", 3.5),
        ("１２", 12),
        ("٣", 3),
        ("10²", 10),
        ("1,25", 25),  # no group of three
        ("12,345,678.5", 12345678.5),
        ("1,2345", 2345),
        ("#### 50%", 50),
        ("\\boxed{18}", 18),
        ("3/0", None),
        ("#### -1/2", -0.5),
        ("1.5e-2", 0.015),
        ("1\u200b8", 18),
    ],
)
def test_cases(reply, number):
    assert robust_number(reply) == number


@given(st.integers(-(10**9), 10**9), st.sampled_from(["####", "Answer:", "The answer is", "so it is"]))
def test_an_integer_is_read_however_it_is_written(n, marker):
    for written in (str(n), f"{n:,}", f"{n}.", f"**{n}**", f"{n}.0", f" {n}\n"):
        assert robust_number(f"{marker} {written}") == n, written


@given(st.integers(0, 999), st.integers(0, 99), st.integers(1, 99), st.booleans())
def test_fractions(whole, top, bottom, negative):
    sign = "-" if negative else ""
    value = whole + top / bottom
    assert robust_number(f"#### {sign}{whole} {top}/{bottom}") == (-value if negative else value)


@given(st.text())
@example("9" * 400)
@example("1e999")
@example("#" * 1000 + "1")
def test_any_text_gives_a_number_or_none(text):
    for found in (
        robust_number(text),
        authors_number(authors_trim(text, "####")),
        authors_number(authors_trim(text, "Answer")),
    ):
        assert found is None or isinstance(found, float)
    assert robust_number(text) is None or not math.isnan(robust_number(text))


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_tolerance(found, gold):
    assert same_number(found, gold) == (abs(found - gold) <= 1e-4 * max(1, abs(gold)))
    assert same_number(gold, gold) and not same_number(None, gold)
