"""transformers' own flex integration with our functions in the place of torch's, its torch.compile left on.

Run where transformers is installed: pip install transformers. No weights are loaded; two small models are made.
"""
from __future__ import annotations

import pytest
import torch

import flexref
from flexref.autograd import attend
from flexref.dispatch import attention

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

SMALL: dict = dict(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, max_position_embeddings=512,
)  # fmt: skip
MODELS = {
    "Llama": {},
    "Gemma2": dict(sliding_window=32, attn_logit_softcapping=20.0),
}


def results(name: str, implementation: str):
    """Logits of real tokens, the gradient of every parameter, and what is generated."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL, **MODELS[name])
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(config, attn_implementation=implementation)
    ids = torch.randint(0, 97, (2, 140))
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    # a padded row attends to nothing: what it predicts is nobody's
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 30] = -100
    out = model(ids, attention_mask=mask, labels=labels)
    out.loss.backward()
    with torch.no_grad():
        generated = model.generate(ids[:, :20], attention_mask=torch.ones(2, 20), max_new_tokens=8, do_sample=False)
    return out.logits[mask.bool()], [p.grad for p in model.parameters()], generated


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("all_names", [False, True])
def test_a_model_with_our_attention_is_the_model_with_its_own(name, all_names, monkeypatch):
    import transformers.integrations.flex_attention as integration
    import transformers.masking_utils as masking

    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return attend(*args, **kwargs)

    monkeypatch.setattr(attention, "attend", counted)
    monkeypatch.setattr(integration, "flex_attention", flexref.flex_attention)
    # what it compiled is kept in its one instance
    monkeypatch.setattr(integration.WrappedFlexAttention, "_instance", None)
    if all_names:
        for place in (integration, masking):
            for part in ("BlockMask", "create_block_mask"):
                monkeypatch.setattr(place, part, getattr(flexref, part), raising=False)
    logits, grads, generated = results(name, "flex_attention")
    wanted_logits, wanted_grads, wanted = results(name, "eager")
    assert calls
    torch.testing.assert_close(logits, wanted_logits)
    assert torch.equal(generated, wanted)
    for grad, expected in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(grad, expected)
