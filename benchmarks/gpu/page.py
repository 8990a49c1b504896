"""The page of a result: Markdown that a person reads in two minutes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.parts import PARTS


def page(result: dict[str, Any]) -> str:
    """Return the whole page; parts that did not end well say so and show the end of their log."""
    machine = result["parts"].get("machine", {}).get("figures", {})
    versions = machine.get("versions", {})
    lines = [
        f"# {machine.get('gpu', 'The CPU')}, {result['started'][:10]}",
        "",
        f"`python -m benchmarks.gpu --device {result['device']}{' --tiny' if result['tiny'] else ''}` at commit "
        f"{(result['commit'] or 'unknown')[:12]}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "",
    ]
    if result["tiny"]:
        lines += ["**Tiny sizes: the code was tried, the figures mean nothing.**", ""]
    lines += ["| part | ended | seconds | holds |", "| --- | --- | ---: | --- |"]
    for name, part in result["parts"].items():
        holds = {True: "yes", False: "**no**"}.get(part["figures"].get("holds"), "")
        lines.append(f"| {PARTS[name].about} | {part['ended']} | {part['seconds']:.0f} | {holds} |")
    for name, part in result["parts"].items():
        lines += ["", f"## {PARTS[name].about}", ""]
        lines += list(_figures(part["figures"]))
        if part["ended"] != "done":
            lines += ["", f"**{part['ended']}**", "", "```", part.get("log", "").strip()[-1500:], "```"]
    return "\n".join(lines) + "\n"


def _figures(figures: dict[str, Any]) -> Iterator[str]:
    for name, value in figures.items():
        if name == "holds":
            continue
        if isinstance(value, list) and value and isinstance(value[0], dict):
            keys = list(value[0])
            yield f"- {name}:"
            yield ""
            yield f"| {' | '.join(keys)} |"
            yield f"| {' | '.join('---' for _ in keys)} |"
            for row in value:
                yield f"| {' | '.join(_text(key, row[key]).replace('|', '/') for key in keys)} |"
            yield ""
        elif isinstance(value, dict):
            of = f"{name} " if name.startswith("seconds") else ""
            yield f"- **{name}**: " + "; ".join(f"{key} {_text(of + key, each)}" for key, each in value.items())
        else:
            yield f"- {name}: {_text(name, value)}"


def _text(name: str, value: Any) -> str:
    """A figure in the unit that its name says, rounded to what can be read."""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_text(f'{name} {key}', each)}" for key, each in value.items()) + ")"
    if isinstance(value, list):
        return "[" + ", ".join(_text(name, each) for each in value) + "]"
    if not isinstance(value, int | float):
        return str(value)
    if any(word in name for word in ("flops", "gemm")):
        return f"{value / 1e12:.4g} TFLOP/s"
    if "bytes_per_second" in name or name.startswith(("copy", "write")):
        return f"{value / 1e9:.4g} GB/s"
    if "bytes" in name:
        return f"{value / 1e9:.4g} GB"
    if name == "mfu" or "share" in name or name == "filled":
        return f"{value:.1%}"
    if "second" in name and "per_second" not in name:
        return f"{value * 1e3:.4g} ms"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
