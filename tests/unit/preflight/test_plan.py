"""A plan's bytes against tensors, activations against hooks, arithmetic against hand-worked numbers."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from capo.backbones import Backbone, MMDiTBackbone, UNetBackbone
from capo.backbones.averaging import AVERAGE, REFERENCE, MovingReference, WeightAverage
from capo.backbones.drawing import Drawing
from capo.data import PreferenceBatch
from capo.errors import InputError
from capo.module import Execution, PreferenceModule, Weighting
from capo.objectives import capo
from capo.preflight.architecture import Blueprint, from_folder, published, published_names
from capo.preflight.memory import (
    checkpoint_bytes,
    drawing_bytes,
    model_states,
    module_bytes,
    optimizer_bytes,
    parameters,
    pipeline_bytes,
    pool_bytes,
)
from capo.preflight.plan import device_memory, disk_space, flops_of, host_memory, notes
from capo.preflight.requests import PoolRequest, Request, RewardRequest, SamplingRequest, TrainingRequest
from capo.preflight.tracing import Forward, activation_bytes, adapter_of, decoder_forward, denoiser_forward
from capo.runtime.launch import Division
from fixtures import ROOT

SHIPPED = ROOT / "src" / "capo" / "shapes" / "weights"
SHAPES, MMDIT = SHIPPED / "unet", SHIPPED / "mmdit"
T5_TOKENS = 4  # as conf/model/shapes_mmdit.yaml has it
LORA = {"rank": 4, "alpha": 4, "seed": 0}
ADAPTER = adapter_of(LORA)
VARIETIES = [
    ("32-true", None, False),
    ("bf16-mixed", None, False),
    ("32-true", LORA, False),
    ("bf16-mixed", LORA, False),
    ("bf16-mixed", LORA, True),
]


@pytest.fixture(scope="module")
def unet() -> Blueprint:
    return from_folder(SHAPES)


@pytest.fixture(scope="module")
def mmdit() -> Blueprint:
    return from_folder(MMDIT, sequence_length=T5_TOKENS)


@pytest.fixture(scope="module")
def backbone() -> UNetBackbone:
    return UNetBackbone(str(SHAPES))


@pytest.fixture(scope="module")
def flow() -> MMDiTBackbone:
    return MMDiTBackbone(str(MMDIT), t5=False, sequence_length=T5_TOKENS)


def pairs(blueprint: Blueprint, count: int) -> PreferenceBatch:
    latents = torch.randn(count, 2, *blueprint.latent_shape)
    text = {name: torch.randn(count, *shape) for name, shape in blueprint.text_shapes.items()}
    return PreferenceBatch(
        latents,
        torch.randn_like(latents),
        torch.rand(count),
        torch.tensor([[0.6, 0.4]] * count),
        text,
        ["x"] * count,
    )


def module_of(backbone, precision="32-true", lora=None, half_frozen=False) -> PreferenceModule:
    return PreferenceModule(
        backbone,
        functools.partial(capo, beta=30.0),
        lr=1e-4,
        warm_up=0,
        weighting=Weighting(),
        lora=lora,
        execution=Execution(precision, half_frozen=half_frozen),
    )


def held(tensors) -> int:
    """Bytes of the storages behind `tensors`, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def kept_by(call, own) -> int:
    """Bytes that autograd keeps of `call()`, each storage once, those of `own` tensors left out."""
    mine, alive = {t.untyped_storage().data_ptr() for t in own}, {}

    def pack(tensor):
        alive.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = call()  # which keeps the graph, and so the addresses, until all are counted
    assert found is not None
    return sum(tensor.untyped_storage().nbytes() for address, tensor in alive.items() if address not in mine)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("sd15", 859_520_964),
        ("sdxl", 2_567_463_684),
        ("sd3", 2_028_328_000),
        ("sd35_medium", 2_243_171_520),
        ("sd35_large", 8_056_627_520),
    ],
)
def test_published_denoisers_have_the_parameters_that_are_known_of_them(name, count):
    assert parameters(published(name), None) == (count, count)


def test_published_text_encoders_and_autoencoders_too():
    def count(component):
        return sum(p.numel() for p in published("sd3").module(component).parameters())

    # CLIP ViT-L with its projection 768 x 768, OpenCLIP bigG, T5 XXL's encoder
    assert [count(f"text_encoder{which}") for which in ("", "_2", "_3")] == [
        123_060_480 + 768 * 768,
        694_659_840,
        4_762_310_656,
    ]
    assert sum(p.numel() for p in published("sdxl").module("vae").parameters()) == 83_653_863


def test_text_and_latents_of_the_published_models():
    assert published_names() == ["sd15", "sd3", "sd35_large", "sd35_medium", "sdxl"]
    assert published("sd15").text_shapes == {"prompt_embeds": (77, 768)}
    assert published("sdxl").text_shapes == {
        "prompt_embeds": (77, 2048),
        "pooled_prompt_embeds": (1280,),
        "time_ids": (6,),
    }
    assert published("sd3", sequence_length=256).text_shapes == {
        "prompt_embeds": (77 + 256, 4096),
        "pooled_prompt_embeds": (2048,),
    }
    assert published("sd3").latent_shape == (16, 128, 128) and published("sd15").latent_shape == (4, 64, 64)
    assert "text_encoder_3" not in published("sd3", t5=False).configs
    with pytest.raises(
        InputError,
        match=r"model.published=sd9: no configs of that name are in this package; choose one of sd15",
    ):
        published("sd9")


def test_a_folder_without_known_configs_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"no config.json of a known class for unet or transformer, vae, text_encoder"
    ):
        from_folder(tmp_path)


def adapter_for(backbone: Backbone, lora: dict | None):
    return lora and adapter_of(lora | {"targets": backbone.lora_targets})


def assert_held(
    blueprint: Blueprint, backbone: Backbone, precision: str, lora: dict | None, half_frozen: bool
) -> None:
    """Takes a step, and compares the plan's bytes with those of the tensors that there are then."""
    module = module_of(backbone, precision, lora, half_frozen)
    optimizer = module.configure_optimizers()["optimizer"]
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        errors = module.pair_errors(pairs(blueprint, 2))
    module.objective(errors).mean().backward()
    optimizer.step()
    policy = [*module.policy.parameters(), *module.policy.buffers()]
    state = [value for moments in optimizer.state.values() for value in moments.values()]
    frozen_in, adapter = precision if half_frozen else "32-true", adapter_for(backbone, lora)
    planned = model_states(blueprint, adapter, precision, "adamw", reference=True, frozen_in=frozen_in)
    assert planned.weights == held(policy)
    assert planned.gradients == held([p.grad for p in module.policy.parameters() if p.grad is not None])
    assert planned.optimizer == held(state)
    with module.reference() as frozen:
        assert planned.reference == (0 if lora else held([*frozen.parameters(), *frozen.buffers()]))
    written = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(written)
    assert checkpoint_bytes(blueprint, adapter, "adamw") == sum(
        t.nbytes for t in written["state_dict"].values()
    ) + held(state)
    follows = model_states(
        blueprint, adapter, precision, "adamw", reference=True, frozen_in=frozen_in, moving=True
    )
    moving = MovingReference(0.9)
    moving.on_train_start(SimpleNamespace(global_step=0), module)
    moving.on_save_checkpoint(None, module, written)
    assert follows.reference == held(written[REFERENCE].values()) == planned.gradients
    more = checkpoint_bytes(blueprint, adapter, "adamw", 1) - checkpoint_bytes(blueprint, adapter, "adamw")
    assert more == planned.gradients
    average = WeightAverage(0.9)
    average.on_train_start(SimpleNamespace(global_step=0), module)
    average.on_save_checkpoint(None, module, written)
    averaged = replace(planned, average=held(written[AVERAGE].values()))
    assert averaged.total == planned.total + planned.gradients
    assert averaged == model_states(
        blueprint, adapter, precision, "adamw", reference=True, frozen_in=frozen_in, averaged=True
    )
    assert planned.total == planned.weights + planned.gradients + planned.optimizer + planned.reference


@pytest.mark.parametrize(("precision", "lora", "half_frozen"), VARIETIES)
def test_what_is_held_are_the_bytes_of_the_tensors(unet, backbone, precision, lora, half_frozen):
    assert_held(unet, backbone, precision, lora, half_frozen)


@pytest.mark.parametrize(("precision", "lora", "half_frozen"), VARIETIES)
def test_an_mmdit_holds_the_bytes_of_its_tensors_too(mmdit, flow, precision, lora, half_frozen):
    assert_held(mmdit, flow, precision, lora, half_frozen)


def test_eight_bit_moments_and_shards():
    layer = torch.nn.Linear(
        1000, 10
    )  # 10 000 numbers in 8 bits with a float32 scale for each 256 of them; 10 stay float32
    assert optimizer_bytes(layer, "adamw_8bit") == 2 * (10_000 + 4 * 40) + 2 * 4 * 10
    assert (
        model_states(published("sd15"), None, "32-true", "adamw", False, shards=4).weights
        == 859_520_964 * 4 / 4
    )
    assert model_states(published("sd15"), None, "32-true", "adamw", False).reference == 0


@pytest.mark.parametrize(("precision", "lora", "half_frozen"), VARIETIES)
def test_activations_of_the_unet_are_what_hooks_measure(unet, backbone, precision, lora, half_frozen):
    module, batch = module_of(backbone, precision, lora, half_frozen), pairs(unet, 4)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            return module.objective(module.pair_errors(batch)).mean()

    measured = kept_by(
        step, [*module.policy.parameters(), *module.policy.buffers(), *backbone.denoiser.parameters()]
    )
    planned = activation_bytes(
        unet,
        8,
        precision,
        gpu=False,
        lora=adapter_of(lora),
        frozen_in=precision if half_frozen else "32-true",
    )
    assert planned == pytest.approx(measured, rel=0.1)  # asked: 0.3


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_activations_of_the_mmdit_are_what_hooks_measure(mmdit, flow, precision):
    denoiser, inputs = flow.trainable_copy(), mmdit.inputs(8)

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            return denoiser(**inputs, return_dict=False)[0].square().mean()

    measured = kept_by(forward, [*denoiser.parameters(), *denoiser.buffers()])
    assert activation_bytes(mmdit, 8, precision, gpu=False) == pytest.approx(measured, rel=0.1)


def test_checkpointing_keeps_the_inputs_of_blocks_and_one_block(mmdit, flow):
    denoiser, inputs = flow.trainable_copy().train(), mmdit.inputs(8)
    whole = activation_bytes(mmdit, 8, "32-true", gpu=False)
    denoiser.enable_gradient_checkpointing()
    between = kept_by(
        lambda: denoiser(**inputs, return_dict=False)[0].square().mean(),
        [*denoiser.parameters(), *denoiser.buffers()],
    )
    planned = activation_bytes(mmdit, 8, "32-true", gpu=False, checkpointing=True)
    # the blocks are nearly alike: what is kept between them, and about one block's share of what is kept
    # within
    assert planned == pytest.approx(between + (whole - between) / denoiser.config.num_layers, rel=0.2)
    assert between < planned < whole / 2


def test_operations_of_layers_and_of_attention_by_hand(mmdit, flow):
    found, plain = denoiser_forward(mmdit, "32-true", False), flow.trainable_copy()
    sizes = plain.config
    tokens = (sizes.sample_size // sizes.patch_size) ** 2 + mmdit.text_shapes["prompt_embeds"][
        0
    ]  # patches, and the text's
    # joint blocks, the width of all heads: scores and their sum over values, a product and a sum each
    assert found.attention_flops == sizes.num_layers * 2 * 2 * tokens**2 * (
        sizes.num_attention_heads * sizes.attention_head_dim
    )
    # every product with weights, counted by hooks on the layers themselves: two operations a weight and row
    rows = []
    for module in plain.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda layer, given, out: rows.append(
                    2 * layer.weight.numel() * (out.numel() // out.shape[-1])
                )
            )
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda layer, given, out: rows.append(
                    2 * layer.weight.numel() * out.shape[-1] * out.shape[-2]
                )
            )
    plain(**mmdit.inputs(1))
    assert found.weight_flops == sum(rows)


def test_working_memory_is_that_of_results_not_of_weights():
    found = decoder_forward(published("sd15"))
    # the decoder's last level: 128 or 256 channels of 512 x 512 float32 numbers, 134 or 268 MB each, a few of
    # them at once
    level = 256 * 512 * 512 * 4
    assert 2 * level <= found.working <= 5 * level
    sdxl = denoiser_forward(published("sdxl"), "32-true", False).working
    assert 320 * 128 * 128 * 4 < sdxl < 1e9 < 2_567_463_684 * 4


def request(blueprint, **changes) -> Request:
    training = {
        "division": Division(2, 4, 8),
        "steps": 100,
        "kinds": 2,
        "reference": True,
        "precision": "32-true",
        "optimizer": "adamw",
        "strategy": "ddp",
        "gradient_checkpointing": False,
        "lora": None,
        "gpu": False,
    }
    pools = {
        "train": PoolRequest(10, 4, 3),
        "policy in validation": PoolRequest(2, 4, 0, times=5, stored=False),
    }
    return Request(
        blueprint,
        TrainingRequest(**training | changes),
        SamplingRequest(6, 2, 4, "32-true", 4),
        pools,
        4,
        1e12,
        0.5,
    )


def test_the_disk_of_a_policy_follows_its_format(unet):
    everything = sum(pipeline_bytes(unet, 1).values())  # parameters of the pipeline
    adapter = model_states(unet, ADAPTER, "32-true", "adamw", True).gradients

    def planned(lora, **format):
        return disk_space(replace(request(unet, lora=lora), **format))["run"]["policy"]

    assert planned(None) == planned(None, export="full") == planned(ADAPTER, export="full") == 4 * everything
    assert planned(None, exported_item=2) == 2 * everything
    assert planned(ADAPTER) == 2 * adapter > 0  # for diffusers and for ComfyUI
    assert planned(ADAPTER, export="single_file") == 2 * adapter + 2 * everything
    assert planned(None, export="single_file") == 6 * everything


def test_a_pair_is_two_images_through_policy_and_reference_and_back(unet):
    once = denoiser_forward(unet, "32-true", False)
    forward, plain = once.flops, flops_of(request(unet))
    assert plain["pair"] == plain["pair_model"] == pytest.approx(2 * (1 + 1 + 2) * forward)
    assert flops_of(request(unet, gradient_checkpointing=True))["pair"] == pytest.approx(
        2 * (1 + 1 + 2 + 1) * forward
    )
    assert flops_of(request(unet, reference=False, kinds=1))["pair"] == pytest.approx((1 + 2) * forward)
    # both latents are inverted in 10 further passes, those of a group of four twice as many
    assert flops_of(request(unet, inverting=10))["pair"] == pytest.approx(plain["pair"] + 20 * forward)
    assert flops_of(request(unet, kinds=4))["pair"] == pytest.approx(2 * plain["pair"])
    # frozen weights have no gradient: one product in place of two
    assert flops_of(request(unet, lora=ADAPTER))["pair"] == pytest.approx(
        2 * (2 * forward + once.weight_flops + 2 * once.attention_flops)
    )
    # six steps with guidance, and a decoded latent
    assert plain["image"] == pytest.approx(6 * 2 * forward + decoder_forward(unet).flops)


def test_rewards_count_where_images_are_scored_and_nowhere_else(unet):
    plain = device_memory(request(unet))
    with_rewards = replace(
        request(unet),
        rewards=RewardRequest(pool=7e9, validation=4e9, evaluation=6e9, everything=8e9, unknown=["vila"]),
    )
    device, host = device_memory(with_rewards), host_memory(with_rewards)
    more = {phase: told["total"] - plain[phase]["total"] for phase, told in device.items() if phase != "peak"}
    assert {phase: size for phase, size in more.items() if size} == {
        "pool scoring": 7e9,
        "validation scoring": 4e9,
        "evaluation scoring": 6e9,
    }
    # beside what training holds, and no VAE: that has left
    assert (
        device["validation scoring"]["total"]
        == device["training"]["total"] - device["training"]["activations"] + 4e9
    )
    assert host["training"]["rewards"] == host["loading"]["rewards"] == 8e9
    assert "memory of these rewards is unknown and left out: vila" in notes(with_rewards)


def test_host_memory_counts_every_process_of_a_machine(unet):
    """Eight processes hold eight pipelines and eight sets of rewards; one collects sharded weights."""
    rewards = RewardRequest(everything=8e9)
    division = Division(devices=8, micro_batch=1, accumulate=1)
    one, eight, sharded = (
        host_memory(replace(request(unet, local_processes=count, **options), rewards=rewards))
        for count, options in ((1, {}), (8, {}), (8, {"strategy": "fsdp", "division": division}))
    )
    assert eight["loading"]["total"] == 8 * one["loading"]["total"]
    assert eight["training"]["total"] == 8 * one["training"]["total"] > 8 * 8e9
    collected = checkpoint_bytes(unet, None, "adamw")
    assert sharded["training"]["total"] - eight["training"]["total"] == collected


def test_a_denoiser_that_draws_in_half_waits_in_half(unet):
    half = replace(request(unet), sampling=SamplingRequest(6, 2, 4, "bf16-mixed", 4))
    saved = drawing_bytes(unet, None, "32-true") - drawing_bytes(unet, None, "bf16-mixed")
    for phase in ("loading", "training"):
        whole, less = (host_memory(asked)[phase]["pipeline"] for asked in (request(unet), half))
        assert whole == sum(pipeline_bytes(unet, 4).values()) == less + saved > less


def test_a_reference_that_is_the_denoiser_as_it_draws_is_counted_once(unet):
    """As `Backbone.reference` says: stored for training's precision, and laid out as it was loaded."""
    assert host_memory(request(unet))["loading"]["reference"] == 0
    copied = [
        replace(request(unet), sampling=SamplingRequest(6, 2, 4, "32-true", 4, plain=False)),
        replace(request(unet), sampling=SamplingRequest(6, 2, 4, "bf16-mixed", 4)),
        replace(request(unet), itemsize=2),
    ]
    for asked in copied:
        assert host_memory(asked)["loading"]["reference"] == request(unet).model_states().reference > 0
    backbone = UNetBackbone(str(SHAPES))
    assert backbone.reference("32-true") is backbone.denoiser


def test_validation_counts_the_network_of_the_unconditional_prediction(unet):
    def asked(branches=2, reference=True, lora=None, **options):
        sampling = SamplingRequest(6, branches, 4, "bf16-mixed", 4, **options)
        return replace(request(unet, reference=reference, lora=lora), sampling=sampling)

    network = drawing_bytes(unet, None, "bf16-mixed")
    folder, base = {"other": True, "foreign": True}, {"other": True}
    for options, held in ((folder, network), (base, 0), ({}, 0)):
        for lora in (None, ADAPTER):
            found = device_memory(asked(lora=lora, **options))
            assert found["validation"].get("unconditional network", 0) == held
    assert device_memory(asked(reference=False, **base))["validation"]["unconditional network"] == network
    for lora, held in ((None, network), (ADAPTER, 0)):  # a reference that follows is not the base
        followed = asked(lora=lora, **base)
        followed = replace(followed, training=replace(followed.training, moving=True))
        assert device_memory(followed)["validation"].get("unconditional network", 0) == held
        assert host_memory(followed)["loading"]["reference"] == 0 and not followed.shares_reference
        assert device_memory(followed)["training"]["reference"] == followed.model_states().gradients
    assert "unconditional network" not in device_memory(asked(branches=1, **folder))["validation"]
    found, host = device_memory(asked(**folder)), host_memory(asked(**folder))
    assert set(found["evaluation"]) == {"unconditional network", "policy", "sampling", "total"}
    assert host["loading"]["unconditional network"] == host["training"]["unconditional network"] == network
    assert "unconditional network" not in host_memory(asked(reference=False, **base))["training"]


def test_images_are_drawn_first_and_decoded_when_they_are_scored(unet):
    device, drawing = (
        device_memory(request(unet)),
        4 * 2 * denoiser_forward(unet, "32-true", False).working,
    )  # four images, with guidance
    pipeline = pipeline_bytes(unet, 4)
    decoding = pipeline["vae"] + 4 * decoder_forward(unet).working
    denoiser = pipeline[unet.denoiser_name]
    assert device["text"]["total"] == sum(pipeline.values()) - denoiser - pipeline["vae"]
    assert device["pool"] == {
        "denoiser": denoiser, "sampling": drawing, "total": denoiser + drawing,
    }  # fmt: skip
    weights = model_states(unet, None, "32-true", "adamw", True).weights
    assert device["evaluation"] == {"policy": weights, "sampling": drawing, "total": weights + drawing}
    guided = replace(request(unet), sampling=SamplingRequest(6, 2, 4, "32-true", 4, other=True))
    assert device_memory(guided)["evaluation"]["total"] == denoiser + weights + drawing
    for scored in ("pool scoring", "evaluation scoring"):
        assert device[scored]["total"] == device[scored]["decoding"] == decoding
    assert device["validation"]["sampling and decoding"] == max(drawing, decoding)


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_draws_takes_the_bytes_that_it_is_stored_in(unet, precision, dtype):
    """Of the shapes' own denoiser, measured."""
    backbone = UNetBackbone(str(SHAPES), dtype=dtype).prepare(Drawing(precision))
    planned = drawing_bytes(unet, None, precision, backbone.dtype.itemsize)
    assert planned == module_bytes(backbone.denoiser)


def test_without_an_evaluation_there_is_no_phase_of_it(unet):
    device = device_memory(
        replace(request(unet), evaluate=False, rewards=RewardRequest(pool=1e9, evaluation=6e9))
    )
    assert not [phase for phase in device if phase.startswith("evaluation")]
    assert device["peak"] == device["pool scoring"]["total"] < 6e9


def test_a_pool_on_disk_by_hand(unet):
    # latents 8 x 16 x 16 float16 = 4096 bytes, three scores of 64; text: 20 tokens x 96, pooled 64 and 6
    # numbers in float16
    assert pool_bytes(unet, 10, 8, 3, 2) == 10 * (8 * (4096 + 3 * 64) + 2 * (20 * 96 + 64 + 6))
    # SDXL's text is 308 KiB in float16 without the pooled 1280 numbers and the 6 sizes
    assert pool_bytes(published("sdxl"), 1, 0, 0, 2) == 308 * 1024 + 2 * (1280 + 6)


def test_a_checkpoint_of_sdxl_is_31_gb():
    # 2 567 463 684 x (4 + 8) bytes, and a step count for each tensor
    assert checkpoint_bytes(published("sdxl"), None, "adamw") / 1e9 == pytest.approx(30.81, abs=0.01)


def test_forward_adds_up():
    assert Forward(3, 4, 5).flops == 7
