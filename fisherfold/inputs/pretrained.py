"""The dense model that a name means, checked, and written as a Hugging Face folder of safetensors.

A name is a recipe of ``data/models``, else a local path (a Hugging Face folder or a ``.gguf`` file), else a name on the
hub. All three are one call of ``from_pretrained``; they differ in where it looks.
"""

import errno
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from fisherfold.inputs.hub import HubUnknown, cached_folder, resolve_model
from fisherfold.inputs.model_folders import not_a_model, refuse_other_folders
from fisherfold.inputs.packages import fetch_file
from fisherfold.inputs.recipes import ModelRecipe, Source, find_path, find_recipe, recipe_names, unknown_input
from fisherfold.inputs.tokenizer_files import require_same_tokens, save_tokenizer, vocabulary_size
from fisherfold.inputs.weight_files import (
    DEQUANTISED,
    quantisation,
    require_floats,
    require_sound,
    require_whole,
    separate,
)
from fisherfold.network.layers import input_embedding
from fisherfold.network.models import DTYPES
from fisherfold.run.determinism import STREAMED, chosen_placement
from fisherfold.run.errors import FisherfoldError, InputError, system_number
from fisherfold.run.params import PrepareParams
from fisherfold.run.progress import announce, without_foreign_bars
from fisherfold.run.workspace import Workspace

WEIGHTS = re.compile(r".*\.safetensors|pytorch_model.*\.bin")
MODEL_FILES = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja", ".py", ".tiktoken")
CALLS = {
    "return_dict": True,
    "output_attentions": False,
    "output_hidden_states": False,
}  # how somebody called a model, not what it computes
SHARD_BYTES = 2**28  # of a model that is streamed: what is in memory at a time,
MOST_SHARDS = 64  # unless that gives more files than this


OWN_CODE = (
    " It comes with code of its own, which the stages and the compressed checkpoint do without: only architectures and tokenizers that "
    "transformers itself knows can be used. A tokenizer can be converted to a fast one (tokenizer.json; auto_map taken out of "
    "tokenizer_config.json)."
)
SPEAKING = (
    OSError,
    ValueError,
    ImportError,
    RuntimeError,
)  # errors that say what is wrong; a KeyError has the key alone
BY_ITSELF = f" It must be a model that transformers {transformers.__version__} loads by itself."


@dataclass(frozen=True)
class ModelSource:
    """A model, ready to be loaded.

    Attributes:
        source: what prepare.json tells.
        location: a local folder or a hub name.
        revision: commit on the hub.
        gguf_file: name of the GGUF file inside `location`.
    """

    source: Source
    location: str
    revision: str | None = None
    gguf_file: str | None = None

    @property
    def folder(self) -> Path | None:
        """Where its files lie, those of a hub's model in the local cache; None if they are not here yet."""
        if Path(self.location).is_dir():
            return Path(self.location)
        return cached_folder(self.location, self.revision)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments that every ``from_pretrained`` of this model takes."""
        chosen = {"revision": self.revision, "gguf_file": self.gguf_file}
        return {"trust_remote_code": False, **{key: value for key, value in chosen.items() if value}}


def find_model(workspace: Workspace, params: PrepareParams) -> ModelSource:
    """What ``prepare.model`` means.

    Raises:
        InputError: it is no recipe, no model folder or GGUF file, and nothing the hub knows.
    """
    name = params.model
    if params.revision and (find_path(workspace, name) or name in recipe_names(workspace, "models")):
        raise InputError(
            f"prepare.revision = {params.revision!r} is for models of the hub. Set it to null for {name!r}."
        )
    recipe = find_recipe(workspace, "models", name, ModelRecipe)
    if recipe:
        file = fetch_file(recipe.file)
        return ModelSource(Source.from_recipe(name, recipe), str(file.parent), gguf_file=file.name)
    path = find_path(workspace, name)
    if path:
        return _local_model(name, path)
    try:
        entry = resolve_model(name, params.revision)
    except HubUnknown as why:
        raise unknown_input(workspace, "prepare.model", "models", name, str(why)) from None
    source = Source(name, "hub", entry.licence, entry.commit)
    if entry.snapshot:
        refuse_other_folders(name, entry.snapshot)
        return ModelSource(source, str(entry.snapshot))
    return ModelSource(source, name, revision=entry.commit)


def _local_model(name: str, path: Path) -> ModelSource:
    if path.is_file():
        if path.suffix != ".gguf":
            raise not_a_model(name, path)
        return ModelSource(Source.from_files(name, [path]), str(path.parent), gguf_file=path.name)
    refuse_other_folders(name, path)
    files = sorted(file for file in path.iterdir() if file.suffix in MODEL_FILES and file.is_file())
    if not (path / "config.json").exists():
        raise not_a_model(name, path)
    if not any(WEIGHTS.fullmatch(file.name) for file in files):
        raise InputError(
            f"prepare.model = {name!r}: folder {path} holds no weights (*.safetensors or pytorch_model.bin). "
            "Was the download cut short, or are they Git LFS files that were not pulled?"
        )
    return ModelSource(Source.from_files(name, files), str(path))


def check_model(model: ModelSource, sequence_length: int) -> PreTrainedConfig:
    """Read the configuration alone and check that the model can be used.

    Raises:
        InputError: it is not a causal language model, its weights are quantised, or the sequences are longer than its
            positions.
    """
    config = read_config(model)
    name = model.source.name
    if not _is_causal(config):
        kind = ", ".join(
            map(str, config.architectures if isinstance(config.architectures, list) else [config.model_type])
        )
        raise InputError(f"Model {name!r} ({kind}) is not a causal language model. Choose a decoder-only text model.")
    _require_known_class(name, config)
    method = quantisation(config)
    if method and method not in DEQUANTISED:
        raise InputError(
            f"The weights of model {name!r} are quantised ({method}), which cannot be undone here ({', '.join(DEQUANTISED)} can). Compress the "
            "original model instead, in bfloat16 or float32."
        )
    positions = positions_of(config)
    if positions and positions < sequence_length:
        raise InputError(
            f"prepare.sequence_length = {sequence_length} is more than the {positions} positions of model {name!r}. "
            f"Set it to at most {positions}."
        )
    return config


def positions_of(config: PreTrainedConfig) -> int | None:
    """How many tokens a model can read, if there is an end."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None  # xlnet says -1


@cache
def read_config(model: ModelSource) -> PreTrainedConfig:
    """The model's configuration, without anything that its file says of the machine that made it."""
    transformers_logging.set_verbosity_error()
    with _explained(model, "its configuration"):
        config = AutoConfig.from_pretrained(model.location, **model.options)
    own_code = ["auto_map"] if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else []  # transformers' own class needs none
    for key in [key for key in vars(config) if key.endswith("model_name_or_path") or key in own_code]:
        delattr(config, key)
    config._attn_implementation = None  # the machine's choice
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        for key, value in CALLS.items() if part is not None else ():
            setattr(part, key, value)
    return config


def _require_known_class(name: str, config: PreTrainedConfig) -> None:
    """Refuse a model that `AutoModelForCausalLM` would not load, or would not load again once it is saved."""
    loaded: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if loaded is None and getattr(config, "auto_map", None):
        raise InputError(f"Model {name!r} ({config.model_type}) cannot be used.{OWN_CODE}")
    saved = loaded.config_class if loaded else type(config)
    if saved not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(
            f"Model {name!r} ({config.model_type}): transformers has no causal language model for the configuration {saved.model_type!r}, in "
            "which its language model is saved, so it could not be loaded again. Choose another model."
        )


def _is_causal(config: PreTrainedConfig) -> bool:
    """Whether the checkpoint was saved from a causal language model.

    A mapping from the configuration's class is not enough: BERT has a causal class too.
    """
    if config.is_encoder_decoder:
        return False
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return True
    mapped = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if not config.architectures:  # GGUF files name none
        return mapped
    if not isinstance(config.architectures, list):
        return False
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return any(name in known or (mapped and name.endswith("ForConditionalGeneration")) for name in config.architectures)


def count_parameters(model: ModelSource) -> int:
    """The number of parameters, from the configuration alone: nothing is allocated."""
    with torch.device("meta"), _explained(model, "its configuration"):
        empty = AutoModelForCausalLM.from_config(deepcopy(read_config(model)))
    return sum(parameter.numel() for parameter in empty.parameters())


def write_model(folder: Path, model: ModelSource, dtype: str) -> None:
    """Load the model in `dtype` and write ``folder/model`` (safetensors, tokenizer) and ``folder/facts.json``.

    Under placement `streamed` its weights go from file to file, a shard at a time; those of a GGUF file are dequantised in memory.

    Raises:
        InputError: model or tokenizer cannot be loaded, weights are missing or not finite, or the tokenizer knows more
            tokens than the model embeds.
    """
    transformers_logging.disable_progress_bar()
    tokenizer = load_tokenizer(model)
    with TemporaryDirectory(dir=folder) as converted:
        loaded = _load_weights(model, DTYPES[dtype], converted)
        embeddings = len(input_embedding(loaded))
        require_same_tokens(model.source.name, tokenizer, embeddings)
        parameters = sum(parameter.numel() for parameter in loaded.parameters())
        announce("prepare", f"writing {parameters / 1e6:.1f} M parameters in {dtype}")
        with _explained(model, "its form for the stages, which is written from what"):
            separate(loaded)
            shards = _shards(parameters * DTYPES[dtype].itemsize) if _streams(model) else {}
            loaded.save_pretrained(
                folder / "model", save_original_format=False, **shards
            )  # named as stages name layers
            save_tokenizer(tokenizer, folder / "model")
    require_sound(model.source.name, folder / "model")
    facts = {
        "architecture": type(loaded).__name__,
        "dtype": dtype,
        "embedded_tokens": embeddings,
        "parameters": parameters,
    }
    (folder / "facts.json").write_text(json.dumps(facts, sort_keys=True), encoding="utf-8")


def _streams(model: ModelSource) -> bool:
    """Whether its weights may not be in memory together."""
    return chosen_placement() == STREAMED and not model.gguf_file


def _shards(size: int) -> dict[str, Any]:
    """Of a model of so many bytes."""
    return {"max_shard_size": max(SHARD_BYTES, size // MOST_SHARDS)}


def load_tokenizer(model: ModelSource) -> PreTrainedTokenizerBase:
    """The model's own tokenizer.

    Raises:
        InputError: there is none, or it cannot be loaded.
    """
    with _explained(model, "its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(model.location, **model.options)
    if vocabulary_size(tokenizer) <= len(tokenizer.all_special_tokens):  # what is left when the files are not there
        raise InputError(
            f"Model {model.source.name!r} comes without a tokenizer that can be read: put its files (tokenizer.json, or tokenizer.model and "
            "tokenizer_config.json) beside the weights."
        )
    return tokenizer


def _load_weights(model: ModelSource, dtype: torch.dtype, converted: str) -> PreTrainedModel:
    """The model; streamed, its weights stay where they are, those that lie there in another form than in its modules in the folder `converted`."""
    method = "GGUF" if model.gguf_file else quantisation(read_config(model))
    announce("prepare", f"loading {model.source.name}" + (f", dequantising its weights ({method})" if method else ""))
    load: Callable[..., Any] = partial(AutoModelForCausalLM.from_pretrained, model.location, **model.options)
    if model.gguf_file:
        load = partial(load, quantization_config=GgufConfig(dequantize=True))
    elif method:
        load = partial(load, quantization_config=DEQUANTISED[method](dequantize=True))
    with _explained(model, "its weights"), without_foreign_bars():
        options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # we tell of them
        options |= {"device_map": {"": "disk"}, "offload_folder": converted} if _streams(model) else {}
        loaded, found = load(config=deepcopy(read_config(model)), dtype=dtype, **options)
    if (folder := model.folder) and not method:  # a hub's files are here by now
        require_floats(model.source.name, folder)
    require_whole(model.source.name, loaded, found)
    if found["unexpected_keys"]:
        others = sorted(map(str, found["unexpected_keys"]))
        announce(
            "prepare",
            f"{len(others)} tensors of the checkpoint are no part of this model and are left out, the first {others[0]}",
        )
    return loaded


@contextmanager
def _explained(model: ModelSource, part: str) -> Iterator[None]:
    """Turn what a library raises while it reads a part of the model into one clear error."""
    try:
        yield
    except Exception as error:  # a damaged or odd file makes the libraries raise almost anything
        if isinstance(error, FisherfoldError) or system_number(error) in (errno.ENOSPC, errno.ENOMEM):
            raise
        text = str(error) or type(error).__name__
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        more = isinstance(error, ImportError) or lines[0].endswith(":")  # how to install it; what it is
        reason = " ".join(lines[: 2 if more else 1])
        if str(error) and not isinstance(error, SPEAKING):
            reason = f"{type(error).__name__}: {reason}"
        cure = OWN_CODE if "trust_remote_code" in text else BY_ITSELF
        raise InputError(
            f"Model {model.source.name!r}: {part} cannot be read from {model.location} ({reason}).{cure}"
        ) from error
