"""Loading the prepared dense model, whole or one weight at a time."""

import json
from collections import OrderedDict
from collections.abc import Callable
from functools import update_wrapper
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, ClassVar, Generic, ParamSpec, TypeVar, cast

import torch
from safetensors import safe_open

from fisherfold.network.layers import LinearLayer
from fisherfold.run.determinism import STREAMED, chosen_placement, usable_device
from fisherfold.run.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Arguments = ParamSpec("Arguments")
Loaded = TypeVar("Loaded")
PLACES = 2  # of models in memory: evaluation compares two
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def decomposing_device() -> str:
    """Where this process decomposes matrices in float64: the chosen CUDA device, else the cpu (mps has no float64)."""
    device = usable_device()
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device if device.startswith("cuda") else "cpu"


def load_model(folder: Path, dtype: torch.dtype) -> "PreTrainedModel":
    """Load a causal language model for measuring: evaluation mode, frozen parameters, on the chosen device.

    Under placement `streamed` its weights stay on the disk, see `fisherfold.network.weights_on_call`.
    """
    if chosen_placement() == STREAMED:
        from fisherfold.network.weights_on_call import read_on_call

        return read_on_call(folder, dtype)
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=usable_device(), local_files_only=True)
    return model.eval().requires_grad_(False)


class StaysLoaded(Generic[Arguments, Loaded]):
    """Decorator: what `load` gives for the same arguments stays in memory from one unit of work to the next.

    All functions decorated so share PLACES: before another is loaded, the one that was not asked for longest is let go. So a
    process that runs all stages holds no more models than one that runs the largest.
    """

    _places: ClassVar[OrderedDict[tuple[Any, ...], Any]] = OrderedDict()
    _lock: ClassVar[RLock] = RLock()

    def __init__(self, load: Callable[Arguments, Loaded]) -> None:
        self.load = load
        update_wrapper(self, load)

    def __call__(self, *arguments: Arguments.args, **named: Arguments.kwargs) -> Loaded:
        place = (self.load, chosen_placement(), arguments, *sorted(named.items()))
        with self._lock:
            while place not in self._places and len(self._places) >= PLACES:
                self._places.popitem(last=False)
            if place not in self._places:
                self._places[place] = self.load(*arguments, **named)
            self._places.move_to_end(place)
            return cast(Loaded, self._places[place])

    @classmethod
    def cache_clear(cls) -> None:
        """Let go of all that is loaded, by whatever function."""
        cls._places.clear()


def read_weight(folder: Path, layer: LinearLayer) -> torch.Tensor:
    """The weight W [n, m] of one linear layer, read alone from the safetensors files of `folder`.

    Raises:
        InputError: no file holds it.
    """
    key = layer.tensor
    with safe_open(folder / _weight_file(folder, key), framework="pt") as file:
        weight = file.get_slice(key)[layer.expert] if layer.stack else file.get_tensor(key)
    return weight.T if layer.transposed else weight


def _weight_file(folder: Path, key: str) -> str:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return "model.safetensors"
    files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    if key not in files:
        raise InputError(f"{folder} holds no weight {key!r}.")
    return files[key]
