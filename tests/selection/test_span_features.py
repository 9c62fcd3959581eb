"""Span before the decoder: the choice of span over the features, and how many tokens a picture needs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from selector_contexts import make_context

from sparsevlm import apply_sparsevlm
from sparsevlm.config import SparseVLMConfig
from sparsevlm.kernels.pivoted_cholesky import spanning_picks as spanning_picks_of_gram
from sparsevlm.selection import greedy
from sparsevlm.selection.context import BEFORE_DECODER, SelectorTraits
from sparsevlm.selection.decide import decide
from sparsevlm.selection.greedy import spanning_picks
from sparsevlm.selection.selectors import SELECTORS
from sparsevlm.selection.selectors.span_features import SpanFeaturesSelector
from toys import make_inputs, tiny_model

PICTURES = [[("text", 2), ("image", 8, 8), ("text", 6)], [("text", 3), ("image", 6, 4), ("text", 2)]]
GREEDY = {"max_new_tokens": 4, "do_sample": False}


def spanned_by_definition(rows, unexplained, most):
    """Picks of what is farthest from the span of the picks, by least squares, until nothing is far."""
    rows = rows.double()
    mean, picks = rows.square().sum(-1).mean(), []
    while len(picks) < most:
        basis = rows[picks].T
        left = rows if not picks else rows - (basis @ torch.linalg.lstsq(basis, rows.T, driver="gelsd").solution).T
        far = left.square().sum(-1)
        if float(far.max()) <= unexplained * float(mean):
            break
        picks.append(int(far.argmax()))
    return picks


def spanned(rows, unexplained, most):
    """The picks of one sample by the library's search."""
    n, least, at_most = torch.tensor([[rows.shape[0]], [0], [most]])
    order, counts = spanning_picks(rows[None], n, unexplained, least, at_most, most)
    return order[0, : counts[0]].tolist()


def by_gram_if(gram, monkeypatch):
    """Search by the products of all rows, as on a GPU."""
    if gram:
        monkeypatch.setattr(
            greedy,
            "dpp_order",
            lambda rows, quality, n_keep, rounds, ends: _behind(
                *spanning_picks_of_gram(rows @ rows.mT, *ends, n_keep, 1e-6)
            ),
        )


def _behind(order, counts):
    return order.masked_fill(torch.arange(order.shape[1]) >= counts[:, None], -1)


@pytest.mark.parametrize("unexplained", [0.0, 0.02, 0.2, 0.6, 1.0])
@pytest.mark.parametrize("rank", [1, 5, 12])
@pytest.mark.parametrize("gram", [False, True])
def test_picks_until_every_row_is_explained(rank, unexplained, gram, monkeypatch):
    by_gram_if(gram, monkeypatch)
    torch.manual_seed(rank)
    rows = torch.randn(40, rank) @ torch.randn(rank, 12) * torch.logspace(0, -2, 40)[torch.randperm(40), None]
    for most in (3, 40):
        assert spanned(rows, unexplained, most) == spanned_by_definition(rows, max(unexplained, 1e-6), most)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_the_number_depends_on_no_scale(scale):
    torch.manual_seed(0)
    rows = torch.randn(60, 8) * torch.logspace(0, -2, 60)[:, None]
    assert spanned(rows * scale, 0.1, 60) == spanned(rows, 0.1, 60)
    assert len(spanned(rows, 0.1, 60)) > 3


@pytest.mark.parametrize("gram", [False, True])
def test_rows_that_say_nothing_new_are_not_counted(gram, monkeypatch):
    by_gram_if(gram, monkeypatch)
    torch.manual_seed(0)
    two = torch.randn(2, 16)
    assert len(spanned(torch.cat([two] * 20), 0.0, 40)) == 2
    assert spanned(torch.zeros(9, 4), 0.1, 9) == []
    assert len(spanned(torch.eye(6), 0.1, 4)) == 4


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_samples_filled_up_are_as_alone(device):
    """Of sizes that end after few picks, after many, and never."""
    torch.manual_seed(2)
    alone = [torch.randn(n, rank) @ torch.randn(rank, 24) for n, rank in ((400, 3), (310, 24), (90, 11))]
    sizes = torch.tensor([rows.shape[0] for rows in alone], device=device)
    padded = torch.nn.utils.rnn.pad_sequence(alone, batch_first=True).to(device)
    least, most = torch.tensor([[0, 0, 15], [20, 18, 20]], device=device)
    order, counts = spanning_picks(padded, sizes, 0.3, least, most, 20)
    found = [own[:count].tolist() for own, count in zip(order, counts.tolist(), strict=True)]
    wanted = [spanned_by_definition(rows, 0.3, n) for rows, n in zip(alone, (20, 18, 20), strict=True)]
    assert found[:2] == wanted[:2]
    assert (len(found[2]), found[2][: len(wanted[2])]) == (15, wanted[2])


def test_the_choice_is_that_of_span_over_the_features():
    context = make_context(30, seed=3, layer=-1)
    context = dataclasses.replace(context, hidden_states=context.features)
    ours, span = SpanFeaturesSelector(), SELECTORS["span"]()
    assert ours.select(context, 11).tolist() == span.select(context, 11).tolist()
    traits = SelectorTraits.of(ours)
    assert traits.adaptive
    assert traits.placement == BEFORE_DECODER
    assert not SelectorTraits.of(span).adaptive


@pytest.mark.parametrize(
    ("min_keep", "most", "expected"), [(1, 1.0, 3), (8, 1.0, 8), (1, 0.05, 2), (1, 0.0, 1), (40, 1.0, None)]
)
def test_how_many_go_on_without_a_budget(min_keep, most, expected):
    """Of 40 tokens of four kinds, which lie in a space of three axes about their mean."""
    kinds = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))[torch.arange(40) % 4]
    context = make_context(40, layer=-1, hidden_states=kinds, config=SparseVLMConfig(min_keep=min_keep))
    selector = SpanFeaturesSelector(most=most)
    (decision,) = decide([context], selector, SelectorTraits.of(selector), [None])
    if expected is None:
        assert decision.selection is None
        assert decision.skipped_because == "40 visual tokens are not more than min_keep=40"
        return
    assert decision.selection.keep_idx.shape == (expected,)
    assert decision.rank is None
    assert torch.equal(decision.selection.keep_idx, selector.select(context, expected))


def test_every_image_has_its_floor_without_a_budget():
    context = make_context(
        30, layer=-1, hidden_states=torch.zeros(30, 8), image_idx=torch.arange(30) // 10, n_images=3,
        config=SparseVLMConfig(min_keep=1, min_keep_per_image=4),
    )  # fmt: skip
    selector = SpanFeaturesSelector()
    (decision,) = decide([context], selector, SelectorTraits.of(selector), [None])
    assert torch.bincount(decision.selection.keep_idx // 10).tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (torch.tensor([0, 12]), ValueError, "returned indices outside 0..11"),
        (torch.tensor([1, 1, 4]), ValueError, "returned duplicate indices"),
        (torch.zeros(2, 3, dtype=torch.int64), ValueError, r"indices of shape \(2, 3\), expected \(n,\)"),
        (torch.zeros(12, dtype=torch.bool), TypeError, "not a mask"),
        (7, TypeError, "got a int"),
    ],
)
def test_an_answer_that_is_no_choice_is_refused(answer, error, message):
    class Free:
        placement, adaptive = BEFORE_DECODER, True

        def select(self, context, n_keep):
            return answer

    with pytest.raises(error, match=message):
        decide(
            [make_context(12, layer=-1, config=SparseVLMConfig(min_keep=1))], Free(), SelectorTraits.of(Free()), [None]
        )


def test_who_defines_the_choice_anew_is_not_asked_without_a_budget():
    class Own(SpanFeaturesSelector):
        def select(self, context, n_keep):
            return torch.arange(n_keep)

    assert not SelectorTraits.of(Own()).adaptive
    with pytest.raises(ValueError, match="'span-features' runs before the decoder, where no rank is known: set keep"):
        apply_sparsevlm(tiny_model(), selector=Own())


def test_an_adaptive_selector_at_target_layers_is_refused():
    class Late:
        adaptive = True

        def select(self, context, n_keep):
            return torch.arange(n_keep)

    with pytest.raises(ValueError, match="'Late' is adaptive and runs at 'target_layers'"):
        SelectorTraits.of(Late())


def test_an_error_in_a_free_choice_names_the_selector():
    class Broken(SpanFeaturesSelector):
        def select_batch(self, contexts, n_keep):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError) as caught:
        decide([make_context(40, layer=-1)], Broken(), SelectorTraits.of(Broken()), [None])
    assert "in selector 'span-features' before the decoder (layer -1)" in "".join(caught.value.__notes__)


def test_samples_of_any_sizes_come_together_as_far_as_they_fit(monkeypatch):
    given = []

    class Counted(SpanFeaturesSelector):
        def select_batch(self, contexts, n_keep):
            given.append((len(contexts), n_keep))
            return super().select_batch(contexts, n_keep)

    contexts = [make_context(n, seed=n, layer=-1, config=SparseVLMConfig(min_keep=1)) for n in (12, 30, 9, 22, 1)]
    selector = Counted()
    alone = [decide([context], selector, SelectorTraits.of(selector), [None])[0] for context in contexts]
    given.clear()
    monkeypatch.setattr("sparsevlm.selection.decide._MAX_BATCH_ELEMENTS", contexts[1].hidden_states.numel() * 3)
    together = decide(contexts, selector, SelectorTraits.of(selector), [None] * 5)
    assert given == [(3, None), (1, None)]
    for one, other in zip(alone, together, strict=True):
        assert (one.selection is None) == (other.selection is None)
        assert one.selection is None or torch.equal(one.selection.keep_idx, other.selection.keep_idx)


@pytest.mark.parametrize(("name", "value"), [("unexplained", -0.1), ("most", 2.0), ("unexplained", "x")])
def test_fields_out_of_range_are_refused(name, value):
    with pytest.raises((TypeError, ValueError), match=name):
        SpanFeaturesSelector(**{name: value})


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("selector", ["span-features", SpanFeaturesSelector(unexplained=0.5, most=0.4)])
def test_a_picture_keeps_what_it_needs_on_both_paths(selector, engine):
    model = tiny_model()
    inputs = make_inputs(*PICTURES)
    state = apply_sparsevlm(model, selector=selector, min_keep=3, engine=engine)
    model.generate(**inputs, **GREEDY)
    report = state.report
    assert report.path == ("engine" if engine else "plain")
    made = SELECTORS[selector]() if isinstance(selector, str) else selector
    for sample in report.samples:
        (stage,) = sample.stages
        assert stage.rank is None
        assert 3 <= stage.n_kept <= max(3, int(made.most * sample.n_visual))
        assert set(sample.layer_tokens) == {stage.n_kept}
    kept = [sample.stages[0].kept for sample in report.samples]
    with state.options(engine=not engine):
        model.generate(**inputs, **GREEDY)
        assert state.report.path != report.path
        assert [sample.stages[0].kept for sample in state.report.samples] == kept


def test_nothing_of_it_depends_on_the_question():
    model = tiny_model()
    state = apply_sparsevlm(model, selector="span-features", turns="agnostic", min_keep=3)
    kept = []
    for question in (2, 9):
        model.generate(**make_inputs([("text", 2), ("image", 8, 8), ("text", question)]), **GREEDY)
        kept.append(state.report.samples[0].stages[0].kept)
    assert kept[0] == kept[1]
