"""What a file or folder holds that is no model to compress: an adapter, a checkpoint of ours, another program's; told from names and JSON alone."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fisherfold.run.errors import InputError

ADAPTER = "adapter_config.json"
OURS = "fisherfold_"
OBJECTS = ("config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors.index.json")
"""Files that are JSON objects, or of no use."""


def refuse_other_folders(name: str, folder: Path) -> None:
    """
    Raises:
        InputError: the folder holds an adapter, was written by stage `factorize`, or has a file of another form.
    """
    for file in OBJECTS:
        found = _read(folder / file)
        if found is not None and not isinstance(found, dict):
            raise InputError(f"prepare.model = {name!r}: {folder / file} is no JSON object, but {found!r:.40}.")
    config = _read(folder / "config.json")
    if (folder / ADAPTER).exists():
        settings = _read(folder / ADAPTER)
        base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
        beside = "" if config is None else f" If the weights in the folder are merged already, take {ADAPTER} away."
        raise InputError(
            f"prepare.model = {name!r} is an adapter{f' of {base!r}' if base else ''}, and no model: merge it into its base model first "
            f"(peft: `model.merge_and_unload().save_pretrained(FOLDER)`), and name that folder.{beside}"
        )
    if config is not None and str(config.get("model_type", "")).startswith(OURS):
        raise InputError(
            f"prepare.model = {name!r} was compressed by Fisherfold already ({config['model_type']}). Name the model that it was made of; "
            "or, to compress further, the ordinary folder that factorize.dense_export writes beside it."
        )


def not_a_model(name: str, path: Path) -> InputError:
    """The error for a file that is no GGUF file, or a folder without config.json, with what may have been meant."""
    if path.is_file():
        return InputError(
            f"prepare.model = {name!r} is a file, but not a .gguf file. Name a Hugging Face folder or a GGUF file."
            + (f" The folder of this one is {path.parent}." if (path.parent / "config.json").exists() else "")
        )
    meant = next(_meant(path), "")
    return InputError(
        f"prepare.model = {name!r}: folder {path} has no config.json, so it is not a Hugging Face model folder.{meant}"
    )


def _meant(folder: Path) -> Iterator[str]:
    """What else such a folder may be, and what to name."""
    for found in sorted(folder.glob("*.gguf"))[:1]:
        yield f" It holds {found.name}: name that file."
    for found in sorted(folder.glob("*/config.json"))[:1]:
        yield f" {found.parent} is one."
    if list(folder.glob("consolidated*")):
        yield " It holds weights in their makers' own format: name the converted model, or convert it with the script that transformers has for it."


def _read(path: Path) -> Any:
    """The parsed file; None if it is not there or no JSON, which others will tell of."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
