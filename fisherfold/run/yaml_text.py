"""YAML as plain values. What no value can be made of (a date with a thirteenth month, a number of 5,000 digits) is an error of the text, too."""

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError


def parse_yaml(source: str | Path, pure: bool = False) -> Any:
    """The values of a text or a file.

    Args:
        source: of YAML 1.2.
        pure: by the parser in Python, whose marks have indices.

    Raises:
        YAMLError: it is not YAML, not UTF-8, nested too deeply, or holds what is no value of its type.
        OSError: the file cannot be read.
    """
    try:
        return YAML(typ="safe", pure=pure).load(source)
    except (ValueError, KeyError, RecursionError) as error:
        raise YAMLError(str(error) or type(error).__name__) from None
