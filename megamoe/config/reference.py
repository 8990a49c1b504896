"""Generate the reference page of all settings: ``python -m megamoe.config.reference > docs/config.md``."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel

from megamoe.config.schema import Config

_HEAD = """# Settings

Generated from `megamoe/config/` by `python -m megamoe.config.reference > docs/config.md`; do not edit. Each key is
written in the YAML file or on the command line as `KEY=VALUE`.
"""


def reference_page() -> str:
    """Return Markdown with one table per section: key, default and meaning."""
    return "\n".join([_HEAD, *_section(Config, "")])


def _section(model: type[BaseModel], prefix: str) -> Iterator[str]:
    values = [(name, field) for name, field in model.model_fields.items() if not _is_section(field.annotation)]
    if values:
        summary = " ".join((model.__doc__ or "").split())
        yield f"## {prefix.rstrip('.')}\n\n{summary}\n\n| key | default | meaning |\n| --- | --- | --- |"
        for name, field in values:
            meaning = (field.description or "").replace("|", "\\|")
            yield f"| `{prefix}{field.alias or name}` | `{_shown(field.default)}` | {meaning} |"
        yield ""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _section(kind, f"{prefix}{name}.")


def _is_section(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _shown(default: object) -> str:
    if isinstance(default, tuple):
        default = list(default)
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return str(default)


if __name__ == "__main__":
    print(reference_page(), end="")
