"""lm-eval on a model in memory, with every context computed once for all its continuations.

lm-eval asks for the log-likelihood of each (context, continuation) pair by itself. The choices of one question share
their context, so its keys and values are computed once and copied for the continuations, and logits are formed only where
they are needed: on questions of one short line with four short choices this is less than half of the arithmetic.

G contexts of equal length in one pass, R continuations of them, L tokens of the longest continuation, V vocabulary entries.
"""

import copy
import functools
import inspect
import logging
import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterator

import lm_eval.api.task
import numpy as np
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks.manager import TaskDict
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.errors import InputError
from stages.progress import track_lines

BOOTSTRAP_DRAWS = 1000
LIKE_LENGTH = 0.75
WORTH_A_PASS = 128  # tokens; reading the weights costs a CPU as much as about 40 tokens
SEED = 1234  # of few-shot draws, as lm-eval's command line has it
os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm-eval would fork workers for a bootstrap
logging.getLogger("lm_eval").setLevel(logging.ERROR)
lm_eval.api.task.tqdm = functools.partial(tqdm, disable=True)  # its bars would tear ours

Group = tuple[tuple[int, ...], list[int]]
"""A context's tokens, and the numbers of the requests that continue it."""
Answer = tuple[float, bool]
"""Log-likelihood of a continuation in nats, and whether greedy decoding gives it."""
Row = tuple[int, int]
"""Number of a context in its batch, and number of the request that continues it."""


class SharedContextModel(HFLM):
    """A causal language model for lm-eval that computes each context once.

    Args:
        tokens_per_pass: at most so many tokens in one forward pass, unless a single question has more.
        batch_size: sequences per forward pass where a task generates text or scores whole documents.
        label: shown with the progress of long tasks; None shows none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tokens_per_pass: int,
        batch_size: int,
        label: str | None = None,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        self.tokens_per_pass = tokens_per_pass
        self.label = label
        known = inspect.signature(model.forward).parameters
        self.last_logits = {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list[Answer]:
        """See lm-eval; without its progress bars."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[Answer]:
        fitting = [
            i
            for i, (_, context, continuation) in enumerate(requests)
            if len(context) + len(continuation) <= self.max_length + 1
        ]
        answers: dict[int, Answer] = {}
        batches = list(self._batches(requests, fitting))
        for batch in track_lines("evaluate", self.label, batches, len(batches)) if self.label else batches:
            answers.update(self._score(requests, batch))
        cut = [i for i in range(len(requests)) if i not in answers]  # too long: lm-eval cuts them from the left
        answers.update(
            zip(cut, super()._loglikelihood_tokens([requests[i] for i in cut], disable_tqdm=True) if cut else [])
        )
        return [answers[i] for i in range(len(requests))]

    def _batches(self, requests: list, numbers: list[int]) -> Iterator[list[Group]]:
        """Groups of requests by context; contexts of equal length go together, the longest first."""
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i in numbers:
            (context_text, text), context, continuation = requests[i]
            if not continuation:
                raise InputError(f"The continuation {text!r} has no token of its own after {context_text[-80:]!r}.")
            groups[tuple(context)].append(i)
        batch: list[Group] = []
        for group in sorted(groups.items(), key=lambda group: -len(group[0])):
            new_length = batch and len(group[0]) != len(batch[0][0])
            if new_length or (batch and self._tokens(requests, [*batch, group]) > self.tokens_per_pass):
                yield batch
                batch = []
            batch.append(group)
        if batch:
            yield batch

    @staticmethod
    def _tokens(requests: list, batch: list[Group]) -> int:
        """Tokens that a batch puts through the model, padding included."""
        numbers = [i for _, members in batch for i in members]
        return len(batch) * len(batch[0][0]) + len(numbers) * max(len(requests[i][2]) for i in numbers)

    @torch.inference_mode()
    def _score(self, requests: list, batch: list[Group]) -> dict[int, Answer]:
        """Answers to the requests of G contexts of equal length, by number.

        One pass over the contexts scores every first token, a second one over the continuations the rest. Continuations
        are padded on the right, where a causal model does not look.
        """
        rows = [(g, i) for g, (_, members) in enumerate(batch) for i in members]
        longer = [(g, i) for g, i in rows if len(requests[i][2]) > 1]
        contexts = torch.tensor([context for context, _ in batch], device=self.device)
        output = self.model(input_ids=contexts, use_cache=bool(longer), **self.last_logits)
        log_p = output.logits[:, -1].float().log_softmax(-1)
        greedy = log_p.argmax(-1).tolist()
        answers = {i: (float(log_p[g, token]), greedy[g] == token) for g, i in rows for token in requests[i][2][:1]}
        for run in _runs_of_like_length(longer, lambda row: len(requests[row[1]][2])):
            cache = copy.deepcopy(output.past_key_values)
            cache.reorder_cache(torch.tensor([g for g, _ in run], device=self.device))
            rest = self._continue([requests[i][2] for _, i in run], cache)
            for (_, i), (value, is_greedy) in zip(run, rest, strict=True):
                answers[i] = (answers[i][0] + value, answers[i][1] and is_greedy)
        return answers

    def _continue(self, continuations: list[list[int]], cache: object) -> list[Answer]:
        """Answers for the tokens after the first of R continuations, whose contexts `cache` holds in the same order."""
        tokens = [torch.tensor(tokens, device=self.device) for tokens in continuations]
        inputs = pad_sequence([token[:-1] for token in tokens], batch_first=True)
        targets = pad_sequence([token[1:] for token in tokens], batch_first=True, padding_value=-1)
        logits = self.model(input_ids=inputs, past_key_values=cache, use_cache=True).logits  # [R, L-1, V]
        scored = targets >= 0
        chosen = logits.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1).float() - logits.float().logsumexp(-1)
        values = chosen.where(scored, 0).double().sum(-1)
        greedy = ((logits.argmax(-1) == targets) | ~scored).all(-1)
        return list(zip(values.tolist(), greedy.tolist(), strict=True))


def _runs_of_like_length(rows: list[Row], length: Callable[[Row], int]) -> Iterator[list[Row]]:
    """Rows by falling length, in runs that waste little on padding but are long enough to be worth a pass."""
    run: list[Row] = []
    for row in sorted(rows, key=length, reverse=True):
        if run and length(row) < LIKE_LENGTH * length(run[0]) and len(run) * length(run[0]) >= WORTH_A_PASS:
            yield run
            run = []
        run.append(row)
    if run:
        yield run


def run_tasks(model: SharedContextModel, tasks: TaskDict, limit: int | None = None, samples: bool = False) -> dict:
    """lm-eval's results of loaded tasks and groups; with `samples`, also those of every document.

    Seeds, and the number of examples where a task names none (0), are those of lm-eval's command line.
    """
    random.seed(0)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    for task in tasks["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(seed=SEED)
    return evaluate(model, tasks, limit=limit, bootstrap_iters=BOOTSTRAP_DRAWS, log_samples=samples)
