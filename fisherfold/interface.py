"""The pipeline from Python, step by step or whole: `from fisherfold import Compression, compress`.

    work = Compression("path/to/model", texts)     # stage prepare
    statistics = work.capture()                    # stage capture
    layer = statistics.layers[0]
    pair = work.estimate(layer)                    # A, B of one layer's Fisher
    basis = work.decompose(layer)                  # its weight as ordered components
    ranks = work.allocate(ratio=0.3)               # stages kronecker, subspace, ranks
    work.save("smaller")                           # stage factorize

The steps are the stages themselves, called without a driver in a folder of their own: the same parameters give the same bits as
`fisherfold run`, and what is finished is not computed again. Keyword arguments are the keys of the stage's block in params.yaml and
stay set for the steps after it.
"""

import json
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fisherfold.cli import own_code
from fisherfold.fisher.estimators import ESTIMATORS, CapturedLayer, Estimate
from fisherfold.network.layers import LinearLayer, by_group, read_layers
from fisherfold.run.determinism import placed
from fisherfold.run.disk import empty_folder
from fisherfold.run.errors import InputError, NumericalError, ParameterError
from fisherfold.run.params import Params, check_params
from fisherfold.run.progress import be_quiet, is_quiet
from fisherfold.run.store import read_array
from fisherfold.run.workspace import STAGES, Workspace
from fisherfold.statistics.layer_statistics import Statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEXT_ALONE: dict[str, Any] = {
    "self_written": 0.0,
    "free_text": 0.0,
    "held_out_prompts": 0,
    "unseen": None,
    "questions": None,
    "tuning_sequences": 4,
    "training_sequences": 0,
    "evaluation_sequences": 1,
}
"""Of stage prepare where nothing else is asked for: the corpus as it is, and next to nothing kept back from calibration."""
RECIPES = ("models", "corpora", "questions", "prompts")
Document = str | Sequence[Mapping[str, str]]
"""A text, or a conversation: messages with `role` and `content`."""


@dataclass(frozen=True)
class Basis:
    """The components of one layer's weight W [n, m], those that cost most first.

    Attributes:
        left: [n, r], r = min(n, m), or min(Σ n, m) where layers share the right factor.
        sigma: σ [r]: keeping k components loses Σ_{i>k} σ_i² under the metric.
        right: [r, m].
    """

    left: torch.Tensor
    sigma: torch.Tensor
    right: torch.Tensor

    def truncated(self, rank: int) -> torch.Tensor:
        """The product of the first `rank` components [n, m]; all of them give W."""
        return self.left[:, :rank] @ self.right[:rank]


class Compression:
    """One model, one corpus, and what has been computed of them so far.

    Args:
        model: a Hugging Face folder, a GGUF file, a name on the hub or of a recipe; or a model in memory, which is only read.
        corpus: texts (or conversations), or what `prepare.corpus` may be: a file, a folder, a name on the hub or of a recipe.
        tokenizer: of a model in memory, if it does not say where its own is.
        folder: where all intermediate results go; given again, finished work is found there. By default a temporary one.
        quiet: whether progress is kept from stderr.
        prepare: keys of block `prepare`; see `TEXT_ALONE` for what differs from params.yaml.

    Raises:
        ParameterError: a key or value is not valid.
        InputError: the model cannot be compressed, or the corpus is too small for `calibration_sequences` of `sequence_length` tokens.
    """

    def __init__(
        self,
        model: "str | Path | PreTrainedModel",
        corpus: str | Path | Iterable[Document],
        *,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        folder: str | Path | None = None,
        quiet: bool = True,
        **prepare: Any,
    ) -> None:
        self._temporary = TemporaryDirectory(prefix="fisherfold-") if folder is None else None
        self.workspace = Workspace(Path(self._temporary.name if self._temporary else folder).resolve())  # type: ignore[arg-type]
        self.quiet = quiet
        self.params = Params()
        self._finished: dict[str, str] = {}
        _offer_recipes(self.workspace)
        sources = {
            "model": _named_model(self.workspace, model, tokenizer),
            "corpus": _named_corpus(self.workspace, corpus),
        }
        self._set("prepare", TEXT_ALONE | sources | prepare)
        self._through("prepare")

    @property
    def layers(self) -> list[LinearLayer]:
        """The linear layers that are compressed, in model order."""
        return read_layers(self.workspace.out("prepare"))

    def capture(self, **capture: Any) -> Statistics:
        """One forward and backward pass over the calibration sequences; see ``stages.capture`` for what it sums.

        Raises:
            NumericalError: a loss or a gradient is not finite.
        """
        self._set("capture", capture)
        return self._statistics()

    def estimate(self, layer: LinearLayer | str, **kronecker: Any) -> Estimate:
        """Kronecker factors A [m, m] and B [n, n] of one layer's Fisher matrix, F ≈ B ⊗ A.

        Raises:
            ParameterError: the estimator is unknown, or passes over the text again, which is for all layers at once.
            InputError: it reads what was not captured.
        """
        self._set("kronecker", kronecker)
        estimator = ESTIMATORS.lookup(self.params.kronecker.estimator)
        if estimator.passes:
            raise ParameterError(
                f"kronecker.estimator = {self.params.kronecker.estimator!r} passes over the text again, for all layers at once: use `allocate`."
            )
        return estimator.estimate(CapturedLayer(self._statistics(), self._layer(layer), self.params.kronecker))

    def decompose(self, layer: LinearLayer | str, **subspace: Any) -> Basis:
        """The weight of one layer as components, ordered by what each costs under `metric`; see ``fisherfold.linalg.weighted_svd``.

        Raises:
            ParameterError: the metric is unknown, or needs what was not captured or estimated.
            NumericalError: the metric says nothing about this layer.
        """
        self._set("subspace", subspace)
        self._through("kronecker")
        stage, asked = _stage("subspace"), self._layer(layer)
        site = by_group(self.layers)[asked.group] if stage.shares_inputs(self.params.subspace) else [asked]
        outs = (self.workspace.model, self.workspace.out("capture"), self.workspace.out("kronecker"))
        with TemporaryDirectory(prefix="fisherfold-") as written:
            stage.decompose_groups(Path(written), *outs, [site], self.params.subspace)
            row = json.loads((Path(written) / "rows.json").read_text(encoding="utf-8"))[0]
            if row["dense"]:
                raise NumericalError(f"Module {asked.name!r} cannot be decomposed: {row['dense']}.")
            bases = Path(written) / "bases"
            left, right = read_array(bases, f"{asked.name}/left"), read_array(bases, f"{site[0].name}/right")
        return Basis(left, torch.tensor(row["sigma"], dtype=torch.float64), right)

    def allocate(self, **ranks: Any) -> pa.Table:
        """Decompose all layers and spend the budget; one row a layer: `module`, `n`, `m`, `rank`, `stored_parameters`, `storage`, …

        Raises:
            ParameterError: the allocator is unknown, or no allocation meets the ratio under the limits.
        """
        self._set("ranks", ranks)
        self._through("ranks")
        return pq.read_table(self.workspace.out("ranks") / "ranks.parquet")

    def save(self, folder: str | Path, **factorize: Any) -> Path:
        """Write the compressed model as a Hugging Face folder that carries its own code, tokenizer and card.

        Raises:
            InputError: the folder is there and not empty.
        """
        target = Path(folder)
        if target.exists() and any(target.iterdir()):
            raise InputError(f"{target} is not empty. Name a new folder.")
        self._set("factorize", factorize)
        self._through("factorize")
        shutil.copytree(self._compressed, target, dirs_exist_ok=True)
        return target

    def load(self) -> "PreTrainedModel":
        """The compressed model in memory, ready to answer; no code of its folder runs."""
        import_module("fisherfold.runtime")
        from transformers import AutoModelForCausalLM

        self._through("factorize")
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self._compressed, local_files_only=True)
        return model.eval()

    @property
    def _compressed(self) -> Path:
        return self.workspace.out("factorize") / "model"

    def _layer(self, layer: LinearLayer | str) -> LinearLayer:
        if isinstance(layer, LinearLayer):
            return layer
        for found in self.layers:
            if found.name == layer:
                return found
        raise InputError(
            f"{layer!r} is no layer that is compressed; they are {', '.join(each.name for each in self.layers)}."
        )

    def _statistics(self) -> Statistics:
        self._through("capture")
        return Statistics(self.workspace.out("capture"))

    def _set(self, stage: str, values: Mapping[str, Any]) -> None:
        """Change keys of one block, which stay so."""
        document = self.params.model_dump()
        document[stage] |= dict(values)
        self.params = check_params(document, source="fisherfold.Compression")

    def _through(self, last: str) -> None:
        """Run every stage up to `last` that has not run with the parameters as they are."""
        asked = ""
        before = is_quiet()
        be_quiet(self.quiet or before)
        try:
            for stage in STAGES[: STAGES.index(last) + 1]:
                block = getattr(self.params, stage)
                asked += f"{stage}: {block.model_dump_json()}\n"
                if self._finished.get(stage) != asked:
                    with placed(self.params.capture.placement):
                        _stage(stage).run(self.workspace, block)
                    self._finished[stage] = asked
        finally:
            be_quiet(before)


def compress(
    model: "str | Path | PreTrainedModel",
    corpus: str | Path | Iterable[Document],
    ratio: float = 0.2,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    quiet: bool = True,
    **blocks: Mapping[str, Any],
) -> "PreTrainedModel":
    """The compressed model in memory; nothing stays on disk.

    Args:
        model: see `Compression`.
        corpus: see `Compression`.
        ratio: the share of stored numbers removed from the targeted linear layers.
        tokenizer: see `Compression`.
        quiet: see `Compression`.
        blocks: parameters by block, as in params.yaml: ``prepare={"sequence_length": 128}, subspace={"metric": "svd_llm"}``.

    Raises:
        ParameterError: a block, key or value is not valid, or no allocation meets the ratio.
        InputError: see `Compression`.
    """
    check_params(dict(blocks), source="fisherfold.compress")
    work = Compression(model, corpus, tokenizer=tokenizer, quiet=quiet, **blocks.get("prepare", {}))
    for stage, values in blocks.items():
        work._set(stage, values)
    work._set("ranks", {"ratio": ratio})
    return work.load()


def _stage(name: str) -> Any:
    """The module of a stage. Stages are a building of their own, found beside this library if nowhere else.

    Raises:
        InputError: another package is called `stages`.
    """
    if find_spec("stages") is None:
        sys.path.append(str(own_code()))
    try:
        return import_module(f"stages.{name}")
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("stages"):
            raise InputError(
                f"Another package is called 'stages' ({find_spec('stages')}): take it off sys.path."
            ) from None
        raise


def _offer_recipes(workspace: Workspace) -> None:
    """Put the recipes that came with this library where stages look for them."""
    for kind in RECIPES:
        known = own_code() / "data" / kind
        if known.is_dir() and not workspace.recipes(kind).exists():
            shutil.copytree(known, workspace.recipes(kind))


def _named_model(
    workspace: Workspace, model: "str | Path | PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None"
) -> str:
    """The name by which stage `prepare` finds a model; one in memory is written below the workspace first."""
    if isinstance(model, str | Path):
        return str(Path(model).resolve()) if Path(model).exists() else str(model)
    folder = empty_folder(workspace.root / "data" / f"{model.config.model_type}-in-memory")
    model.save_pretrained(folder)
    (tokenizer or _own_tokenizer(model)).save_pretrained(folder)
    return str(folder)


def _own_tokenizer(model: "PreTrainedModel") -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model.name_or_path)
    except (OSError, ValueError) as error:
        raise InputError(f"The model does not say where its tokenizer is ({error}). Give it as `tokenizer`.") from None
    return tokenizer


def _named_corpus(workspace: Workspace, corpus: str | Path | Iterable[Document]) -> str:
    """The name by which stage `prepare` finds a corpus; texts are written below the workspace first."""
    if isinstance(corpus, str | Path):
        return str(Path(corpus).resolve()) if Path(corpus).exists() else str(corpus)
    file = workspace.root / "data" / "texts.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = ({"text": document} if isinstance(document, str) else {"messages": list(document)} for document in corpus)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)
