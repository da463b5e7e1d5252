"""The example language model: it learns, and quantized attention does not change its score."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

for module in ("flax", "optax", "matplotlib", "tqdm"):
    pytest.importorskip(module, reason=f"{module} is not installed: pip install jax_sage[examples]")

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "language_model.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("language_model", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def config(example):
    return example.Config(context=128, layers=2, heads=2, head_dim=32, batch_size=8, steps=24)


@pytest.fixture(scope="module")
def trained(example, config):
    return example.run(config)


def test_no_passage_is_in_both_texts(example):
    train, held_out = example.load_text()
    assert 0.1 < len(held_out) / (len(train) + len(held_out)) < 0.4
    length = 100  # characters; shorter phrases do recur in documentation
    passages = {train[i : i + length] for i in range(len(train) - length + 1)}
    starts = range(0, len(held_out) - length + 1)
    shared = [held_out[i : i + length] for i in starts if held_out[i : i + length] in passages]
    assert not shared, shared[0]


def test_windows_predict_each_token_once(example):
    windows = example.cut_windows(np.arange(101), 10)
    np.testing.assert_array_equal(windows[:, 1:].ravel(), np.arange(1, 101))


def test_loss_falls(trained):
    curves, _ = trained
    held_out = list(curves.held_out.values())
    assert np.isfinite(curves.train).all()
    assert held_out[-1] < held_out[0] - 1  # bits per character
    assert np.mean(curves.train[-5:]) < np.mean(curves.train[:5]) - 1


def test_score_is_that_of_exact_attention(example, trained):
    _, results = trained
    exact = results["exact"].bits
    assert 1 < exact.mean() < 6  # log2 of about 100 characters is 6.6
    _, noise = example.mean_and_error(exact)
    for name in example.RECIPES:
        assert abs(results[name].bits.mean() - exact.mean()) < noise
        assert (results[name].bits != exact).any()  # the attention was in fact replaced


def test_layer_errors(example, config, trained):
    _, results = trained
    # Rounding alone, for values spread evenly over their range: INT8 scores and E4M3 P and V (3
    # bits of mantissa, at most 1/16 off each) give 2 to 5 %; FP16 leaves what INT8 scores do,
    # below 1.5 %.
    bounds = {"8+8": 0.05, "8+16": 0.015}
    for name in example.RECIPES:
        errors = results[name].layer_errors
        assert len(errors) == config.layers
        assert 0 < min(errors) and max(errors) < bounds[name]
    assert max(results["exact"].layer_errors) < 1e-4  # float32 on every platform but TPU


def test_swapping_attention_back_gives_the_same_score(example, config):
    from flax import nnx

    model = example.LanguageModel(100, config, nnx.Rngs(1))
    windows = np.random.default_rng(0).integers(0, 100, (8, config.context + 1), np.int32)
    before = example.evaluate(model, windows, 3)
    model.set_attention(example.RECIPES["8+8"])
    during = example.evaluate(model, windows, 3)
    model.set_attention(config.exact)
    np.testing.assert_array_equal(example.evaluate(model, windows, 3), before)
    assert (during != before).any()
    # Batches of 3 over 8 windows: the last batch overlaps the one before.
    np.testing.assert_allclose(example.evaluate(model, windows, 8), before, rtol=1e-5)


def test_gpu_config_needs_no_cudnn(example, capsys):
    config = example.gpu_config()
    fell_back = "cuDNN's does not run here" in capsys.readouterr().out
    assert fell_back == (config.exact is example.Config().exact)
    if jax.default_backend() == "cpu":
        assert fell_back


def test_bfloat16_as_on_a_gpu(example, config):
    from flax import nnx

    config = dataclasses.replace(config, layers=1, dtype=example.gpu_config().dtype)
    model = example.LanguageModel(100, config, nnx.Rngs(1))
    windows = np.random.default_rng(0).integers(0, 100, (4, config.context + 1), np.int32)
    exact = example.evaluate(model, windows, 4)
    errors = example.attention_errors(model, windows[:, :-1], {"exact": config.exact})
    assert 1e-4 < errors["exact"][0] < 1e-2  # a bfloat16 output is off by up to 2^-9
    model.set_attention(example.RECIPES["8+8"])
    np.testing.assert_allclose(example.evaluate(model, windows, 4), exact, rtol=0.02)


def test_report_and_plot(example, config, trained, tmp_path):
    curves, results = trained
    text = example.report(results, config)
    for name, result in results.items():
        assert f"{result.bits.mean():.4f}" in text
        assert name in text
    output = tmp_path / "language_model.png"
    example.plot(curves, results, config, output)
    assert output.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ([1.0, 1.1], "MORE than the uncertainty"),
        ([-1.0, -1.1], "MORE than the uncertainty"),
        ([1e-4, 1.1e-4], "times less than the uncertainty"),
        ([1e-4, -1.1e-4], "may as well be none"),
    ],
)
def test_report_says_what_a_difference_means(example, config, trained, change, verdict):
    _, results = trained
    exact = results["exact"].bits
    changed = exact + np.resize(change, exact.shape)
    changed = dataclasses.replace(results["8+8"], bits=changed)
    text = example.report({**results, "8+8": changed}, config)
    (line,) = [line for line in text.splitlines() if line.startswith("8+8 changes the score by")]
    assert verdict in line
