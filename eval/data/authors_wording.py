"""Slice the wording of the authors' prompts out of their utils/load_dataset.py, without running it.

Their repository has no licence file, so the templates are not passed on here: users take them from their own copy. Each
loader appends [prompt, right, wrong]; these are traced back through its assignments to constants, and to fields of a row,
which become placeholders such as {passage}. If the loaders are not the known ones, a note asks the user to check.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
import warnings
from pathlib import Path

from austeer.errors import AUSteerError

# the loaders' lines of code at commit d657387
KNOWN = "634fc28984cb44db9ff82001d3aa99f05f4ef0cb411ad259e7ab3032aa43cea9"
LONGEST = 20_000  # characters of a template: theirs have hundreds
STORY = ("sent1", "sent2", "sent3", "sent4", "ending1", "ending2", "label")
# the source text of what a loader reads from a row -> the name of our field
FIELDS = {
    "boolq": {f"line['{name}']": name for name in ("question", "passage", "answer")},
    "copa": {f"line[{at}]": name for at, name in enumerate(("label", "", "premise", "question", "choice1", "choice2"))},
    "winogrande": {f"line['{name}']": name for name in ("sentence", "option1", "option2", "answer")},
    "storycloze": {f"line[{at}]": name for at, name in enumerate(STORY, 1)},
    "svamp": {"i['Body']": "body", "i['Question']": "question", "i['Answer']": "answer"},
    "mawps": {f"i['{name}']": name for name in ("question", "answer")},
    "gsm8k": {f"i['{name}']": name for name in ("question", "answer")},
    "toxicity": {"x": "prompt", "y": "continuation", "xx": "prompt"},  # elements of lists made beforehand
    "bpo": {f"i['{name}']": name for name in ("prompt", "good_res", "bad_res")},
}
LABELS = {"boolq": ("False", "True"), "copa": (0, 1), "winogrande": ("1", "2"), "storycloze": (1, 2)}  # in our order


class Shape(Exception):
    """Report code of a shape that is not known here: (node, what)."""


def read_wording(path: str | Path) -> dict:
    path = Path(path)
    try:
        data = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # their "\," is not an escape, and Python warns about it
            tree = ast.parse(data)
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        wording = {"source": f"authors: utils/load_dataset.py, sha256 {hashlib.sha256(data).hexdigest()[:12]}"}
        code = hashlib.sha256()
        for task in FIELDS:
            name = f"load_{'toxic' if task == 'toxicity' else task}"
            if name not in functions:
                raise AUSteerError(f"{path} has no function {name}: it is not the authors' file, or a later one")
            try:
                wording[task] = _Loader(task, functions[name]).wording()
            except Shape as error:
                node, what = error.args
                raise AUSteerError(f"{path}, line {node.lineno}, in {name}: {what}; its wording was not read") from None
            code.update(_code(data, functions[name]))
    except OSError as error:
        raise AUSteerError(f"cannot read {path}: {error.strerror}") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, AUSteerError):
            raise
        raise AUSteerError(f"{path} is not the Python file expected ({type(error).__name__})") from None
    if code.hexdigest() != KNOWN:
        print(
            f"note: the loaders in {path} are not those of the authors' commit d657387; check the prompts read from them",
            file=sys.stderr,
        )
    return wording


def _code(data: bytes, function: ast.FunctionDef) -> bytes:
    """Return the lines of a function without comments, blank lines and indentation, which may differ."""
    lines = map(bytes.strip, data.splitlines()[function.lineno - 1 : function.end_lineno])
    return b"\n".join(line for line in lines if line and not line.startswith(b"#")) + b"\n"


class _Loader:
    def __init__(self, task: str, function: ast.FunctionDef):
        self.task, self.function, self.fields = task, function, FIELDS[task]
        nodes = sorted((node for node in ast.walk(function) if hasattr(node, "lineno")), key=lambda node: node.lineno)
        self.samples = [
            node.args[0]
            for node in nodes
            if isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith(".append")
            and isinstance(node.args[0], ast.List)
            and len(node.args[0].elts) == 3
        ]
        self.choices = [node for node in nodes if isinstance(node, ast.If) and isinstance(node.test, ast.Compare)]
        # by variable, what is assigned to it, and in which line
        self.values: dict[str, list[tuple[int, ast.expr]]] = {}
        for node in nodes:
            if isinstance(node, ast.Assign):
                self._assign(node.targets[0], node.value)
            elif isinstance(node, ast.AugAssign):
                self._assign(node.target, ast.BinOp(node.target, node.op, node.value, lineno=node.lineno))

    def wording(self) -> dict:
        if not self.samples:
            raise Shape(self.function, "nothing of the form train_data.append([prompt, right, wrong])")
        train, test = self.samples[0], self.samples[-1]
        return {"train": self._form(train, None), "test": self._form(test, train if test is not train else None)}

    def _form(self, sample: ast.List, before: ast.List | None) -> dict:
        prompt, right, wrong = sample.elts
        form = {"prompt": self._text(prompt, sample.lineno, "the prompt")}
        if self.task in LABELS:
            return {**form, "options": self._options(sample, before.lineno if before else 0)}
        if self.task in ("svamp", "mawps", "gsm8k"):
            form["answer"] = self._text(right, sample.lineno, "the right answer")
            return {**form, "missing": self._text(wrong, sample.lineno, "the stand-in for a wrong answer")}
        if self.task == "toxicity" and before is not None:
            return form  # the answers of its test are blanks that nothing reads
        form["positive"] = self._text(right, sample.lineno, "the right answer")
        return {**form, "negative": self._text(wrong, sample.lineno, "the wrong answer")}

    def _options(self, sample: ast.List, after: int) -> list[str]:
        """Return the right answers by label, from `if label == ...: right, wrong = ...` in front of the sample."""
        texts = {}
        for node in self.choices:
            label = node.test.comparators[0]
            if after < node.lineno < sample.lineno and isinstance(label, ast.Constant):
                pair = node.body[0].value.elts if isinstance(node.body[0], ast.Assign) else []
                texts[label.value] = [getattr(text, "value", None) for text in pair]
        first, second = (texts.get(label) for label in LABELS[self.task])
        if not first or first != second[::-1] or not all(isinstance(text, str) for text in first):
            labels = " or ".join(map(repr, LABELS[self.task]))
            raise Shape(sample, f"the answers are not two texts that change places with the label {labels}")
        return [first[0], second[0]]

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        both = (target, value) if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) else None
        for name, part in zip(*(tuple_.elts for tuple_ in both), strict=False) if both else [(target, value)]:
            self.values.setdefault(ast.unparse(name), []).append((target.lineno, part))

    def _text(self, node: ast.expr, line: int, what: str) -> str:
        """Return the text of an expression at this line, with placeholders for fields."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.search(r"\{\w+\}", node.value):
                raise Shape(node, "a text that looks like a placeholder")
            return node.value
        if isinstance(node, ast.JoinedStr | ast.BinOp):
            parts = node.values if isinstance(node, ast.JoinedStr) else (node.left, node.right)
            text = "".join(self._text(part, line, what) for part in parts)
            if len(text) > LONGEST:
                raise Shape(node, f"a text of over {LONGEST} characters")
            return text
        if isinstance(node, ast.FormattedValue) and node.conversion == -1 and node.format_spec is None:
            return self._text(node.value, line, what)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("str", "int") and len(node.args) == 1:
            return self._text(node.args[0], line, what)  # a placeholder stays what it is
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "strip":
            return self._text(node.func.value, line, what)
        source = ast.unparse(node)
        earlier = [(at, value) for at, value in self.values.get(source, ()) if at < line]
        if isinstance(node, ast.Name) and earlier:
            return self._text(earlier[-1][1], earlier[-1][0], what)
        if self.fields.get(source):
            return f"{{{self.fields[source]}}}"
        raise Shape(node, f"{what} is not a text of constants and fields")
