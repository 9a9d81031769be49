"""The syntax tree of a function: only that of the source that runs."""

import ast
import functools
import importlib.util
import inspect

import pytest

from secateur.runtime import sources

TEXT = '''
import functools


def passed(function):
    @functools.wraps(function)
    def around(*args):
        return function(*args)

    return around


class Layer:
    @passed
    @passed
    def forward(self, x):
        """Shape."""
        y = self.first(x, -0.0)
        return [self.second(one) for one in y]

    def other(self, x): return x
    def another(self, x): return x
'''


@pytest.fixture
def layer(tmp_path):
    """A class in a file, and the file."""
    path = tmp_path / "layers_of_a_test.py"
    path.write_text(TEXT)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sources.tree.cache_clear()
    return module.Layer, path


def test_it_is_that_of_the_function(layer):
    kind, _ = layer
    tree = sources.tree(inspect.unwrap(kind.forward).__code__)
    assert isinstance(tree, ast.FunctionDef)
    assert (tree.name, len(tree.decorator_list), len(tree.body)) == ("forward", 2, 3)
    assert sources.tree(kind.other.__code__).name == "other"
    assert sources.tree(kind.another.__code__).name == "another"
    assert sources.tree(kind.forward.__code__).name == "around"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("self.first(x, -0.0)", "self.first(x, 0.0)"),
        ("self.first", "self.third"),
        ("self.second(one)", "self.second(two)"),
        ("self.first(x, -0.0)", "self.first(x,  -0.0)"),
        ("import functools\n", "import functools\n\n"),
        ("class Layer:", "class Layer"),
        ("def forward", "def backward"),
    ],
)
def test_a_file_that_has_changed_says_nothing(layer, old, new):
    kind, path = layer
    path.write_text(TEXT.replace(old, new, 1))
    code = inspect.unwrap(kind.forward).__code__
    assert sources.tree(code) is None


def test_what_has_no_source_has_no_tree():
    space = {}
    exec(compile("def f(x):\n    return x\n", "<nowhere>", "exec"), space)
    assert sources.tree(space["f"].__code__) is None
    assert sources.tree((lambda x: x).__code__) is None
    assert sources.tree(functools.wraps.__code__).name == "wraps"
