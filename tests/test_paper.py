"""The paper's tables and figures: specs, runner, report, trace."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from one_cell import computed, embedded_cell

from austeer.errors import AUSteerError
from austeer.ranks import AURanks
from embedded.tasks import TASKS
from experiments import records, report, run_cell
from experiments.executors.local import LocalExecutor
from experiments.store import Store
from paper import dry_run, estimate, progress, specs, trace
from paper import reproduce as run
from paper.manifest import Manifest, bundle
from paper.render import curves, findings, page, pictures, sections, selection, tables

ROOT = Path(__file__).parents[1]
OF_THE_PAPER = [f"table{n}" for n in range(1, 14)] + [f"figure{n}" for n in (2, 3, 4, 6, 7, 8, 10, 11, 12, 13)]


def test_every_table_and_figure_of_the_paper_has_a_spec():
    assert set(OF_THE_PAPER) <= set(specs.names())
    assert specs.names()[:13] == OF_THE_PAPER[:13], "in the paper's order, 10 behind 9"
    at_paper = {spec.name for spec in specs.read("paper")}
    assert set(OF_THE_PAPER) <= at_paper
    own = {"ablation", "noise", "parts", "prediction"}
    larger_models = {"table10"}  # there is no larger embedded model
    assert set(OF_THE_PAPER) - larger_models | own <= {spec.name for spec in specs.read("embedded")}


def test_all_models_of_the_paper_are_in_the_specs():
    used = {
        cell.model.name
        for scale in ("real", "paper")
        for spec in specs.read(scale)
        for entry in spec.entries
        for cell in entry.cells
    }
    assert used == {model["hub"] for model in specs.models().values()}


@pytest.mark.parametrize("scale", specs.SCALES)
def test_methods_sites_and_tasks_exist(scale):
    from austeer.methods.registry import METHODS
    from eval.tasks.registry import PAPER_TASKS

    for spec in specs.read(scale):
        for entry in spec.entries:
            for cell in entry.cells:
                assert not cell.steered or cell.method.site in METHODS[cell.method.name].sites, entry
                assert cell.task.name in (TASKS if scale == "embedded" else PAPER_TASKS), entry


def test_the_embedded_scale_never_stands_beside_the_papers_numbers():
    assert all(not spec.printed for spec in specs.read("embedded"))
    assert all("embedded" in cell.model.name for s in specs.read("embedded") for e in s.entries for cell in e.cells)


def test_unsteered_cells_are_the_same_in_all_tables():
    vanilla = {
        entry.cells[0]
        for spec in specs.read("embedded", ["table1", "table3", "table13"])
        for entry in spec.entries
        if entry.row == "vanilla"
    }
    assert len(vanilla) == len(TASKS)


@pytest.mark.parametrize(
    "names, models, message", [(["table99"], [], "no 'table99'"), (["table1"], ["gpt"], "no model 'gpt'")]
)
def test_unknown_names_are_told(names, models, message):
    with pytest.raises(AUSteerError, match=message):
        specs.read("paper", names, models)


# ---- numbers of a table, from made-up records -------------------------------------------------------------------


def made_up(
    folder: Path, outcomes: dict[tuple[str, str], list[list[bool]]], fields_of_row: dict | None = None, **more
) -> tuple[specs.Spec, Manifest]:
    """Make up a spec of one block. outcomes: by (row, column), a list per draw; fields_of_row: further fields of records."""
    manifest, entries = Manifest(folder, "embedded"), []
    names = dict.fromkeys(row for row, _ in outcomes)
    columns = dict.fromkeys(column for _, column in outcomes)
    for (row, column), draws in outcomes.items():
        ids = []
        for draw, hits in enumerate(draws):
            id = f"{row}-{column}-{draw}"
            record = {
                "id": id, "method": row, "site": None if row == "vanilla" else "ffn", "n": len(hits), "right": sum(hits),
                "outcomes": records.pack(hits), "settings": {"k": 4, "alpha": 2.0}, "search": "grid", "device": "cpu", "extras": {},
                "grid_scores": {"4,2": sum(hits) / len(hits)}, "grid_outcomes": {"4,2": records.pack(hits)},
                "chosen": "4,2", "options": {}, "grid": [{"k": 4, "alpha": 2.0}], "task": column, "pairs_by": "theirs",
                "wording": "authors: a file; 0123456789ab", "protocol": "paper", "kernel": "au_sdpa", "measured": {},
                "environment": {"torch": "2", "commit": "0123456789ab"},
                **(fields_of_row or {}).get(row, {}),
            }  # fmt: skip
            (folder / "records").mkdir(parents=True, exist_ok=True)
            (folder / "records" / f"{id}.json").write_text(json.dumps(record))
            ids.append(id)
        manifest.entries.setdefault("made", {})[f"b|{row}|{column}"] = ids
        cells = tuple(embedded_cell(task=column, method=row, draw=draw) for draw in range(len(draws)))
        entries.append(specs.Entry("b", row, column, cells))
    manifest.write()
    rows = {
        row: {
            "label": row,
            "method": row,
            "site": None if row == "vanilla" else "ffn",
            "draws": max(len(draws) for (of, _), draws in outcomes.items() if of == row),
        }
        for row in names
    }
    spec = specs.Spec("made", "embedded", "Made", "accuracy", "Up.", {"b": {}}, rows, {c: {} for c in columns},
                      {"avg": list(columns)}, tuple(entries), **more)  # fmt: skip
    return spec, manifest


HALF, MOST, ALL = [True] * 50 + [False] * 50, [True] * 80 + [False] * 20, [True] * 100


def test_values_intervals_bands_and_averages(tmp_path):
    spec, manifest = made_up(
        tmp_path,
        {("vanilla", "a"): [HALF], ("vanilla", "b"): [MOST], ("x", "a"): [ALL], ("x", "b"): [MOST],
         ("random", "a"): [HALF, MOST, ALL], ("random", "b"): [HALF, HALF, HALF]},
        printed={"b": {"x": {"a": 90.0, "avg": 80.0}}},
    )  # fmt: skip
    (block,) = tables.blocks(spec, manifest)
    assert block.heads == ["a (n = 100)", "b (n = 100)", "avg"]
    rows = {row.label: row.values for row in block.rows}
    assert [value.text for value in rows["vanilla"]] == ["50.0", "80.0", "65.0"]
    assert rows["vanilla"][0].small == "[40.4, 59.6]"
    assert rows["x"][0].text == "100.0" and rows["x"][0].difference == 10.0 and rows["x"][2].difference == 10.0
    assert rows["random"][0].text == "80.0" and rows["random"][0].small == "50.0 to 100.0"
    assert rows["random"][2].small == "50.0 to 75.0", "draw by draw, not the extremes of each column"


def test_stars_and_bold_need_the_adjusted_test(tmp_path):
    little = [True] * 54 + [False] * 46  # four more than half: p = 0.125 unadjusted
    spec, manifest = made_up(
        tmp_path,
        {("vanilla", "a"): [HALF], ("x", "a"): [ALL], ("y", "a"): [little],
         ("vanilla", "b"): [HALF], ("x", "b"): [ALL], ("y", "b"): [ALL]},
    )  # fmt: skip
    (block,) = tables.blocks(spec, manifest)
    rows = {row.label: row.values for row in block.rows}
    assert rows["x"][0].significant and not rows["y"][0].significant and not rows["vanilla"][0].significant
    assert rows["x"][0].best, "better than every other"
    assert not rows["x"][1].best and not rows["y"][1].best, "two alike: neither is the best"


def ahead(n: int) -> list[bool]:
    """Return n more right items than HALF; for 6, McNemar's p is 0.03 unadjusted."""
    return [True] * (50 + n) + [False] * (50 - n)


def starred(block) -> list[str]:
    return [row.label for row in block.rows if row.values[0].significant]


def bold(block) -> list[tuple[str, str]]:
    columns = range(len(block.columns))
    return [(row.label, block.columns[i]) for row in block.rows for i in columns if row.values[i].best]


def test_a_small_p_has_a_star_alone_and_none_in_company(tmp_path):
    (alone,) = tables.blocks(*made_up(tmp_path / "a", {("vanilla", "a"): [HALF], ("x", "a"): [ahead(6)]}))
    assert starred(alone) == ["x"]
    four = {("vanilla", "a"): [HALF]} | {(row, "a"): [ahead(6)] for row in "xyzw"}
    (company,) = tables.blocks(*made_up(tmp_path / "b", four))
    assert starred(company) == [], "four times 0.03"
    assert {row.values[0].p for row in company.rows if row.label != "vanilla"} == {0.125}


def test_bold_is_adjusted_for_all_rows_and_all_columns(tmp_path):
    (alone,) = tables.blocks(*made_up(tmp_path / "a", {("u", "a"): [HALF], ("x", "a"): [ahead(6)]}))
    assert bold(alone) == [("x", "a")]
    rows = {(row, "a"): [HALF] for row in "uvw"} | {("x", "a"): [ahead(6)]}
    assert bold(*tables.blocks(*made_up(tmp_path / "b", rows))) == [], "three rows to be better than"
    columns = {(row, column): [hits] for column in "abc" for row, hits in (("u", HALF), ("x", ahead(6)))}
    assert bold(*tables.blocks(*made_up(tmp_path / "c", columns))) == [], "three columns to be best in"


def test_bold_needs_every_draw_of_a_control_beaten(tmp_path):
    def of(name, run, draws):
        return bold(*tables.blocks(*made_up(tmp_path / name, {("x", "a"): [run], ("random", "a"): draws})))

    assert of("a", ALL, [HALF, MOST, HALF]) == [("x", "a")]
    assert of("b", ALL, [HALF, ALL, HALF]) == [], "one draw as good"
    assert of("c", MOST, [HALF, ALL, HALF]) == [], "one draw better: not beaten, however small its p"


def test_vanilla_may_be_a_column(tmp_path):
    outcomes = {("x", "0"): [HALF], ("x", "4"): [ALL], ("y", "0"): [HALF], ("y", "4"): [ahead(4)]}
    outcomes |= {("random", "4"): [HALF, HALF]}
    spec, manifest = made_up(tmp_path, outcomes, show={"vanilla": {"column": "0"}})
    (block,) = tables.blocks(spec, manifest)
    assert {row.label: [value.significant for value in row.values[:2]] for row in block.rows[:2]} == {
        "x": [False, True],
        "y": [False, False],
    }
    assert [row.values[1].p is not None for row in block.rows] == [True, True, False]
    (spec,) = specs.read("embedded", ["table12"])
    assert spec.show["vanilla"]["column"] in spec.columns


def test_exact_adjusted_p_and_paired_intervals_are_in_the_report(tmp_path):
    spec, manifest = made_up(tmp_path, {("vanilla", "a"): [HALF], ("x", "a"): [ahead(6)], ("y", "a"): [HALF]})
    page.write([spec], manifest)
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert "gain over vanilla +6.0 [+2.0, +11.0], p 0.062" in text, name
        assert "gain over vanilla +0.0 [+0.0, +0.0], p 1" in text, name


def test_seeds_are_not_pooled_as_if_their_items_were_independent(tmp_path):
    lucky, steady = (13, 3, 0, 0, 0), (10, 11, 9, 10, 11)
    outcomes = {("vanilla", f"seed {i}"): [HALF] for i in range(5)}
    outcomes |= {("lucky", f"seed {i}"): [ahead(gain)] for i, gain in enumerate(lucky)}
    outcomes |= {("steady", f"seed {i}"): [ahead(gain)] for i, gain in enumerate(steady)}
    outcomes |= {("random", f"seed {i}"): [ahead(i), ahead(4 - i)] for i in range(5)}
    spec, manifest = made_up(tmp_path, outcomes, show={"over": "seeds"})
    (block,) = tables.blocks(spec, manifest)
    assert block.columns[-2:] == ["avg", "gain over vanilla"]
    rows = {row.label: row.values[-2:] for row in block.rows}
    mean, gain = rows["lucky"]
    assert mean.text == "53.2" and not mean.small, "no interval over items"
    assert (
        gain.text == "+3.2"
        and (gain.small, gain.facts) == ("[-3.8, +10.2]", ["by seed +13.0 +3.0 +0.0 +0.0 +0.0"])
        and not gain.significant
    )
    assert rows["steady"][1].significant and rows["random"][0].text == "52.0" and rows["random"][1].text == "+2.0"
    assert rows["vanilla"][1].text == "" and not rows["vanilla"][1].why
    assert specs.read("embedded", ["ablation"])[0].show["over"] == "seeds"


def test_gains_over_seeds_are_adjusted_for_the_rows(tmp_path):
    gains = (0, 2, 4, 6, 4)  # p = 0.035 over five seeds

    def sure(name, rows):
        outcomes = {("vanilla", f"seed {i}"): [HALF] for i in range(5)}
        outcomes |= {(row, f"seed {i}"): [ahead(gain)] for row in rows for i, gain in enumerate(gains)}
        (block,) = tables.blocks(*made_up(tmp_path / name, outcomes, show={"over": "seeds"}))
        return [row.values[-1].significant for row in block.rows if row.label != "vanilla"]

    assert sure("a", "x") == [True] and sure("b", "xy") == [False, False]


def test_how_many_aus_a_row_changes(tmp_path):
    outcomes = {(row, column): [HALF] for row in ("vanilla", "x", "fdr") for column in "ab"}
    outcomes |= {("random", column): [HALF, MOST] for column in "ab"}
    fields_of_row = {"x": {"touched": 4, "aus": 512}, "random": {"touched": 32, "aus": 512}}
    fields_of_row |= {"fdr": {"touched": 371, "aus": 512, "settings": {"q": 0.05}}}
    printed = {"b": {"x": {"acts": "<=100"}}}
    spec, manifest = made_up(tmp_path, outcomes, fields_of_row, printed=printed)
    (block,) = tables.blocks(spec, manifest)
    assert block.heads[0] == "AUs"
    rows = {row.label: row.values for row in block.rows}
    assert [rows[row][0].text for row in rows] == ["0", "4", "371", "32"] and rows["x"][0].small == "of 512"
    assert rows["fdr"][1].facts == ["ffn, q 0.05, 371 AUs"] and rows["x"][1].facts == ["ffn, k 4, alpha 2"]
    sparse = (
        "These rows change more than a quarter of the AUs of their site and so are not sparse: fdr (a 72 %, b 72 %)."
    )
    assert sparse in block.notes
    page.write([spec], manifest)
    text = (tmp_path / "report.md").read_text()
    assert "| x | 4 of 512 paper <=100 |" in text and sparse in text


def test_k_and_alpha_that_a_method_took_by_itself_are_shown(tmp_path):
    taken = {"settings": {"q": 0.05}, "foretold": {"k": 64, "alpha": 0.7931, "predicted": 0.2, "measured": 0.1}}
    outcomes = {(row, "copa"): [HALF] for row in ("vanilla", "causal-predicted", "causal-head")}
    table1, manifest = made_up(tmp_path, outcomes, {"causal-predicted": taken | {"touched": 64, "aus": 512}})
    (block,) = tables.blocks(table1, manifest)
    assert block.rows[1].values[1].facts == ["ffn, q 0.05, k 64, alpha 0.793"]
    (spec,) = specs.read("embedded", ["prediction"])
    manifest.entries["table1"] = {
        key.replace("b|", "embedded|", 1): ids for key, ids in manifest.entries["made"].items()
    }
    (block,) = tables.blocks(replace(spec, columns={"copa": {}}), manifest)
    rows = {row.label: row.values[0].text for row in block.rows}
    assert rows == {
        "k and alpha predicted: predicted gain, nats": "+0.200",
        "k and alpha predicted: measured gain on the pairs, nats": "+0.100",
        "k and alpha predicted: measured / predicted": "0.50",
        "k and alpha predicted: k and alpha used": "q 0.05, k 64, alpha 0.793",
        "k and alpha predicted: accuracy on test, %": "50.0",
        "causal, Head, searched: accuracy on test, %": "50.0",
    }


def test_a_record_says_what_was_foretold_and_of_how_many_aus(tmp_path):
    few = {"task": "copa", "limit": 10}
    record = computed(tmp_path, **few, method="causal-predicted", site="attention")
    assert set(record["foretold"]) == {"k", "alpha", "predicted", "measured"} and record["aus"] == 4 * 128
    assert record["foretold"]["k"] == record["touched"] > 0 and 0 < record["foretold"]["alpha"] <= 1
    assert computed(tmp_path, **few, ks=[4], alphas=[1.0], method="published", site="ffn")["foretold"] == {}


def test_a_record_counts_the_aus_whose_sign_is_turned_over(tmp_path):
    few = {"task": "copa", "limit": 10, "method": "published", "site": "ffn", "ks": [8]}
    (strong, weak) = (computed(tmp_path, **few, alphas=[alpha]) for alpha in (8.0, 0.5))
    ranks = AURanks.load(ROOT / "AU_ranks" / "embedded" / "copa" / "activation" / "ffn.safetensors")
    below = sum(8.0 * ranks.gain.flatten()[au] < -1 for au in ranks.order[:8].tolist())
    assert strong["inverted"] == below > 0 and weak["inverted"] == 0
    assert selection.chosen_text(strong) == f"k 8, alpha 8, {below} of 8 turned over"
    assert selection.chosen_text(weak) == "k 8, alpha 0.5"
    lines = report.table([computed(tmp_path, task="copa", limit=10, method="vanilla"), strong], {}).splitlines()
    assert f"| 8, {below} turned over |" in lines[-1]


def test_cheaper_searches_are_compared_site_by_site(tmp_path):
    outcomes = {(row, "a"): [HALF, MOST] for row in ("vanilla", "full", "cheap", "bad")}
    outcomes[("bad", "a")] = [ahead(4), HALF]
    spec, manifest = made_up(tmp_path, outcomes, show={"searches": {"cheap": "full", "bad": "full"}})
    sites = ["attention", "ffn"]
    spec = replace(spec, rows={row: {"label": row, "sites": sites, "search": "racing"} for row in spec.rows})
    for row, asked in (("full", 3000), ("cheap", 750), ("bad", 600)):
        for index, site in enumerate(sites):
            path = tmp_path / "records" / f"{row}-a-{index}.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "site": site, "asked": asked}))
    _, block = tables.blocks(spec, manifest)
    rows = {row.label: [(value.text, value.small, value.facts) for value in row.values] for row in block.rows}
    assert rows["cheap, attention"] == [("25 %", "", []), ("50.0", "✓ inside", ["full grid 50.0 [40.4, 59.6]"])]
    assert rows["bad, ffn"] == [("20 %", "", []), ("50.0", "✗ below", ["full grid 80.0 [71.1, 86.7]"])]
    assert block.notes == [
        "Search racing: 3 of 4 test results (methods, tasks and sites) lie inside the 95 % "
        "interval of the full grid, at 20 to 25 % of its cost."
    ]


def test_table_7_compares_all_its_cheaper_searches():
    (spec,) = specs.read("embedded", ["table7"])
    cheaper = [row for row, says in spec.rows.items() if says.get("search") in ("sample", "racing")]
    assert list(spec.show["searches"]) == cheaper
    assert {spec.rows[full]["search"] for full in spec.show["searches"].values()} == {"grid"}


def test_where_nothing_was_better_all_sites_are_named(tmp_path):
    spec, manifest = made_up(tmp_path, {("x", "a"): [HALF, HALF]}, {"x": {"settings": None, "chosen": None}})
    spec = replace(spec, rows={"x": {"label": "x", "sites": ["attention", "ffn"]}})
    path = tmp_path / "records" / "x-a-0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "site": "attention"}))
    (block,) = tables.blocks(spec, manifest)
    assert block.rows[0].values[0].facts == ["attention and ffn: nothing beat vanilla"]
    chosen = replace(spec, kind="settings", source="made", show={"key": "k", "rows": {"x": ["x"]}})
    (block,) = tables.blocks(chosen, manifest)
    assert (
        block.rows[0].values[0].why == "attention and ffn: nothing beat vanilla" and not block.rows[0].values[0].small
    )


def overhead_records(folder: Path, spec: specs.Spec, test: dict[str, int]) -> Manifest:
    """Record every task of Gemma in Table 11: seconds and memory are made up, by the place of the task."""
    manifest = Manifest(folder, "paper")
    (folder / "records").mkdir(parents=True)
    for place, panel in enumerate(panel for panel in spec.panels if panel.block == "gemma2-9b-it"):
        one = {"prepare_s": 10.0 + place, "prepare_gb": 20.0 + place, "s_per_sample": [0.4, 0.6], "gb": 30.0 - place}
        vanilla = one | {"prepare_s": None, "prepare_gb": None}
        methods = {"vanilla": vanilla} | dict.fromkeys(("iti", "sadi", "austeer", "causal"), one)
        found = {"pairs": 9, "items": 5, "test": test.get(panel.task.name, 10), "methods": methods}
        record = {"id": panel.name, "found": found, "environment": {"commit": "0123456789ab"}, "device": "cuda"}
        (folder / "records" / f"{panel.name}.json").write_text(json.dumps(record))
        manifest.panels.setdefault("table11", {})[panel.name] = panel.name
    return manifest


def test_overhead_is_that_of_all_tasks(tmp_path):
    (spec,) = specs.read("paper", ["table11"])
    tasks = ["boolq", "copa", "winogrande", "svamp", "mawps", "toxicity", "bpo"]
    assert [panel.task.name for panel in spec.panels] == [*tasks, "copa"]
    manifest = overhead_records(tmp_path, spec, {"boolq": 40})
    gemma, llama = tables.blocks(spec, manifest)
    of = {row.label: dict(zip(gemma.columns, row.values, strict=True)) for row in gemma.rows}
    austeer, vanilla = of["AUSteer as published"], of["Vanilla"]
    assert austeer["prepare_s"].number == sum(range(10, 17)) and austeer["prepare_s"].printed == 881
    assert (austeer["prepare_gb"].number, austeer["gb"].number) == (26, 30), "that of the task that needs most"
    assert austeer["prepare_gb"].paper == vanilla["gb"].paper == "paper 18"  # of another machine: no difference
    assert austeer["inference_s"].number == pytest.approx(100 * 0.5), "40 items of BoolQ, 10 of six tasks"
    assert austeer["s_per_sample"].number == pytest.approx(0.5)
    assert austeer["std"].number == pytest.approx(0.02**0.5), "two trials, 0.4 and 0.6 s of every item"
    assert austeer["inference_s"].facts[0] == "boolq 20" and "boolq 9 pairs, 5 of 40 test items; copa" in gemma.notes[0]
    assert vanilla["prepare_s"].text == "" and not vanilla["prepare_s"].why, "nothing to prepare, hence no dash"
    assert [value.why for value in llama.rows[1].values] == ["llama3.3-70b-instruct-4bit, copa: not run"] * 6


def test_overhead_without_a_task_is_a_dash_not_a_smaller_sum(tmp_path):
    (spec,) = specs.read("paper", ["table11"])
    manifest = overhead_records(tmp_path, spec, {})
    del manifest.panels["table11"]["gemma2-9b-it, mawps"]
    manifest.failed["table11|gemma2-9b-it, mawps|panel|gemma2-9b-it, mawps"] = "no room"
    page.write([spec], manifest)
    text = (tmp_path / "report.md").read_text()
    assert "| ITI | – paper 18 | – paper 1119 | – paper 18 |" in text and "gemma2-9b-it, mawps: no room" in text


def test_memory_is_a_dash_with_its_reason_on_a_cpu(tmp_path):
    (spec,) = specs.read("paper", ["table11"])
    manifest = overhead_records(tmp_path, spec, {})
    for path in (tmp_path / "records").iterdir():
        record = json.loads(path.read_text())
        for one in record["found"]["methods"].values():
            one |= {"prepare_gb": None, "gb": None}
        path.write_text(json.dumps(record))
    values = dict(
        zip(tables.blocks(spec, manifest)[0].columns, tables.blocks(spec, manifest)[0].rows[1].values, strict=True)
    )
    for column in ("prepare_gb", "gb"):
        assert (values[column].text, values[column].why) == ("–", "torch counts the memory of GPUs only")
    assert values["prepare_s"].number == 91


def test_what_the_paper_took_from_others_has_its_dagger(tmp_path):
    printed = {"b": {"x": {"a": 90.0, "b": 70.0}}}
    outcomes = {(row, column): [HALF] for row in ("vanilla", "x") for column in "ab"}
    spec, manifest = made_up(tmp_path, outcomes, printed=printed, dagger={"b": {"x": ["a"]}})
    page.write([spec], manifest)
    text = (tmp_path / "report.md").read_text()
    assert "paper 90†" in text and "paper 90† (" not in text and "paper 70 (-20.0)" in text
    assert text.count(tables.DAGGER) == 1
    assert tables.DAGGER in (tmp_path / "report.html").read_text()
    assert tables.DAGGER not in tables.blocks(replace(spec, printed={}), manifest)[0].notes, "where nothing is printed"


def test_a_missing_cell_is_a_dash_with_its_reason(tmp_path):
    spec, manifest = made_up(tmp_path, {("vanilla", "a"): [HALF], ("x", "a"): [MOST]})
    manifest.entries["made"]["b|x|a"] = []
    manifest.failed["made|b|x|a"] = "out of memory"
    page.write([spec], manifest)
    text = (tmp_path / "report.md").read_text()
    assert "| x | – | – |" in text and "- x / a: out of memory" in text


def test_of_two_sites_validation_chooses_not_the_test(tmp_path):
    spec, manifest = made_up(tmp_path, {("vanilla", "a"): [HALF], ("x", "a"): [MOST, ALL]})
    spec = replace(spec, rows={**spec.rows, "x": {"label": "x", "sites": ["attention", "ffn"]}})
    worse_on_test = tmp_path / "records" / "x-a-0.json"
    other = tmp_path / "records" / "x-a-1.json"

    def validated(path, outcomes):
        path.write_text(json.dumps({**json.loads(path.read_text()), "grid_outcomes": {"4,2": records.pack(outcomes)}}))
        return tables.selected_records(spec, manifest, "b", "x", "a")[0]["id"]

    validated(worse_on_test, [True] * 30)
    assert validated(other, [True] * 29 + [False]) == "x-a-0"
    assert validated(other, [True] * 30 + [False] * 20) == "x-a-0", (
        "alike on the items that both were asked on: the first"
    )
    assert validated(worse_on_test, [True] * 29 + [False]) == "x-a-1"


def test_what_was_chosen_on_test_is_not_tested_on_it(tmp_path):
    spec, manifest = made_up(tmp_path, {("vanilla", "a"): [HALF], ("x", "a"): [MOST], ("y", "a"): [ALL]})
    path = tmp_path / "records" / "y-a-0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "search": "test"}))
    (block,) = tables.blocks(spec, manifest)
    rows = {row.label: row.values[0] for row in block.rows}
    assert rows["y"].text == "100.0" and rows["y"].marks == "‡" and not rows["y"].significant and not rows["y"].best
    assert rows["x"].significant and rows["x"].best, "nor does it keep others from being best"


def test_the_report_of_a_bundle_is_the_same(tmp_path):
    spec, manifest = made_up(tmp_path / "run", {("vanilla", "a"): [HALF], ("x", "a"): [MOST]})
    page.write([spec], manifest)
    bundle(manifest, tmp_path / "kept")
    page.write([spec], Manifest.read(tmp_path / "kept"))
    run, kept = ((tmp_path / folder / "report.html").read_text() for folder in ("run", "kept"))
    assert re.sub(r'href="records/[^"]*"', 'href="records.jsonl"', run) == kept, "only the files it links to differ"
    assert (tmp_path / "run" / "report.md").read_bytes() == (tmp_path / "kept" / "report.md").read_bytes()


# ---- the page, from made-up records ---------------------------------------------------------------------------------


def sectioned(folder: Path, outcomes: dict, **more) -> tuple[sections.Section, Manifest]:
    spec, manifest = made_up(folder, outcomes, **more)
    return sections.section(spec, manifest), manifest


def verdicts(*section: sections.Section) -> list[str]:
    return [finding.verdict for finding in findings.findings(section)]


def test_findings_are_read_off_the_records(tmp_path):
    good, bad = [ALL], [ahead(2)]
    outcomes = {("vanilla", c): [HALF] for c in "ab"} | {("flipped", c): [HALF, HALF] for c in "ab"}
    outcomes |= {("causal", c): good for c in "ab"} | {("random", c): bad * 3 for c in "ab"}
    outcomes |= {("published", c): bad for c in "ab"} | {("causal-predicted", c): good for c in "ab"}
    section, _ = sectioned(tmp_path / "a", outcomes)
    assert verdicts(section) == [
        "Significantly better than vanilla: causal momentum in 2 of 2, the published rule in 0 of 2 places.",
        "Significantly better than every draw of its controls: causal momentum in 2 of 2, the published rule in 0 of 2 places.",
        "Causal momentum with k and alpha predicted, not searched, is significantly different in none of 2 places.",
    ]
    swapped = outcomes | {("causal", c): bad for c in "ab"} | {("random", c): good * 3 for c in "ab"}
    section, _ = sectioned(tmp_path / "b", swapped)
    assert verdicts(section) == [
        "Significantly better than vanilla: causal momentum in 0 of 2, the published rule in 0 of 2 places.",
        "Significantly better than every draw of its controls: causal momentum in 0 of 2, the published rule in 0 of 2 places.",
        "Causal momentum with k and alpha predicted, not searched, is significantly better in 2 and worse in 0 of 2 places.",
    ]
    alike = "On a, b, where random AUs recover 2500 % of the largest gain, no method beats them all at any site:"
    assert alike in findings.findings([section])[1].numbers
    one_draw_as_good, _ = sectioned(tmp_path / "c", outcomes | {("random", "a"): [HALF, ALL, HALF]})
    assert "causal momentum in 1 of 2" in verdicts(one_draw_as_good)[1]


def test_findings_over_seeds_need_the_adjusted_test(tmp_path):
    def first_verdict(name, **gains):
        outcomes = {("vanilla", f"seed {i}"): [HALF] for i in range(5)}
        for row, of_seeds in gains.items():
            outcomes |= {(row, f"seed {i}"): [ahead(gain)] for i, gain in enumerate(of_seeds)}
        section, _ = sectioned(tmp_path / name, outcomes, show={"over": "seeds"})
        return verdicts(section)[0]

    steady, lucky = (10, 11, 9, 10, 11), (13, 3, 0, 0, 0)
    over = "Significant gain over vanilla over 5 training seeds: "
    assert (
        first_verdict("a", causal=steady, published=lucky) == over + "causal momentum at b, the published rule nowhere."
    )
    assert (
        first_verdict("b", causal=lucky, published=steady) == over + "causal momentum nowhere, the published rule at b."
    )


def test_findings_without_records_are_left_out_and_a_dry_run_has_none(tmp_path):
    section, manifest = sectioned(
        tmp_path, {("vanilla", "a"): [HALF], ("causal", "a"): [ALL], ("prompt-only", "a"): [MOST]}
    )
    assert verdicts(section) == ["Significantly better than vanilla: causal momentum in 1 of 1 places."]
    page.write([section.spec], replace(manifest, dry_run=True))
    text = (tmp_path / "report.md").read_text()
    assert "Nothing yet" in text and "ignificantly better" not in text.replace("Bold: significantly better", "")


def test_every_number_links_to_its_records(tmp_path):
    outcomes = {("vanilla", "a"): [HALF], ("causal", "a"): [ALL], ("random", "a"): [HALF, MOST]}
    section, manifest = sectioned(tmp_path, outcomes)
    page.write([section.spec], manifest)
    text = (tmp_path / "report.html").read_text()
    links = set(re.findall('href="#r-([^"]+)"', text))
    assert links == set(manifest.ids) == set(re.findall('<li id="r-([^"]+)"', text))
    assert all((tmp_path / file).exists() for file in re.findall('href="(records/[^"]+)"', text))
    assert "python main.py trace made causal a" in text
    cells = re.findall("<td.*?</td>", text, re.DOTALL)
    numbers = [cell for cell in cells if re.search(r'class="number">\d', cell)]
    assert len(numbers) == 6 and all('tabindex="0"' in cell and 'href="#r-' in cell for cell in numbers)
    ids = {id for row in section.blocks[0].rows for value in row.values for id in value.ids}
    assert ids == set(manifest.ids)


def test_a_cell_shows_number_and_interval_and_the_rest_on_demand(tmp_path):
    section, manifest = sectioned(
        tmp_path, {("vanilla", "a"): [HALF], ("causal", "a"): [ALL], ("random", "a"): [HALF, MOST]}
    )
    page.write([section.spec], manifest)
    cell = next(c for c in re.findall("<td.*?</td>", (tmp_path / "report.html").read_text(), re.DOTALL) if "100.0" in c)
    shown, _, on_demand = cell.partition('<div class="more">')
    assert "100.0" in shown and "[96.3, 100.0]" in shown and "alpha" not in shown
    assert "ffn, k 4, alpha 2" in on_demand and "gain over vanilla +50.0" in on_demand
    markdown = (tmp_path / "report.md").read_text()
    assert "| **100.0**\\* [96.3, 100.0] |" in markdown and "| random (control) |" in markdown
    assert "ffn, k 4, alpha 2; gain over vanilla" in markdown.partition("<details>")[2]


def test_the_page_needs_nothing_beside_it_and_no_script(tmp_path):
    section, manifest = sectioned(tmp_path, {("vanilla", "a"): [HALF], ("causal", "a"): [ALL]})
    page.write([section.spec], manifest)
    text = (tmp_path / "report.html").read_text()
    assert 'src="data:image/png' in text
    assert not re.search(r"<script|<link|https?://|url\(|@import", text)


def test_a_table_of_mixed_library_versions_says_so(tmp_path):
    section, manifest = sectioned(
        tmp_path, {("vanilla", "a"): [HALF], ("causal", "a"): [ALL], ("random", "a"): [HALF, MOST]}
    )
    assert not any("library versions" in note for note in section.blocks[0].notes)
    spec, manifest = made_up(
        tmp_path / "b",
        {("vanilla", "a"): [HALF], ("x", "a"): [ALL], ("random", "a"): [HALF, MOST]},
        {"x": {"environment": {"torch": "2.14", "commit": "0123456789ab"}}},
    )
    page.write([spec], manifest)
    line = "Records of this table come from different library versions: torch 2 (3), torch 2.14 (1)."
    assert all(line in (tmp_path / "b" / name).read_text() for name in ("report.md", "report.html"))


def test_a_page_is_rewritten_without_making_again_what_did_not_change(tmp_path, monkeypatch):
    section, manifest = sectioned(tmp_path, {("vanilla", "a"): [HALF], ("causal", "a"): [ALL]})
    new_sections, make = [], sections._make
    monkeypatch.setattr(sections, "_make", lambda *of: new_sections.append(of) or make(*of))
    page.write([section.spec], manifest)
    before = (tmp_path / "report.html").read_bytes(), (tmp_path / "figures" / "findings.png").stat().st_mtime_ns
    page.write([section.spec], manifest)
    assert not new_sections
    assert before == (
        (tmp_path / "report.html").read_bytes(),
        (tmp_path / "figures" / "findings.png").stat().st_mtime_ns,
    )
    manifest.entries["made"]["b|causal|a"] = []
    page.write([section.spec], manifest)
    assert len(new_sections) == 1 and "causal / a" in (tmp_path / "report.md").read_text()


# ---- pictures, from made-up records -------------------------------------------------------------------------------


def test_points_of_vanilla_are_hollow_and_vanilla_is_read_off_any_record(tmp_path):
    spec, manifest = made_up(
        tmp_path, {("x", "a"): [MOST], ("x", "b"): [HALF], ("random", "a"): [HALF, ALL], ("random", "b"): [MOST, MOST]}
    )
    for id, more in {
        "x-a-0": {"gained": 35, "lost": 5},
        "x-b-0": {"settings": None, "chosen": None, "gained": 0, "lost": 0},
        "random-a-0": {"settings": None, "chosen": None},
    }.items():
        path = tmp_path / "records" / f"{id}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    spec = replace(spec, kind="lines", show={"x": "x"}, columns={"a": {"x": 1}, "b": {"x": 2}})
    a, b, drawn = (curves._point(spec, manifest, "b", *at) for at in (("x", "a"), ("x", "b"), ("random", "a")))
    assert (a.accuracy, a.unchosen, a.vanilla) == (80, 0, 50) and (b.accuracy, b.unchosen, b.vanilla) == (50, 1, 50)
    assert (drawn.accuracy, drawn.low, drawn.high, drawn.draws, drawn.unchosen) == (75, 50, 100, 2, 1)
    (picture,) = pictures.draw(spec, manifest, tmp_path)
    assert picture.path.exists() and "In 2 of 6 searches nothing beat vanilla." in picture.note


def test_one_run_under_several_columns_is_drawn_once_at_its_number_of_pairs(tmp_path, monkeypatch):
    spec, manifest = made_up(tmp_path, {("x", "100"): [HALF], ("x", "800"): [MOST]}, {"x": {"n_pairs": 100}})
    path = tmp_path / "records" / "x-800-0.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "n_pairs": 799}))
    manifest.entries["made"]["b|x|900"] = manifest.entries["made"]["b|x|800"]
    columns = {name: {"n_pairs": int(name)} for name in ("100", "800", "900")}
    spec = replace(spec, kind="lines", show={"x": "pairs", "x_of": "n_pairs"}, columns=columns)
    lines, line = [], curves._line
    monkeypatch.setattr(
        curves, "_line", lambda axis, xs, points, *look: lines.append(points) or line(axis, xs, points, *look)
    )
    (picture,) = pictures.draw(spec, manifest, tmp_path)
    assert [(point.x, point.accuracy) for point in lines[0]] == [(100, 50), (799, 80)]
    assert picture.note.endswith("b: 800, 900 are one run, drawn once, at 799.")
    assert specs.read("paper", ["figure13"])[0].show["x_of"] == "n_pairs"


def test_a_run_that_many_columns_share_is_a_flat_line_unless_it_has_a_place_of_its_own(tmp_path):
    spec, manifest = made_up(tmp_path, {("x", "1"): [HALF]})
    manifest.entries["made"]["b|x|2"] = manifest.entries["made"]["b|x|1"]
    spec = replace(spec, kind="lines", show={"x": "k"}, columns={"1": {"x": 1}, "2": {"x": 2}})
    (picture,) = pictures.draw(spec, manifest, tmp_path)
    assert "drawn once" not in picture.note
    nowhere = replace(spec, show={"x": "pairs", "x_of": "n_pairs"}, columns={"1": {}, "2": {}})
    assert curves._point(nowhere, manifest, "b", "x", "1") is None


def test_more_rows_than_markers_are_drawn_each_in_its_place(tmp_path):
    spec, manifest = made_up(tmp_path, {(f"row {n}", "a"): [HALF] for n in range(9)})
    spec = replace(spec, kind="lines", show={"x": "x", "log": True}, columns={"a": {"x": 3}})
    assert pictures.draw(spec, manifest, tmp_path)
    looks = {(curves.COLORS[n % len(curves.COLORS)], curves.MARKERS[n % len(curves.MARKERS)]) for n in range(56)}
    assert len(looks) == 56
    for log in (False, True):
        places = curves._shifted_xs([1, 2, 100], log, 9)
        assert all(row[1] < other[2] < third[100] for row in places for other in places for third in places)


def test_grids_stand_beside_the_papers_and_win_rates_need_a_judge(tmp_path, monkeypatch):
    (spec,) = specs.read("paper", ["figure10"])
    for block, rows in spec.printed.items():
        for row, columns in rows.items():
            for column, grid in columns.items():
                says = spec.columns[column]
                assert block in spec.blocks and row in spec.rows
                assert [len(line) for line in grid] == [len(says["alphas"])] * len(says["ks"])
    manifest = Manifest(tmp_path, "paper")
    for column in ("copa", "delta_win_rate"):
        says = spec.columns[column]
        scores = {f"{k:g},{alpha:g}": 0.9 for k in says["ks"] for alpha in says["alphas"]}
        theirs = {"task": column, "n": 500, "measured": {}, "wording": "authors: a file", "protocol": "paper",
                  "kernel": "au_sdpa", "grid": [{}, {}], "search": "test"}  # fmt: skip
        record = {"measure": "drawn", "grid_scores": scores, "grid_vanilla": records.pack(HALF)} | theirs
        (tmp_path / "records").mkdir(exist_ok=True)
        (tmp_path / "records" / f"{column}.json").write_text(json.dumps(record))
        manifest.entries.setdefault("figure10", {})[f"gemma2-9b-it|austeer-ffn|{column}"] = [column]
    maps = []
    monkeypatch.setattr("paper.render.heat_maps.heat_map", lambda axis, ks, alphas, *drawn, **look: maps.append(drawn))
    (picture,) = pictures.draw(spec, manifest, tmp_path)
    assert [title for _, title, *_ in maps] == [
        "copa: AUSteer-FFN\ndrawn, vanilla 50.0",
        "copa: AUSteer-FFN, the paper",
        "copa: AUSteer-FFN,\nours less the paper's",
        "bpo: AUSteer-FFN\ndrawn, vanilla 50.0",
        "bpo: AUSteer-FFN, the paper\nwin rate, by a judge",
    ]
    assert maps[2][0][0][0] == pytest.approx(90 - 79.0)
    assert "needs a judge" in picture.note
    missing = dict(pictures.missing_pictures(spec, manifest))
    assert "needs a judge" in missing["AUSteer-FFN / delta_win_rate"] and missing["AUSteer-FFN / mawps"] == "not run"


def test_a_dry_run_shrinks_the_params_of_studies():
    params = {
        "head": 7,
        "layer": 27,
        "dims": [44, 76, 100],
        "paper_dims": {"positive": [28, 82, 60], "mixed": [108]},
        "answer": "yes",
    }
    shrunk = dry_run.shrink(params)
    assert shrunk["paper_dims"] == {"positive": [4, 2, 5], "mixed": [4]}
    assert shrunk["dims"] == [4, 5, 6], "as many, and different ones"
    assert shrunk["answer"] is None and params["answer"], "the spec keeps it"


def test_a_dry_run_takes_two_items_unless_it_is_told(tmp_path, monkeypatch):
    limits = []
    monkeypatch.setattr(run, "tiny_checkpoints", lambda known, folder: {})
    monkeypatch.setattr(specs, "read", lambda *names, **shared: limits.append(shared["limit"]) or [])
    for more in (["--dry-run"], ["--dry-run", "--limit", "5"], ["--limit", "5"], []):
        with pytest.raises(AUSteerError, match="nothing in scale paper"):
            run.main(["--scale", "paper", "--results", str(tmp_path), *more])
    assert limits == [2, 5, 5, None]


def test_the_papers_own_combinations_are_in_its_sweeps():
    for panel in (panel for spec in specs.read("paper") for panel in spec.panels if panel.study == "dimension_sweep"):
        own = panel.params["paper_dims"]
        assert len(own["positive"]) == panel.params["positive"] and len(own["mixed"]) == panel.params["mixed"]
        assert all(dim % panel.params["step"] == 0 for dims in own.values() for dim in dims), "they were swept"


# ---- end to end ------------------------------------------------------------------------------------------------------


def test_run_report_trace(tmp_path, capsys, monkeypatch):
    small = ["--only", "table6", "--limit", "20", "--results", str(tmp_path), "--jobs", "1"]
    read = specs.read

    def fewer(*args, **shared):
        """Keep two rows of one task: the whole of Table 1 takes minutes."""
        fewer_specs = []
        for spec in read(*args, **shared):
            entries = tuple(e for e in spec.entries if e.row in ("vanilla", "austeer-head") and e.column == "svamp")
            fewer_specs.append(replace(spec, entries=entries))
        return fewer_specs

    monkeypatch.setattr(specs, "read", fewer)
    assert run.main(small) is None
    text = (tmp_path / "embedded" / "report.md").read_text()
    assert "| pairs | – | – | 500 | – |" in text and "| test | – | – | 20 | – |" in text
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "embedded" / "records").iterdir()}
    assert run.main(small) is None, "a second run"
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "embedded" / "records").iterdir()} == before
    assert (tmp_path / "embedded" / "report.md").read_text() == text
    capsys.readouterr()
    assert trace.main(["table1", "austeer-head", "svamp", "--results", str(tmp_path), "--again"]) is None
    assert "equal, bit for bit" in capsys.readouterr().out
    id = Manifest.read(tmp_path / "embedded").entries["table1"]["embedded|austeer-head|svamp"][0]
    path = tmp_path / "embedded" / "records" / f"{id}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "right": 1}))
    assert trace.main(["table1", "austeer-head", "svamp", "--results", str(tmp_path), "--again"]) == 1
    assert "DIFFERS in right" in capsys.readouterr().out
    with pytest.raises(AUSteerError, match="avg is an average of the columns boolq, copa, svamp, tone"):
        trace.main(["table1", "austeer-head", "avg", "--results", str(tmp_path)])
    with pytest.raises(AUSteerError, match="rows vanilla"):
        trace.main(["table1", "no-row", "svamp", "--results", str(tmp_path)])


def test_trace_of_a_measured_figure(tmp_path, capsys):
    assert run.main(["--only", "figure4", "--limit", "20", "--results", str(tmp_path), "--jobs", "1"]) is None
    capsys.readouterr()
    assert trace.main(["figure4", "embedded", "--results", str(tmp_path), "--again"]) is None
    assert "equal, bit for bit" in capsys.readouterr().out
    path = (
        tmp_path / "embedded" / "records" / f"{Manifest.read(tmp_path / 'embedded').panels['figure4']['embedded']}.json"
    )
    path.write_text(json.dumps({**json.loads(path.read_text()), "found": []}))
    assert trace.main(["figure4", "embedded", "--results", str(tmp_path), "--again"]) == 1
    with pytest.raises(AUSteerError, match="has no rows and columns, but panels: give one of 'embedded'"):
        trace.main(["figure4", "copa", "--results", str(tmp_path)])


def test_times_are_not_traced_again(tmp_path):
    folder = tmp_path / "embedded"
    (folder / "records").mkdir(parents=True)
    (folder / "records" / "x.json").write_text(json.dumps({"id": "x", "found": {}}))
    Manifest(folder, "embedded", panels={"table11": {"embedded, svamp": "x"}}).write()
    assert trace.main(["table11", "embedded, svamp", "--results", str(tmp_path)]) is None
    with pytest.raises(AUSteerError, match="never the same twice"):
        trace.main(["table11", "embedded, svamp", "--results", str(tmp_path), "--again"])


def test_the_way_of_a_run_is_in_its_manifest(tmp_path):
    live = {"limit": 20, "batch_size": None, "engine": "live", "toxicity": "local"}
    Manifest(tmp_path, "paper", live, entries={"table1": {"a|b|c": ["x"]}}).write()
    assert Manifest.resume(tmp_path, "paper", live, False).entries
    for other in ({"engine": "vllm"}, {"batch_size": 8}, {"limit": None}):
        assert not Manifest.resume(tmp_path, "paper", live | other, False).entries, "records of two ways in one table"


def test_what_engines_cannot_serve_answers_itself():
    """Check that mixtures of experts, 4-bit weights and the studies keep the live model."""
    all_specs = specs.read("paper", engine="vllm")
    engines = {
        cell.model.name: cell.model.engine for spec in all_specs for entry in spec.entries for cell in entry.cells
    }
    own = {model for model, engine in engines.items() if engine == "live"}
    assert own == {"Qwen/Qwen3-30B-A3B", "meta-llama/Llama-3.3-70B-Instruct"}
    assert {panel.model.engine for spec in all_specs for panel in spec.panels} == {"live"}


def test_a_failed_cell_is_said_and_the_rest_goes_on(tmp_path, capsys, monkeypatch):
    real = run_cell.run_cell
    monkeypatch.setattr(
        run_cell, "run_cell", lambda cell, bench: 1 / 0 if cell.method.name == "published" else real(cell, bench)
    )
    read = specs.read
    monkeypatch.setattr(
        specs, "read",
        lambda *args, **shared: [
            replace(spec, entries=tuple(e for e in spec.entries if e.row in ("vanilla", "austeer-head") and e.column == "svamp"))
            for spec in read(*args, **shared)
        ],
    )  # fmt: skip
    assert run.main(["--only", "table1", "--limit", "20", "--results", str(tmp_path), "--jobs", "1"]) == 1
    assert "FAILED table1, embedded, austeer-head, svamp: ZeroDivisionError" in capsys.readouterr().err
    assert "ZeroDivisionError" in (tmp_path / "embedded" / "report.md").read_text()


def test_runs_of_other_tables_add_to_the_report(tmp_path, monkeypatch):
    read = specs.read

    def fewer(*args, **shared):
        """Keep vanilla alone: whole tables take minutes."""
        all_specs = read(*args, **shared)
        return [
            replace(s, entries=tuple(e for e in s.entries if e.row == "vanilla" and e.column == "svamp"))
            for s in all_specs
        ]

    monkeypatch.setattr(specs, "read", fewer)
    for name in ("table3", "table13"):
        assert run.main(["--only", name, "--limit", "20", "--results", str(tmp_path), "--jobs", "1"]) is None
    text = (tmp_path / "embedded" / "report.md").read_text()
    assert "## Table 3" in text and "## Table 13" in text
    assert f"{'table3':<12}{1:>7}{1:>7}" in estimate.text(
        specs.read("embedded", limit=20), Manifest.read(tmp_path / "embedded")
    )
    assert run.main(["--only", "table13", "--limit", "10", "--results", str(tmp_path), "--jobs", "1"]) is None
    assert "## Table 3" not in (tmp_path / "embedded" / "report.md").read_text(), "of another number of items"


def test_the_estimate_loads_nothing_and_lists_every_cell(tmp_path):
    text = estimate.text(specs.read("paper"), Manifest(tmp_path, "paper"))
    assert "table10 | qwen3-30b-a3b | austeer | boolq copa winogrande | 6 cells" in text
    assert "llama3.3-70b-instruct-4bit" in text and "42 GB" in text


def test_a_finer_grid_costs_a_race_nothing():
    table = specs.read("paper", ["table1"], ["llama2-7b-chat"])[0]
    cells = {entry.row: entry.cells[0] for entry in table.entries if entry.column == "copa"}
    searched = {row: estimate._searched(cells[row], 500) for row in ("vanilla", "sadi", "austeer-ffn")}
    assert len(run_cell.grid(cells["austeer-ffn"])) > 5 * len(run_cell.grid(cells["sadi"]))
    assert searched == {
        "vanilla": 0,
        "sadi": 21 * estimate.VALIDATION // 4,
        "austeer-ffn": 21 * estimate.VALIDATION // 4,
    }


def test_the_estimate_knows_the_precision_that_a_panel_needs(tmp_path):
    for names, memory in ((["effect"], "44 GB"), (["figure11"], "22 GB")):
        text = estimate.text(specs.read("paper", names), Manifest(tmp_path, "paper"))
        assert re.search(rf"gemma2-9b-it +0 +{memory}", text), names


def test_the_estimate_counts_the_tokens_of_answers_that_are_timed():
    model, (table,) = specs.models()["gemma2-9b-it"], specs.read("paper", ["table11"], ["gemma2-9b-it"])
    seconds = {panel.task.name: estimate._panel_seconds(panel, model, 1e15, 3e12) for panel in table.panels}
    at_least = table.panels[0].params["items"] * 5 * 5 * 500 * model["parameters"] * model["bits"] / 8 / 3e12
    assert at_least < seconds["bpo"] < 4 * at_least and seconds["copa"] < seconds["bpo"] / 10


def test_the_estimate_counts_what_is_there_and_current(tmp_path, monkeypatch, capsys):
    """Check that records with other options or of other code do not count as done."""
    fewer = [replace(spec, entries=spec.entries[:2]) for spec in specs.read("embedded", ["table3"], limit=20)]
    monkeypatch.setattr(specs, "read", lambda *args, **shared: fewer)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    started, real = [], run_cell.run_cell

    def killed_at_the_second(cell, bench):
        started.append(cell)
        if len(started) == 2:
            raise KeyboardInterrupt
        return real(cell, bench)

    monkeypatch.setattr(run_cell, "run_cell", killed_at_the_second)
    small = ["--only", "table3", "--results", str(tmp_path), "--jobs", "1", "--limit", "20"]
    with pytest.raises(KeyboardInterrupt):
        run.main(small)

    def counts_of_estimate(*arguments):
        capsys.readouterr()
        run.main([*arguments, "--estimate"])
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("table3")).split()[1:3]

    assert counts_of_estimate(*small) == ["2", "1"], "noted as it went"
    assert counts_of_estimate(*small[:-2]) == ["2", "0"], "of all items, not of 20"
    monkeypatch.setattr(run_cell, "code_hash", lambda *roots, cut: "other code")
    estimate._code.cache_clear()
    assert counts_of_estimate(*small) == ["2", "0"]


def test_a_figure_that_fails_now_is_not_the_one_of_before(tmp_path):
    (spec,) = specs.read("embedded", ["figure4"])
    manifest = Manifest(tmp_path, "embedded", panels={"figure4": {"embedded": "old"}})
    notes = progress.Progress([spec], manifest)
    notes.add(spec.panels[0], {"failed": "no room"})
    notes.write()
    assert manifest.panel("figure4", "embedded") is None
    assert manifest.why_missing("figure4", "embedded", "panel", "embedded") == "no room"
    notes.add(spec.panels[0], {"id": "new"})
    notes.write()
    assert manifest.panels["figure4"] == {"embedded": "new"} and not manifest.failed


def test_a_picture_that_fails_is_missing_with_its_reason(tmp_path, monkeypatch):
    (spec,) = specs.read("embedded", ["figure4"])
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "x.json").write_text(
        json.dumps({"id": "x", "found": {}, "device": "cpu", "environment": {"commit": "0123456789ab"}})
    )
    page.write([spec], Manifest(tmp_path, "embedded", panels={"figure4": {"embedded": "x"}}))
    text = (tmp_path / "report.md").read_text()
    assert "(embedded): measured, but could not be drawn: KeyError: 'columns'" in text and "![" not in text


def test_shared_rows_stand_in_every_accuracy_table():
    for scale in ("embedded", "small", "paper"):
        for spec in specs.read(scale, [f"table{n}" for n in (1, 3, 4, 5, 7, 10, 13)]):
            methods = {cell.method.name for entry in spec.entries for cell in entry.cells}
            assert {"causal", "causal-both", "sign-aware", "causal-fdr", "causal-greedy", "causal-predicted"} <= methods
            assert {"random", "flipped", "prompt-only"} <= methods, spec.name
            fields = [json.dumps(specs._unlabelled(row), sort_keys=True) for row in spec.rows.values()]
            assert len(fields) == len(set(fields)), "one thing under two names"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "table77"], "there is no 'table77'"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--jobs", "-1"], "--jobs must be at least 1"),
        (["--device", "gpu"], "device 'gpu' is unknown"),
        (["--engine", "vllm"], "vLLM"),
        (["--scale", "paper", "--models", "gpt", "--estimate"], "there is no model 'gpt'"),
        (["--scale", "paper", "--only", "ablation"], "nothing in scale paper matches --only"),
    ],
)
def test_wrong_input_is_told_in_a_line(arguments, message, tmp_path):
    with pytest.raises(AUSteerError, match=message):
        run.main(["--results", str(tmp_path), *arguments])


@pytest.mark.parametrize("scale", ["embedded", "real"])
def test_committed_tables_and_figures_are_rebuilt_byte_for_byte(scale, tmp_path):
    import shutil

    committed = ROOT / "docs" / scale
    for name in ("manifest.json", "records.jsonl"):
        shutil.copy(committed / name, tmp_path / name)
    manifest = Manifest.read(tmp_path)
    page.write(specs.read(scale, everything=manifest.everything), manifest)
    assert (tmp_path / "report.md").read_bytes() == (committed / "report.md").read_bytes()
    names = sorted(file.name for file in (committed / "figures").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "figures").iterdir())
    for name in names:
        assert (tmp_path / "figures" / name).read_bytes() == (committed / "figures" / name).read_bytes(), name


@pytest.mark.slow
def test_killed_three_times_it_ends_in_the_same_bytes(tmp_path):
    from killing import killed_and_whole

    whole, killed, met = killed_and_whole(tmp_path, ["--only", "table12,figure11", "--limit", "20"], times=3, seed=1)
    assert killed == whole and met > 0 and len(whole) > 2


@pytest.mark.slow
def test_dry_run_of_the_papers_scale(tmp_path):
    """Run every cell of every table of the paper on tiny random checkpoints of the eight models' architectures."""
    from samples import write_datasets

    data = write_datasets(tmp_path / "data", train=120)
    run.main(["--scale", "paper", "--dry-run", "--jobs", "2", "--data-dir", str(data), "--results", str(tmp_path)])
    manifest = Manifest.read(tmp_path / "paper-dry-run")
    text = (tmp_path / "paper-dry-run" / "report.md").read_text()
    assert "DRY RUN" in text and not re.search(r"paper [\d.]+ \(", text)
    # the real model's SAE needs sae-lens, would be a download, and fits no tiny model
    why_not = r"this needs sae-lens|sae-lens cannot load|the SAE reads"
    assert manifest.failed and all(re.match(why_not, why) for why in manifest.failed.values()), manifest.failed
    ran, bits = set(), set()
    for spec in specs.read("paper"):
        for entry in spec.entries:
            made = manifest.records(spec.name, entry.block, entry.row, entry.column)
            assert len(made) == len(entry.cells) or entry.row == "sta", (spec.name, entry)
            ran |= {cell.model.name for cell in entry.cells} if made else set()
            if entry.block == "llama3.3-70b-instruct-4bit":
                bits |= {record["quantization"] for record in made}
    of_real = {cell.model.name for spec in specs.read("real") for entry in spec.entries for cell in entry.cells}
    assert ran == {model["hub"] for model in specs.models().values()} - of_real and bits == {"4bit"}


def test_records_of_other_code_are_counted(tmp_path):
    spec, manifest = made_up(tmp_path, {("vanilla", "a"): [HALF]})
    (tmp_path / "records" / "old.json").write_text("{}")
    manifest.count_orphans()
    page.write([spec], Manifest.read(tmp_path))
    assert "because other code or options made them: 1." in (tmp_path / "report.md").read_text()


def test_the_first_table_is_published_before_its_slow_rows_and_the_other_tables(tmp_path, monkeypatch):
    selected, events = specs.read("embedded", ["table1", "table4"]), []

    def run_cells(wave, store, executor):
        events.append({cell.method.name for cell in wave})
        yield from ((cell, {"id": str(place)}) for place, cell in enumerate(wave))

    monkeypatch.setattr(run, "run_cells", run_cells)
    executor = LocalExecutor(2)
    run.compute(selected, Manifest(tmp_path, "embedded"), Store(), executor, lambda: events.append("published"))
    first, then, *_ = events
    assert {"vanilla", "published", "causal", "random"} <= first and then == "published"
    assert not first & {"causal-greedy", "causal-fdr"} and "causal-greedy" in events[2]


def test_a_model_that_fills_the_machine_is_loaded_for_one_stage():
    selected = specs.read("paper", ["table1", "table3", "figure2", "figure4"])
    cells = [cell for spec in selected for entry in spec.entries for cell in entry.cells]
    pictures = [panel for spec in selected for panel in spec.panels]
    stages = run._stages(selected[0], cells, pictures, spreads=False)
    names = [{one.model.name for one in (*stage_cells, *panels)} for stage_cells, panels in stages]
    assert all(len(of_stage) == 1 for of_stage in names) and len(names) == len(set().union(*names))
    assert sum(len(stage_cells) for stage_cells, _ in stages) == len(cells)
    assert sum(len(panels) for _, panels in stages) == len(pictures) > 0
