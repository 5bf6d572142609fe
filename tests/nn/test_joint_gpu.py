"""Layers that share an input on a GPU: one launch computes what each layer alone computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from gpu_cases import Verdicts, expected
from nn_models import make_layer, random_packed
from torch import nn

from shflnb.errors import CaptureError
from shflnb.nn import ShflLinear, is_feature_major
from shflnb.nn import joint as joint_file
from shflnb.nn.modules import SharedInput

pytestmark = pytest.mark.gpu(min_capability=(9, 0))
TOKENS = (1, 2, 4, 8, 16, 17, 40, 64)


class Block(nn.Module):
    """q, k and v of one input; gate (activated) and up of another."""

    def __init__(self, dtype: torch.dtype, v: int = 64, k: int = 512) -> None:
        super().__init__()
        for seed, (name, m) in enumerate({"q": 512, "k": 130, "v": 128, "gate": 1100, "up": 900}.items()):
            bias = torch.randn(m, generator=torch.Generator().manual_seed(seed)) if name in "qv" else None
            packed = random_packed(m, k, (v, 64), seed=seed, density=0.25)
            setattr(self, name, ShflLinear.from_packed(packed.astype("float32"), bias, name=name))
        self.gate.set_activation("silu")
        self.gate.layout = self.up.layout = "feature"
        self.to("cuda", dtype).requires_grad_(False)
        if dtype == torch.float16:
            self.q.bias = nn.Parameter(self.q.bias.float(), requires_grad=False)  # a float32 one beside one of 16 bits
        for group in (("q", "k", "v"), ("gate", "up")):
            shared = SharedInput(len(group))
            for name in group:
                self.get_submodule(name).share(shared)

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.q(x), self.k(x), self.v(x), self.gate(z), self.up(z)


def alone(block: Block) -> Block:
    """The same layers, each for itself."""
    twin = copy.deepcopy(block)
    for layer in twin.children():
        layer.shared = None
    return twin


class CountedLaunches:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self._launch = 0, joint_file.launch
        monkeypatch.setattr(joint_file, "launch", self)

    def __call__(self, *arguments: Any) -> None:
        self.count += 1
        self._launch(*arguments)


def check(seen: Verdicts, name: str, block: Block, x: torch.Tensor, z: torch.Tensor, results: Any) -> None:
    for layer, given, y in zip(block.children(), (x, x, x, z, z), results, strict=True):
        flat = given.reshape(-1, given.shape[-1])
        want = expected(layer.dense_weight(), flat.t(), layer.bias, layer.activation)
        seen.add(f"{name} {layer.name}", y.reshape(flat.shape[0], -1).t(), want)


@pytest.mark.parametrize(("dtype", "v"), [(torch.float16, 64), (torch.bfloat16, 32), (torch.float16, 128)])
def test_a_block_is_computed_by_two_launches(dtype: torch.dtype, v: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launches, seen = CountedLaunches(monkeypatch), Verdicts()
    block = Block(dtype, v)
    single = alone(block)
    with torch.inference_mode():
        for n in TOKENS:
            for lead in ((n,), (1, n)) if n < 64 else ((4, 16),):
                x, z = (torch.randn(*lead, 512, device="cuda", dtype=dtype) for _ in range(2))
                before = launches.count
                joint, each = block(x, z), single(x, z)
                assert launches.count == before + 2, n
                check(seen, f"{n} joint", block, x, z, joint)
                check(seen, f"{n} alone", block, x, z, each)
                for a, b in zip(joint, each, strict=True):
                    assert a.shape == b.shape and a.stride() == b.stride()
                    assert a.is_contiguous() or (is_feature_major(a) and n % 8 == 0)
                again = block(x, z)
                for a, b in zip(joint, again, strict=True):
                    seen.same(f"{n} again", (a == b).all())
    seen.check()


def test_graphs_replay_with_other_contents(monkeypatch: pytest.MonkeyPatch) -> None:
    launches, seen = CountedLaunches(monkeypatch), Verdicts()
    block = Block(torch.float16)
    with torch.no_grad():
        for n in TOKENS:
            x, z = (torch.randn(n, 512, device="cuda", dtype=torch.float16) for _ in range(2))
            block(x, z)  # one call warms up
            before, graph = launches.count, torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results = block(x, z)
            assert launches.count == before + 2
            for _ in range(2):
                x.normal_()
                z.normal_()
                for y in results:
                    y.fill_(float("nan"))
                graph.replay()
                check(seen, f"{n} graph", block, x, z, results)
                for a, b in zip(results, block(x, z), strict=True):
                    seen.same(f"{n} as eager", (a == b).all())
    seen.check()


def test_results_of_a_capture_wait_for_that_capture_only() -> None:
    block = Block(torch.float16)
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        x, z = (torch.randn(4, 512, device="cuda", dtype=torch.float16) for _ in range(2))
        want = block(x, z)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            block.q(x)
        assert torch.equal(block.k(x), want[1]), "not memory that the graph has not filled yet"
    torch.cuda.synchronize()


def test_cold_layers_under_capture_name_the_warm_up() -> None:
    block = Block(torch.float16)
    x, z = (torch.randn(4, 512, device="cuda", dtype=torch.float16) for _ in range(2))
    with torch.no_grad():
        alone_first = alone(block)
        alone_first(x, z)
        shared = SharedInput(2)
        alone_first.q.share(shared)
        alone_first.k.share(shared)
        with pytest.raises(CaptureError, match="once before the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            alone_first.q(x)
        torch.cuda.synchronize()
        alone_first(x, z)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            alone_first(x, z)


def test_several_streams() -> None:
    block = Block(torch.float16)
    with torch.no_grad():
        x = torch.randn(8, 512, device="cuda", dtype=torch.float16)
        want = [y.clone() for y in block(x, x + 0)]
        streams = [torch.cuda.Stream() for _ in range(3)]
        torch.cuda.synchronize()
        got = []
        for number, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(5_000_000)
                y = x * 0
                y += x * (number + 1)
                got.append(block(y, y + 0))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got[0], want, strict=True))
        with torch.cuda.stream(streams[0]):
            first = block.q(x)
        torch.cuda.synchronize()
        assert torch.equal(first, want[0]) and torch.equal(block.k(x), want[1]), "asked for on another stream"


def test_updates_and_moves() -> None:
    layers = nn.ModuleList(make_layer(m, 96, (64, 32), seed=m) for m in (128, 70)).half().cuda()
    shared = SharedInput(2)
    for layer in layers:
        layer.share(shared)
    x = torch.randn(5, 96, dtype=torch.float16, device="cuda")
    with torch.no_grad():
        for change in (lambda: None, lambda: layers[0].values.mul_(1.5), lambda: layers[1].bias.mul_(2),
                       lambda: layers.bfloat16(), lambda: layers.cpu().cuda()):  # fmt: skip
            change()
            x = x.to(layers[0].values.dtype)
            for _ in range(2):
                for layer in layers:
                    want = nn.functional.linear(x.double(), layer.dense_weight().double(), layer.bias.double())
                    torch.testing.assert_close(layer(x).double(), want, rtol=2e-2, atol=2e-2)
