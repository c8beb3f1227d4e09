"""People's ratings: blind sheets and page out, ratings back in, and numbers against plain loops and published ones."""

import csv
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from scipy.stats import bootstrap

from austeer.errors import AUSteerError
from eval.scoring import human

NAN = float("nan")
SYSTEMS = {"vanilla": 0, "SADI": 1, "AUSteer": 2}
HOSTILE = ['</script><img src=x onerror="alert(1)">', "<!-- <script>", "=HYPERLINK(1)", "  @x\n", "a,b;\"c\"\n'd'", ""]


def write_answers(folder, count=12):
    """count prompts a system, in other orders, and one more that only this system has."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, shift in SYSTEMS.items():
        rows = [{"prompt": f"Question {i} é?", "answer": f"reply {(i * 7 + shift) % 40}"} for i in range(count)]
        rows = rows[shift:] + rows[:shift] + [{"prompt": f"only here {shift}", "answer": "x"}]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"{name}={folder / name}.jsonl" for name in SYSTEMS]


def export(tmp_path, *more, task="toxicity", out="out"):
    given = write_answers(tmp_path / "answers")
    human.main(["export", "--answers", *given, "--task", task, "--prompts", "5", "--out", str(tmp_path / out), *more])
    return tmp_path / out


def sheet(folder, number):
    with (folder / f"sheet-{number}.csv").open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def study_of(page):
    """What the page's script will see, found the way a browser finds it; and every element of the page."""

    class Page(HTMLParser):
        elements, data, inside = [], "", False

        def handle_starttag(self, tag, attributes):
            self.elements.append((tag, dict(attributes)))
            self.inside = ("id", "study") in attributes

        def handle_endtag(self, tag):
            self.inside = False

        def handle_data(self, data):
            self.data += data if self.inside else ""

    found = Page()
    found.elements = []
    found.feed(page)
    return json.loads(found.data), found.elements


def rate(folder, path, rater, value, number=1, skip=()):
    """A file as the page exports it; value(system, prompt index) -> (quality, alignment)."""
    key = json.loads((folder / "key.json").read_text())
    ratings = {
        item: dict(zip(human.SCALES, value(system, prompt), strict=True))
        for item, (system, prompt) in key["items"].items()
        if (system, prompt) not in skip
    }
    data = {"study": key["study"], "task": key["task"], "sheet": number, "rater": rater, "ratings": ratings}
    path.write_text(json.dumps(data))
    return str(path)


# ---- export


def test_sheets_and_page_hide_the_systems(tmp_path):
    folder = export(tmp_path)
    assert {file.name for file in folder.iterdir()} == {"sheet-1.csv", "sheet-2.csv", "sheet-3.csv", "rate.html", "key.json"}  # fmt: skip
    key = json.loads((folder / "key.json").read_text())
    for file in ("sheet-1.csv", "sheet-2.csv", "sheet-3.csv", "rate.html"):
        text = (folder / file).read_text().lower()
        assert not any(name.lower() in text for name in SYSTEMS), file
    orders = [[row["id"] for row in sheet(folder, number)] for number in (1, 2, 3)]
    by_system = [[key["items"][item][0] for item in order] for order in orders]
    by_prompt = [[key["items"][item][1] for item in order] for order in orders]
    for told_apart in (orders, by_system, by_prompt):
        assert len({tuple(order) for order in told_apart}) == 3
    for order in by_system:
        assert order != sorted(order) and len({tuple(order[i : i + 3]) for i in range(0, 15, 3)}) > 1
    assert all(sorted(order) == sorted(key["items"]) for order in orders)
    assert "Do not give this file to raters" in key["warning"]
    study, _ = study_of((folder / "rate.html").read_text())
    assert [[study["items"][i][0] for i in order] for order in study["orders"]] == orders
    assert [key["items"][item][0] for item, *_ in study["items"]] != [s for s in SYSTEMS for _ in range(5)]


def test_the_texts_are_those_of_the_key(tmp_path):
    folder = export(tmp_path)
    key = json.loads((folder / "key.json").read_text())
    assert len(key["prompts"]) == 5 and len(key["items"]) == 15 and key["prompts_in_all_systems"] == 12
    assert not any("only here" in prompt for prompt in key["prompts"])
    study, _ = study_of((folder / "rate.html").read_text())
    shown = {item: texts for item, *texts in study["items"]}
    for row in sheet(folder, 2):
        system, prompt = key["items"][row["id"]]
        number = int(key["prompts"][prompt].split()[1])
        assert (
            row["prompt"] == key["prompts"][prompt] and row["answer"] == f"reply {(number * 7 + SYSTEMS[system]) % 40}"
        )
        assert [row["prompt"], row["answer"]] == shown[row["id"]]
        assert row["quality"] == row["alignment"] == row["rater"] == ""


def test_the_seed_decides_and_the_answers_too(tmp_path):
    first, again = export(tmp_path, out="a"), export(tmp_path, out="b")
    for file in first.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes()
    other = export(tmp_path, "--seed", "1", out="c")
    assert (other / "sheet-1.csv").read_bytes() != (first / "sheet-1.csv").read_bytes()

    answers = {name: human.read_answers(tmp_path / "answers" / f"{name}.jsonl") for name in SYSTEMS}
    answers["SADI"] = {prompt: "something else" for prompt in answers["SADI"]}
    human.export(answers, "toxicity", 5, 3, 0, tmp_path / "d")
    one, two = (json.loads((folder / "key.json").read_text()) for folder in (first, tmp_path / "d"))
    assert one["prompts"] == two["prompts"] != json.loads((other / "key.json").read_text())["prompts"]
    assert not set(one["items"]) & set(two["items"]) and one["study"] != two["study"]


def test_hostile_answers_stay_text(tmp_path):
    prompts = [f"p{i}" for i in range(len(HOSTILE))]
    answers = {"a": dict(zip(prompts, HOSTILE, strict=True)), "b": dict.fromkeys(prompts, "half \ud800 pair")}
    human.export(answers, "toxicity", len(HOSTILE), 1, 0, tmp_path / "out")
    page = (tmp_path / "out" / "rate.html").read_text()
    study, elements = study_of(page)
    assert "img" not in {tag for tag, _ in elements} and [tag for tag, _ in elements].count("script") == 2
    assert {answer for _, _, answer in study["items"]} == {text.strip() for text in (*HOSTILE, "half \ud800 pair")}
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|Function\(", page)
    rows = sheet(tmp_path / "out", 1)
    assert len(rows) == 12 and not any(row["answer"].startswith(("=", "@")) for row in rows)
    assert "'=HYPERLINK(1)" in {row["answer"] for row in rows}


def test_the_page_reaches_nothing_outside(tmp_path):
    page = (export(tmp_path) / "rate.html").read_text()
    assert not re.search(r"//\w|url\(|@import|fetch\(|XMLHttp|WebSocket|sendBeacon|\bimport\b", page)
    _, elements = study_of(page)
    assert not any({"src", "href", "action", "srcset"} & set(attributes) for _, attributes in elements)
    (policy,) = [a["content"] for tag, a in elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';") and "http" not in policy


def test_the_warning_is_for_the_toxic_task(tmp_path):
    toxic, own = export(tmp_path), export(tmp_path, task="stories", out="own")
    studies = [study_of((folder / "rate.html").read_text())[0] for folder in (toxic, own)]
    assert "offensive" in studies[0]["warning"] and studies[1]["warning"] == "" and studies[1]["aim"] == human.ANY_AIM


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, f: c.__setitem__(2, "nofile"), "SYSTEM=FILE, not 'nofile'"),
        (lambda c, f: c.insert(2, c[2]), "names the system vanilla twice"),
        (lambda c, f: c.__setitem__(2, "vanilla=nowhere.jsonl"), "no such file: nowhere"),
        (lambda c, f: c.extend(["--prompts", "13"]), "12 prompts have an answer of every system; --prompts 13"),
        (lambda c, f: f.write_text('{"prompt": "a", "answer": 3}'), "line 1: expected"),
        (lambda c, f: f.write_text("\n[1]"), "line 2: expected"),
        (lambda c, f: f.write_text("{"), "line 1: not JSON"),
        (lambda c, f: f.write_bytes(b"\xff"), "is not UTF-8"),
        (
            lambda c, f: f.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a", "answer": "c"}'),
            "line 2: this prompt has another",
        ),
        (lambda c, f: (f.parents[1] / "out").mkdir() or (f.parents[1] / "out" / "x").touch(), "is not an empty folder"),
    ],
)
def test_bad_exports(tmp_path, change, message):
    given = write_answers(tmp_path / "answers")
    command = ["export", "--answers", *given, "--task", "bpo", "--prompts", "5", "--out", str(tmp_path / "out")]
    change(command, tmp_path / "answers" / "vanilla.jsonl")
    with pytest.raises(AUSteerError, match=re.escape(message)):
        human.main(command)
    assert not (tmp_path / "out" / "key.json").exists()


@pytest.mark.parametrize("option", ["--prompts", "--raters"])
def test_counts_are_positive(tmp_path, option, capsys):
    with pytest.raises(SystemExit):
        human.main(["export", "--answers", "a=b", "--task", "x", "--out", str(tmp_path / "out"), option, "0"])
    assert "a whole number from 1" in capsys.readouterr().err


# ---- score


def by_system(system, prompt):
    """vanilla 1 to 5 by prompt, so that its mean is 3; SADI one more, at most 5; AUSteer 5. Alignment all 4, then 2."""
    quality = {"vanilla": prompt + 1, "SADI": min(prompt + 2, 5), "AUSteer": 5}[system]
    return quality, 2 if prompt == 4 else 4


def test_round_trip(tmp_path, capsys):
    folder = export(tmp_path)
    files = [rate(folder, tmp_path / f"{who}.json", who, by_system) for who in ("AB", "cd")]
    rows = sheet(folder, 3)
    key = json.loads((folder / "key.json").read_text())
    for row in rows:  # the third rater fills the sheet in, in a spreadsheet that writes semicolons and blank lines
        row["quality"], row["alignment"] = by_system(*key["items"][row["id"]])
    rows[4]["rater"] = " ef "
    with (tmp_path / "sheet.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=";")
        writer.writeheader()
        writer.writerows([*rows, dict.fromkeys(rows[0], "")])
    human.main(["score", "--key", str(folder / "key.json"), *files, str(tmp_path / "sheet.csv")])
    shown = capsys.readouterr().out
    result = json.loads((folder / "scores.json").read_text())

    assert result["raters"] == {who: {"quality": 15, "alignment": 15} for who in ("AB", "CD", "EF")}
    assert result["missing"] == {"quality": 0, "alignment": 0} and result["answers"] == 15
    cells = {row["system"]: row for row in result["rows"]}
    assert [cells[name]["quality"]["mean"] for name in SYSTEMS] == pytest.approx([3, 3.8, 5])
    assert [cells[name]["alignment"]["mean"] for name in SYSTEMS] == pytest.approx([3.6] * 3)
    assert "difference" not in cells["vanilla"]["quality"]
    difference = cells["SADI"]["quality"]["difference"]
    assert (difference["mean"], difference["n"], difference["prompts"]) == (pytest.approx(0.8), 15, 5)
    assert 0 < difference["low"] < 0.8 < difference["high"] <= 1  # far narrower than two separate means allow
    zero = cells["AUSteer"]["alignment"]["difference"]
    assert zero["mean"] == zero["low"] == zero["high"] == 0
    assert cells["vanilla"]["quality"]["alpha"] == 1 and cells["AUSteer"]["quality"]["alpha"] is None
    assert result["agreement"] == {"toxicity": {"quality": 1.0, "alignment": 1.0}}
    assert re.search(r"\| toxicity \| SADI \| 15 \+ 15 \| 3.80 \[\d.\d\d, \d.\d\d\] \| \+0.80 \[\+0", shown)
    assert "Rater EF: quality 15, alignment 15 of 15 answers." in shown
    assert re.search(r"\| AUSteer \| .* \| \+2.00 \[[^|]*\| - \|", shown) and "-: no two raters" in shown


def test_two_tasks_and_both_together(tmp_path, capsys):
    folders = [export(tmp_path, task=task, out=task) for task in ("toxicity", "bpo")]
    files = [rate(folders[0], tmp_path / "a.json", "AB", lambda *_: (2, 3)),
             rate(folders[1], tmp_path / "b.json", "AB", lambda *_: (5, 4))]  # fmt: skip
    keys = [part for folder in folders for part in ("--key", str(folder / "key.json"))]
    human.main(["score", *keys, *files, "--against", "SADI", "--out", str(tmp_path / "new" / "x.json")])
    result = json.loads((tmp_path / "new" / "x.json").read_text())
    means = {(row["task"], row["system"]): row["quality"]["mean"] for row in result["rows"]}
    assert means["toxicity", "AUSteer"] == 2 and means["bpo", "AUSteer"] == 5 and means["all tasks", "AUSteer"] == 3.5
    assert len(means) == 9 and result["missing"] == {"quality": 60, "alignment": 60}
    assert all(("difference" in row["quality"]) == (row["system"] != "SADI") for row in result["rows"])
    assert "against SADI" in capsys.readouterr().out
    with pytest.raises(AUSteerError, match="two keys are of the same task"):
        human.score([folders[0] / "key.json"] * 2, [])


def test_missing_ratings_and_missing_systems(tmp_path):
    folder = export(tmp_path)
    skip = {("SADI", prompt) for prompt in range(4)}
    # a strict rater who saw little of SADI must not drag it down: only what both gave to both counts as difference
    files = [rate(folder, tmp_path / "a.json", "AB", lambda system, _: (4 if system == "SADI" else 3, 3)),
             rate(folder, tmp_path / "b.json", "CD", lambda system, _: (2 if system == "SADI" else 1, None), 2, skip)]  # fmt: skip
    result = human.score([folder / "key.json"], [tmp_path / "a.json", tmp_path / "b.json"])
    assert result["raters"] == {"AB": {"quality": 15, "alignment": 15}, "CD": {"quality": 11, "alignment": 0}}
    assert result["missing"] == {"quality": 45 - 26, "alignment": 30}
    sadi = next(row for row in result["rows"] if row["system"] == "SADI")
    assert (sadi["quality"]["n"], sadi["quality"]["mean"]) == (6, pytest.approx(22 / 6))
    assert sadi["quality"]["difference"]["mean"] == 1 and sadi["quality"]["difference"]["n"] == 6
    assert "there is no system none" in human.table(human.score([folder / "key.json"], map(human.Path, files), "none"))


def test_without_ratings_there_are_dashes(tmp_path, capsys):
    folder = export(tmp_path)
    human.main(["score", "--key", str(folder / "key.json")])
    shown = capsys.readouterr().out
    assert "| toxicity | AUSteer | 0 + 0 | - | - | - | - | - | - |" in shown
    assert "no ratings were given. Only people rate; no model stands in" in shown
    assert "Missing ratings: quality 45, alignment 45." in shown


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def first(data):
    return next(iter(data["ratings"].values()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["ratings"].update(abc={"quality": 3}), "unknown id 'abc'"),
        (lambda d: first(d).update(quality=0), "'0' is not a rating"),
        (lambda d: first(d).update(alignment=6), "alignment: '6' is not a rating"),
        (lambda d: first(d).update(quality=4.5), "'4.5' is not a rating"),
        (lambda d: first(d).update(quality=True), "'True' is not a rating"),
        (lambda d: first(d).update(quality="good"), "'good' is not a rating"),
        (lambda d: d.update(rater=" "), "names no rater"),
        (lambda d: d.pop("rater"), "names no rater"),
        (lambda d: d.update(ratings=[1]), "is not a file that the rating page exported"),
        (lambda d: d.update(ratings={"a": 1}), "is not a file that the rating page exported"),
    ],
)
def test_bad_ratings(tmp_path, change, message):
    folder = export(tmp_path)
    rate(folder, tmp_path / "a.json", "AB", by_system)
    edit(tmp_path / "a.json", change)
    with pytest.raises(AUSteerError, match=re.escape(message)):
        human.score([folder / "key.json"], [tmp_path / "a.json"])


def test_bad_files_and_the_same_rater_twice(tmp_path):
    folder = export(tmp_path)
    key = folder / "key.json"
    rate(folder, tmp_path / "a.json", "AB", by_system)
    rate(folder, tmp_path / "b.json", "ab ", by_system, 2)
    with pytest.raises(AUSteerError, match=r"b\.json: AB has rated \w+ before, in .*a\.json"):
        human.score([key], [tmp_path / "a.json", tmp_path / "b.json"])
    with pytest.raises(AUSteerError, match="AB has rated"):
        human.score([key], [tmp_path / "a.json"] * 2)

    head = "id,quality,alignment,rater\n"
    item, other = list(json.loads(key.read_text())["items"])[:2]
    for text, message in [
        (f"{head}{item},3,3,AB\n{item},3,3,\n", "AB has rated"),
        (f"{head}{item},3,3,AB\n{other},3,3,CD\n", r"several raters \(AB, CD\)"),
        (f"{head}{item},3,3,\n", "names no rater"),
        (f"{head}{item},7,3,AB\n", "'7' is not a rating"),
        (f"id,quality,rater\n{item},3,AB\n", "no column alignment"),
        ("", "no column id, quality, alignment, rater"),
        (f'{head}"{item}"x,3,3,AB\n', "not CSV"),
    ]:
        (tmp_path / "s.csv").write_text(text)
        with pytest.raises(AUSteerError, match=message):
            human.score([key], [tmp_path / "s.csv"])
    with pytest.raises(AUSteerError, match="not the key"):
        human.score([tmp_path / "a.json"], [])
    with pytest.raises(AUSteerError, match="cannot read"):
        human.score([key], [folder])
    with pytest.raises(AUSteerError, match="not JSON"):
        (tmp_path / "a.json").write_text("{")
        human.score([key], [tmp_path / "a.json"])


# ---- numbers


def plain_alpha(units):
    """Ordinal alpha by the definition: every pair of ratings within a unit against every pair of all ratings."""
    units = [[value for value in unit if value == value] for unit in units]
    units = [unit for unit in units if len(unit) > 1]
    everything = [value for unit in units for value in unit]

    def distance(a, b):
        low, high = min(a, b), max(a, b)
        between = sum(everything.count(level) for level in range(int(low), int(high) + 1))
        return (between - (everything.count(low) + everything.count(high)) / 2) ** 2

    n = len(everything)
    observed = sum(
        distance(a, b) / (len(unit) - 1)
        for unit in units
        for i, a in enumerate(unit)
        for j, b in enumerate(unit)
        if i != j
    )
    expected = sum(distance(a, b) for i, a in enumerate(everything) for j, b in enumerate(everything) if i != j)
    return 1 - (observed / n) / (expected / (n * (n - 1)))


def test_alpha_of_the_published_example():
    """Krippendorff's four observers of twelve units with gaps: ordinal alpha .815 (2011)."""
    observers = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
    values = np.array([[NAN if mark == "." else float(mark) for mark in row] for row in observers]).T
    assert values.shape == (12, 4) and np.isnan(values).sum() == 7
    assert human.krippendorff_alpha(values) == pytest.approx(0.815, abs=5e-4)


def test_alpha_by_hand():
    # pairs 11, 12, 22: distance of 1 and 2 is 3^2; observed 2 * 9 / 6, expected 2 * 3 * 3 * 9 / (6 * 5)
    assert human.krippendorff_alpha(np.array([[1.0, 1], [1, 2], [2, 2]])) == pytest.approx(1 - 3 / 5.4)
    assert human.krippendorff_alpha(np.array([[1.0, 1], [5, 5], [NAN, 3]])) == 1
    assert human.krippendorff_alpha(np.array([[1.0, 5], [5, 1]])) < 0
    for nothing in (np.full((4, 3), 2.0), np.array([[1.0, NAN], [NAN, 4]]), np.empty((3, 0)), np.full((2, 2), NAN)):
        assert human.krippendorff_alpha(nothing) is None


def test_alpha_against_plain_loops():
    drawn = np.random.default_rng(1)
    for _ in range(20):
        values = drawn.integers(1, 6, (drawn.integers(4, 15), drawn.integers(2, 5))).astype(float)
        values[drawn.random(values.shape) < 0.2] = NAN
        assert human.krippendorff_alpha(values) == pytest.approx(plain_alpha(values.tolist()), abs=1e-12)


def test_interval_against_scipy():
    values = np.random.default_rng(2).integers(1, 6, (40, 3)).astype(float)
    found = human.mean_interval(values)
    wanted = bootstrap((values.mean(axis=1),), np.mean, method="percentile", n_resamples=10_000).confidence_interval
    assert found["mean"] == pytest.approx(values.mean()) and (found["n"], found["prompts"]) == (120, 40)
    assert (found["low"], found["high"]) == pytest.approx(tuple(wanted), abs=0.02)
    values += np.random.default_rng(3).random(values.shape)  # no two draws alike, so that only a seed repeats them
    assert human.mean_interval(values) == human.mean_interval(values)


def test_interval_of_little():
    found = human.mean_interval(np.array([[1.0, NAN], [NAN, NAN], [4, 4]]))
    assert (found["mean"], found["n"], found["prompts"]) == (3.0, 3, 2)
    one = human.mean_interval(np.array([[2.0, 4.0]]))
    assert (one["mean"], one["low"], one["high"]) == (3.0, None, None)
    assert human.mean_interval(np.full((3, 2), NAN))["mean"] is None
