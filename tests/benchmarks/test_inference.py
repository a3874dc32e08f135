"""Inference against Torch-Pruning's dependency graph, in the same run; prints the ratio and asserts no time.

Run with ``pytest tests/benchmarks/test_inference.py --benchmark-enable -s``.
"""

import gc
import importlib.util
import time

import pytest
import torch

from automerge.infer import infer

NAMES = ("resnet50", "vit_b_16")


@pytest.fixture(params=NAMES)
def subject(request):
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    from zoo.coverage._operators import import_torchvision

    torch.manual_seed(0)
    model = import_torchvision().models.get_model(request.param, weights=None).eval()
    return request.param, model, torch.randn(1, 3, 224, 224)


def ours(model, image):
    return infer(model, image, verify=False)


def theirs(model, image):
    from torch_pruning import DependencyGraph

    return DependencyGraph().build_dependency(model, example_inputs=image, verbose=False)


def medians(*calls, rounds=9):
    """Of every call the median, in turns: what disturbs the machine disturbs all, and none clears away another's garbage."""
    seconds = [[] for _ in calls]
    for _ in range(rounds):
        for call, mine in zip(calls, seconds, strict=True):
            gc.collect()
            start = time.perf_counter()
            call()
            mine.append(time.perf_counter() - start)
    return [sorted(mine)[rounds // 2] for mine in seconds]


@pytest.mark.filterwarnings("ignore")
def test_inference(benchmark, subject, request):
    name, model, image = subject
    symmetry = benchmark.pedantic(ours, args=(model, image), rounds=3, warmup_rounds=1)
    assert len(symmetry.sets) == {"resnet50": 37, "vit_b_16": 313}[name]


@pytest.mark.filterwarnings("ignore")
def test_ratio_to_torch_pruning(subject, request):
    if importlib.util.find_spec("torch_pruning") is None:
        pytest.skip("torch-pruning is not installed")
    if request.config.getoption("benchmark_disable") and not request.config.getoption("benchmark_enable"):
        pytest.skip("a benchmark: run with --benchmark-enable")
    name, model, image = subject
    ours(model, image)
    here, there = medians(lambda: ours(model, image), lambda: theirs(model, image))
    print(f"\n{name}: automerge {here:.2f} s, torch-pruning {there:.2f} s, ratio {here / there:.2f}")
    assert there > 0
