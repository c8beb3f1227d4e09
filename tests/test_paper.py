"""The paper's tables and figures: specs, runner, report, trace."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import cells
from embedded.tasks import TASKS
from errors import AUSteerError
from eval import records
from paper import curves, dry_run, outlook, page, pictures, run, specs, tables, trace
from paper.account import Account
from paper.manifest import Manifest, bundle
from setting import Cell, Setting

ROOT = Path(__file__).parents[1]
PRINTED = ROOT.parent / "shared" / "paper" / "tables.json"
OF_THE_PAPER = [f"table{n}" for n in range(1, 14)] + [f"figure{n}" for n in (2, 3, 4, 6, 7, 8, 10, 11, 12, 13)]


def test_every_table_and_figure_of_the_paper_has_a_spec():
    assert set(OF_THE_PAPER) <= set(specs.names())
    assert specs.names()[:13] == OF_THE_PAPER[:13], "in the paper's order, 10 behind 9"
    at_paper = {spec.name for spec in specs.read("paper")}
    assert set(OF_THE_PAPER) <= at_paper
    assert set(OF_THE_PAPER) | {"ablation", "wide", "noise", "prediction"} <= {s.name for s in specs.read("embedded")}


def test_all_models_of_the_paper_are_in_the_specs():
    used = {cell.setting.model for spec in specs.read("paper") for entry in spec.entries for cell in entry.cells}
    assert used == {model["hub"] for model in specs.models().values()}


@pytest.mark.parametrize("scale", specs.SCALES)
def test_methods_sites_and_tasks_exist(scale):
    from baselines.registry import METHODS
    from eval.tasks.registry import PAPER_TASKS

    for spec in specs.read(scale):
        for entry in spec.entries:
            for cell in entry.cells:
                assert cell.method in ("vanilla", "prompt-only") or cell.site in METHODS[cell.method].sites, entry
                assert cell.setting.task in (TASKS if scale == "embedded" else PAPER_TASKS), entry


def test_the_embedded_scale_never_stands_beside_the_papers_numbers():
    assert all(not spec.printed for spec in specs.read("embedded"))
    assert all("embedded" in cell.setting.model for s in specs.read("embedded") for e in s.entries for cell in e.cells)


@pytest.mark.skipif(not PRINTED.exists(), reason="needs ../shared, which users do not have")
def test_printed_numbers_are_the_papers():
    paper, mine = json.loads(PRINTED.read_text()), {spec.name: spec.printed for spec in specs.read("paper")}
    for model, rows in paper["table1"].items():
        for row, columns in rows.items():
            wanted = {column: value for column, value in columns.items() if column != "acts" and value is not None}
            assert mine["table1"][model][row] == wanted
    assert mine["table10"] == paper["table10"] and mine["table4"] == paper["table4"]
    assert mine["table13"]["llama2-7b-chat"] == paper["table13_llama2"]
    assert mine["table12"]["llama2-7b-chat"]["austeer"] == paper["table12_copa_llama2_by_number_of_aus"]


def test_unsteered_cells_are_the_same_in_all_tables():
    vanilla = {
        entry.cells[0]
        for spec in specs.read("embedded", ["table1", "table3", "table13"])
        for entry in spec.entries
        if entry.row == "vanilla"
    }
    assert len(vanilla) == len(TASKS)


@pytest.mark.parametrize(
    "names, models, message",
    [(["table99"], [], "no 'table99'"), (["table1"], ["gpt"], "no model 'gpt'")],
)
def test_unknown_names_are_told(names, models, message):
    with pytest.raises(AUSteerError, match=message):
        specs.read("paper", names, models)


# ---- numbers of a table, from made-up records -------------------------------------------------------------------


def made_up(folder: Path, outcomes: dict[tuple[str, str], list[list[bool]]], **more) -> tuple[specs.Spec, Manifest]:
    """A spec of one block, one column a task; outcomes by (row, column), a list a draw."""
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
                "chosen": "4,2", "options": {}, "environment": {"torch": "2", "commit": "0123456789ab"},
            }  # fmt: skip
            (folder / "records").mkdir(parents=True, exist_ok=True)
            (folder / "records" / f"{id}.json").write_text(json.dumps(record))
            ids.append(id)
        manifest.entries.setdefault("made", {})[f"b|{row}|{column}"] = ids
        cells = tuple(Cell(Setting("embedded", column), row, None, draw) for draw in range(len(draws)))
        entries.append(specs.Entry("b", row, column, cells))
    manifest.write()
    rows = {row: {"label": row, "draws": max(len(d) for (r, _), d in outcomes.items() if r == row)} for row in names}
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
    rows = {label: values for label, _, values in block.rows}
    assert [value.text for value in rows["vanilla"]] == ["50.0", "80.0", "65.0"]
    assert rows["vanilla"][0].detail == "[40.4, 59.6]"
    assert rows["x"][0].text == "100.0" and rows["x"][0].difference == 10.0 and rows["x"][2].difference == 10.0
    assert rows["random"][0].text == "80.0" and rows["random"][0].detail == "50.0 to 100.0 in 3 draws"
    assert rows["random"][2].detail == "50.0 to 75.0 in 3 draws", "draw by draw, not the extremes of each column"


def test_stars_and_bold_need_the_adjusted_test(tmp_path):
    little = [True] * 54 + [False] * 46  # four more than half: p = 0.125 unadjusted
    spec, manifest = made_up(
        tmp_path,
        {("vanilla", "a"): [HALF], ("x", "a"): [ALL], ("y", "a"): [little],
         ("vanilla", "b"): [HALF], ("x", "b"): [ALL], ("y", "b"): [ALL]},
    )  # fmt: skip
    (block,) = tables.blocks(spec, manifest)
    rows = {label: values for label, _, values in block.rows}
    assert rows["x"][0].sure and not rows["y"][0].sure and not rows["vanilla"][0].sure
    assert rows["x"][0].best, "better than every other"
    assert not rows["x"][1].best and not rows["y"][1].best, "two alike: neither is the best"


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
        return tables.shown(spec, manifest, "b", "x", "a")[0]["id"]

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
    rows = {label: values[0] for label, _, values in block.rows}
    assert (
        rows["y"].text == "100.0" and "chosen on test" in rows["y"].detail and not rows["y"].sure and not rows["y"].best
    )
    assert rows["x"].sure and rows["x"].best, "nor does it keep others from being best"


def test_the_report_of_a_bundle_is_the_same(tmp_path):
    spec, manifest = made_up(tmp_path / "run", {("vanilla", "a"): [HALF], ("x", "a"): [MOST]})
    page.write([spec], manifest)
    bundle(manifest, tmp_path / "kept")
    page.write([spec], Manifest.read(tmp_path / "kept"))
    for name in ("report.md", "report.html"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "kept" / name).read_bytes()


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
    (made,) = pictures.draw(spec, manifest, tmp_path)
    assert made.path.exists() and "In 2 of 6 searches nothing beat vanilla." in made.note


def test_more_rows_than_markers_are_drawn_each_in_its_place(tmp_path):
    spec, manifest = made_up(tmp_path, {(f"row {n}", "a"): [HALF] for n in range(9)})
    spec = replace(spec, kind="lines", show={"x": "x", "log": True}, columns={"a": {"x": 3}})
    assert pictures.draw(spec, manifest, tmp_path)
    looks = {(curves.COLORS[n % len(curves.COLORS)], curves.MARKERS[n % len(curves.MARKERS)]) for n in range(56)}
    assert len(looks) == 56
    for log in (False, True):
        places = curves._beside([1, 2, 100], log, 9)
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
        record = {"measure": "drawn", "grid_scores": scores, "grid_vanilla": records.pack(HALF)}
        (tmp_path / "records").mkdir(exist_ok=True)
        (tmp_path / "records" / f"{column}.json").write_text(json.dumps(record))
        manifest.entries.setdefault("figure10", {})[f"gemma2-9b-it|austeer-ffn|{column}"] = [column]
    maps = []
    monkeypatch.setattr("paper.heat_maps.heat_map", lambda axis, ks, alphas, *drawn, **look: maps.append(drawn))
    (made,) = pictures.draw(spec, manifest, tmp_path)
    assert [title for _, title, *_ in maps] == [
        "copa: AUSteer-FFN\ndrawn, vanilla 50.0",
        "copa: AUSteer-FFN, the paper",
        "copa: AUSteer-FFN,\nours less the paper's",
        "bpo: AUSteer-FFN\ndrawn, vanilla 50.0",
        "bpo: AUSteer-FFN, the paper\nwin rate, by a judge",
    ]
    assert maps[2][0][0][0] == pytest.approx(90 - 79.0)
    assert "needs a judge" in made.note
    missing = dict(pictures.undrawn(spec, manifest))
    assert "needs a judge" in missing["AUSteer-FFN / delta_win_rate"] and missing["AUSteer-FFN / mawps"] == "not run"


def test_a_dry_run_draws_none_of_the_papers_numbers():
    params = {
        "head": 7,
        "layer": 27,
        "paper_dims": {"positive": [28, 82, 36], "mixed": [108]},
        "lines": {"the paper's": 70},
    }
    fitted = dry_run.fitted(params)
    assert fitted["lines"] == {} and fitted["paper_dims"] == {"positive": [4, 2], "mixed": [4]}
    assert params["lines"], "the spec keeps them"


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
        """Two rows of one task: the whole of Table 1 is minutes."""
        found = []
        for spec in read(*args, **shared):
            kept = tuple(e for e in spec.entries if e.row in ("vanilla", "austeer-head") and e.column == "svamp")
            found.append(replace(spec, entries=kept))
        return found

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
    with pytest.raises(AUSteerError, match="has panels, and no columns: 'embedded'"):
        trace.main(["figure4", "copa", "--results", str(tmp_path)])


def test_the_way_of_a_run_is_in_its_manifest(tmp_path):
    live = {"limit": 20, "batch_size": None, "engine": "live", "toxicity": "local"}
    Manifest(tmp_path, "paper", live, entries={"table1": {"a|b|c": ["x"]}}).write()
    assert Manifest.begun(tmp_path, "paper", live, False).entries
    for other in ({"engine": "vllm"}, {"batch_size": 8}, {"limit": None}):
        assert not Manifest.begun(tmp_path, "paper", live | other, False).entries, "records of two ways in one table"


def test_what_engines_cannot_serve_answers_itself():
    """Mixtures of experts and 4-bit weights, and all that is measured inside of the model."""
    found = specs.read("paper", engine="vllm")
    settings = {cell.setting.model: cell.setting for spec in found for entry in spec.entries for cell in entry.cells}
    own = {model for model, setting in settings.items() if setting.engine == "live"}
    assert own == {"Qwen/Qwen3-30B-A3B", "meta-llama/Llama-3.3-70B-Instruct"}
    assert {panel.setting.engine for spec in found for panel in spec.panels} == {"live"}


def test_a_failed_cell_is_said_and_the_rest_goes_on(tmp_path, capsys, monkeypatch):
    real = cells.compute
    monkeypatch.setattr(cells, "compute", lambda cell: 1 / 0 if cell.method == "published" else real(cell))
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
        """Vanilla alone: whole tables are minutes."""
        found = read(*args, **shared)
        return [
            replace(s, entries=tuple(e for e in s.entries if e.row == "vanilla" and e.column == "svamp")) for s in found
        ]

    monkeypatch.setattr(specs, "read", fewer)
    for name in ("table3", "table13"):
        assert run.main(["--only", name, "--limit", "20", "--results", str(tmp_path), "--jobs", "1"]) is None
    text = (tmp_path / "embedded" / "report.md").read_text()
    assert "## Table 3" in text and "## Table 13" in text
    assert f"{'table3':<12}{1:>7}{1:>7}" in outlook.text(
        specs.read("embedded", limit=20), Manifest.read(tmp_path / "embedded")
    )
    assert run.main(["--only", "table13", "--limit", "10", "--results", str(tmp_path), "--jobs", "1"]) is None
    assert "## Table 3" not in (tmp_path / "embedded" / "report.md").read_text(), "of another number of items"


def test_plan_loads_nothing_and_lists_every_cell(tmp_path):
    text = outlook.text(specs.read("paper"), Manifest(tmp_path, "paper"))
    assert "table10 | qwen3-30b-a3b | austeer | boolq copa winogrande | 6 cells" in text
    assert "llama3.3-70b-instruct-4bit" in text and "42 GB" in text


def test_plan_counts_what_is_there_and_current(tmp_path, monkeypatch, capsys):
    """Records of another way to ask, or of other code, are not done."""
    from paper import account

    into = {"records": str(tmp_path / "embedded" / "records"), "ranks": str(tmp_path / "ranks"), "limit": 20}
    fewer = [replace(spec, entries=spec.entries[:2]) for spec in specs.read("embedded", ["table3"], **into)]
    monkeypatch.setattr(specs, "read", lambda *args, **shared: fewer)
    monkeypatch.setattr(account, "EVERY", 0.0)
    computed, real = [], cells.compute

    def killed_at_the_second(cell):
        computed.append(cell)
        if len(computed) == 2:
            raise KeyboardInterrupt
        return real(cell)

    monkeypatch.setattr(cells, "compute", killed_at_the_second)
    small = ["--only", "table3", "--results", str(tmp_path), "--jobs", "1", "--limit", "20"]
    with pytest.raises(KeyboardInterrupt):
        run.main(small)

    def planned(*arguments):
        capsys.readouterr()
        run.main([*arguments, "--plan"])
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("table3")).split()[1:3]

    assert planned(*small) == ["2", "1"], "noted as it went"
    assert planned(*small[:-2]) == ["2", "0"], "of all items, not of 20"
    monkeypatch.setattr(records, "code_hash", lambda: "other code")
    assert planned(*small) == ["2", "0"]


def test_a_figure_that_fails_now_is_not_the_one_of_before(tmp_path):
    (spec,) = specs.read("embedded", ["figure4"])
    manifest = Manifest(tmp_path, "embedded", panels={"figure4": {"embedded": "old"}})
    account = Account([spec], manifest)
    account.panel(spec.panels[0], {"failed": "no room"})
    account.write()
    assert manifest.panel("figure4", "embedded") is None
    assert manifest.why_missing("figure4", "embedded", "panel", "embedded") == "no room"
    account.panel(spec.panels[0], {"id": "new"})
    account.write()
    assert manifest.panels["figure4"] == {"embedded": "new"} and not manifest.failed


def test_shared_rows_stand_in_every_accuracy_table():
    for scale in specs.SCALES:
        for spec in specs.read(scale, [f"table{n}" for n in (1, 3, 4, 5, 7, 10, 13)]):
            methods = {cell.method for entry in spec.entries for cell in entry.cells}
            assert {"causal", "causal-both", "sign-aware", "causal-fdr", "causal-greedy", "causal-predicted"} <= methods
            assert {"random", "flipped", "prompt-only"} <= methods, spec.name
            asked = [json.dumps(specs._asked(row), sort_keys=True) for row in spec.rows.values()]
            assert len(asked) == len(set(asked)), "one thing under two names"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "table77"], "there is no 'table77'"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--jobs", "-1"], "--jobs must be at least 1"),
        (["--device", "gpu"], "device 'gpu' is unknown"),
        (["--engine", "vllm"], "vLLM"),
        (["--scale", "paper", "--models", "gpt", "--plan"], "there is no model 'gpt'"),
        (["--scale", "paper", "--only", "ablation"], "nothing of that is in scale paper"),
    ],
)
def test_wrong_input_is_told_in_a_line(arguments, message, tmp_path):
    with pytest.raises(AUSteerError, match=message):
        run.main(["--results", str(tmp_path), *arguments])


COMMITTED = ROOT / "docs" / "embedded"


def test_committed_tables_and_figures_are_rebuilt_byte_for_byte(tmp_path):
    import shutil

    for name in ("manifest.json", "records.jsonl"):
        shutil.copy(COMMITTED / name, tmp_path / name)
    manifest = Manifest.read(tmp_path)
    page.write(specs.read("embedded"), manifest)
    assert (tmp_path / "report.md").read_bytes() == (COMMITTED / "report.md").read_bytes()
    kept = sorted(file.name for file in (COMMITTED / "figures").iterdir())
    assert kept == sorted(file.name for file in (tmp_path / "figures").iterdir())
    for name in kept:
        assert (tmp_path / "figures" / name).read_bytes() == (COMMITTED / "figures" / name).read_bytes(), name


@pytest.mark.slow
def test_killed_three_times_it_ends_in_the_same_bytes(tmp_path):
    from killing import killed_and_whole

    whole, killed, met = killed_and_whole(tmp_path, ["--only", "table12,figure11", "--limit", "20"], times=3, seed=1)
    assert killed == whole and met > 0 and len(whole) > 2


@pytest.mark.slow
def test_dry_run_of_the_papers_scale(tmp_path):
    """Every cell of every table of the paper, on tiny random checkpoints of the eight models' architectures."""
    from samples import write_datasets

    data = write_datasets(tmp_path / "data", train=120)
    run.main(["--scale", "paper", "--dry-run", "--data-dir", str(data), "--results", str(tmp_path)])
    manifest = Manifest.read(tmp_path / "paper-dry-run")
    # an SAE of the real model fits no tiny one
    allowed = ("its wrong answers", "the SAE", "cannot load")
    text = (tmp_path / "paper-dry-run" / "report.md").read_text()
    assert "DRY RUN" in text and "difference" not in text
    assert all(why.startswith(allowed) for why in manifest.failed.values()), manifest.failed
