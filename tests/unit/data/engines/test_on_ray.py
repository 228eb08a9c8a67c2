"""What the driver says itself; workers are in tests/integration/test_ray.py."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from capo.data.engines.on_ray import RayEngine
from capo.errors import InputError


class Forgetful(RayEngine):
    """Its workers write nothing that this machine sees."""

    def _make(self, *_):
        return None


def test_a_shard_that_is_not_there_after_it_was_made_is_told():
    stage = SimpleNamespace(
        name="latents",
        pool=SimpleNamespace(folder=Path("pools/x")),
        order=lambda: "latents",
        todo=lambda: [SimpleNamespace(name="00001-00"), SimpleNamespace(name="00000-00")],
    )
    with pytest.raises(
        InputError, match=r"^latents 00000-00 in pools/x was written .* do not see one folder, "
    ):
        Forgetful(build=lambda *_: None).run([stage])
