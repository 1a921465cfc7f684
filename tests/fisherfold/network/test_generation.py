import pytest
import torch
from tiny import COMMON, FAMILIES, VOCABULARY, random_ids, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from fisherfold.network.generation import Decoder
from fisherfold.network.overflow import first_overflow
from fisherfold.network.shortcuts import reproduces

PROMPTS = [[5, 9, 11, 30, 7], [60], [8, 8, 40], [17, 3]]


def greedy(model: torch.nn.Module, prompt: list[int], longest: int, ends: tuple[int, ...] = ()) -> list[int]:
    """Each token from a pass of its own over one row without padding."""
    row = list(prompt)
    with torch.no_grad():
        while len(row) < len(prompt) + longest and (len(row) == len(prompt) or row[-1] not in ends):
            row.append(int(model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
    return row[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cached", [True, False])
def test_answers_equal_single_passes(family, cached, monkeypatch):
    model = tiny_model(family)
    decoder = Decoder(model, ends=[2])
    assert decoder.caches
    if not cached:
        monkeypatch.setattr(Decoder, "caches", False)
    assert decoder.answer(PROMPTS, 6) == [greedy(model, prompt, 6, ends=(2,)) for prompt in PROMPTS]


@pytest.mark.parametrize("cached", [True, False])
def test_an_answer_ends_with_its_end_token(cached, monkeypatch):
    monkeypatch.setattr(Decoder, "caches", cached)
    model = tiny_model()
    full = greedy(model, PROMPTS[0], 8)
    end = full[3]
    found = Decoder(model, ends=[end]).answer(PROMPTS, 8)
    assert found == [greedy(model, prompt, 8, ends=(end,)) for prompt in PROMPTS]
    assert found[0][-1] == end and len(found[0]) == full.index(end) + 1 < 8


def test_a_models_own_generation_settings_have_no_say():
    model = tiny_model()
    expected = Decoder(model, []).answer(PROMPTS, 6)
    model.generation_config = GenerationConfig(repetition_penalty=5.0, forced_eos_token_id=2, suppress_tokens=[3, 4])
    assert Decoder(model, []).answer(PROMPTS, 6) == expected
    assert model.generation_config.repetition_penalty == 5.0


def test_a_model_that_misreads_its_cache_is_decoded_plainly():
    """A cache that is a token behind: `generate` gives other tokens, and the trial notices."""
    model = tiny_model()
    expected = [greedy(model, prompt, 5) for prompt in PROMPTS]
    forward = model.forward

    def forgetful(*args, **options):
        options.pop("position_ids", None)
        return forward(*args, **(options | {"attention_mask": None}))  # lets the padding in

    model.forward = forgetful
    decoder = Decoder(model, ends=[])
    assert not decoder.caches
    assert decoder.answer(PROMPTS, 5) == expected


def test_a_state_space_model_gives_its_own_answers():
    config = AutoConfig.for_model(
        "mamba2", vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4, num_heads=4, head_dim=8,
        n_groups=1, chunk_size=4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert Decoder(model, [2]).answer(PROMPTS, 4) == [greedy(model, prompt, 4, ends=(2,)) for prompt in PROMPTS]


def test_no_token_is_asked_for():
    assert Decoder(tiny_model(), [2]).answer(PROMPTS, 0) == [[], [], [], []]


@pytest.mark.parametrize(("dtype", "noise", "expected"), [
    (torch.float32, 1e-4, True), (torch.float32, 0.01, False), (torch.bfloat16, 0.05, True), (torch.bfloat16, 0.45, False),
])  # fmt: skip
def test_a_shortcut_holds_up_to_the_noise_of_the_dtype(dtype, noise, expected):
    plain = torch.linspace(-9, -1, 20)
    assert reproduces(plain + noise * torch.tensor([1.0, -1.0]).repeat(10), plain, dtype) is expected
    assert not reproduces(plain * float("nan"), plain, dtype)


def test_the_first_layer_that_overflows_is_named():
    model = tiny_model()
    assert first_overflow(model, random_ids(1, 5)) is None
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = 3e38
    model.model.layers[1].mlp.down_proj.weight.data[0, 1:] = 3e38
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1e6)
    found = first_overflow(model, random_ids(1, 5))
    assert found.module == "model.layers.1.mlp.down_proj"
    assert found.largest_weight == pytest.approx(3e38)
    assert "begins in 'model.layers.1.mlp.down_proj': its largest weight is 3e+38" in str(found)


def test_mistral_with_a_window_shorter_than_the_prompt():
    config = AutoConfig.for_model("mistral", vocab_size=VOCABULARY, **COMMON, **FAMILIES["mistral"], sliding_window=3)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert Decoder(model, []).answer(PROMPTS, 6) == [greedy(model, prompt, 6) for prompt in PROMPTS]
