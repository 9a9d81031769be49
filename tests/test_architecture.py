"""The plan of the house holds: imports run one way, each room has its tests, each test says what it expects."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def modules(folder):
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in sorted(folder.rglob("*.py"))}


SOURCES, TESTS, BENCHMARKS = modules(ROOT / "src/secateur"), modules(ROOT / "tests"), modules(ROOT / "benchmarks")

OF_NO_ROOM = {  # tests that mirror no module, and what they are of
    "test_architecture": "the house itself",
    "test_public": "the names of the package",
    "test_docs": "the code blocks of README and docs/",
    "test_gpu": "what CUDA does, in several rooms",
    "test_torch_path": "every kernel replaced by torch",
    "storage/test_fuzz": "mutated files, through every reader",
    "storage/test_golden": "files of earlier versions, through every reader",
}


def order():
    """The one list of rooms, in CONTRIBUTING.md: each imports only what stands before it."""
    block = re.search(r"only what stands before it:\n\n((?: {4}.*\n)+)", (ROOT / "CONTRIBUTING.md").read_text())[1]
    wing, rooms = "", []
    for word in block.split():
        if word.endswith("/"):
            wing = word.removeprefix("./")
        else:
            rooms.append(wing + word)
    return rooms


def nodes(file, kind):
    return (node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, kind))


def imported(file):
    """Dotted names that a file imports, also inside functions; `from a import b` may mean either a.b or a."""
    for node in nodes(file, ast.Import | ast.ImportFrom):
        if isinstance(node, ast.Import):
            yield from ((alias.name, alias.name) for alias in node.names)
        else:
            yield from ((f"{node.module}.{alias.name}", str(node.module)) for alias in node.names)


def rooms_of(file):
    """The modules of the package that a file imports."""
    for names in imported(file):
        places = ["/".join(name.split(".")[1:]) for name in names if name.split(".")[0] == "secateur"]
        for place in places:
            found = place if place in SOURCES else f"{place}/__init__".removeprefix("/")
            if found in SOURCES:
                yield found
                break


ARROWS = {name: set(rooms_of(file)) for name, file in SOURCES.items()}
ROOMS = {name for name in SOURCES if not name.endswith("__init__") or ARROWS[name]}  # others are folders, not rooms


def test_the_list_names_each_room_once():
    assert sorted(order()) == sorted(ROOMS), "a new module goes into the list of CONTRIBUTING.md, at its place"


@pytest.mark.parametrize("name", sorted(ROOMS))
def test_no_import_runs_upwards(name):
    place = {room: i for i, room in enumerate(order())}
    upwards = sorted(found for found in ARROWS[name] & ROOMS if place[found] >= place[name])
    assert upwards == [], f"{name} imports what stands after it"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_import_nothing_from_tests(name):
    helpers = {Path(test).name for test in TESTS}
    found = {base.split(".")[0] for base, _ in imported(BENCHMARKS[name])}
    assert found & (helpers | {"tests"}) == set()


def mirrors(test, room):
    """tests/a/test_b.py and tests/a/test_b_topic.py mirror a/b.py."""
    folder, _, name = room.rpartition("/")
    return re.fullmatch(rf"{re.escape(folder and folder + '/')}test_{name}(_\w+)?", test) is not None


@pytest.mark.parametrize("room", sorted(name for name in ROOMS if not Path(name).name.startswith("__")))
def test_each_room_has_its_tests(room):
    assert any(mirrors(test, room) for test in TESTS), f"tests/{room} is missing"


@pytest.mark.parametrize("test", sorted(test for test in TESTS if Path(test).name.startswith("test_")))
def test_no_test_file_is_without_a_room(test):
    assert test.startswith("acceptance/") or test in OF_NO_ROOM or any(mirrors(test, room) for room in ROOMS)


def test_the_exceptions_are_there():
    assert set(OF_NO_ROOM) <= set(TESTS)


@pytest.mark.parametrize("test", sorted(TESTS))
def test_a_test_file_can_be_read_in_one_sitting(test):
    assert len(TESTS[test].read_text().splitlines()) <= 600, "split it by topic: test_b_topic.py"


@pytest.mark.parametrize("test", sorted(TESTS))
def test_each_error_is_expected_with_its_remedy(test):
    calls = (call for call in nodes(TESTS[test], ast.Call) if isinstance(call.func, ast.Attribute))
    asked = [
        call for call in calls if call.func.attr in ("raises", "warns") and ast.unparse(call.func.value) == "pytest"
    ]
    bare = [call.lineno for call in asked if not any(keyword.arg == "match" for keyword in call.keywords)]
    assert bare == [], "pytest.raises(..., match=) names what to do"
