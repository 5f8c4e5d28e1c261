"Intervals hold the truth as often as they say; the rest agrees with SciPy, or with a sum by hand."

import itertools
import warnings
import numpy as np
import pytest
from scipy import stats
from faces2voices.statistics import (
    RESAMPLES,
    Difference,
    Interval,
    bootstrap_interval,
    crossed_difference,
    crossed_interval,
    holm,
    mean,
    paired_difference,
    pearson,
    ratio,
    t_interval,
)


@pytest.fixture(autouse=True)
def no_warnings():
    "Whatever the input, no warning reaches the reader."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def draws(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def held(intervals, truth) -> float:
    "Share of the intervals that hold the truth."
    return np.mean([i.low <= truth <= i.high for i in intervals])


# one list of values


def test_a_bootstrap_interval_is_that_of_scipy_with_rows_drawn_together():
    values = np.abs(draws(30, 2)) + [0, 1]

    def micro(errors, words, axis):
        return errors.sum(axis) / words.sum(axis)

    by_hand = stats.bootstrap(
        tuple(values.T), micro, paired=True, vectorized=True, n_resamples=RESAMPLES, rng=0
    )
    found = bootstrap_interval(values, ratio)
    assert (
        found.estimate == pytest.approx(values[:, 0].sum() / values[:, 1].sum()) and found.n == 30
    )
    assert (found.low, found.high) == pytest.approx(tuple(by_hand.confidence_interval), rel=1e-9)
    assert found.error == pytest.approx(by_hand.standard_error, rel=1e-3)


@pytest.mark.parametrize(
    "statistic, make, truth",
    [
        (mean, lambda rng: rng.normal(2, 1, 60), 2),
        (ratio, lambda rng: np.stack([rng.binomial(6, 0.2, 60), np.full(60, 6)], 1), 0.2),
        (pearson, lambda rng: rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 60), 0.6),
    ],
)
def test_a_bootstrap_interval_holds_the_truth_as_often_as_it_says(statistic, make, truth):
    rng = np.random.default_rng(1)
    assert (
        0.91 <= held([bootstrap_interval(make(rng), statistic) for _ in range(300)], truth) <= 0.98
    )


def test_a_skewed_rate_has_a_skewed_interval_that_stays_a_rate():
    errors = np.zeros((40, 2)) + [0, 6]
    errors[:2, 0] = 1
    found = bootstrap_interval(errors, ratio)
    assert 0 <= found.low < found.estimate < found.high
    assert found.high - found.estimate > 1.2 * (found.estimate - found.low)


@pytest.mark.parametrize("n", [2, 3, 5, 30])
def test_a_t_interval_is_that_of_scipy(n):
    x = draws(n)
    assert t_interval(x)[1:3] == pytest.approx(
        stats.t.interval(0.95, n - 1, x.mean(), stats.sem(x))
    )
    assert t_interval(x).error == pytest.approx(x.std(ddof=1) / n**0.5)


def test_of_three_values_t_holds_the_truth_and_a_bootstrap_does_not():
    many = draws(400, 3, seed=1)
    assert 0.92 <= held(map(t_interval, many), 0) <= 0.98
    assert held(map(bootstrap_interval, many), 0) < 0.85


@pytest.mark.parametrize("interval", [bootstrap_interval, t_interval])
def test_values_that_say_little_are_answered_plainly(interval):
    nan = np.nan
    assert interval([4.0, 4.0, 4.0]) == Interval(4, 4, 4, 0, 3)
    assert interval([0.5])[::4] == (0.5, 1) and np.isnan(interval([0.5])[1:4]).all()
    assert interval([])[4] == 0 and np.isnan(interval([])[:4]).all()
    assert interval([nan, nan])[4] == 0
    assert interval([1.0, nan, 2.0, 4.0, np.inf]) == interval([1.0, 2.0, 4.0])


def test_a_statistic_that_some_resamples_do_not_have_is_still_answered():
    xy = np.array([[0.0, 0], [0, 0], [0, 0], [0, 0.1], [1, 1]])
    found = bootstrap_interval(xy, pearson)
    assert found.low < found.estimate <= 1 and np.isfinite(found).all()
    assert np.isnan(bootstrap_interval(np.ones((9, 2)), pearson)[:4]).all()
    assert bootstrap_interval([[0, 0], [1, 4]], ratio).estimate == 0.25
    assert np.isnan(bootstrap_interval(np.zeros((5, 2)), ratio).estimate)


def test_pearson_is_that_of_scipy_of_every_table():
    v = draws(4, 5, 12, 2)
    assert np.allclose(pearson(v), [[stats.pearsonr(*x.T).statistic for x in row] for row in v])
    assert np.isnan(pearson(v[:, :, :2])).all() and np.isnan(pearson(v * [1, 0])).all()


def test_the_same_values_give_the_same_interval():
    x = draws(20)
    np.random.seed(1)
    assert bootstrap_interval(x) == bootstrap_interval(x)


# a table with two sources of chance


@pytest.mark.parametrize(
    "n, m, who, what",
    [
        (8, 10, 0.5, 0.4),
        (5, 4, 0.5, 0.4),
        (3, 10, 0.5, 0.4),
        (8, 10, 0.5, 0.0),
        (8, 10, 0.0, 0.5),
        (8, 10, 0.0, 0.0),
        (3, 100, 0.05, 0.5),
        (3, 100, 0.5, 0.5),
    ],
)
def test_a_crossed_interval_holds_the_truth_as_often_as_it_says(n, m, who, what):
    rng = np.random.default_rng(0)

    def table():
        return (
            3
            + who * rng.normal(size=(n, 1))
            + what * rng.normal(size=m)
            + 0.7 * rng.normal(size=(n, m))
        )

    assert 0.92 <= held([crossed_interval(table()) for _ in range(400)], 3) <= 0.995


def test_a_crossed_difference_is_found_by_chance_as_often_as_it_says():
    rng = np.random.default_rng(0)
    seeds, clips = rng.normal(size=(2, 300, 1, 20))
    tables = seeds[..., :5].swapaxes(1, 2) + clips + rng.normal(size=(300, 5, 20))
    found = [crossed_difference(table) for table in tables]
    assert 0.01 < np.mean([difference.p < 0.05 for difference in found]) < 0.09
    for difference in found[:50]:
        low, high = difference.interval[1:3]
        assert (difference.p < 0.05) == (low > 0 or high < 0)


def test_a_crossed_difference_of_one_row_is_student_s():
    from scipy.stats import ttest_1samp

    d = np.random.default_rng(0).normal(0.3, size=9)
    assert crossed_difference(d[None]).p == pytest.approx(ttest_1samp(d, 0).pvalue)
    assert crossed_difference(np.full((3, 4), 2.0)).p == 0
    assert crossed_difference(np.zeros((3, 4))).p == 1
    assert np.isnan(crossed_difference([[1.0]]).p)


def test_a_crossed_interval_of_one_row_or_one_column_is_student_s():
    marks = draws(1, 9) + 3
    for table in (marks, marks.T):
        assert crossed_interval(table)[:4] == pytest.approx(t_interval(marks[0])[:4])
    alone = crossed_interval(np.full((1, 1), 4.0))
    assert alone.estimate == 4 and np.isnan(alone[1:4]).all() and alone.n == 1
    assert crossed_interval(np.full((3, 4), 2.0)) == Interval(2, 2, 2, 0, 12)


def test_seeds_that_differ_widen_the_interval_of_the_clips_and_seeds_that_agree_do_not():
    clips, noise = draws(200, seed=1), draws(5, 200, seed=2)
    alike, apart = (s * draws(5, 1, seed=3) + clips + 0.1 * noise for s in (0, 0.5))

    def wider(table):
        crossed, clips_alone = crossed_interval(table), t_interval(table.mean(0))
        return (crossed.high - crossed.low) / (clips_alone.high - clips_alone.low)

    assert wider(apart) > 2 and wider(alike) == pytest.approx(1, rel=0.05)


def test_more_seeds_and_more_clips_narrow_a_crossed_interval():
    table = draws(64, 1, seed=1) + draws(1, 64, seed=2) + draws(64, 64, seed=3)
    few, many = (crossed_interval(table[:n, :n]) for n in (4, 64))
    assert many.error < few.error / 2


def test_where_only_one_source_varies_the_error_is_that_of_its_means():
    clips, seeds = draws(1, 400), draws(5, 1)
    for table, means in ((clips + 0 * seeds, clips[0]), (seeds + 0 * clips, seeds[:, 0])):
        assert crossed_interval(table)[:4] == pytest.approx(t_interval(means)[:4], rel=1e-6)


def test_a_table_with_a_hole_is_refused():
    with pytest.raises(ValueError, match="not a number"):
        crossed_interval([[1.0, np.nan]])


# differences


def test_a_paired_difference_is_narrower_than_two_means_and_finds_what_they_hide():
    hard = draws(40, seed=1)
    a, b = hard + 0.1 + 0.1 * draws(40, seed=2), hard + 0.1 * draws(40, seed=3)
    apart, together = [bootstrap_interval(x) for x in (a, b)], paired_difference(a, b)
    assert together.interval.error < 0.2 * np.hypot(*(i.error for i in apart))
    assert together.interval.estimate == pytest.approx(a.mean() - b.mean())
    assert together.interval.low > 0 and together.p < 0.01
    assert apart[0].low < apart[1].estimate
    assert paired_difference(b, a).interval.estimate == -together.interval.estimate


@pytest.mark.parametrize("n", [2, 4, 7])
def test_the_p_value_of_few_clips_is_that_of_all_signs(n):
    d = draws(n, seed=n) + 0.5
    means = [np.mean(d * signs) for signs in itertools.product((-1, 1), repeat=n)]
    as_far = np.abs(means) >= abs(d.mean()) - 1e-12
    assert paired_difference(d, 0 * d).p == pytest.approx(np.mean(as_far))


def test_the_p_value_of_many_clips_is_about_student_s():
    d = draws(50) + 0.3
    assert paired_difference(d, 0 * d).p == pytest.approx(stats.ttest_1samp(d, 0).pvalue, abs=0.01)


def test_over_seeds_it_is_student_s_test():
    a, b = draws(2, 5)
    found = paired_difference(a, b, over="seeds")
    assert found == Difference(t_interval(a - b), pytest.approx(stats.ttest_rel(a, b).pvalue))
    assert (found.p < 0.05) == (found.interval.low > 0 or found.interval.high < 0)


@pytest.mark.parametrize("over", ["clips", "seeds"])
def test_differences_that_never_vary_or_are_not_there(over):
    one, nan = np.ones(4), np.nan
    same, more = paired_difference(one, one, over), paired_difference(2 * one, one, over)
    assert same.p == 1 and more.interval[:4] == (1, 1, 1, 0)
    assert more.p == dict(clips=2 / 16, seeds=0)[over]
    holes = paired_difference([1, nan, 3, 5], [2, 2, nan, 8], over)
    assert holes == paired_difference([1, 5], [2, 8], over)
    assert np.isnan(paired_difference([1.0], [2.0], over).p)
    with pytest.raises(ValueError):
        paired_difference(one, one[:3], over)


def test_a_word_for_what_is_compared():
    with pytest.raises(ValueError, match="over clips or over seeds"):
        paired_difference([1, 2], [2, 3], over="people")


# many comparisons


def test_holm_by_hand():
    # · 3, · 1 but not under the .06 before it, · 2, · 4
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == pytest.approx([1, 1]) and holm([0.02]) == pytest.approx([0.02])
    assert len(holm([])) == 0
    with pytest.raises(ValueError, match="NaN"):
        holm([0.1, np.nan])


def test_of_differences_that_are_none_holm_finds_one_in_a_twentieth_of_the_studies():
    p = np.random.default_rng(0).random((2000, 20))
    plain, corrected = (np.mean([(f(row) < 0.05).any() for row in p]) for f in (np.asarray, holm))
    assert plain > 0.6 and 0.04 < corrected < 0.06


# how it is said


@pytest.mark.parametrize(
    "interval, spec, said",
    [
        (Interval(0.3712, 0.3512, 0.3912, 0.01, 55), ".2f", "0.37 ± 0.02"),
        (Interval(0.01, 0, 0.03, 0.01, 55), ".2f", "0.01 (0.00 to 0.03)"),
        (Interval(-0.0034, -0.0055, -0.0013, 0.001, 3), "+.4f", "-0.0034 ± 0.0021"),
        (Interval(0.5, np.nan, np.nan, np.nan, 1), "", "0.500 (n = 1)"),
    ],
)
def test_an_interval_is_said_with_its_sides(interval, spec, said):
    assert format(interval, spec) == said
