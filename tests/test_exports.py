"""The public names: each is there once, documented, and importable; nothing else is exported."""

import inspect

import pytest

import automerge


def test_all_names_exist_and_are_sorted() -> None:
    assert len(set(automerge.__all__)) == len(automerge.__all__)
    assert all(hasattr(automerge, name) for name in automerge.__all__)


@pytest.mark.parametrize("name", [n for n in automerge.__all__ if n != "__version__"])
def test_every_name_has_a_docstring(name: str) -> None:
    value = getattr(automerge, name)
    assert callable(value)
    assert inspect.getdoc(value)
    assert value.__module__.split(".")[0] == "automerge"


def test_the_names_of_the_design_are_there() -> None:
    wanted = {"trace", "infer", "verify", "register_rule", "match", "merge", "evaluate", "barrier", "reset_batchnorm"}
    wanted |= {
        "Symmetry",
        "Generator",
        "Exchange",
        "Slot",
        "Pin",
        "Element",
        "Matching",
        "Matcher",
        "FrankWolfe",
        "Identity",
    }
    wanted |= {"WeightMatching", "MergeMany", "Pairwise", "PairwiseFrankWolfe", "Synchronised"}
    wanted |= {"ActivationMatching"}
    wanted |= {"MergeResult", "Repair", "AutomergeError", "canonicalise", "GaugeReport"}
    assert wanted <= set(automerge.__all__)


def test_every_error_derives_from_one() -> None:
    errors = [getattr(automerge, n) for n in automerge.__all__ if n.endswith("Error")]
    errors = [e for e in errors if inspect.isclass(e) and issubclass(e, Exception)]
    assert len(errors) >= 8
    assert all(issubclass(e, automerge.AutomergeError) for e in errors)


def test_no_accidental_exports() -> None:
    modules = {name for name, value in vars(automerge).items() if inspect.ismodule(value)}
    names = {n for n in vars(automerge) if not n.startswith("_")} - modules
    assert names <= set(automerge.__all__)


def test_the_version_is_the_package_s() -> None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        assert version("automerge") == automerge.__version__
    except PackageNotFoundError:
        pytest.skip("not installed")
