"""Rewards: one interface over scorers, with the facts and the fingerprint of each."""

from capo.rewards.reward import Reward, Scorer, load_rewards

__all__ = ["Reward", "Scorer", "load_rewards"]
