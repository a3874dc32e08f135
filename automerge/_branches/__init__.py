"""Branches that do the same with other weights, read as one branch over stacked weights."""

from automerge._branches._stacking import Stacked as Stacked
from automerge._branches._stacking import stacked as stacked
