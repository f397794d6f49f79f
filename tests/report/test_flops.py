"""FLOPs: exact multiply-adds per parameter, on a model that stays as it was."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from dimap.flops import count_flops, default_input_size
from dimap.groups import find_modules
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode


class Tokens(nn.Module):
    """Patches of 4 x 4, an attention without heads, a head on the mean token."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, stride=4)
        self.norm = nn.BatchNorm1d(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, 5, bias=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(self.embed(image).flatten(2)).mT  # [1, tokens, width]
        q, k, v = self.qkv(tokens).chunk(3, -1)
        return self.head((q @ k.mT @ v).mean(1))


def test_counts_are_weights_times_tokens():
    flops = count_flops(Tokens(), (8, 12))
    assert flops.input_size == (3, 8, 12)
    assert flops.parameters == {
        "embed.weight": 3 * 4 * 4 * 8 * 6,
        "qkv.weight": 8 * 24 * 6,
        "head.weight": 8 * 5,
    }
    assert flops.other == 2 * 6 * 6 * 8  # q @ k.mT, and that @ v
    assert flops.total == sum(flops.parameters.values()) + flops.other


def test_grouped_convolution_counts_each_weight_once_per_position():
    model = nn.Conv2d(4, 8, 3, padding=1, groups=4)
    assert count_flops(model, 5).parameters == {"weight": 8 * 3 * 3 * 25}


def test_weight_that_a_function_reads_counts_like_a_module():
    class Functional(Tokens):
        def forward(self, image):
            tokens = self.embed(image).flatten(2).mT
            return F.linear(tokens, self.qkv.weight, torch.cat([self.qkv.bias[:12]] * 2))

    assert count_flops(Functional(), 8).parameters["qkv.weight"] == 8 * 24 * 4


def test_weight_used_twice_counts_twice_under_its_first_name():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.second = nn.Linear(6, 6)
            self.second.weight = self.first.weight

        def forward(self, image):
            return self.second(self.first(image))

    assert count_flops(Tied(), (1, 4, 6)).parameters == {"first.weight": 2 * 36 * 4}


def test_fused_attention_is_counted_as_two_products():
    class Fused(nn.Module):
        def forward(self, image):
            return F.scaled_dot_product_attention(image, image, image)

    flops = count_flops(Fused(), (2, 5, 4))
    assert (flops.total, flops.other, flops.parameters) == (2 * 2 * 5 * 5 * 4,) * 2 + ({},)


def test_model_stays_as_it_was():
    model = Tokens().train()
    model.head.eval()
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("forward"))
    model.qkv.register_forward_pre_hook(lambda *_: calls.append("pre"))
    before = {name: (t.clone(), t.data_ptr()) for name, t in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    attributes = {name: list(vars(module)) for name, module in model.named_modules()}

    count_flops(model, 8)

    assert calls == []
    assert [module.training for module in model.modules()] == modes
    assert {name: list(vars(module)) for name, module in model.named_modules()} == attributes
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name][0])
        assert tensor.data_ptr() == before[name][1]
    model(torch.zeros(2, 3, 8, 8))
    assert calls == ["pre", "forward"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_count_the_same(dtype):
    assert count_flops(Tokens().to(dtype), 8) == count_flops(Tokens(), 8)


def test_mixed_dtypes_count_the_same():
    model = Tokens()
    model.qkv.half()
    assert count_flops(model, 8) == count_flops(Tokens(), 8)


def test_meta_model_counts_the_same():
    with torch.device("meta"):
        model = Tokens()
    assert count_flops(model, 8) == count_flops(Tokens(), 8)


def test_compiled_model_counts_the_same():
    flops = count_flops(torch.compile(Tokens()), 8)
    assert flops.total == count_flops(Tokens(), 8).total
    assert "_orig_mod.qkv.weight" in flops.parameters


def test_constants_on_the_cpu_may_meet_activations():
    class Constant(Tokens):
        def forward(self, image):
            self.table = torch.arange(3.0).view(1, 3, 1, 1)  # not where the activations are
            return super().forward(image * self.table + torch.tensor(2.0).item())

    model = Constant()
    assert count_flops(model, 8) == count_flops(Tokens(), 8)
    assert not hasattr(model, "table")


def test_channels_come_from_the_first_convolution():
    assert count_flops(nn.Conv2d(1, 2, 1), 7).input_size == (1, 7, 7)
    assert count_flops(nn.Linear(7, 2), (5, 7)).input_size == (3, 5, 7)


class TestDefaultInputSize:
    @pytest.mark.parametrize(
        ("attributes", "size"),
        [
            ({"patch_embed": SimpleNamespace(img_size=(56, 64))}, (56, 64)),
            ({"image_size": 48}, (48, 48)),
            ({"config": SimpleNamespace(image_size=40)}, (40, 40)),
            ({"config": SimpleNamespace(image_size=[32, 40])}, (32, 40)),
            ({"pretrained_cfg": {"input_size": (3, 288, 256)}}, (288, 256)),
            ({"default_cfg": {"input_size": (3, 288, 256)}}, (288, 256)),
        ],
    )
    def test_is_what_the_model_says(self, attributes, size):
        model = nn.Identity()
        for name, value in attributes.items():
            setattr(model, name, value)
        assert default_input_size(model) == size

    def test_of_the_built_model_wins_over_that_of_its_pretraining(self):
        timm = pytest.importorskip("timm")
        with torch.device("meta"):
            model = timm.create_model("swin_tiny_patch4_window7_224", img_size=112, in_chans=1)
        assert count_flops(model).input_size == (1, 112, 112)

    @pytest.mark.parametrize(("name", "side"), [("swin_t", 224), ("swin_v2_t", 256)])
    def test_of_torchvision(self, name, side):
        models = pytest.importorskip("torchvision.models")
        with torch.device("meta"):
            model = getattr(models, name)()
        assert default_input_size(model) == (side, side)

    def test_is_asked_for_where_the_model_does_not_say_it(self):
        with pytest.raises(ValueError, match=r"input_size must be given .*: Tokens does not say"):
            count_flops(Tokens())


@pytest.mark.parametrize("size", [0, -8, (8,), (1, 3, 8, 8), (8, 0), (8.0, 8), "8"])
def test_malformed_input_size_is_refused(size):
    with pytest.raises(ValueError, match=r"input_size must be a side, .* got "):
        count_flops(Tokens(), size)


def test_failing_forward_pass_names_the_model_and_the_shape():
    with pytest.raises(RuntimeError, match=r"forward pass of Tokens .* shape \[1, 4, 8, 8\]"):
        count_flops(Tokens(), (4, 8, 8))


def test_state_dict_is_refused():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got dict"):
        count_flops({"weight": torch.ones(2, 2)})


def _timm_swin():
    return pytest.importorskip("timm").create_model(
        "swin_tiny_patch4_window7_224", img_size=112, depths=(1, 1, 1, 1)
    )


def _timm_swinv2():
    return pytest.importorskip("timm").create_model(
        "swinv2_tiny_window8_256", img_size=128, depths=(1, 1, 1, 1)
    )


def _torchvision_swin_v2():
    swin = pytest.importorskip("torchvision.models.swin_transformer")
    return swin.SwinTransformer(
        [4, 4], 24, [1, 1], [2, 4], [8, 8], block=swin.SwinTransformerBlockV2,
        downsample_layer=swin.PatchMergingV2,
    )  # fmt: skip


def _transformers_swin():
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=112, embed_dim=24, depths=[1, 1], num_heads=[2, 4], attn_implementation="eager"
    )
    return transformers.SwinForImageClassification(config)


@pytest.mark.parametrize(
    "build", [_timm_swin, _timm_swinv2, _torchvision_swin_v2, _transformers_swin]
)
def test_every_prunable_layer_of_a_real_model_is_seen(build):
    model = build().eval()
    flops = count_flops(model)
    parameters = dict(model.named_parameters())
    for module, layers in find_modules(model).items():
        for name in (p for layer in layers for p in layer.parameters if module != "aux"):
            tokens, rest = divmod(flops.parameters[name], parameters[name].numel())
            assert tokens > 0, name
            assert rest == 0, name
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *flops.input_size))
    assert 2 * flops.total == counter.get_total_flops()
