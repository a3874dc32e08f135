"""Which module of a model is running."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules import module as _nn_module


class Whereabouts:
    """Follows a pass through the modules of a model, by hooks that every module has."""

    def __init__(self, model: nn.Module) -> None:
        self._paths = {id(m): name for name, m in model.named_modules()}
        self._stack: list[str] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Follow what runs inside."""

        def enter(module: nn.Module, _: Any) -> None:
            self._stack.append(self._paths.get(id(module), self.module))

        def leave(module: nn.Module, _: Any, __: Any) -> None:
            if self._stack:
                self._stack.pop()

        handles = [
            _nn_module.register_module_forward_pre_hook(enter),
            _nn_module.register_module_forward_hook(leave, always_call=False),
        ]
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", message=r"Using `torch\.compile\(module\)` when there are global hooks"
                )
                yield
        finally:
            for handle in handles:
                handle.remove()

    def again(self) -> None:
        """Another pass begins."""
        self._stack.clear()

    @property
    def module(self) -> str:
        """The path of the innermost module that runs; empty for the model itself."""
        return self._stack[-1] if self._stack else ""

    def where(self) -> str:
        """For messages: ``" in module 'path'"``, or nothing."""
        return f" in module {self.module!r}" if self.module else ""
