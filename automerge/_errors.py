"""Every error that automerge raises on purpose.

All derive from `AutomergeError`, so that the command line can turn each into one sentence and exit code 2.
"""

from __future__ import annotations


class AutomergeError(Exception):
    """Base of the errors that a caller can act on; the message says what happened, where, and what to do."""


class TraceError(AutomergeError):
    """The model did not run on the example inputs, or could not be recorded."""


class InvarianceError(AutomergeError):
    """A claimed symmetry changed the model's output; names the first operator whose value differs."""


class UnknownOperatorError(AutomergeError):
    """`strict=True` met an operator that has no rule."""


class SymmetryError(AutomergeError):
    """A `Symmetry` is inconsistent in itself or with the state dict it is applied to."""


class CheckpointError(AutomergeError):
    """A checkpoint cannot be read, or does not belong to the model (keys, shapes, NaN, dtype)."""


class CheckpointWarning(UserWarning):
    """A file of weights holds more than is read of it, such as averaged ones (EMA) beside those of the last step."""


class MatchingError(AutomergeError):
    """A matching was asked of unsuitable inputs (one model, wrong weights, an unknown model index)."""


class OutputError(AutomergeError):
    """A result cannot be written: the path exists (pass `--force`) or is not writable."""


class RankError(AutomergeError):
    """Another process of a distributed run failed, ended, or does not answer."""
