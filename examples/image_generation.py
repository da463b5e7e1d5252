"""Trains a small diffusion transformer, then samples it with exact and with quantized attention.

The model generates images by flow matching, in Flax NNX. It calls ``jax.nn.dot_product_attention``,
as many models do, and is not changed for jax_sage: one line around the sampling swaps that,

    with jax_sage.patch():
        images = sample(model, noise, labels)

The program trains on images that a package from PyPI ships, samples both ways from the same noise,
and shows the images side by side, with the PSNR between them, the Fréchet distance of each to the
real images, and the time. It takes about five minutes on two CPU cores, on digits:

    python examples/image_generation.py

On a GPU it trains on photographs, in bfloat16, at a token a pixel: 16384 tokens an image.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

import jax_sage


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model, of its training and of its sampling. The defaults suit two CPU cores."""

    images: Literal["digits", "photographs"] = "digits"
    size: int = 8  # pixels; each is a token
    layers: int = 4
    heads: int = 2
    head_dim: int = 64
    batch_size: int = 32
    steps: int = 800
    learning_rate: float = 2e-3
    samples: int = 128  # images that are generated
    sample_batch: int = 64
    sample_steps: int = 24
    dtype: Any = jnp.float32  # of the activations; parameters are float32
    implementation: Literal["xla", "cudnn"] | None = None  # of exact attention


GPU = Config(
    images="photographs",
    size=128,
    layers=6,
    heads=4,
    head_dim=128,
    batch_size=2,
    steps=600,
    learning_rate=1e-3,
    samples=16,
    sample_batch=4,
    sample_steps=32,
    dtype=jnp.bfloat16,
    implementation="cudnn",  # the fast one to compare with
)


# --- Images ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Images:
    """Real images and their classes; `draw` makes a batch of them."""

    pictures: list[np.ndarray]  # [H, W, channels] each, float32 from -1 to 1
    labels: np.ndarray  # int [n]
    classes: list[str]
    size: int

    @property
    def channels(self) -> int:
        return int(self.pictures[0].shape[-1])

    def draw(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Random images [count, size, size, channels], crops of larger ones, and their labels."""
        label = rng.integers(0, len(self.classes), count)
        result = []
        for one in label:
            picture = self.pictures[rng.choice(np.flatnonzero(self.labels == one))]
            top, left = (rng.integers(0, n - self.size + 1) for n in picture.shape[:2])
            result.append(picture[top : top + self.size, left : left + self.size])
        return np.stack(result), label


def load_images(config: Config) -> Images:
    if config.images == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        pictures = list((digits.images[..., None] / 8 - 1).astype(np.float32))
        return Images(pictures, digits.target, [str(i) for i in range(10)], config.size)
    import skimage.data
    import skimage.transform

    names = ["astronaut", "cat", "coffee", "rocket", "hubble_deep_field", "retina"]
    pictures = []
    for name in names:
        picture = getattr(skimage.data, name)()
        # So that a crop shows more than a texture.
        height, width = (max(round(n * 300 / min(picture.shape[:2])), 1) for n in picture.shape[:2])
        scaled = skimage.transform.resize(picture, (height, width), anti_aliasing=True)
        pictures.append((2 * scaled - 1).astype(np.float32))
    return Images(pictures, np.arange(len(names)), names, config.size)


# --- Model ----------------------------------------------------------------------------------------


def sinusoids(positions: jax.Array, width: int) -> jax.Array:
    """[...] -> [..., width]"""
    frequencies = 100.0 ** (-jnp.arange(width // 2) / (width // 2))
    angles = positions[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Block(nnx.Module):
    """Transformer block whose norms are shifted and scaled by time and class (adaLN-zero)."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        width = config.heads * config.head_dim
        linear = functools.partial(nnx.Linear, dtype=config.dtype, rngs=rngs)
        self.heads, self.implementation = config.heads, config.implementation
        norm = functools.partial(
            nnx.LayerNorm, use_bias=False, use_scale=False, dtype=config.dtype, rngs=rngs
        )
        self.attention_norm, self.mlp_norm = norm(width), norm(width)
        self.modulation = linear(width, 6 * width, kernel_init=nnx.initializers.zeros)
        self.qkv = linear(width, 3 * width)
        self.projection = linear(width, width)
        self.mlp_in = linear(width, 4 * width)
        self.mlp_out = linear(4 * width, width)

    def __call__(
        self, x: jax.Array, condition: jax.Array
    ) -> jax.Array:  # [B, T, width], [B, width]
        modulation = self.modulation(nnx.silu(condition))[:, None]
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = jnp.split(modulation, 6, axis=-1)
        y = self.attention_norm(x) * (1 + scale) + shift
        q, k, v = jnp.split(self.qkv(y).reshape(*x.shape[:2], 3 * self.heads, -1), 3, axis=2)
        y = jax.nn.dot_product_attention(q, k, v, implementation=self.implementation)
        x = x + gate * self.projection(y.reshape(x.shape))
        y = self.mlp_norm(x) * (1 + mlp_scale) + mlp_shift
        return x + mlp_gate * self.mlp_out(nnx.gelu(self.mlp_in(y)))


class DiffusionTransformer(nnx.Module):
    """Predicts the velocity of each pixel; a pixel is a token."""

    def __init__(self, images: Images, config: Config, rngs: nnx.Rngs):
        width = config.heads * config.head_dim
        linear = functools.partial(nnx.Linear, dtype=config.dtype, rngs=rngs)
        self.width, self.dtype = width, config.dtype
        self.pixels = linear(images.channels, width)
        self.classes = nnx.Embed(len(images.classes), width, dtype=config.dtype, rngs=rngs)
        self.time_in, self.time_out = linear(width, width), linear(width, width)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.LayerNorm(width, dtype=config.dtype, rngs=rngs)
        self.velocity = linear(width, images.channels, kernel_init=nnx.initializers.zeros)

    def __call__(
        self,
        x: jax.Array,  # [B, height, width, channels]
        time: jax.Array,  # [B], from 0, noise, to 1, an image
        label: jax.Array,  # int [B]
    ) -> jax.Array:
        batch, rows, columns, channels = x.shape
        down, across = jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij")
        place = jnp.concatenate(
            [sinusoids(y.astype(jnp.float32), self.width // 2) for y in (down, across)], axis=-1
        )
        tokens = self.pixels(x.reshape(batch, rows * columns, channels))
        tokens = tokens + place.reshape(1, rows * columns, self.width).astype(self.dtype)
        clock = sinusoids(100 * time, self.width).astype(self.dtype)
        condition = self.time_out(nnx.silu(self.time_in(clock))) + self.classes(label)
        for block in self.blocks:
            tokens = block(tokens, condition)
        return self.velocity(self.norm(tokens)).astype(jnp.float32).reshape(x.shape)


# --- Flow matching --------------------------------------------------------------------------------


@nnx.jit
def train_step(
    model: DiffusionTransformer,
    optimizer: nnx.Optimizer,
    image: jax.Array,
    label: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """Between noise and an image lies a straight line; the model learns the velocity along it."""
    noise_key, time_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, image.shape)
    time = jax.nn.sigmoid(jax.random.normal(time_key, image.shape[:1]))

    def loss(model: DiffusionTransformer) -> jax.Array:
        t = time[:, None, None, None]
        predicted = model((1 - t) * noise + t * image, time, label)
        return jnp.mean((predicted - (image - noise)) ** 2)

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


def train(model: DiffusionTransformer, images: Images, config: Config) -> list[float]:
    """The loss of each step."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.steps // 10, config.steps
    )
    transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
    rng = np.random.default_rng(0)
    losses: list[jax.Array] = []
    with tqdm(total=config.steps, desc="training", unit="step") as progress:
        for key in jax.random.split(jax.random.key(0), config.steps):
            image, label = images.draw(rng, config.batch_size)
            losses.append(train_step(model, optimizer, jnp.asarray(image), jnp.asarray(label), key))
            if len(losses) % 10 == 0:  # reading a loss waits for the device
                progress.set_postfix_str(f"loss {float(losses[-1]):.3f}")
            progress.update()
    return [float(x) for x in losses]


@functools.partial(nnx.jit, static_argnames="steps")
def sample(
    model: DiffusionTransformer, noise: jax.Array, label: jax.Array, steps: int
) -> jax.Array:
    """Follows the velocity from noise to images by Euler's method."""
    graph, state = nnx.split(model)

    def step(x: jax.Array, time: jax.Array) -> tuple[jax.Array, None]:
        velocity = nnx.merge(graph, state)(x, jnp.full(x.shape[:1], time), label)
        return x + velocity / steps, None

    return jax.lax.scan(step, noise, jnp.arange(steps) / steps)[0]


@dataclasses.dataclass
class Samples:
    """What was generated, and how long a batch took."""

    images: np.ndarray  # [n, size, size, channels]
    seconds: float


def generate(
    model: DiffusionTransformer, noise: np.ndarray, label: np.ndarray, config: Config, name: str
) -> Samples:
    batches = []
    seconds = []
    starts = range(0, len(noise), config.sample_batch)
    for start in tqdm(starts, desc=f"sampling, {name} attention", unit="batch"):
        part = slice(start, start + config.sample_batch)
        arrays = jnp.asarray(noise[part]), jnp.asarray(label[part])
        for _ in range(2 if start == 0 else 1):  # the first time compiles
            begin = time.perf_counter()
            result = np.asarray(sample(model, *arrays, steps=config.sample_steps))
            elapsed = time.perf_counter() - begin
        batches.append(result)
        seconds.append(elapsed)
    return Samples(np.clip(np.concatenate(batches), -1, 1), statistics.median(seconds))


# --- Metrics --------------------------------------------------------------------------------------


def psnr(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of each pair, in decibels: 20 log10(range / RMSE), the range is 2."""
    error = ((images.astype(np.float64) - others) ** 2).mean((1, 2, 3))
    return 10 * np.log10(4 / np.maximum(error, 1e-12))


def features(images: np.ndarray) -> np.ndarray:
    """[n, 64] of a fixed random network: two convolutions, averaged over the image's quarters."""
    keys = jax.random.split(jax.random.key(0), 2)
    x = jnp.asarray(images, jnp.float32)
    for key, channels, stride in zip(keys, (32, 16), (1, 2), strict=True):
        kernel = jax.random.normal(key, (3, 3, x.shape[-1], channels)) / (3 * x.shape[-1] ** 0.5)
        x = jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = nnx.relu(x)
    half = x.shape[1] // 2
    quarters = [x[:, a : a + half, b : b + half] for a in (0, half) for b in (0, half)]
    return np.asarray(jnp.concatenate([q.mean((1, 2)) for q in quarters], -1), np.float64)


def frechet_distance(images: np.ndarray, others: np.ndarray) -> float:
    """|m - m'|² + tr(C + C' - 2 (C C')^½), of the features' means and covariances."""
    (mean, covariance), (other_mean, other_covariance) = (
        (f.mean(0), np.cov(f, rowvar=False)) for f in map(features, (images, others))
    )
    # tr((C C')^½): the eigenvalues of C C' are those of a positive matrix.
    roots = np.sqrt(np.maximum(np.linalg.eigvals(covariance @ other_covariance).real, 0))
    trace = np.trace(covariance) + np.trace(other_covariance) - 2 * roots.sum()
    return float(((mean - other_mean) ** 2).sum() + trace)


# --- The whole ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Result:
    real: np.ndarray
    exact: Samples
    quantized: dict[str, Samples]  # by recipe
    losses: list[float]
    report: str  # what was swapped


def run(config: Config, recipes: tuple[str, ...] = ("8+8", "8+16")) -> Result:
    """Trains, and samples with exact attention and each recipe from the same noise."""
    images = load_images(config)
    model = DiffusionTransformer(images, config, nnx.Rngs(0))
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    print(
        f"{len(images.pictures)} {config.images}, {config.size} x {config.size} pixels, each a "
        f"token: {config.size**2} tokens; {config.layers} layers, {config.heads} heads of "
        f"{config.head_dim}, {parameters / 1e6:.1f} M parameters"
    )
    losses = train(model, images, config)

    rng = np.random.default_rng(1)
    real, _ = images.draw(rng, max(config.samples, 256))
    noise = rng.standard_normal((config.samples, *real.shape[1:])).astype(np.float32)
    label = np.arange(config.samples) % len(images.classes)
    exact = generate(model, noise, label, config, "exact")
    quantized = {}
    for recipe in recipes:
        policy = jax_sage.Policy(jax_sage.Rule(recipe=recipe))
        with jax_sage.patch(policy, strict=True) as report:  # the swap
            quantized[recipe] = generate(model, noise, label, config, recipe)
    return Result(real, exact, quantized, losses, str(report))


def measure(result: Result, config: Config) -> dict[str, dict[str, float]]:
    """Of each attention: seconds a batch, and, for quantized ones, how near the exact images."""
    half = len(result.real) // 2
    table = {
        "real images": {"frechet": frechet_distance(result.real[:half], result.real[half:])},
        "exact": {
            "frechet": frechet_distance(result.exact.images, result.real),
            "seconds": result.exact.seconds,
        },
    }
    for recipe, samples in result.quantized.items():
        decibels = psnr(samples.images, result.exact.images)
        table[recipe] = {
            "frechet": frechet_distance(samples.images, result.real),
            "seconds": samples.seconds,
            "speedup": result.exact.seconds / samples.seconds,
            "psnr_mean": float(decibels.mean()),
            "psnr_worst": float(decibels.min()),
        }
    return table


def describe(table: dict[str, dict[str, float]], config: Config) -> str:
    lines = [
        "",
        f"{'attention':<14}{'Fréchet distance':<19}{'PSNR to exact, mean (worst)':<30}"
        f"{f'time of {config.sample_batch} images':>20}",
    ]
    for name, row in table.items():
        near = ""
        if "psnr_mean" in row:
            near = f"{row['psnr_mean']:.1f} dB ({row['psnr_worst']:.1f} dB)"
        took = f"{row['seconds']:.3f} s" if "seconds" in row else ""
        speed = f"  {row['speedup']:.2f}x" if "speedup" in row else ""
        lines.append(f"{name:<14}{row['frechet']:<19.4f}{near:<30}{took:>20}{speed}")
    lines += [
        "",
        "The Fréchet distance is that of features of a fixed random network to real images; that",
        "of the real images is of one half to the other. PSNR above 30 dB is hard to see.",
    ]
    return "\n".join(lines)


def plot(result: Result, table: dict[str, dict[str, float]], config: Config, path: Path) -> None:
    """Writes rows of images: real, exact, and each recipe with its difference to exact."""
    columns = min(10, config.samples)
    rows = [
        ("real", result.real),
        (f"exact attention\n{_distance(table['exact'])}", result.exact.images),
    ]
    for recipe, samples in result.quantized.items():
        row = table[recipe]
        title = f"jax_sage {recipe}\n{_distance(row)}\nPSNR {row['psnr_mean']:.1f} dB"
        rows.append((title, samples.images))
        difference = np.abs(samples.images - result.exact.images)
        # As large as the picture allows.
        factor = 10 ** int(np.log10(1 / max(np.quantile(difference, 0.999), 1e-6)))
        title = f"{factor} x difference\n{recipe} to exact"
        rows.append((title, np.clip(2 * factor * difference - 1, -1, 1)))
    figure = Figure(figsize=(2.2 + 1.15 * columns, 0.6 + 1.2 * len(rows)), layout="constrained")
    figure.suptitle(
        "A diffusion transformer sampled from the same noise with exact and quantized attention"
    )
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for (title, pictures), line in zip(rows, axes, strict=True):
        for picture, panel in zip(pictures, line, strict=False):
            panel.imshow((picture.squeeze() + 1) / 2, cmap="gray", vmin=0, vmax=1)
            panel.set(xticks=[], yticks=[])
        line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
    figure.savefig(path, dpi=110)


def _distance(row: dict[str, float]) -> str:
    return f"Fréchet distance {row['frechet']:.3f}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--size", type=int, help="pixels of a side of the images")
    parser.add_argument("--output", type=Path, default=Path("image_generation.png"))
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args(argv)

    on_gpu = jax.default_backend() == "gpu"
    config = GPU if on_gpu else Config()
    given = {name: getattr(args, name) for name in ("steps", "size")}
    config = dataclasses.replace(config, **{k: v for k, v in given.items() if v is not None})
    largest = 300 if config.images == "photographs" else 8
    if config.steps < 1 or not 4 <= config.size <= largest:
        parser.error(f"--steps is at least 1, and --size from 4 to {largest}, of {config.images}")

    start = time.perf_counter()
    if not on_gpu:
        print("No GPU: jax_sage runs in plain JAX: the numerics of the kernels, not their speed.")
    result = run(config)
    table = measure(result, config)
    print(f"\n{result.report}")
    print(describe(table, config))
    if not on_gpu:
        print("The times are of this CPU and say nothing about a GPU.")
    plot(result, table, config, args.output)
    if args.json:
        sizes = dataclasses.asdict(config) | {"dtype": jnp.dtype(config.dtype).name}
        device = jax.local_devices()[0].device_kind
        content = {"device": device, "config": sizes, "results": table}
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    print(f"Wrote {args.output}. Total time: {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
