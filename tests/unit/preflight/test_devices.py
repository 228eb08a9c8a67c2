import pytest

from capo.preflight.devices import bf16_peak, peak_of


@pytest.mark.parametrize(("name", "peak"), [
    ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A100-PCIE-40GB", 312e12), ("NVIDIA A100 80GB PCIe", 312e12),
    ("NVIDIA H100 80GB HBM3", 989.4e12), ("NVIDIA H200", 989.4e12), ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12), ("NVIDIA GeForce RTX 4090", 165.2e12),
    ("NVIDIA GeForce RTX 3090", 71e12), ("AMD Instinct MI300X", 1307.4e12),
])  # fmt: skip
def test_peaks_of_whole_devices(name, peak):
    assert bf16_peak(name) == peak


@pytest.mark.parametrize(
    "name", ["NVIDIA H200 MIG 1g.18gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "Tesla V100-SXM2-32GB", "CPU"]
)
def test_parts_laptops_and_chips_without_bf16_have_no_peak(name):
    assert bf16_peak(name) is None


def test_a_given_peak_comes_first_and_an_unknown_device_is_said():
    given, known = peak_of(5e12, "NVIDIA L4"), peak_of(None, "NVIDIA L4")
    assert (given.flops, given.of, given.assumed) == (5e12, "planning.flops", False)
    assert (known.flops, known.of, known.assumed) == (121e12, "NVIDIA L4", False)
    unknown, none = peak_of(None, "Tesla V100-SXM2-32GB"), peak_of(None, None)
    assert unknown.flops == none.flops == 989.4e12 and unknown.assumed and none.assumed
    assert "the peak of Tesla V100-SXM2-32GB is not known here" in unknown.of and "there is no GPU" in none.of
