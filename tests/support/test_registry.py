"""secateur.support.registry: a choice is written once, and known wherever one may choose."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur as sc
from secateur import allocation, feedback, patterns, regrow, schedules, scores, structure
from secateur.errors import InputError
from secateur.storage import Recipe, prune_checkpoint
from secateur.support.registry import Registry

PAGES = {
    "pruning.md": [
        scores.SCORES,
        allocation.ALLOCATIONS,
        patterns.PATTERNS,
        schedules.SCHEDULES,
        regrow.REGROWTHS,
        feedback.FEEDBACKS,
    ],
    "shrinking.md": [structure.CRITERIA, structure.ALLOCATIONS],
}
TABLES = [(page, registry) for page, registries in PAGES.items() for registry in registries]


@pytest.mark.parametrize(("page", "registry"), TABLES, ids=lambda one: getattr(one, "kind", one))
def test_the_table_of_the_docs_is_that_of_the_registry(page, registry):
    text = (Path(__file__).parents[2] / "docs" / page).read_text()
    assert registry.markdown() in text, f"put this table into docs/{page}:\n\n{registry.markdown()}"


def test_a_score_of_ones_own():
    @scores.score("largest", source="nobody 2026, eq. 1")
    def largest(name, weight):
        """-abs(w): large weights go first."""
        return -weight.abs()

    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 9.0]])
    assert sc.prune(model, 0.5, score="largest")["weight"].tolist() == [[True, False]]
    with pytest.raises(InputError, match=r"no score named 'larges': choose magnitude, .*, largest, or a function"):
        sc.prune(model, 0.5, score="larges")
    assert "| `largest` | -abs(w): large weights go first | nobody 2026, eq. 1 |" in str(scores.SCORES)


def test_a_score_that_holds_a_state_is_made_anew_each_time():
    @scores.score("gradients")
    def gradients():
        return scores.GradientScore("gradients", lambda w, g: g.abs())

    one, other = scores.resolve("gradients"), scores.resolve("gradients")
    assert one is not other
    model = nn.Linear(3, 2)
    fed = sc.accumulate(model, [torch.ones(1, 3)], lambda model, x: model(x).sum(), score="gradients")
    assert sc.prune(model, 0.5, score=fed).pruned == 3
    with pytest.raises(InputError, match=r"choose taylor, snip, movement, fisher, gradients$"):
        sc.accumulate(model, [], lambda model, x: x, score="magnitude")


def test_a_name_that_says_too_little():
    with pytest.raises(
        InputError, match=r"needs more than its name: write score=sc\.scores\.synflow\(model, example_in"
    ):
        sc.prune(nn.Linear(3, 3), 0.5, score="synflow")


def test_an_allocation_of_ones_own(tmp_path):
    @allocation.allocation("first", source="nobody 2026", shapes_only=True)
    def first(weights, count):
        """All from the first."""
        return {name: count if i == 0 else 0 for i, name in enumerate(weights)}

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert sc.prune(model, 0.25, allocation="first").counts() == {"0.weight": 8, "1.weight": 0}
    assert first(min_keep=12).most(16) == 4
    with pytest.raises(InputError, match="choose global, uniform, erk, lamp, first, or a function"):
        sc.prune(model, 0.25, allocation="second")
    torch.save({"a": torch.rand(4, 4) + 1, "b": torch.rand(4, 4) + 1}, tmp_path / "m.pt")
    found = prune_checkpoint(tmp_path / "m.pt", None, Recipe(0.25, "first"))
    assert [t.zeros for t in found.tensors] == [8, 0]
    with pytest.raises(InputError, match=r"for files: choose global, uniform, erk, first$"):
        prune_checkpoint(tmp_path / "m.pt", None, Recipe(0.25, "lamp"))
    assert "| `first` | All from the first | nobody 2026 |" in str(allocation.ALLOCATIONS)


def test_an_allocation_can_be_pickled():
    import pickle

    for name in allocation.ALLOCATIONS:
        made = allocation.resolve(name)
        assert pickle.loads(pickle.dumps(made)) == made


def test_a_schedule_of_ones_own():
    @schedules.schedule("late")
    def late(p, s):
        """s p^4: late."""
        return s * p**4

    pruner = sc.Pruner(nn.Linear(10, 10), 0.5, schedule=late(0, 2))
    pruner.step()
    assert pruner.masks.pruned == 3
    assert schedules.Schedule("late", 0, 2) == late(0, 2)
    with pytest.raises(
        InputError, match=r"no schedule named 'soon': choose one_shot, .*, late, or a function of the step"
    ):
        sc.Pruner(nn.Linear(3, 3), 0.5, schedule="soon")
    assert "| `late` | s p^4: late |  |" in str(schedules.SCHEDULES)


def test_a_pattern_of_ones_own():
    @patterns.pattern("outputs")
    class outputs(patterns.lines):
        """Rows by another name."""

        def __init__(self):
            super().__init__(0)

    model = nn.Linear(4, 4)
    assert sc.prune(model, 0.5, pattern="outputs")["weight"].any(1).sum() == 2
    with pytest.raises(InputError, match=r"no pattern named 'inputs': choose free, .*, outputs, or an object"):
        sc.prune(model, 0.5, pattern="inputs")
    assert "`outputs`" in str(patterns.PATTERNS)


def test_the_help_of_the_command_line_lists_what_files_take():
    code = (
        "from secateur import allocation\n"
        "@allocation.allocation('first', shapes_only=True)\n"
        "def first(weights, count): return {}\n"
        "from secateur.cli import main; import sys; sys.argv = ['secateur', 'prune', '--help']; main()"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"COLUMNS": "200"}).stdout
    assert "global, uniform, erk, first" in shown
    assert "free, 2:4, rows" in shown


def test_a_name_is_taken_once_but_a_cell_may_run_again():
    registry = Registry("thing", "another")

    def one():
        """First."""

    registry.add("a", one)
    registry.add("a", one)
    with pytest.raises(InputError, match="a thing named 'a' exists already: register yours under another name"):
        registry.add("a", print)
    assert re.search("thing: a", repr(registry))
    assert list(registry) == ["a"]
    assert registry["a"].meaning == "First"
