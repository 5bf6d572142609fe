"""Launches on a GPU: streams, CUDA graphs, threads, devices, arrays of every maker, remembered shapes, error texts."""

# ruff: noqa: E402  (what is imported needs torch and numba-cuda, and the tests skip without them)

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("numba.cuda", reason="needs numba-cuda (extra cu12 or cu13)")

import gpu_cases as cases
from gpu_cases import Verdicts, dense_of, expected, random_packed

import shflnb
from shflnb.errors import ArgumentError, CaptureError, DeviceError, DtypeError, ShapeError
from shflnb.kernels.launch import DeviceMemory, device_context
from shflnb.kernels.spmm_plan import kernel_spec, plan_for, transpose_spec

pytestmark = pytest.mark.gpu

MILLISECOND = 2_000_000  # clocks of `torch.cuda._sleep`, about


def normal(*shape: int, dtype: str = "float16") -> Any:
    return torch.randn(shape, device="cuda", dtype=torch.float32).to(getattr(torch, dtype))


def holds(y: Any, packed: Any, x: Any, **rest: Any) -> None:
    seen = Verdicts()
    seen.add("product", y, expected(dense_of(packed), x, **rest))
    seen.check()


# --- streams ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("call", ["matmul", "linear", "out", "misaligned"])
def test_work_goes_to_the_current_stream(call: str) -> None:
    """x is written late on a side stream: only work that is queued behind the write sees it."""
    packed = random_packed(130, 96, 64, seed=1)
    good = normal(96, 65 if call == "misaligned" else 64)
    run = {
        "matmul": lambda x: shflnb.matmul(packed, x),
        "misaligned": lambda x: shflnb.matmul(packed, x),
        "out": lambda x: shflnb.matmul(packed, x, out=torch.empty(130, 64, dtype=x.dtype, device="cuda")),
        "linear": lambda x: shflnb.linear(x.T.contiguous(), packed).T,
    }[call]
    run(good)
    torch.cuda.synchronize()
    for _ in range(2):
        x = torch.full_like(good, float("nan"))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50 * MILLISECOND)
            x.copy_(good)
            y = run(x)
        assert not stream.query(), "the call waited for the device"
        stream.synchronize()
        holds(y, packed, good)


def test_the_result_may_be_used_on_the_same_stream_at_once() -> None:
    packed = random_packed(256, 256, 64, [64] * 4)
    x = normal(256, 128)
    y = x
    for _ in range(20):
        y = shflnb.matmul(packed, y) * 0.05
    torch.cuda.synchronize()
    z = x
    for _ in range(20):
        z = shflnb.matmul(packed, z) * 0.05
        torch.cuda.synchronize()
    assert torch.equal(y, z)


@pytest.mark.parametrize("call", ["matmul", "linear"])
def test_products_that_read_and_overwrite_each_others_operands(call: str) -> None:
    """Kernels start before the one ahead is done: they must not read its result early, nor overwrite what it reads."""
    forth, back = random_packed(384, 512, 64, [256] * 6, seed=1), random_packed(512, 384, 128, [196] * 4, seed=2)
    start = normal(512, 704) if call == "matmul" else normal(704, 512)

    def rounds(is_slow: bool) -> Any:
        ping = start.clone()
        pong = torch.empty((384, 704) if call == "matmul" else (704, 384), dtype=torch.float16, device="cuda")
        for _ in range(60):
            for packed, source, target, scale in ((forth, ping, pong, 0.064), (back, pong, ping, 0.0733)):
                if call == "matmul":
                    shflnb.matmul(packed, source, out=target)
                else:
                    target.copy_(shflnb.linear(source, packed))
                target.mul_(scale)  # keeps the size of the numbers
                if is_slow:
                    torch.cuda.synchronize()
        if call == "matmul":  # without a framework's kernel between
            shflnb.matmul(forth, ping, out=pong)
            shflnb.matmul(back, pong, out=ping)
        return ping

    slow, fast = rounds(True), rounds(False)
    assert bool(torch.isfinite(slow).all()) and float(slow.abs().max()) > 0.01
    assert torch.equal(slow.view(torch.int16), fast.view(torch.int16))


# --- CUDA graphs -----------------------------------------------------------------------------------------------------
def test_capture_and_replay() -> None:
    packed = random_packed(200, 150, 32, seed=2)
    bias = normal(200)
    x = normal(150, 72)
    tokens = normal(40, 150)
    shflnb.matmul(packed, x, bias=bias, activation="gelu")
    shflnb.linear(tokens, packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = shflnb.matmul(packed, x, bias=bias, activation="gelu")
        z = shflnb.linear(tokens, packed)
    for _ in range(3):
        x.copy_(normal(150, 72))
        tokens.copy_(normal(40, 150))
        graph.replay()
        torch.cuda.synchronize()
        holds(y, packed, x, bias=bias, activation="gelu")
        holds(z.T, packed, tokens.T)


@pytest.mark.parametrize("cold", ["kernel", "weights", "queue"])
def test_a_cold_call_under_capture_is_refused(cold: str) -> None:
    x = normal(64, 24)
    packed = random_packed(128, 64, 64, seed=7)
    shflnb.matmul(packed, x)
    if cold == "kernel":
        context = device_context(0)
        config = plan_for(packed, context, 24, "plain", 0).choice.config.with_epilogue("silu")
        context._kernels.pop(kernel_spec(config).key, None)
        run = lambda: shflnb.matmul(packed, x, activation="silu")  # noqa: E731
    elif cold == "weights":
        other = random_packed(128, 64, 64, seed=8)
        run = lambda: shflnb.matmul(other, x)  # noqa: E731
    else:
        wide = normal(64, 5000)
        run = lambda: shflnb.matmul(packed, wide)  # noqa: E731
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(CaptureError, match=r"captured into a CUDA graph.*warm it up"):
        run()
    torch.cuda.synchronize()
    y = run()  # works outside, and from then on inside
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = run()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, z)


def test_memory_comes_and_goes_during_a_capture() -> None:
    """Of matrices that have nothing to do with the graph; in the mode that forbids it to every thread."""
    context, x = device_context(0), torch.ones(4, device="cuda")
    old = DeviceMemory(context, [np.arange(1 << 20)])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="global"):
        y = x * 2
        del old
        new = DeviceMemory(context, [np.arange(1 << 20)])
        y = y + 1
    graph.replay()
    assert y.tolist() == [3.0] * 4 and new.nbytes == 8 << 20


def test_a_captured_product_outlives_many_other_calls() -> None:
    """The addresses inside a graph stay valid while the packed matrix lives, however many shapes come after."""
    packed = random_packed(64, 64, 64, [32])
    x = normal(64, 128)
    shflnb.matmul(packed, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = shflnb.matmul(packed, x)
    wide = normal(64, 1400)
    for n in range(1, 1400):
        shflnb.matmul(packed, wide[:, :n])
    y.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    holds(y, packed, x)


# --- threads and devices ---------------------------------------------------------------------------------------------
def run_threads(work: Any, count: int = 8) -> None:
    problems: list[BaseException] = []
    barrier = threading.Barrier(count)

    def guarded(number: int) -> None:
        barrier.wait()
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001 (handed to the main thread)
            problems.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]


def test_threads_share_a_cold_matrix() -> None:
    """The first CUDA call of each thread is ours, and all of them meet a matrix that nobody has used."""
    packed = random_packed(300, 200, 64, seed=3)
    x = normal(200, 96)
    outs = [torch.empty(300, 96, dtype=torch.float16, device="cuda") for _ in range(8)]
    torch.cuda.synchronize()
    run_threads(lambda number: shflnb.matmul(packed, x, out=outs[number]))
    torch.cuda.synchronize()
    holds(outs[0], packed, x)
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_threads_with_streams_and_matrices_of_their_own() -> None:
    made = [random_packed(64 + 40 * i, 100 + 7 * i, (16, 32, 64, 128)[i % 4], seed=i) for i in range(8)]
    xs = [normal(packed.shape[1], 8 * i + 5) for i, packed in enumerate(made)]
    results: dict[int, Any] = {}
    torch.cuda.synchronize()

    def work(number: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(30):
                results[number] = shflnb.matmul(made[number], xs[number])
        stream.synchronize()

    run_threads(work)
    for number, packed in enumerate(made):
        holds(results[number], packed, xs[number])


def test_two_devices_in_one_process() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, found {torch.cuda.device_count()}")
    packed = random_packed(130, 90, 64, seed=5)
    xs = [normal(90, 40).to(f"cuda:{device}") for device in (0, 1)]
    for _ in range(3):
        for current in (0, 1):
            with torch.cuda.device(current):
                for x in xs:
                    y = shflnb.matmul(packed, x)
                    assert y.device == x.device
                    z = shflnb.linear(x.T.contiguous(), packed)
                    assert torch.cuda.current_device() == current
                    holds(y.to("cuda:0"), packed, x.to("cuda:0"))
                    holds(z.T.to("cuda:0"), packed, x.to("cuda:0"))
    with pytest.raises(DeviceError, match=r"device 1.*device 0|device 0.*device 1"):
        shflnb.matmul(packed, xs[0], out=torch.empty(130, 40, dtype=torch.float16, device="cuda:1"))


# --- arrays of every maker -------------------------------------------------------------------------------------------
class DlpackOnly:
    """An exporter that speaks DLPack and nothing else."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor
        self.shape = tuple(tensor.shape)
        self.dtype = str(tensor.dtype).removeprefix("torch.")

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()

    def reshape(self, *shape: int) -> DlpackOnly:
        return DlpackOnly(self.tensor.reshape(*shape))


class InterfaceOnly:
    """An exporter that has `__cuda_array_interface__` and nothing else."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor
        self.shape = tuple(tensor.shape)
        self.dtype = np.dtype(np.float16)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        size = self.tensor.element_size()
        return {
            "shape": self.shape,
            "typestr": "<f2",
            "data": (self.tensor.data_ptr(), False),
            "strides": tuple(size * s for s in self.tensor.stride()),
            "version": 3,
        }


@pytest.mark.parametrize("maker", [DlpackOnly, InterfaceOnly])
@pytest.mark.parametrize("strided", [False, True])
def test_other_exporters_with_out(maker: Any, strided: bool) -> None:
    packed = random_packed(90, 70, 32, seed=6)
    x = normal(70, 80)[:, ::2] if strided else normal(70, 40)
    y = torch.full((90, 40), float("nan"), dtype=torch.float16, device="cuda")
    given = maker(y)
    if strided:  # a workspace is needed that nobody can allocate in this maker's kind
        with pytest.raises(DeviceError, match="cannot make an array like"):
            shflnb.matmul(packed, maker(x), out=given)
        return
    assert shflnb.matmul(packed, maker(x), out=given) is given
    torch.cuda.synchronize()
    holds(y, packed, x)


def test_dlpack_carries_bfloat16() -> None:
    packed = random_packed(64, 48, 32, dtype="bfloat16", seed=6)
    x, y = normal(48, 32, dtype="bfloat16"), torch.empty(64, 32, dtype=torch.bfloat16, device="cuda")
    shflnb.matmul(packed, DlpackOnly(x), out=DlpackOnly(y))
    holds(y, packed, x)


def test_numba_device_arrays() -> None:
    from numba import cuda

    packed = random_packed(90, 70, 32, seed=6)
    x = np.random.default_rng(0).standard_normal((70, 40)).astype(np.float16)
    y = shflnb.matmul(packed, cuda.to_device(x))
    assert type(y).__name__ == "DeviceNDArray" and y.shape == (90, 40) and y.dtype == np.float16
    cuda.synchronize()
    holds(torch.from_numpy(y.copy_to_host()).cuda(), packed, torch.from_numpy(x).cuda())
    out = cuda.device_array((40, 90), np.float16)
    assert shflnb.linear(cuda.to_device(np.ascontiguousarray(x.T)), packed, out=out) is out
    cuda.synchronize()
    holds(torch.from_numpy(out.copy_to_host()).cuda().T, packed, torch.from_numpy(x).cuda())


def test_cupy_arrays() -> None:
    cupy = pytest.importorskip("cupy")
    packed = random_packed(90, 70, 32, seed=6)
    x = np.random.default_rng(0).standard_normal((70, 41)).astype(np.float16)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        y = shflnb.matmul(packed, cupy.asarray(x))
        z = shflnb.linear(cupy.asarray(x).T, packed)
        assert isinstance(y, cupy.ndarray) and y.shape == (90, 41)
    stream.synchronize()
    for got in (y, z.T):
        holds(torch.from_numpy(cupy.asnumpy(got)).cuda(), packed, torch.from_numpy(x).cuda())


def test_the_operator() -> None:
    packed = random_packed(90, 70, 32, seed=6)
    x = normal(70, 40)
    assert torch.equal(packed @ x, shflnb.matmul(packed, x))


# --- remembered shapes -----------------------------------------------------------------------------------------------
def test_a_remembered_shape_with_other_memory_is_checked_again() -> None:
    """The short road looks at alignment, strides, dtypes and gradients as the long one does."""
    packed = random_packed(128, 64, 64, seed=9)
    room = torch.empty(64 * 32 + 8, dtype=torch.float16, device="cuda").normal_()
    aligned, shifted = room[: 64 * 32].view(64, 32), room[1 : 64 * 32 + 1].view(64, 32)
    for x in (aligned, aligned, shifted, aligned, shifted):
        holds(shflnb.matmul(packed, x), packed, x)
    other = torch.empty(64, 64, dtype=torch.float16, device="cuda").normal_()[:, :32]
    holds(shflnb.matmul(packed, other), packed, other)
    bias = normal(128)
    for b in (bias, bias.float(), bias):
        holds(shflnb.matmul(packed, aligned, bias=b), packed, aligned, bias=b)
    tokens = room[: 32 * 64].view(32, 64)
    moved = room[1 : 32 * 64 + 1].view(32, 64)
    for x in (tokens, tokens, moved, tokens):
        holds(shflnb.linear(x, packed, bias).T, packed, x.T, bias=bias)


def test_a_gradient_is_never_lost_on_the_short_road() -> None:
    packed = random_packed(64, 64, 64, seed=9)
    x, bias = normal(64, 32), normal(64).requires_grad_()
    tokens = normal(32, 64)
    with torch.no_grad():
        for _ in range(3):
            shflnb.matmul(packed, x, bias=bias)
            shflnb.linear(tokens, packed, bias)
    with pytest.raises(DtypeError, match="gradient"):
        shflnb.matmul(packed, x, bias=bias)
    with pytest.raises(DtypeError, match="gradient"):
        shflnb.linear(tokens, packed, bias)
    with pytest.raises(DtypeError, match="gradient"):
        shflnb.matmul(packed, x.clone().requires_grad_())


def test_a_warm_call_does_not_synchronise_or_allocate_beside_its_result() -> None:
    packed = random_packed(128, 64, 64, seed=9)
    x = normal(64, 32)
    for _ in range(3):
        y = shflnb.matmul(packed, x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda._sleep(50 * MILLISECOND)
    y = shflnb.matmul(packed, x)
    assert not torch.cuda.current_stream().query(), "the call waited for the device"
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + 1
    torch.cuda.synchronize()
    holds(y, packed, x)


# --- errors ----------------------------------------------------------------------------------------------------------
def test_errors_name_what_was_given_and_what_is_needed() -> None:
    packed = random_packed(128, 64, 64, seed=9)
    x = normal(64, 32)
    half = torch.float16
    for error, text, run in [
        (ShapeError, "100 rows.*k = 64", lambda: shflnb.matmul(packed, normal(100, 8))),
        (ShapeError, r"\(2, 64, 8\)", lambda: shflnb.matmul(packed, normal(2, 64, 8))),
        (ShapeError, r"\(8, 63\).*64", lambda: shflnb.linear(normal(8, 63), packed)),
        (DtypeError, r"float32.*float16.*astype", lambda: shflnb.matmul(packed, x.float())),
        (DtypeError, r"bfloat16.*float16.*astype", lambda: shflnb.matmul(packed, x.bfloat16())),
        (DtypeError, r"float32.*astype\('float16'\)", lambda: shflnb.matmul(packed.astype("float32"), x.float())),
        (ShapeError, r"bias.*\(64,\).*128", lambda: shflnb.matmul(packed, x, bias=normal(64))),
        (DtypeError, "bias.*float64", lambda: shflnb.matmul(packed, x, bias=normal(128).double())),
        (DtypeError, "bias.*not on a CUDA device", lambda: shflnb.matmul(packed, x, bias=normal(128).cpu())),
        (ShapeError, r"residual.*\(128, 31\).*\(128, 32\)", lambda: shflnb.matmul(packed, x, residual=normal(128, 31))),
        (ShapeError, r"out.*\(128, 31\).*\(128, 32\)", lambda: shflnb.matmul(packed, x, out=normal(128, 31))),
        (DtypeError, "out is float32", lambda: shflnb.matmul(packed, x, out=normal(128, 32).float())),
        (ArgumentError, "tanh", lambda: shflnb.matmul(packed, x, activation="tanh")),
        (ArgumentError, "rows", lambda: shflnb.linear(x.T, packed, layout="rows")),
        (ArgumentError, "overlap", lambda: shflnb.matmul(random_packed(64, 64, 64, [8]), x, out=x)),
        (ArgumentError, "broadcast|share memory",
         lambda: shflnb.matmul(packed, x, out=torch.empty(1, 32, dtype=half, device="cuda").expand(128, 32))),
    ]:  # fmt: skip
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        with pytest.raises(error, match=f"(?s){text}"):
            run()
        del before
    assert shflnb.matmul(packed, x).shape == (128, 32)  # and nothing is broken afterwards


def test_x_and_out_may_be_halves_of_one_matrix() -> None:
    """Interleaved rows are not shared memory."""
    packed = random_packed(64, 64, 64, [40])
    both = normal(64, 128)
    x, out = both[:, :64], both[:, 64:]
    want = x.clone()
    shflnb.matmul(packed, x, out=out)
    holds(out.clone(), packed, want)


def test_what_the_driver_says_of_the_kernels() -> None:
    """No local memory, and as many registers as the launch can have."""
    context, wanted = device_context(0), [config.with_epilogue("gelu") for config in cases.configs()]
    cases.prebuild(wanted)
    for config in wanted:
        loaded = context.kernel(kernel_spec(config), 0)
        assert loaded.local_bytes == 0
        assert loaded.registers * config.threads * config.blocks_per_sm <= 65536
    for is_chained in (False, context.has_chaining):
        assert context.kernel(transpose_spec(is_chained), 0).local_bytes == 0
