"""What the summary and the model card say of the optimization."""

from types import SimpleNamespace

import pytest

from capo.cli.compose import composed
from capo.cli.tune import facts_of

MODULE = SimpleNamespace(beta=300.0)


def facts(*overrides: str) -> dict[str, str]:
    return facts_of(composed("train", ["run_dir=run", *overrides]), MODULE)


@pytest.mark.parametrize("limit, told", [("0.5", "norm at most 0.5"), ("null", "none")])
def test_the_limit_of_the_gradient_is_told(limit, told):
    assert facts(f"trainer.gradient_clip={limit}")["gradient clipping"] == told
