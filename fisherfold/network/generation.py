"""Answers of a model to prompts of different lengths, many prompts in a pass.

transformers' `generate` decodes a batch that is padded on the left and keeps what it computed for earlier tokens. Not every
architecture gives its own numbers that way: some have no cache, some let the padding into their state. So it is tried once a
model against plain passes, and where it differs every token costs a plain pass over all that precedes it.

R prompts in one pass, K tokens of their answers, V vocabulary entries.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import cast

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput

from fisherfold.network.layers import input_embedding
from fisherfold.network.one_query import one_query_products
from fisherfold.network.shortcuts import attempt, reproduces

Tokens = list[int]
Choice = Callable[[torch.Tensor], torch.Tensor]
"""The next token of each row [R], of logits [R, V]."""
PROBE_LENGTHS = (9, 4)  # tokens of the prompts on which a model is tried
PROBE_ANSWER = 4


def left_padded(prompts: Sequence[Tokens], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts padded on the left, so that all end in one place, and the mask of what is no padding: [R, T] each."""
    ids, mask = (
        pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side="left").to(device)
        for rows in (prompts, [[1] * len(prompt) for prompt in prompts])
    )
    return ids, mask


def until_end(answer: Tokens, ends: Sequence[int]) -> Tokens:
    """An answer up to the first token that ends it, which is part of it."""
    end = next((i for i, token in enumerate(answer) if token in ends), len(answer))
    return answer[: end + 1]


def most_likely(logits: torch.Tensor) -> torch.Tensor:
    """See `Choice`."""
    return logits.argmax(-1)


class Decoder:
    """The most likely token after a prompt, or another choice, then that after both, and so on.

    The tokens are those of the logits alone: of the model's own generation settings (penalties, forced tokens) none has a say.

    Args:
        model: a causal language model in evaluation mode.
        ends: the tokens that end an answer.
    """

    def __init__(self, model: PreTrainedModel, ends: Sequence[int]) -> None:
        self.model = model
        self.ends = sorted(set(ends))
        embedding = input_embedding(model)
        self.device, self.vocabulary = embedding.device, embedding.shape[0]

    @torch.inference_mode()
    def answer(
        self, prompts: Sequence[Tokens], longest: int, ends: Sequence[int] | None = None, choose: Choice = most_likely
    ) -> list[Tokens]:
        """An answer of at most `longest` tokens to each prompt; a token that ends it is part of it.

        Args:
            ends: instead of the model's own; none: every answer has `longest` tokens.
        """
        ends = self.ends if ends is None else list(ends)
        if not self.caches or longest < 1:  # `generate` refuses to write nothing
            return decode_plainly(self.model, prompts, longest, ends, choose)
        sequences = self._generate(prompts, longest, ends, choose).sequences
        return [until_end(answer, ends) for answer in sequences[:, max(map(len, prompts)) :].tolist()]

    @cached_property
    def caches(self) -> bool:
        """Whether padded batches with a cache give this model's plain log-probabilities."""
        prompts = [[(7 * i + 3 * length) % self.vocabulary for i in range(length)] for length in PROBE_LENGTHS]
        output = attempt(lambda: self._generate(prompts, PROBE_ANSWER, [], most_likely, keep_logits=True))
        if output is None or output.logits is None:
            return False
        answers = output.sequences[:, max(PROBE_LENGTHS) :]  # [R, K]
        found = torch.stack(list(output.logits), 1).float().log_softmax(-1).gather(-1, answers[..., None]).squeeze(-1)
        plain = [self._plain_likelihoods(*pair) for pair in zip(prompts, answers.tolist(), strict=True)]
        return reproduces(found, torch.stack(plain), self.model.dtype)

    def _generate(
        self, prompts: Sequence[Tokens], longest: int, ends: Tokens, choose: Choice, keep_logits: bool = False
    ) -> GenerateDecoderOnlyOutput:
        """`generate` with nothing but `choose`."""
        ids, mask = left_padded(prompts, self.device)
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=longest,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
            return_dict_in_generate=True,
            output_logits=keep_logits,
        )
        own, self.model.generation_config = self.model.generation_config, GenerationConfig()  # would fill what is open
        try:
            generate = cast(Callable[..., GenerateDecoderOnlyOutput], self.model.generate)
            chosen = LogitsProcessorList([_Chosen(choose)])
            with one_query_products():
                return generate(ids, attention_mask=mask, generation_config=settings, logits_processor=chosen)
        finally:
            self.model.generation_config = own

    def _plain_likelihoods(self, prompt: Tokens, answer: Tokens) -> torch.Tensor:
        """log p of each token of the answer [K], by one pass over the pair alone."""
        ids = torch.tensor([prompt + answer], device=self.device)
        log_p = self.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        return log_p.gather(-1, ids[0, len(prompt) :, None]).squeeze(-1)


class _Chosen(LogitsProcessor):
    """Scores of which the chosen tokens' are the highest."""

    def __init__(self, choose: Choice) -> None:
        self._choose = choose

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = self._choose(scores)[:, None]
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def decode_plainly(
    model: PreTrainedModel, prompts: Sequence[Tokens], longest: int, ends: Sequence[int], choose: Choice
) -> list[Tokens]:
    """Each token from a pass over everything before it; rows are padded on the right, where no causal model looks."""
    answers: list[Tokens] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    device = input_embedding(model).device
    while going and longest > len(answers[going[0]]):
        rows = [torch.tensor([*prompts[row], *answers[row]]) for row in going]
        logits = model(input_ids=pad_sequence(rows, batch_first=True).to(device), use_cache=False).logits
        last = torch.stack([logits[i, len(row) - 1] for i, row in enumerate(rows)])
        for row, token in zip(going, choose(last).tolist(), strict=True):
            answers[row].append(token)
        going = [row for row in going if answers[row][-1] not in ends]
    return answers
