"""Which network makes the unconditional prediction in a validation, and on which device."""

from functools import partial

import pytest
import torch

from capo import objectives
from capo.backbones import parts
from capo.backbones.averaging import MovingReference
from capo.backbones.export import export_policy
from capo.backbones.model_card import ModelCard
from capo.backbones.networks import fresh_policy
from capo.backbones.sampling import SamplerSettings
from capo.backbones.unconditional import AdapterOff
from capo.errors import InputError
from capo.module import PreferenceModule, Weighting
from capo.training.unconditional import UnconditionalBranch, unconditional_branch
from capo.training.validation import ValidationSet, WinRateValidation

LORA = {"rank": 2, "alpha": 2.0}
CUDA = torch.device("cuda")  # a name: nothing is moved there


def module_for(backbone, objective=objectives.capo, **options):
    return PreferenceModule(
        backbone, partial(objective, beta=100.0), lr=1e-3, warm_up=2, weighting=Weighting(), **options
    )


def settings_of(source, guidance=3.0):
    return SamplerSettings(2, guidance, 2, unconditional=source)


def test_policy_is_its_own_branch(tiny_backbone):
    module = module_for(tiny_backbone)
    with unconditional_branch(module, settings_of("policy")).network(module.policy, "cpu") as network:
        assert network is None


def test_guidance_1_asks_for_no_network(tiny_backbone):
    module = module_for(tiny_backbone)
    for guidance in (1.0, 0.5):
        branch = unconditional_branch(module, settings_of("base", guidance))
        with branch.network(module.policy, "cpu") as network:
            assert network is None


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_on_a_cpu_the_base_is_the_backbones_own(tiny_backbone, lora):
    module = module_for(tiny_backbone, lora=lora)
    with unconditional_branch(module, settings_of("base")).network(module.policy, "cpu") as network:
        assert network is tiny_backbone.denoiser


def test_on_a_device_the_base_is_what_training_holds_there(tiny_backbone):
    module = module_for(tiny_backbone)
    module._reference.network = held = tiny_backbone.trainable_copy().requires_grad_(False)
    with unconditional_branch(module, settings_of("base")).network(module.policy, CUDA) as network:
        assert network is held
    lora = module_for(tiny_backbone, lora=LORA)
    other = fresh_policy(tiny_backbone, LORA, lora.execution)  # such as averaged weights
    with unconditional_branch(lora, settings_of("base")).network(other, CUDA) as network:
        assert isinstance(network, AdapterOff) and network.policy is other  # whose own adapter is off


def test_a_negative_model_makes_the_bases_unconditional_prediction(tiny_backbone):
    module = module_for(tiny_backbone)
    with unconditional_branch(module, settings_of("policy"), negative=True).sampled(
        module.policy, "cpu"
    ) as networks:
        assert networks == (tiny_backbone.denoiser, module.policy)
    with unconditional_branch(module, settings_of("base")).sampled(module.policy, "cpu") as networks:
        assert networks == (module.policy, tiny_backbone.denoiser)
    lora = module_for(tiny_backbone, lora=LORA)
    with unconditional_branch(lora, settings_of("policy"), negative=True).sampled(
        lora.policy, CUDA
    ) as networks:
        assert isinstance(networks[0], AdapterOff) and networks[1] is lora.policy


@pytest.mark.parametrize(
    ("source", "guidance", "told"),
    [
        ("base", 3.0, "sampling.unconditional=base: must be policy with selection.swap=true"),
        ("policy", 1.0, "sampling.guidance=1: must be above 1 with selection.swap=true"),
        ("policy", -1.0, "sampling.guidance=-1: must be above 1"),
    ],
)
def test_a_negative_model_that_nothing_reads_is_refused(tiny_backbone, source, guidance, told):
    with pytest.raises(InputError, match=told):
        unconditional_branch(module_for(tiny_backbone), settings_of(source, guidance), negative=True)


def test_a_reference_that_follows_is_not_the_base(tiny_backbone):
    module = module_for(tiny_backbone, moving=MovingReference(0.9))
    with unconditional_branch(module, settings_of("base")).sampled(module.policy, CUDA) as networks:
        assert networks[1] is tiny_backbone.denoiser


@pytest.fixture
def moves(monkeypatch):
    """The devices to which a network is moved; it stays where it is."""
    found = []
    monkeypatch.setattr(parts, "_move", lambda module, device: found.append((module, str(device))))
    return found


def visited(backbone, branch, moves):
    """The network on another device, where sampling places it, and the moves until it is back."""
    with branch.network(branch.module.policy, CUDA) as network:
        assert not moves
        with backbone.visiting(CUDA), backbone.placed(branch.module.policy, network):
            pass
    return network, [(module, device) for module, device in moves if module is network]


def test_where_training_holds_no_base_it_visits_the_device(tiny_backbone, moves):
    module, base = module_for(tiny_backbone, objectives.sft), tiny_backbone.denoiser
    found = visited(tiny_backbone, unconditional_branch(module, settings_of("base")), moves)
    assert found == (base, [(base, "cuda"), (base, "cpu")])


def test_another_policy_visits_the_device(tiny_backbone, tmp_path, moves):
    module = module_for(tiny_backbone)
    folder = export_policy(tiny_backbone, module.policy, tmp_path / "policy", ModelCard("capo", "none"))
    branch = unconditional_branch(module, settings_of(str(folder)))
    other = branch.other
    assert isinstance(branch, UnconditionalBranch) and other is not module.policy
    assert visited(tiny_backbone, branch, moves) == (other, [(other, "cuda"), (other, "cpu")])


def test_a_validation_follows_the_module_of_the_next_round(tiny_backbone, tmp_path):
    first, later = module_for(tiny_backbone), module_for(tiny_backbone)
    settings, nothing = settings_of("base"), ValidationSet([], {}, [], {}, [])
    branch = unconditional_branch(first, settings)
    validation = WinRateValidation(nothing, tiny_backbone, [], settings, 1, tmp_path, unconditional=branch)
    validation.follow(later)
    assert validation.unconditional == UnconditionalBranch(later, settings)
