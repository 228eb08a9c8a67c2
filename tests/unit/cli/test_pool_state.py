"""What stands in the pools of a configuration, before anything is drawn into them."""

import pytest

from capo.cli import train as train_script
from capo.cli.build import build_components
from capo.cli.pool_state import show_status, verify
from capo.data.generation import open_pool
from capo.errors import InputError
from capo.runtime.terminal import Terminal


def test_a_pool_that_cannot_be_used_is_told_before_images_are_drawn_into_another(tiny_run, tmp_path):
    cfg = tiny_run("refused", f"pool.root={tmp_path}")
    components = build_components(cfg)
    pool = open_pool(components.pool_specs["train"], components.generator)
    (pool.folder / "prompts.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"prompts\.parquet"):
        train_script.run(cfg)
    assert list(tmp_path.iterdir()) == [pool.folder]  # none for the validation, which comes first


def test_a_verification_says_that_an_imported_pool_is_not_read(tiny_run, tmp_path, capsys):
    cfg = tiny_run("unread", f"pool.root={tmp_path}")
    components = build_components(cfg)
    cfg.pool.imported = str(tmp_path / "imported")
    verify(cfg, components, Terminal())
    told = " ".join(capsys.readouterr().out.split())
    assert (
        f"train: not read, since pool.imported={tmp_path}/imported; the stage=import that made it reads"
        in told
    )
    assert "validation: not begun" in told


def test_a_root_without_pools_is_named_and_verifies_nothing(tiny_run, tmp_path, capsys):
    cfg = tiny_run("nothing", f"pool.root={tmp_path / 'pols'}")
    components = build_components(cfg)
    with pytest.raises(InputError, match=rf"pool.root={tmp_path}/pols: none of the pools of this config"):
        verify(cfg, components, Terminal())
    (tmp_path / "run").mkdir()
    cfg.run_dir = str(tmp_path / "run")
    cfg.online.every = 1
    show_status(cfg, components, Terminal())
    told = capsys.readouterr().out
    assert "online.every: pools of rounds stand in the run directory, and are not looked at here" in told
    assert f"pool.root={tmp_path}/pols: none of the pools" in told.replace("\n", " ")
