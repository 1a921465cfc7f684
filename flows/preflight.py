"""What is wrong with the parameters, found before anything runs: a stage's outputs are removed before it can refuse.

Names of methods, pairs of parameters, the budget and, if stage prepare is to run, the model and the texts. `fisherfold run` and
`doctor` look; so does `fisherfold check`, the first stage of dvc.yaml, for `dvc repro`.
"""

from collections.abc import Sequence
from contextlib import suppress

from fisherfold.run.determinism import asked_device
from fisherfold.run.errors import CorruptArtifact, ParameterError
from fisherfold.run.params import Params, check_params, load_params
from fisherfold.run.workspace import Workspace
from flows.foresight import refuse
from flows.methods import check_methods
from flows.overrides import overridden
from flows.pairs import check_pairs
from flows.repository import recorded

CODE_SWITCHES = (("evaluate", "trust_task_code"),)
"""Parameters that let code from elsewhere run, by their block."""


def preflight(workspace: Workspace, params: Params) -> None:
    """Refuse what a later stage would refuse. Nothing is downloaded but what a hub tells of a model.

    Raises:
        ParameterError: a name (FISHERFOLD_DEVICE too), a pair of parameters or the budget.
        InputError: the model or a text cannot be had.
    """
    asked_device()
    check_methods(params)
    check_pairs(params)
    check_tasks(workspace, params)
    if _is_prepared(workspace, params):
        check_prepared(workspace, params)
    else:
        check_inputs(workspace, params)


def _is_prepared(workspace: Workspace, params: Params) -> bool:
    """Whether stage prepare has run with these parameters last."""
    last = recorded(workspace).get("prepare", {}).get("params", {}).get("params.yaml", {})
    try:
        return "prepare" in last and check_params(last, "dvc.lock").prepare == params.prepare
    except ParameterError:
        return False  # of another version


def check_inputs(workspace: Workspace, params: Params) -> None:
    """Refuse a model, corpus, question set or list of prompts that is not there, and a model that cannot be compressed.

    Raises:
        InputError: names it.
    """
    from fisherfold.inputs.pretrained import check_model
    from fisherfold.inputs.recipes import only_asking
    from stages.prepare import find_inputs

    with only_asking():
        model, *_ = find_inputs(workspace, params.prepare)
    if not model.gguf_file:  # which may not be here yet
        check_model(model, params.prepare.sequence_length)


def check_tasks(workspace: Workspace, params: Params) -> None:
    """Refuse a folder of a user's own tasks that is not there, a task that nobody has, and code that is not trusted.

    Raises:
        ParameterError: names it.
    """
    folder = params.evaluate.task_folder
    if folder != type(params.evaluate)().task_folder and not (workspace.root / folder).is_dir():
        raise ParameterError(f"evaluate.task_folder = {folder!r}: {workspace.root / folder} is not a folder.")
    if params.evaluate.tasks:
        from stages.evaluate import task_source  # lm-eval takes seconds

        task_source(workspace, params.evaluate).check(params.evaluate.tasks)


def check_prepared(workspace: Workspace, params: Params) -> None:
    """Refuse what later stages would refuse of the prepared model and its layers.

    Raises:
        ParameterError: names the nearest ratio, or the pattern.
        InputError: the model cannot be written as GGUF.
    """
    with suppress(CorruptArtifact, OSError):  # stage prepare, or the stage that needs it, will look again
        refuse(params, workspace.model, workspace.out("prepare"))


def restrict(workspace: Workspace, overrides: Sequence[str]) -> None:
    """Refuse overrides that come through Prefect's API and would choose what code runs here.

    Where a switch for code from elsewhere is on, its whole block stays as the project's owner wrote it: another model would bring other code.

    Raises:
        ParameterError: names the switch.
    """
    if not overrides:
        return
    path = workspace.root / "params.yaml"
    before, after = load_params(path), overridden(path, overrides)[1]
    for block, switch in CODE_SWITCHES:
        if getattr(getattr(after, block), switch) and getattr(after, block) != getattr(before, block):
            raise ParameterError(
                f"{block}.{switch} is on, so a run that is asked for through Prefect's API may change nothing of block {block!r}: "
                f"it would choose what code runs here. Change {path} by hand."
            )
