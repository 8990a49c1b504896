"""Turn a YAML file and dotted overrides into a :class:`Config`, or into one clear line that says what is wrong."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from megamoe.config.schema import Config
from megamoe.core.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without numbers in base 60, as in YAML 1.2: 24:00:00 is a time limit, not 86400."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, re.compile(r"(?!.*:)" + known.pattern, known.flags) if tag.endswith((":int", ":float")) else known)
            for tag, known in resolvers]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}  # fmt: skip
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read ``path`` and apply ``KEY=VALUE`` overrides in order; of two for one key, the last wins.

    Raises:
        UserError: the file cannot be read, a key is unknown, or a value does not fit.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {path}: cannot be read ({error})") from error
    try:
        tree = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise UserError(f"config {path}: not valid YAML ({where})") from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"config {path}: must be a mapping of sections (run, model, ...), not a {type(tree).__name__}")
    for override in overrides:
        _apply(tree, override)
    return parse_config(tree, source=str(path))


def parse_config(tree: dict[str, Any], source: str) -> Config:
    """Validate a nested mapping; errors call it ``source``."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"config {source}: {'; '.join(_explain(error))}") from None


def dump_config(config: Config) -> str:
    """Return the resolved config as YAML that :func:`load_config` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all settings."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from known_keys(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{field.alias or name}"


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: write it as KEY=VALUE, for example train.steps=100")
    try:
        value = yaml.load(text, _Loader) if text else None
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not valid YAML ({' '.join(str(error).split())})") from None
    if isinstance(value, str) and _EXPONENT.fullmatch(value):  # YAML 1.1 reads 1e-3 as text
        value = float(value)
    *sections, last = key.split(".")
    node = tree
    for section in sections:
        if node.get(section) is None:
            node[section] = {}
        node = node[section]
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {section} is a value, not a section{_nearest(key)}")
    node[last] = value


def _explain(error: ValidationError) -> Iterator[str]:
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            yield f"unknown key {key}{_nearest(key)}"
        else:
            message = item["msg"].removeprefix("Value error, ")
            given = item["input"]
            shown = f", not {given!r}" if not isinstance(given, dict | BaseModel) else ""
            yield f"{key}: {message}{shown}" if key else f"{message}"


def _nearest(key: str) -> str:
    keys = list(known_keys())
    sections = sorted({k.rsplit(".", n)[0] for k in keys for n in range(1, k.count(".") + 1)})
    near = difflib.get_close_matches(key, keys + sections, n=1, cutoff=0.5)
    if not near:
        last = difflib.get_close_matches(key.split(".")[-1], [k.split(".")[-1] for k in keys], n=1, cutoff=0.6)
        near = [k for k in keys if last and k.endswith(last[0])][:1]
    return f"; did you mean {near[0]}?" if near else ""
