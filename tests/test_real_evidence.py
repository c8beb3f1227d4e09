"""What documents say of real models is what the committed figures and records say."""

import importlib
import json
import re
from pathlib import Path

from experiments import kl_report, parts_report
from experiments.report import LABELS, vanilla_of
from paper import specs
from paper.manifest import Manifest
from paper.render import equal_kl

ROOT = Path(__file__).parents[1]
REAL = ROOT / "docs" / "real"


def test_the_table_of_predicted_costs_is_that_of_the_figures(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    files = sorted((ROOT / "benchmarks" / "results").glob("budget-*.json"))
    figures = [json.loads(file.read_text()) for file in files]
    text = (ROOT / "docs" / "budget.md").read_text()
    assert importlib.import_module("budget").ratios(figures) in text
    plans = [plan for one in figures for plan in one["plans"]]
    near = [plan for plan in plans if 1 / 1.5 <= plan["ratio"] <= 1.5]
    assert f"between 1/1.5 and 1.5 for {len(near)} of {len(plans)} plans" in text and len(plans) == len(near) + 1
    far = [plan for plan in plans if abs(plan["corrected"] / plan["budget"] - 1) > 0.1]
    assert all(plan["clipped"] == plan["k"] == 100 and plan["corrected"] < plan["budget"] for plan in far)


def test_gains_that_the_readme_quotes_are_those_of_the_records():
    text = " ".join((ROOT / "README.md").read_text().split())
    (spec,) = specs.read("real", ["skill"])
    rows = equal_kl.records_of(spec, Manifest.read(REAL), "SmolLM2-135M, COPA by whole choices")
    vanilla = vanilla_of(rows)
    lines = {line.method: line for line in kl_report.lines_of(rows, {})}
    gain, low, high = kl_report.estimate(lines["fisher"], vanilla)
    swapped = kl_report.estimate(lines["shuffled-pairs"], vanilla)
    lora = kl_report.estimate(lines["lora-r1"], vanilla)
    skill = {method: part.gain for _, method, part, _ in parts_report.likelihood_parts(rows, LABELS)}
    assert f"{gain:+.1f} points [{low:+.1f}, {high:+.1f}]" in text
    assert f"{abs(swapped[0]):.1f}" in text and f"{lora[0]:+.1f}" in text
    assert f"{skill['fisher']:.3f}" in text and f"{skill['lora-r1']:.3f}" in text
    assert f"{100 * vanilla['right'] / vanilla['n']:.1f} %" in text


def test_what_holds_is_what_the_report_says():
    """Every gain with an interval in docs/findings.md stands in the report of the real models."""
    found, report = (" ".join((ROOT / "docs" / name).read_text().split()) for name in ("findings.md", "real/report.md"))
    gains = re.findall(r"[+-]\d+\.\d+ \[[+-]\d+\.\d+, [+-]\d+\.\d+\]", found)
    assert len(gains) >= 10 and not [gain for gain in gains if gain not in report]
