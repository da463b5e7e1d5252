"""The benchmark's shapes, timing, peers and reports, as far as they can be tested without a GPU."""

import functools
import itertools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_sage
from jax_sage import bench, kernels, peers

TINY = bench.Suite([bench.Shape(1, 64, 4, 2, 32, c) for c in (False, True)], xla_scores=2**20)


@pytest.fixture
def notes():
    """Collects what is noted, through its append."""
    return []


@pytest.fixture
def tiny_suite(monkeypatch):
    monkeypatch.setattr(bench, "CPU", TINY)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


# Shapes.


def test_operations():
    full = bench.Shape(2, 1024, 16, 4, 128, False)
    assert full.operations == 4 * 2 * 16 * 1024 * 1024 * 128
    assert bench.Shape(2, 1024, 16, 4, 128, True).operations == full.operations / 2


@pytest.mark.parametrize("suite", [bench.SHORT, bench.FULL])
def test_grid(suite):
    grid = [s for s in suite.shapes if s not in (bench.VIDEO_DIT, bench.LLM_PREFILL)]
    assert len(set(suite.shapes)) == len(suite.shapes)
    assert {(s.head_dim, s.causal) for s in grid} == {(d, c) for d in (64, 128) for c in (0, 1)}
    for shape in grid:
        assert shape.heads == shape.kv_heads == 2048 // shape.head_dim
        assert shape.batch * shape.length == max(16384, shape.length)


# What is compared.


def test_ours_needs_a_kernel_on_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(
        kernels, "why_unavailable", lambda recipe: "no FP8" if recipe.pv == "fp8" else None
    )
    found = bench.implementations(TINY.shapes[0], 2**20)
    assert found[bench.OURS, "8+8"] == "no FP8"
    assert callable(found[bench.OURS, "8+16"])


def test_xla_is_left_out_where_scores_are_too_many():
    shape = TINY.shapes[0]
    assert callable(bench.implementations(shape, shape.scores)[bench.XLA])
    assert "stores the scores" in bench.implementations(shape, shape.scores - 1)[bench.XLA]


def test_peers_that_fail_or_are_wrong_are_left_out(notes):
    def exact(q, k, v):
        return q

    def fails(q, k, v):
        raise NotImplementedError("head dim 32\nand a long explanation")

    def wrong(q, k, v):
        return 1.7 * q

    def nan(q, k, v):
        return q * jnp.nan

    functions = {(f.__name__, "bf16"): f for f in (exact, fails, wrong, nan)}
    functions["missing", "bf16"] = "it is not there"
    arguments = [normal(1, 8, 2, 32)] * 3
    assert list(bench.prepare(functions, arguments, notes.append)) == [("exact", "bf16")]
    assert notes == [
        "fails bf16 is left out: NotImplementedError: head dim 32",
        "wrong bf16 is left out: its result is wrong (relative L1 difference 0.7)",
        "nan bf16 is left out: its result is wrong (relative L1 difference nan)",
        "missing bf16 is left out: it is not there",
    ]


def test_our_own_failure_is_an_error(notes):
    def fails(q, k, v):
        raise NotImplementedError("a bug")

    with pytest.raises(NotImplementedError, match="a bug"):
        bench.prepare({(bench.OURS, "8+8"): fails}, [normal(1, 8, 2, 32)] * 3, notes.append)


# Timing.


class Host:
    """A clock that only waiting and dispatching move."""

    now = 0.0

    def perf_counter(self):
        return self.now


class Device:
    """Runs one call after another, each in `seconds`, whatever the host does meanwhile."""

    def __init__(self, host, seconds, dispatch):
        self.host, self.seconds, self.dispatch, self.free = host, seconds, dispatch, 0.0

    def __call__(self, *_):
        self.host.now += self.dispatch
        self.free = max(self.host.now, self.free) + self.seconds
        return Result(self.host, self.free)


class Result:
    def __init__(self, host, at):
        self.host, self.at = host, at

    def block_until_ready(self):
        self.host.now = max(self.host.now, self.at)


@pytest.fixture
def host(monkeypatch):
    host = Host()
    monkeypatch.setattr(bench, "time", host)
    return host


def test_dispatch_is_not_timed(host, notes):
    seconds = {("1K", ""): 150e-6, ("4K", ""): 700e-6, ("64K", ""): 50e-3}
    runs = {name: Device(host, s, dispatch=100e-6) for name, s in seconds.items()}
    times = bench.measure(runs, [], notes.append)
    assert times == {name: pytest.approx(s, rel=0.005) for name, s in seconds.items()}
    assert not notes


def test_each_turn_has_another_order(host, notes):
    order = []

    def run(name, device):
        def call(*_):
            order.append(name)
            return device()

        return call

    names = [(letter, "") for letter in "abcde"]
    runs = {name: run(name, Device(host, 0.01, 1e-5)) for name in names}
    bench.measure(runs, [], notes.append)
    turns = [name for name, _ in itertools.groupby(order)][len(names) :]
    for name in names:  # in five turns after three others at least
        assert len({x for x, y in itertools.pairwise(turns) if y == name}) >= 3


def test_a_device_that_waits_for_the_host_is_noted(host, notes):
    bench.measure({("peer", "bf16"): Device(host, 50e-6, dispatch=60e-6)}, [], notes.append)
    assert notes == ["peer bf16: the device had to wait for the host, dispatch is in the time"]


# cuDNN's FP8 attention.


def test_e4m3_quantization():
    x = 5 * normal(2, 64, 4, 32)
    codes, descale = jax.jit(peers.quantize_e4m3)(x)
    assert codes.dtype == jnp.float8_e4m3fn and descale.shape == (1, 1, 1, 1)
    assert jnp.abs(codes.astype(jnp.float32)).max() == peers.E4M3_MAX
    x, back = np.asarray(x, np.float64), np.asarray(codes, np.float64) * np.asarray(descale)
    # Half a unit of the three stored bits; below 2^-6, numbers are multiples of 2^-9.
    bound = np.maximum(np.abs(x) * 2.0**-4, 2.0**-10 * float(descale[0, 0, 0, 0]))
    assert np.all(np.abs(back - x) <= 1.001 * bound)


@pytest.mark.parametrize("is_causal", [False, True])
def test_cudnn_fp8_scales(monkeypatch, is_causal):
    """cuDNN replaced by what it documents, in float32, its rounding of P and O included."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    def documented(q, k, v, *, fp8_params, scale, mask_type, use_fp8):
        assert use_fp8
        cudnn.check_fp8_params(fp8_params)
        p = {name: value.reshape(()) for name, value in fp8_params.items()}
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        s = jnp.einsum("btnh,bsnh->bnts", q, k) * p["descale_q"] * p["descale_k"] * scale
        if mask_type == cudnn.MaskType.CAUSAL:
            s = jnp.where(jnp.tril(jnp.ones(s.shape[-2:], bool)), s, -jnp.inf)
        weights = jnp.exp(s - s.max(-1, keepdims=True))
        codes = (weights * p["scale_s"]).astype(jnp.float8_e4m3fn).astype(jnp.float32)
        out = jnp.einsum("bnts,bsnh->btnh", codes, v) * p["descale_s"] * p["descale_v"]
        out /= weights.sum(-1).swapaxes(1, 2)[..., None]
        return (out * p["scale_o"]).astype(jnp.float8_e4m3fn), None, None

    monkeypatch.setattr(cudnn, "dot_product_attention", documented)
    q, k, v = (normal(2, 256, 4, 64, seed=seed) for seed in range(3))
    out = jax.jit(functools.partial(peers.cudnn_fp8, is_causal=is_causal))(q, k, v)
    exact = jax.nn.dot_product_attention(q, k, v, is_causal=is_causal)
    assert out.dtype == jnp.bfloat16
    # Measured on a GPU: 0.059.
    assert float(bench.relative_l1(out, exact)) < 0.07


@pytest.mark.parametrize("is_causal", [False, True])
def test_cudnn_fp8_lowers(monkeypatch, is_causal):
    """This JAX's own lowering takes the arguments: private, they may change."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    run = jax.jit(functools.partial(peers.cudnn_fp8, is_causal=is_causal))
    arguments = [jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16)] * 3
    text = run.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmaxF8" in text
    assert ("CAUSAL" in text) == is_causal


# Reports.


def rows_of(*shapes):
    """Made-up rows, the second implementation without the last shape."""
    rows = []
    for i, shape in enumerate(shapes):
        for j, (impl, recipe) in enumerate([("jax_sage", "8+8"), ("jax.nn cudnn", "bf16")]):
            if j == 0 or i + 1 < len(shapes):
                row = {"impl": impl, "recipe": recipe, **vars(shape), "tops": 1234.5 / (1 + i + j)}
                rows.append(row)
    return rows


def test_table():
    text = bench.table(rows_of(*TINY.shapes)).splitlines()
    assert [line.split() for line in text] == [
        ["jax_sage", "jax.nn", "cudnn"],
        ["batch", "length", "heads", "kv_heads", "head_dim", "causal", "8+8", "bf16"],
        ["1", "64", "4", "2", "32", "no", "1234", "617.2"],
        ["1", "64", "4", "2", "32", "yes", "617.2", "-"],
    ]
    assert len(set(map(len, text))) == 1


@pytest.mark.parametrize("suite", [bench.FULL, bench.SHORT, TINY], ids=["full", "short", "tiny"])
def test_chart(tmp_path, suite):
    image = pytest.importorskip("matplotlib.image")
    from jax_sage import chart

    path = tmp_path / "chart.png"
    chart.draw(rows_of(*suite.shapes), "a device", path)
    pixels = image.imread(path)
    panels = len({(s.heads, s.kv_heads, s.head_dim, s.causal) for s in suite.shapes})
    assert pixels.shape[0] > 400 * -(-panels // 2)  # all rows of panels are there
    orange = np.all(np.abs(pixels[..., :3] - [1.0, 0.5, 0.05]) < 0.02, axis=-1)
    assert orange.sum() > 1000  # and our line


def test_chart_without_matplotlib(monkeypatch, capsys):
    monkeypatch.delattr(jax_sage, "chart", raising=False)
    monkeypatch.delitem(sys.modules, "jax_sage.chart", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.artist", None)
    with pytest.raises(SystemExit):
        bench.main(["--chart", "chart.png"])
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny_suite")
def test_command(tmp_path, capsys):
    bench.main(["--json", str(tmp_path / "speed.json")])
    printed = capsys.readouterr()
    assert "figures are of the portable path" in printed.out
    assert "jax.nn xla" in printed.out
    assert "[1/2] batch 1, 64 tokens, 4 heads (2 of K and V) of 32, not causal" in printed.err
    assert "[2/2]" in printed.err and "s left" in printed.err
    # For both shapes the same reason: noted once.
    assert printed.err.count("tokamax mosaic_gpu bf16 is left out: ") == 1

    result = json.loads((tmp_path / "speed.json").read_text())
    assert result["device"] == "cpu"
    assert result["versions"]["jax"] == jax.__version__
    names = {(row["impl"], row["recipe"]) for row in result["speed"]}
    assert {("jax_sage", "8+8"), ("jax_sage", "8+16"), bench.XLA} <= names
    fields = "impl recipe batch length heads kv_heads head_dim causal tops includes_quantization"
    for row in result["speed"]:
        assert " ".join(row) == fields
        assert row["tops"] > 0 and row["includes_quantization"] is True


def test_accuracy():
    rows = bench.accuracy(length=256, head_dim=64)
    errors = {(row["recipe"], row["distribution"]): row["relative_l1"] for row in rows}
    assert len(errors) == 6
    for kind in ("normal", "outlier", "heavy"):
        assert 0 < errors["8+16", kind] < errors["8+8", kind] < 0.06


def test_masked_speed():
    from jax_sage import bench_masks

    rows = bench_masks.masked_speed(bench.Shape(1, 64, 2, 2, 16, False), print)
    assert rows[0]["case"] == "plain"
    assert rows[0]["times_plain_speed"] == 1
    assert len(rows) == 9
    assert all(row["milliseconds"] > 0 for row in rows)
