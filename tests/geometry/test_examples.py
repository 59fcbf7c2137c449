"""The examples in docstrings."""

import doctest

import semalign_geometry
import semalign_geometry.base

from ..examples import assert_prints_what_it_says, examples_of


@examples_of(semalign_geometry)
def test_example(example: doctest.DocTest) -> None:
    assert_prints_what_it_says(example)


@examples_of(semalign_geometry.base)
def test_example_of_the_base(example: doctest.DocTest) -> None:
    assert_prints_what_it_says(example)
