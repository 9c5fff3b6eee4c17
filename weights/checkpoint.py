"""GPT-2 checkpoints in Hugging Face's format: a directory with `config.json` and safetensors, or a model on the Hub."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from weights.names import canonical_name

TINY = Path(__file__).parent / "tiny"

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"
_HUB_FILES = [
    "config.json",
    GENERATION_FILE,
    SINGLE_FILE,
    INDEX_FILE,
    "model-*.safetensors",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
]
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

Shapes = Mapping[str, tuple[int, ...]]


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message is one line that says which file or tensor, and why."""


def locate(name: str | os.PathLike[str]) -> Path:
    """The directory that holds a model.

    Args:
        name: `tiny` (the bundled model), a directory, or an id on the Hugging Face Hub (`openai-community/gpt2`).
            Hub files come from `huggingface_hub`, so its cache, `HF_HUB_OFFLINE` and `HF_TOKEN` work as everywhere.

    Raises:
        CheckpointError: no such directory, no such model, or no way to reach it.
    """
    if name == "tiny":
        return TINY
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; give the directory that holds config.json and {SINGLE_FILE}")
    if not _HUB_ID.fullmatch(str(name)):
        raise CheckpointError(f"{name}: no such directory, and not the id of a model on the Hub (owner/name)")
    return _download(str(name))


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        directory = Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except GatedRepoError:
        reason = "access is restricted: ask for it on the model's page, then set HF_TOKEN"
    except RepositoryNotFoundError:
        reason = "no such model on the Hub (a private one needs HF_TOKEN)"
    except LocalEntryNotFoundError:
        reason = "the Hub cannot be reached (or HF_HUB_OFFLINE is set), and the model is not in the local cache"
    except HFValidationError as error:
        reason = _first_line(error)
    except OSError as error:
        reason = f"the Hub cannot be reached: {_first_line(error)}"
    else:
        if any((directory / name).exists() for name in (SINGLE_FILE, INDEX_FILE)):
            return directory
        reason = f"it has no {SINGLE_FILE} there; get what there is by `hf download {hub_id} --local-dir DIR`, give DIR"
    raise CheckpointError(f"{hub_id}: no such directory here, and from the Hub: {reason}")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, not JSON, or JSON nested without end
        raise CheckpointError(f"{path} cannot be read: {_first_line(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, wanted an object")
    return value


def load_config(directory: Path) -> dict[str, Any]:
    """The parsed `config.json` of a checkpoint."""
    return _read_json(directory / "config.json")


def conversion(directory: Path) -> str:
    """A shell command that makes `model.safetensors` of `pytorch_model*.bin`, and runs no code that these may hold."""
    program = (
        "import pathlib, torch, safetensors.torch; "
        f"d = pathlib.Path({str(directory)!r}); "
        "parts = [torch.load(p, map_location='cpu', weights_only=True) for p in d.glob('pytorch_model*.bin')]; "
        "tensors = {n: t.clone().contiguous() for part in parts for n, t in part.items()}; "
        f"safetensors.torch.save_file(tensors, d / {SINGLE_FILE!r})"
    )
    return f"python -c {shlex.quote(program)}"


def load_generation_config(directory: Path) -> dict[str, Any]:
    """The parsed `generation_config.json` of a checkpoint; empty where there is none."""
    path = directory / GENERATION_FILE
    return _read_json(path) if path.exists() else {}


def _files(directory: Path) -> list[Path]:
    single = directory / SINGLE_FILE
    if single.exists():
        return [single]
    if not (directory / INDEX_FILE).exists():
        if any(directory.glob("pytorch_model*.bin")):
            raise CheckpointError(
                f"{directory} has pytorch_model.bin alone, a format that can run code when it is read: convert it "
                f"(with torch and safetensors, which read numbers only) by {conversion(directory)}"
            )
        raise CheckpointError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}")
    weight_map = _read_json(directory / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{directory / INDEX_FILE} names no file: its weight_map is missing or empty")
    outside = [name for name in weight_map.values() if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise CheckpointError(f"{directory / INDEX_FILE} names {outside[0]!r:.100}, wanted a file of its own directory")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(f"{directory} lacks {', '.join(missing)}, named in {INDEX_FILE}")
    return [directory / name for name in names]


_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file; what the library raises is a CheckpointError."""
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {_first_line(error)}") from None


def stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a checkpoint by its name, from the headers of its files alone.

    Raises:
        CheckpointError: a file that is missing or damaged.
    """
    shapes = {}
    for path in _files(directory):
        with _opened(path) as file:
            for stored_name in file.keys():  # noqa: SIM118 (not a mapping)
                name = canonical_name(stored_name)
                if name is not None:
                    shapes[name] = tuple(file.get_slice(stored_name).get_shape())
    return shapes


def _check_tensors(directory: Path, found: Shapes, wanted: Shapes) -> None:
    """One line for the first thing wrong: a misshapen tensor, a missing one, one too many."""
    for name, shape in wanted.items():
        if name in found and found[name] != shape:
            raise CheckpointError(f"{directory}: tensor {name} has shape {found[name]}, wanted {shape} by config.json")
    missing = [name for name in wanted if name not in found]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(f"{directory}: tensor {missing[0]} of shape {wanted[missing[0]]} is missing{more}")
    extra = [name for name in found if name not in wanted]
    if extra:
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise CheckpointError(
            f"{directory}: tensor {extra[0]} of shape {found[extra[0]]} is not part of the GPT-2 that config.json "
            f"describes{more}"
        )


def load_tensors(directory: Path, wanted: Shapes) -> dict[str, np.ndarray]:
    """Every wanted tensor of a checkpoint, as float32.

    Args:
        directory: holds `model.safetensors`, or `model.safetensors.index.json` and the files it names.
        wanted: name (Hugging Face's, without `transformer.`) to shape. A model whose output projection is its token
            embedding does not want `lm_head.weight`; a copy of the embedding under that name is then ignored.

    Returns:
        name to float32 array, for exactly the wanted names. Other floats are converted.

    Raises:
        CheckpointError: a file that is missing or damaged, a tensor missing, misshapen, unknown or of another type.
    """
    tensors: dict[str, np.ndarray] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    tied_head: np.ndarray | None = None
    for path in _files(directory):
        with _opened(path) as file:
            for stored_name in file.keys():  # noqa: SIM118 (not a mapping)
                name = canonical_name(stored_name)
                if name is None:
                    continue
                part = file.get_slice(stored_name)
                if part.get_dtype() not in _DTYPES:
                    raise CheckpointError(
                        f"{path}: tensor {name} is of type {part.get_dtype()}, wanted {', '.join(_DTYPES)}"
                    )
                shape = tuple(part.get_shape())
                if name == "lm_head.weight" and name not in wanted:
                    tied_head = file.get_tensor(stored_name)
                    continue
                if name in shapes:
                    raise CheckpointError(f"{path}: tensor {name} is stored twice")
                shapes[name] = shape
                if wanted.get(name) == shape:
                    try:
                        with np.errstate(over="raise"):
                            tensors[name] = np.asarray(file.get_tensor(stored_name), np.float32)
                    except FloatingPointError:
                        raise CheckpointError(f"{path}: tensor {name} has values beyond float32") from None
    _check_tensors(directory, shapes, wanted)
    if tied_head is not None and not np.array_equal(tied_head.astype(np.float32), tensors["wte.weight"]):
        raise CheckpointError(
            f"{directory}: lm_head.weight differs from wte.weight, but config.json ties them "
            "(tie_word_embeddings: set it to false to use both)"
        )
    return tensors


def write_atomically(path: Path, write: Any) -> None:
    """`write(temporary_path)`, then the file appears under its name whole, or not at all."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text_atomically(path: Path, text: str) -> None:
    """The text in UTF-8, whole or not at all."""
    write_atomically(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


def save_checkpoint(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Writes `model.safetensors` and `config.json`, which `load_config`, `load_tensors` and transformers read."""
    directory.mkdir(parents=True, exist_ok=True)
    prefixed = {
        name if name == "lm_head.weight" else f"transformer.{name}": np.ascontiguousarray(tensor)
        for name, tensor in tensors.items()
    }
    write_atomically(directory / SINGLE_FILE, lambda path: save_file(prefixed, path, metadata={"format": "pt"}))
    text = json.dumps({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **config}, indent=2) + "\n"
    write_text_atomically(directory / "config.json", text)


def save_generation_config(directory: Path, values: Mapping[str, Any]) -> None:
    """Writes `generation_config.json`, which `load_generation_config` and transformers read."""
    text = json.dumps(values, indent=2) + "\n"
    write_text_atomically(directory / GENERATION_FILE, text)
