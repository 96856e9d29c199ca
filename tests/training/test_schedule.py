"""The learning rate of a step, and its scale with the batch."""

import dataclasses

import pytest

from hpdm.recipe import Recipe, RecipeChanges
from hpdm.training.schedule import check_schedule, learning_rate, peak_rate, rate_of_step


def test_the_schedule_warms_up_and_comes_down():
    rates = [learning_rate(step, 100, 10, 1.0) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.0)


def test_a_constant_rate_stays_until_it_cools_down():
    rates = [learning_rate(step, 100, 10, 2.0, "constant", cooldown=20) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10:81] == [2.0] * 71
    assert rates[81:] == pytest.approx([0.1 * (100 - step) for step in range(81, 101)])
    assert learning_rate(99, 100, 10, 2.0, "constant") == 2.0


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1.0), ("sqrt", 0.5), ("linear", 0.25)])
def test_the_rate_follows_the_batch(scaling, factor):
    """From the preset's batch, 768, whatever the run's is."""
    recipe = RecipeChanges(batch=192, lr_scaling=scaling).applied_to(Recipe())
    assert peak_rate(recipe) == pytest.approx(0.005 * factor)
    assert rate_of_step(recipe, 4_999) == pytest.approx(0.0025 * factor)  # half of the warm-up
    again = RecipeChanges(batch=768).applied_to(recipe)
    assert peak_rate(again) == pytest.approx(0.005)


def test_schedules_that_contradict_themselves_are_refused():
    with pytest.raises(ValueError, match="cooldown: got 5 with schedule cosine, expected 0 or constant"):
        check_schedule(Recipe(cooldown=5))
    with pytest.raises(ValueError, match="cooldown: got 11, expected at most the run's 10 steps"):
        check_schedule(Recipe(steps=10, schedule="constant", cooldown=11))
    for name in ("schedule", "lr_scaling"):
        with pytest.raises(ValueError, match=f"{name}: got 'steep', expected one of"):
            check_schedule(dataclasses.replace(Recipe(), **{name: "steep"}))
