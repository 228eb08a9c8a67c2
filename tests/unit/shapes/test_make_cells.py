import numpy as np
import pytest
import torch

from capo.shapes.make import cells
from capo.shapes.make.scenery import captioned_scene, training_scene
from capo.shapes.render import render


def test_cells_know_the_nearest_thing_that_reaches_them():
    none = [0.0, 0.0, 0.0, 0.0]
    things = torch.tensor([[[3.0, 20.0, 12.0, 8.0], [5.0, 52.0, 52.0, 6.0], none, none], [none] * 4])
    kind, where = cells.cells(things)
    shown = kind[0].view(8, 8)
    # centers are at 4, 12, 20, ...: 8 + 4 pixels to each side of (20, 12) are three by three cells, without
    # those on the edge
    expected = torch.zeros(8, 8, dtype=torch.long)
    expected[0:3, 1:4] = 3
    expected[5:8, 5:8] = 5
    assert torch.equal(shown, expected) and not kind[1].any()
    # the cell in row 2, column 1 has its center at (12, 20): one cell left of and below the first object's
    assert where[0].view(8, 8, 3)[2, 1].tolist() == pytest.approx([-1.0, 1.0, 8 / 6 - 2])


def test_the_tellers_loss_is_the_kinds_cross_entropy_and_the_places_error_where_there_is_a_thing():
    torch.manual_seed(0)
    things = torch.tensor([[[1.0, 4.0, 4.0, 2.0]]])  # one cell of 64
    teller = cells.Teller(16)
    torch.nn.init.zeros_(teller.layers[-1].weight)
    torch.nn.init.zeros_(teller.layers[-1].bias)
    missed = (0 + 0 + (2 / 6 - 2) ** 2) / 3 / 64
    assert teller.loss(torch.randn(1, 64, 16), things).item() == pytest.approx(np.log(9) + missed, rel=1e-5)


def test_things_are_those_of_the_captioned_picture():
    request, scene, _ = training_scene(7, seed=0)
    assert np.array_equal(render(scene), captioned_scene(7, seed=0)[0])
    found = cells.things_of(7, seed=0)
    assert [tuple(row) for row in found[: len(scene.things), 1:]] == [
        tuple(np.float32([thing.x, thing.y, thing.radius])) for thing in scene.things
    ]
    assert (
        len(scene.things) == len(request.slots)
        and (found[: len(scene.things), 0] > 0).all()
        and not found[len(scene.things) :].any()
    )
