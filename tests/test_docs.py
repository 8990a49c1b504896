"""The docs name what exists: files, folders, modules, commands, options, settings, links; and their tables can be read."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner

from megamoe.cli import megamoe
from megamoe.config import known_keys
from megamoe.core import exit_status

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "tests/README.md"], key=lambda page: page.relative_to(ROOT)
)
GENERATED = {ROOT / "docs/config.md"}  # from the config, with its own words
LONGEST_CELL = 2 * 124  # characters: two lines of source
FOLDERS = "benchmarks|configs|data_tools|docs|launcher|megamoe|slurm|tests"
# `megamoe/data/{a,b}` and the like are patterns; what begins with a slash or a dot is somebody else's path.
PATH = re.compile(rf"(?<![\w./-])((?:{FOLDERS})(?:/[\w.-]*\w)+)")
TESTS = re.compile(r"`(test_\w+\.py)`")
MODULE = re.compile(r"(?<!-c )python(?:3)? -m ([\w.]+)")
MAKE = re.compile(r"`make ([a-z]+)(?: [A-Z]+=\S+)?`|^make ([a-z]+)(?=$|  )", re.M)
SECTIONS = "run|model|parallel|data|train|optim|checkpoint|metrics|launch"
SETTING = re.compile(rf"`((?:{SECTIONS})\.[a-z_.]+[a-z])(?:=[^`]*)?`")
GROUPS = {"data", "launch", "checkpoint", "bench"}
NO_SETTINGS = {"data.md", "run.sh", "metrics.jsonl"}


def each_page() -> Iterator[object]:
    return (pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES)


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", without_code(page.read_text()), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def commands(text: str) -> Iterator[list[str]]:
    """The words of each `megamoe` command, in blocks of code and in the text."""
    for block in re.findall(r"^```(?:sh)?\n(.*?)^```$", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if match := re.match(r"(?:\$ )?(?:\.venv/bin/)?megamoe (.*)", line):
                yield shlex.split(match[1], comments=True)
    for inline in re.findall(r"`megamoe ([^`]+)`", without_code(text)):
        yield shlex.split(inline.replace("\n", " "))


@pytest.mark.parametrize("page", each_page())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("page", each_page())
def test_paths_of_the_repository_exist(page: Path) -> None:
    text = page.read_text()
    missing = [path for path in PATH.findall(text) if not (ROOT / path).exists() and not is_ignored(path)]
    names = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert not missing and not set(TESTS.findall(text)) - names


def is_ignored(path: str) -> bool:
    """What a command of the docs makes, and git ignores."""
    return path.startswith(("benchmarks/gpu/.pack", "benchmarks/.data"))


@pytest.mark.parametrize("page", each_page())
def test_modules_and_make_targets_exist(page: Path) -> None:
    text = page.read_text()
    for module in MODULE.findall(text):
        assert find_spec(module) is not None, module
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {first or second for first, second in MAKE.findall(text)} <= targets


@pytest.mark.parametrize("page", each_page())
def test_commands_and_their_options_exist(page: Path) -> None:
    for words in commands(page.read_text()):
        for verbs in verbs_of(words):
            shown = CliRunner().invoke(megamoe, [*verbs, "--help"])
            assert shown.exit_code == 0, words
            for option in (word.partition("=")[0] for word in words if word.startswith("--")):
                assert re.search(rf"{option}\b", shown.output), (words, option)


def verbs_of(words: list[str]) -> list[list[str]]:
    """The verbs that a command names: one, or several as in `megamoe checkpoint ls|verify`."""
    size = 2 if words[0] in GROUPS else 1
    names = [word.split("|") for word in words[:size] if re.fullmatch(r"[a-z]+(\|[a-z]+)*", word)]
    return [list(verbs) for verbs in itertools.product(*names)]


@pytest.mark.parametrize("page", each_page())
def test_settings_exist(page: Path) -> None:
    keys = set(known_keys())
    sections = {key.rsplit(".", n)[0] for key in keys for n in range(1, key.count(".") + 1)}
    found = {name for name in SETTING.findall(page.read_text()) if name not in NO_SETTINGS}
    assert found <= keys | sections


@pytest.mark.parametrize("page", [page for page in PAGES if page not in GENERATED], ids=lambda page: page.stem)
def test_cells_of_tables_can_be_read(page: Path) -> None:
    for line in page.read_text().splitlines():
        if line.startswith("|"):
            assert all(len(cell.strip()) <= LONGEST_CELL for cell in line.split("|")), line


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text()
    for page in ROOT.glob("docs/**/*.md"):
        assert page.name == "README.md" or f"({page.relative_to(ROOT / 'docs')})" in index, page


def test_each_room_of_the_house_is_in_the_architecture_and_those_of_the_trainer_in_the_readme() -> None:
    page, readme = (ROOT / "docs/architecture.md").read_text(), (ROOT / "README.md").read_text()
    for package in ("megamoe", "launcher", "data_tools"):
        rooms = [path.parent.name for path in (ROOT / package).glob("*/__init__.py")]
        assert rooms and not [room for room in rooms if f"{package}/{room}" not in page]
        assert package != "megamoe" or not [room for room in rooms if f"\n  {room}/ " not in readme]


def test_each_exit_status_is_in_the_table_of_faults() -> None:
    rows = re.findall(r"^\| (\d+) \|", (ROOT / "docs/faults.md").read_text(), re.M)
    statuses = {int(value) for name, value in vars(exit_status).items() if name.isupper() and isinstance(value, int)}
    assert statuses | {0} == {int(row) for row in rows}
