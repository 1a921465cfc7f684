"""Settings of a run: where work runs, from the environment. They change no result, so they are no parameters.

FISHERFOLD_ENGINE        inline (this process) or ray
FISHERFOLD_RAY_ADDRESS   of a running cluster, host:port or "auto"; unset: a Ray of this host for this run alone
FISHERFOLD_NUM_CPUS      cores a unit asks of Ray; unset: its stage's `threads`
FISHERFOLD_NUM_GPUS      GPUs a unit asks of Ray, also a share of one
FISHERFOLD_MEMORY        memory a unit asks of Ray, in bytes or such as 16GB
FISHERFOLD_API_HOST      where a temporary Prefect API listens; other nodes reach it only there
FISHERFOLD_UNITS         where a stage's process hands its units to that of its run (flows/cluster/unit_channel.py); set by `fisherfold run`
"""

import os
from typing import Annotated, Literal

from pydantic import ByteSize, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from fisherfold.run.errors import ParameterError

PREFIX = "FISHERFOLD_"


class Settings(BaseSettings):
    """Where work runs; read from the environment when made."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="ignore")

    engine: Literal["inline", "ray"] = "inline"
    ray_address: str | None = None
    num_cpus: Annotated[float, Field(gt=0)] | None = None
    num_gpus: Annotated[float, Field(ge=0)] = 0
    memory: Annotated[ByteSize, Field(gt=0)] | None = None
    api_host: str = "127.0.0.1"
    units: str | None = None


def read_settings() -> Settings:
    """The settings that the environment holds.

    Raises:
        ParameterError: a variable has a value that cannot be; names it.
    """
    try:
        return Settings()
    except ValidationError as error:
        lines = [f"{variable(issue['loc'][0])}={issue['input']!r}: {issue['msg']}" for issue in error.errors()]
        raise ParameterError("; ".join(lines)) from None


def set_environment(**values: object) -> None:
    """Put settings into the environment of this process and its children; None leaves one as it is.

    Raises:
        ParameterError: see `read_settings`.
    """
    os.environ.update({variable(name): str(value) for name, value in values.items() if value is not None})
    read_settings()


def variable(name: str) -> str:
    """The environment's name of a setting."""
    return PREFIX + name.upper()
