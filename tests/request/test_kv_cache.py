"""Slots of pruned cache layers, by hand: positions, later tokens, crops, and who moves the shared table along."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, Qwen2Config, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticSlidingWindowLayer

from sparsevlm.request.kv_cache import PrunedLayer, adopt, check_cache
from sparsevlm.request.slots import PAD_SLOT, SlotTable

# Seven tokens, of which the first sample lost 1, 3 and 4, the second 2 and 4; the last two are text.
POSITIONS = [[PAD_SLOT, 0, 2, 5, 6], [0, 1, 3, 5, 6]]


def table_of(positions=POSITIONS, length=7, tail=2):
    return SlotTable(torch.tensor(positions), length, tail, has_padding=True)


def test_slots_are_the_prompts_and_then_all_that_came():
    table = table_of()
    assert table.slots(0).tolist() == POSITIONS
    assert table.slots(2).tolist() == [[PAD_SLOT, 0, 2, 5, 6, 7, 8], [0, 1, 3, 5, 6, 7, 8]]
    assert table.slots(1, width=8).tolist() == [
        [PAD_SLOT, 0, 2, 5, 6, 7, PAD_SLOT, PAD_SLOT],
        [0, 1, 3, 5, 6, 7, PAD_SLOT, PAD_SLOT],
    ]
    assert table.slots(0, width=6).tolist() == [[PAD_SLOT, 0, 2, 5, 6, PAD_SLOT], [0, 1, 3, 5, 6, PAD_SLOT]]
    assert table.slots(1, width=3).tolist() == table.slots(1, width=6).tolist() == table.slots(1).tolist()
    assert table.slots(3).dtype == torch.int64


def test_lengths_count_what_was_dropped():
    table = table_of()
    assert (table.length, table.appended) == (7, 0)
    table.append(3)
    table.append(1)
    assert (table.length, table.appended) == (11, 4)
    assert [table.logical_length(appended) for appended in (0, 1, 4)] == [7, 8, 11]


def test_a_crop_takes_later_tokens_first_then_the_tail():
    table = table_of()
    table.append(3)
    table.crop(2)
    assert (table.length, table.appended) == (8, 1)
    assert table.slots(1).tolist() == [[PAD_SLOT, 0, 2, 5, 6, 7], [0, 1, 3, 5, 6, 7]]
    table.crop(2)
    assert (table.length, table.appended) == (6, 0)
    assert table.slots(0).tolist() == [[PAD_SLOT, 0, 2, 5], [0, 1, 3, 5]]
    assert table.slots(2).tolist() == [[PAD_SLOT, 0, 2, 5, 6, 7], [0, 1, 3, 5, 6, 7]]
    table.append(1)
    table.crop(2)
    assert (table.length, table.appended) == (5, 0)
    assert table.slots(0).tolist() == [[PAD_SLOT, 0, 2], [0, 1, 3]]
    table.crop(0)
    assert table.slots(0).tolist() == [[PAD_SLOT, 0, 2], [0, 1, 3]]
    with pytest.raises(ValueError, match=r"cannot crop 1 tokens off a pruned cache: only the last 0 are text"):
        table.crop(1)
    assert table.length == 5


def test_a_crop_ends_where_tokens_were_dropped():
    table = table_of()
    table.append(1)
    table.check_crop(3)
    for crop in (table.check_crop, table.crop):
        with pytest.raises(ValueError, match=r"cannot crop 4 tokens .* only the last 3 are text"):
            crop(4)
    assert table.slots(table.appended).tolist() == [[PAD_SLOT, 0, 2, 5, 6, 7], [0, 1, 3, 5, 6, 7]]
    table.crop(3)
    assert table.slots(0).tolist() == [[PAD_SLOT, 0, 2], [0, 1, 3]]


def test_samples_are_selected_and_repeated():
    table = table_of()
    table.repeat(2)
    first, second = POSITIONS
    assert table.slots(0).tolist() == [first, first, second, second]
    table.index(torch.tensor([3, 0, 2]))
    assert table.slots(1).tolist() == [[*second, 7], [*first, 7], [*second, 7]]


def states(n, batch=2, value=0.0):
    return torch.full((batch, 1, n, 4), value)


def pruned_cache(n_layers=3, batch=2):
    """Layer 0 holds all of seven tokens, the others five: layer 1 owns their table."""
    cache = DynamicCache()
    cache.update(states(7, batch), states(7, batch), 0)
    table = table_of()
    for layer_idx in range(1, n_layers):
        check_cache(cache, n_layers)
        adopt(cache, layer_idx).place(table, owns_table=layer_idx == 1)
        cache.update(states(5, batch), states(5, batch), layer_idx)
    return cache, table


def step(cache, n=1):
    for layer_idx, layer in enumerate(cache.layers):
        batch = layer.keys.shape[0]
        cache.update(states(n, batch), states(n, batch), layer_idx)


def test_layers_tell_logical_lengths_and_the_owner_counts():
    cache, table = pruned_cache()
    assert [layer.get_seq_length() for layer in cache.layers] == [7, 7, 7]
    assert [layer.keys.shape[-2] for layer in cache.layers] == [7, 5, 5]
    assert table.appended == 0  # what was placed is in the table already
    step(cache)
    step(cache, n=3)
    assert table.appended == 4
    assert [layer.get_seq_length() for layer in cache.layers] == [11, 11, 11]
    assert table.slots(4).shape[1] == cache.layers[2].keys.shape[-2] == 9


def test_adopted_layers_share_what_they_know_of_tables():
    cache = DynamicCache()
    for layer_idx in range(3):
        cache.update(states(4), states(4, value=layer_idx), layer_idx)
    held = [layer.values for layer in cache.layers]
    first = adopt(cache, 1)
    assert [isinstance(layer, PrunedLayer) for layer in cache.layers] == [True, True, False]
    assert adopt(cache, 1) is first
    assert first.table is None
    assert first.get_seq_length() == 4
    assert all(layer.values is values for layer, values in zip(cache.layers, held, strict=True))
    last = adopt(cache, 2)
    assert cache.layers[0].all_tables is first.all_tables is last.all_tables
    table = table_of()
    first.place(table, True)
    assert list(last.all_tables) == [table]


def test_all_layers_of_a_cache_are_cropped_and_their_slots_once():
    cache, table = pruned_cache()
    step(cache, n=3)
    cache.crop(-2)
    assert table.slots(table.appended).tolist() == [[PAD_SLOT, 0, 2, 5, 6, 7], [0, 1, 3, 5, 6, 7]]
    assert [layer.keys.shape[-2] for layer in cache.layers] == [8, 6, 6]
    cache.crop(0)
    cache.crop(-1)
    cache.crop(-1)
    assert [layer.get_seq_length() for layer in cache.layers] == [6, 6, 6]
    assert [layer.keys.shape[-2] for layer in cache.layers] == [6, 4, 4]
    assert table.slots(0).tolist() == [[PAD_SLOT, 0, 2, 5], [0, 1, 3, 5]]


def test_more_than_half_of_what_may_be_cropped():
    cache, table = pruned_cache()
    step(cache)
    cache.crop(-3)
    assert [layer.get_seq_length() for layer in cache.layers] == [5, 5, 5]
    assert [layer.keys.shape[-2] for layer in cache.layers] == [5, 3, 3]
    assert table.slots(0).tolist() == [[PAD_SLOT, 0, 2], [0, 1, 3]]


def test_a_crop_that_goes_too_far_changes_nothing():
    cache, table = pruned_cache()
    step(cache)
    with pytest.raises(ValueError, match="cannot crop 4 tokens off a pruned cache: only the last 3 are text"):
        cache.crop(-4)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [8, 6, 6]
    assert [layer.get_seq_length() for layer in cache.layers] == [8, 8, 8]
    assert table.appended == 1


@pytest.mark.skipif(Version(transformers.__version__) >= Version("5.18"), reason="crop takes negative numbers only")
def test_a_crop_to_a_length():
    cache, table = pruned_cache()
    cache.crop(9)
    assert [layer.get_seq_length() for layer in cache.layers] == [7, 7, 7]
    cache.crop(6)
    assert [layer.get_seq_length() for layer in cache.layers] == [6, 6, 6]
    assert [layer.keys.shape[-2] for layer in cache.layers] == [6, 4, 4]
    assert table.slots(0).tolist() == [[PAD_SLOT, 0, 2, 5], [0, 1, 3, 5]]
    with pytest.raises(ValueError, match="cannot crop 2 tokens off a pruned cache"):
        cache.crop(4)


def test_samples_of_a_cache_move_with_their_slots_once():
    cache, table = pruned_cache()
    cache.batch_repeat_interleave(2)
    first, second = POSITIONS
    assert table.slots(0).tolist() == [first, first, second, second]
    cache.batch_select_indices(torch.tensor([0, 2]))
    assert table.slots(0).tolist() == POSITIONS
    cache.reorder_cache(torch.tensor([1, 0]))
    assert table.slots(0).tolist() == [second, first]
    assert [layer.keys.shape[0] for layer in cache.layers] == [2, 2, 2]


def test_a_reset_cache_is_as_new():
    cache, table = pruned_cache()
    cache.reset()
    assert table not in cache.layers[0].all_tables
    assert [layer.get_seq_length() for layer in cache.layers] == [0, 0, 0]
    assert [layer.table for layer in cache.layers] == [None] * 3
    for layer_idx in range(3):
        keys, _ = cache.update(states(2), states(2), layer_idx)
        assert keys.shape[-2] == 2  # nothing is left of what it held
    cache.crop(-2)  # nothing of it is pruned any more
    assert [layer.get_seq_length() for layer in cache.layers] == [0, 0, 0]


def test_a_static_cache_keeps_its_buffers():
    config = Qwen2Config(num_hidden_layers=2, hidden_size=4, num_attention_heads=1, num_key_value_heads=1)
    cache, table = StaticCache(config=config, max_cache_len=12), table_of()
    check_cache(cache, 2)
    cache.update(states(7), states(7), 0)
    adopt(cache, 1).place(table, True)
    cache.update(states(5), states(5), 1)
    step(cache)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [12, 12]
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [8, 8]
    assert table.slots(table.appended, width=12)[0].tolist() == [PAD_SLOT, 0, 2, 5, 6, 7, *[PAD_SLOT] * 6]
    cache.reset()
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [0, 0]


def test_layers_are_made_as_many_as_the_decoder_has_and_no_more():
    cache = DynamicCache()
    cache.update(states(2), states(2), 0)
    check_cache(cache, 3)
    assert [type(layer) for layer in cache.layers] == [DynamicLayer] * 3
    check_cache(cache, 3)
    assert len(cache.layers) == 3


def test_layers_that_cannot_be_pruned_are_refused_where_the_decoder_uses_them():
    cache = DynamicCache()
    check_cache(cache, 2)
    cache.layers.append(DynamicSlidingWindowLayer(sliding_window=4))
    check_cache(cache, 2)
    check_cache(cache, 3, {2})
    with pytest.raises(NotImplementedError, match=r"DynamicCache with DynamicSlidingWindowLayer cannot hold a pruned"):
        check_cache(cache, 3, {0, 1})
    cache.layers[2] = StaticSlidingWindowLayer(max_cache_len=8, sliding_window=4)
    with pytest.raises(NotImplementedError, match=r"DynamicCache with StaticSlidingWindowLayer cannot hold a pruned"):
        check_cache(cache, 3, {2})
    adopt(cache, 1)
    check_cache(cache, 2)  # pruned layers are taken again


def test_a_crop_by_a_tensor_leaves_whole_numbers():
    """A number in a tensor would change in place where others have noted it."""
    cache = DynamicCache()
    cache.update(states(2), states(2), 0)
    layer = adopt(cache, 0)
    layer.place(SlotTable(torch.arange(5).expand(2, -1), 5, 5, has_padding=False), owns_table=True)
    layer.placed = False
    layer.update(states(3), states(3))
    layer.crop(torch.tensor(-1))
    noted = layer.table.appended
    layer.table.append(4)
    assert (noted, layer.table.appended) == (2, 6)
