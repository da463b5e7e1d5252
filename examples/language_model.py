"""Trains a small transformer with exact attention, then evaluates it with quantized attention.

The model is a character-level language model in Flax NNX. Its attention is one attribute with the
signature of ``jax.nn.dot_product_attention``, so using jax_sage in a trained model is one line:

    block.attention_fn = jax_sage.attention

The program trains on the reference documentation that comes with every Python, evaluates on
topics that it has not trained on, and prints and plots bits per character with exact attention and
with each recipe of jax_sage, the error of each layer's attention, and the time of an evaluation.
It takes three to five minutes on two CPU cores:

    python examples/language_model.py

On a GPU it trains on longer sequences in bfloat16, and runs the CUDA kernels.
"""

import argparse
import dataclasses
import functools
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

import jax_sage

AttentionFn = Callable[..., jax.Array]

RECIPES: dict[str, AttentionFn] = {
    # The default recipe, and the more accurate one. A partial is hashed by identity: make it once,
    # not in the model's call, where each new one would compile the model again.
    "8+8": jax_sage.attention,
    "8+16": functools.partial(jax_sage.attention, recipe="8+16"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model and of its training. The defaults suit two CPU cores."""

    context: int = 512
    layers: int = 4
    heads: int = 2
    head_dim: int = 64
    batch_size: int = 4
    steps: int = 300
    learning_rate: float = 6e-3
    dtype: Any = jnp.float32  # of the activations; parameters are float32
    exact: AttentionFn = jax.nn.dot_product_attention


def gpu_config() -> Config:
    """Longer sequences, in bfloat16. Exact attention is cuDNN's: the fast one to compare with."""
    config = Config(context=4096, heads=4, steps=250, learning_rate=3e-3, dtype=jnp.bfloat16)
    cudnn = functools.partial(config.exact, implementation="cudnn")
    x = jnp.zeros((1, 64, 1, config.head_dim), config.dtype)
    try:
        jax.block_until_ready(cudnn(x, x, x, is_causal=True))
    except Exception as error:  # its type depends on what is missing
        reason = str(error).split("\n")[0]
        print(f"Exact attention is XLA's: cuDNN's does not run here ({reason}).")
        return config
    return dataclasses.replace(config, exact=cudnn)


# --- Text -----------------------------------------------------------------------------------------


def load_text() -> tuple[str, str]:
    """Returns the text to train on and the held-out text: different topics, nothing in both."""
    # Some topics quote whole sections of others: a paragraph counts where it comes first.
    seen = set()
    documents = []
    for name in sorted(topics):
        paragraphs = []
        for paragraph in topics[name].split("\n\n"):
            words = re.sub(r"\W+", " ", paragraph).strip()
            if words not in seen:
                seen.add(words)
                paragraphs.append(paragraph)
        documents.append("\n\n".join(paragraphs) + "\n\n")
    # Every fifth by length: both parts have short topics and long ones.
    documents.sort(key=len)
    held_out = documents[2::5]
    train = [document for i, document in enumerate(documents) if i % 5 != 2]
    return "".join(train), "".join(held_out)


def encode(text: str, characters: str) -> np.ndarray:
    """Returns the index of each character + 1, and 0 for a character that is not in the list."""
    index = {character: i + 1 for i, character in enumerate(characters)}
    return np.array([index.get(character, 0) for character in text], np.int32)


def cut_windows(tokens: np.ndarray, context: int) -> np.ndarray:
    """Cuts [n, context + 1]; the last token of a window is the first of the next.

    Each token but the first is so predicted once, from at most `context` tokens before it.
    """
    starts = np.arange(0, len(tokens) - context, context)
    return tokens[starts[:, None] + np.arange(context + 1)]


# --- Model ----------------------------------------------------------------------------------------


def rotate(x: jax.Array) -> jax.Array:  # [B, T, N, H]
    """Rotary position embedding."""
    length, half = x.shape[1], x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half) / half)
    angles = jnp.arange(length)[:, None, None] * frequencies  # [T, 1, H/2]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Block(nnx.Module):
    """Pre-norm transformer block: causal self-attention, then an MLP."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        width = config.heads * config.head_dim
        linear = functools.partial(nnx.Linear, use_bias=False, dtype=config.dtype, rngs=rngs)
        self.heads = config.heads
        self.attention_fn = config.exact  # the attribute to replace
        self.attention_norm = nnx.RMSNorm(width, dtype=config.dtype, rngs=rngs)
        self.qkv = linear(width, 3 * width)
        self.projection = linear(width, width)
        self.mlp_norm = nnx.RMSNorm(width, dtype=config.dtype, rngs=rngs)
        self.mlp_in = linear(width, 4 * width)
        self.mlp_out = linear(4 * width, width)

    def __call__(self, x: jax.Array) -> jax.Array:  # [B, T, width]
        qkv = self.qkv(self.attention_norm(x))
        q, k, v = jnp.split(qkv.reshape(*x.shape[:2], 3 * self.heads, -1), 3, axis=2)
        attended = self.attention_fn(rotate(q), rotate(k), v, is_causal=True)  # [B, T, N, H]
        x = x + self.projection(attended.reshape(x.shape))
        return x + self.mlp_out(nnx.gelu(self.mlp_in(self.mlp_norm(x))))


class LanguageModel(nnx.Module):
    """Decoder-only transformer."""

    def __init__(self, vocabulary: int, config: Config, rngs: nnx.Rngs):
        width = config.heads * config.head_dim
        self.embedding = nnx.Embed(vocabulary, width, dtype=config.dtype, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(width, dtype=config.dtype, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, use_bias=False, dtype=config.dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:  # [B, T] -> logits [B, T, vocabulary]
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).astype(jnp.float32)

    def set_attention(self, attention_fn: AttentionFn) -> None:
        """Replaces the attention of every block. The parameters stay as they are."""
        for block in self.blocks:
            block.attention_fn = attention_fn


def bits_per_character(model: LanguageModel, windows: jax.Array) -> jax.Array:
    """[B, T + 1] -> [B], the mean over each window."""
    nats = optax.softmax_cross_entropy_with_integer_labels(model(windows[:, :-1]), windows[:, 1:])
    return nats.mean(axis=-1) / np.log(2)


# --- Training -------------------------------------------------------------------------------------


@nnx.jit
def train_step(model: LanguageModel, optimizer: nnx.Optimizer, windows: jax.Array) -> jax.Array:
    def loss(model: LanguageModel) -> jax.Array:
        return bits_per_character(model, windows).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


@dataclasses.dataclass
class Curves:
    """Bits per character of each training step, and of the held-out text at some steps."""

    train: list[float]
    held_out: dict[int, float]


def train(model: LanguageModel, tokens: np.ndarray, held_out: np.ndarray, config: Config) -> Curves:
    """Trains on random windows of the tokens; held_out [n, T + 1] is only looked at."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.steps // 10, config.steps
    )
    transform = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.1)
    )
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)

    sample = held_out[:: max(len(held_out) // 32, 1)]  # enough for a curve
    looks = set(np.geomspace(1, config.steps, 14).round().astype(int))
    rng = np.random.default_rng(0)
    losses: list[jax.Array] = []
    curve = {}
    with tqdm(total=config.steps, desc="training", unit="step") as progress:
        for step in range(1, config.steps + 1):
            starts = rng.integers(0, len(tokens) - config.context, config.batch_size)
            windows = tokens[starts[:, None] + np.arange(config.context + 1)]
            losses.append(train_step(model, optimizer, jnp.asarray(windows)))
            if step in looks:
                curve[step] = float(evaluate(model, sample, config.batch_size).mean())
            if step % 5 == 0:  # reading a loss waits for the device
                progress.set_postfix_str(f"{float(losses[-1]):.2f} bits per character")
            progress.update()
    return Curves([float(loss) for loss in losses], curve)


# --- Evaluation -----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def evaluate_batch(definition: Any, parameters: Any, windows: jax.Array) -> jax.Array:
    return bits_per_character(nnx.merge(definition, parameters), windows)


def evaluate(model: LanguageModel, windows: np.ndarray, batch_size: int) -> np.ndarray:
    """Bits per character of each window, [n]."""
    # The definition holds attention_fn: another attention is another program.
    definition, parameters = nnx.split(model)
    bits = []
    for start in range(0, len(windows), batch_size):
        # The last batch begins earlier instead of being short, which would compile anew.
        batch = windows[max(0, min(start, len(windows) - batch_size)) :][:batch_size]
        fresh = min(batch_size, len(windows) - start)
        bits.append(np.asarray(evaluate_batch(definition, parameters, batch))[-fresh:])
    return np.concatenate(bits)


def evaluation_time(model: LanguageModel, batch: np.ndarray, repeats: int = 7) -> float:
    """Median seconds to evaluate one batch, without compilation."""
    definition, parameters = nnx.split(model)
    windows = jnp.asarray(batch)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(evaluate_batch(definition, parameters, windows))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])  # the first may have compiled


def attention_errors(
    model: LanguageModel, tokens: np.ndarray, attention_fns: dict[str, AttentionFn]
) -> dict[str, list[float]]:
    """Relative L1 error of each layer's attention against float32, for each attention function.

    All see the same queries, keys and values: those of the model with its exact attention.
    """
    inputs = []

    def recording_attention(
        query: jax.Array, key: jax.Array, value: jax.Array, **options: Any
    ) -> jax.Array:
        inputs.append((query, key, value))
        return exact(query, key, value, **options)

    exact = model.blocks[0].attention_fn
    model.set_attention(recording_attention)
    model(jnp.asarray(tokens))  # not jitted: the recorded arrays are values
    model.set_attention(exact)

    errors: dict[str, list[float]] = {name: [] for name in attention_fns}
    for q, k, v in inputs:
        with jax.default_matmul_precision("highest"):
            reference = jax.nn.dot_product_attention(
                *(x.astype(jnp.float32) for x in (q, k, v)), is_causal=True
            )
        for name, attention_fn in attention_fns.items():
            difference = attention_fn(q, k, v, is_causal=True).astype(jnp.float32) - reference
            errors[name].append(float(jnp.abs(difference).sum() / jnp.abs(reference).sum()))
    return errors


@dataclasses.dataclass
class Result:
    """One attention function in the trained model."""

    bits: np.ndarray  # bits per character of each held-out window
    layer_errors: list[float]  # relative L1 error of each layer's attention
    seconds: float  # to evaluate one batch


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean, and its standard error: how much it would vary with other text."""
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


def compare(model: LanguageModel, held_out: np.ndarray, config: Config) -> dict[str, Result]:
    """Evaluates the model, trained with exact attention, with each attention function."""
    attention_fns = {"exact": config.exact, **RECIPES}
    errors = attention_errors(model, held_out[:2, :-1], attention_fns)
    results = {}
    for name, attention_fn in attention_fns.items():
        model.set_attention(attention_fn)  # the swap
        bits = evaluate(model, held_out, config.batch_size)
        seconds = evaluation_time(model, held_out[: config.batch_size])
        results[name] = Result(bits, errors[name], seconds)
    model.set_attention(config.exact)
    return results


# --- Report ---------------------------------------------------------------------------------------


def report(results: dict[str, Result], config: Config) -> str:
    """The table, and what each difference means."""
    exact = results["exact"].bits
    uncertainty = mean_and_error(exact)[1]
    lines = [
        "",
        f"{'attention':<11}{'bits per character':<22}{'difference to exact':<25}"
        f"{'attention error':<19}{'time per batch':>20}",
        f"{'':<11}{'± standard error':<22}{'± standard error, paired':<27}"
        f"{'worst layer':<17}{f'{config.batch_size} x {config.context} characters':>20}",
    ]
    for name, result in results.items():
        mean, error = mean_and_error(result.bits)
        change, change_error = mean_and_error(result.bits - exact)
        difference = "" if name == "exact" else f"{change:+.5f} ± {change_error:.5f}"
        lines.append(
            f"{name:<11}{f'{mean:.4f} ± {error:.4f}':<22}{difference:<25}"
            f"{max(result.layer_errors):>15.3%}{'':<4}{result.seconds * 1e3:>17.1f} ms"
        )
    lines += ["", "Error of each layer's attention (relative L1, against float32):"]
    lines += [
        f"{name:<11}" + "  ".join(f"{error:.3%}" for error in result.layer_errors)
        for name, result in results.items()
    ]
    lines += [
        "",
        f"The standard errors are over {len(exact)} held-out windows of {config.context} "
        "characters. That of a score",
        "says how much it depends on the choice of text. That of a difference is much smaller: "
        "both scores",
        "are of the same text, window by window.",
    ]
    for name, result in results.items():
        if name == "exact":
            continue
        change, change_error = mean_and_error(result.bits - exact)
        if abs(change) > uncertainty:
            verdict = f"MORE than the uncertainty of the score itself, ±{uncertainty:.4f}"
        elif abs(change) > 2 * change_error:
            ratio = uncertainty / abs(change)
            verdict = f"{ratio:.0f} times less than the uncertainty of the score itself"
        else:
            verdict = "which may as well be none"
        lines.append(f"{name} changes the score by {change:+.5f} ± {change_error:.5f}, {verdict}.")
    return "\n".join(lines)


def plot(curves: Curves, results: dict[str, Result], config: Config, output: Path) -> None:
    """Writes the loss curves, how each recipe changes the score, and the error of each layer."""
    colors = {"8+8": "tab:orange", "8+16": "tab:blue"}
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    loss_axes, change_axes, error_axes = figure.subplots(1, 3)
    figure.suptitle("A language model trained with exact attention, run with quantized attention")

    loss_axes.plot(
        range(1, len(curves.train) + 1), curves.train, color="0.7", label="training batch"
    )
    loss_axes.plot(
        *zip(*curves.held_out.items(), strict=True), "o-k", label="held-out text, a sample"
    )
    loss_axes.set(
        title="Training, with exact attention",
        xlabel="step",
        xscale="log",
        ylabel="bits per character",
    )
    loss_axes.xaxis.set_major_formatter("{x:.0f}")
    loss_axes.xaxis.set_minor_formatter("")
    loss_axes.legend()

    exact = results["exact"].bits
    labels = []
    change_axes.axhline(0, color="0.7", linewidth=1)
    for position, name in enumerate(RECIPES):
        changes = results[name].bits - exact
        change, change_error = mean_and_error(changes)
        spread = np.linspace(-0.3, 0.3, len(changes))  # in the order of the text
        change_axes.plot(position + spread, changes, ".", color=colors[name], alpha=0.6)
        change_axes.errorbar(position, change, change_error, fmt="_k", markersize=20, capsize=5)
        labels.append(f"jax_sage {name}\n{change:+.5f} ± {change_error:.5f}")
    score, score_error = mean_and_error(exact)
    change_axes.set(
        title="Change of the held-out score by quantized attention",
        xlabel=f"{len(exact)} windows and their mean\n"
        f"exact: {score:.4f} ± {score_error:.4f} bits per character",
        ylabel="bits per character, difference to exact",
        xticks=range(len(RECIPES)),
        xticklabels=labels,
        xlim=(-0.5, len(RECIPES) - 0.5),
    )

    layers = np.arange(config.layers)
    for i, name in enumerate(RECIPES):
        bars = error_axes.bar(
            layers + 0.4 * (i - 0.5),
            100 * np.array(results[name].layer_errors),
            width=0.38,
            color=colors[name],
            label=f"jax_sage {name}",
        )
        error_axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=9)
    error_axes.set(
        title="Error of each layer's attention output",
        xlabel="layer",
        ylabel="relative L1 error against float32, %",
        xticks=layers,
        xticklabels=layers + 1,
    )
    error_axes.margins(y=0.25)
    error_axes.legend(loc="upper center", ncols=2)
    figure.savefig(output, dpi=120)


def run(config: Config) -> tuple[Curves, dict[str, Result]]:
    """Trains and compares."""
    train_text, held_out_text = load_text()
    characters = "".join(sorted(set(train_text)))
    held_out = cut_windows(encode(held_out_text, characters), config.context)
    model = LanguageModel(len(characters) + 1, config, nnx.Rngs(0))
    parameters = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    print(
        f"{config.layers} layers, {config.heads} heads of {config.head_dim}, "
        f"{parameters / 1e6:.1f} M parameters, {config.context} characters of context; "
        f"{len(train_text):,} characters to train on, {len(held_out_text):,} held out"
    )
    curves = train(model, encode(train_text, characters), held_out, config)
    return curves, compare(model, held_out, config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--context", type=int, help="characters that the model sees at once")
    parser.add_argument("--output", type=Path, default=Path("language_model.png"), help="the plot")
    args = parser.parse_args()

    on_gpu = jax.default_backend() == "gpu"
    config = gpu_config() if on_gpu else Config()
    given = {name: getattr(args, name) for name in ("steps", "context")}
    config = dataclasses.replace(config, **{k: v for k, v in given.items() if v is not None})
    if config.steps < 1 or not 1 <= config.context <= 16384:
        parser.error("--steps is at least 1, and --context from 1 to 16384: the text is short")

    print(jax_sage.info(), end="\n\n")
    if not on_gpu:
        print("No GPU: jax_sage runs in plain JAX: the numerics of the kernels, not their speed.")
    start = time.perf_counter()
    curves, results = run(config)
    print(report(results, config))
    if on_gpu:
        print("The times are of the whole model; python -m jax_sage.bench has the attention alone.")
    else:
        print(
            "The times are of this CPU, where jax_sage imitates the kernels' rounding step by "
            "step: they say\nnothing about a GPU."
        )
    plot(curves, results, config, args.output)
    print(f"Wrote {args.output}. Total time: {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
