"""The public call: arguments and errors, likeness to jax.nn's, Recipe, info, kernel choice."""

import contextlib
import dataclasses
import functools
import inspect
import io
import os
import pathlib
import pickle
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jax_sage
from jax_sage import RECIPES, Recipe, kernels

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def struct(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def trace(q, k=None, v=None, **options):
    """Traces a call; errors must come here, before anything is compiled or run."""
    k = q if k is None else k
    return jax.eval_shape(
        functools.partial(jax_sage.attention, **options), q, k, k if v is None else v
    )


GOOD = struct(2, 8, 4, 16)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([struct(2, 8, 4, 16, dtype="int32")], "query is int32; allowed: float16, bfloat16, fl"),
        ([struct(2, 8, 4, 16, dtype="float8_e4m3fn")], "query is float8_e4m3fn; allowed"),
        ([GOOD, struct(2, 8, 4, 16, dtype="int8")], "key is int8; allowed"),
        ([GOOD, GOOD, struct(2, 8, 4, 16, dtype="bool")], "value is bool; allowed"),
        (
            [GOOD, struct(2, 8, 4, 16, dtype="bfloat16")],
            "are float32, bfloat16 and bfloat16; they must be of one dtype",
        ),
        (
            [GOOD, GOOD, struct(2, 8, 4, 16, dtype="float16")],
            "are float32, float32 and float16; they must be of one dtype",
        ),
    ],
)
def test_dtype_error(arrays, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        trace(*arrays)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([struct(8, 16)], "query has rank 2, at least 3 is needed"),
        ([GOOD, struct(4, 16)], "key has rank 2, at least 3 is needed"),
        ([GOOD, struct(8, 4, 16)], "batch dimensions differ: query (2, 8, 4, 16), key (8, 4, 16)"),
        ([GOOD, struct(3, 8, 4, 16)], "The batch dimensions differ"),
        ([GOOD, struct(1, 8, 4, 16)], "The batch dimensions differ"),
        ([GOOD, struct(2, 8, 3, 16)], "4 query heads are not a multiple of 3 key/value heads"),
        ([GOOD, struct(2, 8, 8, 16)], "4 query heads are not a multiple of 8 key/value heads"),
        ([GOOD, struct(2, 8, 0, 16)], "4 query heads are not a multiple of 0 key/value heads"),
        ([GOOD, struct(2, 8, 4, 32)], "The head dimensions H differ"),
        ([GOOD, GOOD, struct(2, 9, 4, 16)], "key and value differ in batch dimensions, length or"),
        ([GOOD, GOOD, struct(2, 8, 2, 16)], "key and value differ in batch dimensions, length or"),
        ([GOOD, GOOD, struct(1, 8, 4, 16)], "key and value differ in batch dimensions, length or"),
        ([struct(2, 8, 4, 257)], "The head dimension is 257; allowed: 1 to 256"),
        ([struct(2, 8, 4, 0)], "The head dimension is 0; allowed: 1 to 256"),
        ([GOOD, GOOD, struct(2, 8, 4, 257)], "The head dimension of value is 257; allowed: 1 to"),
        ([GOOD, GOOD, struct(2, 8, 4, 0)], "The head dimension of value is 0; allowed: 1 to 256"),
    ],
)
def test_shape_error(arrays, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        trace(*arrays)


@pytest.mark.parametrize("recipe", ["8+9", "", None, 8, ("8+8",), {"pv": "fp8"}, ["8+8"]])
def test_unknown_recipe(recipe):
    message = re.escape(f"recipe is {recipe!r}; allowed: '8+8', '8+16', or a jax_sage.Recipe")
    with pytest.raises(ValueError, match=message):
        trace(GOOD, recipe=recipe)


@pytest.mark.parametrize("scale", [np.inf, -np.inf, np.nan])
def test_scale_must_be_finite(scale):
    with pytest.raises(ValueError, match=f"scale is {scale}; it must be finite"):
        trace(GOOD, scale=scale)


@pytest.mark.parametrize("scale", ["1", 1j, [1.0], jnp.float32(1)])
def test_scale_must_be_a_number(scale):
    name = re.escape(type(scale).__name__)
    with pytest.raises(TypeError, match=f"scale is a {name}; it must be a Python number"):
        trace(GOOD, scale=scale)


@pytest.mark.parametrize("scale", [1, 0.25, np.float32(0.25), np.int64(2), np.array(0.25)])
def test_scale_may_be_any_real_number(scale):
    assert trace(GOOD, scale=scale).shape == GOOD.shape


def test_scale_of_more_than_one_number():
    with pytest.raises((TypeError, ValueError), match="scale"):
        trace(GOOD, scale=np.array([0.5, 0.25]))


@pytest.mark.parametrize(
    ("name", "argument", "error", "message"),
    [
        ("mask", np.ones((8, 8), np.float32), TypeError,
         "mask is float32; allowed: bool. Make it one by mask != 0"),
        ("bias", np.ones((8, 8), bool), TypeError, "bias is bool; allowed: float16, bfloat16, f"),
        ("bias", np.ones((8, 8), np.int32), TypeError, "bias is int32; allowed"),
        ("mask", np.ones((8, 9), bool), ValueError,
         "mask (8, 9) does not broadcast to [*B, N, T, S] = (2, 4, 8, 8)"),
        ("mask", np.ones((2, 2, 4, 8, 8), bool), ValueError, "mask (2, 2, 4, 8, 8) does not"),
        ("mask", np.ones((2, 2, 8, 8), bool), ValueError, "mask (2, 2, 8, 8) does not broadcast"),
        ("bias", np.ones((2, 8, 8), np.float32), ValueError, "bias (2, 8, 8) does not broadcast"),
        ("query_seq_lengths", np.array([8.0, 8.0]), TypeError,
         "query_seq_lengths is float32; it must be int32"),
        ("query_seq_lengths", np.array([8]), ValueError,
         "query_seq_lengths has the shape (1,), expected [*B] = (2,)"),
        ("key_value_seq_lengths", np.array(8), ValueError, "key_value_seq_lengths has the shape"),
        ("key_value_seq_lengths", np.array([True, False]), TypeError,
         "key_value_seq_lengths is bool; it must be int32"),
        ("local_window_size", 2.0, TypeError, "local_window_size is 2.0; it must be a Python int"),
        ("local_window_size", True, TypeError, "local_window_size is True; it must be a"),
        ("local_window_size", (1, 2, 3), TypeError, "local_window_size is (1, 2, 3); it must be"),
        ("local_window_size", (1, None), TypeError, "local_window_size is (1, None); it must be"),
        ("local_window_size", -1, ValueError, "local_window_size is -1; it must not be negative"),
        ("local_window_size", (3, -1), ValueError, "is (3, -1); it must not be negative"),
        ("causal_alignment", "bottom", ValueError, "causal_alignment is 'bottom'; allowed"),
        ("causal_alignment", None, ValueError, "causal_alignment is None; allowed"),
        ("query_segment_ids", np.zeros((2, 8), np.int32), ValueError, "belong together"),
        ("key_value_segment_ids", np.zeros((2, 8), np.int32), ValueError, "belong together"),
    ],
)  # fmt: skip
def test_what_is_seen_is_checked(name, argument, error, message):
    with pytest.raises(error, match=re.escape(message)):
        trace(GOOD, **{name: argument})


@pytest.mark.parametrize("name", ["query_segment_ids", "key_value_segment_ids"])
def test_segment_ids_are_checked(name):
    right = {n: np.zeros((2, 8), np.int32) for n in ("query_segment_ids", "key_value_segment_ids")}
    assert trace(GOOD, **right).shape == GOOD.shape
    with pytest.raises(ValueError, match=rf"{name} has the shape \(2, 7\), expected \[\*B, [TS]\]"):
        trace(GOOD, **{**right, name: np.zeros((2, 7), np.int32)})
    with pytest.raises(TypeError, match=f"{name} is float32; it must be int32"):
        trace(GOOD, **{**right, name: np.zeros((2, 8), np.float32)})


@pytest.mark.parametrize("window", [np.int64(4), [4, 0], (np.int32(4), 0)])
def test_windows_may_be_numpy_integers_and_lists(window):
    assert trace(GOOD, local_window_size=window).shape == GOOD.shape


def test_a_window_that_is_traced():
    with pytest.raises(TypeError, match="it must be a Python int or a pair"):
        jax.eval_shape(
            lambda q, w: jax_sage.attention(q, q, q, local_window_size=w),
            GOOD,
            struct(dtype="int32"),
        )


def test_a_linen_module_cannot_lose_its_mask():
    """linen hands over the keyword arguments that the signature names, and drops the others."""
    linen = pytest.importorskip("flax.linen", reason="flax is not installed")
    model = linen.MultiHeadDotProductAttention(num_heads=2, attention_fn=jax_sage.attention)
    exact = linen.MultiHeadDotProductAttention(num_heads=2)
    x = jax.random.normal(jax.random.key(0), (2, 40, 64))
    variables = model.init(jax.random.key(0), x)
    mask = linen.make_causal_mask(x[..., 0], dtype=bool)
    out, expected = (m.apply(variables, x, mask=mask) for m in (model, exact))
    assert reference.relative_l1(out, expected) < 0.05  # reference.py: 4 %
    with pytest.raises(TypeError, match="mask is float32; allowed: bool"):
        model.apply(variables, x, mask=linen.make_causal_mask(x[..., 0]))


@pytest.fixture(scope="module")
def readme():
    """The README's text, what its Python defines, and what that prints."""
    pytest.importorskip("flax", reason="flax is not installed")
    text = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
    names = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for snippet in re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            exec(snippet, names)
    return text, names, printed.getvalue()


def test_the_readme_runs(readme):
    _, names, _ = readme
    assert (names["out"].shape, names["out"].dtype) == (names["q"].shape, jnp.bfloat16)


def test_the_readme_shows_what_is_printed(readme):
    text, _, printed = readme
    shown = re.findall(r"^```text\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(shown) == 1
    assert shown[0] in printed


def test_the_readme_swaps_what_it_says(readme):
    _, names, printed = readme
    assert [site.recipe for site in names["report"].sites] == ["8+8"]  # of the patch
    assert "einsums of its own" in printed
    assert [e.relative_l1 < 0.05 for e in names["comparison"].output.values()] == [True] * 2


def test_the_readme_links_to_files(readme):
    text, _, _ = readme
    folder = pathlib.Path(__file__).parent.parent
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", text) + re.findall(r"`(examples/[^`]+)`", text)
    assert len(links) > 4
    for link in links:
        assert (folder / link).exists(), link


def test_vmap_over_nothing():
    x = jnp.ones((0, 2, 4, 2, 8))
    assert jax.vmap(jax_sage.attention)(x, x, x).shape == x.shape


def test_symbolic_shapes():
    batch, length = jax.export.symbolic_shape("b, t")
    x = struct(batch, length, 2, 8)
    with pytest.raises(NotImplementedError, match="symbolic shape"):
        jax.export.export(jax.jit(jax_sage.attention))(x, x, x)


@pytest.mark.skipif(kernels.module() is None, reason="jax_sage is installed without CUDA kernels")
def test_export_for_cuda_needs_two_checks_disabled(monkeypatch):
    monkeypatch.setattr(kernels, "capabilities", lambda: [])  # not for this machine's GPU
    calls = ("jax_sage_quantize", "jax_sage_attention")
    x = struct(1, 100, 2, 40)
    export = functools.partial(jax.export.export, jax.jit(jax_sage.attention), platforms=["cuda"])
    with pytest.raises(ValueError, match="no compatibility guarantees"):
        export()(x, x, x)
    allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in calls]
    program = export(disabled_checks=allowed)(x, x, x).mlir_module()
    assert re.findall(r"custom_call @(\w+)", program) == list(calls)


def test_traced_scale():
    def call(q, scale):
        return jax_sage.attention(q, q, q, scale=scale)

    with pytest.raises(TypeError, match="must be a Python number.*Multiply query by a traced"):
        jax.eval_shape(call, GOOD, struct())


@pytest.mark.parametrize("name", ["is_causal", "return_residual"])
def test_flags_are_python_bools(name):
    with pytest.raises(TypeError, match=f"{name} is 1; it must be a Python bool"):
        trace(GOOD, **{name: 1})
    with pytest.raises(TypeError, match=f"{name} is .*must be a Python bool"):
        jax.eval_shape(
            lambda q, flag: jax_sage.attention(q, q, q, **{name: flag}), GOOD, struct(dtype="bool")
        )
    trace(GOOD, **{name: np.True_})


def test_options_are_keywords():
    with pytest.raises(TypeError, match="positional"):
        jax_sage.attention(*[np.ones((1, 2, 1, 8), np.float32)] * 3, None, None, 0.5)


# Differentiation: an error, and never a silent zero.

Q, K, V = reference.inputs("normal", (1, 8, 2, 16), (1, 8, 2, 16))


@pytest.mark.parametrize("argument", [0, 1, 2])
@pytest.mark.parametrize("return_residual", [False, True])
def test_grad_says_that_there_is_none(argument, return_residual):
    def loss(*arrays):
        result = jax_sage.attention(*arrays, return_residual=return_residual)
        return sum(x.sum() for x in jax.tree.leaves(result))

    for run in (jax.grad, lambda *a: jax.jit(jax.grad(*a)), jax.value_and_grad, jax.jacfwd):
        with pytest.raises(NotImplementedError, match="cannot be differentiated yet"):
            run(loss, argument)(Q, K, V)


def test_other_derivatives_say_so_too():
    def f(q):
        return jax_sage.attention(q, K, V)

    attempts = [
        lambda: jax.jvp(f, (Q,), (Q,)),
        lambda: jax.linearize(f, Q),
        lambda: jax.vjp(f, Q),
        lambda: jax.hessian(lambda q: f(q).sum())(Q),
        lambda: jax.grad(lambda q: jax.vmap(f)(q).sum())(Q[None]),
        lambda: jax.grad(jax.checkpoint(lambda q: f(q).sum()))(Q),
    ]
    for attempt in attempts:
        with pytest.raises(NotImplementedError, match="cannot be differentiated yet"):
            attempt()


def test_what_the_error_suggests_works():
    """stop_gradient on all three arrays; and a derivative by something else is not affected."""

    def loss(x):
        q, k, v = (jax.lax.stop_gradient(x * y) for y in (Q, K, V))
        return (x * jax_sage.attention(q, k, v)).sum()

    # d/dx of x·c with c the attention's output
    expected = jax_sage.attention(Q, K, V).sum()
    np.testing.assert_allclose(jax.grad(loss)(1.0), expected, rtol=1e-5)


# A replacement for jax.nn.dot_product_attention.


def test_signature_is_that_of_jax_nn():
    """Every argument and default, in their order; but `implementation`: the recipe decides."""
    ours = inspect.signature(jax_sage.attention).parameters
    theirs = dict(inspect.signature(jax.nn.dot_product_attention).parameters)
    assert theirs.pop("implementation").default is None
    shared = [name for name in ours if name in theirs]
    assert shared == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default
        assert ours[name].kind == parameter.kind
    more = set(ours) - set(theirs)
    assert more - {"return_residual"} == {
        "query_segment_ids", "key_value_segment_ids", "causal_alignment", "recipe"
    }  # fmt: skip
    assert all(ours[name].kind == inspect.Parameter.KEYWORD_ONLY for name in more)


def uniform(shape, seed=0):
    return np.random.default_rng(seed).random(shape, np.float32)


@pytest.mark.parametrize(
    ("query_shape", "key_shape", "options"),
    [
        ((40, 4, 32), (40, 4, 32), {}),
        ((40, 4, 32), (50, 2, 32), {"is_causal": True}),
        ((2, 40, 4, 32), (2, 50, 1, 32), {"scale": 0.1}),
        ((2, 40, 4, 32), (2, 30, 4, 32), {"is_causal": True}),
        ((40, 4, 32), (50, 2, 32), {"mask": uniform((4, 40, 50)) < 0.7}),
        ((2, 40, 4, 32), (2, 50, 2, 32), {"bias": uniform((1, 4, 40, 50)), "is_causal": True}),
        (
            (2, 40, 4, 32),
            (2, 50, 2, 32),
            {
                "query_seq_lengths": np.array([40, 9], np.int32),
                "key_value_seq_lengths": np.array([20, 50], np.int32),
            },
        ),
        ((2, 40, 4, 32), (2, 50, 2, 32), {"local_window_size": 7}),
        (
            (2, 40, 4, 32),
            (2, 50, 2, 32),
            {"local_window_size": (9, 3), "is_causal": True, "mask": uniform((2, 1, 1, 50)) < 0.9},
        ),
    ],
)
def test_same_result_as_jax_nn(query_shape, key_shape, options):
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    return_residual = "return_residual" in theirs
    if return_residual:
        options = {**options, "return_residual": True}
    q, k, v = reference.inputs("normal", query_shape, key_shape)
    # jax 0.8 forgets a window that comes without any other mask.
    mask = {"mask": np.ones((1, 1), bool)} if "local_window_size" in options else {}
    with jax.default_matmul_precision("highest"):
        theirs = jax.nn.dot_product_attention(q, k, v, implementation="xla", **{**mask, **options})
    ours = jax_sage.attention(query=q, key=k, value=v, **options)
    theirs, ours = jax.tree.leaves(theirs), jax.tree.leaves(ours)
    for x, y in zip(ours, theirs, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
    seen = np.ones(query_shape[:-1], bool)
    if return_residual:
        seen = np.isfinite(ours[1])  # a query without keys: -inf here, the lowest number there
        # Scores are off by 1 %, an lse of few of them likewise: 5 sigma.
        np.testing.assert_allclose(ours[1][seen], theirs[1][seen], atol=0.05)
        assert (theirs[1][~seen] < -1e37).all()
    # reference.py derives 4 %
    assert reference.relative_l1(ours[0][seen], theirs[0][seen]) < 0.05


def test_lists_and_numpy_arrays_are_accepted():
    expected = jax_sage.attention(jnp.asarray(Q), jnp.asarray(K), jnp.asarray(V))
    np.testing.assert_array_equal(jax_sage.attention(Q, K, V), expected)
    with jax.numpy_dtype_promotion("strict"):
        np.testing.assert_array_equal(jax_sage.attention(Q, K, V), expected)


def test_with_x64():
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        out, lse = jax_sage.attention(Q, K, V, return_residual=True)
        assert (out.dtype, lse.dtype) == (np.float32, np.float32)
        with pytest.raises(TypeError, match="query is float64"):
            jax_sage.attention(Q.astype(np.float64), K, V)
    expected, _ = jax_sage.attention(Q, K, V, return_residual=True)
    np.testing.assert_allclose(out, expected, atol=0.02)  # not a bit of it has to do with x64


# Recipe.


def test_recipe_is_frozen_and_hashable():
    recipe = Recipe()
    assert recipe == Recipe() == RECIPES["8+8"]
    assert hash(recipe) == hash(Recipe())
    assert recipe != RECIPES["8+16"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.pv = "fp16"
    assert pickle.loads(pickle.dumps(recipe)) == recipe


def test_named_recipes():
    assert RECIPES["8+8"] == Recipe("int8", "fp8", "fp16", True, True)
    assert RECIPES["8+16"] == Recipe("int8", "fp16", "fp32", True, True)
    assert set(RECIPES) == {"8+8", "8+16"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("qk", "int4"),
        ("qk", None),
        ("pv", "int8"),
        ("pv", 8),
        ("pv_accumulator", "bf16"),
        ("pv_accumulator", 16),
        ("smooth_k", 1),
        ("smooth_k", "yes"),
        ("smooth_v", None),
        ("smooth_v", [True]),
    ],
)
def test_recipe_validates(field, value):
    with pytest.raises(ValueError, match=re.escape(f"Recipe.{field} is {value!r}; allowed: ")):
        Recipe(**{field: value})


def test_recipe_is_a_static_argument():
    @functools.partial(jax.jit, static_argnames="recipe")
    def f(q, k, v, recipe):
        traced.append(recipe)
        return jax_sage.attention(q, k, v, recipe=recipe)

    traced = []
    by_name = f(Q, K, V, recipe="8+16")
    by_value = f(Q, K, V, recipe=Recipe(pv="fp16", pv_accumulator="fp32"))
    again = f(Q, K, V, recipe=Recipe(pv="fp16", pv_accumulator="fp32"))
    assert len(traced) == 2
    np.testing.assert_array_equal(by_name, by_value)
    np.testing.assert_array_equal(by_value, again)


# Which kernel, and why none.


class FakeModule(types.SimpleNamespace):
    """Stands for jax_sage._cuda."""

    def __init__(self, architectures=(80, 86, 89, 90, 120), driver=13000, toolkit=13000):
        super().__init__(
            architectures=lambda: list(architectures),
            driver_version=lambda: driver,
            toolkit_version=lambda: toolkit,
            ffi_targets=dict,
        )


FP8, FP16 = RECIPES["8+8"], RECIPES["8+16"]


@pytest.fixture
def machine(monkeypatch):
    def set_up(module, *capabilities):
        monkeypatch.setattr(kernels, "_cuda", module)
        monkeypatch.setattr(kernels, "capabilities", lambda: list(capabilities))

    return set_up


@pytest.mark.parametrize(
    ("module", "capabilities", "recipe", "reason"),
    [
        (None, [90], FP8, "built without CUDA. Reinstall it with JAX_SAGE_CUDA=on"),
        (None, [], FP16, "built without CUDA"),
        (FakeModule(driver=12080), [90], FP8, "driver supports CUDA 12.8 and the kernels were "
         "built with CUDA 13.0: driver too old"),
        (FakeModule([80, 89]), [90], FP8, "compute capability 9.0 is not in the build (it has "
         "sm_80, sm_89). Reinstall jax_sage with JAX_SAGE_CUDA_ARCHS=90"),
        (FakeModule([89]), [86], FP16, "compute capability 8.6 is not in the build"),
        (FakeModule([90]), [100], FP16, "compute capability 10.0 is not in the build"),
        (FakeModule(), [75], FP16, "compute capability 7.5 is not in the build"),
        (FakeModule(), [80], FP8, 'need sm_89 or newer, here sm_80 runs: use recipe="8+16"'),
        (FakeModule(), [86], FP8, "need sm_89 or newer, here sm_86 runs"),
        (FakeModule([80]), [89], FP8, "need sm_89 or newer, here sm_80 runs"),
        (FakeModule(), [89, 80], FP8, "need sm_89 or newer, here sm_80 runs"),
        (FakeModule([80, 86]), [], FP8, "no architecture of this build has E4M3"),
    ],
)  # fmt: skip
def test_why_there_is_no_kernel(machine, module, capabilities, recipe, reason):
    machine(module, *capabilities)
    assert reason in kernels.why_unavailable(recipe)


@pytest.mark.parametrize(
    ("module", "capabilities", "recipe"),
    [
        (FakeModule(), [89], FP8),
        (FakeModule(), [90], FP8),
        (FakeModule(), [120, 121], FP8),
        (FakeModule(), [80], FP16),
        (FakeModule([80]), [86], FP16),
        (FakeModule([80]), [87], FP16),
        (FakeModule(), [], FP8),
        (FakeModule([80]), [], FP16),
        (FakeModule(driver=0), [], FP8),  # lowering ahead of time, without a driver
        (FakeModule(driver=13020), [90], FP8),
        (FakeModule(driver=14000), [90], FP8),
    ],
)
def test_there_is_a_kernel(machine, module, capabilities, recipe):
    machine(module, *capabilities)
    assert kernels.why_unavailable(recipe) is None


def test_capabilities_without_a_gpu():
    found = kernels.capabilities()
    has_gpu = jax.default_backend() == "gpu"
    assert bool(found) == has_gpu
    assert all(70 <= capability < 200 for capability in found)


# info.

# A self-check in which a step is wrong has errors of the size of the output. The quantization's
# own are 4 and 1 %: see reference.py.
SELF_CHECK = {"8+8": 0.05, "8+16": 0.016}


def test_info():
    info = jax_sage.info()
    assert info.versions["jax"] == jax.__version__
    assert info.versions["jax_sage"] == jax_sage.__version__
    assert len(info.devices) == len(jax.local_devices())
    assert set(info.errors) == set(info.kernels) == set(RECIPES)
    for name, error in info.errors.items():
        assert 0 < error < SELF_CHECK[name]
        assert f"relative L1 error {error:.4f}" in str(info)
    if jax.default_backend() == "cpu":
        for kernel in info.kernels.values():
            assert kernel.startswith("portable JAX: the default device is a cpu")
    module = kernels.module()
    if module is None:
        assert info.architectures == ()
        assert info.versions["CUDA of the build"] == "none (portable build)"
    else:
        assert info.architectures == tuple(f"sm_{a}" for a in module.architectures())
        assert re.fullmatch(r"\d+\.\d", info.versions["CUDA of the build"])


def test_info_on_a_gpu_names_the_kernel_or_the_reason(machine, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    machine(FakeModule(), 80)
    info = jax_sage.info()
    assert info.kernels["8+8"].startswith("portable JAX: E4M3 matrix instructions need sm_89")
    of_mma_sync = "CUDA, mma.sync; portable JAX for head dimensions above 128"
    assert info.kernels["8+16"] == of_mma_sync
    assert info.versions["CUDA of the driver"] == "13.0"
    machine(None, 90)
    for kernel in jax_sage.info().kernels.values():
        assert kernel.startswith("portable JAX: jax_sage was built without CUDA. Reinstall it")


def test_info_gives_no_advice_without_a_gpu(machine, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    machine(None)
    info = jax_sage.info()
    assert info.versions["CUDA of the build"] == "none (portable build)"
    assert "Reinstall" not in str(info)


def test_python_m_jax_sage(tmp_path):
    command = [sys.executable, "-m", "jax_sage"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    errors = dict(
        re.findall(r"self-check (\S+) +relative L1 error (\S+) against float32: ok", result.stdout)
    )
    assert set(errors) == set(RECIPES)
    for name, error in errors.items():
        assert 0 < float(error) < SELF_CHECK[name]
    assert re.search(rf"^jax_sage +{re.escape(jax_sage.__version__)}$", result.stdout, re.MULTILINE)
    assert re.search(r"^device +\S.* \(cpu\)$", result.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("argument", "code", "text"),
    [("--help", 0, "usage: python -m jax_sage"), ("--verbose", 2, "unrecognized arguments")],
)
def test_python_m_jax_sage_reads_its_arguments(tmp_path, argument, code, text):
    command = [sys.executable, "-m", "jax_sage", argument]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == code
    assert text in result.stdout + result.stderr
    assert "self-check" not in result.stdout
