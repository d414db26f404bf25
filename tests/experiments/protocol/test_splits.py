import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.protocol.splits import allocate, class_counts, draw_splits, draw_target

LABELS = np.repeat(np.arange(10, dtype=np.int32), 60)


def _draw(**changes):
    settings = {"seed": 0, "num_validation": 100, "num_experts": 4, "num_examples": 80, "concentration": 0.5}
    return draw_splits(LABELS, **(settings | changes))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_allocation_has_the_total_and_never_takes_what_is_not_there(data):
    classes = data.draw(st.integers(1, 6))
    available = np.array(data.draw(st.lists(st.integers(0, 20), min_size=classes, max_size=classes)))
    weights = np.array(data.draw(st.lists(st.floats(0, 1), min_size=classes, max_size=classes)))
    total = data.draw(st.integers(0, int(available.sum())))
    counts = allocate(weights, available, total)
    assert counts.sum() == total
    assert (counts >= 0).all()
    assert (counts <= available).all()


def test_allocation_rounds_by_largest_remainder():
    np.testing.assert_array_equal(allocate(np.array([0.46, 0.34, 0.2]), np.array([50, 50, 50]), 10), [5, 3, 2])


def test_what_a_class_cannot_give_goes_to_the_others_in_proportion():
    np.testing.assert_array_equal(allocate(np.array([0.7, 0.2, 0.1]), np.array([10, 90, 90]), 40), [10, 20, 10])


def test_more_than_there_is_is_refused():
    with pytest.raises(ValueError, match="31 examples were asked for, but only 30"):
        allocate(np.array([0.5, 0.5]), np.array([10, 20]), 31)


def test_an_expert_has_its_number_of_different_images_none_of_them_for_validation():
    splits = _draw()
    assert len(np.unique(splits.validation)) == 100
    for rows in splits.experts:
        assert len(np.unique(rows)) == 80
        assert not np.intersect1d(rows, splits.validation).size


def test_experts_and_targets_overlap_as_independent_draws_do():
    splits = _draw(num_examples=400)
    assert np.intersect1d(splits.experts[0], splits.experts[1]).size
    assert np.intersect1d(splits.experts[0], draw_target(splits.rest, seed=0, num_target=300)).size


def test_another_seed_draws_others_and_the_same_seed_the_same():
    np.testing.assert_array_equal(_draw().experts[2], _draw().experts[2])
    assert not np.array_equal(_draw().experts[2], _draw(seed=1).experts[2])


def test_an_expert_is_the_same_whatever_the_number_of_its_fellows():
    np.testing.assert_array_equal(_draw(num_experts=2).experts[1], _draw(num_experts=7).experts[1])


def test_small_concentrations_are_skewed_and_large_ones_even():
    def largest_share(concentration):
        splits = _draw(num_experts=40, concentration=concentration)
        return np.mean([max(class_counts(LABELS[rows], 10)) / len(rows) for rows in splits.experts])

    # 80 images of 10 classes: even is 0.1; Dirichlet(0.5) has an expected largest share near 0.4.
    assert largest_share(1e4) < 0.13
    assert largest_share(0.5) > 0.3


def test_the_target_set_is_what_is_left_where_more_is_asked_for():
    splits = _draw()
    np.testing.assert_array_equal(draw_target(splits.rest, seed=3, num_target=10_000), splits.rest)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_examples": 501}, "100 validation images and 501 for an expert exceed the 600 training images"),
        ({"concentration": 0.0}, "concentration is 0.0"),
    ],
)
def test_impossible_draws_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        _draw(**changes)
