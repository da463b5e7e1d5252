"""The program that is handed to XLA for a GPU, as text, and the checks of the C++ handlers.

None of this needs a GPU.
"""

import functools
import math
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_sage
from jax_sage import RECIPES, Recipe, kernels, lowering_cuda
from jax_sage.mask_operands import MOST_SORTED
from jax_sage.masking import Band

needs_module = pytest.mark.skipif(
    kernels.module() is None, reason="jax_sage is installed without CUDA kernels"
)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """Lowered for a GPU that this machine need not have."""
    monkeypatch.setattr(kernels, "capabilities", lambda: [])


def lower(query, key=None, *, dtype="bfloat16", vmap=False, dialect="stablehlo", **options) -> str:
    """The program for cuda of an attention with these shapes, by default with its lse."""
    q = jax.ShapeDtypeStruct(query, dtype)
    k = jax.ShapeDtypeStruct(key or query, dtype)
    f = functools.partial(jax_sage.attention, **{"return_residual": True, **options})
    traced = jax.jit(jax.vmap(f) if vmap else f).trace(q, k, k)
    return traced.lower(lowering_platforms=("cuda",)).as_text(dialect=dialect)


def operations(text: str) -> list[str]:
    return re.findall(r"stablehlo\.(\w+)", text)


def custom_calls(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if "stablehlo.custom_call" in line]
    return {re.search(r"custom_call @(\w+)\(", line)[1]: line for line in lines}


def tensor_types(text: str) -> list[tuple[tuple[int, ...], str]]:
    """(dims, element type) of each type in a piece of text."""
    found = re.findall(r"tensor<((?:\d+x)*)(\w+)>", text)
    return [(tuple(int(d) for d in dims.split("x")[:-1]), dtype) for dims, dtype in found]


def signature(line: str):
    """Types of the operands and of the results of a custom call."""
    operands, results = line.rsplit(" : ", 1)[1].split(" -> ")
    return tensor_types(operands), tensor_types(results)


def attribute(line: str, name: str):
    """(value, type) of a backend_config attribute."""
    return re.search(rf"\b{name} = (\S+) : (\w+)", line).groups()


@needs_module
def test_two_custom_calls_and_nothing_else():
    """The standard layout goes in and out as it is: no transpose, copy, pad or reshape."""
    text = lower((2, 300, 8, 128), (2, 250, 2, 128), is_causal=True)
    assert set(operations(text)) == {"custom_call"}
    assert list(custom_calls(text)) == ["jax_sage_quantize", "jax_sage_attention"]
    for line in custom_calls(text).values():
        operands, results = signature(line)
        for name, types in (("operand", operands), ("result", results)):
            # Row-major, every one.
            layouts = re.search(rf"{name}_layouts = \[(.*?)\](?:,|}})", line)
            orders = re.findall(r"dense<(.*?)> : tensor", layouts[1])
            expected = [list(reversed(range(len(dims)))) for dims, _ in types]
            assert [[int(i) for i in re.findall(r"\d+", order)] for order in orders] == expected


@needs_module
def test_calls_are_typed_ffi():
    text = lower((2, 300, 8, 128), dialect="hlo")
    versions = re.findall(r"custom-call\(.*api_version=(\w+)", text)
    assert versions == ["API_VERSION_TYPED_FFI"] * 2


@needs_module
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "recipe",
    [
        *RECIPES.values(),
        Recipe(smooth_k=False),
        Recipe("int8", "fp16", "fp16"),
        Recipe(smooth_v=False, pv_accumulator="fp32"),
    ],
    ids=str,
)
def test_attributes(recipe, is_causal):  # fmt: skip
    calls = custom_calls(lower((2, 300, 4, 64), recipe=recipe, is_causal=is_causal, scale=-0.5))
    quantize, attention = calls["jax_sage_quantize"], calls["jax_sage_attention"]
    value, dtype = attribute(quantize, "scale_log2")
    assert dtype == "f32"
    assert float(value) == pytest.approx(-0.5 * math.log2(math.e), rel=1e-6)
    assert attribute(quantize, "smooth_k") == (str(int(recipe.smooth_k)), "i64")
    assert attribute(quantize, "smooth_v") == (str(int(recipe.smooth_v)), "i64")
    assert attribute(attention, "length_kv") == ("300", "i64")
    assert attribute(attention, "is_causal") == (str(int(is_causal)), "i64")
    assert attribute(attention, "alike") == (str(int(not is_causal)), "i64")
    assert attribute(attention, "with_lse") == ("1", "i64")
    assert attribute(attention, "pv_accumulator") == (recipe.pv_accumulator[2:], "i64")
    assert attribute(attention, "mma_sync") == ("0", "i64")


@needs_module
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_lowering_can_ask_for_mma_sync(recipe):
    """What test_gpu.py relies on; jax_sage.attention does not offer it."""
    x = jax.ShapeDtypeStruct((2, 300, 4, 64), jnp.bfloat16)
    f = functools.partial(
        lowering_cuda.attention,
        scale_log2=0.2,
        band=Band(),
        with_lse=True,
        recipe=RECIPES[recipe],
        mma_sync=True,
    )
    text = jax.jit(f).trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text()
    assert attribute(custom_calls(text)["jax_sage_attention"], "mma_sync") == ("1", "i64")


@needs_module
def test_lse_need_not_be_made_where_it_is_not_asked_for():
    call = custom_calls(lower((2, 300, 4, 64), return_residual=False))["jax_sage_attention"]
    assert attribute(call, "with_lse") == ("0", "i64")


@needs_module
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_buffers(recipe, dtype):
    """Exactly the documented ones: T padded to 128s, S to 64s, H to 128."""
    text = lower((3, 2, 300, 8, 80), (3, 2, 1100, 2, 80), recipe=recipe, dtype=dtype)
    calls = custom_calls(text)
    operands, results = signature(calls["jax_sage_quantize"])
    short = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}[dtype]
    assert operands == [((3, 2, 300, 8, 80), short)] + 2 * [((3, 2, 1100, 2, 80), short)]
    quantized = [
        ((6, 8, 384, 128), "i8"),
        ((6, 8, 384), "f32"),
        ((6, 8, 384), "f32"),
        ((6, 2, 1152, 128), "i8"),
        ((6, 2, 18, 4), "f32"),
        ((6, 2, 128, 1152), "f8E4M3FN") if recipe == "8+8" else ((6, 2, 1152, 128), "f16"),
        ((6, 2, 5, 128), "f32"),
        ((6, 2, 2, 128), "i32"),
        ((6, 2, 128, 2), "ui32"),
    ]
    assert results[:9] == quantized
    # Scratch: one part for each 256 keys, and the parts done of K and V.
    assert results[9:] == [((6, 2, 5, 6, 128), "f32"), ((6, 2, 2), "i32")]
    operands, results = signature(calls["jax_sage_attention"])
    assert operands == quantized
    assert results == [((3, 2, 300, 8, 80), short), ((3, 2, 300, 8), "f32")]


@needs_module
@pytest.mark.parametrize(
    ("batch", "length", "heads", "parts"),
    # Of 256 keys of 128 channels each; at most 64, or as many as fill a GPU where heads are few.
    [(16, 1024, 16, 4), (1, 32768, 16, 64), (1, 131072, 4, 128), (1, 131072, 1, 256)],
)
def test_parts_of_the_statistics(batch, length, heads, parts):
    calls = custom_calls(lower((batch, length, heads, 128)))
    assert signature(calls["jax_sage_quantize"])[1][9] == ((batch, heads, parts, 6, 128), "f32")


@needs_module
@pytest.mark.parametrize(
    ("head_dim", "padded", "table"), [(3, 64, 64), (65, 128, 128), (129, 192, 256), (193, 256, 256)]
)
def test_padded_head_dim(head_dim, padded, table):
    if head_dim > kernels.max_head_dim(RECIPES["8+8"]):
        pytest.skip("the build has no kernels for Hopper")
    calls = custom_calls(lower((1, 100, 2, head_dim)))
    q, *_, channels, first_bad, code_sum = signature(calls["jax_sage_attention"])[0]
    assert q == ((1, 2, 128, padded), "i8")
    assert channels == ((1, 2, 5, table), "f32")
    assert first_bad == ((1, 2, 2, table), "i32")
    assert code_sum == ((1, 2, table, 2), "ui32")


@needs_module
@pytest.mark.parametrize(
    ("query", "key"),
    [((300, 4, 64), (300, 4, 64)), ((1, 1, 2, 300, 6, 64), (1, 1, 2, 77, 3, 64))],
)
def test_ranks(query, key):
    text = lower(query, key)
    assert set(operations(text)) == {"custom_call"}
    _, results = signature(custom_calls(text)["jax_sage_attention"])
    assert results == [(query, "bf16"), (query[:-1], "f32")]


@needs_module
def test_vmap_is_a_batch_dimension():
    text = lower((3, 2, 100, 4, 64), vmap=True)
    assert text.count("stablehlo.custom_call") == 2
    assert set(operations(text)) == {"custom_call"}


@needs_module
@pytest.mark.parametrize(
    ("is_causal", "folded"), [(False, (3, 500, 4, 64)), (True, (3, 100, 20, 64))]
)
def test_vmap_of_queries_does_not_copy_keys(is_causal, folded):
    key = (3, 100, 2, 64)
    q, k = (jax.ShapeDtypeStruct(shape, "bfloat16") for shape in ((5, 3, 100, 4, 64), key))
    f = functools.partial(jax_sage.attention, is_causal=is_causal)
    traced = jax.jit(jax.vmap(f, (0, None, None))).trace(q, k, k)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    operands, _ = signature(custom_calls(text)["jax_sage_quantize"])
    assert operands == [(folded, "bf16"), (key, "bf16"), (key, "bf16")]


@needs_module
def test_nothing_of_size_t_times_s():
    """T = S = 8192: T·S in any tensor would be 2^26 elements a head; all inputs are 2^20."""
    length, head_dim = 1 << 13, 128
    text = lower((1, length, 1, head_dim), is_causal=True)
    sizes = [math.prod(dims) for dims, _ in tensor_types(text)]
    assert max(sizes) == length * head_dim
    assert max(sizes) < length * length / 10


@pytest.mark.parametrize("recipe", RECIPES)
def test_without_kernels_it_warns_and_is_portable(monkeypatch, recipe):
    monkeypatch.setattr(kernels, "_cuda", None)
    with pytest.warns(kernels.PortableWarning, match="portable JAX.*built without CUDA"):
        text = lower((1, 100, 2, 40), recipe=recipe)
    assert "stablehlo.while" in text
    assert custom_calls(text) == {}


def test_the_warning_names_the_line_that_calls_attention(monkeypatch):
    """Not the one that happens to compile it."""

    def model(x):
        return jax_sage.attention(x, x, x)

    monkeypatch.setattr(kernels, "_cuda", None)
    traced = jax.jit(lambda x: model(x) + 1).trace(jnp.ones((1, 100, 2, 40)))
    line = model.__code__.co_firstlineno + 1
    with pytest.warns(kernels.PortableWarning, match=rf"called at \S+test_lowering\.py:{line}\b"):
        traced.lower(lowering_platforms=("cuda",))


MASKED = {
    "bias": {"bias": np.zeros((1, 1, 1, 100), np.float32)},
    "mask": {"mask": np.ones((2, 100, 100), bool)},
    "lengths": {"query_seq_lengths": np.array([7])},
    "segments": {
        "query_segment_ids": np.zeros((1, 100), np.int32),
        "key_value_segment_ids": np.zeros((1, 100), np.int32),
    },
    "window": {"local_window_size": 9},
    "alignment": {"causal_alignment": "bottom_right", "is_causal": True},
}


@needs_module
@pytest.mark.parametrize("name", MASKED)
def test_masks_are_lowered_to_kernels(name):
    key = (1, 130, 2, 40) if name == "alignment" else (1, 100, 2, 40)
    calls = custom_calls(lower((1, 100, 2, 40), key, **MASKED[name]))
    attention = calls["jax_sage_attention"]
    assert attribute(attention, "masked") == ("1", "i64")
    assert attribute(attention, "is_causal") == ("0", "i64")  # the rows say it
    for part in ("mask", "segments", "bias"):
        assert attribute(attention, part) == (str(int(name == part)), "i64")
    counted = name in ("mask", "bias", "lengths")  # the others' queries see all keys
    assert attribute(attention, "counted") == (str(int(counted)), "i64")
    assert ("jax_sage_pack_mask" in calls) == (name == "mask")
    assert ("jax_sage_seen_keys" in calls) == (name == "mask")  # of one row XLA makes it
    # The others' are constants of the program.
    assert ("jax_sage_intervals" in calls) == (name == "lengths")
    alike = name not in ("alignment", "window")  # a window of a fifth of the keys, cut off at ends
    assert attribute(attention, "alike") == (str(int(alike)), "i64")
    quantize = calls["jax_sage_quantize"]
    # The others' queries see all keys between them.
    seen = name in ("mask", "bias", "lengths", "segments")
    assert attribute(quantize, "some_seen") == (str(int(seen)), "i64")
    assert attribute(quantize, "skip_unseen") == (str(int(name == "lengths")), "i64")
    assert attribute(quantize, "segments") == (str(int(name == "segments")), "i64")


@needs_module
def test_ids_that_queries_and_keys_share_are_sorted_once():
    """Of others the queries' are sorted too, to find the keys that are seen."""
    ids = np.zeros((3, 300), np.int32)
    for keys, sorts in ((ids, 0), (ids.copy(), 1)):
        text = lower((3, 300, 8, 80), query_segment_ids=ids, key_value_segment_ids=keys)
        assert text.count("@jax_sage_sort_ids") == 1
        assert operations(text).count("sort") == sorts
        # Each key is seen by its own query: known without a look.
        quantize = custom_calls(text)["jax_sage_quantize"]
        assert attribute(quantize, "some_seen") == (str(sorts), "i64")
        # In the order of the keys: neighbouring queries see neighbouring intervals.
        attention = custom_calls(text)["jax_sage_attention"]
        assert attribute(attention, "by_intervals") == (str(1 - sorts), "i64")


@needs_module
def test_ids_too_many_for_a_kernel_are_sorted_by_xla():
    for length, by_xla in ((MOST_SORTED, False), (MOST_SORTED + 1, True)):
        ids = np.zeros((1, length), np.int32)
        text = lower((1, length, 1, 64), query_segment_ids=ids, key_value_segment_ids=ids)
        assert text.count("@jax_sage_sort_ids") == (not by_xla)
        assert operations(text).count("sort") == by_xla
        ids = ("S32", [1, length])
        tiles = -(-length // 128)
        ranges = [("S32", [1, 2 * tiles, 2]), ("S32", [1, tiles, 2])]
        results = [ids, ids, ("S32", [1, length, 2]), ("S32", [1]), *ranges]
        wrong = complaint("sort_ids", [ids], results, {})
        assert (wrong is None) == (not by_xla)


@needs_module
@pytest.mark.parametrize("recipe", RECIPES)
def test_segments_are_quantized_by_the_kernels(recipe):
    """Its operands are those that the sort gives; out is what the kernel gives."""
    ids = [np.zeros((3, length), np.int32) for length in (300, 1100)]
    text = lower(
        (3, 300, 8, 80),
        (3, 1100, 2, 80),
        recipe=recipe,
        query_segment_ids=ids[0],
        key_value_segment_ids=ids[1],
    )
    calls = custom_calls(text)
    operands, results = signature(calls["jax_sage_quantize"])
    assert operands[:3] == [((3, 300, 8, 80), "bf16")] + 2 * [((3, 1100, 2, 80), "bf16")]
    assert operands[3] == ((3, 1, 1100), "ui8")
    rows = ((1, 384, 2), "i32")
    slots = ((3, 1100, 2), "i32")
    assert operands[4:] == [((3, 384), "i32")] + 2 * [((3, 1100), "i32")] + [slots, rows]
    quantized = [
        ((3, 8, 384, 128), "i8"),
        ((3, 8, 384), "f32"),
        ((3, 8, 384), "f32"),
        ((3, 2, 1152, 128), "i8"),
        ((3, 2, 18, 4), "f32"),
        ((3, 2, 128, 1152), "f8E4M3FN") if recipe == "8+8" else ((3, 2, 1152, 128), "f16"),
        ((3, 2, 1100, 2, 128), "f32"),
        ((3, 2, 2, 128), "i32"),
        ((3, 384), "i32"),
        ((3, 384, 2), "i32"),
        ((3, 6, 4), "i32"),
    ]
    assert results[:11] == quantized
    operands = signature(calls["jax_sage_attention"])[0]
    assert operands[:11] == quantized
    ids, scattered = ((3, 1100), "i32"), ((3,), "i32")
    ranges = [((3, 18, 2), "i32"), ((3, 9, 2), "i32")]
    assert signature(calls["jax_sage_sort_ids"]) == (
        [ids],
        [ids, ids, slots, scattered, *ranges],
    )
    assert operands[-1] == scattered
    # Nothing of the size of out is computed elsewhere.
    assert tensor_types(text).count(((3, 300, 8, 80), "f32")) == 0


@needs_module
def test_masks_stay_as_small_as_they_were_given():
    """Neither heads nor queries that are alike are expanded, and nothing else is of size T·S."""
    mask, bias = np.ones((1, 1, 512, 640), bool), np.zeros((1, 1, 1, 640), np.float16)
    text = lower((2, 512, 4, 64), (2, 640, 4, 64), mask=mask, bias=bias)
    calls = custom_calls(text)
    assert signature(calls["jax_sage_pack_mask"]) == (
        [((1, 1, 512, 640), "i1")],
        [((1, 1, 5, 512, 4), "ui32"), ((1, 1, 8, 5), "ui8")],
    )
    assert signature(calls["jax_sage_seen_keys"]) == (
        [((1, 512, 2), "i32"), ((1, 1, 512, 640), "i1"), ((1, 1, 1, 640), "f16")],
        [((1, 1, 640), "ui8")],
    )
    operands, _ = signature(calls["jax_sage_attention"])
    assert operands[-1] == ((1, 1, 1, 640), "f16")
    large = {t for t in tensor_types(text) if math.prod(t[0]) >= 2 * 4 * 512 * 640}
    assert large == set()


@needs_module
def test_large_head_dimensions_have_kernels_on_hopper_alone(monkeypatch):
    """Without a GPU the lowering is for the best that the build has."""
    if 90 in kernels.module().architectures():
        assert len(custom_calls(lower((1, 100, 2, 192)))) == 2
    monkeypatch.setattr(kernels, "family", lambda recipe: "mma.sync")
    with pytest.warns(
        kernels.PortableWarning, match="its kernels have head dimensions up to 128, here it is 192"
    ):
        assert custom_calls(lower((1, 100, 2, 192))) == {}


@needs_module
@pytest.mark.parametrize(
    ("query", "key", "options", "is_causal"),
    [
        # A window that never ends, and alignments that are the same.
        ((2, 100, 4, 64), (2, 100, 4, 64), {"local_window_size": 99}, "0"),
        ((2, 100, 4, 64), (2, 100, 4, 64), {"local_window_size": (99, 0)}, "1"),
        ((2, 100, 4, 64), (2, 100, 4, 64),
         {"is_causal": True, "causal_alignment": "bottom_right"}, "1"),
        # A step of decoding sees the whole cache.
        ((2, 1, 4, 64), (2, 100, 4, 64),
         {"is_causal": True, "causal_alignment": "bottom_right"}, "0"),
    ],
)  # fmt: skip
def test_bands_that_are_nothing_special_run_on_kernels(query, key, options, is_causal):
    calls = custom_calls(lower(query, key, **options))
    assert attribute(calls["jax_sage_attention"], "is_causal") == (is_causal, "i64")


@needs_module
def test_causal_attention_to_more_keys_than_queries():
    """Later keys, which no query sees, must not count in any mean or scale."""
    calls = custom_calls(lower((2, 100, 4, 64), (2, 300, 2, 64), is_causal=True))
    operands, _ = signature(calls["jax_sage_quantize"])
    assert operands[1:] == 2 * [((2, 100, 2, 64), "bf16")]
    assert attribute(calls["jax_sage_attention"], "length_kv") == ("100", "i64")


@needs_module
@pytest.mark.parametrize(("head_dim", "value_dim"), [(40, 128), (128, 40)])
def test_another_head_dimension_of_value(head_dim, value_dim):
    """The smaller one is padded, and the output cut."""
    q, v = (jax.ShapeDtypeStruct((2, 100, 4, d), jnp.bfloat16) for d in (head_dim, value_dim))
    traced = jax.jit(jax_sage.attention).trace(q, q, v)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    operands, _ = signature(custom_calls(text)["jax_sage_quantize"])
    assert operands == 3 * [((2, 100, 4, 128), "bf16")]
    assert traced.out_info.shape == (2, 100, 4, value_dim)


@needs_module
def test_no_warning_with_kernels():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lower((1, 100, 2, 40))


def test_cpu_lowering_has_no_custom_call():
    x = jax.ShapeDtypeStruct((1, 100, 2, 40), jnp.float32)
    traced = jax.jit(jax_sage.attention).trace(x, x, x)
    assert "custom_call" not in operations(traced.lower(lowering_platforms=("cpu",)).as_text())


# The handlers' checks of their buffers and attributes.

XLA_NAMES = {
    "int8": "S8",
    "int32": "S32",
    "uint32": "U32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float8_e4m3fn": "F8E4M3FN",
}
QUANTIZED = ["q", "q_scale", "q_dot_mean", "k", "k_scale", "v", "channels", "first_bad",
             "value_code_sum"]  # fmt: skip


def describe(array):
    return XLA_NAMES[np.dtype(array.dtype).name], list(array.shape)


def right_call(which, recipe="8+8", query=(2, 300, 4, 80), key=(2, 1100, 2, 80)):
    """(args, results, attrs) of a call as the lowering makes it, and the names of its buffers."""
    q = jax.ShapeDtypeStruct(query, jnp.bfloat16)
    k = jax.ShapeDtypeStruct(key, jnp.bfloat16)
    f = functools.partial(lowering_cuda.quantize, scale_log2=0.2, recipe=RECIPES[recipe])
    quantized = [describe(x) for x in jax.eval_shape(f, q, k, k)]
    batch, tokens, heads, kv_heads = query[0], key[-3], query[-2], key[-2]
    tiles, groups = -(-tokens // 128), -(-query[-3] // 128) * 2
    if which == "pack_mask":
        words = ("U32", [batch, heads, tiles, groups * 64, 4])
        return (
            [("PRED", [batch, heads, query[-3], tokens])],
            [words, ("U8", [batch, heads, groups, tiles])],
            {},
        )
    if which == "intervals":
        lengths = ("S32", [batch])
        return (
            [lengths, lengths],
            [
                ("S32", [batch, groups * 64, 2]),
                ("S32", [batch, groups, 4]),
                ("U8", [batch, 1, tokens]),
                ("F32", [batch, kv_heads]),
            ],
            {"length_q": float(query[-3]), "query_lengths": 1.0, "key_lengths": 1.0}
            | {"left": 5.0, "right": -1.0, "bottom_right": 1.0},
        )
    if which == "sort_ids":
        ids = ("S32", [batch, tokens])
        tiles = -(-tokens // 128)
        ranges = [("S32", [batch, 2 * tiles, 2]), ("S32", [batch, tiles, 2])]
        slots = ("S32", [batch, tokens, 2])
        return [ids], [ids, ids, slots, ("S32", [batch]), *ranges], {}
    if which == "seen_keys":
        rows = ("S32", [batch, groups * 64, 2])
        array = [batch, heads, query[-3], tokens]
        return (
            [rows, ("PRED", array), ("BF16", array)],
            [("U8", [batch, kv_heads, tokens])],
            {"length_q": float(query[-3]), "mask": 1.0, "bias": 1.0},
        )
    if which.startswith("quantize"):
        v = quantized[5][1]
        channels = quantized[6][1][3]
        parts = ("F32", [*v[:2], 3, 6, channels])
        attrs = {"scale_log2": 0.2, "smooth_k": 1.0, "smooth_v": 0.0, "some_seen": 0.0}
        attrs |= {"segments": 0.0, "own_segments": 0.0, "skip_unseen": 0.0}
        arrivals = ("S32", [*v[:2], 2])
        args = [describe(q), describe(k), describe(k)]
        if which == "quantize of seen":
            attrs |= {"some_seen": 1.0, "skip_unseen": 1.0}
            args += [("U8", [batch, kv_heads, tokens]), ("F32", [batch, kv_heads])]
        if which == "quantize of segments":
            attrs |= {"some_seen": 1.0, "segments": 1.0}
            args += [
                ("U8", [batch, kv_heads, tokens]),
                ("S32", [batch, groups * 64]),
                ("S32", [batch, tokens]),
                ("S32", [batch, tokens]),
                ("S32", [batch, tokens, 2]),
                ("S32", [batch, groups * 64, 2]),
            ]
            scratch = [
                ("F32", [batch, kv_heads, 2, 3, 6, channels]),
                ("S32", [batch, kv_heads, 2, 2, 3]),
                ("BF16", [batch, kv_heads, tokens, channels]),
                ("F32", [batch, kv_heads, tokens, 2]),
                ("U32", [batch, kv_heads, tokens, channels, 2]),
                ("S32", [batch, kv_heads, 2, 3]),
                ("S32", [batch, kv_heads, 2]),
                ("S32", [batch, tokens, 4]),
                ("S32", [batch, 3]),
                ("S32", [batch, -(-groups // 4)]),
            ]
            return args, [*by_slot(quantized, tokens), *scratch], attrs
        return args, [*quantized, parts, arrivals], attrs
    attrs = {
        "length_kv": float(key[-3]),
        "is_causal": 1.0,
        "alike": 0.0,
        "with_lse": 0.0,
        "pv_accumulator": 16.0,
        "mma_sync": 0.0,
        **dict.fromkeys(("masked", "mask", "segments", "bias", "counted", "by_intervals"), 0.0),
    }
    if which in ("attention with masks", "attention with segments"):
        attrs |= dict.fromkeys(("masked", "mask", "bias"), 1.0) | {"is_causal": 0.0}
        segments = which == "attention with segments"
        attrs["segments"], attrs["counted"] = float(segments), float(not segments)
        quantized = (
            by_slot(quantized, tokens) if segments else [*quantized, ("F32", [batch, kv_heads])]
        )
        ids = [
            ("S32", [batch, groups * 64]),
            ("S32", [batch, tiles * 128]),
            ("S32", [batch, groups, 2]),
            ("S32", [batch, tiles, 2]),
        ]
        quantized += [
            ("S32", [batch, groups * 64, 2]),
            ("S32", [batch, groups, 4]),
            describe(k),
            describe(k),
            ("U32", [batch, heads, tiles, groups * 64, 4]),
            ("U8", [batch, heads, groups, tiles]),
            *(ids if segments else []),
            ("F16", [batch, heads, query[-3], tiles * 128]),
            *([("S32", [batch])] if segments else []),
        ]
    return quantized, [describe(q), ("F32", list(query[:-1]))], attrs


def by_slot(quantized, tokens):
    """With segments the channels are another buffer, and there are slots in place of sums."""
    batch, kv_heads, _, table = quantized[6][1]
    channels = ("F32", [batch, kv_heads, tokens, 2, table])
    queries = quantized[0][1][2]
    slots = ("S32", [batch, queries])
    rows, groups = ("S32", [batch, queries, 2]), ("S32", [batch, queries // 64, 4])
    return [*quantized[:6], channels, quantized[7], slots, rows, groups]


BY_SLOT = [*QUANTIZED[:8], "query_slots", "segment_rows", "segment_groups"]
SCRATCH_BY_SLOT = ["partials", "piece_counts", "slot_means", "slot_factors", "value_code_sum",
                   "piece_arrivals", "arrivals", "runs", "part_slots", "block_slots"]  # fmt: skip
MASKS = ["rows", "groups", "key", "value", "words", "views"]
IDS = ["query_ids", "key_ids", "query_ranges", "key_ranges"]
NAMES = {
    "quantize": (["query", "key", "value"], [*QUANTIZED, "partials", "arrivals"]),
    "quantize of seen": (
        ["query", "key", "value", "seen", "per_counted_key"],
        [*QUANTIZED, "partials", "arrivals"],
    ),
    "quantize of segments": (
        ["query", "key", "value", "seen", "query_ids", "sorted_ids", "order", "key_slots", "rows"],
        [*BY_SLOT, *SCRATCH_BY_SLOT],
    ),
    "attention": (QUANTIZED, ["out", "lse"]),
    "attention with masks": ([*QUANTIZED, "per_counted_key", *MASKS, "bias"], ["out", "lse"]),
    "attention with segments": ([*BY_SLOT, *MASKS, *IDS, "bias", "scattered"], ["out", "lse"]),
    "pack_mask": (["mask"], ["words", "views"]),
    "seen_keys": (["rows", "mask", "bias"], ["seen"]),
    "intervals": (
        ["query_lengths", "key_lengths"],
        ["rows", "groups", "seen", "per_counted_key"],
    ),
    "sort_ids": (
        ["ids"],
        ["sorted_ids", "order", "slots", "scattered", "group_ranges", "tile_ranges"],
    ),
}
OF_NO_RECIPE = ("pack_mask", "seen_keys", "intervals", "sort_ids")
CALLS = [(which, recipe) for which in NAMES if which not in OF_NO_RECIPE for recipe in RECIPES]
CALLS += [(which, "8+8") for which in OF_NO_RECIPE]


def complaint(which, args, results, attrs):
    return getattr(kernels.module(), f"check_{which.split()[0]}")(args, results, attrs)


@needs_module
@pytest.mark.parametrize(("which", "recipe"), CALLS)
def test_right_calls_pass(which, recipe):
    for head_dim in (80, 150):  # of the second, tables have more channels than codes
        call = right_call(which, recipe, (2, 300, 4, head_dim), (2, 1100, 2, head_dim))
        assert complaint(which, *call) is None
    if which not in ("quantize", "attention"):
        return
    shapes = [((300, 4, 128), (64, 1, 128)), ((1, 2, 3, 1, 4, 1), (1, 2, 3, 1100, 4, 1))]
    for query, key in shapes:
        call = right_call(which, recipe, query, key)
        if which == "quantize":
            call[1][9][1][2] = 1  # any number of parts up to the number of keys is right
        assert complaint(which, *call) is None


# Multiples of what they are padded to: any other size shows in the padded ones.
TIGHT = {"query": (2, 384, 4, 64), "key": (2, 1088, 2, 64)}


def corruptions(which, recipe):
    """Each wrong buffer: (name, side, index in it, buffer). Side 0: arguments, 1: results."""
    call = right_call(which, recipe, **TIGHT)
    for side in (0, 1):
        for i, (dtype, dims) in enumerate(call[side]):
            name = NAMES[which][side][i]
            for other in ("F64", "S8" if dtype != "S8" else "U8"):
                yield name, side, i, (other, dims)
            yield name, side, i, (dtype, [])
            yield name, side, i, (dtype, dims[1:])
            yield name, side, i, (dtype, [*dims, 1])
            for axis, size in enumerate(dims):
                for wrong in (size + 1, size * 2, 0, -1, 1 << 40):
                    if name == "partials" and axis == 2 and 0 < wrong <= TIGHT["key"][1]:
                        if which != "quantize of segments":  # which counts by part too
                            continue  # any number of parts is right
                    if name == "seen" and side == 1 and axis == 1 and wrong == 2 * size:
                        continue  # as many heads of K as of Q
                    if which == "intervals" and 0 < wrong <= 2 * size:
                        if (name, axis) in (("seen", 2), ("per_counted_key", 1)):
                            continue  # other numbers of keys, and of heads
                    if which == "pack_mask" and name == "mask" and axis == 3 and wrong == size + 1:
                        continue  # another mask, in as many tiles
                    yield name, side, i, (dtype, [*dims[:axis], wrong, *dims[axis + 1 :]])


@needs_module
@pytest.mark.parametrize(("which", "recipe"), CALLS)
def test_each_wrong_buffer_is_reported(which, recipe):
    tried = 0
    for name, side, i, buffer in corruptions(which, recipe):
        call = right_call(which, recipe, **TIGHT)
        call[side][i] = buffer
        message = complaint(which, *call)
        where = f"{which}: {name} = {buffer}"
        assert message is not None, where
        assert message.startswith(f"jax_sage: {which.split()[0]}: "), (where, message)
        # A wrong size of an argument may only be seen in a buffer that does not fit it.
        names = [*NAMES[which][0], *NAMES[which][1], "heads"]
        assert any(re.search(rf"\b{n}\b", message) for n in names), message
        tried += 1
    assert tried > (20 if which in OF_NO_RECIPE else 100)


@needs_module
@pytest.mark.parametrize(("which", "recipe"), CALLS)
def test_wrong_dtypes_are_named(which, recipe):
    """A wrong dtype contradicts nothing else: the message must name that very buffer."""
    for side in (0, 1):
        for i, name in enumerate(NAMES[which][side]):
            call = right_call(which, recipe)
            call[side][i] = ("C64", call[side][i][1])
            check = which.split()[0]
            assert f"jax_sage: {check}: {name} is C64" in complaint(which, *call)


@needs_module
@pytest.mark.parametrize(
    ("which", "name", "wrong"),
    [
        ("quantize", "scale_log2", [math.inf, math.nan]),
        ("quantize", "smooth_k", [2, -1, 0.5]),
        ("quantize", "smooth_v", [2, -1, math.nan]),
        ("quantize", "some_seen", [2, -1, math.nan]),
        ("quantize", "skip_unseen", [1, 2, -1, math.nan]),
        ("quantize of segments", "skip_unseen", [1]),
        ("quantize", "own_segments", [1, 2, -1]),
        ("quantize of segments", "own_segments", [1, 2, -1]),  # of fewer queries than keys
        ("quantize", "segments", [2, -1, math.nan]),
        ("quantize of seen", "segments", [2]),
        ("attention", "masked", [2, -1, math.nan]),
        ("attention with masks", "is_causal", [1, 2]),
        ("attention with masks", "mask", [2, -1]),
        ("attention with masks", "segments", [2, -1]),
        ("attention with masks", "bias", [2, -1]),
        ("attention with masks", "counted", [2, -1]),
        ("attention with segments", "counted", [1]),
        ("attention with segments", "by_intervals", [1, 2, -1]),  # there are a mask and a bias too
        ("attention with masks", "by_intervals", [1]),
        ("attention", "is_causal", [2, -1, math.nan]),
        ("attention", "alike", [2, -1, math.nan]),
        ("attention", "with_lse", [2, -1, math.nan]),
        ("attention", "pv_accumulator", [0, 8, 17, 64, math.nan]),
        ("attention", "mma_sync", [2, -1, math.nan]),
        ("attention", "length_kv", [0, -1, 2.0**31, 2.0**40, math.nan]),
        ("seen_keys", "length_q", [0, -1, 2.0**31, math.nan]),
        ("intervals", "length_q", [0, -1, 2.0**31, math.nan]),
        ("intervals", "left", [-2, 2.0**33, math.nan]),
        ("intervals", "right", [-2, 2.0**33, math.nan]),
        ("intervals", "bottom_right", [2, -1]),
        ("intervals", "query_lengths", [2, -1]),
        ("intervals", "key_lengths", [2, -1]),
        ("seen_keys", "mask", [2, -1]),
        ("seen_keys", "bias", [2, -1]),
    ],
)
def test_wrong_attributes_are_named(which, name, wrong):
    for value in [None, *wrong]:
        args, results, attrs = right_call(which)
        if value is None:
            del attrs[name]
        else:
            attrs[name] = value
        message = complaint(which, args, results, attrs)
        assert message is not None, f"{name} = {value}"
        assert f"attribute {name}" in message


@needs_module
def test_length_kv_must_fit_the_buffers():
    """1100 keys are padded to 1152: 1089 to 1152 fit, others would read past the end."""
    for length, fits in ((1088, False), (1089, True), (1152, True), (1153, False)):
        args, results, attrs = right_call("attention")
        message = complaint("attention", args, results, {**attrs, "length_kv": length})
        assert (message is None) == fits


@needs_module
def test_masks_may_have_ones():
    """For a dimension that is alike for all."""
    args, results, attrs = right_call("attention with segments")
    names = NAMES["attention with segments"][0]
    for name, axis in [
        ("rows", 0), ("groups", 0), ("words", 0), ("words", 1), ("words", 2), ("words", 3),
        ("views", 2), ("views", 3),
        ("query_ids", 0), ("key_ranges", 0), ("bias", 0), ("bias", 1), ("bias", 2),
    ]:  # fmt: skip
        dtype, dims = args[names.index(name)]
        args[names.index(name)] = (dtype, [*dims[:axis], 1, *dims[axis + 1 :]])
        assert complaint("attention", args, results, attrs) is None, (name, axis)
    bias = names.index("bias")
    dtype, dims = args[bias]
    args[bias] = (dtype, [*dims[:3], 2])  # two columns stand for all keys
    assert complaint("attention", args, results, attrs) is None
    args[bias] = (dtype, [1] * 4)
    assert "bias is F16" in complaint("attention", args, results, attrs)
    # Whose segments are scattered is said of as many entries as have ids of their own.
    args, results, attrs = right_call("attention with segments")
    for name in ("key_ids", "scattered"):
        dtype, dims = args[names.index(name)]
        args[names.index(name)] = (dtype, [1, *dims[1:]])
        complaints = complaint("attention", args, results, attrs)
        assert (complaints is None) == (name == "scattered"), complaints


@needs_module
def test_intervals_that_no_array_decides_are_constants():
    """Making them takes launches; beyond so many queries they are made, not part of the program."""
    for length, padded, constant in ((600, 640, True), (20000, 20096, False)):
        text = lower((1, length, 2, 64), local_window_size=(30, 30))
        rows = f"tensor<1x{padded}x2xi32>"
        assert rows in custom_calls(text)["jax_sage_attention"]
        assert (re.search(f"constant dense<.*> : {rows}", text) is not None) == constant


@needs_module
@pytest.mark.parametrize(
    ("options", "alike"),
    [
        ({}, True),
        ({"is_causal": True}, False),
        ({"local_window_size": (30, 30)}, True),
        ({"local_window_size": (200, 30)}, False),  # cut off at one end for many
        ({"is_causal": True, "local_window_size": 20}, True),
        ({"is_causal": True, "local_window_size": 300}, False),
        ({"query_seq_lengths": np.array([7])}, True),
    ],
    ids=str,
)
def test_whether_queries_see_about_as_many_keys_each(options, alike):
    calls = custom_calls(lower((1, 600, 2, 64), **options))
    assert attribute(calls["jax_sage_attention"], "alike") == (str(int(alike)), "i64")


@needs_module
def test_seen_keys_may_have_ones():
    args, results, attrs = right_call("seen_keys")
    for i, axis in [(0, 0), *((i, axis) for i in (1, 2) for axis in range(4))]:
        dtype, dims = args[i]
        args[i] = (dtype, [*dims[:axis], 1, *dims[axis + 1 :]])
        assert complaint("seen_keys", args, results, attrs) is None, (i, axis)
        if (i, axis) == (1, 1):  # the bias has heads of its own; the result must not have others
            wrong = [("U8", [2, 3, 1100])]
            assert "seen" in complaint("seen_keys", args, wrong, attrs)
    # Neither has heads of its own by now: one of the result may stand for all.
    assert complaint("seen_keys", args, [("U8", [2, 1, 1100])], attrs) is None


@needs_module
def test_mask_and_bias_of_other_numbers_of_heads_are_reported():
    args, results, attrs = right_call("seen_keys")
    dtype, (batch, heads, *rest) = args[1]
    args[1] = (dtype, [batch, heads // 2, *rest])
    assert "mask" in complaint("seen_keys", args, results, attrs)


@needs_module
def test_masks_need_to_know_how_many_keys_count():
    args, results, attrs = right_call("attention with masks")
    without = [x for x, name in zip(args, NAMES["attention with masks"][0], strict=True)
               if name != "per_counted_key"]  # fmt: skip
    message = complaint("attention", without, results, attrs | {"counted": 0.0})
    assert "mask and bias need counted" in message


@needs_module
def test_ids_may_be_alike_for_all_batch_entries():
    args, results, attrs = right_call("quantize of segments")
    for i in range(3, 9):
        args[i] = (args[i][0], [1, *args[i][1][1:]])
        # The sorted ids, whose they are, and the slots belong together.
        assert (complaint("quantize", args, results, attrs) is None) == (i not in (5, 6))
    # Without the array that says which keys are seen, all are.
    attrs["some_seen"] = 0.0
    assert "9 arguments, expected 8" in complaint("quantize", args, results, attrs)
    args, results, _ = right_call("quantize of segments")
    assert complaint("quantize", [*args[:3], *args[4:]], results, attrs) is None


@needs_module
@pytest.mark.parametrize("which", NAMES)
def test_wrong_counts_are_reported(which):
    for side, kind in ((0, "arguments"), (1, "results")):
        for change in (lambda x: x[:-1], lambda x: [*x, x[-1]], lambda x: []):
            call = list(right_call(which))
            call[side] = change(call[side])
            assert f"{len(call[side])} {kind}, expected" in complaint(which, *call)


@needs_module
@pytest.mark.parametrize(
    ("query", "key", "message"),
    [
        ((2, 300, 5, 80), (2, 1100, 2, 80), "5 query heads are not a multiple of 2"),
        ((2, 300, 4, 257), (2, 1100, 2, 257), "head_dim is 257, allowed: 1 to 256"),
        ((3, 300, 4, 80), (2, 1100, 2, 80), "does not fit query"),
        ((2, 300, 4, 64), (2, 1100, 2, 80), "does not fit query"),
    ],
)
def test_inputs_that_do_not_fit_together(query, key, message):
    args, results, attrs = right_call("quantize")
    args = [("BF16", list(query)), ("BF16", list(key)), ("BF16", list(key))]
    assert message in complaint("quantize", args, results, attrs)
