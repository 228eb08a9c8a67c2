"""Keys of the command line that another value leaves without effect."""

import pytest

from capo.cli import train
from capo.cli.idle import check_idle
from capo.errors import InputError


@pytest.mark.parametrize(
    ("idle", "other"),
    [
        ("noise.inversion.steps=3", "noise.source=inverted"),
        ("noise.reduction=inside", "noise.times_per_pair=2"),
        ("noise.bias=4", "noise.weighting=sigmoid"),
        ("anchor.slack=1", "anchor.weight=1"),
        ("pool.labels=human", "pool.imported=folder"),
        ("evaluation.diversity_prompts=5", "evaluation.diversity=auto"),
    ],
)
def test_a_key_without_effect_is_refused_until_the_key_it_counts_with_is_given(tiny_run, idle, other):
    without = ["noise.weighting=constant", "evaluation.diversity=null"]
    with pytest.raises(InputError, match=f"^{idle} counts with {other.split('=')[0]}="):
        check_idle(tiny_run("unused", *without, idle), [idle])
    check_idle(tiny_run("unused", *without, idle, other), [idle])
    check_idle(tiny_run("unused", *without, idle), [])  # of a file


def test_a_penalty_that_is_off_in_words_is_no_fault(tiny_run):
    off, given = ["anchor.slack=0", "anchor.weight=0"], ["anchor.slack=1", "anchor.weight=0"]
    check_idle(tiny_run("unused", *off), off)
    with pytest.raises(InputError, match=r"^anchor\.slack=1 counts with anchor\.weight=WEIGHT above 0 alone"):
        check_idle(tiny_run("unused", *given), given)


def test_a_run_that_has_begun_keeps_such_a_key(tiny_run, monkeypatch):
    values = ["noise.weighting=constant", "noise.bias=4"]
    cfg = tiny_run("begun", *values)
    reached = []
    monkeypatch.setattr(train, "refuse_early", lambda given: reached.append(given) or 1 / 0)
    with pytest.raises(InputError, match=r"^noise\.bias=4 counts with"):
        train.run(cfg, given=values)
    (tiny_run.folder / "begun").mkdir(exist_ok=True)
    (tiny_run.folder / "begun" / "config.yaml").touch()
    with pytest.raises(ZeroDivisionError):
        train.run(cfg, given=values)
    assert reached == [cfg]
