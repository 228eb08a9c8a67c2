import pytest
import torch

from capo.backbones.lora import adapter_off, add_lora, has_adapter, merged
from capo.errors import InputError


@pytest.fixture
def inputs(tiny_backbone):
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, *tiny_backbone.latent_shape, generator=generator)
    return noisy, torch.tensor([100, 900]), tiny_backbone.encode_prompts(["a red square", "the blue circle"])


def trained(denoiser):
    """Adapter weights as after some training: B is no longer zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return denoiser


def test_adapter_switched_off_is_the_base_bit_for_bit(tiny_backbone, inputs):
    policy = trained(add_lora(tiny_backbone.trainable_copy(), rank=2, alpha=4))
    base = tiny_backbone.predict(tiny_backbone.denoiser, *inputs)
    tuned = tiny_backbone.predict(policy, *inputs)
    with adapter_off(policy):
        assert torch.equal(tiny_backbone.predict(policy, *inputs), base)
    assert torch.equal(tiny_backbone.predict(policy, *inputs), tuned)
    assert (tuned - base).abs().max() > 1e-3


def test_adapter_is_on_again_and_trainable_after_an_error(tiny_backbone):
    policy = add_lora(tiny_backbone.trainable_copy(), rank=2, alpha=4)
    trainable = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    with pytest.raises(RuntimeError), adapter_off(policy):
        raise RuntimeError
    assert trainable == {name for name, parameter in policy.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("autocast", [False, True])
def test_fresh_adapter_changes_nothing(tiny_backbone, inputs, autocast):
    policy = add_lora(tiny_backbone.trainable_copy(), rank=2, alpha=4)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        on = tiny_backbone.predict(policy, *inputs)
        with torch.no_grad(), adapter_off(policy):
            off = tiny_backbone.predict(policy, *inputs)
    assert torch.equal(on, off)
    on.float().square().mean().backward()  # the reference between forward and backward leaves the graph alone
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in policy.parameters())


def test_only_the_adapter_is_trainable_and_sits_on_the_attention(tiny_backbone):
    policy = add_lora(tiny_backbone.trainable_copy(), rank=3, alpha=6)
    names = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    layers = {name.split(".transformer_blocks.0.")[1].split(".lora_")[0] for name in names}
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    assert layers == {f"{attention}.{target}" for attention in ("attn1", "attn2") for target in targets}
    # CrossAttnDown, mid and CrossAttnUp (two) transformers, two attentions each, four projections, A and B
    assert len(names) == 4 * 2 * 4 * 2
    assert {min(p.shape) for p in policy.parameters() if p.requires_grad} == {3}


def test_initial_adapter_follows_its_seed_alone(tiny_backbone):
    def initial(seed, global_seed):
        torch.manual_seed(global_seed)
        policy = add_lora(tiny_backbone.trainable_copy(), rank=2, alpha=4, seed=seed)
        assert torch.initial_seed() == global_seed and torch.equal(torch.rand(1), first_of(global_seed))
        return torch.cat([p.detach().flatten() for p in policy.parameters() if p.requires_grad])

    def first_of(seed):
        return torch.rand(1, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(initial(0, global_seed=1), initial(0, global_seed=2))
    assert not torch.equal(initial(0, global_seed=1), initial(1, global_seed=1))


def test_merged_denoiser_is_plain_and_has_the_same_function(tiny_backbone, inputs):
    policy = trained(add_lora(tiny_backbone.trainable_copy(), rank=2, alpha=5))
    plain = merged(policy, tiny_backbone.trainable_copy())
    assert plain.state_dict().keys() == tiny_backbone.denoiser.state_dict().keys()
    assert has_adapter(policy) and not has_adapter(plain)
    torch.testing.assert_close(
        tiny_backbone.predict(plain, *inputs), tiny_backbone.predict(policy, *inputs), rtol=0, atol=1e-3
    )
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    low_rank = policy.get_submodule(layer)  # W + alpha / rank * B A with 5 / 2
    product = low_rank.lora_B["default"].weight @ low_rank.lora_A["default"].weight
    torch.testing.assert_close(
        plain.get_submodule(layer).weight, tiny_backbone.denoiser.get_submodule(layer).weight + 2.5 * product
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"rank": 0, "alpha": 1}, "rank 0"),
        ({"rank": 1, "alpha": 0}, "alpha 0"),
        ({"rank": 1, "alpha": 1, "targets": ["nothing"]}, r"targets \['nothing'\]"),
    ],
)
def test_impossible_adapters_are_refused(tiny_backbone, arguments, message):
    with pytest.raises(InputError, match=message):
        add_lora(tiny_backbone.trainable_copy(), **arguments)
