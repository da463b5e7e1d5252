"""Models of other packages, with random weights: what is found, what is swapped, how it comes out.

pip install '.[models]', or make test-models: without a package its tests skip.
"""

import os

# Read when keras is imported.
os.environ["KERAS_BACKEND"] = "jax"

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import jax_sage
from jax_sage import attention_sites

pytestmark = pytest.mark.usefixtures("compiled_quickly")
# An attention is off by 4 % (reference.py); a model adds it to its input, and has some of them.
CLOSE = 0.05


@pytest.fixture(autouse=True)
def on_cpu():
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


def package(name):
    return pytest.importorskip(name, reason=f"{name} is not installed: pip install '.[models]'")


def check_patch(function, *args, sites, swapped=None):
    """Sites before and after, the error of the output, and no trace on the second call."""
    before = attention_sites(function, *args)
    assert len(before) == sites
    exact = function(*args)
    traces = []

    def counted(*args):
        traces.append(1)
        return function(*args)

    run = jax.jit(counted)
    with jax_sage.patch(strict=True) as report:
        assert attention_sites(function, *args) == []
        out = run(*args)
        run(*args)
    assert len(traces) == 1
    assert sum(site.calls for site in report.swapped) == 2 * sites  # listed, and run
    assert report.kept == []
    for x, y in zip(jax.tree.leaves(out), jax.tree.leaves(exact), strict=True):
        assert x.dtype == y.dtype
        assert 0 < reference.relative_l1(x, y) < CLOSE
    assert len(jax_sage.capture(function, *args)) == sites
    return report


# equinox: a function of one head, under vmap over heads, and under that over a batch.


@pytest.mark.parametrize("masked", [False, True])
def test_equinox_multihead_attention(masked):
    eqx = package("equinox")
    module = eqx.nn.MultiheadAttention(4, 64, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (3, 50, 64))
    mask = jnp.tril(jnp.ones((50, 50), bool)) if masked else None
    report = check_patch(jax.vmap(lambda x: module(x, x, x, mask=mask)), x, sites=1)
    assert report.swapped[0].kind == "equinox.nn.dot_product_attention"
    assert report.swapped[0].mask == ("mask [T, S]" if masked else "none")


def test_equinox_dropout():
    eqx = package("equinox")
    module = eqx.nn.MultiheadAttention(4, 64, dropout_p=0.5, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (50, 64))
    with pytest.warns(jax_sage.SwapWarning, match="dropout is active"), jax_sage.patch():
        module(x, x, x, key=jax.random.key(2))
    with jax_sage.patch(strict=True):
        module(x, x, x, inference=True)


# keras-hub, on the JAX backend: jax.nn.dot_product_attention by its name.


def test_keras_hub_vit():
    keras_hub = package("keras_hub")
    model = keras_hub.models.ViTBackbone(
        image_shape=(32, 32, 3),
        patch_size=4,
        num_layers=2,
        num_heads=4,
        hidden_dim=64,
        mlp_dim=128,
        dropout_rate=0.0,
        attention_dropout=0.0,
    )
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, 32, 32, 3)), jnp.float32)
    check_patch(lambda images: model(images), images, sites=2)


def test_keras_hub_bert():
    keras_hub = package("keras_hub")
    model = keras_hub.models.BertBackbone(
        vocabulary_size=100,
        num_layers=2,
        num_heads=4,
        hidden_dim=64,
        intermediate_dim=128,
        max_sequence_length=64,
        dropout=0.0,
    )
    inputs = {
        "token_ids": jnp.arange(128).reshape(2, 64) % 100,
        "segment_ids": jnp.zeros((2, 64), jnp.int32),
        "padding_mask": jnp.asarray(np.arange(64) < np.array([[64], [40]])),
    }
    report = check_patch(lambda inputs: model(inputs), inputs, sites=2)
    assert report.swapped[0].mask == "mask [B, 1, 1, S]"


def test_keras_hub_with_dropout_computes_its_own():
    """With a dropout rate Keras has einsums of its own, also at inference: they are listed."""
    keras_hub = package("keras_hub")
    model = keras_hub.models.BertBackbone(
        vocabulary_size=100,
        num_layers=1,
        num_heads=4,
        hidden_dim=64,
        intermediate_dim=128,
        max_sequence_length=64,
        dropout=0.1,
    )
    inputs = {
        "token_ids": jnp.arange(64).reshape(1, 64),
        "segment_ids": jnp.zeros((1, 64), jnp.int32),
        "padding_mask": jnp.ones((1, 64), bool),
    }
    (site,) = attention_sites(lambda inputs: model(inputs, training=False), inputs)
    assert site.why == "einsums of its own: call jax_sage.attention there"


# jax-image-models: nnx.MultiHeadAttention, stacked and scanned over layers.


def test_jimm_vit():
    jimm = package("jimm")
    from flax import nnx

    with jax.set_mesh(jax.make_mesh((1, 1), ("data", "model"))):  # it makes no model without one
        model = jimm.VisionTransformer(
            num_classes=10,
            img_size=32,
            patch_size=4,
            num_layers=2,
            num_heads=4,
            mlp_dim=128,
            hidden_size=64,
            rngs=nnx.Rngs(0),
            sharding=jimm.common.sharding.NoSharding,
        )
        model.eval()
        images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
        swapped, report = jax_sage.swap(model, sample=(images,), return_report=True)
        assert [site.path for site in report.swapped] == ["encoder/layers/attn"]
        assert report.kept == []
        exact = model(images)
        traces = []

        @nnx.jit
        def run(model, images):
            traces.append(1)
            return model(images)

        out = run(swapped, images)
        run(jax_sage.swap(model), images)
        assert len(traces) == 1
        assert 0 < reference.relative_l1(out, exact) < CLOSE
        assert len(attention_sites(model, images)) == 1
        assert attention_sites(swapped, images) == []


# transformers' Flax models: attention weights of Flax, and an einsum of their own.


def transformers_model(name):
    transformers = package("transformers")
    if not hasattr(transformers, f"Flax{name}Model"):
        pytest.skip("transformers 5 has no Flax models")
    if name == "GPT2":
        config = transformers.GPT2Config(
            n_layer=2, n_head=4, n_embd=64, vocab_size=100, n_positions=64
        )
        inputs = jnp.arange(100).reshape(2, 50)
    else:
        config = transformers.ViTConfig(
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_size=64,
            intermediate_size=128,
            image_size=32,
            patch_size=4,
        )
        inputs = jax.random.normal(jax.random.key(0), (2, 3, 32, 32))
    return getattr(transformers, f"Flax{name}Model")(config), inputs


@pytest.mark.parametrize("name", ["GPT2", "ViT"])
def test_transformers_are_listed(name):
    """Neither of their two halves is an attention that could be replaced."""
    model, inputs = transformers_model(name)

    def run(x):
        return model(x).last_hidden_state

    sites = attention_sites(run, inputs)
    assert len(sites) == 2
    for site in sites:
        assert f"modeling_flax_{name.lower()}.py" in site.place
        assert "call jax_sage.flax.dot_product_attention there" in site.why
    exact = run(inputs)
    with pytest.warns(jax_sage.SwapWarning, match="patch swapped nothing"):
        with jax_sage.patch(jax_sage.Policy(jax_sage.Rule(f"{name} alone"))):
            np.testing.assert_array_equal(run(inputs), exact)


def test_transformers_vit_by_a_subclass(monkeypatch):
    """What the advice comes to: one line of the model's attention is ours."""
    transformers = package("transformers")
    model, images = transformers_model("ViT")
    module = transformers.models.vit.modeling_flax_vit
    exact = model(images).last_hidden_state

    class Attention(module.FlaxViTSelfAttention):
        def __call__(self, hidden_states, deterministic=True, output_attentions=False):
            heads = (*hidden_states.shape[:2], self.config.num_attention_heads, -1)
            q, k, v = (f(hidden_states).reshape(heads) for f in (self.query, self.key, self.value))
            out = jax_sage.flax.dot_product_attention(q, k, v, deterministic=deterministic)
            return (out.reshape(*out.shape[:2], -1),)

    monkeypatch.setattr(module, "FlaxViTSelfAttention", Attention)
    out = model(images).last_hidden_state
    assert 0 < reference.relative_l1(out, exact) < CLOSE
    assert attention_sites(lambda x: model(x).last_hidden_state, images) == []


# qwix: quantizes the matrix products of the rest.


@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:qwix\.")
def test_qwix_quantizes_the_rest():
    qwix = package("qwix")
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(4, 64, decode=False, rngs=rngs)
            self.mlp = nnx.Linear(64, 64, rngs=rngs)

        def __call__(self, x):
            x = x + self.attention(x)
            return x + self.mlp(x)

    x = jax.random.normal(jax.random.key(0), (2, 40, 64))
    model = Block(nnx.Rngs(0))
    rules = [qwix.QuantizationRule(module_path=".*", weight_qtype=jnp.int8)]
    quantized = qwix.quantize_model(model, qwix.PtqProvider(rules), x)
    swapped, report = jax_sage.swap(quantized, sample=(x,), return_report=True)
    assert len(report.swapped) == 1 and report.kept == []
    out, alone, exact = swapped(x), quantized(x), model(x)
    assert 0 < reference.relative_l1(out, alone) < CLOSE
    assert reference.relative_l1(out, exact) < CLOSE
    # And the other way round.
    other = qwix.quantize_model(jax_sage.swap(model), qwix.PtqProvider(rules), x)
    assert 0 < reference.relative_l1(other(x), exact) < CLOSE
    assert attention_sites(lambda x: other(x), x) == []


def test_big_vision_style_encoder():
    """A linen encoder as in big_vision: linen's module, scan and remat over the layers."""
    linen = package("flax.linen")

    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x, _=None):
            y = linen.LayerNorm()(x)
            y = linen.MultiHeadDotProductAttention(num_heads=4, deterministic=True)(y, y)
            x = x + y
            y = linen.Dense(64)(linen.gelu(linen.Dense(128)(linen.LayerNorm()(x))))
            return x + y, None

    class Encoder(linen.Module):
        @linen.compact
        def __call__(self, x):
            scanned = linen.scan(
                linen.remat(Layer, prevent_cse=False),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            return linen.LayerNorm()(scanned(name="layers")(x, None)[0])

    x = jax.random.normal(jax.random.key(0), (2, 50, 64))
    model = Encoder()
    variables = model.init(jax.random.key(0), x)
    run = functools.partial(model.apply, variables)
    swapped = functools.partial(jax_sage.swap(model).apply, variables)
    assert len(attention_sites(run, x)) == 1
    assert attention_sites(swapped, x) == []
    assert 0 < reference.relative_l1(jax.jit(swapped)(x), run(x)) < CLOSE
