"""Every parser of ours, fed with a few dozen bent inputs; fuzz_parsers.py feeds them for as long as it is told to."""

import pytest
import torch
from fuzz_parsers import PARSERS, feed

from babelscope.explain import prompts


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", PARSERS)
def test_a_parser_gives_a_result_or_a_user_error(name: str) -> None:
    assert feed(name, 25, start=0) >= 20


def test_a_list_of_verdicts_that_is_nested_too_deep_is_none() -> None:
    assert prompts.verdicts("[" + '{"a":' * 100_000 + "}" * 100_000 + "]", 1) is None
