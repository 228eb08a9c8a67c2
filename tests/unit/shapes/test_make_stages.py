"""The program that trains the world's learned parts, one stage after another."""

import pytest

from capo.shapes.make.__main__ import main


@pytest.mark.parametrize("stage", ["autoencoder", "base"])
def test_a_stage_without_what_earlier_ones_make_names_it(tmp_path, capsys, stage):
    assert main([stage, "--work", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert f"error: {tmp_path}/scenes.npy is not there; stages before make it: scenes" in told
