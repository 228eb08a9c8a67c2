"""Rewards: one interface over scorers, what is known about each, and the fingerprint under which its scores are stored."""

from capo.rewards.reward import Reward, Scorer, load_rewards

__all__ = ["Reward", "Scorer", "load_rewards"]
