"""Verdicts follow from intervals that cover seeds and test images as often as they say."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from robust_jax.app.stored import Evidence
from robust_jax.app.studies import claims, measures, study
from robust_jax.app.studies.intervals import Interval, as_wide_as, interval, seeds_needed
from robust_jax.errors import UserError


def result(clean=0.9, pgd=0.5):
    attacks = [{"name": "pgd", "attack": "pgd", "norm": "linf", "eps": 0.1, "robust_accuracy": pgd}]
    return {"clean": {"accuracy": clean}, "attacks": attacks, "audit": None}


def found(**arms):
    """Made-up runs from the robust accuracy of each seed, by arm."""
    return {
        arm: {i: Evidence(result(pgd=v)) for i, v in enumerate(values)}
        for arm, values in arms.items()
    }


def seen(**arms):
    """Made-up runs from the images that each seed holds, [seeds, images], by arm."""
    return {
        arm: {
            seed: Evidence(result(pgd=np.mean(held)), table(held))
            for seed, held in enumerate(by_seed)
        }
        for arm, by_seed in arms.items()
    }


def table(held, correct=True):
    return pd.DataFrame(
        {"index": np.arange(len(held)), "correct": correct, "pgd@0.1/held": np.array(held, bool)}
    )


def judge(runs, *tests):
    return claims.judge("", tests, runs)


ABOVE = {"measure": "pgd@0.1", "arms": ("b", "a"), "relation": "above"}


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ((0.5, 0.52, 0.48), (0.6, 0.61, 0.59), "supported"),
        ((0.6, 0.61, 0.59), (0.5, 0.52, 0.48), "refuted"),
        ((0.5, 0.6, 0.4), (0.55, 0.45, 0.5), "inconclusive"),
        ((0.5, 0.5, 0.5), (0.6, 0.6, 0.6), "inconclusive"),  # an interval without width
        ((0.5, 0.4), (0.9, 0.8), "no verdict"),  # an interval needs three seeds
        ((0.5,), (0.9,), "no verdict"),
        ((), (), "no verdict"),
    ],
)
def test_a_verdict_follows_from_the_paired_differences(a, b, verdict):
    assert judge(found(a=a, b=b), ABOVE)["verdict"] == verdict


def test_seeds_are_paired_so_that_what_they_share_cancels():
    a = np.array([0.3, 0.5, 0.7])
    test = judge(found(a=a, b=a + [0.02, 0.021, 0.019]), ABOVE)["tests"][0]
    assert test["verdict"] == "supported"
    np.testing.assert_allclose(test["mean"], 0.02)
    expected = stats.ttest_1samp([0.02, 0.021, 0.019], 0).confidence_interval(0.95)
    np.testing.assert_allclose((test["low"], test["high"]), expected)


def test_all_tests_of_a_claim_must_hold_and_one_refutes_it():
    runs = found(a=(0.5, 0.52, 0.48), b=(0.6, 0.61, 0.59), c=(0.4, 0.7, 0.5))
    unsure = {**ABOVE, "arms": ("c", "a")}
    wrong = {**ABOVE, "relation": "below"}
    assert judge(runs, ABOVE, ABOVE)["verdict"] == "supported"
    assert judge(runs, ABOVE, unsure)["verdict"] == "inconclusive"
    assert judge(runs, ABOVE, unsure, wrong)["verdict"] == "refuted"
    runs["d"] = dict(list(runs["c"].items())[:1])  # one seed gives no verdict
    assert judge(runs, ABOVE, {**ABOVE, "arms": ("d", "a")})["verdict"] == "no verdict"
    assert judge(runs, wrong, {**ABOVE, "arms": ("d", "a")})["verdict"] == "refuted"


def test_margins_levels_and_trends():
    runs = found(a=(0.5, 0.5, 0.51), b=(0.49, 0.491, 0.5), c=(0.2, 0.21, 0.2))
    within = {**ABOVE, "by": -0.02}
    assert judge(runs, within)["verdict"] == "supported"
    assert judge(runs, ABOVE)["verdict"] == "refuted"
    # A tolerance replaces a smallest effect, and -1.2 points or so are within two.
    assert judge(runs, {**within, "smallest_effect": 0.02})["verdict"] == "supported"
    worse = found(b=(0.47, 0.461, 0.48), a=(0.51, 0.5, 0.519))
    assert judge(worse, {**within, "smallest_effect": 0.02})["verdict"] == "refuted"
    unsure = found(b=(0.47, 0.48, 0.5), a=(0.49, 0.49, 0.49))
    judged = judge(unsure, {**within, "smallest_effect": 0.02})
    assert judged["verdict"] == "inconclusive" and judged["tests"][0]["widest"] == 0.02
    level = {"measure": "pgd@0.1", "arms": ("c",), "relation": "below", "level": 0.3}
    assert judge(runs, level)["verdict"] == "supported"
    falls = {"measure": "pgd@0.1", "arms": ("a", "b", "c"), "relation": "falls", "at": (0, 1, 2)}
    judged = judge(runs, falls)
    assert judged["verdict"] == "supported"
    np.testing.assert_allclose(judged["tests"][0]["values"], [0.3, 0.29, 0.31])
    assert judge(runs, {**falls, "relation": "rises"})["verdict"] == "refuted"


def test_most_of_several_entries_each_with_a_verdict_of_its_own():
    weak = {"a": (3.0, 3.1, 2.9, 3.0), "b": (2.0, 2.1, 1.9, 2.0), "c": (1.0, 5.0, 1.0, 5.0)}
    strong = {"a": (2.0, 2.1, 2.0, 1.9), "b": (1.5, 1.4, 1.6, 1.5), "c": (3.0, 3.0, 3.0, 3.0)}
    runs = {
        arm: {
            seed: Evidence(
                {"measurements": {"spectra": {f"spread/{k}": v[seed] for k, v in of.items()}}}
            )
            for seed in range(4)
        }
        for arm, of in {"weak": weak, "strong": strong}.items()
    }
    falls = {
        "measure": "measurements.spectra.spread/*",
        "arms": ("weak", "strong"),
        "relation": "falls",
    }
    judged = judge(runs, falls)
    assert judged["verdict"] == "supported"
    (test,) = judged["tests"]
    verdicts = {name: entry["verdict"] for name, entry in test["entries"].items()}
    assert verdicts == {"a": "supported", "b": "supported", "c": "inconclusive"}
    alone = judge(runs, {**falls, "measure": "measurements.spectra.spread/a"})["tests"][0]
    for of in ("values", "mean", "low", "high"):
        np.testing.assert_allclose(test["entries"]["a"][of], alone[of])
    np.testing.assert_allclose(test["values"], [2 / 3, 1, 2 / 3, 1])
    assert judge(runs, {**falls, "relation": "rises"})["verdict"] == "refuted"
    small = judge(runs, {**falls, "smallest_effect": "70 %"})["tests"][0]
    assert small["verdict"] == "supported, but small"  # a falls by a third, b by a quarter
    np.testing.assert_allclose(small["entries"]["a"]["smallest_effect"], 2.1)
    other = {**falls, "measure": "measurements.spectra.spread/z*"}
    assert judge(runs, other)["verdict"] == "no verdict"
    two = {arm: {seed: runs[arm][seed] for seed in range(2)} for arm in runs}
    assert judge(two, falls)["verdict"] == "no verdict"
    # Seeds are added for each entry, whose interval is then as wide as asked.
    wide = {**falls, "widest": 2.0}
    assert claims.needs_more_seeds(claims.judge_test(wide, runs))  # c's is wider
    entries = claims.judge_test(wide, runs, adds_seeds=True)["entries"]
    assert all(entry["high"] - entry["low"] >= 2 - 1e-9 for entry in entries.values())
    assert not claims.needs_more_seeds(claims.judge_test({**falls, "widest": 20.0}, runs))


def test_an_entry_that_is_not_a_number_or_not_there_decides_nothing():
    spread = {"weak": {"a": 3.0, "b": 2.0, "c": 1.0}, "strong": {"a": 2.0, "b": 1.0, "c": 0.5}}
    runs = {
        arm: {
            seed: Evidence(
                {
                    "measurements": {
                        "spectra": {f"spread/{k}": v + seed * v / 100 for k, v in of.items()}
                    }
                }
            )
            for seed in range(3)
        }
        for arm, of in spread.items()
    }
    falls = {
        "measure": "measurements.spectra.spread/*",
        "arms": ("weak", "strong"),
        "relation": "falls",
    }
    assert judge(runs, falls)["verdict"] == "supported"
    runs["weak"][1].results["measurements"]["spectra"]["spread/a"] = None  # was infinite
    del runs["strong"][0].results["measurements"]["spectra"]["spread/b"]
    (test,) = judge(runs, falls)["tests"]
    verdicts = {name: entry["verdict"] for name, entry in test["entries"].items()}
    assert verdicts == {"a": "no verdict", "b": "no verdict", "c": "supported"}
    assert test["verdict"] == "no verdict" and test["values"] == [1.0, 1.0, 1.0]
    for run in runs["weak"].values():
        run.results["measurements"]["spectra"]["spread/a"] = None
    (test,) = judge(runs, falls)["tests"]
    assert test["entries"]["a"]["mean"] is None and test["verdict"] == "no verdict"


def test_each_entry_that_is_a_mean_over_images_has_an_interval_for_other_images():
    rng = np.random.default_rng(0)
    layers = ("conv", "head")
    change = {(arm, layer): rng.random(50) for arm in ("a", "b") for layer in layers}
    runs = {
        arm: {
            seed: Evidence(
                {
                    "measurements": {
                        "features": {
                            f"random/{n}": change[arm, n].mean() + seed / 100 for n in layers
                        }
                    }
                },
                arrays={
                    f"features/of_images/random/{n}": change[arm, n] + seed / 100 for n in layers
                },
            )
            for seed in range(3)
        }
        for arm in ("a", "b")
    }
    (test,) = judge(runs, {**ABOVE, "measure": "measurements.features.random/*"})["tests"]
    assert test["images"] == 50
    for layer, entry in test["entries"].items():
        (alone,) = judge(runs, {**ABOVE, "measure": f"measurements.features.random/{layer}"})[
            "tests"
        ]
        assert entry["high"] - entry["low"] == alone["high"] - alone["low"] > 0.1
        assert entry["images"] == 50


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ("sss-r", "supported"),
        ("ss--", "inconclusive"),  # half is not most
        ("ss-r", "inconclusive"),
        ("s-rr", "refuted"),
        ("r", "refuted"),
        ("sm-", "supported, but small"),
        ("m--", "inconclusive"),
        ("ss0", "supported"),
        ("rr0", "refuted"),
        ("s-0", "no verdict"),
        ("", "no verdict"),
    ],
)
def test_most(verdicts, expected):
    words = {"s": "supported", "m": "supported, but small", "r": "refuted", "-": "inconclusive"}
    words["0"] = "no verdict"
    assert claims.majority([words[v] for v in verdicts]) == expected


def test_a_seed_that_one_arm_lacks_is_left_out():
    runs = found(a=(0.5, 0.52, 0.48, 0.1), b=(0.6, 0.61, 0.59))
    assert len(judge(runs, ABOVE)["tests"][0]["values"]) == 3


def test_intervals_of_accuracies_stay_between_none_and_all():
    found = interval([0.0, 0.3, 0.1], bounds=measures.bounds("pgd@0.1"))
    assert found.low == 0 and found.high < 1
    assert measures.bounds("clean.accuracy - pgd@0.1") == (-1, 1)
    assert measures.bounds("measurements.outputs.mean_margin")[0] == -np.inf
    saturated = "measurements.outputs.saturated"
    assert measures.bounds(saturated) == (0, 1)
    assert measures.bounds(f"{saturated} - {saturated}") == (-1, 1)
    assert measures.bounds("measurements.interior.worst_inside") == (0, 1)
    confidence = "measurements.outputs.mean_confidence"
    assert measures.bounds(confidence) == (0, 1)
    assert measures.bounds(f"{confidence} - {confidence}")[0] == -np.inf


@pytest.mark.parametrize(
    "measure",
    [
        "measurements.energy_free.path",
        "measurements.interior.loss/50",
        "clean.cross_entropy",
        "training.last.minimum_distance_clever",
        "training.last.distance_q10",
    ],
)
def test_intervals_of_numbers_that_are_never_negative_begin_at_zero(measure):
    assert measures.bounds(measure) == (0, np.inf)
    assert measures.bounds(f"{measure} - {measure}") == (-np.inf, np.inf)


def test_gaps_and_margins_may_be_negative():
    for measure in ("measurements.gaps.cross_entropy", "training.last.average_margin"):
        assert measures.bounds(measure) == (-np.inf, np.inf)
    assert measures.bounds("measurements.generalisation.accuracy") == (-1, 1)
    others = [name for of, names in measures.NUMBERS.items() if of != "gaps" for name in names]
    assert not {*others} & {*measures.NUMBERS["gaps"]}


def test_intervals_of_differences_of_accuracies_stay_between_minus_and_plus_one():
    runs = found(a=(0.0, 1.0, 0.0), b=(1.0, 0.0, 1.0))
    (test,) = judge(runs, ABOVE)["tests"]
    assert test["low"] == -1 and test["high"] == 1
    (test,) = judge(runs, {**ABOVE, "by": 0.25})["tests"]
    assert test["low"] == -1.25 and test["high"] == 0.75


def test_an_interval_has_closed_forms_where_only_one_thing_varies():
    of_seeds = np.array([0.1, 0.4, 0.2])
    expected = stats.ttest_1samp(of_seeds, 0).confidence_interval(0.95)
    np.testing.assert_allclose(interval(of_seeds)[1:3], expected)
    np.testing.assert_allclose(interval(np.outer(of_seeds, np.ones(400)))[1:3], expected)
    of_images = np.random.default_rng(0).normal(size=400)
    expected = stats.ttest_1samp(of_images, 0).confidence_interval(0.95)
    same = interval(np.tile(of_images, (3, 1)))
    np.testing.assert_allclose(same[1:3], expected)
    np.testing.assert_allclose(2 * same.from_images, same.high - same.low)
    # Nothing varies, so this bounds the probability of an event not seen in 400 images.
    never = stats.binomtest(0, 400).proportion_ci(0.95).high
    np.testing.assert_allclose(interval(np.zeros((3, 400)))[1:3], (-never, never), rtol=0.01)


def test_an_interval_is_that_of_a_crossed_analysis_of_variance():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(4, 1)) + rng.normal(size=60) + rng.normal(size=(4, 60))
    grand, rows, columns = x.mean(), x.mean(1, keepdims=True), x.mean(0)
    squares = {
        "seeds": 60 * ((rows - grand) ** 2).sum() / 3,
        "images": 4 * ((columns - grand) ** 2).sum() / 59,
        "residual": ((x - rows - columns + grand) ** 2).sum() / (3 * 59),
    }
    of_seeds = stats.t.ppf(0.975, 3) ** 2 * squares["seeds"] / 240
    of_images = stats.t.ppf(0.975, 59) ** 2 * (squares["images"] - squares["residual"]) / 240
    half = np.sqrt(of_seeds + of_images)
    np.testing.assert_allclose(interval(x)[:3], (grand, grand - half, grand + half))


def differences(rng, num_seeds, num_images, seed, image, both):
    """Which of two equal networks holds against an attack, as -1, 0 or 1, [seeds, images]."""

    def held():
        x = image * rng.normal(size=num_images) + seed * rng.normal(size=(num_seeds, 1))
        return shared + x + both * rng.normal(size=(num_seeds, num_images)) > 0

    shared = rng.normal(size=num_images)
    return held().astype(float) - held()


# The standard deviations of the effects of the seed, of the image and of both together.
@pytest.mark.parametrize("effects", [(0, 1, 1), (0.02, 1, 0.1), (0.1, 0.5, 0.5), (0.3, 0.1, 0.3)])
@pytest.mark.parametrize("num_seeds", [3, 5, 10])
def test_an_interval_covers_the_truth_as_often_as_it_says(num_seeds, effects):
    rng = np.random.default_rng(num_seeds)
    found = [interval(differences(rng, num_seeds, 500, *effects)) for _ in range(600)]
    covered = np.mean([i.low <= 0 <= i.high for i in found])
    assert 0.93 <= covered <= 0.99


def test_seeds_alone_would_cover_it_far_too_rarely():
    rng = np.random.default_rng(0)
    alike = [differences(rng, 5, 500, 0.02, 1, 0.1) for _ in range(300)]
    covered = np.mean([i.low <= 0 <= i.high for i in (interval(x.mean(1)) for x in alike)])
    assert covered < 0.5


def alike(count, *, only_b, only_a=0, seeds=3):
    """Two arms that hold the same half of the images in every seed, apart from the first few."""
    a = np.arange(count) >= count // 2
    b = a.copy()
    b[:only_b] = True
    b[count - only_a :] = False
    return seen(a=np.tile(a, (seeds, 1)), b=np.tile(b, (seeds, 1)))


@pytest.mark.parametrize(
    ("runs", "smallest", "verdict"),
    [
        (alike(1000, only_b=100), 0.01, "supported"),
        (alike(1000, only_b=20), 0.05, "supported, but small"),
        (alike(1000, only_b=20), 0.02, "supported"),  # it may be worth claiming
        (alike(1000, only_b=0), 0.01, "refuted"),  # no effect of a point or more
        (alike(1000, only_b=0), 0.0, "inconclusive"),  # there may be some effect
        (alike(100, only_b=0), 0.01, "inconclusive"),  # too few images to tell
        (alike(1000, only_b=10, only_a=10), 0.001, "inconclusive"),
        (alike(1000, only_b=0, only_a=50), 0.01, "refuted"),
        (alike(1000, only_b=100, seeds=2), 0.01, "no verdict"),
    ],
)
def test_images_decide_where_seeds_agree_and_no_effect_is_a_verdict(runs, smallest, verdict):
    judged = judge(runs, {**ABOVE, "smallest_effect": smallest})
    assert judged["verdict"] == judged["tests"][0]["verdict"] == verdict


def test_an_effect_that_is_small_does_not_make_a_claim_more_than_that():
    small = {**ABOVE, "smallest_effect": 0.3}
    runs = alike(1000, only_b=100)
    assert judge(runs, ABOVE, small)["verdict"] == "supported, but small"
    other = {**ABOVE, "relation": "below"}
    assert judge(runs, other, small)["verdict"] == "refuted"


def test_images_are_paired_by_their_index_where_every_run_has_them():
    rng = np.random.default_rng(0)
    held = rng.random((2, 3, 200)) < 0.5
    runs = seen(a=held[0], b=held[1])
    shuffled = runs["b"][1].records.sample(frac=1, random_state=0)
    runs["b"][1] = runs["b"][1]._replace(records=shuffled.reset_index(drop=True))
    part = runs["a"][2].records.iloc[:150]  # a smaller evaluation of one run
    runs["a"][2] = runs["a"][2]._replace(records=part)
    judged = claims.judge_test(ABOVE, runs)
    difference = held[1, :, :150].astype(float) - held[0, :, :150]
    assert judged["images"] == 150
    np.testing.assert_allclose(judged["values"], difference.mean(1))
    np.testing.assert_allclose((judged["low"], judged["high"]), interval(difference)[1:3])
    runs["a"][0] = runs["a"][0]._replace(records=None)
    assert claims.judge_test(ABOVE, runs)["images"] is None  # then only the seeds count


def test_shares_of_images_are_read_from_the_records():
    records = table([1, 1, 0, 0, 0], correct=[1, 1, 1, 1, 0])
    records["fgsm@0.05/held"] = pd.array([True, False, True, None, None], dtype="boolean")
    attacks = [
        {"name": "pgd", "attack": "pgd", "norm": "linf", "eps": 0.1},
        {"name": "fgsm", "attack": "fgsm", "norm": "linf", "eps": 0.05},
        {"name": "worst_case_linf", "attack": "worst_case", "norm": "linf", "eps": 0.1, "count": 5},
    ]
    records["cross_entropy"] = [0.5, 1.0, 2.0, 3.0, 4.0]
    records["relative_slope"] = [1.0, np.inf, 1.0, 1.0, 1.0]
    records["frobenius_logits"] = [4.0, 2.0, 6.0, 8.0, 10.0]
    records["spectral_logits"] = [4.0, 2.0, 6.0, 8.0, np.nan]
    arrays = {
        "energy/of_images/path": np.array([0.0, 1.0]),
        "energy/of_images/rise": np.array([0.0, 1.0]),
        "margins/of_images/mean": np.array([-np.inf, 0.0, np.inf]),
    }
    measured = {"energy": {"path": 0.5, "rise": 0.7}, "margins": {"mean": 0.0}}
    run = {
        "attacks": [{**attack, "robust_accuracy": 0} for attack in attacks],
        "temperature": 2.0,
        "measurements": measured,
    }

    def outcomes(measure):
        found = measures.outcomes(run, records, arrays, measure)
        return None if found is None else found.to_dict()

    assert outcomes("clean.accuracy") == {0: 1, 1: 1, 2: 1, 3: 1, 4: 0}
    assert outcomes("fgsm@0.05") == {0: 1, 1: 0, 2: 1}
    assert outcomes("worst_case_linf@0.1") == {0: 1, 1: 0, 2: 0, 3: 0, 4: 0}
    assert outcomes("clean.accuracy - pgd@0.1") == {0: 0, 1: 0, 2: 1, 3: 1, 4: 0}
    assert outcomes("clean.accuracy - fgsm@0.05") == {0: 0, 1: 1, 2: 0}
    assert outcomes("clean.cross_entropy") == {0: 0.5, 1: 1, 2: 2, 3: 3, 4: 4}
    assert outcomes("relative_slope.mean") is None  # two logits are equal
    assert outcomes("jacobian.logits.frobenius.mean") == {0: 4, 1: 2, 2: 6, 3: 8, 4: 10}
    assert outcomes("jacobian.matched.frobenius.mean") == {0: 2, 1: 1, 2: 3, 3: 4, 4: 5}
    assert outcomes("measurements.energy.path") == {0: 0, 1: 1}
    for other in (
        # In turn: an image without a value, no column, not a mean, infinite values.
        *("jacobian.logits.spectral.mean", "jacobian.probabilities.frobenius.mean"),
        *("jacobian.logits.frobenius.median", "measurements.margins.mean"),
        "measurements.energy.rise",  # its array is from another measurement
        *("measurements.energy.oscillation", "pgd@0.3", "training.last.robust_accuracy"),
    ):
        assert outcomes(other) is None


def test_a_mean_over_images_has_an_interval_for_other_images():
    """An energy of 200 images on which the seeds agree is no more certain than the images."""
    rng = np.random.default_rng(0)
    of_images = {"a": rng.normal(size=200), "b": rng.normal(size=200)}
    runs = {
        arm: {
            seed: Evidence(
                {"measurements": {"energy": {"path": values.mean() + seed / 1000}}},
                arrays={"energy/of_images/path": values + seed / 1000},
            )
            for seed in range(3)
        }
        for arm, values in of_images.items()
    }
    test = {**ABOVE, "measure": "measurements.energy.path"}
    judged = claims.judge_test(test, runs)
    difference = of_images["b"] - of_images["a"]
    expected = stats.ttest_1samp(difference, 0).confidence_interval(0.95)
    np.testing.assert_allclose((judged["low"], judged["high"]), expected)
    assert judged["images"] == 200
    assert not 2 * judged["from_images"] > judged["high"] - judged["low"] + 1e-9
    # Where all images are alike, only a share may still differ on unseen images.
    for by_seed in runs["a"].values():
        by_seed.arrays["energy/of_images/path"][:] = by_seed.results["measurements"]["energy"][
            "path"
        ]
    alike = claims.judge_test({**test, "arms": ("a",), "level": 0.0}, runs)
    assert alike["images"] == 200 and alike["from_images"] < 1e-9


def test_unseen_images_count_where_an_image_is_right_or_wrong_in_a_measurement():
    found = interval(np.zeros((3, 200)), shares=measures.is_share("measurements.outputs.saturated"))
    assert found.high == pytest.approx(-np.log(0.025) / 200)


def test_a_smallest_effect_can_be_a_share_of_what_it_is_compared_with():
    runs = {
        arm: {i: Evidence({"jacobian": v}) for i, v in enumerate(values)}
        for arm, values in {"a": (10.0, 11.0, 9.0), "b": (9.0, 10.0, 8.1)}.items()
    }
    below = {"measure": "jacobian", "arms": ("b", "a"), "relation": "below"}
    for size, verdict in (("5 %", "supported"), ("20 %", "supported, but small")):
        judged = claims.judge_test({**below, "smallest_effect": size}, runs)
        np.testing.assert_allclose(judged["smallest_effect"], float(size[:-2]) / 10)
        assert judged["verdict"] == verdict
    falls = {**below, "arms": ("a", "b"), "relation": "falls", "smallest_effect": "5 %"}
    np.testing.assert_allclose(claims.judge_test(falls, runs)["smallest_effect"], 0.5)


def test_seeds_are_added_for_widths_and_for_nothing_else():
    noisy = found(a=(0.5, 0.52, 0.48), b=(0.6, 0.65, 0.55))
    width = {**ABOVE, "widest": 0.1}
    judged = claims.judge_test(width, noisy)
    assert claims.needs_more_seeds(judged)
    for shift in (-0.5, -0.1, 0.0, 0.3):  # wherever the interval is
        moved = {**judged, **{end: judged[end] + shift for end in ("mean", "low", "high")}}
        assert claims.needs_more_seeds(moved)
    assert not claims.needs_more_seeds(claims.judge_test({**ABOVE, "widest": 0.5}, noisy))
    assert not claims.needs_more_seeds(claims.judge_test(ABOVE, noisy))  # no width is asked for
    assert claims.needs_more_seeds(claims.judge_test(width, found(a=(0.5, 0.5), b=(0.6, 0.6))))
    assert not claims.needs_more_seeds(claims.judge_test(width, found(a=(), b=())))
    few = alike(100, only_b=10, only_a=10)  # the images are too few, not the seeds
    assert not claims.needs_more_seeds(claims.judge_test(width, few))


def test_seeds_that_would_be_needed_make_the_interval_as_narrow_as_was_asked():
    values = np.random.default_rng(0).normal(size=5)
    known = interval(values)

    def half(count, from_images=0.0):
        of_seeds = stats.t.ppf(0.975, count - 1) * values.std(ddof=1) / np.sqrt(count)
        return np.hypot(of_seeds, from_images)

    count = seeds_needed(0.8, known, 5)
    assert 5 < count < 1000 and 2 * half(count) <= 0.8 < 2 * half(count - 1)
    assert seeds_needed(2.1 * half(5), known, 5) == 5
    assert seeds_needed(1e-3, known, 5) is None
    wider = Interval(0.0, -half(5, 0.3), half(5, 0.3), 0.3)
    count = seeds_needed(0.8, wider, 5)
    assert 2 * half(count, 0.3) <= 0.8 < 2 * half(count - 1, 0.3)
    assert seeds_needed(0.6, wider, 5) is None  # the images alone are as wide


def test_the_width_that_was_asked_for_never_makes_an_interval_narrower():
    runs = found(a=(0.0, 0.0, 0.0), b=(1.0, 0.28, 1.0))  # its upper end is cut at 1
    for widest in (0.0, 0.1, 3.0):
        plain, asked = (
            claims.judge_test({**ABOVE, "widest": widest}, runs, adds_seeds=adds_seeds)
            for adds_seeds in (False, True)
        )
        assert plain["high"] == 1
        assert asked["low"] <= plain["low"] and asked["high"] >= plain["high"]
        assert widest == 3 or (asked["low"], asked["high"]) == (plain["low"], plain["high"])


@pytest.mark.parametrize("effects", [(0.1, 0.5, 0.5), (0.3, 0.1, 0.3)])
def test_an_interval_of_the_width_that_was_asked_covers_the_truth(effects):
    rng, covered = np.random.default_rng(0), []
    for _ in range(300):
        outcomes = differences(rng, 10, 500, *effects)
        for num_seeds in range(3, 11):
            known = as_wide_as(0.2, interval(outcomes[:num_seeds]))
            if known.high - known.low <= 0.2 * (1 + 1e-9):
                break
        covered.append(known.low <= 0 <= known.high)
    assert np.mean(covered) >= 0.93


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ("a",)}, "a test 'above': give it two arms, or one and a level"),
        ({"arms": ("a", "b", "c")}, "give it two arms, or one and a level"),
        ({"level": 0.5}, "give it two arms, or one and a level"),
        ({"at": (0.0, 1.0)}, "give it two arms, or one and a level"),
        (
            {"relation": "rises", "arms": ("a",)},
            "a test that 'rises': give two or more arms, no level",
        ),
        ({"relation": "falls", "level": 0.5}, "give two or more arms, no level"),
        ({"relation": "falls", "at": (0.0, 0.1, 0.2)}, "give a number for each of 2 arms"),
        ({"measure": "a - b - c"}, "give one difference, or a . alone"),
        ({"measure": "a - b/*"}, "give one difference, or a . alone"),
    ],
)
def test_a_test_that_compares_nothing_is_told(changes, message):
    with pytest.raises(UserError, match=message):
        claims.check_form({**ABOVE, **changes}, "config.claims.a")
    claims.check_form(ABOVE, "config.claims.a")


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ({"smallest_effect": "5 %"}, "'5 %'; pgd@0.1 is a share, so a point is 0.01"),
        ({"smallest_effect": -0.1}, "is -0.1; it is a number in the unit of the measure"),
        ({"smallest_effect": "much"}, "is 'much'; it is a number"),
        (
            {"measure": "m", "level": 0.0, "smallest_effect": "5 %"},
            "with a level it must be a number",
        ),
        ({"measure": "pgd@0.1", "smallest_effect": "5 %"}, "is a share"),
    ],
)
def test_a_size_that_is_none_is_told(test, message):
    with pytest.raises(UserError, match=message):
        claims.check_size({**ABOVE, **test}, "smallest_effect", "config.claims.a's smallest_effect")
    claims.check_size({**ABOVE, "measure": "m", "smallest_effect": "5 %"}, "smallest_effect", "")


def test_a_difference_in_the_table_is_over_the_images_of_both():
    held = np.arange(20) % 2
    records = table(np.ones(20), correct=np.arange(20) < 15)
    records["few@0.1/held"] = pd.array([*map(bool, held[:8]), *[None] * 12], dtype="boolean")
    entry = {"name": "few", "attack": "few", "norm": "linf", "eps": 0.1, "robust_accuracy": 0.5}
    run = {"clean": {"accuracy": 0.75}, "attacks": [entry]}
    found = study._summary("clean.accuracy - few@0.1", {s: Evidence(run, records) for s in (0, 1)})
    assert found["values"] == {"0": 0.5, "1": 0.5} and found["mean"] == 0.5  # not 0.75 - 0.5
