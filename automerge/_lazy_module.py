"""Graphs that mostly are looked at, and seldom run."""

from __future__ import annotations

from typing import Any

from torch import fx


class LazyModule(fx.GraphModule):
    """A graph whose python code is written when it is called or asked for: that takes longer than to record it."""

    def recompile(self) -> Any:
        """Leave it for later."""
        type(self).forward = LazyModule.forward  # type: ignore[method-assign]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Write the code, and run it."""
        super().recompile()
        return type(self).forward(self, *args, **kwargs)

    @property
    def code(self) -> str:
        """The python code."""
        super().recompile()
        return self._code
