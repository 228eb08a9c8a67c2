from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from capo.noise import vp_log_snr
from capo.shapes.make import autoencoder, base
from capo.shapes.make.fitting import fit, generator, share


def test_timesteps_are_drawn_where_shapes_are_decided():
    log_snr = vp_log_snr(base.build_scheduler().alphas_cumprod)
    drawn = torch.cat([base.timesteps(log_snr, 32, generator(0, 2, step)) for step in range(200)])
    assert drawn.min() >= 0 and drawn.max() <= 999
    uniform = drawn.view(-1, 4)[:, 0]
    assert 480 < uniform.float().mean() < 520
    middle = log_snr[drawn.view(-1, 4)[:, 1:].flatten()]
    assert abs(middle.mean() + 0.5) < 0.1 and abs(middle.std() - 2) < 0.15
    # stratified: one in each 32nd of the draw
    first = base.timesteps(log_snr, 32, generator(0, 2, 0))
    assert len(first.unique()) >= 28


def _regress(rank, work, processes=1):
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{work}/meet", rank=rank, world_size=processes)
    torch.manual_seed(0)
    module = nn.Linear(3, 1)

    def loss(step):
        x = torch.randn(8, 3, generator=generator(1, step))[share(8)]
        return (module(x) - x.sum(1, keepdim=True)).square().mean(), {}

    fit("line", module, loss, work, 20, lr=0.1, average=True)
    if processes > 1:
        dist.destroy_process_group()


def test_two_processes_fit_what_one_does(tmp_path):
    alone, both = tmp_path / "alone", tmp_path / "both"
    alone.mkdir()
    both.mkdir()
    _regress(0, alone)
    # forked processes need not import torch
    mp.start_processes(_regress, (both, 2), nprocs=2, start_method="fork")
    one, two = (torch.load(folder / "line.pt", weights_only=True) for folder in (alone, both))
    assert one["step"] == two["step"] == 20
    for name in one["average"]:
        assert torch.allclose(one["average"][name], two["average"][name], atol=1e-6)
        assert torch.allclose(one["module"][name], two["module"][name], atol=1e-6)


def test_a_learner_begins_from_a_pipeline_and_finds_words_by_their_names(tmp_path):
    torch.manual_seed(0)
    old = base.Learner().eval()
    base.pipeline(old, autoencoder.build()).save_pretrained(tmp_path)
    swapped = dict(old.tokenizer.get_vocab())
    one, other = old.tokenizer("red").input_ids[1], old.tokenizer("blue").input_ids[1]
    names = {number: name for name, number in swapped.items()}
    swapped[names[one]], swapped[names[other]] = other, one  # the two words the other way round
    new = base.Learner().eval()
    new.tokenizer = SimpleNamespace(get_vocab=lambda: swapped)
    base.begin(new, tmp_path)
    for mine, its in ((new.first, old.first), (new.second, old.second)):
        rows, stored = (encoder.get_input_embeddings().weight for encoder in (mine, its))
        assert torch.equal(rows[other], stored[one]) and torch.equal(rows[one], stored[other])
        rest = [number for number in range(len(stored)) if number not in (one, other)]
        assert torch.equal(rows[rest], stored[rest])
    assert all(torch.equal(a, b) for a, b in zip(new.unet.parameters(), old.unet.parameters(), strict=True))
