"""Measured rates on disk: what is read back, and what is refused with its reason."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from capo.errors import InputError
from capo.preflight import rates
from capo.preflight.rates import Measurement, check_folder, measured_rate, read_rate, write_rate

STEP = Measurement("latents", "a card", {"batch": 4, "shape": (1, 2)})


def test_a_rate_is_read_back_for_the_same_device_and_settings_alone(tmp_path):
    write_rate(tmp_path, STEP, 2.0)
    path = write_rate(tmp_path, STEP, 2.5)
    assert read_rate(tmp_path, STEP) == (2.5, None) and len(list(path.parent.iterdir())) == 1
    for other in (
        Measurement("latents", "another card", STEP.settings),
        Measurement("latents", "a card", STEP.settings | {"batch": 8}),
        Measurement("text", "a card", STEP.settings),
    ):
        assert read_rate(tmp_path, other) == (None, None)


@pytest.mark.parametrize(("change", "reason"), [
    ({"per_second": 0}, "per_second must be a finite number above 0"),
    ({"per_second": -1.0}, "per_second must be"), ({"per_second": True}, "per_second must be"),
    ({"per_second": "9"}, "per_second must be"), ({"per_second": float("inf")}, "per_second must be"),
    ({"per_second": float("nan")}, "per_second must be"), ({"per_second": 10**400}, "too large"),
    ({"device": "another card"}, "its device are not those of this plan"),
    ({"settings": {}}, "its settings are not"), ({"schema": 2}, "its schema are not"),
])  # fmt: skip
def test_a_file_that_was_changed_is_not_used_and_the_reason_is_said(tmp_path, change, reason):
    path = write_rate(tmp_path, STEP, 2.0)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    rate, fault = read_rate(tmp_path, STEP)
    assert rate is None and str(path) in fault and reason in fault


def test_rates_are_not_written_through_a_link_out_of_the_pool_root_or_in_place_of_a_file(tmp_path):
    root, outside = tmp_path / "pools", tmp_path / "outside"
    (outside / "real").mkdir(parents=True)
    root.symlink_to(outside / "real")
    write_rate(root, STEP, 2.0)  # the root itself may be one
    shutil.rmtree(root / "rates")
    (root / "rates").symlink_to(outside)
    with pytest.raises(InputError, match=f"pools/rates is a link to {outside}, .*: put .*, or remove it"):
        write_rate(root, STEP, 2.0)
    assert [path.name for path in outside.iterdir()] == ["real"]
    (root / "rates").unlink()
    (root / "rates").write_text("mine")
    with pytest.raises(InputError, match=r"pools/rates is no folder, but measured rates .*: move it away"):
        check_folder(root)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b" " * 1_000_001])
def test_a_file_that_is_no_rate_is_not_used(tmp_path, content):
    path = write_rate(tmp_path, STEP, 2.0)
    path.write_bytes(content)
    rate, fault = read_rate(tmp_path, STEP)
    assert rate is None and "is not used" in fault


def test_the_first_call_is_no_part_of_a_rate(monkeypatch):
    """A warm-up of 50 s, then calls of 0.4 s with 2 units each: three until a second is over."""
    clock = SimpleNamespace(now=0.0, calls=0)
    monkeypatch.setattr(rates.time, "perf_counter", lambda: clock.now)

    def work():
        clock.calls += 1
        clock.now += 0.4 if clock.calls > 1 else 50.0
        return 2

    assert measured_rate(work, torch.device("cpu")) == pytest.approx(6 / 1.2) and clock.calls == 4
