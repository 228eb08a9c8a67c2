import logging

import pytest

from capo.backbones.execution import Execution
from capo.errors import InputError

TOLD = "largest |h| of the first batch: 0.02, 2.00% of the mean dR / beta (1)"


def test_a_first_margin_within_the_tolerance_is_not_mentioned(caplog):
    Execution(compile=True).check_rounding(0.01, 1.0, TOLD)
    assert not caplog.records


def test_compiled_blocks_that_round_by_more_are_refused():
    with pytest.raises(InputError, match=r"compile=true: largest \|h\| .* trainer.compile_tolerance=0.01$"):
        Execution(compile=True).check_rounding(0.02, 1.0, TOLD)


def test_a_device_that_rounds_by_more_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        Execution().check_rounding(0.02, 1.0, TOLD)
    assert "this device rounds them differently" in caplog.text
