"""The orchestration of the stages: command line, Prefect flow, DVC. What the tools read from the environment is set here,
before any of them is imported; a value that the user has set stays.
"""

import os

from flows import surroundings

DEFAULTS = {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",  # never pickle
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # the stages speak for themselves; the API gets every log
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # never a cluster that was not asked for
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait slow each other ten times on a busy machine
}

for variable, value in DEFAULTS.items():
    os.environ.setdefault(variable, value)
surroundings.prepare()
