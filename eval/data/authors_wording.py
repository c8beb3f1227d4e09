"""The wording of the authors' prompts, read out of their utils/load_dataset.py without running it.

Their repository has no licence file, so the templates are not passed on here: users take them from their own copy.
The file is parsed, and each loader's assignments are followed in order with texts as values: a field of a row becomes a
placeholder such as {passage}, named as eval/data/rows.py names it. Anything else than the few shapes known here is an error.
"""

from __future__ import annotations

import ast
import hashlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from austeer.errors import AUSteerError

LONGEST = 20_000  # of a template: theirs have hundreds of characters
FILE_LIMIT = 2_000_000
# what their code reads from a row -> our name of it
STORY = ("sent1", "sent2", "sent3", "sent4", "ending1", "ending2", "label")
FIELDS: dict[str, dict[tuple, str]] = {
    "boolq": {(name,): name for name in ("question", "passage", "answer")},
    "copa": {(0,): "label", (2,): "premise", (3,): "question", (4,): "choice1", (5,): "choice2"},
    "winogrande": {(name,): name for name in ("sentence", "option1", "option2", "answer")},
    "storycloze": {(at,): name for at, name in enumerate(STORY, 1)},
    "svamp": {("Body",): "body", ("Question",): "question", ("Answer",): "answer"},
    "mawps": {(name,): name for name in ("question", "answer")},
    "gsm8k": {(name,): name for name in ("question", "answer")},
    "toxicity": {("prompt",): "prompt", ("prompt", "text"): "prompt", ("continuation", "text"): "continuation"},
    "bpo": {(name,): name for name in ("prompt", "good_res", "bad_res")},
}
LOADERS = {name: f"load_{'toxic' if name == 'toxicity' else name}" for name in FIELDS}
OPTIONS = {  # the placeholder that chooses the right answer, and its values in our order
    "boolq": ("{answer}", ("False", "True")),
    "copa": ("{label}", (0, 1)),
    "winogrande": ("{answer}", ("1", "2")),
    "storycloze": ("{label}", (1, 2)),
}


@dataclass
class Choice:
    """An answer that depends on the label."""

    of: str
    texts: dict = field(default_factory=dict)


@dataclass
class Missing:
    """The stand-in for a wrong answer that equals the right one."""

    text: str


class Shape(Exception):
    """Code of a shape that is not known here: (node, what)."""


def read_wording(path: str | Path) -> dict:
    path = Path(path)
    try:
        data = path.read_bytes()
        if len(data) > FILE_LIMIT:
            raise AUSteerError(f"{path} is over {FILE_LIMIT // 10**6} MB long: it is not the authors' load_dataset.py")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # their "\," is no escape, which Python warns of
            tree = ast.parse(data)
        defined = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        wording = {"source": f"authors: utils/load_dataset.py, sha256 {hashlib.sha256(data).hexdigest()[:12]}"}
        for task, name in LOADERS.items():
            if name not in defined:
                raise AUSteerError(f"{path} has no function {name}: it is not the authors' file, or a later one")
            try:
                wording[task] = _wording(task, defined[name])
            except Shape as error:
                node, what = error.args
                raise AUSteerError(f"{path}, line {node.lineno}, in {name}: {what}; its wording was not read") from None
        return wording
    except OSError as error:
        raise AUSteerError(f"cannot read {path}: {error.strerror}") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, AUSteerError):
            raise
        raise AUSteerError(f"{path} is not the Python file expected ({type(error).__name__})") from None


def _wording(task: str, loader: ast.FunctionDef) -> dict:
    reader = _Reader(task)
    reader.block(loader.body)
    found = {}
    for split in ("train", "test"):
        samples = reader.samples.get(split) or reader.samples.get("both")
        if not samples:
            raise Shape(loader, f"nothing of the form {split}_data.append([prompt, right, wrong])")
        node, values = samples[0]
        if len(samples) > 1:
            raise Shape(samples[1][0], f"a second form of {split} samples")
        found[split] = _sample(task, split, node, values)
    return found


def _sample(task: str, split: str, node: ast.AST, values: list) -> dict:
    prompt, right, wrong = values
    kinds = {value if value is None else type(value).__name__ for value in (right, wrong)}
    if not isinstance(prompt, str):
        raise Shape(node, "the prompt is not a text of constants and fields")
    if task in OPTIONS:
        of, labels = OPTIONS[task]
        if kinds != {"Choice"} or {right.of, wrong.of} != {of} or set(right.texts) != set(labels):
            raise Shape(node, f"the answers do not depend on {of} being {' or '.join(map(repr, labels))}")
        options = [right.texts[label] for label in labels]
        if [wrong.texts.get(label) for label in labels] != options[::-1]:
            raise Shape(node, "the wrong answer is not the other label's right one")
        return {"prompt": prompt, "options": options}
    if task in ("svamp", "mawps", "gsm8k"):
        if not isinstance(right, str) or not isinstance(wrong, Missing):
            raise Shape(node, "no right answer, or no stand-in for a wrong one that equals it")
        return {"prompt": prompt, "answer": right, "missing": wrong.text}
    if task == "toxicity" and split == "test":
        return {"prompt": prompt}  # its answers are blanks that nothing reads
    if kinds != {"str"}:
        raise Shape(node, "the answers are not texts of constants and fields")
    return {"prompt": prompt, "positive": right, "negative": wrong}


class _Reader:
    """Follows one loader. `values` holds what is known of a variable; of all others nothing is."""

    def __init__(self, task: str):
        self.fields = FIELDS[task]
        self.values: dict[str, str | Choice | Missing] = {}
        self.lists: dict[str, str] = {}  # lists of texts -> their element
        self.samples: dict[str, list[tuple[ast.AST, list]]] = {}
        self.inner = False  # in a nested function, which makes both splits

    def block(self, body: Sequence[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef):
                outside, self.values, self.inner = self.values, {}, True
                self.block(node.body)
                self.values, self.inner = outside, False
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    self.assign(target, node.value)
            elif isinstance(node, ast.For):
                self.loop(node)
                self.block(node.body)
            elif isinstance(node, ast.With):
                self.block(node.body)
            elif isinstance(node, ast.If):
                self.branch(node)
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                self.append(node.value)
            elif isinstance(node, ast.AugAssign):
                self.set(node.target, self.joined([node.target, node.value]) if isinstance(node.op, ast.Add) else None)
            elif not isinstance(node, ast.Expr | ast.Return | ast.Break | ast.Continue | ast.Pass):
                raise Shape(node, f"{type(node).__name__} where the authors have none")

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple):
            if not isinstance(value, ast.Tuple) or len(value.elts) != len(target.elts):
                value = ast.Tuple(elts=[ast.Constant(None)] * len(target.elts))
            texts = [self.text(one) for one in value.elts]
            for name, text in zip(target.elts, texts, strict=True):
                self.set(name, text)
        else:
            self.set(target, self.text(value))

    def set(self, target: ast.expr, value: str | Choice | Missing | None) -> None:
        if isinstance(target, ast.Name):
            self.values.pop(target.id, None)
            if value is not None:
                self.values[target.id] = value

    def loop(self, node: ast.For) -> None:
        """for x in texts, and for x, y in zip(texts, texts): the loop's variables are the lists' elements."""
        targets = node.target.elts if isinstance(node.target, ast.Tuple) else [node.target]
        is_zip = isinstance(node.iter, ast.Call) and isinstance(node.iter.func, ast.Name) and node.iter.func.id == "zip"
        lists = node.iter.args if is_zip else [node.iter]
        for at, target in enumerate(targets):
            source = lists[at] if at < len(lists) else None
            self.set(target, self.lists.get(source.id) if isinstance(source, ast.Name) else None)

    def branch(self, node: ast.If) -> None:
        test = node.test
        if not isinstance(test, ast.Compare) or not isinstance(test.ops[0], ast.Eq) or len(test.ops) != 1:
            before = dict(self.values)
            self.block(node.body)
            self.block(node.orelse)
            self.check_unchanged(node, before)
            return
        left, right = test.left, test.comparators[0]
        if isinstance(left, ast.Name) and isinstance(right, ast.Name):  # if wrong == right: wrong = "  "
            before = dict(self.values)
            self.block(node.body)
            if isinstance(self.values.get(left.id), str) and left.id not in before and not node.orelse:
                before[left.id] = self.values[left.id] = Missing(self.values[left.id])
            self.check_unchanged(node, before)
            return
        of = self.text(left)
        if not isinstance(of, str) or not isinstance(right, ast.Constant):
            raise Shape(node, "a test that is not of a field against a constant")
        before = dict(self.values)
        self.block(node.body)
        chosen = {name: text for name, text in self.values.items() if before.get(name) is not text}
        self.values = before
        self.block(node.orelse)
        for name, text in chosen.items():
            if not isinstance(text, str):
                raise Shape(node, f"{name} is not a constant text")
            other = self.values.get(name)
            texts = other.texts if isinstance(other, Choice) and other.of == of and node.orelse else {}
            self.values[name] = Choice(of, {right.value: text, **texts})

    def check_unchanged(self, node: ast.If, before: dict) -> None:
        for name, value in self.values.items():
            if before.get(name) is not value:
                raise Shape(node, f"{name} is a known text only under a condition")

    def append(self, call: ast.Call) -> None:
        if not isinstance(call.func, ast.Attribute) or call.func.attr != "append" or len(call.args) != 1:
            return
        target, element = call.func.value, call.args[0]
        if not isinstance(target, ast.Name):
            return
        if isinstance(element, ast.List) and len(element.elts) == 3:
            split = "both" if self.inner else target.id.removesuffix("_data")
            values = [self.text(one) for one in element.elts]
            self.samples.setdefault(split, []).append((element, values))
        elif isinstance(text := self.text(element), str):
            self.lists[target.id] = text

    def text(self, node: ast.expr) -> str | Choice | Missing | None:
        """The text that an expression makes, with placeholders for fields; None if it is none of the known shapes."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.search(r"\{\w+\}", node.value):
                raise Shape(node, "a text that looks like a placeholder")
            return node.value
        if isinstance(node, ast.Name):
            return self.values.get(node.id)
        if isinstance(node, ast.Subscript):
            return self.field(node)
        if isinstance(node, ast.JoinedStr):
            return self.joined(node.values)
        if isinstance(node, ast.FormattedValue) and node.conversion == -1 and node.format_spec is None:
            return self.text(node.value)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self.joined([node.left, node.right])
        if isinstance(node, ast.Call):
            return self.call(node)
        return None

    def joined(self, nodes: Sequence[ast.expr]) -> str | None:
        parts = [self.text(node) for node in nodes]
        if not all(isinstance(part, str) for part in parts):
            return None
        if sum(map(len, parts)) > LONGEST:
            raise Shape(nodes[0], f"a text of over {LONGEST} characters")
        return "".join(parts)

    def call(self, node: ast.Call) -> str | Choice | Missing | None:
        """str(x), int(x) and x.strip() leave a placeholder what it is."""
        if isinstance(node.func, ast.Name) and node.func.id in ("str", "int") and len(node.args) == 1:
            return self.text(node.args[0])
        if isinstance(node.func, ast.Attribute) and node.func.attr == "strip" and not node.args:
            inner = self.text(node.func.value)
            return inner.strip() if isinstance(inner, str) else inner
        return None

    def field(self, node: ast.Subscript) -> str | None:
        keys, base = [], node
        while isinstance(base, ast.Subscript):
            if not isinstance(base.slice, ast.Constant):
                return None
            keys.insert(0, base.slice.value)
            base = base.value
        if not isinstance(base, ast.Name) or base.id in self.values:
            return None
        name = self.fields.get(tuple(keys))
        return f"{{{name}}}" if name else None
