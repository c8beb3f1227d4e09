"""Find every method by name. A new method is a file in this folder with a tuple METHODS; no table is edited."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import austeer.methods
from austeer.errors import AUSteerError
from austeer.methods.base import Method


def _listed(name: str) -> list:
    """Collect a tuple of this name from all files of the folder, AUSteer's own file first."""
    files = sorted(
        (file.name for file in pkgutil.iter_modules(austeer.methods.__path__)), key=lambda f: (f != "austeer", f)
    )
    modules = [importlib.import_module(f"austeer.methods.{file}") for file in files if file != "registry"]
    return [method for module in modules for method in getattr(module, name, ())]


METHODS: dict[str, Method] = {method.name: method for method in _listed("METHODS")}
OWN_COMMAND: dict[str, type[Method]] = {method.name: method for method in _listed("OWN_COMMAND")}
# the methods that `python main.py` compares
DEFAULT = ("random", "flipped", "published", "sign-aware", "causal")


def with_options(name: str, options: dict[str, str]) -> Method:
    """Build a method with these options, given as text: {"readout": "answer"}."""
    method, values = METHODS[name], options_of(name)
    for key, text in options.items():
        if key not in values:
            choice = f"its options are {', '.join(values)}" if values else "it takes none"
            raise AUSteerError(f"{name} has no option {key!r}; {choice}")
        values[key] = _as_type(type(values[key]), text, f"{name}.{key}")
    return type(method)(**values) if options else method


def options_of(name: str) -> dict[str, object]:
    """Return the options of a method with their values."""
    method = METHODS[name]
    return {key: getattr(method, key) for key in inspect.signature(type(method)).parameters if hasattr(method, key)}


def _as_type(kind: type, text: str, what: str) -> object:
    if kind is bool:
        if text.lower() not in ("yes", "no", "true", "false"):
            raise AUSteerError(f"{what} must be yes or no, not {text!r}")
        return text.lower() in ("yes", "true")
    if kind not in (int, float):
        return text
    try:
        return kind(text)
    except ValueError:
        raise AUSteerError(f"{what} must be a number, not {text!r}") from None
