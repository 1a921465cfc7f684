"""What the result is to be served with: the parameters that suit an engine, and the command that starts it.

``--set factorize.target=vllm`` writes all values of a target into params.yaml, where each can be changed after. docs/serving.md has what
every engine was tried with.
"""

from dataclasses import dataclass

from fisherfold.run.presets import Values


@dataclass(frozen=True)
class Target:
    """An engine.

    Attributes:
        values: parameters that suit it. All targets set the same ones, so that changing from one to another leaves nothing of the first.
        program: what must be on the path of the machine that serves.
        install: the command that puts it there.
        serves: which output of stage factorize it reads.
        command: starts it on that; {path} is the output's place.
        costs: what is given up for it, beside what fewer ranks cost.
    """

    values: Values
    program: str
    install: str
    serves: str
    command: str
    costs: str = ""

    def serve(self, path: object) -> str:
        """The command for an output that lies there."""
        return self.command.format(path=path)


def _values(storage: str, round_to: int, gguf: bool) -> Values:
    return {
        ("ranks", "storage"): storage,
        ("ranks", "round_to"): round_to,
        ("factorize", "gguf_export"): gguf,
    }


TARGETS: dict[str, Target] = {
    "transformers": Target(
        values=_values("pivoted", 1, False),
        program="transformers",
        install="pip install 'transformers[serving]'",
        serves="model",
        command="transformers serve {path} --trust-remote-code",
    ),
    "vllm": Target(
        values=_values("pivoted", 32, False),  # what matrix kernels and 4-bit quantizers want of ranks
        program="vllm",
        install="pip install vllm",
        serves="model",
        command="vllm serve {path} --trust-remote-code",
        costs="pivoted layers run on one device; plain ones (ranks.storage: factors) have a plan for several, and keep fewer ranks",
    ),
    "gguf": Target(
        values=_values("pivoted", 1, True),
        program="llama-server",
        install="https://github.com/ggml-org/llama.cpp",
        serves="model.gguf",
        command="llama-server -m {path}",
        costs="llama.cpp has no low-rank layers: model.gguf is multiplied out, as large and as slow as the dense model",
    ),
}
"""By value of ``factorize.target``."""
