"""Saliencies, scopes and ready-made methods, against the specification and by hand."""

from __future__ import annotations

import dimap
import pytest
import torch
import torch.nn.functional as F
from dimap import reference, saliency
from dimap.methods import METHODS
from safetensors.torch import save_file
from torch import Tensor, nn

D = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(D, 3 * D), "proj": nn.Linear(D, D)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(D, 4 * D), "fc2": nn.Linear(4 * D, D)})
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn["qkv"](self.norm(x)).chunk(3, -1)
        x = x + self.attn["proj"](torch.sigmoid(q * k) * v)
        return self.drop(x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](x))))


class Net(nn.Module):
    """Two stages of two blocks under names that PATTERNS tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"blocks": nn.ModuleList([Block(), Block()])}) for _ in range(2)
        )
        self.head = nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.layers:
            for block in stage["blocks"]:
                x = block(x)
        return self.head(x)


AT = r"layers\.(?P<stage>\d)\.blocks\.(?P<block>\d)\."
PATTERNS = {
    "qkv": AT + r"attn\.qkv\.weight",
    "proj": AT + r"attn\.proj\.weight",
    "mlp": AT + r"mlp\.fc[12]\.weight",
}


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    net = Net()
    for i, p in enumerate(net.parameters()):
        p.data *= 0.5 + i % 5
    return net


@pytest.fixture
def data() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(8, D, generator=g), torch.randint(3, (8,), generator=g)) for _ in range(3)]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    modules = dimap.find_modules(model, PATTERNS)
    names = [p for m, xs in modules.items() if m != "aux" for x in xs for p in x.parameters]
    return {n: model.get_parameter(n).detach() for n in names}


def scope_of(name: str, scope: str) -> str:
    """The scope of a parameter, from its name alone."""
    _, stage, _, block, *rest = name.split(".")
    kind = "mlp" if rest[0] == "mlp" else rest[1]
    return {
        "module": kind, "global": "global", "layer": name.removesuffix(".weight"),
        "type": {"fc1": "mlp.1", "fc2": "mlp.2"}.get(rest[1], kind),
        "block": f"stage {stage} block {block}", "stage": f"stage {stage}",
    }[scope]  # fmt: skip


def by_hand(values: dict[str, Tensor], sparsity: float, scope: str, normalize: str):
    """Masks by the specification: `reference.select` where scores are normalised, else a stable sort."""
    scopes = {n: scope_of(n, scope) for n in values}
    masks = {}
    for one in dict.fromkeys(scopes.values()):
        mine = [n for n in values if scopes[n] == one]
        total = sum(values[n].numel() for n in mine)
        keep = total - round(sparsity * total)
        if normalize == "scope":
            scores = [values[n].double().abs() for n in mine]
        else:
            groups = {"layer": mine, "module": [scope_of(n, "module") for n in mine],
                      "block": [(scope_of(n, "module"), scope_of(n, "block")) for n in mine]}  # fmt: skip
            group = groups[normalize]
            numbers = {g: i for i, g in enumerate(dict.fromkeys(group))}
            scores = reference.score64([values[n] for n in mine], [numbers[g] for g in group])
        masks |= dict(zip(mine, reference.select_by(scores, [0] * len(mine), [keep]), strict=True))
    return masks


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    return got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)


# Scopes


@pytest.mark.parametrize("scope", ["module", "global", "layer", "type", "block", "stage"])
@pytest.mark.parametrize("normalize", ["layer", "block", "module", "scope"])
def test_scopes_follow_the_specification(model: Net, scope: str, normalize: str) -> None:
    got = dimap.select(model, 0.4, scope=scope, normalize=normalize, patterns=PATTERNS)
    want = by_hand(weights_of(model), 0.4, scope, "layer" if scope == "layer" else normalize)
    assert same(got, want)


@pytest.mark.parametrize("scope", ["type", "block", "stage"])
def test_every_scope_keeps_its_count_and_has_a_threshold(model: Net, scope: str) -> None:
    pruning = dimap.prune(model, 0.37, scope=scope, patterns=PATTERNS)
    names = dict.fromkeys(scope_of(n, scope) for n in pruning.masks)
    assert list(pruning.thresholds) == list(names)
    for name in names:
        mine = [m for n, m in pruning.masks.items() if scope_of(n, scope) == name]
        total = sum(m.numel() for m in mine)
        assert sum(int(m.sum()) for m in mine) == total - round(0.37 * total)
    for layer in pruning.report().layers:
        assert layer.threshold == pruning.thresholds[scope_of(layer.parameters[0], scope)]


def test_a_ratio_for_each_module_with_layer_types(model: Net) -> None:
    masks = dimap.select(
        model, {"qkv": 0.5, "proj": 0, "mlp": 0.25}, scope="type", patterns=PATTERNS
    )
    kept = {kind: 0 for kind in ("qkv", "proj", "fc1", "fc2")}
    for name, mask in masks.items():
        kept[name.split(".")[-2]] += int(mask.sum())
    assert kept == {"qkv": 4 * 384, "proj": 4 * 256, "fc1": 4 * 768, "fc2": 4 * 768}


def test_a_model_without_stages_is_one_stage(model: Net) -> None:
    state = {n.replace("layers.0.", "").replace("layers.1.blocks.", "blocks.1"): w
             for n, w in weights_of(model).items()}  # fmt: skip
    plain = {m: p.replace(r"layers\.(?P<stage>\d)\.", "").replace(r"\d)", r"\d+)")
             for m, p in PATTERNS.items()}  # fmt: skip
    stage = dimap.prune(state, 0.5, scope="stage", patterns=plain)
    assert list(stage.thresholds) == ["stage 0"]
    block = dimap.prune(state, 0.5, scope="block", patterns=plain)
    assert set(block.thresholds) == {"block 0", "block 1", "block 10", "block 11"}


@pytest.mark.parametrize("scope", ["type", "block", "stage"])
def test_scopes_of_blocks_need_blocks(scope: str) -> None:
    with pytest.raises(ValueError, match=rf"scope='{scope}' needs the \w+ of every prunable layer"):
        dimap.select(nn.Linear(3, 3), 0.5, scope=scope, patterns={"all": "weight"})


@pytest.mark.parametrize("options", [
    {"scope": "block"}, {"scope": "stage"}, {"scope": "type"}, {"scope": "global", "normalize": "scope"},
    {"scope": "block", "normalize": "module"},
])  # fmt: skip
def test_streams_know_the_scopes(tmp_path, options) -> None:
    torch.manual_seed(0)
    state = {}
    for stage in range(2):
        for block in range(2):
            at = f"layers.{stage}.blocks.{block}."
            for name, shape in {
                "attn.qkv": (96, 32),
                "attn.proj": (32, 32),
                "mlp.fc1": (128, 32),
                "mlp.fc2": (32, 128),
            }.items():
                state[f"{at}{name}.weight"] = torch.randn(shape)
    save_file(state, tmp_path / "in.safetensors")
    streamed = dimap.prune_checkpoint(
        tmp_path / "in.safetensors",
        tmp_path / "out.safetensors",
        0.6,
        masks=tmp_path / "m",
        **options,
    )
    pruning = dimap.prune(state, 0.6, **options)
    assert same(dimap.load_masks(tmp_path / "m"), pruning.masks)
    assert streamed.thresholds == pruning.thresholds
    assert streamed.report() == pruning.report()


# Saliencies


def test_a_saliency_is_ranked_as_it_is(model: Net) -> None:
    values = {n: torch.rand(w.shape) for n, w in weights_of(model).items()}
    for scope in ("module", "global", "block"):
        got = dimap.select(model, 0.7, saliency=values, scope=scope, patterns=PATTERNS)
        assert same(got, by_hand(values, 0.7, scope, "scope"))
    pruning = dimap.prune(model, 0.7, saliency=values, patterns=PATTERNS)
    assert (pruning.scope, pruning.normalize, pruning.saliency) == ("module", "scope", "given")
    assert same(pruning.masks, by_hand(values, 0.7, "module", "scope"))
    assert all(not model.get_parameter(n)[~m].any() for n, m in pruning.masks.items())


def test_a_saliency_is_normalised_on_request(model: Net) -> None:
    values = {
        n: torch.rand(w.shape) * (1 + i) for i, (n, w) in enumerate(weights_of(model).items())
    }
    got = dimap.select(
        model, 0.7, saliency=values, scope="global", normalize="layer", patterns=PATTERNS
    )
    assert same(got, by_hand(values, 0.7, "global", "layer"))


def test_magnitude_is_the_default(model: Net) -> None:
    values = saliency.magnitude(model, patterns=PATTERNS)
    for options in ({}, {"scope": "global"}, {"scope": "layer"}):
        got = dimap.select(
            model, 0.6, saliency=values, normalize="layer", patterns=PATTERNS, **options
        )
        assert same(got, dimap.select(model, 0.6, patterns=PATTERNS, **options))


def test_equal_saliencies_go_to_the_first(model: Net) -> None:
    values = {n: torch.ones(w.shape) for n, w in weights_of(model).items()}
    masks = dimap.select(model, 0.5, saliency=values, scope="global", patterns=PATTERNS)
    kept = torch.cat([m.flatten() for m in masks.values()])
    assert kept[: kept.numel() // 2].all()
    assert not kept[kept.numel() // 2 :].any()


def test_neighbouring_floats_are_told_apart(model: Net) -> None:
    """In one layer of all weights, squares over sums must not round two magnitudes into one."""
    names = weights_of(model)
    bits = torch.arange(sum(w.numel() for w in names.values()), dtype=torch.int32) + 0x3F800000
    flat = bits[torch.randperm(len(bits), generator=torch.Generator().manual_seed(0))]
    parts = flat.view(torch.float32).split([w.numel() for w in names.values()])
    values = {n: p.view(w.shape) for (n, w), p in zip(names.items(), parts, strict=True)}
    got = dimap.select(model, 0.5, saliency=values, scope="global", patterns=PATTERNS)
    assert same(got, by_hand(values, 0.5, "global", "scope"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_saliency(model: Net, dtype: torch.dtype) -> None:
    values = {n: torch.rand(w.shape).to(dtype) for n, w in weights_of(model).items()}
    got = dimap.select(model, 0.5, saliency=values, patterns=PATTERNS)
    assert same(got, by_hand(values, 0.5, "module", "scope"))


FC1 = "layers.1.blocks.0.mlp.fc1.weight"
SHAPE = (4 * D, D)


@pytest.mark.parametrize(("change", "error", "message"), [
    ({FC1: None}, TypeError, f"saliency of {FC1} must be a tensor, got NoneType"),
    ({FC1: torch.zeros(3, 2)}, ValueError, rf"saliency of {FC1} must have shape \(64, 16\), got \(3, 2\)"),
    ({FC1: torch.zeros(SHAPE).double()}, ValueError, f"saliency of {FC1} must be float32, bfloat16 or float16, got float64"),
    ({FC1: torch.zeros(SHAPE).bool()}, ValueError, f"saliency of {FC1} must be float32, bfloat16 or float16, got bool"),
    ({FC1: torch.zeros(SHAPE).index_fill(1, torch.tensor(2), -1)}, ValueError, f"saliency of {FC1} must not be negative, got -1 at flat index 2"),
    ({FC1: torch.full(SHAPE, float("nan"))}, ValueError, f"saliency of {FC1} must be finite, got nan at flat index 0"),
    ({FC1: torch.full(SHAPE, float("inf"))}, ValueError, f"saliency of {FC1} must be finite, got inf at flat index 0"),
    ({FC1: torch.zeros(SHAPE, device="meta")}, ValueError, f"saliency of {FC1} must be on cpu like its weight, got meta"),
    ({"fc1.weight": torch.zeros(SHAPE)}, ValueError, "saliency must be under the model's parameters, got 'fc1.weight'"),
])  # fmt: skip
def test_bad_saliency_is_named_and_nothing_is_changed(model: Net, change, error, message) -> None:
    values = saliency.magnitude(model, patterns=PATTERNS) | change
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(error, match=message):
        dimap.prune(model, 0.5, saliency=values, patterns=PATTERNS)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_missing_and_surplus_saliency(model: Net) -> None:
    values = {n: p.detach().abs() for n, p in model.named_parameters()}  # "aux" too: left out
    assert dimap.select(model, 0.5, saliency=values, patterns=PATTERNS)
    del values[FC1]
    with pytest.raises(ValueError, match=f"every prunable parameter, got none for {FC1}"):
        dimap.select(model, 0.5, saliency=values, patterns=PATTERNS)
    with pytest.raises(TypeError, match="saliency must be a mapping of names to tensors, got list"):
        dimap.select(model, 0.5, saliency=[], patterns=PATTERNS)


def test_random_is_seeded(model: Net) -> None:
    one, two, three = (saliency.random(model, seed, patterns=PATTERNS) for seed in (1, 1, 2))
    assert same(one, two)
    assert not same(one, three)
    kept = dimap.select(model, 0.5, saliency=one, scope="global", patterns=PATTERNS)
    shares = torch.stack([m.double().mean() for m in kept.values()])
    assert shares.sub(0.5).abs().max() < 0.12  # random numbers know no layers


def gradients(model: Net, x: Tensor, y: Tensor, names: list[str]) -> dict[str, Tensor]:
    """By hand, in float64, dropout off."""
    twin = Net().double()
    twin.load_state_dict(model.state_dict())
    F.cross_entropy(twin.eval()(x.double()), y).backward()
    return {n: twin.get_parameter(n).grad for n in names}


def test_taylor_is_weight_times_gradient_averaged_over_batches(model: Net, data) -> None:
    weights = weights_of(model)
    model.train()
    model.layers[0].eval()
    model.get_parameter(FC1).requires_grad_(False)
    got = saliency.taylor(model, data, patterns=PATTERNS)
    each = [gradients(model, x, y, list(weights)) for x, y in data]
    for n, w in weights.items():
        want = sum((w.double() * g[n]).abs() for g in each) / len(each)
        torch.testing.assert_close(got[n].double(), want, rtol=1e-4, atol=1e-9)
    assert model.training
    assert not model.layers[0].training
    assert not model.get_parameter(FC1).requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_snip_is_the_share_of_the_connection_sensitivity(model: Net, data) -> None:
    weights = weights_of(model)
    got = saliency.snip(model, data, patterns=PATTERNS)
    each = [gradients(model, x, y, list(weights)) for x, y in data]
    mean = {n: (w.double() * sum(g[n] for g in each) / len(each)).abs() for n, w in weights.items()}
    whole = sum(v.sum() for v in mean.values())
    for n, v in mean.items():
        torch.testing.assert_close(got[n].double(), v / whole, rtol=1e-4, atol=1e-9)
    assert sum(float(v.sum()) for v in got.values()) == pytest.approx(1, abs=1e-5)


def test_on_one_batch_snip_and_taylor_rank_alike(model: Net, data) -> None:
    masks = [
        dimap.select(model, 0.5, method=m, data=data[:1], patterns=PATTERNS)
        for m in ("snip", "taylor")
    ]
    differ = sum(int((masks[0][n] != masks[1][n]).sum()) for n in masks[0])
    assert differ <= 2  # rounding may swap neighbours at the cut


def test_another_loss_and_weights_it_does_not_reach(model: Net, data) -> None:
    last = [(x, None) for x, _ in data]
    first_block = model.layers[0]["blocks"][0]
    reach = lambda out, _: first_block(data[0][0]).square().mean() + 0 * out.sum()  # noqa: E731
    got = saliency.taylor(model, last, reach, patterns=PATTERNS)
    assert got["layers.0.blocks.0.attn.qkv.weight"].any()
    assert not got[FC1].any()


@pytest.mark.parametrize("method", [saliency.taylor, saliency.snip])
def test_bad_data_for_saliencies(model: Net, data, method) -> None:
    model.train()
    with pytest.raises(ValueError, match="data must hold at least one batch, got none"):
        method(model, [], patterns=PATTERNS)
    with pytest.raises(ValueError, match=r"loss must give a scalar tensor, got \(8, 3\)"):
        method(model, data, lambda out, _: out, patterns=PATTERNS)
    with pytest.raises(
        TypeError, match=r"model must be an nn\.Module, to have gradients, got dict"
    ):
        method(weights_of(model), data, patterns=PATTERNS)
    assert model.training


# Methods


def test_methods_are_what_they_say(model: Net, data) -> None:
    values = weights_of(model)
    taylor = saliency.taylor(model, data, patterns=PATTERNS)
    snip = saliency.snip(model, data, patterns=PATTERNS)
    wanda = saliency.wanda(model, data, patterns=PATTERNS)
    want = {
        "dimap": by_hand(values, 0.55, "module", "layer"),
        "lamp": by_hand(values, 0.55, "global", "layer"),
        "uniform": by_hand(values, 0.55, "layer", "scope"),
        "global_magnitude": by_hand(values, 0.55, "global", "scope"),
        "taylor": by_hand(taylor, 0.55, "global", "scope"),
        "snip": by_hand(snip, 0.55, "global", "scope"),
        "wanda": {n: reference.select_rows(s, 0.55) for n, s in wanda.items()},
    }
    assert want.keys() == METHODS.keys()
    for name, masks in want.items():
        got = dimap.select(model, 0.55, method=name, data=data, patterns=PATTERNS)
        assert same(got, masks), name
    assert same(want["dimap"], dimap.select(model, 0.55, patterns=PATTERNS))


def test_scope_and_normalize_overrule_the_method(model: Net, data) -> None:
    got = dimap.select(model, 0.5, method="lamp", scope="stage", patterns=PATTERNS)
    assert same(got, by_hand(weights_of(model), 0.5, "stage", "layer"))
    pruning = dimap.prune(
        model, 0.5, method="taylor", data=data, scope="module", normalize="layer", patterns=PATTERNS
    )
    assert (pruning.scope, pruning.normalize, pruning.saliency) == ("module", "layer", "taylor")


def test_masks_say_how_they_were_made(model: Net, data, tmp_path) -> None:
    from safetensors import safe_open

    pruning = dimap.prune(model, 0.5, method="snip", data=data, patterns=PATTERNS)
    pruning.save_masks(tmp_path / "masks")
    with safe_open(str(tmp_path / "masks"), "pt") as file:
        told = file.metadata()
    assert (told["saliency"], told["scope"], told["normalize"]) == ("snip", "global", "scope")


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({"method": "best"}, ValueError, "method must be one of dimap, lamp, uniform, global_magnitude, taylor, snip, wanda, got 'best'"),
    ({"method": "taylor"}, ValueError, "method='taylor' needs data, batches"),
    ({"method": "snip", "data": [], "saliency": {}}, ValueError, "method='snip' computes a saliency of its own"),
    ({"method": "snip", "data": []}, ValueError, "data must hold at least one batch"),
    ({"method": "snip", "data": 5, "sparsity": 2}, ValueError, r"sparsity must be in \[0, 1\]"),
])  # fmt: skip
def test_bad_methods(model: Net, arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        dimap.select(model, **({"sparsity": 0.5} | arguments), patterns=PATTERNS)


def test_score_has_no_scope(model: Net) -> None:
    with pytest.raises(
        ValueError, match="normalize must be one of layer, block, stage, module, got 'scope'"
    ):
        dimap.score(model, normalize="scope", patterns=PATTERNS)
    with pytest.raises(TypeError, match=r"needs an nn\.Module, to have gradients, got dict"):
        dimap.select(weights_of(model), 0.5, method="snip", data=[], patterns=PATTERNS)
