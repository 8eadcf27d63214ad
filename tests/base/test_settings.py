"""Goals of tune are absolute, or relative to the model before training."""

from gradshield.base.settings import TuneSettings


def test_goals_are_absolute_or_relative_to_the_base_model():
    for text, base, expected in ((0.05, 0.3, 0.05), ("+0.07", 0.3, 0.37), ("0", 0.3, 0.0), (1, 0.0, 1.0)):
        assert TuneSettings(max_asr=text).highest_asr(base) == expected
    for text, expected in ((0.5, 0.5), ("-2.5", -2.5), ("base", -3.0), ("base-0.5", -3.5), ("base+1", -2.0)):
        assert TuneSettings(min_utility=text).lowest_utility(-3.0) == expected
    assert TuneSettings().highest_asr(0.9) == 0.05 and TuneSettings().lowest_utility(0.4) == 0.4
