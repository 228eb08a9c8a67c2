import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from capo import noise
from capo.errors import InputError

GRID = torch.linspace(0, 1, 200_001, dtype=torch.float64)[:-1] + 0.5 / 200_000  # midpoints of [0, 1)


def sdxl_scheduler() -> DDPMScheduler:
    return DDPMScheduler(1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- discrete, variance-preserving


def test_log_snr_of_the_sdxl_schedule():
    # beta_t = (linspace(sqrt 0.00085, sqrt 0.012, 1000))^2, abar the cumulative product of 1 - beta
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    log_snr = noise.vp_log_snr((1 - betas).cumprod(0))
    steps = [0, 250, 500, 750, 999]
    assert log_snr[steps].tolist() == pytest.approx([7.069, 0.725, -0.963, -2.822, -5.364], abs=5e-4)
    assert (log_snr.diff() < 0).all()
    weights = noise.sigmoid_weight(log_snr, 1.5)
    assert weights[steps].tolist() == pytest.approx([0.0038, 0.685, 0.9215, 0.987, 0.9990], abs=5e-4)
    assert weights.mean().item() == pytest.approx(0.793, abs=5e-4)
    single = noise.vp_log_snr(sdxl_scheduler().alphas_cumprod)  # as the pipelines hold it, in float32
    assert single.dtype == torch.float32 and torch.allclose(single.double(), log_snr, atol=2e-4)


def test_log_snr_by_hand():
    # abar = 0.9: log(0.9 / 0.1) = log 9
    assert noise.vp_log_snr(torch.tensor([0.9, 0.5]).double()).tolist() == pytest.approx([math.log(9), 0.0])


def test_timestep_by_hand():
    u = torch.tensor([0.0, 0.0009, 0.001, 0.5, 0.99949, 0.9999])
    found = noise.vp_timestep(u, 1000)
    assert found.dtype == torch.int64
    assert found.tolist() == [0, 0, 1, 500, 999, 999]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_timestep_stays_below_the_number_of_steps(dtype, steps):
    last = torch.tensor([1 - 2.0**-53], dtype=torch.float64).to(dtype)  # 1 where it is rounded
    assert noise.vp_timestep(last, steps).item() == steps - 1


def test_timesteps_are_hit_equally_often_and_rise_with_u():
    found = noise.vp_timestep(GRID, 1000)
    assert torch.equal(found.bincount(), torch.full((1000,), 200))
    assert (found.diff() >= 0).all()
    with pytest.raises(ValueError, match="0 steps"):
        noise.vp_timestep(GRID, 0)


def test_log_snr_normal_times_rise_with_u_and_are_normal_inside_the_schedule():
    log_snr = noise.vp_log_snr(sdxl_scheduler().alphas_cumprod)
    t = noise.vp_time(GRID.float(), log_snr, "logsnr_normal")
    assert t.dtype == torch.int64 and (t.diff() >= 0).all() and t[0] < 5 and t[-1] == 999
    # between log-SNRs of -0.5 - 2 and -0.5 + 2 lies one standard deviation to either side, 68.27 %; the ends
    # of the schedule cut off P(z > 3.785) + P(z > 2.432) = 0.0076, by which all shares grow
    found, shift = log_snr[t], 1 / (1 - 0.0076)
    for deviations, share in ((1, 0.6827), (0.5, 0.3829)):
        inside = ((found > -0.5 - 2 * deviations) & (found < -0.5 + 2 * deviations)).double().mean()
        assert inside.item() == pytest.approx(share * shift, abs=2e-3)
    assert t.bincount(minlength=1000)[-1] / len(t) < 1e-3  # nothing piles up at the end


def test_the_late_draw_is_normal_around_its_mean():
    log_snr = noise.vp_log_snr(torch.linspace(0.999, 1e-6, 4000, dtype=torch.float64))  # wide enough for it
    found = log_snr[noise.vp_time(GRID, log_snr, "logsnr_normal_late")]
    assert found.mean().item() == pytest.approx(-3.5, abs=0.05)
    assert found.std().item() == pytest.approx(1.5, abs=0.05)


def test_log_snr_normal_keeps_off_a_time_of_noise_alone():
    log_snr = torch.tensor([2.0, 0.0, -2.0, -math.inf])
    u = torch.tensor([0.0, 0.5, 1 - 2**-24])
    # bounds z = -1.25 and infinity: v from 0.1056 to 1, the middle 0.5528 at z = 0.13, lam = -0.77 next to 0
    assert noise.vp_time(u, log_snr, "logsnr_normal").tolist() == [0, 1, 2]


def test_uniform_times_are_those_of_the_timesteps_and_unknown_draws_are_refused():
    log_snr = noise.vp_log_snr(sdxl_scheduler().alphas_cumprod)
    assert torch.equal(noise.vp_time(GRID, log_snr), noise.vp_timestep(GRID, 1000))
    with pytest.raises(
        InputError, match="draw must be one of uniform, logsnr_normal, logsnr_normal_late, got 'logit_normal'"
    ):
        noise.vp_time(GRID, log_snr, "logit_normal")


def test_noisy_latents_are_those_of_diffusers():
    x, eps = normal(3, 4, 8, 8), normal(3, 4, 8, 8, seed=1)
    t = torch.tensor([0, 400, 999])
    scheduler = sdxl_scheduler()
    found = noise.vp_add_noise(x, eps, scheduler.alphas_cumprod[t])
    assert torch.equal(found, scheduler.add_noise(x, eps, t))


def test_noisy_latents_by_hand():
    # abar = 0.36: 0.6 x + 0.8 eps = 0.6 * 2 + 0.8 * (-1) = 0.4
    x, eps = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -1.0)
    assert noise.vp_add_noise(x, eps, torch.tensor([0.36])).item() == pytest.approx(0.4)


# ---- rectified flow


def test_flow_log_snr_by_hand():
    # t = 1/4: 2 log(0.75 / 0.25) = 2 log 3
    found = noise.flow_log_snr(torch.tensor([0.25, 0.5, 0.75]).double())
    assert found.tolist() == pytest.approx([2 * math.log(3), 0.0, -2 * math.log(3)])


def test_noisy_flow_latents_are_those_of_diffusers():
    x, eps = normal(3, 4, 8, 8), normal(3, 4, 8, 8, seed=1)
    scheduler = FlowMatchEulerDiscreteScheduler()
    t = scheduler.timesteps[[10, 500, 990]]
    found = noise.flow_add_noise(x, eps, t / 1000)
    assert torch.allclose(found, scheduler.scale_noise(x, t, eps), atol=1e-6)


def test_flow_target_is_the_derivative_of_the_noisy_latent():
    x, eps = normal(2, 4, 8, 8).double(), normal(2, 4, 8, 8, seed=1).double()
    t = torch.tensor([0.3, 0.8]).double()
    slope = (noise.flow_add_noise(x, eps, t + 1e-4) - noise.flow_add_noise(x, eps, t - 1e-4)) / 2e-4
    assert torch.allclose(noise.flow_target(x, eps), slope, atol=1e-9)
    # from the velocity back to both ends: x = x_t - t v, eps = x_t + (1 - t) v
    noisy, time = noise.flow_add_noise(x, eps, t), t[:, None, None, None]
    assert torch.allclose(noisy - time * noise.flow_target(x, eps), x)


def test_flow_times_by_hand():
    u = torch.tensor([0.25, 0.5, 0.975]).double()
    # lam = 10 - 20 u = 5, 0, -9.5; t = sigmoid(-lam / 2)
    expected = [1 / (1 + math.exp(2.5)), 0.5, 1 / (1 + math.exp(-4.75))]
    assert noise.flow_time(u, "logsnr_uniform").tolist() == pytest.approx(expected)
    assert noise.flow_time(u, "uniform").tolist() == u.tolist()
    # the normal's quantiles at 0.25, 0.5 and 0.975: -0.6744898, 0, 1.959964
    expected = [1 / (1 + math.exp(0.6744898)), 0.5, 1 / (1 + math.exp(-1.959964))]
    assert noise.flow_time(u, "logit_normal").tolist() == pytest.approx(expected, abs=1e-7)


def test_log_snr_is_uniform_where_the_name_says_so():
    found = noise.flow_log_snr(noise.flow_time(GRID, "logsnr_uniform"))
    assert torch.allclose(found, 10 - 20 * GRID, atol=1e-9)
    assert torch.equal(noise.flow_time(GRID), noise.flow_time(GRID, "logsnr_uniform"))  # the default


@pytest.mark.parametrize("draw", ["logsnr_uniform", "uniform", "logit_normal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flow_times_rise_with_u_and_stay_inside(draw, dtype):
    u = torch.cat(
        [torch.zeros(1, dtype=dtype), GRID.to(dtype)[::20], 1 - torch.tensor([2.0**-24], dtype=dtype)]
    )
    t = noise.flow_time(u, draw)
    assert t.dtype == dtype
    assert (t.diff() >= 0).all()
    assert t.min() >= 1e-5 * (1 - 1e-6) and t.max() <= 1 - 1e-5 + 1e-7
    assert noise.flow_log_snr(t).isfinite().all()


def test_unknown_draw():
    with pytest.raises(
        InputError, match=r"^draw must be one of logsnr_uniform, uniform, logit_normal, got 'normal'"
    ):
        noise.flow_time(GRID, "normal")


# ---- weights


def test_weights_by_hand():
    # lam - b = 2 log 2: sigmoid(-2 log 2) = 1 / (1 + 4); 1 / (2 + 1/2) = 0.4
    log_snr = torch.tensor([2 * math.log(2) + 0.5]).double()
    assert noise.sigmoid_weight(log_snr, 0.5).item() == pytest.approx(0.2)
    assert noise.velocity_weight(log_snr, 0.5).item() == pytest.approx(0.4)
    assert noise.constant_weight(log_snr, 0.5).tolist() == [1.0]


def test_sigmoid_weight_falls_with_the_log_snr():
    log_snr = torch.linspace(-15, 15, 500, dtype=torch.float64)
    assert (noise.sigmoid_weight(log_snr, 1.5).diff() < 0).all()
    assert noise.sigmoid_weight(torch.tensor([1.5]), 1.5).item() == 0.5


@pytest.mark.parametrize("bias", [-1.0, 0.0, 2.0])
def test_velocity_weight_is_the_sigmoid_weight_on_the_noise(bias):
    # eps_hat - eps = (1 - t)(v_hat - v) at the same x_t, and d lam / dt = -2 / (t (1 - t)), so a time t ~
    # U(0, 1) weighs the velocity's squared error by sigmoid(b - lam) (1 - t)^2 |d lam / dt|: 2 e^(b/2) times
    # the velocity weight
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    log_snr = noise.flow_log_snr(t)
    on_noise = noise.sigmoid_weight(log_snr, bias) * (1 - t) ** 2 * 2 / (t * (1 - t))
    assert torch.allclose(on_noise, 2 * math.exp(bias / 2) * noise.velocity_weight(log_snr, bias))


def test_mean_velocity_weights_of_the_draws():
    def mean(draw: str) -> float:
        return noise.velocity_weight(noise.flow_log_snr(noise.flow_time(GRID, draw)), -1.0).mean().item()

    assert mean("logsnr_uniform") == pytest.approx(0.156, abs=5e-4)
    assert mean("uniform") == pytest.approx(0.277, abs=5e-4)


def test_weights_stay_finite_far_out():
    far = torch.tensor([-500.0, 500.0])
    assert noise.velocity_weight(far, 0.0).tolist() == [0.0, 0.0]
    assert noise.sigmoid_weight(far, 0.0).tolist() == [1.0, 0.0]


# ---- shapes and dtypes


@pytest.mark.parametrize("leading", [(5,), (5, 2)])
def test_each_sample_has_its_own_time(leading):
    x, eps = normal(*leading, 4, 3, 3), normal(*leading, 4, 3, 3, seed=1)
    t = torch.rand(leading, generator=torch.Generator().manual_seed(0))
    for function in (noise.vp_add_noise, noise.flow_add_noise):
        together = function(x, eps, t)
        alone = [
            function(a[None], b[None], c[None])
            for a, b, c in zip(x.flatten(0, -4), eps.flatten(0, -4), t.flatten(), strict=True)
        ]
        assert torch.equal(together, torch.cat(alone).reshape(x.shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    values = torch.linspace(0.05, 0.95, 19).to(dtype)
    for function in (
        noise.vp_log_snr,
        noise.flow_log_snr,
        noise.flow_time,
        lambda v: noise.sigmoid_weight(v, 1.5),
        lambda v: noise.velocity_weight(v, -1.0),
    ):
        assert torch.equal(function(values), function(values.float()).to(dtype))
    x, eps = normal(19, 4, 2, 2).to(dtype), normal(19, 4, 2, 2, seed=1).to(dtype)
    for function in (noise.vp_add_noise, noise.flow_add_noise):
        assert torch.equal(
            function(x, eps, values), function(x.float(), eps.float(), values.float()).to(dtype)
        )
