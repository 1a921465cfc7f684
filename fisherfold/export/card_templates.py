"""The texts of model cards, for Jinja2; see `model_card` for what fills them."""

import re

from jinja2 import Environment, StrictUndefined

SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~])")  # of Markdown, inside a line


def inline(text: str) -> str:
    """Any text as one line of plain Markdown."""
    return SPECIAL.sub(r"\\\1", " ".join(text.split()))


TEMPLATES = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
TEMPLATES.filters["inline"] = inline
FRONT_MATTER = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [fisherfold, low-rank]
{% if model.base %}
base_model: {{ model.base }}
{% endif %}
{% for line in model.licence_lines %}
{{ line }}
{% endfor %}
---
"""
MADE = """\
## How it was made

{% for key, value in settings.items() %}
- {{ key }}: {{ value }}
{% endfor %}

| data for | source | licence | amount |
|---|---|---|---|
{% for row in data %}
| {{ row.use }} | {{ row.source | inline }} | {{ row.licence | inline }} | {{ row.amount }} |
{% endfor %}
"""
CITATION = """\
## Citation

{{ model.name | inline }} ({{ model.place | inline }}) is the dense model: cite it as its authors ask. Methods used to compress it:

{% for paper in papers %}
- {{ paper.authors }}: {{ paper.title }}. [{{ paper.where }}]({{ paper.address }})
{% endfor %}
"""
LOW_RANK = TEMPLATES.from_string(
    FRONT_MATTER
    + """\
# {{ model.name | inline }}, low-rank

{{ model.name | inline }} from {{ model.place | inline }} (licence: {{ model.licence | inline }}; digest `{{ model.digest }}`) with its linear
layers replaced by low-rank products, compressed by Fisherfold. `config.json` lists the layers; the Python code
in this folder, `modeling_fisherfold.py` first, is all that it needs besides torch and transformers.

| | dense | this model | kept |
|---|---|---|---|
{% for row in sizes %}
| {{ row.label }} | {{ "{:,}".format(row.dense) }} | {{ "{:,}".format(row.kept) }} | {{ "{:.4f}".format(row.kept / row.dense) }} |
{% endfor %}

Counted from the saved tensors, index arrays included. Removed share of the targeted layers: {{ "{:.4f}".format(removed) }}.

<!-- results -->
## Use

In this folder (elsewhere, set `folder` to its path or its name on the hub):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
{% if chat %}
messages = [{"role": "user", "content": "What is the capital of France?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
{% else %}
inputs = tokenizer("The capital of France is", return_tensors="pt")
{% endif %}
answer = model.generate(**inputs, max_new_tokens=40, do_sample=False)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

`trust_remote_code=True` runs that code; without it transformers refuses to load the folder, unless the program has imported
`fisherfold.runtime`, which loads it without code from the folder. Adapters and quantizers find ordinary `nn.Linear` layers inside (PEFT:
`target_modules="all-linear"`).

To serve it: `{{ serve }}`{% if target_costs %}, which it was made for: {{ target_costs | join("; ") }}{% endif %}.
{% if beside %}

The same model, multiplied out to the dense architecture, as large and as slow as the dense one, lies beside this folder:

{% for hint in beside %}
- {{ hint }}
{% endfor %}
{% endif %}

"""
    + MADE
    + """

## Limits

It is not the dense model: it was made to stay close to it on the data above, and what was measured is text and questions of those kinds, in
sequences of {{ length }} tokens. Longer contexts, other languages, code, arithmetic, and whether it is safe to use were not measured. What the dense
model gets wrong, this one gets wrong too. At equal bytes plain 4-bit quantization loses less; low rank saves multiplications, and goes with it.

"""
    + CITATION
)
MULTIPLIED_OUT = TEMPLATES.from_string(
    FRONT_MATTER
    + """\
# {{ model.name | inline }}, low-rank, multiplied out

{{ model.name | inline }} from {{ model.place | inline }} (licence: {{ model.licence | inline }}; digest `{{ model.digest }}`) with its linear
layers replaced by low-rank products (Fisherfold), multiplied out: an ordinary {{ architecture }} checkpoint that any tool loads, converts or
quantizes, as large and as slow as the dense model. The small form, and what was measured of it, is the folder `model` beside this one.

"""
    + MADE
    + "\n"
    + CITATION
)
RESULTS = TEMPLATES.from_string("""\
## Results

{{ verdict[0] }}

{% for sentence in verdict[1:] %}
{{ sentence }}
{% endfor %}

| held-out, ± one standard error | dense | this model |
|---|---|---|
{% for row in rows %}
| {{ row.label | inline }} | {{ row.dense }} | {{ row.compressed }} |
{% endfor %}
{% if samples %}

What both answer, each taking its likeliest tokens, to the first of {{ prompts }} prompts that no calibration text contains:

| prompt | dense | this model |
|---|---|---|
{% for row in samples %}
| {{ row.prompt | inline }} | {{ row.dense | inline }} | {{ row.compressed | inline }} |
{% endfor %}
{% endif %}

""")
