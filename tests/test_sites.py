"""attention_sites: every softmax(QKᵀ)V of a function, and nothing else."""

import jax
import jax.numpy as jnp
import pytest

import jax_sage
from jax_sage import attention_sites, places

Q = jax.ShapeDtypeStruct((2, 30, 4, 16), jnp.float32)

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def own(q, softmax=jax.nn.softmax):
    scores = jnp.einsum("btnh,bsnh->bnts", q, q) * 0.25
    return jnp.einsum("bnts,bsnh->btnh", softmax(scores), q)


def by_hand(scores):
    p = jnp.exp(scores - scores.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def without_maximum(scores):
    p = jnp.exp2(scores * 1.44)
    return p * (1 / p.sum(-1, keepdims=True))


def capped_masked_and_dropped(scores):
    scores = 30 * jnp.tanh(scores / 30)
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e9)
    p = jax.nn.softmax(scores.astype(jnp.float32)).astype(scores.dtype)
    return jnp.where(jax.random.bernoulli(jax.random.key(0), 0.9, p.shape), p / 0.9, 0)


def normalized_afterwards(q):
    scores = jnp.einsum("btnh,bsnh->bnts", q, q)
    p = jnp.exp(scores - scores.max(-1, keepdims=True))
    out = jnp.einsum("bnts,bsnh->btnh", p, q)
    return out / jnp.moveaxis(p.sum(-1), 1, 2)[..., None]


def online(q):
    """As FlashAttention: blocks of keys in a scan, whose carry has maximum, sum and output."""
    q = jnp.swapaxes(q, 1, 2)

    def step(carry, k):
        top, total, out = carry
        scores = jnp.einsum("bnth,bnsh->bnts", q, k)
        new = jnp.maximum(top, scores.max(-1))
        p, alpha = jnp.exp(scores - new[..., None]), jnp.exp(top - new)
        return (new, total * alpha + p.sum(-1), out * alpha[..., None] + p @ k), None

    start = jnp.full(q.shape[:-1], -jnp.inf), jnp.zeros(q.shape[:-1]), jnp.zeros(q.shape)
    blocks = jnp.stack(jnp.split(q, 3, -2))
    (_, total, out), _ = jax.lax.scan(step, start, blocks)
    return out / total[..., None]


def in_a_while_loop(q):
    return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, own(c[1])), (0, q))[1]


FOUND = {
    "einsums": (own, 1),
    "by hand": (lambda q: own(q, by_hand), 1),
    "without maximum": (lambda q: own(q, without_maximum), 1),
    "cap, mask and dropout": (lambda q: own(q, capped_masked_and_dropped), 1),
    "normalized afterwards": (normalized_afterwards, 1),
    "online": (online, 1),
    "two": (lambda q: own(own(q)), 2),
    "jit": (jax.jit(own), 1),
    "remat": (jax.checkpoint(own), 1),
    "scan": (lambda q: jax.lax.scan(lambda c, _: (own(c), None), q, None, length=3)[0], 1),
    "while": (in_a_while_loop, 1),
    "cond": (lambda q: jax.lax.cond(q.sum() > 0, own, lambda q: own(q, by_hand), q), 2),
    "vmap of one head": (lambda q: jax.vmap(lambda x: own(x[None])[0])(q), 1),
    "rank 2": (
        lambda q: jnp.einsum(
            "ts,sh->th", jax.nn.softmax(jnp.einsum("th,sh->ts", q[0, :, 0], q[0, :, 0])), q[0, :, 0]
        ),
        1,
    ),
    "its gradient": (lambda q: jax.grad(lambda q: own(q).sum())(q), 1),
    "jax.nn": (lambda q: jax.nn.dot_product_attention(q, q, q), 1),
}


@pytest.mark.parametrize("name", FOUND)
def test_attention_is_found(name):
    function, count = FOUND[name]
    sites = attention_sites(function, Q)
    assert len(sites) == count
    for site in sites:
        assert "tests/test_sites.py:" in site.place or name == "remat"


NOT_FOUND = {
    "ours": lambda q: jax_sage.attention(q, q, q),
    "ours under vmap": lambda q: jax.vmap(jax_sage.attention)(q[:, None], q[:, None], q[:, None]),
    "a layer with softplus": lambda q: jax.nn.softplus(q @ jnp.ones((16, 16))) @ jnp.ones((16, 8)),
    "a layer with silu": lambda q: jax.nn.silu(q @ jnp.ones((16, 16))) @ jnp.ones((16, 8)),
    "elu": lambda q: jax.nn.elu(q @ jnp.ones((16, 16))) @ jnp.ones((16, 8)),
    # Of rank 2, by a transposed key, attention is that too, and not found.
    "logits and their softmax": lambda q: (
        jax.nn.softmax(q @ jnp.ones((16, 100))) @ jnp.ones((100, 8))
    ),
    "linear attention": lambda q: jnp.einsum(
        "bnts,bsnh->btnh", jnp.einsum("btnh,bsnh->bnts", q, q), q
    ),
    "products of exponentials": lambda q: jnp.exp(q) @ jnp.swapaxes(jnp.exp(q), -1, -2),
    "nothing": lambda q: q,
}


@pytest.mark.parametrize("name", NOT_FOUND)
def test_what_is_not_attention_is_not_found(name):
    sites = attention_sites(NOT_FOUND[name], Q)
    assert sites == []
    assert str(sites) == "No attention is computed without jax_sage."


def test_shapes_and_advice():
    linen = pytest.importorskip("flax.linen", reason="flax is not installed")

    def model(q, k, flag, scale=1):
        weights = linen.dot_product_attention_weights(q, k)
        x = jnp.einsum("...hqk,...khd->...qhd", weights, k)
        if flag:  # a Python bool, as it was given
            x = x + linen.dot_product_attention(q, k, k) * scale
        return x + own(k)[:, :30]

    k = jax.ShapeDtypeStruct((2, 50, 4, 16), jnp.float32)
    weights, library, einsums = attention_sites(model, Q, k, True, scale=2)
    assert (library.query, library.key, library.scores) == (
        (2, 30, 4, 16),
        (2, 50, 4, 16),
        (2, 4, 30, 50),
    )
    assert library.dtype == "float32"
    assert "jax_sage.patch() or swap() reaches it" in library.why
    assert "call jax_sage.flax.dot_product_attention there" in weights.why
    assert "call jax_sage.attention there" in einsums.why
    assert einsums.place.endswith("(own)")
    assert library.place.endswith("(model)")
    with jax_sage.patch():
        assert len(attention_sites(model, Q, k, True)) == 2  # the library's is ours now
    assert len(attention_sites(model, Q, k, False)) == 2


@pytest.mark.parametrize("file", ["<stdin>", "<python-input-3>"])
def test_functions_typed_at_the_prompt_have_a_place(file):
    names = {"jax": jax}
    source = "def typed(q): return jax.nn.dot_product_attention(q, q, q)"
    exec(compile(source, file, "exec"), names)
    (site,) = attention_sites(names["typed"], jnp.ones((1, 16, 2, 8)))
    assert site.place == "the prompt (typed)"
    assert places.describe(file, 1, "<module>") == "the prompt"


def test_as_text_and_html():
    sites = attention_sites(own, Q)
    assert "2x4x30x30" in str(sites)
    assert "<td" in sites._repr_html_()
    assert "No attention" in attention_sites(jnp.sin, Q)._repr_html_()
