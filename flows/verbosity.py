"""How much a run tells: its own lines, less of them (-q), or also what DVC and the libraries say (-v)."""

import os
import warnings

VERBOSE = "FISHERFOLD_VERBOSE"
SILENT = {
    "PYTHONWARNINGS": "ignore",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
}
"""What the libraries read; their bars would tear our lines, and they warn of much that a stage has checked itself, in words that no user can act on."""


def be_verbose(verbose: bool) -> None:
    """Whether this process, and those that it starts, let DVC and the libraries speak from now on; so it stays where the environment says so."""
    if verbose:
        os.environ[VERBOSE] = "1"


def is_verbose() -> bool:
    """Whether they do."""
    return bool(os.environ.get(VERBOSE))


def silence_libraries() -> None:
    """Keep warnings of libraries out of the way, here and in processes that this one starts, unless asked for."""
    if is_verbose():
        return
    for name, value in SILENT.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
