"""compare, capture and compare_model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jax_sage
from jax_sage import Recipe, SwapWarning, capture, compare, compare_model
from jax_sage.compare import STEPS

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.fixture(autouse=True)
def on_cpu():
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


QUERY, KEY = (2, 150, 4, 32), (2, 170, 2, 32)


def test_errors_are_those_against_float64():
    """Of the queries that were compared, all of them here; and of the same attention."""
    q, k, v = reference.inputs("outlier", QUERY, KEY)
    options = {"is_causal": True, "scale": 0.3}
    exact, _ = reference.attention(q, k, v, **options)
    result = compare(q, k, v, **options, rows=1000)
    assert result.rows == 150
    assert list(result.recipes) == ["8+8", "8+16"]
    for recipe, errors in result.recipes.items():
        out = np.asarray(jax_sage.attention(q, k, v, recipe=recipe, **options))
        # FP32 in the place of float64.
        assert errors.relative_l1 == pytest.approx(reference.relative_l1(out, exact), rel=0.01)
        assert errors.cosine == pytest.approx(reference.cosine(out, exact), abs=1e-6)
        assert errors.rmse == pytest.approx(reference.rmse(out, exact), rel=0.01)
        assert errors.by_head.shape == (2, 4)
        for head in np.ndindex(2, 4):
            place = np.s_[head[0], :, head[1]]
            expected = reference.relative_l1(out[place], exact[place])
            assert errors.by_head[head] == pytest.approx(expected, rel=0.01)
        by_row = np.abs(out - exact).sum(-1) / np.abs(exact).sum(-1)
        assert errors.worst_rows[0][0] == np.unravel_index(by_row.argmax(), by_row.shape)
        assert errors.worst_rows[0][1] == pytest.approx(by_row.max(), rel=0.01)
        assert errors.seconds is None  # the CPU's would say nothing


def test_the_sample_is_of_the_right_queries():
    q, k, v = reference.inputs("normal", (1, 1000, 2, 32), (1, 300, 2, 32))
    result = compare(q, k, v, rows=64, is_causal=True)
    assert result.rows == 40  # a run of 32 at the beginning, and 8 that are left at the end
    places = np.r_[:32, 992:1000]
    exact, _ = reference.attention(q, k, v, is_causal=True)
    out = np.asarray(jax_sage.attention(q, k, v, is_causal=True))
    expected = reference.relative_l1(out[:, places], exact[:, places])
    assert result.recipes["8+8"].relative_l1 == pytest.approx(expected, rel=0.01)
    assert all(place[1] in places for place, _ in result.recipes["8+8"].worst_rows)


def test_where_the_error_comes_from():
    q, k, v = reference.inputs("normal", QUERY, KEY)
    fast, accurate = (compare(q, k, v).recipes[name] for name in ("8+8", "8+16"))
    for errors in (fast, accurate):
        assert set(errors.without) == set(errors.alone) == set(STEPS)
        # Independent errors: their squares add up.
        total = np.sqrt(sum(x**2 for x in errors.alone.values()))
        assert errors.relative_l1 == pytest.approx(total, rel=0.05)
        for step in STEPS:
            rest = np.sqrt(max(errors.relative_l1**2 - errors.alone[step] ** 2, 0))
            assert errors.without[step] == pytest.approx(rest, rel=0.15, abs=1e-3)
    # INT8 makes the same error in both; P and V make most of 8+8's and none of 8+16's.
    assert fast.alone["qk"] == pytest.approx(accurate.alone["qk"], rel=0.02)
    assert min(fast.alone["p"], fast.alone["v"]) > 2 * fast.alone["qk"]
    assert max(accurate.alone["p"], accurate.alone["v"]) < 0.1 * accurate.alone["qk"]


def test_smoothing_and_outliers():
    q, k, v = reference.inputs("normal", QUERY, KEY)
    plain = compare(q, k, v, recipes=["8+8"])
    assert plain.outliers == ()
    k[..., 1, 5] += 20
    v[..., 0, 7] -= 15
    k[..., 0, 9] = 3  # constant: it has no standard deviation
    result = compare(q, k, v, recipes=["8+8", Recipe(smooth_k=False)])
    found = {(o.tensor, o.place): o.mean for o in result.outliers}
    assert set(found) == {
        (tensor, (batch, head, channel))
        for batch in (0, 1)
        for tensor, head, channel in (("key", 1, 5), ("value", 0, 7), ("key", 0, 9))
    }
    assert found["key", (0, 1, 5)] == pytest.approx(20, abs=0.3)
    assert result.outliers[0].tensor == "key"  # the largest first
    smooth, rough = result.recipes.values()
    assert smooth.rough_k > 1.2 * smooth.relative_l1
    assert smooth.rough_v > 1.2 * smooth.relative_l1
    assert rough.relative_l1 == pytest.approx(smooth.rough_k, rel=1e-6)
    before, after = result.key_channels
    assert before[5] > 20 > 6 > after[5]
    assert after[9] == pytest.approx(4, abs=2)


def test_masks_and_half_precision():
    q, k, v = reference.inputs("normal", QUERY, KEY, "bfloat16")
    options = {
        "mask": np.random.default_rng(0).random((2, 1, 150, 170)) < 0.5,
        "key_value_seq_lengths": np.array([170, 90]),
        "query_seq_lengths": np.array([0, 150]),
    }
    result = compare(q, k, v, recipes=["8+16"], rows=1000, **options)
    exact, _ = reference.attention(q, k, v, **options)
    out = np.asarray(
        jax_sage.attention(*(x.astype("f4") for x in (q, k, v)), recipe="8+16", **options)
    )
    assert result.recipes["8+16"].relative_l1 == pytest.approx(
        reference.relative_l1(out, exact), rel=0.01
    )
    assert np.all(result.recipes["8+16"].by_head[0] == 0)  # nothing is seen
    assert "bfloat16" in str(result)
    assert "mask, query_seq_lengths, key_value_seq_lengths" in str(result)


def test_comparison_as_text_html_and_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    q, k, v = reference.inputs("outlier", (1, 64, 3, 16), (1, 64, 3, 16))
    result = compare(q, k, v, is_causal=True)
    text = str(result)
    for piece in ("query 1x64x3x16", "causal", "only QKᵀ", "K unsmoothed", "worst head", "key "):
        assert piece in text
    assert result._repr_html_().count("<table>") == 3
    figure = result.plot()
    assert figure._repr_png_().startswith(b"\x89PNG")  # how a notebook shows it
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[0] == "Error of each head"
    assert len(titles) == 4
    # The figure of a GPU, with times.
    import dataclasses

    timed = {
        name: dataclasses.replace(errors, seconds=1e-3) for name, errors in result.recipes.items()
    }
    timed = dataclasses.replace(result, exact_seconds=2e-3, recipes=timed)
    assert timed.plot().axes[3].get_title() == "Time of a call"
    assert "1 ms" in str(timed) and "jax.nn, exact" in str(timed)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rows": 0}, ValueError, "rows is 0; it must be at least 1"),
        ({"recipes": ["9+9"]}, ValueError, "recipe is '9\\+9'"),
        ({"soft_cap": 3}, TypeError, "soft_cap"),
        ({"mask": np.ones((3, 3), bool)}, ValueError, "mask .* does not broadcast"),
    ],
)
def test_compare_refuses(options, error, message):
    q, k, v = reference.inputs("normal", (1, 8, 1, 8), (1, 8, 1, 8))
    with pytest.raises(error, match=message):
        compare(q, k, v, **options)
    with pytest.raises(ValueError, match="nothing to compare"):
        compare(q, k[:, :0], v[:, :0])


# capture.

Q = np.asarray(jax.random.normal(jax.random.key(0), (3, 2, 20, 4, 16)))


def test_capture_of_a_jitted_loop():
    """Each call of a scan, in order, with what it was given and what came out."""

    @jax.jit
    def model(q):
        def step(x, _):
            return jax.nn.dot_product_attention(x, x + 1, 2 * x, is_causal=True, scale=0.3), None

        return jax.lax.scan(step, q, None, length=3)[0]

    expected = model(Q[0])
    attentions = capture(model, Q[0])
    assert len(attentions) == 3
    x = Q[0]
    for a in attentions:
        np.testing.assert_allclose(a.query, x, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(a.key, x + 1, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(a.value, 2 * x, rtol=1e-5, atol=1e-6)
        assert {n: o for n, o in a.options.items() if o is not None} == {
            "is_causal": True,
            "scale": 0.3,
        }
        x = a.output
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(model(Q[0]), expected)
    assert compare(x, x, x, **attentions[0].options).recipes["8+8"].relative_l1 < 0.06
    assert "3 attentions" in str(attentions) and "scale, is_causal" in str(attentions)


def test_capture_under_vmap():
    mask = np.tril(np.ones((20, 20), bool))
    f = jax.vmap(lambda q: jax.nn.dot_product_attention(q, q, q, mask=mask))
    (a,) = capture(f, Q)
    np.testing.assert_array_equal(a.query, Q)
    assert a.options["mask"].shape == (1, 1, 1, 20, 20)
    exact, _ = reference.attention(Q, Q, Q, mask=mask)
    np.testing.assert_allclose(a.output, exact, atol=1e-5)


def test_capture_twice_and_nothing():
    def model(q):
        return jax.nn.dot_product_attention(q, q, q)

    for _ in range(2):
        assert len(capture(jax.jit(model), Q[0])) == 1
    with pytest.warns(SwapWarning, match="found no attention"):
        assert capture(jnp.sin, Q[0]) == []
    with (
        pytest.warns(SwapWarning, match="is not captured: query is int32"),
        pytest.warns(SwapWarning, match="found no attention"),
    ):
        capture(model, Q[0].astype(np.int32))


# Models.

nnx = pytest.importorskip("flax.nnx", reason="flax is not installed")
from flax import linen  # noqa: E402


class Model(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(4, 32, decode=False, dropout_rate=0.5, rngs=rngs)
        self.mlp = nnx.Linear(32, 32, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(x, deterministic=True)
        return self.mlp(
            x + jax.nn.dot_product_attention(*[x.reshape(2, 24, 4, 8)] * 3).reshape(x.shape)
        )


X = jax.random.normal(jax.random.key(1), (2, 24, 32))


def test_capture_of_an_nnx_model():
    model = Model(nnx.Rngs(0))
    attentions = capture(model, X)
    assert [a.path.partition(":")[0] for a in attentions] == ["attention", "tests/test_compare.py"]
    assert [a.kind for a in attentions] == [
        "nnx.MultiHeadAttention",
        "jax.nn.dot_product_attention",
    ]
    # What the module itself computes.
    query = model.attention.query(X)
    np.testing.assert_allclose(attentions[0].query, query, rtol=1e-5, atol=1e-6)
    assert model.attention.attention_fn is nnx.dot_product_attention


def test_capture_of_a_linen_model():
    model = linen.MultiHeadDotProductAttention(num_heads=4)
    variables = model.init(jax.random.key(0), X)
    (a,) = capture(functools.partial(model.apply, variables), X)
    assert a.query.shape == (2, 24, 4, 8)
    with pytest.raises(TypeError, match=r"functools.partial\(model.apply, variables\)"):
        capture(model, X)


def test_compare_model():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    model = Model(nnx.Rngs(0))
    result = compare_model(
        model,
        X,
        recipes=("8+8", "8+16"),
        metric=lambda out: {"mean": out.mean(), "largest": abs(out).max()},
    )
    assert len(result.layers) == 2
    exact = model(X)
    for recipe in ("8+8", "8+16"):
        policy = jax_sage.Policy(jax_sage.Rule(recipe=recipe))
        with jax_sage.patch(policy):
            out = model(X)
        assert result.output[recipe].relative_l1 == pytest.approx(
            reference.relative_l1(out, exact), rel=1e-3
        )
        assert result.metrics[recipe]["mean"] == pytest.approx(float(out.mean()), rel=1e-5)
        for layer in result.layers:
            assert 0 < layer.relative_l1[recipe] <= layer.worst_head[recipe] < 0.1
    assert result.metrics["exact"]["largest"] == pytest.approx(float(abs(exact).max()))
    assert result.output["8+16"].relative_l1 < result.output["8+8"].relative_l1
    text = str(result)
    assert "attention" in text and "mean" in text
    assert result._repr_html_().count("<table>") == 2
    assert result.plot().axes[0].get_title().startswith("Error of each attention")


def test_compare_model_without_attention_or_output():
    with pytest.warns(SwapWarning), pytest.raises(ValueError, match="no attention"):
        compare_model(jnp.sin, X)
    with pytest.raises(ValueError, match="no floating-point array"):
        compare_model(lambda q: jax.nn.dot_product_attention(q, q, q) > 0, Q[0])
