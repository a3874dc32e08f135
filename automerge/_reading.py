"""What checkpoint files hold: read without running code, unwrapped, and refused in one sentence."""

from __future__ import annotations

import errno
import itertools
import json
import pickle
import warnings
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from automerge._errors import CheckpointError, CheckpointWarning
from automerge._extra_state import is_extra, same

_SLACK = 64 << 20  # bytes
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile
TIED = "automerge.tied"
_RESAVE = "re-save the weights with safetensors.torch.save_file(model.state_dict(), 'name.safetensors')"


def check_head(file: Path) -> None:
    """Refuse what downloads leave behind in place of a file, and a file with the other format's suffix."""
    with file.open("rb") as handle:
        start = handle.read(64)
    head, named = start.lstrip().lower(), file.suffix.lower() == ".safetensors"
    if named and start.startswith(b"PK\x03\x04"):
        raise CheckpointError(f"{file} is a zip archive, as torch.save writes; if it is one of PyTorch, name it .pt")
    if not named and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < file.stat().st_size:
        raise CheckpointError(f"{file} is a safetensors file; name it .safetensors")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{file} is a pointer of Git LFS and not the file itself; fetch that with 'git lfs pull'")
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{file} is a web page and not a checkpoint; download the file itself")


def read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, mapped into memory; names that are recorded as tied share one tensor."""
    try:
        with safe_open(str(file), framework="pt") as handle:
            metadata = handle.metadata() or {}
            out = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is truncated or not a safetensors file ({error}); copy or download it again"
        ) from error
    for alias, name in _ties(metadata.get(TIED, "{}"), file).items():
        if alias in out and name in out and torch.equal(out[alias], out[name]):
            out[alias] = out[name]
    return out


def _ties(text: str, file: Path) -> dict[str, str]:
    try:
        ties = json.loads(text)
    except ValueError:
        ties = None
    if not isinstance(ties, dict) or not all(isinstance(name, str) for name in ties.values()):
        raise CheckpointError(f"{file} has a damaged entry {TIED} in its header; save it again")
    return ties


def _check_size(file: Path) -> None:
    """``torch.save`` packs nothing: an archive that would take far more memory than its file takes is none of its own.

    Raises:
        CheckpointError: if it does.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # of an older format, or damaged, which is said when it is read
    size = file.stat().st_size
    if unpacked > 16 * size + _SLACK:
        raise CheckpointError(
            f"{file} is refused: its {size:,} bytes unpack to {unpacked:,}, and torch.save packs nothing; {_RESAVE}"
        )


def read_torch(file: Path) -> object:
    """What a file of ``torch.save`` holds, if that is tensors and plain containers."""
    _check_size(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols that it then refuses
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with file.open("rb") as handle:
            head = handle.read(2)
        if head[:1] == b"\x80" or head == b"PK":
            raise CheckpointError(
                f"{file} is refused: it is a pickle that holds code or objects other than tensors (or is damaged), and "
                f"loading it could run that code; {_RESAVE}"
            ) from error
        raise CheckpointError(f"{file} is truncated or not a PyTorch checkpoint; copy or download it again") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        first = str(error).split("\n", 1)[0].split(". ", 1)[0]
        if "TorchScript" in first:
            raise CheckpointError(f"{file} is a TorchScript archive, which holds code; {_RESAVE}") from error
        reason = f" ({first})" if isinstance(error, RuntimeError) and first else ""
        raise CheckpointError(
            f"{file} is truncated or not a PyTorch checkpoint{reason}; copy or download it again"
        ) from error


def cleaned(raw: object, label: str, names: Collection[str] | None) -> dict[str, torch.Tensor]:
    """Unwrap, strip prefixes, and make sure that names map to tensors."""
    if isinstance(raw, Mapping):
        for wrapper in _WRAPPERS:
            if isinstance(raw.get(wrapper), Mapping):
                _warn_of_others(raw, wrapper, label)
                raw = raw[wrapper]
                break
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"{label} holds a {type(raw).__name__}, not a mapping of names to tensors; {_RESAVE}")
    own = {name: value for name, value in raw.items() if _is_own(name, names) and is_extra(value)}
    _warn_of_entries(own, label, names)
    raw = {name: value for name, value in raw.items() if name not in own}
    for name, value in raw.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            inner = isinstance(value, Mapping) and any(isinstance(v, torch.Tensor) for v in value.values())
            raise CheckpointError(
                f"{label} is not a mapping of names to tensors: the entry {name!r} is a {type(value).__name__}; "
                + ("if the weights are in it, save that alone, under the name 'state_dict'" if inner else _RESAVE)
            )
    if not raw:
        raise CheckpointError(f"{label} is empty: it holds no tensor; save the model's state_dict() again")
    if "n_averaged" in raw and len(raw) > 1 and "n_averaged" not in (names or ()):
        rest = {name: value for name, value in raw.items() if name != "n_averaged"}
        raw = rest if all(name.startswith("module.") for name in rest) else raw  # of an AveragedModel
    bare = without_prefix(raw, names)
    return {name: value.detach() if value.requires_grad else value for name, value in bare.items()}


def _is_own(name: object, names: Collection[str] | None) -> bool:
    """Whether an entry is one that modules write beside their tensors, and read again."""
    return isinstance(name, str) and (name.endswith("_extra_state") or name in (names or ()))


def _warn_of_entries(own: Mapping[object, object], label: str, names: Collection[str] | None) -> None:
    """Warn of entries without tensors that the architecture has otherwise: they are not read."""
    known = names if isinstance(names, Mapping) else {}
    odd = next((name for name, value in own.items() if name in known and not same(value, known[name])), None)
    if odd is not None:
        warnings.warn(
            f"{label}: {odd!r} is no tensor and is not read, and the architecture has another, which counts",
            CheckpointWarning,
            stacklevel=4,
        )


def without_prefix(state_dict: Mapping[str, torch.Tensor], names: Collection[str] | None) -> Mapping[str, torch.Tensor]:
    """A state dict without the prefixes of wrappers; the same one if there are none.

    Args:
        state_dict: of at least one name.
        names: the architecture's, if known, in which the prefixes may be.
    """
    cut = _prefix_length(state_dict, names)
    return {name[cut:]: value for name, value in state_dict.items()} if cut else state_dict


def _warn_of_others(raw: Mapping[object, object], read: str, label: str) -> None:
    """Warn of weights beside those that are read, under the same names (an exponential moving average of them)."""
    names = _bare(raw[read])
    for key, value in raw.items():
        if key != read and names and isinstance(value, Mapping) and names <= _bare(value):
            warnings.warn(
                f"{label} holds weights under {read!r} and under {key!r}, and those under {read!r} are read; to merge the "
                "others, save them alone",
                CheckpointWarning,
                stacklevel=4,
            )


def _bare(state_dict: object) -> set[str]:
    """The names of tensors without wrappers' prefixes."""
    assert isinstance(state_dict, Mapping)
    tensors = (n for n, v in state_dict.items() if isinstance(n, str) and isinstance(v, torch.Tensor))
    names = [n for n in tensors if n != "n_averaged"]  # of an AveragedModel
    cut = _prefix_length(names, None) if names else 0
    return {n[cut:] for n in names}


def _prefix_length(keys: Collection[str], names: Collection[str] | None) -> int:
    """How many characters of every key are wrappers' prefixes; the fewest that lead to a name of the architecture."""
    cuts = [0]
    while prefix := next((p for p in _PREFIXES if all(k.startswith(p, cuts[-1]) for k in keys)), ""):
        cuts.append(cuts[-1] + len(prefix))
    if not names:
        return cuts[-1]
    found = next((cut for cut in cuts if any(k[cut:] in names for k in keys)), None)
    return found if found is not None else _attribute_length(keys, names) or cuts[-1]


def _attribute_length(keys: Collection[str], names: Collection[str]) -> int:
    """The length of a prefix without which all keys are names of the architecture: of a module that holds it; 0 if none."""
    for first in itertools.islice(names, 20):  # (one that is tied may be left out)
        for key in keys:
            if key.endswith("." + first):
                cut = len(key) - len(first)
                if all(k.startswith(key[:cut]) and k[cut:] in names for k in keys):
                    return cut
    return 0


def missing_hint(missing: Sequence[str], state_dict: Mapping[str, object]) -> str:
    """What to do about names that are missing where they stand under others; empty if they do not.

    Under one prefix too much or too little, under a prefix beside other tensors (a LightningModule with a criterion of its
    own), or in an entry that is itself a state dict.
    """
    inner = next((k for k, v in state_dict.items() if isinstance(v, Mapping) and missing[0] in v), None)
    if inner is not None:
        return f"its entry {inner!r} is a mapping that has it: give that"
    longer = next((k for k in state_dict if k.endswith("." + missing[0])), None)
    if longer is None:
        shorter = next((k for k in state_dict if missing[0].endswith("." + k)), None)
        prefix = missing[0][: -len(shorter)] if shorter else ""
        if prefix and all(n.startswith(prefix) and n[len(prefix) :] in state_dict for n in missing):
            return f"its names lack {prefix!r}, as of a wrapper: give all models wrapped, or none"
        return ""
    prefix = longer[: -len(missing[0])]
    if not all(prefix + n in state_dict for n in missing):
        return ""
    other = next((k for k in state_dict if not k.startswith(prefix)), None)
    if other is None:
        return f"its names begin with {prefix!r}: remove that prefix"
    return f"it has them under {prefix!r}, beside others such as {other!r}: keep those alone, without that prefix"
