"""The same completion twice, with and without speculation, on the model that comes with the package.

python examples/quickstart.py
"""

from __future__ import annotations

import torch

import specdec
from specdec.common.embedded import heldout_prompts, load_embedded

model, tokenizer = load_embedded("target")
fast = specdec.accelerate(model, drafter="lookahead")

inputs = tokenizer(heldout_prompts(1)[0].text, return_tensors="pt")
plain = model.generate(**inputs, max_new_tokens=96)
output = fast.generate(**inputs, max_new_tokens=96)

print(tokenizer.decode(output[0]))
print(fast.report)
print("identical to model.generate:", torch.equal(output, plain))
