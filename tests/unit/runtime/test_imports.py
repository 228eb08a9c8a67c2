import gc

import pytest

from capo.runtime.imports import heavy_imports


@pytest.fixture(autouse=True)
def unfrozen():
    yield
    gc.unfreeze()
    gc.enable()


@pytest.mark.parametrize("on", [True, False])
def test_what_is_imported_is_neither_collected_meanwhile_nor_looked_at_later(on):
    gc.enable() if on else gc.disable()
    with heavy_imports():
        inside, stays = gc.isenabled(), [[] for _ in range(10)]
    assert not inside and gc.isenabled() == on
    assert not any(found is stays[0] for found in gc.get_objects())


def test_a_failed_import_turns_the_collector_on_again():
    with pytest.raises(ImportError), heavy_imports():
        raise ImportError("no such module")
    assert gc.isenabled()
