import string
import sys
from pathlib import Path

import pytest

from capo.data.generation import PoolSpec
from capo.data.importing.filling import import_pool
from capo.data.pool import pool_name
from capo.data.prompts import make_prompt
from capo.errors import InputError
from capo.rewards import Reward
from capo.runtime.names import is_name

HOSTILE = [
    "../escaped", "..", ".", "...", "/absolute", "a/b", "a\\b", "C:\\b", "~", "~/b", "a b", " a", "a\n", "\n",
    "", "a\x00b", "ü", "\u202ea", "a%2fb", "$HOME", "[bold]", "x" * 101, None, 3, True,
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_a_folders_name_is_no_name_of_a_model_a_split_or_a_reward(name):
    prompts = [make_prompt("a cat")]
    with pytest.raises(InputError, match=r"^model .*: must be a name of at most 100 letters"):
        PoolSpec(Path("pools"), name, "train", 0, prompts, 2)
    with pytest.raises(InputError, match=r"^split .*: must be a name"):
        PoolSpec(Path("pools"), "sdxl", name, 0, prompts, 2)
    with pytest.raises(InputError, match=r"^model .*: must be a name"):
        import_pool(None, None, None, Path("pools"), name)
    with pytest.raises(InputError, match=r"^reward .*: must be a name"):
        Reward(name, lambda images, prompts: None)


def test_every_character_that_unicode_has():
    allowed = {chr(code) for code in range(sys.maxunicode + 1) if is_name(f"a{chr(code)}")}
    assert allowed == {*string.ascii_letters, *string.digits, *"._-"}


@pytest.mark.parametrize("name", ["sdxl", "SD3.5-medium_v2", "hpsv2.1", "..a", "-", "x" * 100])
def test_a_name_is_one_folder_below_the_root(name):
    assert is_name(name)
    path = Path("/pools") / pool_name(name, "f" * 64, 2**63, "validation")
    assert path.resolve().parent == Path("/pools") and len(path.name) < 255
