"""Models of Transformers: pruned as they lie on disk, loaded by the library, as if pruned in memory."""

from __future__ import annotations

import warnings

import dimap
import pytest
import torch
from dimap.checkpoint.prune import prune_checkpoint
from dimap.masks import fit_masks

T = pytest.importorskip("transformers")
if int(T.__version__.partition(".")[0]) < 5:
    pytest.skip("names in memory are those of Transformers 5", allow_module_level=True)

TEXT = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
LLAMA = {**TEXT, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
EXPERTS = {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
IMAGE = {
    "image_size": 32, "patch_size": 8, "hidden_size": 16, "intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
SWIN = {
    "image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1, 1, 1],
    "num_heads": [1, 2, 2, 2], "window_size": 4,
}  # fmt: skip
IDS = {"input_ids": torch.arange(1, 7)[None]}
PIXELS = {"pixel_values": torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32)}


def clip():
    return T.CLIPModel(T.CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=8))


def siglip():
    return T.SiglipModel(T.SiglipConfig(text_config=TEXT, vision_config=IMAGE))


def whisper():
    sizes = {
        f"{side}_{name}": number
        for side in ("encoder", "decoder")
        for name, number in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))
    }
    config = T.WhisperConfig(
        vocab_size=40, d_model=16, num_mel_bins=8, max_source_positions=8,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, **sizes,
    )  # fmt: skip
    return T.WhisperForConditionalGeneration(config)


def mask2former():
    backbone = T.SwinConfig(**SWIN, out_features=["stage1", "stage2", "stage3", "stage4"])
    config = T.Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=16, dim_feedforward=32, encoder_layers=1, decoder_layers=2,
        num_attention_heads=2, num_queries=4, num_labels=3,
    )  # fmt: skip
    return T.Mask2FormerModel(config)


def upernet():
    backbone = T.SwinConfig(**SWIN, out_features=["stage1", "stage2", "stage3", "stage4"])
    config = T.UperNetConfig(
        backbone_config=backbone, hidden_size=8, num_labels=3, auxiliary_in_channels=32,
        auxiliary_channels=8,
    )  # fmt: skip
    return T.UperNetForSemanticSegmentation(config)


def donut():
    decoder = T.MBartConfig(
        vocab_size=40, d_model=16, decoder_layers=2, decoder_attention_heads=2,
        decoder_ffn_dim=32, encoder_layers=1, is_decoder=True, add_cross_attention=True,
        max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    encoder = T.DonutSwinConfig(**{**SWIN, "depths": [1, 1], "num_heads": [1, 2]})
    return T.VisionEncoderDecoderModel(
        T.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    )


# case: the model, an input, and how many layers its modules have
CASES = {
    "llama": (
        lambda: T.LlamaForCausalLM(T.LlamaConfig(**LLAMA)), IDS, {"qkv": 2, "proj": 2, "mlp": 4},
    ),
    "qwen3": (
        lambda: T.Qwen3ForCausalLM(T.Qwen3Config(**LLAMA)), IDS, {"qkv": 2, "proj": 2, "mlp": 4},
    ),
    "gemma2": (
        lambda: T.Gemma2ForCausalLM(T.Gemma2Config(**LLAMA)), IDS, {"qkv": 2, "proj": 2, "mlp": 4},
    ),
    "phi3": (
        lambda: T.Phi3ForCausalLM(T.Phi3Config(**LLAMA)), IDS, {"qkv": 2, "proj": 2, "mlp": 4},
    ),
    "mixtral": (
        lambda: T.MixtralForCausalLM(T.MixtralConfig(**EXPERTS)),
        IDS,
        {"qkv": 2, "proj": 2, "mlp": 2 * 4 * 2},
    ),
    "qwen3_moe": (
        lambda: T.Qwen3MoeForCausalLM(
            T.Qwen3MoeConfig(**LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
        ),
        IDS,
        {"qkv": 2, "proj": 2, "mlp": 2 * 4 * 2},
    ),
    "gpt_oss": (
        lambda: T.GptOssForCausalLM(T.GptOssConfig(**EXPERTS)),
        IDS,
        {"qkv": 2, "proj": 2, "mlp": 2 * 4 * 2},
    ),
    "gpt2": (
        lambda: T.GPT2LMHeadModel(T.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)),
        IDS,
        {"qkv": 2, "proj": 2, "mlp": 4},
    ),
    "bert": (
        lambda: T.BertForMaskedLM(T.BertConfig(**TEXT)), IDS, {"qkv": 2, "proj": 2, "mlp": 4},
    ),
    "t5": (
        lambda: T.T5ForConditionalGeneration(
            T.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        ),
        {**IDS, "decoder_input_ids": IDS["input_ids"]},
        {"decoder.qkv": 4, "decoder.proj": 4, "decoder.mlp": 4,
         "encoder.qkv": 2, "encoder.proj": 2, "encoder.mlp": 4},
    ),
    "clip": (
        clip,
        IDS | PIXELS,
        {f"{tower}_model.{m}": n for tower in ("text", "vision") for m, n in
         (("qkv", 2), ("proj", 2), ("mlp", 4))},
    ),
    "siglip": (
        siglip,
        IDS | PIXELS,
        {f"{tower}_model.{m}": n for tower in ("text", "vision") for m, n in
         (("qkv", 2), ("proj", 2), ("mlp", 4))},
    ),
    "whisper": (
        whisper,
        {"input_features": torch.zeros(1, 8, 16), "decoder_input_ids": IDS["input_ids"]},
        {"decoder.qkv": 4, "decoder.proj": 4, "decoder.mlp": 4,
         "encoder.qkv": 2, "encoder.proj": 2, "encoder.mlp": 4},
    ),
    "dinov2": (
        lambda: T.Dinov2Model(T.Dinov2Config(**IMAGE)), PIXELS, {"qkv": 2, "proj": 2, "mlp": 4},
    ),
    "mask2former": (mask2former, PIXELS, {"qkv": 4, "proj": 4, "mlp": 8}),
    "upernet": (upernet, PIXELS, {"qkv": 4, "proj": 4, "mlp": 8}),
    "donut": (
        donut,
        {**PIXELS, "decoder_input_ids": IDS["input_ids"], "use_cache": False},
        {"decoder.model.decoder.qkv": 4, "decoder.model.decoder.proj": 4,
         "decoder.model.decoder.mlp": 4, "encoder.qkv": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_pruned_on_disk_as_in_memory(case, tmp_path):
    make, inputs, counts = CASES[case]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make().eval()
        model.save_pretrained(tmp_path / "in")
        modules = dimap.find_modules(model)
        found = {m: len(layers) for m, layers in modules.items() if m != "aux"}
        assert counts.items() <= found.items()
        prune_checkpoint(tmp_path / "in", tmp_path / "out", 0.5, masks=tmp_path / "m.safetensors")
        again = type(model).from_pretrained(tmp_path / "out").eval()
        masks = dimap.prune(model, 0.5).masks
        on_disk = fit_masks(
            dimap.load_masks(tmp_path / "m.safetensors"), dict(model.named_parameters())
        )
        with torch.no_grad():
            ours, theirs = model(**inputs), again(**inputs)
    assert on_disk.keys() == masks.keys()
    for name, mask in masks.items():
        assert torch.equal(on_disk[name], mask), name
    weights = dict(again.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(weights[name], parameter), name
    for ours_one, theirs_one in zip(ours.to_tuple(), theirs.to_tuple(), strict=True):
        if isinstance(ours_one, torch.Tensor):
            assert torch.allclose(ours_one, theirs_one, equal_nan=True)
