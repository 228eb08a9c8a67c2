"""Rewards: one interface over scorers, facts about each, and the fingerprint that names its stored scores."""

from capo.rewards.reward import Reward, Scorer, load_rewards

__all__ = ["Reward", "Scorer", "load_rewards"]
