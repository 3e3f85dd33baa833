"""Products in the ring are exact, whichever way they are computed."""

import importlib.util
import threading
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks import limbs
from protocols.errors import ShapeError, UnsupportedError
from protocols.primitives import kernels, kernels_numba, loops

quick = settings(deadline=None, derandomize=True, max_examples=80)

# Borders of words and limbs, of float64's integers, and of what makes weights small.
EDGES = [
    value
    for bits in (0, 20, 21, 22, 25, 29, 31, 32, 44, 53, 63)
    for sign in (1, -1)
    for step in (-1, 0, 1)
    if -(2**63) <= (value := sign * 2**bits + step) < 2**63
]
# What an array may hold: at most so many bits, or edges of at most so many bits.
KINDS = [("uniform", 64), ("uniform", 21), ("edges", 64), ("edges", 32), ("edges", 30), ("edges", 21)]
kinds = st.sampled_from(KINDS)


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    kernels.warm()


def draw(shape: tuple[int, ...], kind: tuple[str, int], seed: int = 0) -> Tensor:
    """Return int64 numbers of so many bits, sign included."""
    name, bits = kind
    rng = np.random.default_rng(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if name == "edges":
        return torch.from_numpy(rng.choice([e for e in EDGES if low <= e <= high], shape).astype(np.int64))
    return torch.from_numpy(rng.integers(low, high, shape, dtype=np.int64, endpoint=True))


def wrapped(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def exact_matmul(x: Tensor, w: Tensor) -> Tensor:
    """Multiply with Python's integers."""
    columns = w.T.tolist()
    rows = [[wrapped(sum(a * b for a, b in zip(row, c, strict=True))) for c in columns] for row in x.tolist()]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(x), w.shape[1])


def exact_conv2d(
    x: Tensor,
    w: Tensor,
    stride: tuple[int, int],
    pads: tuple[int, int, int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """Convolve tap by tap, in torch's elementwise int64 arithmetic (tested against Python's integers below)."""
    top, left, bottom, right = pads
    x = F.pad(x, (left, right, top, bottom))
    depth, share = w.shape[1], w.shape[0] // groups
    lines, columns = ((x.shape[2 + a] - dilation[a] * (w.shape[2 + a] - 1) - 1) // stride[a] + 1 for a in (0, 1))
    out = torch.zeros(x.shape[0], w.shape[0], lines, columns, dtype=torch.int64)
    for o, i, j in product(range(w.shape[0]), range(w.shape[2]), range(w.shape[3])):
        group = x[:, o // share * depth : (o // share + 1) * depth]
        at = group[:, :, i * dilation[0] :, j * dilation[1] :][:, :, :: stride[0], :: stride[1]]
        out[:, o] += (at[:, :, :lines, :columns] * w[o, :, i, j].reshape(-1, 1, 1)).sum(1)
    return out


@quick
@given(m=st.integers(1, 5), k=st.integers(1, 9), n=st.integers(1, 9), x=kinds, w=kinds, seed=st.integers(0, 99))
def test_matmul_is_the_product_of_python_integers_modulo_2_64(m, k, n, x, w, seed):
    a, b = draw((m, k), x, seed), draw((k, n), w, seed + 1)
    expected = exact_matmul(a, b)
    assert torch.equal(kernels.matmul(a, b), expected)
    assert torch.equal(limbs.matmul(b)(a), expected)


def test_the_reference_convolution_is_the_sum_of_python_integers_modulo_2_64():
    x, w = draw((1, 2, 3, 3), ("edges", 64)), draw((2, 2, 2, 2), ("edges", 64), 1)
    rows = torch.stack([x[0, :, i : i + 2, j : j + 2].reshape(-1) for i in range(2) for j in range(2)])
    expected = exact_matmul(rows, w.reshape(2, -1).T).T.reshape(1, 2, 2, 2)
    assert torch.equal(exact_conv2d(x, w, (1, 1), (0, 0, 0, 0), (1, 1), 1), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 11, 47, 48, 49, 97])
def test_matmul_is_exact_for_any_number_of_rows_and_columns(rows, kind):
    for k, n in ((1, 1), (7, 8), (64, 9), (130, 24)):
        x, w = draw((rows, k), ("edges", 64)), draw((k, n), kind, 1)
        assert torch.equal(kernels.matmul(x, w), x @ w)


@pytest.mark.parametrize("weight", [2**20 - 1, 2**25, 2**25 + 1, 2**31 - 1, -(2**31), 2**31, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("number", [-(2**63), 2**63 - 1, 2**31, 2**31 - 1, -(2**31), 0x7FFFFFFF80000000])
def test_long_sums_of_extreme_products_are_exact(number, weight):
    for k in (2048, 4095):
        x, w = torch.full((3, k), number), torch.full((k, 9), weight)
        expected = wrapped(number * weight * k)
        for multiply in (kernels.prepare_matmul(w).apply, limbs.matmul(w)):
            assert torch.equal(multiply(x), torch.full((3, 9), expected))


def fitting(groups: int, shape: tuple[int, int, int, int], stride: Any, dilation: Any) -> list[str]:
    conv = kernels._Conv(shape, stride, (0, 0, 0, 0), dilation, groups)
    return [method for method in kernels.METHODS if kernels._fits(method, conv)]


@quick
@given(data=st.data())
def test_every_method_convolves_exactly(data):
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    often_one = st.one_of(st.just((1, 1)), pair)
    kernel, stride, dilation = data.draw(st.one_of(st.just((3, 3)), pair)), data.draw(often_one), data.draw(often_one)
    groups, depth, share = (data.draw(st.sampled_from(v)) for v in ((1, 1, 2, 3), (1, 1, 2, 5), (1, 3, 8, 9)))
    pads = data.draw(st.tuples(*[st.integers(0, 3)] * 4))
    size = [
        max(1, dilation[a] * (kernel[a] - 1) + 1 - pads[a] - pads[a + 2]) + data.draw(st.integers(0, 9)) for a in (0, 1)
    ]
    images, seed = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 99))
    x = draw((images, groups * depth, *size), data.draw(kinds), seed)
    w = draw((groups * share, depth, *kernel), data.draw(kinds), seed + 1)
    attributes = {"stride": stride, "pads": pads, "dilation": dilation, "groups": groups}
    expected = exact_conv2d(x, w, **attributes)
    assert torch.equal(kernels.conv2d(x, w, **attributes), expected)
    assert torch.equal(limbs.conv2d(w, **attributes)(x), expected)
    for method in fitting(groups, tuple(w.shape), stride, dilation):
        assert torch.equal(kernels.prepare_conv2d(w, **attributes, method=method).apply(x), expected), method


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "channels", "outputs", "size"), [(2, 16, 24, 13), (1, 17, 20, 9), (5, 64, 16, 4)])
def test_convolutions_larger_than_a_block_are_exact(batch, channels, outputs, size, kind):
    x, w = draw((batch, channels, size, size), ("edges", 64)), draw((outputs, channels, 3, 3), kind, 1)
    expected = exact_conv2d(x, w, (1, 1), (1, 1, 1, 1), (1, 1), 1)
    for method in fitting(1, tuple(w.shape), (1, 1), (1, 1)):
        made = kernels.prepare_conv2d(w, pads=(1, 1, 1, 1), method=method)
        assert torch.equal(made.apply(x), expected), method


def test_a_batch_in_many_chunks_is_the_same_as_at_once(monkeypatch):
    x, w = draw((7, 4, 6, 5), ("uniform", 64)), draw((8, 4, 3, 3), ("uniform", 64))
    prepared = [
        kernels.prepare_conv2d(w, pads=(1, 1, 1, 1), method=m) for m in fitting(1, (8, 4, 3, 3), (1, 1), (1, 1))
    ]
    at_once = [made.apply(x) for made in prepared]
    a, b = draw((100, 8), ("uniform", 64)), draw((8, 8), ("uniform", 64))
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 8 * 4 * 8 * 7 * 2)
    monkeypatch.setattr(kernels, "BAND_TILES", 2)
    for made, expected in zip(prepared, at_once, strict=True):
        assert torch.equal(made.apply(x), expected)
    assert torch.equal(kernels.matmul(a, b), a @ b)


def test_leading_axes_an_empty_batch_and_strided_tensors_are_served():
    w = draw((6, 5), ("uniform", 64)).T
    x = draw((3, 5, 2, 5), ("uniform", 64)).transpose(0, 2)
    assert torch.equal(kernels.matmul(x, w), x @ w)
    assert kernels.matmul(x[:0], w).shape == (0, 5, 3, 6)
    assert torch.equal(kernels.matmul(x[0, 0, 0], w), x[0, 0, 0] @ w)
    image = draw((5, 4, 4, 3), ("uniform", 64)).permute(0, 3, 1, 2)
    taps = draw((3, 4, 2, 2), ("uniform", 64)).transpose(0, 1)
    assert torch.equal(
        kernels.conv2d(image, taps), exact_conv2d(image.contiguous(), taps, (1, 1), (0, 0, 0, 0), (1, 1), 1)
    )
    assert kernels.conv2d(image[:0], taps).shape == (0, 4, 3, 3)


@pytest.mark.parametrize("kind", [("uniform", 20), ("uniform", 64)])
@pytest.mark.parametrize(("channels", "outputs", "groups"), [(4, 8, 1), (5, 9, 1), (6, 12, 6), (16, 17, 1)])
@pytest.mark.parametrize("size", [3, 4, 7])
def test_loops_write_nothing_outside_their_buffers(monkeypatch, size, channels, outputs, groups, kind):
    guard, mark, buffers = 64, 0x5EC5E75EC5E7, []

    def guarded(name: str, count: int) -> np.ndarray:
        buffers.append(np.full(count + 2 * guard, mark, np.int64))
        return buffers[-1][guard:-guard]

    monkeypatch.setattr(kernels, "_buffer", guarded)
    w, x = draw((outputs, channels // groups, 3, 3), kind), draw((2, channels, size, size), kind)
    for method in fitting(groups, tuple(w.shape), (1, 1), (1, 1)):
        conv = kernels._Conv(tuple(w.shape), (1, 1), (1, 0, 1, 2), (1, 1), groups)
        shape = (2, outputs, *conv.out_size((size, size)))
        buffers.append(np.full(2 * guard + np.prod(shape), mark, np.int64))
        out = torch.from_numpy(buffers[-1][guard:-guard]).reshape(shape)
        kernels._conv_method(w, conv, method).fill(x, out)
        assert torch.equal(out, exact_conv2d(x, w, (1, 1), conv.pads, (1, 1), groups))
    assert all((part == mark).all() for b in buffers for part in (b[:guard], b[-guard:]))


def test_an_output_stays_as_it_is_when_the_weights_serve_again():
    w = draw((8, 4, 3, 3), ("uniform", 21))
    images = [draw((2, 4, 8, 8), ("uniform", 64), seed) for seed in range(2)]
    for method in fitting(1, (8, 4, 3, 3), (1, 1), (1, 1)):
        made = kernels.prepare_conv2d(w, pads=(1, 1, 1, 1), method=method)
        first = made.apply(images[0])
        kept = first.clone()
        made.apply(images[1])
        assert torch.equal(first, kept)
        assert torch.equal(made.apply(images[0]), kept)


def test_threads_share_prepared_weights():
    w = draw((32, 32, 3, 3), ("uniform", 64))
    made = kernels.prepare_conv2d(w, pads=(1, 1, 1, 1), size=(12, 12))
    images = [draw((2, 32, 12, 12), ("uniform", 64), seed) for seed in range(4)]
    expected = [made.apply(x) for x in images]
    right = [False] * 4

    def work(i: int) -> None:
        right[i] = all(torch.equal(made.apply(images[i]), expected[i]) for _ in range(10))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(right)


def test_small_weights_take_half_the_memory():
    small, full = draw((64, 64), ("uniform", 32)), draw((64, 64), ("uniform", 33))
    assert kernels.prepare_matmul(small).nbytes == 64 * 64 * 4
    assert kernels.prepare_matmul(full).nbytes == 64 * 64 * 8


@pytest.mark.parametrize(
    ("shape", "attributes", "method"),
    [
        ((64, 64, 3, 3), {"size": (32, 32)}, "karatsuba"),
        ((64, 64, 3, 3), {}, "tiles"),
        ((64, 31, 3, 3), {"size": (32, 32)}, "tiles"),
        ((64, 64, 3, 3), {"size": (4, 4)}, "tiles"),
        ((64, 64, 3, 3), {"size": (32, 32), "stride": (2, 2)}, "tiles"),
        ((64, 64, 3, 3), {"size": (32, 32), "dilation": (1, 2)}, "tiles"),
        ((64, 32, 3, 3), {"size": (32, 32), "groups": 2}, "tiles"),
        ((16, 3, 3, 3), {"size": (32, 32)}, "tiles"),
        ((64, 64, 1, 1), {"size": (32, 32)}, "tiles"),
        ((64, 1, 3, 3), {"size": (32, 32), "groups": 64}, "depthwise"),
        ((16, 1, 3, 3), {"size": (28, 28)}, "tiles"),
    ],
)
def test_the_method_follows_from_the_shape(shape, attributes, method):
    pads = {} if attributes.get("size") is None else {"pads": (1, 1, 1, 1) if shape[2] == 3 else (0, 0, 0, 0)}
    assert kernels.prepare_conv2d(draw(shape, ("uniform", 17)), **attributes, **pads).method == method


def test_nothing_compiles_after_warm():
    loops = [f for f in vars(kernels_numba).values() if hasattr(f, "signatures")]
    before = [len(f.signatures) for f in loops]
    for kind, (batch, size) in product((("uniform", 20), ("uniform", 64)), ((1, 7), (4, 8))):
        kernels.matmul(draw((batch, size), kind), draw((size, 5), kind))
        x = draw((batch, 4, size, size), kind)
        for groups, shape in ((1, (8, 4, 3, 3)), (2, (9 * 2, 2, 1, 2)), (4, (4, 1, 2, 2))):
            for method in fitting(groups, shape, (1, 1), (1, 1)):
                made = kernels.prepare_conv2d(draw(shape, kind), pads=(1, 0, 2, 1), groups=groups, method=method)
                made.apply(x)
    assert len(loops) > 5
    assert [len(f.signatures) for f in loops] == before


def test_loops_compile_where_no_folder_takes_the_cache(monkeypatch):
    def refuse(function: Any) -> Any:
        raise RuntimeError("cannot cache function 'f': no locator available for file 'f.py'")

    monkeypatch.setattr(loops, "_Cache", refuse)
    assert loops.compiled("int64(int64)")(_twice)(21) == 42


def _twice(x: int) -> int:
    return 2 * x


@pytest.mark.parametrize("signature", ["'int64(int64)'", ""])
@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("left", [0, 20])
def test_loops_compile_anew_where_the_cache_was_cut_off(tmp_path, signature, suffix, left):
    file = tmp_path / "loop.py"
    head = "from protocols.primitives.loops import compiled\n"
    file.write_text(f"{head}@compiled({signature})\ndef twice(x):\n    return 2 * x\n")

    def loop() -> Any:
        spec = importlib.util.spec_from_file_location("loop", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module.twice(21) == 42
        return module.twice

    loop()
    cut = list((tmp_path / "__pycache__").glob(f"*.{suffix}"))
    assert cut
    for path in cut:
        path.write_bytes(path.read_bytes()[:left])
    loop()
    assert sum(loop().stats.cache_hits.values()) == 1  # that is kept


@pytest.mark.parametrize("name", ["kernels_numba", "comparison_steps", "dcf_native"])
def test_loops_are_compiled_by_one_function(name):
    assert "cache=True" not in (ROOT / "protocols" / "primitives" / f"{name}.py").read_text()


def test_weights_without_values_give_products_without_values():
    w, image = torch.empty(6, 5, dtype=torch.int64, device="meta"), draw((2, 4, 7, 6), ("uniform", 21))
    made = kernels.matmul(torch.empty(3, 2, 6, dtype=torch.int64, device="meta"), w)
    assert (made.shape, made.device.type) == ((3, 2, 5), "meta")
    for groups, shape in ((1, (40, 4, 3, 3)), (4, (8, 1, 3, 3)), (2, (8, 2, 2, 1))):
        taps, how = draw(shape, ("uniform", 21)), {"pads": (1, 0, 1, 2), "groups": groups}
        made = kernels.conv2d(image.to("meta"), taps.to("meta"), **how)
        assert (made.shape, made.device.type) == (kernels.conv2d(image, taps, **how).shape, "meta")


def test_a_big_endian_processor_is_refused(monkeypatch):
    monkeypatch.setattr(kernels.sys, "byteorder", "big")
    with pytest.raises(UnsupportedError, match="little-endian"):
        kernels.matmul(X, W)


W = torch.zeros(4, 2, 3, 3, dtype=torch.int64)
X = torch.zeros(1, 2, 5, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (lambda: kernels.matmul(X, torch.zeros(5, 3)), "weights must be int64 of 2 axes"),
        (lambda: kernels.matmul(X, X), "weights must be int64 of 2 axes"),
        (lambda: kernels.matmul(X, W[0, 0, :0]), "not empty"),
        (lambda: kernels.matmul(X.double(), X[0, 0]), "an input must be int64"),
        (lambda: kernels.matmul(X, W[0, 0]), r"of shape \(..., 3\)"),
        (lambda: kernels.matmul(X[0, 0, 0, 0], X[0, 0]), r"of shape \(..., 5\)"),
        (lambda: kernels.conv2d(X, W[0]), "weights must be int64 of 4 axes"),
        (lambda: kernels.conv2d(X[:, :1], W), r"int64 \(n, 2, h, w\)"),
        (lambda: kernels.conv2d(X[0], W), r"int64 \(n, 2, h, w\)"),
        (lambda: kernels.conv2d(X.double(), W), r"int64 \(n, 2, h, w\)"),
        (lambda: kernels.conv2d(X[:, :, :2], W), "as large as the kernel"),
        (lambda: kernels.conv2d(X, W, stride=(0, 1)), "must be 1 or more"),
        (lambda: kernels.conv2d(X, W, pads=(0, -1, 0, 0)), "pads 0 or more"),
        (lambda: kernels.conv2d(X, W, groups=3), "a multiple of groups"),
        (lambda: kernels.prepare_conv2d(W, stride=(2, 2), method="karatsuba"), "the method must be one of"),
        (lambda: kernels.prepare_conv2d(W, method="winograd"), "the method must be one of"),
    ],
)
def test_what_is_no_product_is_refused(call, rule):
    with pytest.raises(ShapeError, match=rule):
        call()
