"""Checkpoints on disk: read, check, hash and write state dicts.

Reading never executes code: safetensors by default, and ``.pt``/``.pth`` with ``weights_only=True`` only. Writing goes
to a temporary name in the same directory and is then renamed, so that an interrupt leaves no half-written file.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from automerge._errors import CheckpointError, OutputError
from automerge._extra_state import without_extras
from automerge._files import check_writable, replacement, status_of
from automerge._numbers import is_whole
from automerge._reading import TIED, check_head, cleaned, missing_hint, read_safetensors, read_torch
from automerge._shards import SUFFIX as SHARDS
from automerge._shards import check_index, read_shards, split_shards, write_shards

StateDict = dict[str, torch.Tensor]

_TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")  # the last two of Lightning and Hugging Face
SHARD_BYTES = 5 * 10**9  # as Hugging Face


# -------------------------------------------------------------------- reading
def load_state_dict(path: str | os.PathLike[str], names: Collection[str] | None = None) -> StateDict:
    """Read a state dict to the CPU: ``.safetensors``, a ``.safetensors.index.json``; ``.pt``, ``.pth``, ``.ckpt``, ``.bin``.

    A wrapper ``{"state_dict": ...}``, ``{"model_state_dict": ...}`` or ``{"model": ...}`` is unwrapped; the prefixes
    ``module.`` and ``_orig_mod.``, which DataParallel and torch.compile leave, are stripped when every key has them.
    Names that `save_state_dict` recorded as tied share one tensor again.

    Args:
        path: the file.
        names: the architecture's, if known: prefixes that are part of them stay, and any other prefix that all keys have in
            front of names of the architecture is stripped (``model.`` of a LightningModule). If it is a state dict, names that
            it ties and the file leaves out are added.

    Returns:
        Name -> tensor, in the file's order for ``.pt`` and in name order for safetensors.

    Warns:
        CheckpointWarning: if the file holds other weights under the same names, such as averaged ones (``state_dict_ema``).

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
    if not isinstance(path, str | os.PathLike):
        raise CheckpointError(f"load_state_dict takes the path of a file, got a {type(path).__name__}")
    file = Path(path)
    status = status_of(file, CheckpointError, "read")
    if status is None:
        raise CheckpointError(f"{file} does not exist; check the path")
    if stat.S_ISDIR(status.st_mode):
        raise CheckpointError(f"{file} is a directory; give the checkpoint file inside it")
    suffix = SHARDS if file.name.endswith(SHARDS) else file.suffix.lower()
    if suffix not in (SHARDS, ".safetensors", *_TORCH_SUFFIXES):
        raise CheckpointError(
            f"{file}: unknown suffix {file.suffix!r}; expected .safetensors, .pt, .pth, .ckpt or .bin"
        )
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{file} is no regular file; copy the checkpoint to one first")
    if status.st_size == 0:
        raise CheckpointError(f"{file} is empty (0 bytes); save it again")
    try:
        check_head(file)
        if suffix == SHARDS:
            raw: object = read_shards(file, read_safetensors)
        else:
            raw = read_safetensors(file) if suffix == ".safetensors" else read_torch(file)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    out = cleaned(raw, str(file), names)
    return with_ties(out, names) if isinstance(names, Mapping) else out


def buffer_names(model: nn.Module) -> set[str]:
    """State-dict names of buffers."""
    return {name for name, _ in model.named_buffers(remove_duplicate=False)}


def with_ties(state_dict: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> StateDict:
    """The state dict with the names that ``expected`` ties to one of its own and that it leaves out."""
    out = dict(state_dict)
    ties = tied_names(expected)
    for alias, name in ties.items():
        if name not in out and alias in out:
            out[name] = out[alias]
    return out | {alias: out[name] for alias, name in ties.items() if alias not in out and name in out}


# -------------------------------------------------------------------- checking
def check_state_dict(
    state_dict: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    label: str,
    buffers: Collection[str] = (),
) -> tuple[str, ...]:
    """Check that a state dict fits another one: keys, shapes, finite values.

    Args:
        state_dict: what is checked.
        expected: a state dict of the architecture; only its names, shapes and dtypes matter.
        label: how messages call the checked one, e.g. ``"model 1"`` or a file name.
        buffers: names that may hold infinite values, such as a mask, if ``expected`` holds the same ones there.

    Returns:
        Notes on tensors of another dtype than expected; they are allowed. One for each pair of dtypes.

    Raises:
        CheckpointError: for a missing or an extra key, another shape or kind (sparse, without values, too narrow to be
            averaged), or a value that is NaN or infinite, naming it.

    Examples:
        >>> check_state_dict({"w": torch.ones(2).double()}, {"w": torch.ones(2)}, "model 1")
        ('model 1: w is torch.float64, expected torch.float32',)
    """
    missing = [n for n in expected if n not in state_dict]
    extra = [n for n in state_dict if n not in expected]
    if missing:
        hint = missing_hint(missing, state_dict)
        raise CheckpointError(
            f"{label} has no key {_some(missing)}; {hint or 'is it a checkpoint of this architecture?'}"
        )
    if extra:
        raise CheckpointError(f"{label} has the extra key {_some(extra)}, which the architecture does not have")
    others: dict[tuple[torch.dtype, torch.dtype], list[str]] = {}
    for name, value in state_dict.items():
        want = expected[name]
        _check_kind(name, value, want, label)
        if value.shape != want.shape:
            raise CheckpointError(
                f"{label}: {name} has the shape {tuple(value.shape)}, expected {tuple(want.shape)}; "
                "models can be merged only if their architectures are equal"
            )
        if value.dtype != want.dtype:
            others.setdefault((value.dtype, want.dtype), []).append(name)
        if name not in buffers or not _same_infinities(value, want):
            _check_finite(name, value, label)
    return tuple(f"{label}: {_few(names)} {have}, expected {want}" for (have, want), names in others.items())


def _check_kind(name: str, value: object, want: torch.Tensor, label: str) -> None:
    """A dense tensor with values, of the same kind of numbers, of at least 16 bits if they are floats."""
    if not isinstance(want, torch.Tensor):
        raise CheckpointError(
            f"{label}: {name} is a {type(want).__name__} in the architecture too, and it may hold weights, while only "
            "tensors can be merged; merge before it is quantised, or let its get_extra_state give a tensor"
        )
    if not isinstance(value, torch.Tensor):
        raise CheckpointError(f"{label}: {name} is a {type(value).__name__}, expected {want.dtype}")
    if is_lazy(value) or is_lazy(want):
        raise CheckpointError(
            f"{label}: {name} is not initialised yet (a lazy module); run the models once on real inputs first"
        )
    if is_traceable_wrapper_subclass(value):
        raise CheckpointError(
            f"{label}: {name} is a {type(value).__name__}; give plain tensors (full_tensor() of a sharded one, dequantize())"
        )
    if value.is_floating_point() != want.is_floating_point() or value.is_complex() != want.is_complex():
        raise CheckpointError(f"{label}: {name} is a {value.dtype}, expected {want.dtype}")
    if value.is_nested:
        raise CheckpointError(f"{label}: {name} is a nested tensor; save it as a dense one")
    if value.layout != torch.strided:
        raise CheckpointError(f"{label}: {name} is sparse ({value.layout}); save it as a dense tensor, with to_dense()")
    if value.is_meta:
        raise CheckpointError(
            f"{label}: {name} is on the meta device and has no values; load the model's weights first"
        )
    if value.is_floating_point() and torch.finfo(value.dtype).bits < 16:
        raise CheckpointError(
            f"{label}: {name} is {value.dtype}, too narrow to be averaged; save it as float16 or wider"
        )


def _same_infinities(value: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether there is no NaN, and what is infinite is so in both, with the same sign."""
    if not value.is_floating_point() or want.is_meta or bool(value.isnan().any()):
        return False
    there, here = (torch.where(t.isinf(), t.sign(), 0).to(torch.int8).cpu() for t in (want, value))
    return torch.equal(there, here)


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


def _few(names: Sequence[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"


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
        if not _has_memory(value) or value.numel() == 0:
            continue
        # tensors without values have no address, but a storage
        place = (value.untyped_storage()._cdata, value.storage_offset()) if value.is_meta else value.data_ptr()
        key = (value.device, place, value.dtype, tuple(value.shape), value.stride())
        if key in first:
            out[name] = first[key]
        else:
            first[key] = name
    return out


def _has_memory(value: object) -> bool:
    """Whether it is a dense tensor over memory of its own: no extra state, parameter without a shape yet, or wrapper."""
    return (
        isinstance(value, torch.Tensor)
        and not is_lazy(value)
        and value.layout == torch.strided
        and not is_traceable_wrapper_subclass(value)
    )


# -------------------------------------------------------------------- hashing
def hash_state_dict(state_dict: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in name order; strides, devices and entries without tensors do not matter.

    Examples:
        >>> a = torch.arange(6.).view(2, 3)
        >>> hash_state_dict({"w": a}) == hash_state_dict({"w": a.T.contiguous().T})
        True
    """
    digest = hashlib.sha256()
    state_dict = without_extras(state_dict)
    for name in sorted(state_dict):
        value = state_dict[name].detach().cpu().resolve_conj().resolve_neg()
        if value.is_complex():
            value = torch.view_as_real(value)
        header = json.dumps([name, str(state_dict[name].dtype), list(state_dict[name].shape)])
        digest.update(f"{len(header.encode())}:{header}".encode())
        flat = value.contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


# -------------------------------------------------------------------- writing
def save_state_dict(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a state dict as safetensors, all at once or not at all.

    A name that ends in ``.safetensors.index.json`` is an index, with the tensors in shards ``NAME-00001-of-0000N.safetensors``
    beside it, as Hugging Face reads them; one of them at a time is copied in memory.

    Tied names are all written, so that any reader finds every key, and are recorded in the metadata for
    `load_state_dict`; tensors that share storage or are not contiguous are copied.

    Args:
        path: the file, with the suffix ``.safetensors``, or ``.safetensors.index.json``.
        state_dict: name -> tensor, on any device.
        metadata: text to keep in the header.
        force: replace an existing file.
        shard_bytes: the largest size of a shard; a tensor that is larger has one to itself.

    Raises:
        OutputError: if the path exists (without ``force``), cannot be written, has another suffix, or a tensor is of a
            kind that safetensors cannot hold.
    """
    if not isinstance(path, str | os.PathLike):
        raise OutputError(
            f"the path comes first, save_state_dict(path, state_dict); got a {type(path).__name__} for it"
        )
    if metadata is not None and not isinstance(metadata, Mapping):
        raise OutputError(f"metadata= is a mapping of names to text, got a {type(metadata).__name__}")
    if not isinstance(state_dict, Mapping):
        raise OutputError(
            f"save_state_dict writes a state dict, got a {type(state_dict).__name__}; give its .state_dict() or .state_dict"
        )
    if not is_whole(shard_bytes):
        raise OutputError(f"shard_bytes= is a number of bytes, got {shard_bytes!r}")
    file = Path(path)
    sharded = file.name.endswith(SHARDS)
    if file.suffix.lower() != ".safetensors" and not sharded:
        raise OutputError(f"{file}: automerge writes safetensors only; give a name that ends in .safetensors")
    check_savable(state_dict)
    check_index(file, force) if sharded else check_writable(file, force)
    header = {str(k): str(v) for k, v in (metadata or {}).items()}
    tied = tied_names(state_dict)

    def write(target: Path, names: Collection[str], header: Mapping[str, str]) -> None:
        own = {alias: name for alias, name in tied.items() if alias in names}
        ties = {TIED: json.dumps(own)} if own else {}
        save_file(_owned({n: state_dict[n] for n in names}), str(target), metadata={**header, **ties, "format": "pt"})

    try:
        if sharded:
            sizes = {n: v.numel() * v.element_size() for n, v in state_dict.items()}
            shards = split_shards(sizes, tied, shard_bytes)
            write_shards(file, shards, sizes, header, force, lambda target, names: write(target, names, {}))
        else:
            with replacement(file, force) as temporary:
                write(temporary, list(state_dict), header)
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        raise OutputError(f"{file} cannot be written: {error}") from error


def check_savable(state_dict: Mapping[str, torch.Tensor]) -> None:
    """Safetensors can hold a state dict.

    Raises:
        OutputError: if not.
    """
    for name, value in state_dict.items():
        if name == "__metadata__":
            raise OutputError("the name '__metadata__' belongs to safetensors itself; give that tensor another name")
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise OutputError(f"the entry {name!r} is a {type(value).__name__}; a state dict maps names to tensors")
        kinds = {
            "on the meta device": value.is_meta,
            "nested": value.is_nested,
            "sparse": value.layout != torch.strided,
            f"a {type(value).__name__}": is_traceable_wrapper_subclass(value),
        }
        if value.is_complex() and value.dtype != torch.complex64:
            raise OutputError(
                f"{name} is {value.dtype}, and safetensors know complex64 only; convert it, or use torch.save"
            )
        kind = next((name for name, held in kinds.items() if held), None)
        if kind is not None:
            raise OutputError(f"{name} is {kind}; safetensors hold dense tensors with values")


def _owned(state_dict: Mapping[str, torch.Tensor]) -> StateDict:
    """Contiguous tensors of which no two share memory; copies only what must be copied."""
    seen: set[int] = set()
    out: StateDict = {}
    for name, value in state_dict.items():
        own = value.detach().resolve_conj().resolve_neg().contiguous()  # files hold the memory, not how it is viewed
        if own.layout == torch.strided and own.device.type != "meta":
            storage = own.untyped_storage()
            if storage.data_ptr() in seen or storage.nbytes() != own.numel() * own.element_size():
                own = own.clone()
            seen.add(storage.data_ptr())
        out[name] = own
    return out
