"""The example image generator: it learns, and quantized attention gives the same images."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

for module in ("flax", "optax", "matplotlib", "tqdm", "sklearn", "skimage"):
    pytest.importorskip(module, reason=f"{module} is not installed: pip install jax_sage[examples]")

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "image_generation.py"
pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("image_generation", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def config(example):
    return example.Config(
        layers=2, head_dim=32, batch_size=16, steps=60, samples=24, sample_batch=12, sample_steps=8
    )


@pytest.fixture(scope="module")
def result(example, config):
    return example.run(config)


def test_loss_falls(result):
    assert np.isfinite(result.losses).all()
    assert np.mean(result.losses[-5:]) < 0.8 * np.mean(result.losses[:5])


def test_the_same_images(example, config, result):
    """The same noise gives the same images; another attention is there, so not to the bit."""
    table = example.measure(result, config)
    assert set(table) == {"real images", "exact", "8+8", "8+16"}
    for recipe in ("8+8", "8+16"):
        assert result.quantized[recipe].images.shape == (24, 8, 8, 1)
        assert not np.array_equal(result.quantized[recipe].images, result.exact.images)
        # Attention is off by 4 %, the steps of the sampler average that: 50 dB and more. Images of
        # other noise are 10 dB apart.
        assert table[recipe]["psnr_worst"] > 35
        assert table[recipe]["frechet"] == pytest.approx(table["exact"]["frechet"], rel=0.02)
    assert table["8+16"]["psnr_mean"] > table["8+8"]["psnr_mean"]
    assert "1 swapped, 0 kept" in result.report
    text = example.describe(table, config)
    assert f"{table['8+8']['psnr_mean']:.1f} dB" in text


def test_picture(example, config, result, tmp_path):
    path = tmp_path / "images.png"
    example.plot(result, example.measure(result, config), config, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_command(example, monkeypatch, tmp_path, capsys):
    small = example.Config(
        layers=1, heads=1, head_dim=16, batch_size=4, steps=2, samples=8, sample_batch=4,
        sample_steps=2,
    )  # fmt: skip
    monkeypatch.setattr(example, "Config", lambda: small)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    output, figures = tmp_path / "x.png", tmp_path / "x.json"
    example.main(["--steps", "3", "--output", str(output), "--json", str(figures)])
    assert output.exists()
    content = json.loads(figures.read_text())
    assert content["config"]["steps"] == 3
    assert content["config"]["dtype"] == "float32"
    assert content["results"]["8+8"]["speedup"] > 0
    assert "No GPU" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        example.main(["--size", "99"])


def test_photographs(example):
    """What a GPU trains on comes with the package, without a download."""
    config = dataclasses.replace(example.GPU, size=32)
    images = example.load_images(config)
    batch, label = images.draw(np.random.default_rng(0), 5)
    assert batch.shape == (5, 32, 32, 3)
    assert batch.dtype == np.float32
    assert -1 <= batch.min() < -0.2 < 0.2 < batch.max() <= 1
    assert label.max() < len(images.classes) == 6


def test_metrics(example):
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (50, 8, 8, 3)).astype(np.float32)
    np.testing.assert_allclose(example.psnr(images, images + 0.02), 40, rtol=1e-4)
    assert example.frechet_distance(images, images) == pytest.approx(0, abs=1e-6)
    near, far = (example.frechet_distance(images, images * x) for x in (0.9, 0.3))
    assert 0 < near < far
    # Of features whose means alone differ, it is their squared distance.
    shift = np.linspace(0, 1, 64)
    features = example.features(images)
    example_features, example.features = example.features, lambda x: x
    try:
        distance = example.frechet_distance(features, features + shift)
    finally:
        example.features = example_features
    assert distance == pytest.approx((shift**2).sum(), rel=1e-6)


def test_bfloat16_as_on_a_gpu(example, config):
    """The model's dtypes fit together in half precision too."""
    model_config = dataclasses.replace(config, dtype=jnp.bfloat16)
    images = example.load_images(config)
    model = example.DiffusionTransformer(images, model_config, example.nnx.Rngs(0))
    image, label = images.draw(np.random.default_rng(0), 2)
    out = model(jnp.asarray(image), jnp.zeros(2), jnp.asarray(label))
    assert (out.shape, out.dtype) == (image.shape, jnp.float32)
