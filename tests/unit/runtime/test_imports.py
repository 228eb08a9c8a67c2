import gc
import sys
from types import ModuleType

import pytest

from capo.runtime.imports import heavy_imports


@pytest.fixture(autouse=True)
def unfrozen():
    yield
    gc.unfreeze()
    gc.enable()


def is_looked_at(kept: list) -> bool:
    return any(found is kept for found in gc.get_objects())


@pytest.mark.parametrize("on", [True, False])
def test_what_is_imported_is_neither_collected_meanwhile_nor_looked_at_later(on, monkeypatch):
    gc.enable() if on else gc.disable()
    with heavy_imports():
        monkeypatch.setitem(sys.modules, "heavy", ModuleType("heavy"))
        inside, stays = gc.isenabled(), []
    assert not inside and gc.isenabled() == on
    assert not is_looked_at(stays)


def test_what_a_job_left_is_not_kept_by_the_next_which_imports_nothing_new():
    left = []
    with heavy_imports():
        import gc as known
    assert known is gc and is_looked_at(left)


def test_a_failed_import_turns_the_collector_on_again():
    with pytest.raises(ImportError), heavy_imports():
        raise ImportError("no such module")
    assert gc.isenabled()
