"""Import paths and arguments that other code relies on."""

import inspect

import pytest
from hydra.utils import get_object

CONTRACTS = {
    "capo.calibration.calibrated_rewards": "scores, link='identity', scale=1.0",
    "capo.pairs.frontiers": "scores",
    "capo.pairs.best_worst": "scores, calibrated",
    "capo.pairs.reward_sum": "scores, calibrated, *, weights=None",
    "capo.pairs.frs": "scores, calibrated, *, lower='frontier', depth=None",
    "capo.pairs.random_pair": "scores, calibrated",
    "capo.pairs.PairSets": "winners, losers",
    "capo.noise.sigmoid_weight": "log_snr, bias",
    "capo.noise.velocity_weight": "log_snr, bias",
    "capo.noise.vp_log_snr": "alphas_cumprod",
    "capo.noise.flow_log_snr": "t",
    "capo.noise.flow_time": "u, draw='logsnr_uniform'",
    "capo.data.PreferenceBatch": "latents, noise, u, calibrated_rewards, text, prompt_ids, times=1, "
    "digests=<factory>",
    "capo.objectives.PairErrors": "policy_winner, reference_winner=None, policy_loser=None, "
    "reference_loser=None, weight=None, gap=None, predictions=None, group=None, kl=None",
    "capo.objectives.dpo": "errors, *, beta",
    "capo.objectives.ipo": "errors, *, beta",
    "capo.objectives.capo": "errors, *, beta",
    "capo.objectives.sft": "errors, *, beta=None",
    "capo.metrics.WinRate.update": "self, policy_scores, base_scores",
    "capo.metrics.WinRate.compute": "self",
    "capo.module.PreferenceModule.pair_errors": "self, batch",
}


@pytest.mark.parametrize("path", CONTRACTS)
def test_contracts_keep_their_arguments(path):
    signature = inspect.signature(get_object(path))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    found = signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)
    assert str(found) == f"({CONTRACTS[path]})"
