"""Drop-in optimizers: one direction per file, everything they share in ``base``."""

from symopt.constraints import LowRank
from symopt.optim.adam import Adam, AdamW
from symopt.optim.base import ConstrainedOptimizer
from symopt.optim.lion import Lion
from symopt.optim.lowrank.step import LowRankStep
from symopt.optim.muon import Muon
from symopt.optim.own_step import register
from symopt.optim.sgd import SGD

OPTIMIZERS: tuple[type[ConstrainedOptimizer], ...] = (SGD, Adam, AdamW, Lion, Muon)
"""Every public optimizer; the tests fail for one without a row in their table."""

register(LowRank.retraction, LowRankStep())

__all__ = ["OPTIMIZERS", "SGD", "Adam", "AdamW", "ConstrainedOptimizer", "Lion", "Muon"]
