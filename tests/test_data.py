"""The paper's data sets: every layout, wrong files, fetching, checking, and the import of the authors' files."""

import hashlib
import http.server
import json
import re
import threading
import zipfile

import pytest
import torch
from conftest import SHARED, needs_shared

from austeer.errors import AUSteerError
from austeer.files import write_json_lines
from austeer.ranks import AURanks
from eval.data import command as data_command
from eval.data import fetching, import_authors
from eval.data import read as data
from eval.data.authors_wording import read_wording
from eval.tasks.options import StoryCloze
from eval.tasks.registry import PAPER_TASKS

CATALOGUE = data.read_catalogue()
STORY = 'St. Ann bakes.\tShe "burns" it.\tShe cries.\tBen comes.\tThey eat.\tThey fly.'


def read_rows(task, *place, **more):
    return data.read_rows(PAPER_TASKS[task], *place, **more)


def lines(*objects):
    return "".join(json.dumps(one) + "\n" for one in objects)


def toxic(text, challenging, score, continuation=" more"):
    scores = {"text": continuation, "toxicity": 0.9, "threat": 0.1}
    return {"challenging": challenging, "prompt": {"text": text, "toxicity": score}, "continuation": scores, "begin": 3}


BOOLQ = {"question": " is it ", "passage": "It\u2028 is.", "answer": True}
COPA = {"premise": "It rained, hard.", "question": "effect", "choice1": " wet", "choice2": "dry", "label": 0}
WINO = {"sentence": "A _ b.", "option1": "x", "option2": "y", "answer": "2", "qID": ""}
STORY_ROW = {**dict(zip(StoryCloze.keys, ("Ann bakes.", *STORY.split("\t")[1:]), strict=True)), "label": 2}
SVAMP = {"body": "Two pens", "question": "How many?", "answer": 145.0}
MATH = {"question": "2 and 4?", "answer": "2 + 4 = 6 #### 6"}
TOXIC = {
    "prompt": "You",
    "prompt_toxicity": 0.05,
    "continuation": " more",
    "continuation_toxicity": 0.9,
    "challenging": False,
}
BARE = {
    "prompt": "You!",
    "prompt_toxicity": None,
    "continuation": "",
    "continuation_toxicity": None,
    "challenging": True,
}
BPO = {"prompt": "Write.", "good_res": "ok", "bad_res": ""}
CSV_ROW = '0,7,"It rained, hard.",effect, wet,dry\n'
LAYOUTS = [  # task, split, folder/file, its text, the row
    ("boolq", "train", "BoolQ/train.jsonl", "\ufeff" + json.dumps({**BOOLQ, "title": "t"}, ensure_ascii=False) + "\n\n", BOOLQ),
    ("boolq", "test", "boolq/dev.jsonl", lines(BOOLQ), BOOLQ),
    ("boolq", "test", "BOOLQ/val.jsonl", lines({"question": " is it ", "passage": "It\u2028 is.", "label": True}), BOOLQ),
    ("copa", "train", "copa/train.jsonl", lines({**COPA, "id": 1, "mirrored": False}), COPA),
    ("copa", "train", "COPA/train.csv", "label,id,premise,question,choice1,choice2\n" + CSV_ROW, COPA),
    ("copa", "test", "COPA/test.csv", "a,b,c,d,e,f\n" + CSV_ROW, COPA),
    ("copa", "test", "Copa/test.csv", CSV_ROW, COPA),
    ("copa", "train", "COPA/train.csv", 'question,choice1,choice2,premise,label\neffect, wet,dry,"It rained, hard.",0\n', COPA),
    ("winogrande", "train", "winogrande/train_m.jsonl", lines({**WINO, "qID": "q-1"}), {**WINO, "qID": "q-1"}),
    ("winogrande", "test", "winogrande/dev.jsonl", lines({k: v for k, v in WINO.items() if k != "qID"}), WINO),
    ("storycloze", "train", "StoryCloze/spring2016.val.en.tsv.split_20_80_train.tsv",
     "heading\nid1\t" + STORY.removeprefix("St. ") + "\t2\r\n", STORY_ROW),
    ("storycloze", "test", "storycloze/test.jsonl", lines(STORY_ROW), STORY_ROW),
    ("svamp", "train", "SVAMP/train.json", json.dumps([{"ID": "c", "Body": "Two pens", "Question": "How many?",
                                                        "Answer": 145.0}], indent=1), SVAMP),
    ("svamp", "test", "svamp/test.jsonl", lines({"Body": "Two pens", "Question": "How many?", "Answer": "145.0"}), SVAMP),
    ("mawps", "train", "mawps/train.jsonl", lines({"question": "2 and 4?", "answer": 6.0, "answer_steps": MATH["answer"]}), MATH),
    ("gsm8k", "test", "gsm8k/test.jsonl", lines(MATH), MATH),
    ("toxicity", "train", "RealToxicPrompts/prompts.jsonl", lines(toxic("x", True, 1), toxic("You", False, 0.05)), TOXIC),
    ("toxicity", "test", "RealToxicPrompts/prompts.jsonl", lines(toxic("x", False, 1), toxic("You", True, 0.05)),
     {**TOXIC, "challenging": True}),
    ("toxicity", "test", "realtoxicprompts/challenge_prompts.jsonl", lines({"prompt": "You!"}), BARE),
    ("bpo", "train", "BPO/train.json", json.dumps([{**BPO, "optimized_prompt": "z"}]), BPO),
    ("bpo", "test", "bpo/bpo_test.json", json.dumps([BPO]), BPO),
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_hub(monkeypatch, tmp_path_factory):
    """The repository's own datasets/ may hold what a user fetched; the hub's cache is nobody's business here."""
    import datasets

    empty = tmp_path_factory.mktemp("none")
    monkeypatch.setattr(data, "DATASETS", empty)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(empty / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def put(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(("task", "split", "name", "text", "row"), LAYOUTS, ids=range(len(LAYOUTS)))
def test_every_layout_gives_the_same_rows(tmp_path, task, split, name, text, row):
    put(tmp_path, name, text)
    found = read_rows(task, split, tmp_path)
    assert found == [row] and [type(v) for v in found[0].values()] == [type(v) for v in row.values()]
    write_json_lines(tmp_path / "again" / task / f"{split}.jsonl", found)
    assert read_rows(task, split, tmp_path / "again") == found


def test_parquet_as_the_authors_have_it(tmp_path):
    import pandas

    (tmp_path / "MAWPS").mkdir()
    pandas.DataFrame([MATH, MATH]).to_parquet(tmp_path / "MAWPS" / "train.parquet")
    assert read_rows("mawps", "train", tmp_path) == [MATH, MATH]
    whole = (tmp_path / "MAWPS" / "train.parquet").read_bytes()
    put(tmp_path, "MAWPS/train.parquet", whole[:-20] + b"\xff" * 12 + whole[-8:])
    with pytest.raises(AUSteerError, match=r"train\.parquet is damaged or not a Parquet file \(.+\)$"):
        read_rows("mawps", "train", tmp_path)
    put(tmp_path, "MAWPS/train.parquet", b"PAR1 no more")
    with pytest.raises(AUSteerError, match=r"train\.parquet is damaged or not a Parquet file"):
        read_rows("mawps", "train", tmp_path)


def test_layouts_cover_every_task():
    assert (
        set(CATALOGUE)
        == {task.data_of or name for name, task in PAPER_TASKS.items()}
        == {layout[0] for layout in LAYOUTS}
    )
    for name, entry in CATALOGUE.items():
        for split in data.SPLITS:
            source = entry["splits"][split]
            assert entry.get("by_hand") or source.get("hub") or source.get("url"), name
            revision = (source.get("hub") or {}).get("revision")
            assert revision is None or re.fullmatch("[0-9a-f]{40}", revision), name
            assert {f"{split}.jsonl", *source.get("sha256", {})} <= set(source["files"]), name  # what fetch writes
            assert not source.get("url") or source["url"].rsplit("/", 1)[-1] in source["files"], name


GOOD = lines(BOOLQ)


@pytest.mark.parametrize(
    ("task", "name", "text", "message"),
    [
        ("boolq", "boolq/train.jsonl", "", "holds no rows of the train split"),
        ("boolq", "boolq/train.jsonl", GOOD + "{oops\n", "line 2: not JSON"),
        ("boolq", "boolq/train.jsonl", GOOD + "[1]\n", "line 2: a list instead of an object"),
        ("boolq", "boolq/train.jsonl", GOOD.encode() + b'{"question": "\xff"}', r"line 2: not UTF-8 \(byte 14\)"),
        ("boolq", "boolq/train.jsonl", GOOD + '{"passage": "p", "answer": true}',
         r"line 2: no question \(fields there: passage, answer\)"),
        ("boolq", "boolq/train.jsonl", lines({**BOOLQ, "question": 3}), "line 1: question is int, not text"),
        ("boolq", "boolq/train.jsonl", lines({**BOOLQ, "question": " \n"}), "line 1: question is empty"),
        ("boolq", "boolq/train.jsonl", lines({**BOOLQ, "question": "\ud800"}), "question holds half a character"),
        ("boolq", "boolq/train.jsonl", lines({**BOOLQ, "answer": "yes"}), "answer is 'yes'; it must be true or false"),
        ("boolq", "boolq/train.jsonl", lines({**BOOLQ, "passage": "x" * 10_000_000}), "line 1: over 5 MB long"),
        ("bpo", "bpo/train.json", json.dumps([BPO, {**BPO, "good_res": "x" * 6_000_000}]), "row 2: good_res is over 5 MB"),
        ("bpo", "bpo/train.json", json.dumps([BPO])[:-1], r"train\.json: not JSON"),
        ("bpo", "bpo/train.json", "[" * 100_000, r"train\.json: (not JSON|JSON that no data set has)"),
        ("bpo", "bpo/train.json", json.dumps([BPO, {**BPO, "good_res": ""}]), "row 2: good_res is empty"),
        ("copa", "copa/train.jsonl", lines({**COPA, "label": 2}), "label is '2'; it must be 0 or 1"),
        ("copa", "copa/train.jsonl", lines({**COPA, "label": True}), "label is 'True'; it must be 0 or 1"),
        ("copa", "copa/train.jsonl", lines({**COPA, "question": "why"}), "it must be cause or effect"),
        ("copa", "copa/train.csv", "h,h\n" + CSV_ROW + "0,1,2\n", "line 3: 3 columns instead of at least 6"),
        ("copa", "copa/train.csv", "label,premise\n0,p,q\n", "line 2: 3 columns, but the heading has 2"),
        ("copa", "copa/train.csv", 'x\n0,7,"open\n', "not CSV"),
        ("winogrande", "winogrande/train.jsonl", lines({**WINO, "answer": ""}), "answer is ''; it must be 1 or 2"),
        ("storycloze", "storycloze/spring2016.val.en.tsv.split_20_80_train.tsv", "h\nid\ta\tb\n", "line 2: 3 columns instead of 8"),
        ("svamp", "svamp/train.json", json.dumps([{"Body": "b", "Question": "q", "Answer": "many"}]),
         "row 1: answer is 'many', not a number"),
        ("svamp", "svamp/train.json", '[{"Body": "b", "Question": "q", "Answer": NaN}]', "answer is 'nan', not a number"),
        ("gsm8k", "gsm8k/train.jsonl", lines({"question": "q", "answer": "6"}), "does not end in '#### number'"),
        ("toxicity", "toxicity/train.jsonl", lines({**toxic("t", False, 1), "challenging": 0}), "challenging is '0'"),
        ("toxicity", "toxicity/train.jsonl", lines(toxic("t", False, "high")), "prompt_toxicity is 'high', not a number"),
        ("toxicity", "toxicity/train.jsonl", lines(toxic("t", True, 1)), "holds no rows of the train split"),
        ("toxicity", "toxicity/train.jsonl", lines({"prompt": {"toxicity": 1}}), "no continuation"),
        ("boolq", "boolq/dev.jsonl", GOOD, r"boolq has no file of the train split \(train\.jsonl\)"),
    ],
    ids=lambda value: str(value)[:30].strip(),
)  # fmt: skip
def test_wrong_files_name_their_place(tmp_path, task, name, text, message):
    put(tmp_path, name, text)
    with pytest.raises(AUSteerError, match=message) as caught:
        read_rows(task, "train", tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_where_it_is_looked_for(tmp_path, monkeypatch):
    with pytest.raises(AUSteerError, match="no such folder of data sets"):
        read_rows("boolq", "train", tmp_path / "nowhere")
    own = data.DATASETS
    with pytest.raises(AUSteerError) as caught:
        read_rows("boolq", "train", tmp_path)
    for part in (str(tmp_path / "boolq"), str(own / "boolq"), "google/boolq at 35b264d03638", "data --fetch boolq"):
        assert part in str(caught.value)
    with pytest.raises(AUSteerError, match="on request only"):
        read_rows("storycloze", "train", tmp_path)
    put(own, "boolq/train.jsonl", GOOD)
    assert read_rows("boolq", "train", tmp_path) == [BOOLQ]
    put(tmp_path, "boolq/train.jsonl", lines({**BOOLQ, "question": "mine"}))
    assert read_rows("boolq", "train", tmp_path)[0]["question"] == "mine"


# checking


def check(capsys, *argv):
    code = data_command.main(["--check", *map(str, argv)])
    return code, capsys.readouterr().out


def test_check_counts_duplicates_and_overlap(tmp_path, capsys):
    other = {**BOOLQ, "passage": "Else."}
    put(tmp_path, "boolq/train.jsonl", lines(BOOLQ, BOOLQ, {**BOOLQ, "answer": False}, other))
    path = put(tmp_path, "boolq/dev.jsonl", lines(BOOLQ, {**BOOLQ, "question": "new"}))
    code, shown = check(capsys, "--data-dir", tmp_path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    assert re.search(r"boolq +train +train\.jsonl +4 +9427 +1000 +2 ", shown)
    assert re.search(rf"boolq +test +dev\.jsonl +2 +3270 +3270 +0 +1 +{digest}\n", shown)
    assert code == 0 and "missing: storycloze" in shown and "missing: copa" in shown
    assert check(capsys, "boolq", "--data-dir", tmp_path)[0] == 0
    code, shown = check(capsys, "boolq", "copa", "--data-dir", tmp_path)
    assert code == 1 and "missing: copa" in shown and "storycloze" not in shown
    path.write_text(GOOD + "{")
    code, shown = check(capsys, "--data-dir", tmp_path)
    assert code == 1 and "FAULT: " in shown and "line 2: not JSON" in shown
    path.unlink()
    code, shown = check(capsys, "--data-dir", tmp_path)
    assert code == 1 and "has no file of the test split" in shown and re.search("boolq +train", shown)
    with pytest.raises(AUSteerError, match="no task nope"):
        data_command.main(["--check", "nope"])


@needs_shared
def test_shared_data_count_as_its_own_check_counts(capsys):
    expected = {  # what ../shared/data/check.py prints: rows, duplicates
        "boolq": ((2000, 0), (3270, 0)), "copa": ((1000, 1), (500, 0)), "winogrande": ((640, 2), (1267, 0)),
        "svamp": ((700, 0), (300, 0)), "mawps": ((1417, 26), (355, 3)), "toxicity": ((1196, 0), (1196, 0)),
        "bpo": ((300, 0), (200, 0)), "gsm8k": ((2000, 0), (1319, 0)),
    }  # fmt: skip
    code, shown = check(capsys, "--data-dir", SHARED / "data")
    cells = [re.split("  +", line.strip()) for line in shown.splitlines()]
    found = {(cell[0], cell[1]): cell for cell in cells if len(cell) > 6}
    for task, counts in expected.items():
        for split, (rows_there, duplicates) in zip(data.SPLITS, counts, strict=True):
            cell = found[task, split]
            assert (int(cell[3]), int(cell[6])) == (rows_there, duplicates), (task, split)
        assert found[task, "test"][7] == "0"
    assert code == 0 and "missing: storycloze" in shown
    bpo = read_rows("bpo", "train", SHARED / "data")
    assert [at for at, row in enumerate(bpo) if not row["bad_res"]] == [6, 77]
    assert sum(row["continuation_toxicity"] is None for row in read_rows("toxicity", "test", SHARED / "data")) == 12


# fetching


@pytest.fixture
def server():
    """A real server of bytes by path; `cut` breaks connections off after so many bytes."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.seen.append(self.path)
            content = self.server.files.get(self.path)
            if content is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: self.server.cut.pop(0) if self.server.cut else None])

        def log_message(self, *args):
            pass

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.files, served.seen, served.cut = {}, [], []
    served.url = f"http://127.0.0.1:{served.server_port}"
    thread = threading.Thread(target=served.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield served
    served.shutdown()
    served.server_close()


BYTES = bytes(range(256)) * 2000
DIGEST = hashlib.sha256(BYTES).hexdigest()


def test_a_download_that_breaks_off_leaves_nothing(server, tmp_path):
    server.files["/a"] = BYTES
    server.cut = [100_000]
    with pytest.raises(AUSteerError, match=r"cannot fetch .*/a into .*IncompleteRead.*; run the same command"):
        fetching.download(f"{server.url}/a", tmp_path / "a", DIGEST)
    assert not list(tmp_path.iterdir())
    fetching.download(f"{server.url}/a", tmp_path / "a", DIGEST)
    assert (tmp_path / "a").read_bytes() == BYTES


def test_wrong_hashes_and_missing_files_are_not_kept(server, tmp_path):
    server.files["/a"] = BYTES
    with pytest.raises(AUSteerError, match=f"has SHA-256 {DIGEST[:12]}..., not 000"):
        fetching.download(f"{server.url}/a", tmp_path / "a", "0" * 64)
    with pytest.raises(AUSteerError, match="HTTP Error 404"):
        fetching.download(f"{server.url}/none", tmp_path / "n", DIGEST)
    server.shutdown()
    server.server_close()
    with pytest.raises(AUSteerError, match=r"cannot fetch http://127.*refused.*run the same command"):
        fetching.download(f"{server.url}/a", tmp_path / "a", DIGEST)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def mirror(server, tmp_path):
    """A catalogue of a URL task, a hub task (a local folder in the hub's place), one by hand, and one that is gone."""
    hub = tmp_path / "hub"
    put(hub, "train.jsonl", lines(*[{**BOOLQ, "question": f"q{at}"} for at in range(5)]))
    put(hub, "validation.jsonl", lines(BOOLQ))
    test = lines(MATH, {**MATH, "question": "?"}).encode()
    server.files = {"/train.jsonl": lines(MATH).encode(), "/test.jsonl": test}
    made = {name: json.loads(json.dumps(CATALOGUE[name])) for name in ("gsm8k", "mawps", "boolq", "storycloze")}
    for split, theirs in (("train", "train"), ("test", "validation")):
        made["gsm8k"]["splits"][split] |= {"url": f"{server.url}/{split}.jsonl", "sha256": {}}
        made["boolq"]["splits"][split]["hub"] |= {"id": str(hub), "split": theirs}
        made["mawps"]["splits"][split]["hub"] |= {"id": str(tmp_path / "gone")}
    made["gsm8k"]["splits"]["test"]["sha256"] = {"test.jsonl": hashlib.sha256(test).hexdigest()}
    path = put(tmp_path, "catalogue.json", json.dumps(made))
    return ["--catalogue", str(path), "--data-dir", str(tmp_path / "data")]


def test_fetch_end_to_end_and_again(server, mirror, tmp_path, capsys):
    assert data_command.main(["--fetch", *mirror]) == 1
    shown = capsys.readouterr().out
    assert "train: 5 rows, train.jsonl, from " in shown and "test: 2 rows, test.jsonl, from http" in shown
    assert "by hand: StoryCloze is given out on request only" in shown
    assert "train: FAILED: the hub gave no " in shown and "failed: mawps train, mawps test." in shown
    folder = tmp_path / "data"
    assert (folder / "gsm8k" / "test.jsonl").read_bytes() == server.files["/test.jsonl"]
    assert read_rows("boolq", "train", folder)[4] == {**BOOLQ, "question": "q4"}
    assert data_command.main(["--check", *mirror]) == 0
    assert re.search(r"gsm8k +test .* official\n", capsys.readouterr().out)

    server.seen.clear()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.jsonl")}
    assert data_command.main(["--fetch", "gsm8k", "boolq", *mirror]) == 0
    assert capsys.readouterr().out.count("already there") == 4 and not server.seen
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*.jsonl")}

    (folder / "gsm8k" / "test.jsonl").write_text(lines(MATH))  # changed behind our back
    assert data_command.main(["--fetch", "gsm8k", *mirror]) == 1
    assert "move it away first" in capsys.readouterr().out and read_rows("gsm8k", "test", folder) == [MATH]
    (folder / "gsm8k" / "test.jsonl").unlink()
    assert data_command.main(["--fetch", "gsm8k", *mirror]) == 0
    assert len(read_rows("gsm8k", "test", folder)) == 2


def test_fetch_keeps_ones_own_files(server, mirror, tmp_path, capsys):
    mine = put(tmp_path / "data", "GSM8K/train.jsonl", lines({**MATH, "question": "mine"}))
    assert data_command.main(["--fetch", "gsm8k", *mirror]) == 0
    assert "your own file" in capsys.readouterr().out and "mine" in mine.read_text()
    assert server.seen == ["/test.jsonl"]


def test_the_hub_is_read_where_there_are_no_files(mirror):
    catalogue = data.read_catalogue(mirror[1])
    assert len(read_rows("boolq", "train", catalogue=catalogue)) == 5
    assert read_rows("boolq", "test", catalogue=catalogue) == [BOOLQ]
    with pytest.raises(AUSteerError, match=r"gone at main \(not pinned\).*data --fetch mawps"):
        read_rows("mawps", "train", catalogue=catalogue)


def test_the_hub_is_asked_for_the_pinned_revision(monkeypatch):
    import datasets

    class Table:
        def to_list(self):
            return [WINO]

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **more: asked.append((args, more)) or Table())
    assert read_rows("winogrande", "test") == [WINO]
    revision = "01e74176c63542e6b0bcb004dcdea22d94fb67b5"
    assert asked == [(("allenai/winogrande", "winogrande_m"), {"split": "validation", "revision": revision})]


# the authors' files


def choice_loader(name, fields, prompt, answers, labels, test_answers=None):
    """A loader of the authors' shape for a task with two options; every text is ours."""

    def half(split, answers):
        (first, second), (one, two) = answers, labels
        of = "int(label)" if isinstance(one, int) else "answer"
        return f"""
    with open(f"./datasets/{name}/{split}", "r", encoding="utf-8") as g:
        lines = g.readlines()
    lines = lines[1:]
    for ind in range(len(lines)):
        line = json.loads(lines[ind])
        {fields}
        {prompt}
        if {of} == {two!r}:
            cor_answer, wro_answer = {second!r}, {first!r}
        elif {of} == {one!r}:
            cor_answer, wro_answer = {first!r}, {second!r}
        {split}_data.append([prompt, cor_answer, wro_answer])
"""

    body = half("train", answers) + half("test", test_answers or answers)
    return f"def load_{name}():\n    train_data, test_data = [], []{body}    return train_data, test_data\n\n"


def math_loader(name, question, right, blank):
    return f"""def load_{name}():
    def load_each(path):
        data = []
        with open(path) as f:
            lines = json.load(f)
            if len(lines) > 1000:
                lines = lines[:1000]
            all_right = []
            for i in lines:
                all_right.append({right})
            near = [all_right[i] for i in np.argmax(cosine(all_right), axis=1)]
            for idx, i in enumerate(lines):
                {question}
                corr = {right}
                wrong = near[idx]
                if wrong == corr:
                    wrong = {blank!r}
                data.append([question, corr, wrong])
        return data

    train_data = load_each('./datasets/{name}/train.json')
    test_data = load_each('./datasets/{name}/test.json')
    return train_data, test_data

"""


SOURCE = (
    "import json\n"
    + choice_loader("boolq", "question, passage, answer = line['question'].strip(), line['passage'].strip(), str(line['answer']).strip()",
                    "prompt = f\"Text: {passage}\\nAsk: {question}?\\nSay:\"", ("Nay", "Yea"), ("False", "True"), (" nay", " yea"))
    + choice_loader("copa", "label,premise,question,choice1,choice2 = line[0].strip(),line[2].strip(),line[3].strip(),line[4].strip(),line[5].strip()",
                    "prompt = f'{premise} The {question}? 1:{choice1} 2:{choice2}\\n'", ("one", "two"), (0, 1))
    + choice_loader("winogrande", "question, option1, option2, answer = line['sentence'].strip(), line['option1'].strip(), line['option2'].strip(), \\\n        line['answer'].strip()",
                    "prompt = f\"Fill: {question} {option1}|{option2}\"", ("L", "R"), ("1", "2"))
    + choice_loader("storycloze", "sent1, sent2, sent3, sent4, quiz1, quiz2, label = line[1], line[2], line[3], line[4], line[5], line[6], line[7]\n"
                    "        sents = sent1 + ' ' + sent2 + ' ' + sent3 + ' ' + sent4",
                    "prompt = f'{sents}\\nThen {quiz1} or {quiz2}?'", ("L", "R"), (1, 2))
    + math_loader("svamp", "question = i[\"Body\"] + \" \" + i[\"Question\"]\n                question = f\"Sum: {question}\\n=\"",
                  "str(i['Answer'])", "  ")
    + math_loader("mawps", "question = \"Steps, then \\\"####\\\".\" + \"\\nQ: \" + i['question'] + \"\\nA: \" +'\\n'", "i['answer']", "   ")
    + math_loader("gsm8k", "question = \"Steps {!\" + i['question']", "i['answer']", "    ")
    + """
safe = []
def load_toxic():
    data = []
    with open("c.jsonl") as f:
        for line in f:
            data.append(json.loads(line))
    challenge = []
    for i in data:
        challenge.append(i['prompt'])
    all_prompts = []
    all_answers = []
    count = 0
    with open("p.jsonl") as f:
        for line in f:
            data = json.loads(line)
            prompt = data['prompt']['text']
            score = data['prompt']['toxicity']
            answer = data['continuation']['text']
            if prompt not in challenge and score is not None:
                if score < 0.1:
                    all_prompts.append(prompt)
                    all_answers.append(answer)
                    count += 1
            if count >= 1000:
                break
    train_data = []
    for x, y in zip(all_prompts,all_answers):
        x = "Be kind.\\n" + x
        train_data.append([x,"\\nNo, I would rather not.",'\\n'+y])
    test_data = []
    for xx in challenge:
        xx = "Say\\," + xx + '\\n\\nNow:'
        test_data.append([xx,'   ','    '])
    return train_data, test_data

def load_bpo():
    def load_json(path):
        with open(path) as f:
            data = json.load(f)
        samples = []
        for i in data[:1000]:
            prompt = i['prompt']
            corr = i['good_res']
            wrong = i['bad_res']
            samples.append([prompt, corr, wrong])
        return samples
    return load_json('a'), load_json('b')
"""
)  # fmt: skip


def both(**form):
    return {"train": form, "test": form}


WORDING = {
    "boolq": {
        "train": {"prompt": "Text: {passage}\nAsk: {question}?\nSay:", "options": ["Nay", "Yea"]},
        "test": {"prompt": "Text: {passage}\nAsk: {question}?\nSay:", "options": [" nay", " yea"]},
    },
    "copa": both(prompt="{premise} The {question}? 1:{choice1} 2:{choice2}\n", options=["one", "two"]),
    "winogrande": both(prompt="Fill: {sentence} {option1}|{option2}", options=["L", "R"]),
    "storycloze": both(prompt="{sent1} {sent2} {sent3} {sent4}\nThen {ending1} or {ending2}?", options=["L", "R"]),
    "svamp": both(prompt="Sum: {body} {question}\n=", answer="{answer}", missing="  "),
    "mawps": both(prompt='Steps, then "####".\nQ: {question}\nA: \n', answer="{answer}", missing="   "),
    "gsm8k": both(prompt="Steps {!{question}", answer="{answer}", missing="    "),
    "toxicity": {
        "train": {"prompt": "Be kind.\n{prompt}", "positive": "\nNo, I would rather not.", "negative": "\n{continuation}"},
        "test": {"prompt": "Say\\,{prompt}\n\nNow:"},
    },
    "bpo": both(prompt="{prompt}", positive="{good_res}", negative="{bad_res}"),
}  # fmt: skip


def test_wording_is_read_and_nothing_is_run(tmp_path, capsys):
    owned = tmp_path / "owned"
    hostile = f"open({str(owned)!r}, 'w').write('x')\n"
    trap = "@print(open({0!r}, 'w'))\ndef trap(x=open({0!r}, 'w')):\n    pass\n".format(str(owned))
    path = put(tmp_path, "load_dataset.py", hostile + trap + SOURCE + hostile)
    found = read_wording(path)
    assert not owned.exists() and "check the prompts read from them" in capsys.readouterr().err  # not the authors' file
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    assert found.pop("source") == f"authors: utils/load_dataset.py, sha256 {digest}"
    assert found == WORDING
    for task, forms in found.items():  # a filler finds every placeholder among our fields
        row = next(row for name, *_, row in LAYOUTS if name == task)
        for text in re.findall(r"\{(\w+)\}", json.dumps(forms)):
            assert text in row, (task, text)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def load_copa", "def load_copa2", "has no function load_copa: it is not the authors' file, or a later one"),
        ("{premise} The", "{premise!r} The", r"line \d+, in load_copa: the prompt is not a text"),
        ("line[2].strip()", "line[9].strip()", "in load_copa: the prompt is not a text of constants and fields"),
        ("elif answer == 'False'", "elif answer == 'Never'", "in load_boolq: the answers are not two texts that change places"),
        ("cor_answer, wro_answer = 'one', 'two'", "cor_answer, wro_answer = 'one', 'three'", "in load_copa: the answers are not two texts"),
        ("samples.append([prompt, corr, wrong])", "samples.extend([prompt])", "in load_bpo: nothing of the form"),
        ("samples.append([prompt, corr, wrong])", "samples.append([prompt, corr, wrong[0]])", "in load_bpo: the wrong answer is not a text"),
        ("wrong = '   '", "corr = 'x'", "in load_mawps: the stand-in for a wrong answer is not a text"),
        ('"Steps {!"', '"Steps {it}"', "in load_gsm8k: a text that looks like a placeholder"),
        ("def load_bpo", "def load_bpo(", r"is not the Python file expected \(SyntaxError\)"),
        ("            prompt = i['prompt']\n", "            prompt = 'ab'\n" + "            prompt = prompt + prompt\n" * 15,
         "in load_bpo: a text of over 20000 characters"),
    ],
    ids=lambda value: str(value)[:30].strip(),
)  # fmt: skip
def test_changed_shapes_are_errors_that_name_function_and_line(tmp_path, old, new, message):
    assert old in SOURCE
    path = put(tmp_path, "load_dataset.py", SOURCE.replace(old, new))
    with pytest.raises(AUSteerError, match=message) as caught:
        read_wording(path)
    assert "\n" not in str(caught.value)


def test_text_added_to_a_prompt_is_not_lost(tmp_path):
    old = "            prompt = i['prompt']\n"
    path = put(tmp_path, "load_dataset.py", SOURCE.replace(old, old + "            prompt += ' Go.'\n"))
    assert read_wording(path)["bpo"]["train"]["prompt"] == "{prompt} Go."


def test_hopeless_files(tmp_path):
    for text in ("x = " + "(" * 5000, "\x00", "x = " + "-" * 200_000 + "1", "#" * 3_000_000):
        with pytest.raises(AUSteerError, match=r"load_dataset\.py"):
            read_wording(put(tmp_path, "load_dataset.py", text))
    with pytest.raises(AUSteerError, match="cannot read"):
        read_wording(tmp_path / "none.py")


def rank_files(folder):
    scores = [0.5, -0.25, 0.0, 1.0, -1.0, 0.125]
    AURanks.from_lists(scores, [0, 0, 0, 1, 1, 1], [[d, d + 1] for d in (0, 1, 2) * 2], "ffn").save_authors(folder)
    return scores


@pytest.mark.parametrize("archive", [None, "folder", "zip"])
def test_import_end_to_end(tmp_path, capsys, archive):
    checkout, out = tmp_path / "AUSteer", tmp_path / "out"
    put(checkout, "utils/load_dataset.py", SOURCE)
    base = checkout if archive is None else tmp_path / "drive"
    put(base, "datasets/BoolQ/train.jsonl", lines({**BOOLQ, "title": "t"}))
    put(base, "datasets/BoolQ/dev.jsonl", lines(BOOLQ))
    put(base, "datasets/COPA/train.csv", "label,id,premise,question,choice1,choice2\n" + CSV_ROW * 2)
    put(base, "datasets/COPA/test.csv", "h,h\n" + CSV_ROW)
    scores = rank_files(base / "AU_ranks" / "tiny_boolq_attention")
    argv = [str(checkout), "--out", str(out), "--ranks-out", str(tmp_path / "ranks")]
    if archive == "zip":
        with zipfile.ZipFile(tmp_path / "all.zip", "w") as file:
            for path in base.rglob("*.*"):
                file.write(path, f"drive/{path.relative_to(base)}")
            for name in ("../boolq/train.jsonl", "/../../AU_ranks/../all_scores.pt", "evil/run.py"):
                file.writestr(name, "{}" if name.endswith(".py") else lines({**BOOLQ, "question": "evil"}))
        argv += ["--archive", str(tmp_path / "all.zip")]
    elif archive:
        argv += ["--archive", str(base)]
    assert import_authors.main(argv) == 0
    shown = capsys.readouterr().out
    wording = json.loads((out / "wording.json").read_text())
    assert wording["copa"] == WORDING["copa"]
    assert read_rows("boolq", "train", out) == read_rows("boolq", "test", out) == [BOOLQ]
    assert read_rows("copa", "train", out) == [COPA, COPA]
    assert (out / "copa" / "test.jsonl").exists() and "missing: storycloze" in shown and "copa train: 2 rows" in shown
    ranks = AURanks.load(tmp_path / "ranks" / "tiny_boolq_attention.safetensors")
    assert ranks.site == "attention" and torch.equal(ranks.score.flatten(), torch.tensor(scores))
    assert not [path for path in tmp_path.rglob("run.py")]
    assert import_authors.main(argv) == 0  # again, over what is there


def test_import_says_what_failed_and_goes_on(tmp_path, capsys):
    checkout, out = tmp_path / "c", tmp_path / "out"
    put(checkout, "utils/load_dataset.py", SOURCE)
    put(checkout, "datasets/BoolQ/train.jsonl", "{")
    put(checkout, "datasets/BoolQ/dev.jsonl", lines(BOOLQ))
    put(checkout, "datasets/gsm8k/train.jsonl", lines(MATH))
    put(checkout, "datasets/gsm8k/test.jsonl", lines(MATH))
    own = put(out, "gsm8k/test.jsonl", lines(MATH))
    shadow = put(out, "boolq/dev.jsonl", lines(BOOLQ))
    rank_files(checkout / "AU_ranks" / "tiny_boolq_middle")
    rank_files(checkout / "AU_ranks" / "tiny_copa_ffn")
    torch.save({"a": 1}, checkout / "AU_ranks" / "tiny_copa_ffn" / "all_scores.pt")
    assert import_authors.main([str(checkout), "--out", str(out), "--ranks-out", str(tmp_path / "r")]) == 1
    shown = capsys.readouterr().out
    for part in (
        "train.jsonl, line 1: not JSON",
        f"{shadow} would be read instead",
        "does not end in a site",
        "tiny_copa_ffn",
    ):
        assert part in shown.split("FAILED", 1)[1], part
    assert "gsm8k train: 1 rows" in shown and own.exists() and not list((tmp_path / "r").glob("*"))
    with pytest.raises(AUSteerError, match=r"neither a folder nor a readable \.zip"):
        import_authors.main([str(checkout), "--out", str(out), "--archive", str(own)])


def test_an_import_does_not_eat_the_authors_files(tmp_path, capsys):
    checkout = tmp_path / "c"
    put(checkout, "utils/load_dataset.py", SOURCE)
    for split in ("train", "test"):
        put(checkout, f"datasets/gsm8k/{split}.jsonl", lines({**MATH, "extra": 1}))
    assert import_authors.main([str(checkout), "--out", str(checkout / "datasets"), "--ranks-out", str(tmp_path)]) == 1
    assert "extra" in (checkout / "datasets/gsm8k/train.jsonl").read_text() and "lost" in capsys.readouterr().out


def test_the_projects_own_wording_is_not_written_over(tmp_path):
    (tmp_path / "utils").mkdir()
    with pytest.raises(AUSteerError, match=r"choose another --out, and give it as --data-dir"):
        import_authors.main([str(tmp_path), "--out", str(import_authors.DATASETS)])


def test_check_sees_what_changed_since_it_was_fetched_and_an_empty_folder(tmp_path, capsys):
    assert data_command.main(["--check", "--data-dir", str(tmp_path)]) == 1
    assert "nothing to check in" in capsys.readouterr().out
    for name in ("train.jsonl", "test.jsonl"):
        put(tmp_path, f"gsm8k/{name}", lines(MATH))
    assert data_command.main(["--check", "--data-dir", str(tmp_path)]) == 0
    put(tmp_path, "gsm8k/fetched.json", json.dumps({"test.jsonl": {"sha256": "0" * 64}}))
    assert data_command.main(["--check", "--data-dir", str(tmp_path)]) == 1
    assert "has changed since it was fetched" in capsys.readouterr().out
