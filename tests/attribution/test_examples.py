"""The examples in docstrings."""

import doctest

import semalign_attribution

from ..examples import assert_prints_what_it_says, examples_of


@examples_of(semalign_attribution)
def test_example(example: doctest.DocTest) -> None:
    assert_prints_what_it_says(example)
