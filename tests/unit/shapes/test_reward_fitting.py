import math

import pytest
import torch

from capo.shapes.make.rewards import begun, holds_loss, inventory_loss, ship, words_loss
from capo.shapes.reward_networks import Judge, Rater, Verifier
from capo.shapes.rewards import fused, tokens

WIDTH = 1 + 9 + 8 + 3 + 1  # presence, shape or none, color, texture, radius


def test_the_product_of_probabilities_by_hand():
    half, sure = 0.0, 50.0  # logits of 0.5 and 1
    logits = torch.tensor([[half, half, sure], [half, sure, torch.inf]])
    # 0.25 and 0.5: -log p where it holds, -log(1 - p) where it does not
    assert holds_loss(logits, torch.tensor([True, True])).tolist() == pytest.approx(
        [math.log(4), math.log(2)]
    )
    assert holds_loss(logits, torch.tensor([False, False])).tolist() == pytest.approx(
        [-math.log(0.75), math.log(2)]
    )


def test_words_that_are_not_known_or_not_there_do_not_count():
    logits = torch.tensor([[0.0, 2.0, torch.inf]])
    wrong = torch.tensor([[1, -1, 0]], dtype=torch.int8)
    assert words_loss(logits, wrong).item() == pytest.approx(math.log(2))


def test_the_inventory_is_read_in_the_cell_of_the_center():
    things = torch.full((1, 2, 6), -1.0)
    things[0, 0] = torch.tensor([20.0, 41.0, 8.0, 3, 5, 1])  # cell of column 2, row 5
    told = torch.zeros(1, 64, WIDTH)
    blank = inventory_loss(told, things)
    # 64 presences at log 2 (times 4), log 9 + log 8 + log 3, radius 8 / 8 against 0
    assert blank.item() == pytest.approx(4 * math.log(2) + math.log(9 * 8 * 3) + 1, rel=1e-5)
    right, elsewhere = told.clone(), told.clone()
    right[0, 5 * 8 + 2, 1 + 3] = elsewhere[0, 0, 1 + 3] = 9.0
    assert inventory_loss(right, things) < blank - 2 and inventory_loss(elsewhere, things) == blank


@pytest.mark.parametrize("network", [Verifier, Judge, Rater])
def test_folding_the_normalization_changes_nothing(network):
    torch.manual_seed(0)
    module, x = network(), torch.rand(3, 3, 64, 64) * 2 - 1
    inputs = (
        (x,) if network is Rater else (x, tokens(["a red circle", "two stars and a ring", "three hearts"]))
    )
    for _ in range(3):
        module(*inputs)  # moves the running statistics away from 0 and 1
    before = module.eval()(*inputs)
    torch.testing.assert_close(fused(module)(*inputs), before, rtol=1e-4, atol=1e-5)


def test_several_sentences_about_a_picture_are_judged_as_each_alone():
    torch.manual_seed(0)
    module, x = Verifier().eval(), torch.rand(2, 3, 64, 64) * 2 - 1
    # two per picture
    words = tokens(["a red circle", "two stars and a ring", "three hearts", "a ring on the left"])
    cells = module.eye(x)
    together = module.words_right(cells, words)
    alone = torch.cat([module.words_right(cells[i // 2 : i // 2 + 1], words[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_shipped_weights_come_back_within_half_precision(tmp_path):
    from safetensors.torch import load_file

    module = Rater()
    ship(module, tmp_path / "rewards" / "looks.safetensors")
    state = load_file(tmp_path / "rewards" / "looks.safetensors")
    assert state.keys() == module.state_dict().keys() and not list(tmp_path.rglob("*.part"))
    for name, value in module.state_dict().items():
        torch.testing.assert_close(state[name].to(value.dtype), value, rtol=1e-3, atol=1e-4)


def test_a_reward_begins_from_shipped_weights_where_there_are_any(tmp_path):
    torch.manual_seed(1)
    old, fresh = Rater(), Rater()
    ship(old, tmp_path / "looks.safetensors")
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    assert all(torch.equal(value, before[name]) for name, value in begun(fresh, None).state_dict().items())
    for name, value in begun(fresh, tmp_path / "looks.safetensors").state_dict().items():
        torch.testing.assert_close(value, old.state_dict()[name].half().to(value.dtype), rtol=0, atol=0)
