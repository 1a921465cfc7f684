"""`fisherfold chat`: what the dense and the compressed model answer, side by side, greedily, so that differences are theirs and not chance's."""

import errno
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fisherfold.export.lineage import read_lineage
from fisherfold.run.errors import CorruptArtifact, FisherfoldError, InputError, first_line, system_number
from fisherfold.run.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fisherfold.evaluation.model_run import ModelRun


class Answer(NamedTuple):
    """What a model wrote, and how long it took."""

    text: str
    tokens: int
    seconds: float

    @property
    def pace(self) -> str:
        """Tokens and tokens a second, for reading."""
        return f"({self.tokens} tokens, {self.tokens / self.seconds:.1f} a second)"


def chat(compressed: Path, dense: str | None, workspace: Workspace | None, prompts: Iterator[str], tokens: int) -> int:
    """Answer prompts until there are no more; return the exit status.

    Args:
        compressed: the folder of the compressed model.
        dense: folder or hub name of the dense one; None: the project's, else the one that the compressed model was made from.
        workspace: the project that this process stands in, if it does.
        prompts: one at a time.
        tokens: of an answer, at most.

    Raises:
        InputError: there is no such model.
    """
    sources = {"dense": dense or dense_of(compressed, workspace), "compressed": str(compressed)}
    models = {name: load(source) for name, source in sources.items()}
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


def load(source: str) -> tuple["ModelRun", "PreTrainedTokenizerBase"]:
    """A model in memory as stage evaluate runs it, and its tokenizer; no code from its folder is run.

    Raises:
        InputError: there is no such model.
    """
    from huggingface_hub import snapshot_download

    from fisherfold.evaluation.model_run import ModelRun
    from fisherfold.run.determinism import chosen_device

    dtype = "float32" if chosen_device() == "cpu" else "bfloat16"
    try:
        folder = Path(source) if Path(source).is_dir() else Path(snapshot_download(source))
        run = ModelRun(folder, dtype, batch_size=1, pass_tokens=1, cure="")
        run.decoder  # noqa: B018  loaded now, not with the first prompt
        return run, run.tokenizer
    except Exception as error:  # a damaged or odd file makes the libraries raise almost anything
        if isinstance(error, FisherfoldError) or system_number(error) == errno.ENOMEM:
            raise
        raise InputError(f"{source} is no model that can be loaded here: {first_line(error)}") from None


def answer(run: "ModelRun", tokenizer: "PreTrainedTokenizerBase", prompt: str, tokens: int) -> Answer:
    """The likeliest answer to a prompt, through the chat template if there is one, and no longer than the model's positions."""
    from fisherfold.inputs.conversations import encode_messages, has_chat_format

    if has_chat_format(tokenizer):
        ids = encode_messages(tokenizer, [{"role": "user", "content": prompt}], "the prompt", answer_follows=True)
    else:
        ids = tokenizer(prompt)["input_ids"]
    room = tokens if run.positions is None else max(0, min(tokens, run.positions - len(ids)))
    start = time.perf_counter()
    (found,) = run.decoder.answer([ids], room)
    seconds = time.perf_counter() - start
    return Answer(tokenizer.decode(found, skip_special_tokens=True).strip(), len(found), seconds)


def print_side_by_side(answers: Mapping[str, Answer]) -> None:
    """Print answers in columns of the same width."""
    width = (shutil.get_terminal_size((80, 24)).columns - 3 * (len(answers) - 1)) // len(answers)
    columns = [
        [name, "─" * width, *wrapped(found.text, width), *wrapped(found.pace, width)] for name, found in answers.items()
    ]
    for number in range(max(map(len, columns))):
        cells = [column[number] if number < len(column) else "" for column in columns]
        print(" │ ".join(f"{cell:<{width}}" for cell in cells).rstrip())
    print(flush=True)


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
