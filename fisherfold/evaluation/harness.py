"""lm-eval on a model in memory, in few forward passes.

lm-eval asks for the log-likelihood of each (context, continuation) pair by itself. The choices of one question share
their context: if it is long, its keys and values are computed once and copied for the continuations. Pairs of short
contexts go together by length. Logits are formed only from the first place on where one is needed. Contexts are shared only
where that reproduces the plain log-likelihoods, which is tried once a model: some architectures drop or misread a cache.

G contexts of equal length in one pass, R rows of one pass, L tokens of its longest row, V vocabulary entries.
"""

import copy
import functools
import inspect
import logging
import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import lm_eval.api.task
import numpy as np
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks.manager import TaskDict
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from fisherfold.network.layers import input_embedding
from fisherfold.network.shortcuts import attempt, reproduces
from fisherfold.run.errors import InputError
from fisherfold.run.progress import track_lines

BOOTSTRAP_DRAWS = 1000
LIKE_LENGTH = 0.75
WORTH_A_PASS = 128  # tokens; reading the weights costs a CPU as much as about 40 tokens
WORTH_SHARING = 16  # tokens of a context; below, the passes for contexts alone cost more than they save
CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # what `forward` calls it, the newest name first
PROBE_CONTEXT, PROBE_CONTINUATION = 20, 5  # tokens of the pairs on which sharing is tried
UNSCORED = -1
SEED = 1234  # of few-shot draws, as lm-eval's command line has it
os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm-eval would fork workers for a bootstrap
logging.getLogger("lm_eval").setLevel(logging.ERROR)
lm_eval.api.task.tqdm = functools.partial(tqdm, disable=True)  # its bars would tear ours

Tokens = list[int]
Pair = tuple[tuple[str, str], Tokens, Tokens]
"""A context and its continuation, as texts and as tokens."""
Group = tuple[tuple[int, ...], list[int]]
"""A context's tokens, and the numbers of the pairs that continue it."""
Answer = tuple[float, bool]
"""Log-likelihood of a continuation in nats, and whether greedy decoding gives it."""
Row = TypeVar("Row")


class SharedContextModel(HFLM):  # type: ignore[misc]  # lm-eval is not typed
    """A causal language model for lm-eval that computes a long context once for all that continues it.

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
        tokenizer, begin = with_ends(tokenizer)
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, prefix_token_id=begin
        )
        self.tokens_per_pass = tokens_per_pass
        self.label = label
        known = inspect.signature(model.forward).parameters
        self.keeps_some_logits = "logits_to_keep" in known
        self.cache_name = next((name for name in CACHE_NAMES if name in known), None)

    @property
    def eot_token_id(self) -> int:
        """What ends a text; the token before texts, where the tokenizer has no end."""
        end = self.tokenizer.eos_token_id
        return int(self.prefix_token_id if end is None else end)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Answer]:
        """See lm-eval; without its progress bars."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[Answer]:
        answers: dict[int, Answer] = {}
        passes = list(self._passes(requests))
        for score, batch in track_lines("evaluate", self.label, passes, len(passes)) if self.label else passes:
            answers.update(score(requests, batch))
        cut = [i for i in range(len(requests)) if i not in answers]  # too long: lm-eval cuts them from the left
        if cut:
            found = super()._loglikelihood_tokens([requests[i] for i in cut], disable_tqdm=True)
            answers.update(zip(cut, found, strict=True))
        return [answers[i] for i in range(len(requests))]

    def _passes(self, requests: list[Pair]) -> Iterator[tuple[Callable[..., dict[int, Answer]], list[Any]]]:
        """What is scored together, and by which method; pairs that are too long for the model are left out."""
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, ((context_text, text), context, continuation) in enumerate(requests):
            if not continuation:
                raise InputError(f"The continuation {text!r} has no token of its own after {context_text[-80:]!r}.")
            if len(context) + len(continuation) <= self.max_length + 1:
                groups[tuple(context)].append(i)
        shared = [group for group in groups.items() if len(group[0]) > WORTH_SHARING and len(group[1]) > 1]
        shared = shared if shared and self.shares_contexts else []
        for batch in self._batches_of_contexts(requests, shared):
            yield self._score_sharing, batch
        alone = [i for group in groups.items() if group not in shared for i in group[1]]
        for run in runs_of_like_length(
            alone, lambda i: len(requests[i][1]) + len(requests[i][2]), self.tokens_per_pass
        ):
            yield self._score_pairs, run

    def _batches_of_contexts(self, requests: list[Pair], groups: list[Group]) -> Iterator[list[Group]]:
        """Groups whose contexts have one length, the longest first, as many as go through in one pass."""
        batch: list[Group] = []
        for group in sorted(groups, key=lambda group: -len(group[0])):
            new_length = batch and len(group[0]) != len(batch[0][0])
            if new_length or (batch and _tokens(requests, [*batch, group]) > self.tokens_per_pass):
                yield batch
                batch = []
            batch.append(group)
        if batch:
            yield batch

    @functools.cached_property
    def shares_contexts(self) -> bool:
        """Whether continuations of a context computed once have the log-likelihoods of plain passes with this model."""
        if not self.cache_name:
            return False
        vocabulary = len(input_embedding(self.model))
        tokens = [(11 * i + 5) % vocabulary for i in range(2 * (PROBE_CONTEXT + 2 * PROBE_CONTINUATION))]
        contexts = [(g, [tokens.pop() for _ in range(PROBE_CONTEXT)]) for g in range(2)]
        requests = [
            (("", ""), context, [tokens.pop() for _ in range(PROBE_CONTINUATION - i)])
            for _, context in contexts
            for i in range(2)
        ]
        batch = [(tuple(context), [2 * g, 2 * g + 1]) for g, context in contexts]
        found = attempt(lambda: self._score_sharing(requests, batch))
        if found is None:
            return False
        plain = self._score_pairs(requests, list(found))
        shared, alone = (torch.tensor([answers[i][0] for i in sorted(plain)]) for answers in (found, plain))
        return reproduces(shared, alone, self.model.dtype)

    @torch.inference_mode()
    def _score_sharing(self, requests: list[Pair], batch: list[Group]) -> dict[int, Answer]:
        """Answers for all continuations of G contexts of equal length, by number.

        One pass over the contexts scores every first token; passes over the continuations score the rest.
        """
        rows = [(g, i) for g, (_, members) in enumerate(batch) for i in members]
        longer = [(g, i) for g, i in rows if len(requests[i][2]) > 1]
        contexts = torch.tensor([context for context, _ in batch], device=self.device)
        output = self.model(input_ids=contexts, use_cache=bool(longer), **self._last(1, contexts.shape[1]))
        log_p = output.logits[:, -1].float().log_softmax(-1)
        greedy = log_p.argmax(-1).tolist()
        answers = {i: (float(log_p[g, token]), greedy[g] == token) for g, i in rows for token in requests[i][2][:1]}
        for run in runs_of_like_length(longer, lambda row: len(requests[row[1]][2]), self.tokens_per_pass):
            cache = copy.deepcopy(output[self.cache_name])
            cache.reorder_cache(torch.tensor([g for g, _ in run], device=self.device))
            tokens = [requests[i][2] for _, i in run]
            rest = self._score_rows([row[:-1] for row in tokens], [row[1:] for row in tokens], cache)
            for (_, i), (value, is_greedy) in zip(run, rest, strict=True):
                answers[i] = (answers[i][0] + value, answers[i][1] and is_greedy)
        return answers

    @torch.inference_mode()
    def _score_pairs(self, requests: list[Pair], numbers: list[int]) -> dict[int, Answer]:
        """Answers for pairs that share nothing, by number."""
        pairs = [requests[i][1:] for i in numbers]
        inputs = [context + continuation[:-1] for context, continuation in pairs]
        targets = [[UNSCORED] * (len(context) - 1) + continuation for context, continuation in pairs]
        return dict(zip(numbers, self._score_rows(inputs, targets, None), strict=True))

    def _score_rows(self, inputs: list[Tokens], targets: list[Tokens], cache: Cache | None) -> list[Answer]:
        """Answers for R rows of tokens; a target is the token that follows, or UNSCORED.

        Rows are padded on the right, where a causal model does not look.
        """
        ids, labels = (
            pad_sequence(
                [torch.tensor(row, device=self.device) for row in rows], batch_first=True, padding_value=padding
            )
            for rows, padding in ((inputs, 0), (targets, UNSCORED))
        )
        needed = labels.shape[1] - int((labels != UNSCORED).any(0).nonzero()[0])
        last = self._last(needed, ids.shape[1])
        prefix = {} if cache is None else {str(self.cache_name): cache}
        output = self.model(input_ids=ids, use_cache=cache is not None, **prefix, **last)
        logits, labels = output.logits[:, -needed:], labels[:, -needed:]  # [R, needed, V]
        chosen = logits.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1).float() - logits.float().logsumexp(-1)
        scored = labels != UNSCORED
        values = chosen.where(scored, 0).double().sum(-1)
        greedy = ((logits.argmax(-1) == labels) | ~scored).all(-1)
        return list(zip(values.tolist(), greedy.tolist(), strict=True))

    def _last(self, count: int, length: int) -> dict[str, torch.Tensor]:
        """Asks the model for the last `count` of `length` logits alone, if it knows how.

        As indices: given a number, transformers hands a strided slice to the output layer, which then takes a path that
        is slower on CPUs than all logits.
        """
        return {"logits_to_keep": torch.arange(length - count, length)} if self.keeps_some_logits else {}


def with_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedTokenizerBase, int | None]:
    """The tokenizer as lm-eval can use it, and the token before texts where it has none: token 0.

    lm-eval asks for a token before texts, one behind them and one to pad with, and would add one that the model does not embed.
    """
    if tokenizer.pad_token_id is None and tokenizer.unk_token_id is None and tokenizer.eos_token_id is None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    ends = tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None
    return tokenizer, None if ends else 0


def _tokens(requests: list[Pair], batch: list[Group]) -> int:
    """Tokens that a batch of contexts puts through the model with their continuations, padding included."""
    numbers = [i for _, members in batch for i in members]
    return len(batch) * len(batch[0][0]) + len(numbers) * max(len(requests[i][2]) for i in numbers)


def runs_of_like_length(
    rows: Iterable[Row], length: Callable[[Row], int], most: int, worth: int | None = None
) -> Iterator[list[Row]]:
    """Rows by falling length, in runs of at most `most` tokens that waste little on padding but are worth a pass (WORTH_A_PASS tokens, or `worth`)."""
    run: list[Row] = []
    for row in sorted(rows, key=length, reverse=True):
        longest = length(run[0]) if run else 0
        shorter = length(row) < LIKE_LENGTH * longest and len(run) * longest >= (worth or WORTH_A_PASS)
        if run and (shorter or (len(run) + 1) * longest > most):
            yield run
            run = []
        run.append(row)
    if run:
        yield run


def run_tasks(
    model: SharedContextModel, tasks: TaskDict, limit: int | None = None, samples: bool = False
) -> dict[str, Any]:
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
