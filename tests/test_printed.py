"""Compare every number that the specs quote from the paper with the paper's own text.

Each test writes a table out as the paper prints it, from the numbers in its spec, and compares the result with the part of
the text between two markers, ignoring white space. A wrong, missing or swapped number makes them differ. The text has no
space between columns ("36.0051.8356.01"), so tables of integers can only be compared as a whole.
"""

import re
from functools import cache
from statistics import mean

import pytest
from conftest import SHARED

from paper import specs
from paper.studies.counting import counted, ordinal, place

SEEDS = SHARED / "seeds"
pytestmark = pytest.mark.skipif(not SEEDS.exists(), reason="needs ../shared/seeds, which users do not have")

MODELS = {
    "llama2-7b-chat": "LLaMA2-7B-Chat", "gemma2-9b-it": "Gemma2-9B-it", "qwen3-8b": "Qwen3-8B",
    "qwen3-30b-a3b": "Qwen3-30B-A3B", "llama3.3-70b-instruct-4bit": "Llama-3.3-70B-Instruct",
}  # fmt: skip
TASKS = ("boolq", "copa", "winogrande", "svamp", "mawps", "detox", "delta_win_rate")  # in the paper's order
REASONING = TASKS[:5]


@cache
def paper() -> str:
    """Return the paper's text without white space."""
    (text,) = [text for file in SEEDS.glob("*.txt") if "Published as a conference paper" in (text := file.read_text())]
    return squeezed(text)


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def between(start: str, end: str) -> str:
    """Return the text after `start` and before `end`; `start` occurs once."""
    parts = paper().split(squeezed(start))
    assert len(parts) == 2, f"{start!r} occurs {len(parts) - 1} times"
    return parts[1].split(squeezed(end))[0]


@cache
def spec(name: str) -> specs.Spec:
    (found,) = specs.read("paper", [name])
    return found


def printed(name: str) -> dict:
    return spec(name).printed


def spelled(values: dict, columns, form: str = ".2f", dagger=()) -> str:
    """Spell a row: numbers without anything between them, and one dash for those at its end that are not printed."""
    cells = [f"{values[column]:{form}}{'†' * (column in dagger)}" for column in columns if column in values]
    return "".join(cells) + "–" * any(column not in values for column in columns)


def test_every_spec_with_numbers_of_the_paper_is_compared_here():
    kept = {spec.name for spec in specs.read("paper") if spec.printed}
    numbers = {int(name.removeprefix("table")) for name in kept if name.startswith("table")}
    assert numbers == set(range(1, 14))
    assert kept - {f"table{n}" for n in numbers} == {"figure2", "figure3", "figure4", "figure10", "figure12"}
    assert [spec.name for spec in specs.read("paper") if spec.dagger] == ["table1"]


def test_table_1_with_its_daggers():
    table, rows = spec("table1"), ""
    labels = {"vanilla": "Vanilla", "iti": "ITI", "caa": "CAA", "sadi": "SADI", "sta": "STA",
              "austeer-head": "AUSteer-Head", "austeer-ffn": "AUSteer-FFN"}  # fmt: skip
    columns = (*REASONING, "avg", "detox", "delta_win_rate")
    for model, of_model in table.printed.items():
        rows += MODELS[model]
        for row in (row for row in labels if row in of_model):
            acts = of_model[row]["acts"].replace("k_h*", "kh·").replace("<=", "≤")
            rows += (
                labels[row] + acts + spelled(of_model[row], columns, dagger=table.dagger.get(model, {}).get(row, ()))
            )
    assert rows == between("Acc.Detox.∆WR", "• SADI (Wang")
    assert rows.count("†") == 14


def test_averages_of_table_1_follow_from_its_cells():
    rows = [values for of_model in printed("table1").values() for values in of_model.values() if "avg" in values]
    assert len(rows) == 19
    for values in rows:
        assert values["avg"] == pytest.approx(mean(values[task] for task in REASONING), abs=0.006)


def test_the_row_of_the_authors_code_is_table_1_at_the_site_of_its_settings():
    rows = {"attention": "austeer-head", "ffn": "austeer-ffn"}
    for model, of_model in printed("table1").items():
        at = spec("table1").rows["authors"]["at"][model]
        assert of_model["authors"] == {task: of_model[rows[cell["site"]]][task] for task, cell in at.items()}


def test_table_2():
    of = printed("table2")
    cells = [(MODELS[model], row) for model, rows in of.items() for row in rows]
    assert [row for _, row in cells] == ["sadi", "austeer", "sadi", "sta", "austeer", "sadi", "austeer"]
    text = between("LLaMA2-7B-ChatGemma2-9B-itQwen3-8BSADIAUSteerSADISTAAUSteerSADIAUSteer", "AUSteer improves open-")
    lines = {
        key: "".join(f"{values[key]:.1f}" for rows in of.values() for values in rows.values())
        for key in ("quality", "alignment")
    }
    assert text == f"Quality(↑){lines['quality']}Alignment(↑){lines['alignment']}"


def test_table_3():
    rows = {row: values["avg"] for row, values in printed("table3")["gemma2-9b-it"].items()}
    labels = {"random_location": "RandomLoc.", "activation_difference": "Act.Diff.", "fixed_vector": "Fixed.Vec.",
              "fixed_strength": "Fixed.Strength"}  # fmt: skip
    full = rows["austeer-ffn"]
    text = f"AUSteer-FFN{full:.2f}" + "".join(
        f"{label}{rows[row]:.2f}({rows[row] - full:.2f})" for row, label in labels.items()
    )
    assert set(rows) == {"austeer-ffn", *labels}
    assert text == between("Ablation study results on Gemma2-9B-it. MethodAvg. Acc", "We evaluate the contribution")
    assert full == printed("table1")["gemma2-9b-it"]["austeer-ffn"]["avg"]


def test_table_4():
    of = printed("table4")
    assert list(of) == ["llama3.1-8b-instruct", "llama2-13b-chat", "gemma2-27b-it"]
    labels = {"vanilla": "Vanilla", "austeer-head": "AUSteer-Head", "austeer-ffn": "AUSteer-FFN"}
    text = "".join(
        label + "".join(spelled(rows[row], TASKS[:3]) for rows in of.values()) for row, label in labels.items()
    )
    assert all(set(rows) == set(labels) for rows in of.values())
    assert text == between("BoolQCOPAWinoG." * 3, "We evaluate AUSTEER on larger")


@pytest.mark.parametrize(
    "name, labels, start, end",
    [
        ("table5", {"vanilla": "Vanilla", "sadi": "SADI", "austeer_previous": "AUSteer(previousresult)",
                    "austeer_general_pairs": "AUSteer(newsolution)"},
         "with new contrastive pairs. MethodAvg. Acc. (5 tasks)DetoxBPO", "In summary, contrastive pairs"),
        ("table7", {"vanilla": "Vanilla", "sadi": "SADI", "austeer_100_samples": "AUSteer(100-samplesearch)",
                    "austeer_full": "AUSteer(Fullsearch)"},
         "fast sweep on LLaMA2-7B-Chat MethodAvg. Acc. (5 tasks)DetoxBPO", "The optimal values of"),
    ],
)  # fmt: skip
def test_tables_5_and_7(name, labels, start, end):
    rows = printed(name)["llama2-7b-chat"]
    assert set(rows) == set(labels)
    text = "".join(label + spelled(rows[row], ("avg", "detox", "delta_win_rate")) for row, label in labels.items())
    assert text == between(start, end)


def test_tables_6_8_and_9():
    data = printed("table6")["llama2-7b-chat"]
    text = f"#ofcontrastivepairs{spelled(data['pairs'], TASKS, 'd')}Test{spelled(data['test'], TASKS, 'd')}"
    assert text == between("7 tasks. BoolQCOPAWinoGrandeSVAMPMAWPSDetoxBPO", "B.3PROMPTS")
    for name, symbol, end in (("table8", "α", "Table 9:"), ("table9", "k", "In summary, although")):
        assert list(printed(name)) == ["llama2-7b-chat", "gemma2-9b-it", "qwen3-8b"]
        text = "".join(spelled(rows["austeer"], TASKS, "d") for rows in printed(name).values())
        start = f"Optimal {symbol} for main experiments. BoolQCOPAWinograndeSVAMPMAWPSDetoxic.BPO"
        assert text == between(start, end)


def test_table_10():
    text = "".join(
        f"{MODELS[model]}Vanilla{spelled(rows['vanilla'], TASKS[:3])}AUSteer{spelled(rows['austeer'], TASKS[:3])}"
        for model, rows in printed("table10").items()
    )
    assert text == between("larger LLMs. ModelMethodBoolQCOPAWinoG", "HANALYZING")


def minutes(seconds: int) -> str:
    return f"{seconds // 60}min{seconds % 60:02d}sec"


def test_table_11_with_both_memories():
    of = printed("table11")
    labels = {"vanilla": "VanillaLLM", "iti": "ITI", "sadi": "SADI", "austeer": "AUSteer(Ours)"}
    text = ""
    for row, label in labels.items():
        one = of["gemma2-9b-it"][row]
        learning = f"{one['prepare_gb']}GB{minutes(one['prepare_s'])}" if "prepare_s" in one else "–"
        text += f"{label}{learning}{one['gb']}GB{minutes(one['inference_s'])}"
        text += f"{one['s_per_sample']:.2f}s/sample∆{one['std']:g}"
    assert text == between("LatencyStability", "For the computational cost on larger")
    vanilla, austeer = (of["llama3.3-70b-instruct-4bit"][row] for row in ("vanilla", "austeer"))
    text = (
        f"{austeer['prepare_gb']}GBofGPUmemoryandaround{austeer['prepare_s'] / 60:g}minutes.Duringinference,thevanillaLLMrequires"
        f"{vanilla['gb']}GBofGPUmemoryand{minutes(vanilla['inference_s'])}torunalltestsamples,whileAUSteerrequires"
        f"{austeer['gb']}GBand{minutes(austeer['inference_s'])}."
    )
    assert text == between("using 1000 contrastive pairs, AUS- teer requires", "These empirical results")
    assert set(vanilla) == {"gb", "inference_s"} and set(austeer) == {"prepare_gb", "prepare_s", "gb", "inference_s"}


def test_tables_12_and_13():
    values = printed("table12")["llama2-7b-chat"]["austeer"]
    numbers = "".join(f"{value:.1f}" for value in values.values())
    text = "".join(values).replace("0<100", "0(vanilla)<100", 1) + f"Accuracy(%){numbers}"
    assert text == between("in LLaMA2-7B-Chat. # of AUs", "Overall, our experiments")
    labels = {"vanilla": "Vanilla", "suppression": "Suppression", "promotion": "Promotion(AUSteer,ours)"}
    rows = printed("table13")["llama2-7b-chat"]
    text = "".join(
        f"{label}{rows[row]['boolq']:.2f}{rows[row]['copa']:.1f}{rows[row]['winogrande']:.2f}"
        for row, label in labels.items()
    )
    assert set(rows) == set(labels)
    assert text == between(
        "Results of suppressing AUs. MethodBoolQCOPAWinoG.".replace("Results", "results"), "Theoretical"
    )


def test_figure_2_and_the_blocks_and_dimensions_of_figures_2_and_6_to_8():
    head, *same = printed("figure2")["llama2-7b-chat"].values()
    assert all(one == head for one in same)
    sentence = between("at the 27th layer. The orig- inal model achieves", "% accuracy")
    assert sentence == f"{head['vanilla']:.2f}"
    rest = between("% accuracy, ITI reaches", "Steering individual")
    assert rest == f"{head['ITI']:.2f}%,andSADIachieves{head['SADI']:.2f}%."
    assert between("steering the 84th dimension alone achieves", "%") == f"{head['dimension 84']:.2f}"

    caption = re.compile(
        r"Steeringresultsfor(?:the)?(?:(\d+)(?:st|nd|rd|th)attention|FFN)output(?:in|at)(?:layer)?(\d+)[a-z.]*"
        r"PositiveCombination:[^(]*\(([\d,]+)\)\.Mixed[^(]*\(([\d,]+)\)"
    )
    captions = set(caption.findall(paper()))
    panels = [panel for name in (2, 6, 7, 8) for panel in spec(f"figure{name}").panels]
    own = [panel for panel in panels if "if the paper counts from 0" not in panel.name]
    assert len(captions) == len(own) == 5
    for panel in own:
        params, dims = panel.params, panel.params["paper_dims"]
        number = "" if params["head"] is None else str(counted(params["head"]))
        lists = (",".join(map(str, dims[key])) for key in ("positive", "mixed"))
        assert (number, str(counted(params["layer"])), *lists) in captions, panel.name


def test_names_of_blocks_are_those_of_their_params():
    assert [ordinal(index) for index in (0, 1, 2, 3, 10, 11, 12, 20, 26, 110)] == [
        "1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "27th", "111th",
    ]  # fmt: skip
    for scale in ("embedded", "small", "paper"):
        for panel in (panel for name in (2, 6, 7, 8) for panel in specs.read(scale, [f"figure{name}"])[0].panels):
            assert place(panel.params) in panel.name


def test_figure_3():
    (panel,) = spec("figure3").panels
    numbers = "".join(f"{value:.3f}" for row in panel.printed for value in row)
    strengths = "".join(map(str, panel.params["strengths"]))
    assert [len(row) for row in panel.printed] == [3] * len(panel.params["strengths"])
    start = "".join(f"[AUs{a},AU{'s' * both}{b}]" for a, b, both in ((44, 44, 0), (84, 84, 0), (44, 84, 1)))
    assert f"{strengths}Strength{numbers}" == between(start, "0.000.250.50")
    assert panel.params["dims"] == [44, 84]


def test_figure_4():
    (panel,) = spec("figure4").panels
    assert [int(dim) for dim in panel.printed] == panel.params["dims"] == [44, 84, 100]
    tokens = "".join(token for of_dim in panel.printed.values() for token in of_dim)
    assert [len(of_dim) for of_dim in panel.printed.values()] == [5, 5, 5]
    assert tokens == re.sub("['′]", "", between("(high low) AU 44 AU 84 AU 100", "Decoded top-k tokens"))
    assert between("The answer to input prompt is “", "”") == panel.params["answer"]


def test_figure_10():
    table, text = spec("figure10"), ""
    for column, fields in table.columns.items():
        grid = table.printed["gemma2-9b-it"]["austeer-ffn"][column]
        axes = "".join(f"{value:g}" for value in (*fields["alphas"], *fields["ks"]))
        text += f"{axes}k{''.join(f'{value:.2f}' for row in grid for value in row)}{fields['task'].upper()}"
    assert text == between("CHYPERPARAMETER SENSITIVITY", "608092.5")


def test_figure_12():
    by_panel = {panel.name: panel.printed for panel in spec("figure12").panels}
    assert not by_panel["causal momentum"], "the paper has none"
    kept = by_panel["activation momentum"]
    start = "Characteristics of AUs in MHA and FFN. EAU OVERLAP ACROSS TASKS"
    axes, text = "1234567" * 2, ""
    for site, caption in (
        ("attention", "(a)OverlapofidentifiedAUsintheMHA"),
        ("ffn", "(b)OverlapofidentifiedAUsintheFFN"),
    ):
        assert [len(row) for row in kept[site]] == list(range(1, 8))
        values = "".join(f"{value:.1f}" for row in kept[site] for value in row)
        text += f"{axes}{values}{caption}ofGemma2-9B-itacrossdifferenttasks."
    assert text == between(start, "Figure 12:")


def test_numbers_stand_beside_their_own_model_only():
    for scale, checkpoints in (("embedded", None), ("paper", {"google/gemma-2-9b-it": "a folder"})):
        for one in specs.read(scale, checkpoints=checkpoints):
            assert not one.printed and not any(panel.printed for panel in one.panels)
    (small,) = specs.read("small", ["figure12"])
    assert not any(panel.printed for panel in small.panels), "Llama's panels have the names of Gemma's"
