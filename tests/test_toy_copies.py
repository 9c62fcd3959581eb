"""Copies of tiny models, which most tests run on."""

import copy

import torch
from torch import nn

from toys import tiny_model
from toys.copies import Copies


def test_a_copy_is_of_the_state_at_that_time_and_shares_nothing_but_what_is_tied():
    made = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    made[1].weight = made[0].weight
    before = copy.deepcopy(made.state_dict())
    copies = Copies(made)
    made[0].weight.data.zero_()
    one, other = copies.new(), copies.new()
    assert one[0].weight is one[1].weight
    assert one[0].weight is not other[0].weight
    other[0].weight.data.fill_(7)
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())


def test_a_tiny_model_that_was_changed_leaves_the_next_as_it_was():
    first = tiny_model()
    expected = copy.deepcopy(first.state_dict())
    for weight in first.parameters():
        weight.data.zero_()
    first.config.text_config.hidden_size = 1
    again = tiny_model()
    assert again.config.text_config.hidden_size != 1
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
