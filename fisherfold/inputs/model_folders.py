"""What a folder holds that is no model to compress: an adapter, a checkpoint of ours; read from its JSON files alone."""

import json
from pathlib import Path
from typing import Any

from fisherfold.run.errors import InputError

ADAPTER = "adapter_config.json"
OURS = "fisherfold_"


def refuse_other_folders(name: str, folder: Path) -> None:
    """
    Raises:
        InputError: the folder holds an adapter without its base model, or was written by stage `factorize`.
    """
    config = _read(folder / "config.json")
    if config is None and (folder / ADAPTER).exists():
        base = (_read(folder / ADAPTER) or {}).get("base_model_name_or_path")
        raise InputError(
            f"prepare.model = {name!r} is an adapter{f' of {base!r}' if base else ''}, and no model: merge it into its base model first "
            "(peft: `model.merge_and_unload().save_pretrained(FOLDER)`), and name that folder."
        )
    if config is not None and str(config.get("model_type", "")).startswith(OURS):
        raise InputError(
            f"prepare.model = {name!r} was compressed by Fisherfold already ({config['model_type']}). Name the model that it was made of; "
            "or, to compress further, the ordinary folder that factorize.dense_export writes beside it."
        )


def _read(path: Path) -> dict[str, Any] | None:
    """The parsed file; None if it is not there or no JSON object, which others will tell of."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
