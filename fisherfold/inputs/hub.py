"""Names on the Hugging Face hub, resolved to one commit before anything is read.

A branch can move between two runs of a stage; a commit cannot. Without a network, a model that the local hub cache
holds is resolved from there.
"""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from fisherfold.run.errors import InputError, first_line

TIMEOUT = 20.0  # seconds to wait for the hub's answer


@dataclass(frozen=True)
class HubEntry:
    """One repository at one commit.

    Attributes:
        commit: hexadecimal.
        licence: as its card states it.
        snapshot: its folder in the local cache, if the hub was out of reach.
    """

    commit: str
    licence: str | None = None
    snapshot: Path | None = None


class HubUnknown(InputError):
    """The hub has no such repository, or cannot be asked; the message says why, as half a sentence."""


def resolve_model(name: str, revision: str | None) -> HubEntry:
    """The commit that `revision` (a branch, tag or commit; None: the main branch) of a model means now.

    Raises:
        HubUnknown: no such model or no answer, and the local cache has none.
        InputError: the revision does not exist, or the model is gated.
    """
    try:
        return _resolve("model", name, revision)
    except HubUnknown:
        cached = cached_folder(name, revision)
        if cached is None:
            raise
        return HubEntry(cached.name, snapshot=cached)


def resolve_dataset(name: str) -> HubEntry:
    """The commit of a dataset's main branch; see `resolve_model` for the errors."""
    return _resolve("dataset", name, None)


def is_offline() -> bool:
    """Whether the environment (``HF_HUB_OFFLINE``) forbids asking the hub."""
    return constants.HF_HUB_OFFLINE


def _resolve(kind: str, name: str, revision: str | None) -> HubEntry:
    ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
    try:
        info = ask(name, revision=revision, timeout=TIMEOUT)
    except GatedRepoError:
        raise InputError(
            f"The {kind} {name!r} is gated: ask for access on its hub page, then log in with `hf auth login`."
        ) from None
    except RevisionNotFoundError:
        raise InputError(f"The {kind} {name!r} has no revision {revision!r} on the hub.") from None
    except HFValidationError:
        raise HubUnknown("it cannot be a name on the hub (OWNER/NAME)") from None
    except RepositoryNotFoundError:
        raise HubUnknown(f"the hub has no {kind} of this name that you may read") from None
    except Exception as error:  # whatever the hub client's HTTP library raises: there was no answer
        raise HubUnknown(f"the hub cannot be asked ({first_line(error)})") from None
    return HubEntry(info.sha or "", info.card_data.get("license") if info.card_data else None)


def cached_folder(name: str, revision: str | None) -> Path | None:
    """The snapshot folder of a model in the local hub cache."""
    try:
        found = try_to_load_from_cache(name, constants.CONFIG_NAME, revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None
