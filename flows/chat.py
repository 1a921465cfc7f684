"""`fisherfold chat`: what the dense and the compressed model answer, side by side, greedily, so that differences are theirs and not chance's."""

import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fisherfold.export.lineage import read_lineage
from fisherfold.run.errors import CorruptArtifact, InputError
from fisherfold.run.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def chat(compressed: Path, dense: str | None, workspace: Workspace | None, prompts: Iterator[str], tokens: int) -> int:
    """Answer prompts until there are no more; return the exit status.

    Args:
        compressed: the folder of the compressed model.
        dense: folder or hub name of the dense one; None: the project's, else the one that the compressed model was made from.
        workspace: the project that this process stands in, if it does.
        prompts: one at a time.
        tokens: of an answer, at most.

    Raises:
        InputError: a folder holds no model.
    """
    names = {"dense": dense or dense_of(compressed, workspace), "compressed": str(compressed)}
    models = {name: load(source) for name, source in names.items()}
    for prompt in prompts:
        print_side_by_side({name: answer(*model, prompt, tokens) for name, model in models.items()})
    return 0


def dense_of(compressed: Path, workspace: Workspace | None) -> str:
    """Where the dense model is that a compressed one is compared with.

    Raises:
        InputError: it is not known.
    """
    if workspace and workspace.model.is_dir():
        return str(workspace.model)
    try:
        source = read_lineage(compressed)["lineage"].get("model", {})
    except CorruptArtifact:
        source = {}
    if source.get("origin") == "hub":
        return str(source["name"])
    raise InputError(f"The dense model of {compressed} is not known here. Name it: --dense FOLDER_OR_HUB_NAME.")


def load(source: str) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """A model ready to answer, and its tokenizer; no code from its folder is run.

    Raises:
        InputError: there is no such model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    import fisherfold.runtime  # noqa: F401  registers our own classes
    from fisherfold.run.determinism import chosen_device

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(source, device_map=chosen_device())
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InputError(f"{source} is no model that can be loaded here: {str(error).splitlines()[0]}") from None
    torch.set_grad_enabled(False)
    return model.eval(), tokenizer


def answer(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompt: str, tokens: int) -> str:
    """The likeliest answer to a prompt, through the chat template if there is one."""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        batch = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        batch = tokenizer(prompt, return_tensors="pt")
    batch = {name: tensor.to(model.device) for name, tensor in batch.items() if name in ("input_ids", "attention_mask")}
    end = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    found = model.generate(**batch, max_new_tokens=tokens, do_sample=False, pad_token_id=end)
    return tokenizer.decode(found[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def print_side_by_side(answers: Mapping[str, str]) -> None:
    """Print texts in columns of the same width."""
    width = (shutil.get_terminal_size((80, 24)).columns - 3 * (len(answers) - 1)) // len(answers)
    columns = [[name, "─" * width, *wrapped(text, width)] for name, text in answers.items()]
    for number in range(max(map(len, columns))):
        cells = [column[number] if number < len(column) else "" for column in columns]
        print(" │ ".join(f"{cell:<{width}}" for cell in cells).rstrip())
    print()


def wrapped(text: str, width: int) -> list[str]:
    """The lines of a text, none wider; an empty answer says so."""
    lines = [line for part in text.splitlines() for line in textwrap.wrap(part, width) or [""]]
    return lines or ["(an empty answer)"]


def typed_prompts() -> Iterator[str]:
    """What is typed, or piped in, line by line; an empty line or the end ends it."""
    shown = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            prompt = input(shown).strip()
        except EOFError:
            return
        if not prompt:
            return
        yield prompt
