"""Trains the bundled GPT-2 from the corpus of `build_corpus.py`, on a CPU or a GPU.

    python scripts/train.py --corpus corpus --out runs/tiny            # start, or go on after an interruption
    python scripts/train.py --out runs/tiny --export weights/tiny      # finish: checkpoint in Hugging Face's format
    python scripts/train.py --attention relu.py:relu --minutes 10      # fine-tune the bundled model with a method

Fine-tuning (scripts/fine_tune.py) replaces the attention of all heads, and needs no corpus.

The run directory holds everything: the tokenizer, the encoded corpus, the configuration, the latest state and a log.
The step count may be changed when a run goes on; anything else that shapes it may not.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from jaxgpt2.errors import InputError
from jaxgpt2.models.gpt2.config import GPT2Config
from jaxgpt2.models.gpt2.model import Transformer
from jaxgpt2.models.gpt2.state_dict import assemble, disassemble
from jaxgpt2.models.gpt2.tokenizer import load_tokenizer
from weights.checkpoint import save_checkpoint, save_generation_config, write_atomically, write_text_atomically

END_OF_TEXT = "<|endoftext|>"

# Small models repeat themselves when they are decoded greedily: what checkpoints say against it by default.
GENERATION = {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3}

SMALLEST_CORPUS = 1_000_000  # bytes; less trains a tokenizer and a model of nothing


class TrainingError(click.ClickException):
    exit_code = 2


@dataclass(frozen=True)
class TrainingConfig:
    """What shapes a run. A run goes on only with the recipe that it was started with."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    decay_fraction: float
    seed: int

    def model(self) -> GPT2Config:
        return GPT2Config(
            vocab_size=self.vocab_size,
            n_positions=self.n_positions,
            n_embd=self.n_embd,
            n_layer=self.n_layer,
            n_head=self.n_head,
            eos_token_id=0,
        )


# --- data ---------------------------------------------------------------------------------------


def read_documents(path: Path) -> list[str]:
    """The documents of a split, which `build_corpus.py` separates by a line that says `<|endoftext|>`."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise TrainingError(f"{path} cannot be read ({error.strerror}); make it with scripts/build_corpus.py") from None
    return [document.strip() for document in text.split(f"\n{END_OF_TEXT}\n") if document.strip()]


def train_tokenizer(documents: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE, as GPT-2's: every text has tokens, and decoding gives it back to the byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """All documents in a row, an end-of-text token after each: (tokens,) uint16."""
    pieces = []
    for start in range(0, len(documents), 256):
        for encoding in tokenizer.encode_batch_fast(documents[start : start + 256]):
            pieces.append(np.asarray([*encoding.ids, 0], np.uint16))
    return np.concatenate(pieces)


@dataclass(frozen=True)
class Data:
    train: np.ndarray  # (tokens,) uint16
    evaluation: np.ndarray  # (tokens,) uint16
    evaluation_bytes: int


def prepare_data(corpus: Path, out: Path, vocab_size: int) -> Data:
    """The corpus as tokens, made once and kept in the run directory."""
    tokenizer_path, encoded = out / "tokenizer.json", out / "encoded.npz"
    if encoded.exists():
        found = load_tokenizer(out, vocab_size).get_vocab_size()
        if found != vocab_size:
            raise TrainingError(f"{tokenizer_path} has {found} tokens, the run wants {vocab_size}: it is another one's")
        with np.load(encoded) as arrays:
            return Data(arrays["train"], arrays["evaluation"], int(arrays["evaluation_bytes"]))
    train, evaluation = read_documents(corpus / "train.txt"), read_documents(corpus / "evaluation.txt")
    size = sum(len(document) for document in train)
    if size < SMALLEST_CORPUS:
        raise TrainingError(f"{corpus / 'train.txt'} has {size:,} characters, wanted {SMALLEST_CORPUS:,} at least")
    tokenizer = train_tokenizer(train, vocab_size)
    if tokenizer.get_vocab_size() != vocab_size:
        raise TrainingError(f"the corpus gives {tokenizer.get_vocab_size()} tokens only, wanted {vocab_size}")
    evaluation_bytes = sum(len(document.encode()) for document in evaluation)
    data = Data(encode(tokenizer, train), encode(tokenizer, evaluation), evaluation_bytes)
    write_atomically(tokenizer_path, lambda path: tokenizer.save(path))

    def save(path: str) -> None:
        with Path(path).open("wb") as file:
            np.savez(file, train=data.train, evaluation=data.evaluation, evaluation_bytes=data.evaluation_bytes)

    write_atomically(encoded, save)
    return data


def batches(tokens: np.ndarray, recipe: TrainingConfig, first_step: int) -> Iterator[np.ndarray]:
    """Batches (batch_size, n_positions + 1) from `first_step` on; each pass over the corpus is cut and mixed anew.

    Batch k is a function of the seed and k alone, so a run that goes on sees what an uninterrupted one would.
    """
    length = recipe.n_positions + 1
    per_pass = (len(tokens) - length) // (length * recipe.batch_size)
    epoch, order, offset = -1, np.empty(0, np.int64), 0
    step = first_step
    while True:
        if step // per_pass != epoch:
            epoch = step // per_pass
            random = np.random.default_rng((recipe.seed, epoch))
            offset = int(random.integers(length))
            order = random.permutation(per_pass * recipe.batch_size)
        rows = order[(step % per_pass) * recipe.batch_size :][: recipe.batch_size]
        yield np.stack([tokens[offset + row * length :][:length] for row in rows]).astype(np.int32)
        step += 1


# --- optimisation -------------------------------------------------------------------------------


def schedule(recipe: TrainingConfig, steps: int) -> optax.Schedule:
    """Warm up, hold, then decay linearly to nothing. Holding makes `steps` free to change until the decay begins."""
    decay_steps = max(1, int(steps * recipe.decay_fraction))
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, recipe.learning_rate, recipe.warmup_steps),
            optax.constant_schedule(recipe.learning_rate),
            optax.linear_schedule(recipe.learning_rate, 0.0, decay_steps),
        ],
        [recipe.warmup_steps, steps - decay_steps],
    )


@functools.cache  # one object for equal arguments, so that `train_step` compiles once
def make_optimizer(recipe: TrainingConfig, steps: int) -> optax.GradientTransformation:
    """Muon (Jordan, 2024) for the matrices inside the blocks, AdamW for embeddings, biases and norms."""

    def is_block_matrix(params: dict[str, jax.Array]) -> dict[str, Any]:
        # By name, since the optimizer also asks with trees in which leaves are masked out and have no shape.
        return {
            name: optax.contrib.MuonDimensionNumbers() if re.fullmatch(r"h\..*\.c_\w+\.weight", name) else None
            for name in params
        }

    muon = optax.contrib.muon(
        schedule(recipe, steps),
        weight_decay=recipe.weight_decay,
        muon_weight_dimension_numbers=is_block_matrix,  # pyright: ignore[reportArgumentType]
        consistent_rms=0.2,
        adam_b2=0.95,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def loss_function(tensors: dict[str, jax.Array], config: GPT2Config, batch: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats of a batch (B, T + 1)."""
    logits = assemble(config, tensors)(batch[:, :-1])  # (B, T, V)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


@functools.partial(jax.jit, static_argnames=("config", "optimizer"), donate_argnums=(0, 1))
def train_step(tensors, optimizer_state, batch, config: GPT2Config, optimizer: optax.GradientTransformation):
    loss, gradients = jax.value_and_grad(loss_function)(tensors, config, batch)
    updates, optimizer_state = optimizer.update(gradients, optimizer_state, tensors)
    return optax.apply_updates(tensors, updates), optimizer_state, loss


@functools.partial(jax.jit, static_argnames=("config", "context"))
def window_nats(tensors, batch, config: GPT2Config, context: int) -> jax.Array:
    """Summed cross-entropy in nats of each row's tokens after the first `context` of them: (B,)."""
    logits = assemble(config, tensors)(batch[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
    return losses[:, context:].sum(axis=1)


def bits_per_byte(tensors, data: Data, config: GPT2Config, limit: int | None = None) -> float:
    """Bits per byte of the held-out text, each token predicted from at least half a context where there is one.

    Windows overlap by half; a window scores its second half (the first window scores all of itself). `limit` stops
    after about so many tokens, for a quick look during training.
    """
    length, half = config.n_positions, config.n_positions // 2
    tokens = data.evaluation.astype(np.int32)
    fraction = 1.0
    if limit is not None and limit < len(tokens):
        fraction = limit / len(tokens)
        tokens = tokens[:limit]
    starts = np.arange(0, len(tokens) - length - 1, half)
    nats = float(window_nats(tensors, tokens[None, : length + 1], config, 0).sum())
    scored = length
    for group in np.array_split(starts[1:], max(1, math.ceil(len(starts[1:]) / 16))):
        batch = np.stack([tokens[start : start + length + 1] for start in group])
        nats += float(window_nats(tensors, batch, config, half).sum())
        scored += half * len(group)
    # The last tokens do not fill a window; the rest of the text stands for them.
    return nats / math.log(2) * (len(tokens) / scored) / (data.evaluation_bytes * fraction)


# --- a run --------------------------------------------------------------------------------------


def check_recipe(out: Path, recipe: TrainingConfig) -> None:
    path = out / "recipe.json"
    if not path.exists():
        text = json.dumps(dataclasses.asdict(recipe), indent=2) + "\n"
        write_text_atomically(path, text)
        return
    started = json.loads(path.read_text())
    for name, value in dataclasses.asdict(recipe).items():
        if started.get(name) != value:
            raise TrainingError(
                f"{out} was started with {name}={started.get(name)}, now {value}; use another --out, or the same value"
            )


def train(recipe: TrainingConfig, data: Data, out: Path, steps: int, save_every: int) -> dict[str, jax.Array]:
    """Trains to `steps`, from the saved state where there is one. Returns the tensors."""
    config = recipe.model()
    optimizer = make_optimizer(recipe, steps)
    tensors = disassemble(Transformer(config, nnx.Rngs(recipe.seed)))
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "tensors": tensors, "optimizer": optimizer.init(tensors)}
    state_path, log_path = out / "state.msgpack", out / "log.csv"
    if state_path.exists():
        state = flax.serialization.from_bytes(state, state_path.read_bytes())
    tensors, optimizer_state, step = state["tensors"], state["optimizer"], int(state["step"])
    before = float(state["seconds"])
    if not log_path.exists():
        log_path.write_text("step,tokens,seconds,loss,tokens_per_second,evaluation_bits_per_byte\n")
    tokens_per_step = recipe.batch_size * recipe.n_positions
    started = last = time.monotonic()
    losses: list[jax.Array] = []
    stream = batches(data.train, recipe, step)
    progress = tqdm(total=steps, initial=step, unit="step", smoothing=0.05)
    while step < steps:
        tensors, optimizer_state, loss = train_step(
            tensors, optimizer_state, next(stream), config=config, optimizer=optimizer
        )
        losses.append(loss)
        step += 1
        progress.update()
        if step % 20 == 0 or step == steps:
            mean, now = float(jnp.mean(jnp.stack(losses))), time.monotonic()
            rate = len(losses) * tokens_per_step / (now - last)
            save = step % save_every == 0 or step == steps
            held_out = bits_per_byte(tensors, data, config, limit=40_000) if save else None
            with log_path.open("a", newline="") as file:
                csv.writer(file).writerow(
                    [
                        step,
                        step * tokens_per_step,
                        round(before + now - started, 1),
                        round(mean, 4),
                        round(rate),
                        "" if held_out is None else round(held_out, 4),
                    ]
                )
            progress.set_postfix(loss=f"{mean:.3f}", tokens_per_second=f"{rate:.0f}")
            if save:
                state = {
                    "step": step,
                    "seconds": before + time.monotonic() - started,
                    "tensors": tensors,
                    "optimizer": optimizer_state,
                }
                blob = flax.serialization.to_bytes(state)
                write_atomically(state_path, lambda path, blob=blob: Path(path).write_bytes(blob))
            losses, last = [], time.monotonic()
    progress.close()
    return tensors


@click.command(help=__doc__)
@click.option("--corpus", type=click.Path(path_type=Path), default=Path("corpus"), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/tiny"), show_default=True)
@click.option("--steps", default=4000, show_default=True, help="Optimizer steps in all.")
@click.option("--vocab-size", default=4096, show_default=True)
@click.option("--context", default=256, show_default=True, help="Tokens; n_positions.")
@click.option("--width", default=256, show_default=True, help="n_embd.")
@click.option("--layers", default=4, show_default=True)
@click.option("--heads", default=4, show_default=True)
@click.option("--batch-size", default=16, show_default=True, help="Windows of --context tokens a step.")
@click.option("--learning-rate", default=3e-3, show_default=True)
@click.option("--weight-decay", default=0.05, show_default=True)
@click.option("--warmup-steps", default=100, show_default=True)
@click.option(
    "--decay-fraction", default=0.4, show_default=True, help="Last part of the steps, in which the rate falls."
)
@click.option("--seed", default=0, show_default=True)
@click.option("--save-every", default=200, show_default=True, help="Steps between saved states; a multiple of 20.")
@click.option("--export", type=click.Path(path_type=Path), help="Write the checkpoint here when done.")
@click.option("--attention", help="Fine-tune the bundled model with this method: a name, or FILE.py:NAME.")
@click.option("--bits", default=4, show_default=True, help="Of activations, for --attention.")
@click.option("--minutes", default=10.0, show_default=True, help="Of fine-tuning.")
def main(corpus: Path, out: Path, steps: int, context: int, width: int, layers: int, heads: int, save_every: int,
         export: Path | None, attention: str | None, bits: int, minutes: float, **options: Any) -> None:  # fmt: skip
    if attention is not None:
        from fine_tune import compare

        try:
            click.echo(json.dumps(compare(attention, bits, minutes)))
        except InputError as error:
            raise TrainingError(str(error)) from None
        return
    recipe = TrainingConfig(n_positions=context, n_embd=width, n_layer=layers, n_head=heads, **options)
    out.mkdir(parents=True, exist_ok=True)
    check_recipe(out, recipe)
    data = prepare_data(corpus, out, recipe.vocab_size)
    click.echo(f"{len(data.train):,} tokens to train on, {len(data.evaluation):,} held out", err=True)
    tensors = train(recipe, data, out, steps, save_every)
    held_out = bits_per_byte(tensors, data, recipe.model())
    click.echo(f"held-out bits per byte: {held_out:.4f}")
    if export is not None:
        save_checkpoint(
            export,
            dataclasses.asdict(recipe.model()) | {"bos_token_id": 0},
            {name: np.asarray(tensor) for name, tensor in tensors.items()},
        )
        write_atomically(
            export / "tokenizer.json", lambda path: Path(path).write_bytes((out / "tokenizer.json").read_bytes())
        )
        save_generation_config(export, {"bos_token_id": 0, "eos_token_id": 0, **GENERATION})


if __name__ == "__main__":
    main()
