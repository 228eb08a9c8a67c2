"""Prompts, pools of candidates with their scores, and the pairs that training draws from them."""

from capo.data.batch import PreferenceBatch

__all__ = ["PreferenceBatch"]
