"""A model behind `vllm serve`, as somebody would start it, and requests over HTTP.

FISHERFOLD_VLLM_PYTHON=…/bin/python python tests/support/vllm_server.py FOLDER      # two texts at once and a talk, printed
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

from prefect_server import free_port

INTERPRETER = "FISHERFOLD_VLLM_PYTHON"
OPTIONS = ["--trust-remote-code", "--dtype", "float32", "--max-model-len", "128", "--enforce-eager"]
PATIENCE = 600  # seconds until it answers; a busy machine fails no test
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several processes on one core, too
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


@contextmanager
def serving(folder: Path, log: Path) -> Iterator[str]:
    """The address at which a folder is served until the block ends; the server is then asked to stop."""
    port = str(free_port())
    command = [str(Path(os.environ[INTERPRETER]).with_name("vllm")), "serve", str(folder), *OPTIONS, "--port", port]
    with log.open("w") as out:
        server = subprocess.Popen(command, env=environment(), stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        try:
            wait_for(f"http://127.0.0.1:{port}", server, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(60)


def environment() -> dict[str, str]:
    """That of a process that runs vLLM: it knows nothing of this one's packages."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | SETTINGS


def wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    """Until the server is well.

    Raises:
        RuntimeError: it ended, or takes too long; has the end of its log.
    """
    for _ in range(PATIENCE):
        if server.poll() is not None:
            break
        try:
            urlopen(f"{address}/health", timeout=5).close()
            return
        except (URLError, OSError):
            time.sleep(1)
    raise RuntimeError(log.read_text()[-3000:])


def ask(address: str, path: str, **content: object) -> dict:
    """The first choice that the server answers."""
    body = json.dumps({"temperature": 0, **content}).encode()
    with urlopen(Request(f"{address}{path}", body, {"Content-Type": "application/json"}), timeout=120) as answer:
        return json.load(answer)["choices"][0]


def ask_at_once(address: str, path: str, contents: list[dict]) -> list[dict]:
    """The first choice for each request, all sent before any is answered."""
    with ThreadPoolExecutor(len(contents)) as pool:
        return list(pool.map(lambda content: ask(address, path, **content), contents))


if __name__ == "__main__":
    with serving(Path(sys.argv[1]).resolve(), Path("vllm-serve.log")) as address:
        prompts = ["The capital of France is", "Once upon a time"]
        for choice in ask_at_once(address, "/v1/completions", [{"prompt": text, "max_tokens": 24} for text in prompts]):
            print("completion:", choice["text"])
        said = [{"role": "user", "content": "What is the capital of France?"}]
        choice = ask(address, "/v1/chat/completions", messages=said, max_tokens=32)
        print("chat:", choice["message"]["content"])
