"""What an operator takes of its operands, against the derivative."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from automerge import trace
from automerge.rules._reads import Back


@settings(max_examples=40)
@given(st.data())
def test_a_layer_norm_takes_what_its_derivative_says(data: st.DataObject) -> None:
    lead = data.draw(st.lists(st.integers(1, 3), max_size=2))
    shape = data.draw(st.lists(st.integers(2, 3), min_size=1, max_size=2))
    graph = trace(nn.LayerNorm(shape), torch.randn(*lead, *shape))
    node = next(n for n in graph.graph.nodes if "layer_norm" in str(n.target))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    share = data.draw(st.sampled_from([0.1, 0.5]))
    needed = [torch.rand(v.shape, generator=rng) < share for v in node.meta["val"]]
    needed[0].view(-1)[0] = True
    needed[1:] = [torch.zeros_like(needed[1])] * 2  # autograd knows no derivative of mean and deviation
    back = Back((), (), (), set(graph.graph.nodes), {node: needed})
    for operand in node.all_input_nodes:
        found = back.asked(node, operand)
        assert torch.equal(found.expand(operand.meta["val"].shape), back._mixed(node, operand, needed))


def test_mean_and_deviation_read_their_rows() -> None:
    graph = trace(nn.LayerNorm(3), torch.randn(4, 3))
    node = next(n for n in graph.graph.nodes if "layer_norm" in str(n.target))
    needed = [torch.zeros(4, 3, dtype=torch.bool), torch.arange(4)[:, None] == 1, torch.arange(4)[:, None] == 2]
    back = Back((), (), (), set(graph.graph.nodes), {node: needed})
    found = [back.asked(node, n) for n in node.all_input_nodes]
    assert [sorted(m.nonzero()[:, 0].unique().tolist()) for m in found] == [[1, 2], [], []]


def test_a_tensor_that_is_normalised_by_itself_is_read_whole() -> None:
    class Own(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.layer_norm(x, x.shape, x)

    graph = trace(Own(), torch.randn(3))
    node = next(n for n in graph.graph.nodes if "layer_norm" in str(n.target))
    needed = [torch.zeros(v.shape, dtype=torch.bool) for v in node.meta["val"]]
    assert Back((), (), (), set(graph.graph.nodes), {node: needed}).asked(node, node.args[0]) is True
