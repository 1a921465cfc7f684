"""The parameters of the pipeline: one block of params.yaml per stage, every key checked.

A key is here only if it can change a bit of a result. Where work runs (engine, device, address) is a setting of
the run, see ``flows``.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml.error import YAMLError

from fisherfold.run.errors import ParameterError
from fisherfold.run.workspace import STAGES
from fisherfold.run.yaml_text import parse_yaml

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Share = Annotated[float, Field(gt=0, lt=1)]
Damping = Annotated[float, Field(ge=0, le=1)]
Floor = Annotated[float, Field(ge=0, lt=1)]
Ceiling = Annotated[float, Field(gt=0, le=1)]
Dtype = Literal["float32", "bfloat16", "float16"]
Products = Literal["bfloat16", "float32"]


class Block(BaseModel):
    """One stage's parameters: unknown keys are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ComputeBlock(Block):
    """A block of a stage that adds up floats: their order, and so the last bits, depend on the number of threads."""

    threads: Count = 2


class CorpusShare(Block):
    """One of several corpora: its name, as in `prepare.corpus`, and its weight among them."""

    source: str
    share: Annotated[float, Field(gt=0)] = 1.0


class PrepareParams(ComputeBlock):
    """Of stage prepare: the model, the text and the questions."""

    model: str = "smollm2-135m-instruct"
    revision: str | None = None
    dtype: Dtype = "float32"
    gates: list[str] = []
    experts: Literal["layers", "all", "dense"] = "layers"
    corpus: str | Annotated[tuple[CorpusShare, ...], Field(min_length=1)] = "wikipedia-leads"
    unseen: str | Annotated[tuple[CorpusShare, ...], Field(min_length=1)] | None = "electronic-texts"
    unseen_sequences: Count = 16
    self_written: Floor = 0.4
    free_text: Floor = 0.3
    continued: Annotated[float, Field(ge=0, le=1)] = 0.0
    prompts: str = "everyday"
    held_out_prompts: Annotated[int, Field(ge=0)] = 32
    answer_tokens: Count = 160
    writing_dtype: Literal["bfloat16"] | None = "bfloat16"
    text_field: str | None = None
    sequence_length: Annotated[int, Field(ge=2)] = 256
    calibration_sequences: Count = 256
    tuning_sequences: Count = 16
    training_sequences: Annotated[int, Field(ge=0)] = 512
    evaluation_sequences: Count = 32
    questions: str | None = "wikipedia-descriptions"
    question_count: Count = 200
    seed: Seed = 0

    @property
    def corpora(self) -> tuple[CorpusShare, ...]:
        """The corpora and their weights, one or several."""
        return _shares(self.corpus)

    @property
    def unseen_corpora(self) -> tuple[CorpusShare, ...]:
        """The corpora for evaluation alone, and their weights; none, one or several."""
        return _shares(self.unseen) if self.unseen else ()

    @property
    def splits(self) -> dict[str, int]:
        """Sequences of every split, in the order of drawing: more of one moves none before it."""
        sizes = {
            "evaluation": self.evaluation_sequences,
            "tuning": self.tuning_sequences,
            "calibration": self.calibration_sequences,
        }
        return sizes | ({"training": self.training_sequences} if self.training_sequences else {})

    @property
    def evaluated_sequences(self) -> int:
        """All sequences of the evaluation split."""
        return self.evaluation_sequences + (self.unseen_sequences if self.unseen else 0)


def _shares(corpus: str | tuple[CorpusShare, ...]) -> tuple[CorpusShare, ...]:
    return (CorpusShare(source=corpus),) if isinstance(corpus, str) else corpus


class CaptureParams(ComputeBlock):
    """Of stage capture: what one pass over the calibration sequences measures."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    products: Products = "bfloat16"
    placement: Literal["whole", "streamed"] = "whole"
    batch_size: Count = 2
    sequences_per_shard: Count = 8
    labels: Literal["data", "model"] = "model"
    draws: Annotated[int, Field(ge=0)] = 1
    leaves: Count = 1
    gradients: Literal["none", "sums", "sketch", "exact"] = "none"
    sketch_rank: Count = 32
    layers_per_pass: Count | None = None
    skip_nonfinite: bool = False
    tokens_per_sequence: Annotated[int, Field(ge=0)] = 8
    token_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    knowledge_questions: Annotated[int, Field(ge=0)] = 32
    seed: Seed = 0


class TokenPassParams(Block):
    """Estimator `every_token`: passes over the calibration text after that of stage `capture`."""

    passes: Count = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: Count = 2
    layers_per_pass: Count | None = None


class KroneckerParams(ComputeBlock):
    """Of stage kronecker: how the Kronecker factors are estimated."""

    estimator: str = "kfac"
    method: str = "power"
    iterations: Count = 200
    tolerance: Annotated[float, Field(gt=0)] = 1e-4
    dtype: Literal["float32", "float64"] = "float32"
    sequences_per_gradient: Count = 1
    prior: Damping = 0.0
    clip: Annotated[float, Field(gt=0)] | None = None
    trim_tokens: Annotated[int, Field(ge=0)] = 0
    token_pass: TokenPassParams = TokenPassParams()
    diagnostics: Literal["none", "basic", "full"] = "basic"
    dependence_draws: Annotated[int, Field(ge=0)] = 60
    seed: Seed = 0


class FascParams(Block):
    """Metric `fasc`."""

    objective: str = "gaussian"
    projector: Literal["orthonormal", "oblique"] = "oblique"
    share: Share = 0.5
    steps: Annotated[int, Field(ge=0)] = 5
    threshold: float | None = None
    rho: Literal["rho_F", "rho_cca", "rho_kfac"] = "rho_kfac"


class ExpertsParams(Block):
    """Of a mixture's experts: what those with few tokens borrow from the others, and whether all share a right factor."""

    prior_tokens: Annotated[float, Field(ge=0)] = 32.0
    fewest: Annotated[int, Field(ge=0)] = 1
    few: Literal["dense", "mean"] = "dense"
    shared: bool = False


class SubspaceParams(ComputeBlock):
    """Of stage subspace: the metric of the weighted decomposition."""

    metric: str = "kfac"
    input_damping: Damping | Literal["ledoit_wolf", "oas"] = 0.01
    output_damping: Damping | Literal["ledoit_wolf", "oas"] = 0.05
    asvd_alpha: Annotated[float, Field(ge=0)] = 0.5
    share_inputs: bool = False
    experts: ExpertsParams = ExpertsParams()
    fasc: FascParams = FascParams()


class FermigradParams(Block):
    """Allocator `fermigrad`; temperatures and rates are shares of each layer's rank range."""

    objective: Literal["kl", "cross_entropy"] = "kl"
    steps: Count = 40
    batches: Count = 1
    sequences: Count = 4
    tau_first: Share = 0.03
    tau_last: Share = 0.007
    rate_first: Share = 0.03
    rate_last: Share = 0.005
    dtype: Literal["float32", "bfloat16"] = "float32"
    products: Products = "bfloat16"


class MeasuredParams(Block):
    """Allocators `sensitivity` and `ilp`, which measure one layer at a time."""

    levels: Count = 8
    sequences: Count = 2
    dtype: Literal["float32", "bfloat16"] = "float32"


class RanksParams(ComputeBlock):
    """Of stage ranks: the budget and who spends it."""

    ratio: Share = 0.2
    budget: str = "parameters"
    allocator: str = "fisher"
    storage: Literal["factors", "pivoted", "pivoted_outputs", "pivoted_inputs"] = "pivoted"
    round_to: Count = 1
    floor: Floor | dict[str, Floor] = 0.0
    ceiling: Ceiling | dict[str, Ceiling] = 1.0
    fixed: dict[str, Annotated[int, Field(ge=0)]] = {}
    exclude: list[str] = []
    widths: tuple[Literal[8, 4], ...] = ()
    expert_classes: Count = 4
    fermigrad: FermigradParams = FermigradParams()
    measured: MeasuredParams = MeasuredParams()


class RefineParams(Block):
    """Of stage factorize: the training of decoder blocks after truncation."""

    threads: Count = 2
    passes: Annotated[int, Field(ge=0)] = 2
    min_steps: Annotated[int, Field(ge=0)] = 96
    rate: Annotated[float, Field(gt=0)] = 4e-4
    batch_size: Count = 2
    products: Products = "bfloat16"


class HealParams(Block):
    """Of stage factorize: the training of all factors together."""

    threads: Count = 2
    passes: Annotated[int, Field(ge=0)] = 1
    rate: Annotated[float, Field(gt=0)] = 3e-5
    batch_size: Count = 4
    products: Products = "bfloat16"


class FactorizeParams(ComputeBlock):
    """Of stage factorize: what is written, and in which dtype."""

    threads: Count = 1
    dtype: Dtype | None = None
    bits: Literal[4, 8] | None = None
    head_bits: Literal[8] | None = None
    target: Literal["transformers", "vllm", "gguf"] = "transformers"
    dense_export: bool = False
    gguf_export: bool = False
    refine: RefineParams = RefineParams()
    heal: HealParams = HealParams()


class EvaluateParams(ComputeBlock):
    """Of stage evaluate: what the models are compared on."""

    dtype: Dtype = "float32"
    batch_size: Count = 4
    answer_tokens: Count = 64
    tasks: list[str] = []
    task_folder: str = "data/tasks"
    trust_task_code: bool = False
    task_limit: Count | None = None


class ReportParams(Block):
    """Of stage report."""

    title: str = "Fisherfold"


class Params(Block):
    """All blocks of params.yaml, in the order of the pipeline, and the name of the bundle that some values are of (see `presets`)."""

    preset: Literal["fast", "balanced", "best"] = "balanced"
    prepare: PrepareParams = PrepareParams()
    capture: CaptureParams = CaptureParams()
    kronecker: KroneckerParams = KroneckerParams()
    subspace: SubspaceParams = SubspaceParams()
    ranks: RanksParams = RanksParams()
    factorize: FactorizeParams = FactorizeParams()
    evaluate: EvaluateParams = EvaluateParams()
    report: ReportParams = ReportParams()


def load_params(path: Path) -> Params:
    """Read and check params.yaml.

    Raises:
        ParameterError: the file is missing or not YAML, or a key or value is not valid; the message names the key
            and, for an unknown one, the nearest that exists.
    """
    return check_params(read_document(path), source=str(path))


def read_document(path: Path) -> dict[str, Any]:
    """params.yaml as it stands, parsed and not yet checked; see ``load_params`` for the errors."""
    try:
        document = parse_yaml(path)
    except FileNotFoundError:
        raise ParameterError(f"{path} does not exist. Run fisherfold from the folder that holds params.yaml.") from None
    except OSError as error:
        raise ParameterError(f"{path} cannot be read ({error}).") from None
    except YAMLError as error:
        raise ParameterError(f"{path} is not valid YAML: {error}") from None
    return document or {}


def check_params(document: dict[str, Any], source: str) -> Params:
    """Validate a parsed params document; see ``load_params`` for the errors."""
    if not isinstance(document, dict):
        raise ParameterError(f"{source}: expected one block per stage ({', '.join(STAGES)}), found {document!r}.")
    try:
        return Params.model_validate(document)
    except ValidationError as error:
        lines = [_explain(issue) for issue in error.errors()]
        raise ParameterError(f"{source}: " + "; ".join(lines)) from None


def _explain(issue: Mapping[str, Any]) -> str:
    """One validation issue as a sentence: the dotted key, what is wrong, the nearest valid key."""
    location = [part for part in issue["loc"] if isinstance(part, str)]
    key = ".".join(location)
    if issue["type"] == "extra_forbidden":
        valid = valid_keys(location[:-1])
        near = difflib.get_close_matches(location[-1], valid, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"valid are {', '.join(valid)}"
        return f"unknown parameter {key!r}; {hint}"
    return f"{key} = {issue['input']!r}: {issue['msg'].lower()}"


def valid_keys(blocks: Sequence[str] = ()) -> list[str]:
    """The names of the blocks, or of the keys of one block, or of a block within it."""
    block: Any = Params
    for name in blocks:
        block = block.model_fields[name].annotation
    return list(block.model_fields)
