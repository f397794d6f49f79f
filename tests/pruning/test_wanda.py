"""Wanda: magnitudes times the norms of inputs, ranked in each row; in memory and from file to file."""

from __future__ import annotations

import inspect
from typing import get_args

import dimap
import pytest
import torch
import torch.distributed as dist
from checkpoints import shards, vit
from commands import runner
from dimap import reference
from dimap.groups import AUX, Slice, whole
from dimap.groups.nm import input_axes
from dimap.methods import METHODS
from dimap.rows import select_rows
from dimap.stream import prune_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import Group
from safetensors.torch import save_file
from torch import nn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, -1e-40, 1.17e-38, 3.0e38, 1e-20, 2.0]


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = self.attn.qkv(x).chunk(3, -1)
        x = x + self.attn.proj(q.sigmoid() * k + v)
        return x + self.mlp.fc2(self.mlp.fc1(x).relu())


class Net(nn.Module):
    def __init__(self, width=12):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def batches(count=3):
    rng = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 5, 12, generator=rng) * 3, None) for _ in range(count)]


def seen_by_hand(model, data):
    """The norms, from the inputs as they are, in float64."""
    found, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            hook = lambda m, x, name=name: found.setdefault(f"{name}.weight", []).append(x[0])  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        for x, _ in data:
            model(x)
    for handle in handles:
        handle.remove()
    return {
        name: torch.cat([x.flatten(0, -2) for x in xs]).double().norm(dim=0)[None]
        for name, xs in found.items()
    }


# Rows


@st.composite
def matrices(draw):
    rows, length = draw(st.integers(0, 5)), draw(st.integers(0, 9))
    dtype = draw(st.sampled_from(DTYPES))
    numbers = draw(
        st.lists(st.sampled_from(SPECIAL), min_size=rows * length, max_size=rows * length)
    )
    values = torch.tensor(numbers, dtype=torch.float64).reshape(rows, length)
    return values.clamp(-6e4, 6e4).to(dtype)


@settings(max_examples=200, deadline=None)
@given(matrices(), st.floats(0, 1))
def test_rows_are_those_of_the_reference(values, sparsity):
    want = reference.select_rows(values, sparsity)
    assert torch.equal(select_rows("w", values, -1, sparsity), want)
    assert torch.equal(select_rows("w", values.t(), -2, sparsity), want.t())
    assert torch.equal(select_rows("w", values.t().contiguous(), -2, sparsity), want.t())


@pytest.mark.parametrize("step", [0.0, 0.05, 1.0], ids=["distinct", "ties", "many ties"])
def test_rows_of_many_chunks(monkeypatch, step):
    torch.manual_seed(0)
    values = torch.randn(37, 50)
    values = (values / step).round() * step if step else values
    whole = select_rows("w", values, -1, 0.3)
    assert torch.equal(whole, reference.select_rows(values, 0.3))
    monkeypatch.setattr("dimap.rows.CHUNK", 120)
    assert torch.equal(select_rows("w", values, -1, 0.3), whole)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named(bad):
    model = net()
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight[3, 7] = bad
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    message = rf"blocks\.1\.mlp\.fc2\.weight must be finite, got {bad} at flat index 151"
    with pytest.raises(ValueError, match=message):
        dimap.prune(model, 0.5, scope="row")
    for name, p in model.named_parameters():
        assert torch.equal(p.nan_to_num(7), before[name].nan_to_num(7))


def test_scope_row_counts_exactly_in_each_row():
    model = net()
    pruning = dimap.prune(model, {"qkv": 0.3, "proj": 0.5, "mlp": 0.77}, scope="row")
    for name, mask in pruning.masks.items():
        share = {"qkv": 0.3, "proj": 0.5}.get(name.split(".")[3], 0.77)
        length = mask.shape[1]
        assert (mask.sum(1) == length - round(share * length)).all()
    assert sum(pruning.kept.values()) == sum(int(m.sum()) for m in pruning.masks.values())
    assert "row" in str(pruning.report().to_dict())


def test_rows_of_conv1d_are_its_columns():
    """GPT-2's matrices are [in, out]."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.randint(50, (4, 16), generator=torch.Generator().manual_seed(0))
    norms = dimap.saliency.input_norms(model, [({"input_ids": tokens}, None)])
    masks = dimap.select(model, 0.5, method="wanda", data=[({"input_ids": tokens}, None)])
    named = dict(model.named_parameters())
    assert len(masks) == 8
    for name, mask in masks.items():
        weight = named[name]
        assert norms[name].shape == (weight.shape[0], 1)
        assert (mask.sum(0) == weight.shape[0] - round(0.5 * weight.shape[0])).all()
        saliency = reference.wanda(weight, norms[name]).detach()
        assert torch.equal(mask, reference.select_rows(saliency.t(), 0.5).t())


# Norms and saliencies


def test_norms_are_those_of_the_inputs():
    model, data = net(), batches()
    norms = dimap.saliency.input_norms(model, data)
    want = seen_by_hand(model, data)
    assert norms.keys() == want.keys()
    for name, norm in norms.items():
        torch.testing.assert_close(norm.double(), want[name], rtol=1e-6, atol=0)
    assert all(not m._forward_pre_hooks for m in model.modules())


@settings(max_examples=100, deadline=None)
@given(matrices().filter(lambda m: m.numel()), st.integers(0, 10**6))
def test_saliencies_are_rounded_once(weights, seed):
    norms = torch.rand(1, weights.shape[1], generator=torch.Generator().manual_seed(seed)) * 1e-3
    got = dimap.saliency.scaled(weights, norms)
    assert torch.equal(got, reference.wanda(weights.float(), norms))


def test_masks_in_memory_are_those_of_the_reference():
    model, data = net(), batches()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    norms = dimap.saliency.input_norms(model, data)
    pruning = dimap.prune(model, 0.55, method="wanda", data=data)
    assert (pruning.scope, pruning.saliency) == ("row", "wanda")
    for name, mask in pruning.masks.items():
        saliency = reference.wanda(weights[name], norms[name])
        assert torch.equal(mask, reference.select_rows(saliency, 0.55))
        assert torch.equal(model.get_parameter(name), weights[name] * mask)
    again = dimap.select(
        net(), 0.55, saliency=dimap.saliency.by_norms(net(), norms), scope="row"
    )  # fmt: skip
    assert all(torch.equal(again[name], mask) for name, mask in pruning.masks.items())
    magnitudes = dimap.select(net(), 0.55, scope="row")
    assert any(not torch.equal(magnitudes[name], mask) for name, mask in pruning.masks.items())


def test_a_row_does_not_care_for_its_scale_nor_the_norms_for_theirs():
    model, data = net(), batches()
    want = dimap.select(model, 0.5, method="wanda", data=data)
    norms = {n: x * 4 for n, x in dimap.saliency.input_norms(model, data).items()}
    with torch.no_grad():
        for name in want:
            weight = model.get_parameter(name)
            weight *= 2.0 ** torch.arange(-3, len(weight) - 3)[:, None].clamp(-8, 8)
    got = dimap.select(model, 0.5, saliency=dimap.saliency.by_norms(model, norms), scope="row")
    assert all(torch.equal(got[name], mask) for name, mask in want.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda n: n.pop("blocks.1.attn.qkv.weight"),
            "must have every prunable weight, got none of",
        ),
        (lambda n: n.update({"blocks.0.mlp.fc1.weight": torch.ones(1, 13)}), r"got \(1, 13\)"),
        (lambda n: n.update({"blocks.0.mlp.fc1.weight": torch.ones(12)}), r"got \(12,\)"),
        (lambda n: n.update({"blocks.0.mlp.fc1.weight": -torch.ones(1, 12)}), "got other numbers"),
        (lambda n: n.update({"blocks.0.mlp.fc1.weight": torch.ones(1, 12).double()}), "float64"),
    ],
)
def test_norms_that_do_not_fit(change, message):
    norms = dimap.saliency.input_norms(net(), batches(1))
    change(norms)
    with pytest.raises(ValueError, match=message):
        dimap.saliency.by_norms(net(), norms)


def test_what_has_no_plain_inputs_is_refused():
    model = net()
    with pytest.raises(ValueError, match="at least one batch"):
        dimap.saliency.input_norms(model, [])
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        dimap.saliency.input_norms(model.state_dict(), batches())
    model.blocks[1].forward = lambda x: x
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.qkv\.weight must be reached by"):
        dimap.saliency.input_norms(model, batches())
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten())
    with pytest.raises(ValueError, match="must be the weight of a Linear"):
        dimap.saliency.input_norms(model, [], patterns={"all": r"(?P<block>\d)\.weight"})
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten())
    x = torch.randn(2, 3, 5, 5)
    norms = dimap.saliency.input_norms(
        model, [(x, None)], patterns={"all": r"(?P<block>\d)\.weight"}
    )
    torch.testing.assert_close(
        norms["0.weight"].flatten(), x.transpose(0, 1).flatten(1).norm(dim=1)
    )


# From file to file


def norms_for(state, path):
    """Of each prunable tensor: of its inputs, of a part of them the same, some zero."""
    rng = torch.Generator().manual_seed(5)
    norms = {}
    shapes = {name: tuple(w.shape) for name, w in state.items()}
    for part, axis in input_axes(dimap.find_modules(state), shapes).items():
        shape = list(state[whole(part)].shape)
        apart = [0] if isinstance(part, Slice) else []  # experts, each with norms of its own
        at = [*apart, len(shape) + axis]
        norm = torch.rand([n if d in at else 1 for d, n in enumerate(shape)], generator=rng)
        norms[whole(part)] = (norm * 16).round() / 16 if "mlp" in part else norm
    save_file(norms, path)
    return norms


def prune_both(folder, state, options, form="dense", kind="file", group=None):
    """From files, bit by bit as in memory."""
    norms = norms_for(state, folder / "norms.safetensors")
    source, out = folder / "in.safetensors", folder / "out.safetensors"
    if kind == "folder":
        source, out = folder / "in", folder / "out"
        shards(source, state)
    elif kind == "pickled":
        source = folder / "in.pth"
        torch.save(state, source)
    else:
        save_file(state, source, {"format": "pt"})
    here, saliency = dict(options), None
    if here.pop("method", "dimap") == "wanda":
        options = {"input_norms": folder / "norms.safetensors"} | options
        saliency = dimap.saliency.by_norms(state, norms)
        if "scope" not in here and "nm" not in here:
            here["scope"] = "row"
        if "nm" not in here:
            here.setdefault("normalize", "layer")
    masks = folder / "masks.safetensors"
    options = {**options, "masks": masks, "format": form}
    if group is None:
        result = prune_checkpoint(source, out, **options)
        found = [(result.kept, result.nonzero, result.smallest, result.nm)]
    else:
        found = group(on_ranks, source, out, options)
    want = {name: tensor.clone() for name, tensor in state.items()}
    pruning = dimap.prune(want, saliency=saliency, **here)
    got = {}
    for file in sorted(out.glob("*.safetensors")) if kind == "folder" else [out]:
        got |= dimap.load_file(file)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name].view(torch.uint8), tensor.view(torch.uint8)), name
    loaded = dimap.load_masks(masks)
    assert all(torch.equal(loaded[name], mask) for name, mask in pruning.masks.items())
    layers = [x for module, here in pruning.modules.items() if module != AUX for x in here]
    for kept, nonzero, smallest, nm in found:
        assert kept == pruning.kept
        assert nonzero == pruning.nonzero
        if not any(
            isinstance(n, Slice) or len(x.parameters) > 1 for x in layers for n in x.parameters
        ):
            assert smallest == pruning.smallest  # else files tell their layer's
        assert nm == pruning.nm
    return None if group else (result, pruning)


def on_ranks(source, out, options):
    done = prune_checkpoint(source, out, group=dist.group.WORLD, **options)
    return done.kept, done.nonzero, done.smallest, done.nm


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["dense", "bitmask", "compact"])
@pytest.mark.parametrize("kind", ["file", "folder", "pickled"])
@pytest.mark.parametrize("method", ["wanda", "dimap"])
def test_files_are_bit_by_bit_what_memory_gives(tmp_path, dtype, form, kind, method):
    state = vit(dtype, width=20, step=0.01)
    options = {"sparsity": 0.55, "scope": "row", "method": method}
    result, pruning = prune_both(tmp_path, state, options, form, kind)
    assert result.saliency == ("wanda" if method == "wanda" else "magnitude")
    assert result.thresholds == {}
    assert result.summary().to_dict()["kept"] == pruning.report().to_dict()["kept"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.4},
        {"sparsity": 0.4, "scope": "module"},
        {"sparsity": 0.7, "scope": "global", "normalize": "scope"},
        {"sparsity": 0.0},
        {"sparsity": 1.0, "scope": "layer"},
        {"sparsity": 0.5, "nm": "auto:8"},
        {"nm": "3:5"},
        {"params": 0.6, "scope": "module"},
        {"sparsity": 0.5, "scope": "module", "min_keep": 0.45},
    ],
    ids=str,
)
@pytest.mark.parametrize("step", [0.0, 0.01])
def test_wanda_in_any_scope(tmp_path, dtype, options, step):
    """Ranked by float32 products, of which many are equal, or zero where the weights are not."""
    state = vit(dtype, width=20, step=step)
    prune_both(tmp_path, state, {"method": "wanda"} | options)


@given(seed=st.integers(0, 10**6), sparsity=st.sampled_from([0.1, 0.5, 0.55, 0.9, 1.0]))
@settings(max_examples=25, deadline=None)
def test_any_weights_and_norms(tmp_path_factory, seed, sparsity):
    rng = torch.Generator().manual_seed(seed)
    width = 4 * int(torch.randint(1, 12, (), generator=rng))
    state = vit(DTYPES[seed % 3], width=width, seed=seed)
    special = torch.tensor(SPECIAL)
    for name in dimap.select(state, 0.0):
        flat = state[name].view(-1)
        at = torch.randperm(len(flat), generator=rng)[: len(flat) // 3]
        flat[at] = special[torch.randint(len(special), (len(at),), generator=rng)].to(flat.dtype)
        flat[flat.isinf()] = 1.0
    prune_both(tmp_path_factory.mktemp("any"), state, {"method": "wanda", "sparsity": sparsity})


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def group(request):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs gloo")
    group = Group(request.param)
    yield group
    group.close()


@pytest.mark.parametrize(
    ("options", "form"),
    [
        ({"sparsity": 0.55, "scope": "row"}, "dense"),
        ({"sparsity": 0.55, "method": "wanda"}, "dense"),
        ({"sparsity": 0.55, "method": "wanda"}, "bitmask"),
        ({"nm": "2:4", "method": "wanda"}, "bitmask"),
        ({"sparsity": 0.5, "nm": "auto", "method": "wanda"}, "dense"),
        ({"sparsity": 0.5, "scope": "module", "method": "wanda"}, "bitmask"),
    ],
    ids=str,
)
def test_several_ranks(group, tmp_path, options, form):
    state = vit(torch.bfloat16, width=48, blocks=3, step=0.01)
    prune_both(tmp_path, state, options, form, "folder", group)


def test_ranks_with_other_norms_are_refused(group, tmp_path):
    state = vit(width=20)
    norms = norms_for(state, tmp_path / "norms0")
    for rank in range(1, group.size):
        norms["blocks.1.mlp.fc2.weight"][0, 3] += rank
        save_file(norms, tmp_path / f"norms{rank}")
    save_file(state, tmp_path / "in.safetensors")
    for name, message in group.outcomes(other_norms, tmp_path):
        assert name in ("ValueError", "RuntimeError")
        assert "all ranks must be given the same checkpoint and settings" in message


def other_norms(folder):
    norms = folder / f"norms{dist.get_rank()}"
    options = {"sparsity": 0.5, "method": "wanda", "input_norms": norms}
    on_ranks(folder / "in.safetensors", folder / "out.safetensors", options)


def test_the_command(tmp_path, capsys):
    state = vit(width=20)
    norms_for(state, tmp_path / "norms.safetensors")
    save_file(state, tmp_path / "in.safetensors")
    given = [
        "prune",
        str(tmp_path / "in.safetensors"),
        str(tmp_path / "out.safetensors"),
        "-s",
        "0.5",
    ]
    norms = ["--input-norms", str(tmp_path / "norms.safetensors")]
    run = runner(capsys)
    code, told, _ = run(*given, "--method", "wanda", *norms)
    assert code == 0
    assert "row" in told
    code, _, _ = run(*given, "--method", "wanda", *norms, "--format", "compact", "--force")
    assert code == 0
    for wrong in (["--method", "wanda"], norms):
        (tmp_path / "out.safetensors").unlink(missing_ok=True)
        assert run(*given, *wrong)[0] == 1
        assert not (tmp_path / "out.safetensors").exists()


def test_a_file_whose_weights_are_not_finite_leaves_nothing(tmp_path):
    state = vit(width=20)
    state["blocks.1.mlp.fc2.weight"][19, 70] = float("nan")
    save_file(state, tmp_path / "in.safetensors")
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc2\.weight must be finite, got nan at"):
        prune_checkpoint(
            tmp_path / "in.safetensors", tmp_path / "out.safetensors", 0.5, scope="row"
        )
    assert [p.name for p in tmp_path.iterdir()] == ["in.safetensors"]


def experts():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=20, num_local_experts=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config)
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def columns():
    """GPT-2's [in, out], whose rows are columns."""
    state = {}
    for block in range(2):
        for name, n, out in (
            ("attn.c_attn", 20, 60),
            ("attn.c_proj", 20, 20),
            ("mlp.c_fc", 20, 88),
        ):
            state[f"h.{block}.{name}.weight"] = torch.randn(n, out)
            state[f"h.{block}.{name}.bias"] = torch.randn(out)
        state[f"h.{block}.mlp.c_proj.weight"] = torch.randn(88, 20)
        state[f"h.{block}.mlp.c_proj.bias"] = torch.randn(20)
    return state


@pytest.mark.parametrize("form", ["dense", "bitmask", "compact"])
@pytest.mark.parametrize("method", ["wanda", "dimap"])
@pytest.mark.parametrize("make", [experts, columns])
def test_rows_of_stacked_and_of_transposed_weights(tmp_path, make, method, form):
    """[experts, in, out], [experts, out, in] and [in, out]: a row is one output of one expert."""
    torch.manual_seed(1)
    state = {name: w.bfloat16() for name, w in make().items()}
    options = {"sparsity": 0.5, "scope": "row", "method": method}
    _, pruning = prune_both(tmp_path, state, options, form)
    kept = 0.5 * sum(mask.numel() for mask in pruning.masks.values())
    assert sum(int(mask.sum()) for mask in pruning.masks.values()) == kept


def test_the_command_offers_the_methods_that_stream():
    from dimap.cli.prune import prune

    annotated = inspect.signature(prune, eval_str=True).parameters["method"].annotation
    offered = get_args(get_args(annotated)[0])
    assert offered == tuple(name for name, method in METHODS.items() if method.streams)
