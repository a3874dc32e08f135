"""Align and merge independently trained PyTorch networks, without a hand-written specification of their symmetries.

``infer(model, args)`` finds what may be permuted, ``match(models, symmetry)`` aligns N models in one universe, and
``merge(models, args)`` does both, averages and repairs.
"""

from automerge._comparison import Comparison
from automerge._errors import (
    AutomergeError,
    CheckpointError,
    CheckpointWarning,
    InvarianceError,
    MatchingError,
    OutputError,
    RankError,
    SymmetryError,
    TraceError,
    UnknownOperatorError,
)
from automerge._measures import Agreement, Barrier, CycleError, Evaluation, Plane, Similarity
from automerge._repair_report import LayerRepair, Renormaliser, RepairReport
from automerge._verify import Verification, verify
from automerge._version import __version__
from automerge.compare import compare
from automerge.datafree import GaussianRepair, RowNorms
from automerge.evaluate import agreement, barrier, cycle_error, evaluate, interpolate, similarity
from automerge.fitting import LeastSquares
from automerge.gauges import GaugeReport, canonicalise
from automerge.groups import Element
from automerge.infer import infer
from automerge.io import load_state_dict, save_state_dict
from automerge.landscape import plane
from automerge.matchers import (
    CCA,
    ActivationMatching,
    FrankWolfe,
    Identity,
    Matcher,
    Matching,
    MergeMany,
    Pairwise,
    PairwiseFrankWolfe,
    Procrustes,
    Synchronised,
    WeightMatching,
    ZipIt,
    match,
)
from automerge.merge import MergeResult, average, merge
from automerge.renormalise import Repair, reset_batchnorm
from automerge.rules import register_rule
from automerge.symmetry import Exchange, Generator, Pin, Slot, Symmetry
from automerge.trace import TraceInfo, trace

__all__ = [
    "CCA",
    "ActivationMatching",
    "Agreement",
    "AutomergeError",
    "Barrier",
    "CheckpointError",
    "CheckpointWarning",
    "Comparison",
    "CycleError",
    "Element",
    "Evaluation",
    "Exchange",
    "FrankWolfe",
    "GaugeReport",
    "GaussianRepair",
    "Generator",
    "Identity",
    "InvarianceError",
    "LayerRepair",
    "LeastSquares",
    "Matcher",
    "Matching",
    "MatchingError",
    "MergeMany",
    "MergeResult",
    "OutputError",
    "Pairwise",
    "PairwiseFrankWolfe",
    "Pin",
    "Plane",
    "Procrustes",
    "RankError",
    "Renormaliser",
    "Repair",
    "RepairReport",
    "RowNorms",
    "Similarity",
    "Slot",
    "Symmetry",
    "SymmetryError",
    "Synchronised",
    "TraceError",
    "TraceInfo",
    "UnknownOperatorError",
    "Verification",
    "WeightMatching",
    "ZipIt",
    "__version__",
    "agreement",
    "average",
    "barrier",
    "canonicalise",
    "compare",
    "cycle_error",
    "evaluate",
    "infer",
    "interpolate",
    "load_state_dict",
    "match",
    "merge",
    "plane",
    "register_rule",
    "reset_batchnorm",
    "save_state_dict",
    "similarity",
    "trace",
    "verify",
]
