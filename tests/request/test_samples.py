"""Prompts, by hand: where visual tokens and text are, what may vote, and which grid is whose."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sparsevlm.models import Modality
from sparsevlm.request.inputs import visual_grids, visual_masks
from sparsevlm.request.opening import make_samples
from sparsevlm.template import Template

IMG, VID, START, END = 90, 91, 92, 93
EMBEDDING = torch.nn.Embedding(100, 4)
ADAPTER = SimpleNamespace(
    modalities={"image": Modality("pixel_values", IMG), "video": Modality("pixel_values_videos", VID)},
    token_ids_apart=torch.tensor([IMG, VID, START, END, 95]),
    model=SimpleNamespace(get_input_embeddings=lambda: EMBEDDING),
)


NO_TEMPLATE = Template()


def samples_of(*rows, valid=None, template=NO_TEMPLATE, n_drafted=0, ids=True, grids=None, visual=(IMG, VID)):
    tokens = torch.tensor(rows)
    inputs = {"input_ids": tokens} if ids else {}
    if valid is not None:
        inputs["attention_mask"] = torch.tensor(valid)
    return make_samples(ADAPTER, inputs, torch.isin(tokens, torch.tensor(visual)), grids or {}, template, n_drafted)


def lists(sample):
    return {
        name: getattr(sample, name).tolist()
        for name in ("visual", "other", "text", "rater_candidates", "last", "alive")
    }


def test_one_image_between_text():
    (sample,) = samples_of([1, 2, START, IMG, IMG, IMG, END, 3, 4])
    assert lists(sample) == {
        "visual": [3, 4, 5],
        "other": [0, 1, 2, 6, 7, 8],
        "text": [0, 1, 7, 8],
        "rater_candidates": [7, 8],
        "last": [8],
        "alive": [0, 1, 2],
    }
    assert sample.tail == 3  # the token that closes the image is one of them
    assert sample.grids == ()
    first, second = samples_of([1, IMG, IMG, 2], [IMG, 1, IMG, 2], grids={"image": [(1, 1, 2), (1, 1, 1), (1, 1, 1)]})
    assert (first.grids, second.grids) == (((1, 1, 2),), ((1, 1, 1), (1, 1, 1)))


def test_text_between_two_images_does_not_vote():
    (sample,) = samples_of([IMG, 1, VID, VID, 2, 95, 3])
    assert (sample.text.tolist(), sample.rater_candidates.tolist()) == ([1, 4, 6], [4, 6])
    assert sample.tail == 3
    assert sample.visual.tolist() == [0, 2, 3]


def test_a_placeholder_that_stands_for_nothing_is_no_text():
    """As one that the model has generated itself."""
    (sample,) = samples_of([1, IMG, 2, VID, 3], visual=(IMG,))
    assert (sample.text.tolist(), sample.rater_candidates.tolist()) == ([0, 2, 4], [2, 4])
    assert (sample.visual.tolist(), sample.other.tolist()) == ([1], [0, 2, 3, 4])


def test_padding_is_nothing_at_either_end():
    first, second = samples_of(
        [95, 95, 1, IMG, 2, 3], [1, IMG, IMG, 2, 95, 95], valid=[[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]
    )
    assert lists(first) == {
        "visual": [3], "other": [2, 4, 5], "text": [2, 4, 5], "rater_candidates": [4, 5], "last": [5], "alive": [0]
    }  # fmt: skip
    # The last row of the second predicts the next token, so that it goes on; it has no say.
    assert (second.other.tolist(), second.rater_candidates.tolist(), second.last.tolist()) == ([0, 3, 5], [3], [3])
    assert second.text.tolist() == [0, 3]
    assert (first.tail, second.tail) == (2, 1)


def test_a_mask_may_tell_of_what_is_in_the_cache_too():
    (sample,) = samples_of([1, IMG, 2, 3], valid=[[0, 0, 1, 0, 1, 1, 1]])
    assert (sample.other.tolist(), sample.visual.tolist()) == ([2, 3], [1])


def test_a_placeholder_in_the_padding_is_none():
    (sample,) = samples_of([IMG, 1, IMG, 2], valid=[[0, 1, 1, 1]])
    assert sample.visual.tolist() == [2]


def test_the_tail_ends_at_a_gap():
    (sample,) = samples_of([IMG, 1, 2, 3, 4, 5], valid=[[1, 1, 0, 1, 1, 1]])
    assert sample.tail == 3
    (sample,) = samples_of([IMG, 1, 2, 3, 4, 5, 6], valid=[[1, 1, 0, 1, 0, 1, 1]])
    assert sample.tail == 2
    (sample,) = samples_of([1, 2, 3])
    assert (sample.tail, sample.rater_candidates.tolist(), sample.alive.tolist()) == (3, [0, 1, 2], [])


def test_guesses_are_no_prompt():
    (sample,) = samples_of([1, IMG, END, 2, 3, 4, 5], n_drafted=2)
    assert (sample.text.tolist(), sample.rater_candidates.tolist(), sample.last.tolist()) == ([0, 3, 4], [3, 4], [4])
    assert sample.other.tolist() == [0, 2, 3, 4, 5, 6]
    assert sample.tail == 5


def test_the_last_token_votes_where_nobody_else_may():
    (sample,) = samples_of([1, IMG, IMG, END, 95])
    assert (sample.text.tolist(), sample.rater_candidates.tolist(), sample.last.tolist()) == ([0], [4], [4])
    (sample,) = samples_of([START, IMG, END])
    assert (sample.text.tolist(), sample.rater_candidates.tolist()) == ([2], [2])


def test_the_template_is_no_text_where_it_is_all_there():
    row = [7, 8, 1, IMG, 2, 3, 9, 9]
    for prefix, suffix, text, rater_candidates in (
        ((7, 8), (9, 9), [2, 4, 5], [4, 5]),
        ((8, 7), (9, 9), [0, 1, 2, 4, 5], [4, 5]),
        ((7, 8), (3, 9), [2, 4, 5, 6, 7], [4, 5, 6, 7]),
        ((), (), [0, 1, 2, 4, 5, 6, 7], [4, 5, 6, 7]),
        ((), (3, 9, 9), [0, 1, 2, 4], [4]),
    ):
        (sample,) = samples_of(row, template=Template(prefix=prefix, suffix=suffix))
        assert (sample.text.tolist(), sample.rater_candidates.tolist()) == (text, rater_candidates)
        assert sample.other.tolist() == [0, 1, 2, 4, 5, 6, 7]


def test_without_ids_every_other_token_is_text():
    (sample,) = samples_of([START, 1, IMG, END, 2], ids=False)
    assert (sample.text.tolist(), sample.rater_candidates.tolist()) == ([0, 1, 3, 4], [3, 4])


def test_a_prompt_must_not_end_in_a_visual_token():
    with pytest.raises(ValueError, match=r"sample 1 ends in a visual token"):
        samples_of([IMG, 1, 2], [1, 2, IMG])
    with pytest.raises(ValueError, match=r"sample 0 ends in a visual token"):
        samples_of([1, IMG, 2], n_drafted=1)


def grids(rows, images=None, videos=None):
    return visual_grids(ADAPTER, {"image": images, "video": videos}, None if rows is None else torch.tensor(rows))


def test_grids_are_handed_out_in_prompt_order():
    rows = [[1, IMG, IMG, 2, VID, VID, VID, VID], [IMG, IMG, IMG, IMG, IMG, IMG, 3, 4]]
    images, videos = [(1, 1, 2), (1, 2, 3)], [(2, 1, 2)]
    assert grids(rows, images, videos) == [[(1, 1, 2), (2, 1, 2)], [(1, 2, 3)]]
    neighbours = [[IMG, IMG, IMG, 1]]
    assert grids(neighbours, [(1, 1, 1), (1, 2, 1)]) == [[(1, 1, 1), (1, 2, 1)]]
    assert grids([[1, 2], [IMG, 2]], [(1, 1, 1)]) == [[], [(1, 1, 1)]]


def test_equal_rows_share_the_grids_of_the_batch_before_it_was_expanded():
    one, two = [IMG, IMG, 1], [2, IMG, 3]
    images = [(1, 1, 2), (1, 1, 1)]
    assert grids([one, one, one, two, two, two], images) == [[(1, 1, 2)]] * 3 + [[(1, 1, 1)]] * 3
    assert grids([one, one], images[:1]) == [[(1, 1, 2)]] * 2
    assert grids([one, one], images[:1] * 2) == [[(1, 1, 2)]] * 2  # expanded themselves


@pytest.mark.parametrize(
    ("rows", "images"),
    [
        ([[IMG, IMG, 1]], [(1, 1, 2), (1, 1, 1)]),  # one too many
        ([[IMG, IMG, 1]], [(1, 1, 1)]),  # too small
        ([[IMG, IMG, 1]], [(1, 1, 3)]),  # too large
        ([[IMG, IMG, 1, IMG, 2]], [(1, 1, 2)]),  # one too few
        ([[IMG, IMG, 1]], None),
        (None, [(1, 1, 2)]),
    ],
)
def test_grids_that_do_not_fit_are_not_told(rows, images):
    assert grids(rows, images) == []


def test_only_what_brings_pixels_has_visual_tokens():
    ids = torch.tensor([[1, IMG, VID, IMG, 2]])
    assert visual_masks(ADAPTER, {"input_ids": ids}) == {}
    found = visual_masks(ADAPTER, {"input_ids": ids, "pixel_values": 0})
    assert {kind: mask.tolist() for kind, mask in found.items()} == {"image": [[False, True, False, True, False]]}
    found = visual_masks(ADAPTER, {"input_ids": ids, "pixel_values": 0, "pixel_values_videos": 0})
    assert found["video"].tolist() == [[False, False, True, False, False]]
    found = visual_masks(ADAPTER, {"input_ids": ids, "mm_encoder_outputs": {"video": 0}})
    assert list(found) == ["video"]
    embeds = EMBEDDING(ids).detach()
    found = visual_masks(ADAPTER, {"inputs_embeds": embeds, "pixel_values": 0})
    assert found["image"].tolist() == [[False, True, False, True, False]]
    embeds[0, 1, 0] += 1  # all of an embedding has to fit
    assert visual_masks(ADAPTER, {"inputs_embeds": embeds, "pixel_values": 0})["image"].sum() == 1
    with pytest.raises(ValueError, match=r"bring video features but no video token \(id 91\)"):
        visual_masks(ADAPTER, {"input_ids": ids[:, :2], "pixel_values_videos": 0})
