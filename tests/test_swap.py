"""swap and patch on Flax's modules and functions, in every mode that they have."""

import functools
import inspect
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jax_sage
from jax_sage import Policy, Rule, SwapWarning, UnsupportedAttentionError

nnx = pytest.importorskip("flax.nnx", reason="flax is not installed")
from flax import linen  # noqa: E402

pytestmark = pytest.mark.usefixtures("compiled_quickly")

# Attention is off by 4 % (reference.py), models of these tests by less: they add it to their input.
CLOSE = 0.05
ANY_LENGTH = Rule(min_length=0)


@pytest.fixture(autouse=True)
def on_cpu():
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


X = jax.random.normal(jax.random.key(1), (2, 24, 32))


def assert_swapped(out, exact):
    """Near the exact output, and not the same."""
    error = reference.relative_l1(out, exact)
    assert 1e-4 < error < CLOSE, f"relative L1 {error}"


class Block(nnx.Module):
    def __init__(self, rngs, **options):
        self.attention = nnx.MultiHeadAttention(4, 32, rngs=rngs, **{"decode": False, **options})
        self.mlp = nnx.Linear(32, 32, rngs=rngs)

    def __call__(self, x, **options):
        x = x + self.attention(x, **options)
        return x + nnx.gelu(self.mlp(x))


class Stack(nnx.Module):
    def __init__(self, rngs, layers=2, **options):
        self.blocks = nnx.List([Block(rngs, **options) for _ in range(layers)])

    def __call__(self, x, **options):
        for block in self.blocks:
            x = block(x, **options)
        return x


def stack(**options):
    return Stack(nnx.Rngs(0), **options)


class LinenBlock(linen.Module):
    dropout_rate: float = 0.0
    attention: type = linen.MultiHeadDotProductAttention

    @linen.compact
    def __call__(self, x, mask=None, deterministic=True):
        attend = self.attention(num_heads=4, dropout_rate=self.dropout_rate)
        x = x + attend(x, mask=mask, deterministic=deterministic)
        return x + linen.gelu(linen.Dense(32)(x))


class LinenStack(linen.Module):
    layers: int = 2
    block: type = LinenBlock

    def setup(self):
        self.blocks = [self.block() for _ in range(self.layers)]

    def __call__(self, x, mask=None):
        for block in self.blocks:
            x = block(x, mask)
        return x

    def first(self, x):
        return self.blocks[0](x)


@pytest.fixture(scope="module")
def linen_model():
    model = LinenStack()
    return model, model.init(jax.random.key(0), X)


# nnx.


def test_nnx():
    model = stack()
    swapped, report = jax_sage.swap(model, sample=(X,), return_report=True)
    exact = model(X)
    assert_swapped(swapped(X), exact)
    np.testing.assert_array_equal(model(X), exact)  # untouched
    assert model.blocks[0].attention.attention_fn is nnx.dot_product_attention
    assert isinstance(swapped, Stack)
    assert [site.path for site in report.sites] == ["blocks/0/attention", "blocks/1/attention"]
    assert [site.recipe for site in report.sites] == ["8+8", "8+8"]
    assert report.sites[0].query == (2, 24, 4, 8)
    assert report.swapped == report.sites
    assert report.kept == []


def test_nnx_parameters_are_the_same_arrays_in_the_same_tree():
    model = stack()
    swapped = jax_sage.swap(model)
    (_, ours), (_, theirs) = nnx.split(swapped), nnx.split(model)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert x is y
    # What a checkpoint restores goes into either.
    other = stack()
    nnx.update(other, jax.tree.map(lambda x: x * 1.25, theirs))
    nnx.update(swapped, nnx.state(other))
    assert_swapped(swapped(X), other(X))


def test_nnx_split_and_merge_and_jit():
    model = stack()
    swapped = jax_sage.swap(model)
    graph, state = nnx.split(swapped)
    exact = model(X)
    assert_swapped(nnx.merge(graph, state)(X), exact)
    assert_swapped(nnx.jit(lambda m, x: m(x))(swapped, X), exact)
    assert_swapped(jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, X), exact)


def test_swapping_again_does_not_compile_again():
    traces = []

    @nnx.jit
    def run(model, x):
        traces.append(1)
        return model(x)

    model = stack()
    first = run(jax_sage.swap(model), X)
    np.testing.assert_array_equal(run(jax_sage.swap(model), X), first)
    assert len(traces) == 1
    run(model, X)
    run(jax_sage.swap(model, Policy((Rule(recipe="8+16"),))), X)
    assert len(traces) == 3


def test_a_swapped_model_is_swapped_by_another_policy():
    model = stack()
    swapped = jax_sage.swap(jax_sage.swap(model), Policy((Rule(off=True),)))
    np.testing.assert_array_equal(swapped(X), model(X))


def skip_without(parameter, function):
    if parameter not in inspect.signature(function).parameters:
        pytest.skip(f"this flax has no {parameter}")


@pytest.mark.parametrize("mask", ["bool", "numbers", "none and is_causal", "padding"])
def test_nnx_masks(mask):
    if mask == "none and is_causal":
        skip_without("is_causal", nnx.MultiHeadAttention.__call__)
    options = {
        "bool": {"mask": nnx.make_causal_mask(X[..., 0], dtype=bool)},
        "numbers": {"mask": nnx.make_causal_mask(X[..., 0])},
        "none and is_causal": {"is_causal": True},
        "padding": {"mask": (jnp.arange(24) < jnp.array([[24], [9]]))[:, None, None]},
    }[mask]
    model = stack()
    swapped, report = jax_sage.swap(
        model, sample={"x": X, **options}, return_report=True, strict=True
    )
    assert_swapped(swapped(X, **options), model(X, **options))
    form = {"none and is_causal": "causal", "padding": "mask [B, 1, 1, S]"}.get(
        mask, "mask [B, 1, T, S]"
    )
    assert report.sites[0].mask == form


def test_nnx_grouped_heads():
    skip_without("num_kv_heads", nnx.MultiHeadAttention.__init__)
    model = stack(num_kv_heads=2)
    swapped, report = jax_sage.swap(model, sample=(X,), return_report=True)
    assert report.sites[0].key == (2, 24, 2, 8)
    assert_swapped(swapped(X), model(X))


def test_nnx_decode():
    """The cache of the swapped model is its own."""
    model = stack(decode=True)
    for block in model.blocks:
        block.attention.init_cache(X.shape)
    swapped = jax_sage.swap(model)
    step = nnx.jit(lambda m, x: m(x))
    for i in range(3):
        out = step(swapped, X[:, i : i + 1])
        assert int(model.blocks[0].attention.cache_index[...]) == i
        exact = step(model, X[:, i : i + 1])
        assert reference.relative_l1(out, exact) < CLOSE


@pytest.mark.parametrize("deterministic", [True, False])
def test_nnx_dropout(deterministic):
    """Active, it keeps the exact attention and says so; the same random numbers are drawn."""
    model = stack(dropout_rate=0.5)
    swapped, report = jax_sage.swap(
        model, sample={"x": X, "deterministic": True}, return_report=True
    )
    assert len(report.swapped) == 2
    if deterministic:
        exact = model(X, deterministic=True)
        assert_swapped(swapped(X, deterministic=True), exact)
    else:
        with pytest.warns(SwapWarning) as warned:
            out = swapped(X, deterministic=False)
        for i, warning in enumerate(warned):
            expected = f"blocks/{i}/attention is not swapped: dropout is active"
            assert expected in str(warning.message)
        assert len(warned) == 2
        np.testing.assert_array_equal(out, model(X, deterministic=False))


@pytest.mark.filterwarnings(r"ignore:Using 'Module.sow\(\)' outside:DeprecationWarning")
def test_nnx_sown_weights():
    model = stack()
    swapped = jax_sage.swap(model)
    with pytest.warns(SwapWarning, match="attention weights are to be stored"):
        out = swapped(X, sow_weights=True)
    np.testing.assert_array_equal(out, model(X, sow_weights=True))
    weights = swapped.blocks[0].attention.attention_weights
    assert weights is not None


def test_nnx_dtype():
    model = stack(dtype=jnp.bfloat16)
    swapped, report = jax_sage.swap(model, sample=(X,), return_report=True)
    assert report.sites[0].dtype == "bfloat16"
    out = swapped(X)
    assert out.dtype == model(X).dtype
    assert reference.relative_l1(out, model(X)) < CLOSE


def test_nnx_scan_over_layers_and_remat():
    """Modules stacked by nnx.vmap and run by nnx.scan; each layer under nnx.remat."""

    class Scanned(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap(in_axes=(0,), out_axes=0)
            def make(rngs):
                return Block(rngs)

            self.blocks = make(rngs)

        def __call__(self, x):
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            def forward(x, block):
                return nnx.remat(lambda block, x: block(x))(block, x)

            return forward(x, self.blocks)

    model = Scanned(nnx.Rngs(0))
    swapped, report = jax_sage.swap(model, sample=(X,), return_report=True)
    assert [site.path for site in report.swapped] == ["blocks/attention"]
    assert_swapped(nnx.jit(lambda m, x: m(x))(swapped, X), model(X))


def test_nnx_attention_of_its_own_is_kept():
    def own(query, key, value, **options):
        return value

    model = stack(attention_fn=own)
    with pytest.warns(SwapWarning, match="swapped nothing"):
        swapped, report = jax_sage.swap(model, sample=(X,), return_report=True)
    assert "it has an attention of its own, test_nnx_attention" in report.kept[0].reason
    with pytest.warns(SwapWarning, match="attention of its own"):
        np.testing.assert_array_equal(swapped(X), model(X))


def test_nnx_attributes_that_are_attention_functions():
    class Own(nnx.Module):
        def __init__(self, rngs, function):
            self.project = nnx.Linear(32, 3 * 32, rngs=rngs)
            self.attend = function

        def __call__(self, x):
            q, k, v = jnp.split(self.project(x).reshape(*x.shape[:2], 4, 24), 3, -1)
            return self.attend(q, k, v).reshape(x.shape)

    for function in (jax.nn.dot_product_attention, nnx.dot_product_attention):
        model = Own(nnx.Rngs(0), function)
        swapped, report = jax_sage.swap(model, sample=(X,), return_report=True)
        assert_swapped(swapped(X), model(X))
        assert report.swapped[0].kind == "nnx.Own"


# linen.


def test_linen(linen_model):
    model, variables = linen_model
    swapped, report = jax_sage.swap(model, sample=(X,), return_report=True)
    exact = model.apply(variables, X)
    assert_swapped(swapped.apply(variables, X), exact)
    assert_swapped(jax.jit(swapped.apply)(variables, X), exact)
    np.testing.assert_array_equal(model.apply(variables, X), exact)
    assert isinstance(swapped, LinenStack)
    assert [site.path for site in report.swapped] == [
        "blocks_0/MultiHeadDotProductAttention_0",
        "blocks_1/MultiHeadDotProductAttention_0",
    ]
    shapes = jax.eval_shape(swapped.init, jax.random.key(0), X)
    assert jax.tree.structure(shapes) == jax.tree.structure(variables)


def test_a_sample_of_linen_has_no_variables(linen_model):
    model, variables = linen_model
    with pytest.raises(TypeError, match=r"begins with the variables .*, as sample=\(x,\)"):
        jax_sage.swap(model, sample=(variables, X))


def test_linen_equal_swaps_are_equal(linen_model):
    model, _ = linen_model
    assert jax_sage.swap(model) == jax_sage.swap(model)
    assert hash(jax_sage.swap(model)) == hash(jax_sage.swap(model))
    assert jax_sage.swap(model) != model
    assert jax_sage.swap(model) != jax_sage.swap(model, Policy((Rule(recipe="8+16"),)))
    assert jax_sage.swap(jax_sage.swap(model)) == jax_sage.swap(model)


@pytest.mark.parametrize("method", ["first", LinenStack.first])
def test_linen_methods(linen_model, method):
    model, variables = linen_model
    swapped = jax_sage.swap(model)
    exact = model.apply(variables, X, method=method)
    assert_swapped(swapped.apply(variables, X, method=method), exact)
    if isinstance(method, str):
        assert_swapped(getattr(swapped.bind(variables), method)(X), exact)


def test_linen_as_a_part_of_another_model(linen_model):
    class Outer(linen.Module):
        inner: linen.Module

        @linen.compact
        def __call__(self, x):
            return linen.Dense(32)(self.inner(x))

    model, _ = linen_model
    outer = Outer(model)
    variables = outer.init(jax.random.key(0), X)
    exact = outer.apply(variables, X)
    assert_swapped(Outer(jax_sage.swap(model)).apply(variables, X), exact)
    assert_swapped(jax_sage.swap(outer).apply(variables, X), exact)


def test_linen_scan_and_remat():
    class Scanned(linen.Module):
        @linen.compact
        def __call__(self, x):
            block = linen.scan(
                linen.remat(LinenCarry),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            return block()(x, None)[0]

    class LinenCarry(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            return LinenBlock()(x), None

    model = Scanned()
    variables = model.init(jax.random.key(0), X)
    swapped, report = jax_sage.swap(model, sample=(X,), return_report=True)
    assert len(report.swapped) == 1
    assert_swapped(jax.jit(swapped.apply)(variables, X), model.apply(variables, X))


def test_linen_jit_inside(linen_model):
    """nn.jit caches by module; what it has compiled before must not come back."""

    class Jitted(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.jit(LinenBlock)()(x)

    model = Jitted()
    variables = model.init(jax.random.key(0), X)
    exact = model.apply(variables, X)
    assert_swapped(jax_sage.swap(model).apply(variables, X), exact)
    np.testing.assert_array_equal(model.apply(variables, X), exact)


@pytest.mark.parametrize("dtype", [bool, jnp.float32])
def test_linen_masks(linen_model, dtype):
    model, variables = linen_model
    mask = linen.make_causal_mask(X[..., 0], dtype=dtype)
    swapped = jax_sage.swap(model)
    exact = model.apply(variables, X, mask)
    assert_swapped(swapped.apply(variables, X, mask), exact)
    assert_swapped(jax.jit(swapped.apply)(variables, X, mask), exact)


def test_linen_dropout_and_sown_weights():
    model = LinenBlock(dropout_rate=0.5)
    variables = model.init(jax.random.key(0), X)
    swapped = jax_sage.swap(model)
    rngs = {"dropout": jax.random.key(1)}
    with pytest.warns(SwapWarning, match="dropout is active"):
        out = swapped.apply(variables, X, deterministic=False, rngs=rngs)
    np.testing.assert_array_equal(out, model.apply(variables, X, deterministic=False, rngs=rngs))
    assert_swapped(swapped.apply(variables, X), model.apply(variables, X))

    attention = linen.MultiHeadDotProductAttention(num_heads=4)
    variables = attention.init(jax.random.key(0), X)
    with pytest.warns(SwapWarning, match="attention weights are to be stored"):
        _, state = jax_sage.swap(attention).apply(
            variables, X, sow_weights=True, mutable=["intermediates"]
        )
    assert "intermediates" in state


def test_linen_decode():
    model = linen.MultiHeadDotProductAttention(num_heads=4, decode=True)
    variables = model.init(jax.random.key(0), X)
    swapped = jax_sage.swap(model)
    cache, exact_cache = variables["cache"], variables["cache"]
    for i in range(3):
        token = X[:, i : i + 1]
        out, state = swapped.apply(
            {"params": variables["params"], "cache": cache}, token, mutable=["cache"]
        )
        exact, exact_state = model.apply(
            {"params": variables["params"], "cache": exact_cache}, token, mutable=["cache"]
        )
        cache, exact_cache = state["cache"], exact_state["cache"]
        assert reference.relative_l1(out, exact) < 0.1  # of few keys: not an average


def test_linen_hooks_are_kept():
    model = linen.MultiHeadDotProductAttention(
        num_heads=4,
        qk_attn_weights_einsum_cls=lambda: jnp.einsum,
        attn_weights_value_einsum_cls=lambda: jnp.einsum,
    )
    variables = model.init(jax.random.key(0), X)
    with pytest.warns(SwapWarning, match="qk_attn_weights_einsum is given"):
        jax_sage.swap(model).apply(variables, X)


# Policies.


def test_rules_by_path_and_length():
    policy = Policy(
        (
            Rule("blocks/0/*", off=True),
            Rule("blocks/1/*", min_length=25),
            Rule("blocks/1/*", min_length=24, recipe="8+16"),
            Rule("blocks/2/attention"),
        )
    )
    _, report = jax_sage.swap(stack(layers=4), policy, sample=(X,), return_report=True)
    assert [(site.recipe, site.reason) for site in report.sites] == [
        (None, "off by a rule"),
        ("8+16", None),
        ("8+8", None),
        (None, "no rule has this path"),
    ]
    with pytest.warns(SwapWarning, match="length 20 is below the rule's 24"):
        jax_sage.swap(stack(), policy, sample=(X[:, :20],))


def test_length_below_which_it_does_not_pay(monkeypatch):
    from jax_sage import kernels

    monkeypatch.setattr(kernels, "capabilities", lambda: [90])
    with pytest.warns(SwapWarning, match="swapped nothing"):
        _, report = jax_sage.swap(stack(), sample=(X,), return_report=True)
    assert report.kept[0].reason == "length 24 is below 1024, from where on it pays"


def test_on_unsupported_error():
    model = stack(dropout_rate=0.5)
    swapped = jax_sage.swap(model, Policy(on_unsupported="error"))
    with pytest.raises(
        UnsupportedAttentionError, match="blocks/0/attention cannot be swapped: drop"
    ):
        swapped(X, deterministic=False)
    with pytest.raises(UnsupportedAttentionError, match="dropout is active"):
        jax_sage.swap(
            model,
            Policy(on_unsupported="error"),
            sample={"x": X, "deterministic": False},
        )


def test_what_attention_refuses_is_kept():
    """float64 has no kernel; the report has the message of jax_sage.attention."""
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        x = np.asarray(X, np.float64)
        model = stack(dtype=jnp.float64)
        with pytest.warns(SwapWarning, match="swapped nothing"):
            swapped, report = jax_sage.swap(model, sample=(x,), return_report=True)
        assert "query is float64; allowed: float16, bfloat16, float32" in report.kept[0].reason
        with pytest.warns(SwapWarning, match="is not swapped: query is float64"):
            np.testing.assert_array_equal(swapped(x), model(x))


def test_no_kernel_for_it_keeps_the_exact_attention(monkeypatch):
    """Plain JAX on a GPU would be slower than what the model has."""
    from jax_sage import kernels, lowering_cuda

    monkeypatch.setattr(kernels, "capabilities", lambda: [90])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(lowering_cuda, "why_portable", lambda *a: "there is no kernel for mask yet")
    with pytest.warns(SwapWarning, match="there is no kernel for mask yet, and plain JAX would be"):
        _, report = jax_sage.swap(stack(), Policy((ANY_LENGTH,)), sample=(X,), return_report=True)
    assert len(report.kept) == 2


def causal_mask(concrete=True):
    mask = np.tril(np.ones((1, 1, 24, 24), bool))
    return mask if concrete else jnp.asarray(mask)


def test_causal_is_asserted():
    skip_without("is_causal", nnx.MultiHeadAttention.__call__)
    model = stack()
    policy = Policy((Rule(causal=True),), on_unsupported="error")
    swapped = jax_sage.swap(model, policy)
    _, report = jax_sage.swap(
        model, policy, sample={"x": X, "mask": causal_mask()}, return_report=True
    )
    assert report.sites[0].mask == "causal"
    exact = model(X, mask=causal_mask())
    np.testing.assert_array_equal(
        swapped(X, mask=causal_mask()), jax_sage.swap(model)(X, is_causal=True)
    )
    assert_swapped(nnx.jit(lambda m, x, k: m(x, mask=k))(swapped, X, causal_mask()), exact)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": np.ones((1, 1, 24, 24), bool)}, "says causal, but the mask is another"),
        ({"mask": np.tril(np.ones((24, 24), bool), 1)}, "says causal, but the mask is another"),
    ],
)
def test_causal_that_is_not_is_refused(options, message):
    swapped = jax_sage.swap(stack(), Policy((Rule(causal=True),), on_unsupported="error"))
    with pytest.raises(UnsupportedAttentionError, match=message):
        swapped(X, **options)


def test_causal_between_sequences_of_different_length():
    attention = nnx.MultiHeadAttention(4, 32, decode=False, rngs=nnx.Rngs(0))
    swapped = jax_sage.swap(attention, Policy((Rule(causal=True),), on_unsupported="error"))
    with pytest.raises(UnsupportedAttentionError, match="12 queries and 24 keys"):
        swapped(X[:, :12], X, mask=np.tril(np.ones((12, 24), bool)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Rule(path=3), TypeError, "Rule.path is 3; it must be a str"),
        (lambda: Rule(recipe="9+9"), ValueError, r"recipe is '9\+9'; allowed"),
        (lambda: Rule(off=1), TypeError, "Rule.off is 1; it must be a bool"),
        (lambda: Rule(min_length=-1), ValueError, "Rule.min_length is -1"),
        (lambda: Rule(min_length=2.5), ValueError, "Rule.min_length is 2.5"),
        (lambda: Policy(("*",)), TypeError, "Policy.rules is .*it must be jax_sage.Rule"),
        (lambda: Policy(on_unsupported="ignore"), ValueError, "allowed: 'fallback', 'error'"),
        (lambda: jax_sage.swap(stack(), Rule()), TypeError, "it must be a jax_sage.Policy"),
        (lambda: jax_sage.swap(lambda x: x), TypeError, "model is a function; jax_sage.swap takes"),
        (lambda: jax_sage.swap(stack(), return_report=True), ValueError, "needs sample"),
        (lambda: jax_sage.swap(stack(), sample=X), TypeError, "it must be a tuple of arguments"),
    ],
)
def test_wrong_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_single_rule_is_a_policy():
    assert Policy(Rule()) == Policy((Rule(),)) == Policy([Rule()])
    assert hash(Policy(Rule())) == hash(Policy())


def test_nothing_to_swap():
    model = nnx.Linear(32, 32, rngs=nnx.Rngs(0))
    with pytest.warns(SwapWarning, match="jax_sage.swap swapped nothing"):
        jax_sage.swap(model)
    with pytest.raises(ValueError, match="jax_sage.swap swapped nothing"):
        jax_sage.swap(model, strict=True)
    dense = linen.Dense(32)
    with pytest.warns(SwapWarning, match="jax_sage.swap swapped nothing"):
        jax_sage.swap(dense, sample=(X,))
    with pytest.raises(ValueError, match="jax_sage.patch swapped nothing"):
        with jax_sage.patch(Policy(Rule("never")), strict=True):
            model(X)


# patch.

Q = jax.random.normal(jax.random.key(2), (2, 30, 4, 16))
FUNCTIONS = {
    "jax.nn": lambda q: jax.nn.dot_product_attention(q, q, q, is_causal=True),
    "jax.nn, rank 3": lambda q: jax.nn.dot_product_attention(q[0], q[0], q[0], scale=0.3),
    "jax.nn, lengths": lambda q: jax.nn.dot_product_attention(
        q, q, q, key_value_seq_lengths=jnp.array([30, 9]), implementation="xla"
    ),
    "linen": lambda q: linen.dot_product_attention(q, q, q, mask=jnp.ones((30, 30))),
    "linen.attention": lambda q: linen.attention.dot_product_attention(q, q, q),
    "nnx": lambda q: nnx.dot_product_attention(q, q, q, dtype=jnp.float32),
    "vmap": lambda q: jax.vmap(lambda x: jax.nn.dot_product_attention(x, x, x))(q),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_patch(name):
    """The same compiled function inside, outside, and inside again."""
    run = jax.jit(FUNCTIONS[name])
    exact = run(Q)
    with jax_sage.patch(strict=True) as report:
        out = run(Q)
    assert_swapped(out, exact)
    np.testing.assert_array_equal(run(Q), exact)
    assert len(report.swapped) == 1
    assert report.swapped[0].path.startswith("tests/test_swap.py:")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # not traced again: an empty report is no reason to warn
        with jax_sage.patch() as report:
            np.testing.assert_array_equal(run(Q), out)
    assert report.sites == []


def test_patch_leaves_nothing_behind():
    functions = (
        jax.nn.dot_product_attention,
        linen.dot_product_attention,
        nnx.dot_product_attention,
        nnx.MultiHeadAttention.__call__,
    )
    with pytest.raises(KeyError), jax_sage.patch():
        raise KeyError
    unused = Policy(Rule("never seen in these tests"))
    with pytest.warns(SwapWarning), jax_sage.patch(unused), jax_sage.patch(unused):
        pass
    assert functions == (
        jax.nn.dot_product_attention,
        linen.dot_product_attention,
        nnx.dot_product_attention,
        nnx.MultiHeadAttention.__call__,
    )


@pytest.mark.parametrize("dropout_rate", [0.0, 0.5])
def test_patch_modules(linen_model, dropout_rate):
    """Their function is an attribute from before; and with a dropout rate it is not jax.nn's."""
    model = stack(dropout_rate=dropout_rate)
    run = nnx.jit(lambda m, x: m(x, deterministic=True))
    closed_over = jax.jit(lambda x: model(x, deterministic=True))
    linen_stack, variables = linen_model
    apply = jax.jit(linen_stack.apply)
    exact = run(model, X), closed_over(X), apply(variables, X)
    with jax_sage.patch(strict=True) as report:
        out = run(model, X), closed_over(X), apply(variables, X)
    for x, y in zip(out, exact, strict=True):
        assert_swapped(x, y)
    assert {site.kind for site in report.swapped} == {
        "nnx.MultiHeadAttention",
        "linen.MultiHeadDotProductAttention",
    }
    assert model.blocks[0].attention.attention_fn is nnx.dot_product_attention


def test_patch_policy():
    run = jax.jit(FUNCTIONS["jax.nn"])
    exact = run(Q)
    with pytest.warns(SwapWarning, match="length 30 is below the rule's 31"):
        with jax_sage.patch(Policy(Rule(min_length=31))) as report:
            np.testing.assert_array_equal(run(Q), exact)
    assert report.kept[0].mask == "causal"
    with jax_sage.patch(Policy(Rule("tests/test_swap.py:*(<lambda>)", recipe="8+16"))) as report:
        assert_swapped(run(Q), exact)
    assert report.swapped[0].recipe == "8+16"


def test_an_exact_attention_is_one_attention():
    """nnx's function calls jax.nn's: kept by a rule, it is not swapped in there."""
    policy = Policy((Rule(off=True),))
    with pytest.warns(SwapWarning), jax_sage.patch(policy) as report:
        out = nnx.dot_product_attention(Q, Q, Q)
    np.testing.assert_array_equal(out, nnx.dot_product_attention(Q, Q, Q))
    assert [site.kind for site in report.sites] == ["flax.nnx.dot_product_attention"]


def test_other_threads_are_not_affected():
    exact = jax.nn.dot_product_attention(Q, Q, Q)
    results = []
    with jax_sage.patch():
        inside = jax.nn.dot_product_attention(Q, Q, Q)
        thread = threading.Thread(
            target=lambda: results.append(jax.nn.dot_product_attention(Q, Q, Q))
        )
        thread.start()
        thread.join()
    assert_swapped(inside, exact)
    np.testing.assert_array_equal(results[0], exact)


def test_arguments_that_a_function_does_not_know_raise():
    unused = Policy(Rule("never seen in these tests"))
    with pytest.warns(SwapWarning), jax_sage.patch(unused):
        with pytest.raises(TypeError, match="unexpected keyword|got an unexpected"):
            nnx.dot_product_attention(Q, Q, Q, soft_cap=3)
        with pytest.raises(TypeError, match="unexpected keyword|got an unexpected"):
            jax.nn.dot_product_attention(Q, Q, Q, soft_cap=3)


def test_return_residual_of_jax_nn_is_kept():
    with pytest.warns(SwapWarning, match="return_residual"), jax_sage.patch():
        out, _ = jax.nn.dot_product_attention(Q, Q, Q, return_residual=True)
    np.testing.assert_array_equal(out, jax.nn.dot_product_attention(Q, Q, Q))


# The attention_fn.


def test_attention_fn():
    exact = stack(dropout_rate=0.5)
    model = stack(attention_fn=jax_sage.flax.dot_product_attention, dropout_rate=0.5)
    for mask in (None, nnx.make_causal_mask(X[..., 0])):
        options = {"mask": mask, "deterministic": True}
        assert_swapped(model(X, **options), exact(X, **options))
    with pytest.raises(UnsupportedAttentionError, match="dropout is active"):
        model(X, deterministic=False)
    with pytest.raises(UnsupportedAttentionError, match="sow_weights"):
        model(X, deterministic=True, sow_weights=True)
    module = linen.MultiHeadDotProductAttention(
        num_heads=4, attention_fn=jax_sage.flax.dot_product_attention, dropout_rate=0.5
    )
    variables = module.init(jax.random.key(0), X, deterministic=True)
    plain = linen.MultiHeadDotProductAttention(num_heads=4)
    for mask in (None, linen.make_causal_mask(X[..., 0])):
        assert_swapped(
            module.apply(variables, X, mask=mask, deterministic=True),
            plain.apply(variables, X, mask=mask),
        )
    with pytest.raises(UnsupportedAttentionError, match="dropout is active"):
        module.apply(variables, X, deterministic=False, rngs={"dropout": jax.random.key(0)})
    with pytest.raises(UnsupportedAttentionError, match="query is int32"):
        jax_sage.flax.dot_product_attention(*[jnp.ones((1, 2, 1, 8), jnp.int32)] * 3)


# Reports.


def test_report_as_text_and_html():
    policy = Policy((Rule("blocks/0/*"),))
    _, report = jax_sage.swap(stack(), policy, sample=(X,), return_report=True)
    text = str(report)
    assert text.splitlines()[0] == "Attention: 1 swapped, 1 kept"
    assert "no rule has this path" in text
    page = report._repr_html_()
    assert page.count("<tr>") == 3
    assert "blocks/0/attention" in page
    assert "none was traced" in str(jax_sage.Report())
    assert "none was traced" in jax_sage.Report()._repr_html_()
    awkward = functools.partial(jax_sage.report.Site, kind="<b>", query=(), key=(), value=())
    report.add(awkward(path="<i>", dtype="", mask="", recipe=None, reason="a & b"))
    assert "&lt;i&gt;" in report._repr_html_()


def test_calls_are_counted():
    model = stack(layers=1)
    swapped = jax_sage.swap(model)

    def twice(x):
        return swapped(swapped(x))

    report = jax_sage.Report()
    with jax_sage.calls.recording(report):
        jax.eval_shape(twice, X)
    assert [site.calls for site in report.sites] == [2]
