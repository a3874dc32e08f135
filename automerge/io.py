"""Checkpoints on disk: read, check, hash and write state dicts.

Reading never executes code: safetensors by default, and ``.pt``/``.pth`` with ``weights_only=True`` only. Writing goes
to a temporary name in the same directory and is then renamed, so that an interrupt leaves no half-written file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import secrets
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from automerge._errors import CheckpointError, OutputError

StateDict = dict[str, torch.Tensor]

_TORCH_SUFFIXES = (".pt", ".pth")
_WRAPPERS = ("state_dict", "model")
_TIED = "automerge.tied"
_RESAVE = "re-save the weights with safetensors.torch.save_file(model.state_dict(), 'name.safetensors')"


# -------------------------------------------------------------------- reading
def load_state_dict(path: str | os.PathLike[str]) -> StateDict:
    """Read a state dict from ``.safetensors``, ``.pt`` or ``.pth`` to the CPU.

    A wrapper ``{"state_dict": ...}`` or ``{"model": ...}`` is unwrapped; the ``module.`` prefix that DataParallel
    leaves is stripped when every key has it. Names that `save_state_dict` recorded as tied share one tensor again.

    Args:
        path: the file.

    Returns:
        Name -> tensor, in the file's order for ``.pt`` and in name order for safetensors.

    Raises:
        CheckpointError: for a missing file, a directory, an unknown suffix, an empty, truncated or corrupt file, a
            pickle that holds anything but tensors, or something that is no mapping of names to tensors.

    Examples:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> file = Path(folder.name) / "a.safetensors"
        >>> save_state_dict(file, {"w": torch.ones(2)})
        >>> load_state_dict(file)
        {'w': tensor([1., 1.])}
        >>> folder.cleanup()
    """
    file = Path(path)
    if file.is_dir():
        raise CheckpointError(f"{file} is a directory; give the checkpoint file inside it")
    if not file.exists():
        raise CheckpointError(f"{file} does not exist; check the path")
    suffix = file.suffix.lower()
    if suffix != ".safetensors" and suffix not in _TORCH_SUFFIXES:
        raise CheckpointError(f"{file}: unknown suffix {file.suffix!r}; expected .safetensors, .pt or .pth")
    try:
        if file.stat().st_size == 0:
            raise CheckpointError(f"{file} is empty (0 bytes); save it again")
        raw = _read_safetensors(file) if suffix == ".safetensors" else _read_torch(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    return _clean(raw, str(file))


def _read_safetensors(file: Path) -> object:
    try:
        with safe_open(str(file), framework="pt") as handle:
            metadata = handle.metadata() or {}
            out = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is truncated or not a safetensors file ({error}); copy or download it again"
        ) from error
    for alias, name in json.loads(metadata.get(_TIED, "{}")).items():
        if alias in out and name in out and torch.equal(out[alias], out[name]):
            out[alias] = out[name]
    return out


def _read_torch(file: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols that it then refuses
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with file.open("rb") as handle:
            head = handle.read(2)
        if head[:1] == b"\x80" or head == b"PK" or "Unsupported" in str(error):
            raise CheckpointError(
                f"{file} is refused: it is a pickle that holds code or objects other than tensors, and loading it "
                f"could run that code; {_RESAVE}"
            ) from error
        raise CheckpointError(f"{file} is truncated or not a PyTorch checkpoint; copy or download it again") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{file} is truncated or not a PyTorch checkpoint ({reason}); copy or download it again"
        ) from error


def _clean(raw: object, label: str) -> StateDict:
    """Unwrap, strip the prefix, and make sure that names map to tensors."""
    if isinstance(raw, Mapping):
        for wrapper in _WRAPPERS:
            if isinstance(raw.get(wrapper), Mapping):
                raw = raw[wrapper]
                break
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"{label} holds a {type(raw).__name__}, not a mapping of names to tensors; {_RESAVE}")
    for name, value in raw.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{label} is not a mapping of names to tensors: the entry {name!r} is a {type(value).__name__}; "
                f"{_RESAVE}"
            )
    if not raw:
        raise CheckpointError(f"{label} is empty: it holds no tensor; save the model's state_dict() again")
    prefix = "module."
    cut = len(prefix) if all(name.startswith(prefix) for name in raw) else 0
    return {name[cut:]: value.detach() if value.requires_grad else value for name, value in raw.items()}


# -------------------------------------------------------------------- checking
def check_state_dict(
    state_dict: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], label: str
) -> tuple[str, ...]:
    """Check that a state dict fits another one: keys, shapes, finite values.

    Args:
        state_dict: what is checked.
        expected: a state dict of the architecture; only its names, shapes and dtypes matter.
        label: how messages call the checked one, e.g. ``"model 1"`` or a file name.

    Returns:
        Notes on tensors of another dtype than expected; they are allowed.

    Raises:
        CheckpointError: for a missing or an extra key, another shape or kind, or a value that is NaN or infinite,
            naming it.

    Examples:
        >>> check_state_dict({"w": torch.ones(2).double()}, {"w": torch.ones(2)}, "model 1")
        ('model 1: w is torch.float64, expected torch.float32',)
    """
    missing = [n for n in expected if n not in state_dict]
    extra = [n for n in state_dict if n not in expected]
    if missing:
        raise CheckpointError(f"{label} has no key {_some(missing)}; is it a checkpoint of this architecture?")
    if extra:
        raise CheckpointError(f"{label} has the extra key {_some(extra)}, which the architecture does not have")
    notes = []
    for name, value in state_dict.items():
        want = expected[name]
        if not isinstance(value, torch.Tensor) or value.is_floating_point() != want.is_floating_point():
            kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            raise CheckpointError(f"{label}: {name} is a {kind}, expected {getattr(want, 'dtype', 'a tensor')}")
        if value.shape != want.shape:
            raise CheckpointError(
                f"{label}: {name} has the shape {tuple(value.shape)}, expected {tuple(want.shape)}; "
                "models can be merged only if their architectures are equal"
            )
        if value.dtype != want.dtype:
            notes.append(f"{label}: {name} is {value.dtype}, expected {want.dtype}")
        _check_finite(name, value, label)
    return tuple(notes)


def _check_finite(name: str, value: torch.Tensor, label: str) -> None:
    if not (value.is_floating_point() or value.is_complex()):
        return
    bad = ~torch.isfinite(value)
    if bool(bad.any()):
        kind = "NaN" if bool(torch.isnan(value).any()) else "infinite"
        raise CheckpointError(
            f"{label}: {name} has {int(bad.sum())} of {value.numel()} values that are {kind}; "
            "the training diverged or the file is damaged, so leave this model out"
        )


def _some(names: Sequence[str], limit: int = 3) -> str:
    more = f" (and {len(names) - limit} more)" if len(names) > limit else ""
    return ", ".join(repr(n) for n in names[:limit]) + more


def tied_names(state_dict: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Names of the same tensor (one storage, offset, shape and strides) -> the first such name.

    Examples:
        >>> w = torch.ones(2)
        >>> tied_names({"a": w, "b": w, "c": w.clone()})
        {'b': 'a'}
    """
    first: dict[tuple[object, ...], str] = {}
    out: dict[str, str] = {}
    for name, value in state_dict.items():
        if value.layout != torch.strided or value.device.type == "meta" or value.numel() == 0:
            continue
        key = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if key in first:
            out[name] = first[key]
        else:
            first[key] = name
    return out


# -------------------------------------------------------------------- hashing
def hash_state_dict(state_dict: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in name order; strides and devices do not matter.

    Examples:
        >>> a = torch.arange(6.).view(2, 3)
        >>> hash_state_dict({"w": a}) == hash_state_dict({"w": a.T.contiguous().T})
        True
    """
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        value = state_dict[name].detach().cpu()
        if value.is_complex():
            value = torch.view_as_real(value.resolve_conj())
        header = json.dumps([name, str(state_dict[name].dtype), list(state_dict[name].shape)])
        digest.update(f"{len(header.encode())}:{header}".encode())
        flat = value.contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


# -------------------------------------------------------------------- writing
def check_writable(path: str | os.PathLike[str], force: bool = False) -> None:
    """Find out before long work whether a result can be written to ``path``.

    Raises:
        OutputError: if the path is a directory, exists (without ``force``), or its directory is missing or not
            writable.
    """
    file = Path(path)
    if file.is_dir():
        raise OutputError(f"{file} is a directory; give a file name inside it")
    if file.exists() and not force:
        raise OutputError(f"{file} exists; pass --force (force=True) to replace it, or choose another name")
    if not file.parent.is_dir():
        raise OutputError(f"{file} cannot be written: the directory {file.parent} does not exist; create it first")
    probe = temporary_name(file)
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"{file} cannot be written: {error.strerror or error}; choose a directory that you may write to"
        ) from error


def temporary_name(file: Path) -> Path:
    """A fresh hidden name next to ``file``, with its suffix, to write to before ``os.replace``."""
    return file.with_name(f".{file.stem[:100]}.{secrets.token_hex(6)}.tmp{file.suffix}")


def save_state_dict(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
) -> None:
    """Write a state dict as safetensors, all at once or not at all.

    Tied names are all written, so that any reader finds every key, and are recorded in the metadata for
    `load_state_dict`; tensors that share storage or are not contiguous are copied.

    Args:
        path: the file, with the suffix ``.safetensors``.
        state_dict: name -> tensor, on any device.
        metadata: text to keep in the header.
        force: replace an existing file.

    Raises:
        OutputError: if the path exists (without ``force``), cannot be written, has another suffix, or a tensor is of a
            kind that safetensors cannot hold.
    """
    file = Path(path)
    if file.suffix.lower() != ".safetensors":
        raise OutputError(f"{file}: automerge writes safetensors only; give a name that ends in .safetensors")
    check_writable(file, force)
    header = {str(k): str(v) for k, v in (metadata or {}).items()}
    header["format"] = "pt"
    tied = tied_names(state_dict)
    if tied:
        header[_TIED] = json.dumps(tied)
    temporary = temporary_name(file)
    try:
        save_file(_owned(state_dict), str(temporary), metadata=header)
        os.replace(temporary, file)
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        raise OutputError(f"{file} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _owned(state_dict: Mapping[str, torch.Tensor]) -> StateDict:
    """Contiguous tensors of which no two share memory; copies only what must be copied."""
    seen: set[int] = set()
    out: StateDict = {}
    for name, value in state_dict.items():
        own = value.detach().contiguous()
        if own.layout == torch.strided and own.device.type != "meta":
            storage = own.untyped_storage()
            if storage.data_ptr() in seen or storage.nbytes() != own.numel() * own.element_size():
                own = own.clone()
            seen.add(storage.data_ptr())
        out[name] = own
    return out
