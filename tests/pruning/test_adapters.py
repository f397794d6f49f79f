"""Masks of a base model under LoRA adapters (PEFT), and after these are merged."""

from __future__ import annotations

import dimap
import pytest
import torch

transformers = pytest.importorskip("transformers")


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def test_masks_hold_under_adapters_and_after_the_merge() -> None:
    peft = pytest.importorskip("peft")
    model = llama()
    masks = dimap.prune(model, 0.5).masks
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"])
    adapted = peft.get_peft_model(model, config)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    tokens = torch.randint(64, (2, 16))
    with dimap.hold_masks(adapted, masks, optimizer) as holding:
        assert len(holding.masks) == len(masks)
        for _ in range(2):
            adapted(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    merged = adapted.merge_and_unload()
    weights = dict(merged.named_parameters())
    assert any(bool(weights[name][~mask].any()) for name, mask in masks.items())  # LoRA is dense
    dimap.apply_masks(merged, masks)
    for name, mask in masks.items():
        assert not weights[name][~mask].any()
        assert int(weights[name].count_nonzero()) == int(mask.sum())
