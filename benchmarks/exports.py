"""What other runtimes make of a compressed checkpoint: each export against the checkpoint itself, on a text as long as the one it was traced with and on a longer one.

    python benchmarks/exports.py FOLDER…                    # folders of compressed checkpoints, such as artifacts/factorize/model
    python benchmarks/exports.py FOLDER --only onnx,openvino
    python tests/support/served_models.py DIR               # makes small ones: llama, qwen2, gemma3 with plain, pivoted and shared factors

ONNX needs onnxscript and onnxruntime, OpenVINO needs openvino (pip). Numbers are the largest difference of logits, in deviations of the checkpoint's
own; a refusal is shown by name.
"""

import argparse
import importlib.metadata
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, pipeline

TRACED, OTHER = 9, 17  # tokens
LONGEST = 128

Run = Callable[[torch.Tensor], torch.Tensor]
"""ids [1, T] -> logits [1, T, vocabulary]."""


class Logits(nn.Module):
    """A language model as a function of tokens alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=False).logits


def load(folder: str, **options: object) -> nn.Module:
    """The checkpoint by the code in its folder."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def ids(length: int) -> torch.Tensor:
    return torch.arange(3, 3 + length)[None]


def with_device_map(folder: str) -> Run:
    return Logits(load(folder, device_map="auto"))


def in_pipeline(folder: str) -> Run:
    return Logits(pipeline("text-generation", model=folder, trust_remote_code=True, device="cpu").model)


def compiled(folder: str) -> Run:
    return torch.compile(Logits(load(folder)), fullgraph=True, dynamic=True, backend="eager")


def traced(folder: str) -> Run:
    return torch.jit.trace(Logits(load(folder)), (ids(TRACED),), check_trace=False)


def exported(folder: str) -> Run:
    return program(folder).module()


def program(folder: str) -> torch.export.ExportedProgram:
    return torch.export.export(Logits(load(folder)), (ids(TRACED),), dynamic_shapes=any_length())


def any_length() -> dict[str, dict[int, torch.export.Dim]]:
    return {"ids": {1: torch.export.Dim("length", min=2, max=LONGEST)}}


def in_onnxruntime(folder: str) -> Run:
    import onnxruntime

    path = Path(tempfile.mkdtemp()) / "model.onnx"
    torch.onnx.export(Logits(load(folder)), (ids(TRACED),), path, dynamo=True, dynamic_shapes=any_length())
    session = onnxruntime.InferenceSession(path)
    name = session.get_inputs()[0].name
    return lambda ids: torch.from_numpy(session.run(None, {name: ids.numpy()})[0])


def in_openvino(folder: str) -> Run:
    import openvino

    model = openvino.compile_model(
        openvino.convert_model(program(folder)), "CPU"
    )  # a trace it refuses, of dense models too
    return lambda ids: torch.from_numpy(model(ids.numpy())[0])


WAYS: dict[str, Callable[[str], Run]] = {
    "device_map": with_device_map,
    "pipeline": in_pipeline,
    "compile": compiled,
    "jit.trace": traced,
    "export": exported,
    "onnx": in_onnxruntime,
    "openvino": in_openvino,
}
"""folder -> how the model runs there."""


def tried(way: Callable[[str], Run], folder: str) -> str:
    """The largest differences for both lengths, or the error."""
    own = Logits(load(folder))
    try:
        run = way(folder)
        return ", ".join(f"{difference(run(ids(length)), own(ids(length))):.0e}" for length in (TRACED, OTHER))
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.std())


def versions() -> str:
    names = ("torch", "transformers", "accelerate", "onnx", "onnxruntime", "openvino")
    installed = {each.name.lower() for each in importlib.metadata.distributions()}
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names if name in installed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--only", default=",".join(WAYS))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    print(versions())
    for folder in options.folders:
        for name in options.only.split(","):
            print(f"{folder} {name:10} {tried(WAYS[name], folder)}", flush=True)


if __name__ == "__main__":
    main()
