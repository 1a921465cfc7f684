"""What knowledge questions ask of a model's layers: a light pass over single questions, each with its right answer.

The loss of a question is the mean cross-entropy of the tokens of its right answer alone, given the question, so gradients say what
the answer hangs on and not how the question reads. Of every layer the Fisher mass is kept, the mean of ‖G_q‖_F² over questions with
G_q = Dᵀ X never formed,

    ‖G_q‖_F² = Σ_tu (x_t·x_u)(d_t·d_u)

and of every input ρ between x and g at a few tokens of each question (see ``fisherfold.statistics.dependence``). Nothing of this compresses
anything: it shows where knowledge sits, beside the same figures of plain text.

Shapes: T tokens of one question, x [T, m] and d [T, n] of a layer, g [T, m] of an input.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fisherfold.network.gradient_pass import gradient_pass
from fisherfold.network.layers import LinearLayer, by_group, forward_hooks, input_gradient_hooks, layer_modules
from fisherfold.run.errors import InputError, NumericalError
from fisherfold.run.params import CaptureParams
from fisherfold.run.progress import track_lines
from fisherfold.run.tables import read_table
from fisherfold.statistics.dependence import RHO_FIELDS, measure_dependence
from fisherfold.statistics.shard import loaded_model
from fisherfold.statistics.token_sample import sample_positions

TABLE = "questions.parquet"
TOKENS = 8  # of a question, for ρ
DRAWS = 60
ANSWERS = pa.schema(
    [
        ("module", pa.string()),
        ("group", pa.string()),
        ("questions", pa.int32()),
        ("fisher_mass", pa.float64()),
        ("text_mass", pa.float64()),
        *RHO_FIELDS,
    ]
)
"""Mean ‖G_q‖² of questions and ‖G_s‖² of calibration sequences (null if no gradients were captured); ρ in the row of an input's first
layer."""


def measure_questions(folder: Path, model_folder: Path, table: Path, params: CaptureParams) -> None:
    """Unit of work: the first `capture.knowledge_questions` questions, one at a time.

    Raises:
        InputError: a question has no tokens.
        NumericalError: a question's gradient is not finite and capture.skip_nonfinite is off.
    """
    model, layers = loaded_model(model_folder, params.dtype)
    tokenizer = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
    questions = read_table(table).slice(0, params.knowledge_questions).to_pylist()
    encoded = [encode_answer(tokenizer, question) for question in questions]
    seen = QuestionSums(model, layers, min([TOKENS, *(len(ids) for ids, _ in encoded)]), params.seed)
    for number, (ids, first) in enumerate(track_lines("capture", "questions", encoded, len(encoded))):
        if not seen.add(number, ids, first) and not params.skip_nonfinite:
            raise NumericalError(
                f"Stage 'capture': question {number} ({questions[number]['question']!r}) has a gradient that is not finite. Set "
                "capture.skip_nonfinite: true to leave it out, or capture.knowledge_questions: 0."
            )
    pq.write_table(pa.Table.from_pylist(seen.rows(layers), ANSWERS), folder / TABLE)


def encode_answer(tokenizer: PreTrainedTokenizerBase, question: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """Token ids [T] of a question with its right answer, as stage `evaluate` scores it, and where the answer begins.

    Raises:
        InputError: the tokenizer makes fewer than two tokens of it, so no token is predicted.
    """
    text = question["question"]
    whole = tokenizer(f"{text} {question['choices'][question['answer']]}").input_ids
    if len(whole) < 2:
        raise InputError(
            f"Stage 'capture': the tokenizer makes {len(whole)} tokens of question {text!r} and its answer. Mend the questions "
            "(prepare.questions) or the tokenizer, or set capture.knowledge_questions: 0."
        )
    return torch.tensor(whole), min(len(tokenizer(text).input_ids), len(whole) - 1)


class QuestionSums:
    """Fisher mass of every layer and sampled x, g of every input, question by question."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[LinearLayer], tokens: int, seed: int) -> None:
        modules = layer_modules(model, layers)
        self.model, self.tokens, self.seed, self.asked = model, tokens, seed, 0
        self.modules = modules
        self.groups = {name: [modules[layer.name] for layer in group] for name, group in by_group(layers).items()}
        self.mass: dict[str, float] = defaultdict(float)
        self.pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)

    def add(self, number: int, ids: torch.Tensor, first: int) -> bool:
        """Ask one question [T] whose answer begins at token `first`; whether its gradients were finite, else it is left out."""
        mass: dict[str, torch.Tensor] = {}
        inputs: dict[str, list[torch.Tensor]] = defaultdict(list)
        gradients: dict[str, list[torch.Tensor]] = defaultdict(list)

        def on_forward(name: str, x: torch.Tensor, output: torch.Tensor) -> None:
            rows = x.detach().flatten(0, -2).float()
            if name in self.groups:
                inputs[name].append(rows)
            if output.requires_grad:
                output.register_hook(lambda d: add_mass(name, rows, d.flatten(0, -2).float()))

        def add_mass(name: str, x: torch.Tensor, d: torch.Tensor) -> None:
            mass[name] = mass.get(name, 0.0) + ((x @ x.T) * (d @ d.T)).sum(dtype=torch.float64)

        with (
            input_gradient_hooks(self.groups, lambda name, g: gradients[name].append(g.flatten(0, -2).float())),
            forward_hooks(self.modules, on_forward),
        ):
            result = gradient_pass(self.model, ids[None], first)
        finite = bool(result.finite.all()) and all(value.isfinite() for value in mass.values())
        if finite:
            self._keep(number, len(ids), mass, inputs, gradients)
        return finite

    def _keep(
        self, number: int, length: int, mass: dict[str, Any], inputs: dict[str, Any], gradients: dict[str, Any]
    ) -> None:
        """Layers that are used once, and see every token, give tokens for ρ."""
        self.asked += 1
        for name, value in mass.items():
            self.mass[name] += value.item()
        at = sample_positions([number], length, self.tokens, self.seed)[0]
        for name, (x, *more) in inputs.items():
            if not more and len(x) == length and len(gradients[name]) == 1:
                self.pairs[name].append((x[at].cpu(), gradients[name][0][at].cpu()))

    def rows(self, layers: Sequence[LinearLayer]) -> list[dict[str, Any]]:
        """One row a layer, in model order, or none if nothing was asked; `text_mass` is not known here."""
        rows = []
        for layer in layers if self.asked else ():
            row = {"module": layer.name, "group": layer.group, "questions": self.asked}
            row["fisher_mass"] = self.mass[layer.name] / self.asked
            if self.pairs[layer.name]:
                x, g = (torch.stack(side) for side in zip(*self.pairs[layer.name]))
                row |= measure_dependence(x, g, DRAWS, self.seed)
            rows.append(row)
        return rows
