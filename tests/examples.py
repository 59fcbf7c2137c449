"""Examples in docstrings."""

import doctest
from types import ModuleType
from typing import Any

import pytest
import torch


def examples_of(package: ModuleType) -> pytest.MarkDecorator:
    """Parametrises a test with each docstring of the package's public names that holds an example, as `example`."""
    finder: Any = doctest.DocTestFinder()  # the types of `find` do not know `module=False`
    public = [(name, getattr(package, name)) for name in package.__all__]
    # A type checked at run time does not look as if the package's modules had defined it: the finder takes it as given.
    ours = [(name, value) for name, value in public if getattr(value, "__module__", "").startswith(package.__name__)]
    docstrings = [found for name, value in ours for found in finder.find(value, name, module=False)]
    examples = [found for found in docstrings if found.examples]
    assert examples, f"{package.__name__} shows no example"
    for example in examples:
        example.globs = vars(package).copy()
    return pytest.mark.parametrize("example", examples, ids=lambda example: example.name)


def assert_prints_what_it_says(example: doctest.DocTest) -> None:
    """Run the example."""
    runner = doctest.DebugRunner()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        runner.run(example)
