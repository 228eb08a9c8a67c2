"""What is on the device, and when; what a process does not load."""

from types import SimpleNamespace

import pytest
import torch

from capo.backbones import MMDiTBackbone, UNetBackbone, parts
from capo.backbones.parts import DENOISER, TEXT
from capo.backbones.sampling import SamplerSettings
from capo.cli.rates import measure_base
from capo.data.generation import ImageGenerator, PoolSpec, fill_pool
from capo.data.prompts import make_prompt
from capo.errors import InputError
from capo.rewards import Reward

SETTINGS = SamplerSettings(steps=2, guidance=3.0, batch=3)
PROMPTS = [make_prompt(text) for text in ("a red circle", "a blue square", "the green triangle")]
ELSEWHERE = torch.device("cuda")  # a name: nothing is moved


class Places:
    """Stands in for moves between devices: all is elsewhere until it is moved to the CPU, and computes."""

    def __init__(self, backbone, patch):
        self.where, self.moves, self.backbone = {}, [], backbone
        patch.setattr(parts, "_place", lambda module: self.where.get(id(module), ELSEWHERE))
        patch.setattr(parts, "_move", self.move)

    def move(self, module, device):
        self.where[id(module)] = device
        self.moves.append((self.name(module), device.type))

    def name(self, module):
        components = self.backbone.pipeline.components
        return next((name for name, part in components.items() if part is module), type(module).__name__)

    def here(self):
        return {
            name for name, part in self.backbone.pipeline.components.items()
            if self.where.get(id(part), ELSEWHERE).type == "cpu"
        }  # fmt: skip


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_each_part_is_on_the_device_only_while_it_works(tiny_backbones, tmp_path, family):
    backbone, seen = tiny_backbones[family], {}
    encoders = {name for name in backbone.pipeline.components if name.startswith("text_encoder")}

    def reward(images, prompts):
        watch("reward")
        return torch.tensor([float(image.getpixel((3, 3))[0]) for image in images])

    judges = [Reward("reward", reward)]

    def filled(root):
        spec = PoolSpec(tmp_path / root, family, "train", 5, PROMPTS, candidates=4, prompts_per_shard=2)
        pool = fill_pool(spec, ImageGenerator.base(backbone, SETTINGS), judges, progress=False)
        return {
            str(p.relative_to(pool.folder)): p.read_bytes() for p in pool.folder.rglob("*") if p.is_file()
        }

    watch = lambda name: None  # noqa: E731
    expected = filled("plain")
    backbone.__dict__.pop("_kept_negative", None)
    with pytest.MonkeyPatch.context() as patch:
        places = Places(backbone, patch)
        watch = lambda name: seen.setdefault(name, []).append(places.here())  # noqa: E731
        working = {
            "denoiser": backbone.denoiser,
            "vae": backbone.vae.decoder,
            "text": backbone.text_encoders[0],
        }
        hooks = [
            module.register_forward_pre_hook(lambda *_, name=name: watch(name))
            for name, module in working.items()
        ]
        try:
            found = filled("moved")
        finally:
            for hook in hooks:
                hook.remove()
    assert seen.keys() == {"denoiser", "vae", "text", "reward"}
    assert all(here == {backbone.denoiser_component} for here in seen["denoiser"])
    assert all(here == {"vae"} for here in seen["vae"] + seen["reward"])
    assert all(here == encoders for here in seen["text"][1:])  # the first prompt's size is measured at home
    assert places.here() == set() and found == expected
    # for each stage there and back once: sizes, prompts, negative prompt; latents; scores
    assert places.moves.count((backbone.denoiser_component, "cpu")) == places.moves.count(("vae", "cpu")) == 1


def test_users_of_a_part_share_it(tiny_backbone, monkeypatch):
    places, vae = Places(tiny_backbone, monkeypatch), tiny_backbone.vae
    with tiny_backbone.placed(vae):
        tiny_backbone.decode(torch.zeros(1, *tiny_backbone.latent_shape))
        with tiny_backbone.placed(vae, None):
            pass
        assert places.moves == [("vae", "cpu")]
    assert places.moves == [("vae", "cpu"), ("vae", "cuda")]
    with pytest.raises(KeyError), tiny_backbone.placed(vae):
        raise KeyError
    assert places.here() == set()


def test_a_part_that_finds_no_room_is_whole_again(tiny_backbone, monkeypatch):
    places, vae = Places(tiny_backbone, monkeypatch), tiny_backbone.vae
    with monkeypatch.context() as full:

        def move(module, device):
            places.move(module, device)
            if device.type == "cpu":
                raise torch.OutOfMemoryError

        full.setattr(parts, "_move", move)
        refused = r"AutoencoderKL of the model \(0.0 GB\) does not fit into .*memory.*: end what else"
        for work in (
            lambda: tiny_backbone.decode(torch.zeros(1, *tiny_backbone.latent_shape)),
            tiny_backbone.placed(vae).__enter__,
        ):
            with pytest.raises(InputError, match=refused) as caught:
                work()
            assert isinstance(caught.value, torch.OutOfMemoryError)
    assert places.here() == set()
    with tiny_backbone.placed(vae):
        assert places.here() == {"vae"}


def test_rates_are_of_parts_that_stay_on_the_device(tiny_backbone, monkeypatch):
    """As in the stages of a pool; the VAE comes once more, for the pictures that rewards are shown."""
    places, calls = Places(tiny_backbone, monkeypatch), []

    def measured(work, device):
        calls.extend(work() for _ in range(3))
        return 1.0

    monkeypatch.setattr("capo.cli.rates.measured_rate", measured)
    sampling = {"steps": 2, "guidance": 3.0, "batch": 3}
    rates, images = measure_base(SimpleNamespace(sampling=sampling), tiny_backbone, ["a red circle"])
    assert len(images) == 3 and len(calls) == 9 and set(rates.values()) == {1.0}
    there = [name for name, device in places.moves if device == "cpu"]
    assert there.count(tiny_backbone.denoiser_component) == 1 and there.count("vae") == 2
    assert there[-3:] == [tiny_backbone.denoiser_component, "vae", "vae"]  # no encoder beside the denoiser


def test_visiting_says_where_parts_work(tiny_backbone, monkeypatch):
    places = Places(tiny_backbone, monkeypatch)
    with tiny_backbone.visiting("cuda"):
        assert tiny_backbone.device.type == "cuda"
        with tiny_backbone.placed(tiny_backbone.vae):
            assert places.moves == []
    assert tiny_backbone.device.type == "cpu"
    with (
        tiny_backbone.placed(tiny_backbone.vae),
        tiny_backbone.visiting("meta"),
        pytest.raises(RuntimeError, match="AutoencoderKL is held on cpu"),
        tiny_backbone.placed(tiny_backbone.vae),
    ):
        raise AssertionError("it cannot be in two places")


def test_weights_that_were_moved_in_inference_mode_can_be_trained(tiny_backbone):
    network = torch.nn.Linear(1, 1)
    with torch.inference_mode():
        parts._move(network, torch.device("meta"))
    assert not any(p.is_inference() for p in network.parameters())


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_parts_that_are_left_out_have_no_weights_and_the_same_facts(tiny_folders, tiny_backbones, family):
    kind, options = (UNetBackbone, {}) if family == "sdxl" else (MMDiTBackbone, {"sequence_length": 9})
    whole, folder = tiny_backbones[family], str(tiny_folders[family])
    for given in ((), (TEXT,), (DENOISER,)):
        backbone = kind(folder, parts=given, **options)
        loaded = [(DENOISER, [backbone.denoiser]), (TEXT, backbone.text_encoders)]
        for name, modules in loaded:
            assert all(p.is_meta == (name not in given) for m in modules for p in m.parameters())
        assert len(backbone.text_encoders) == len(whole.text_encoders)
        assert backbone.latent_shape == whole.latent_shape and backbone.device.type == "cpu"
        assert backbone.sampler_identity() == whole.sampler_identity()
        latents = torch.ones(2, *whole.latent_shape)
        ours, theirs = backbone.to("cpu").decode(latents), whole.decode(latents)
        assert [image.tobytes() for image in ours] == [image.tobytes() for image in theirs]
    text = kind(folder, parts=(TEXT,), **options).encode_prompts(["a red circle"])
    assert all(
        torch.equal(value, whole.encode_prompts(["a red circle"])[name]) for name, value in text.items()
    )
    with pytest.raises(RuntimeError, match="was not loaded"):
        kind(folder, parts=(), **options).encode_prompts(["a red circle"])
