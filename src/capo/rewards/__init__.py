"""Rewards: one interface over scorers, with the facts and the fingerprint of each."""

from capo.rewards.entries import load_rewards
from capo.rewards.reward import Reward, Scorer

__all__ = ["Reward", "Scorer", "load_rewards"]
