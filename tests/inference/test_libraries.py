"""Models of torchvision, timm and transformers with known answers; the whole table is `python -m zoo.coverage`."""

import importlib
import importlib.util
import warnings

import pytest
import torch

from automerge._derive import infer_graph
from automerge._verify import verify
from automerge.trace import trace


def catalogue(library):
    """The module of `zoo.coverage` for a library, with torchvision's operators declared first."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, while they are imported
        return importlib.import_module(f"zoo.coverage._{library}")


@pytest.mark.filterwarnings("ignore")
def test_operators_are_placed_in_the_library_s_own_files():
    case = catalogue("torchvision").build("resnet18")
    sources = [n.meta["source"] for n in trace(case.model, case.args).graph.nodes if n.op == "call_function"]
    assert all("torchvision" in source for source in sources)


def answered(library, name):
    case = catalogue(library).build(name)
    symmetry, _ = infer_graph(trace(case.model, case.args, case.kwargs))
    return case, symmetry


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "groups"), [("resnet18", 12), ("resnet50", 37), ("vit_b_16", 313)])
def test_the_number_of_groups_of_torchvision_models(name, groups):
    _, symmetry = answered("torchvision", name)
    assert len(symmetry.sets) == groups
    assert not symmetry.unruled


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "bloom", "gptj", "mpt", "prophetnet:Seq2SeqLM", "t5:Seq2SeqLM"])
def test_the_groups_found_on_one_token_hold_on_several(name):
    """All distances are 0 there, no rotation turns, and of tables one row is read."""
    case = catalogue("transformers").build(name)
    one = {k: v[:1, :1] if isinstance(v, torch.Tensor) and v.dim() == 2 else v for k, v in case.kwargs.items()}
    symmetry, _ = infer_graph(trace(case.model, case.args, one, values=False))
    assert symmetry.sets
    assert verify(case.model, case.args, symmetry, case.kwargs).error < 1e-9


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("torchvision", "resnet18"),
        ("timm", "efficientvit_mit:efficientvit_b0"),
        ("timm", "mobilenetv3:lcnet_035"),
        ("timm", "resnet:resnet10t"),
        ("transformers", "bert:SequenceClassification"),
        ("transformers", "llama:CausalLM"),
        ("transformers", "t5:Seq2SeqLM"),
    ],
)
def test_the_groups_of_library_models_are_sound(library, name):
    case, symmetry = answered(library, name)
    assert symmetry.sets
    assert not symmetry.unruled
    outcome = verify(case.model, case.small or case.args, symmetry, case.kwargs, elements=2)
    assert outcome.error < 1e-9
    assert outcome.randomised


def test_torchvision_imports_without_its_compiled_operators():
    module = catalogue("torchvision")
    assert "resnet18" in module.names()
    assert torch.ops.torchvision.nms is not None


def test_a_head_shows_only_its_own_output():
    case, symmetry = answered("transformers", "gpt2:CausalLM")
    with torch.no_grad():
        assert isinstance(case.model(**case.kwargs), torch.Tensor)
    assert symmetry.free_share > 0.9  # the residual stream is free
