"""Reports: the figures of the paper's Table 1, exact counts on small models, JSON and tables."""

from __future__ import annotations

import dataclasses
import io
import json

import dimap
import pytest
import torch
from dimap.report import VERSION, Report, build_report
from dimap.report.text import leaves, short
from torch import nn

# Paper, Table 1: removed parameters % and removed FLOPs %, at 15, 35 and 55 %.
TABLE_1 = {
    "swin_tiny": (28_288_354, 25_878_528, (13.7, 32.0, 50.3), (13.9, 32.4, 50.8)),
    "swin_small": (49_606_258, None, (14.2, 33.2, 52.2), (14.3, 33.2, 52.3)),
    "swin_base": (87_768_224, 83_755_008, (14.3, 33.4, 52.5), (14.4, 33.5, 52.7)),
}
# The dense FLOPs there, in multiply-adds.
DENSE_FLOPS = {"swin_tiny": 4.5e9, "swin_small": 8.7e9, "swin_base": 15.4e9}


@pytest.mark.parametrize("name", TABLE_1)
def test_table_1_of_the_paper(name):
    timm = pytest.importorskip("timm")
    dense, prunable, parameters, flops = TABLE_1[name]
    with torch.device("meta"):  # the counts do not depend on the weights: skip the slow init
        model = timm.create_model(f"{name}_patch4_window7_224")
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1, generator=generator)

    # Each ratio starts from what the last one left, which changes no count.
    for sparsity, removed, removed_flops in zip((0.15, 0.35, 0.55), parameters, flops, strict=True):
        report = dimap.prune(model, sparsity).report(model)
        assert report.weights == dense
        if prunable is not None:
            assert sum(layer.weights for layer in report.layers) == prunable
        assert report.removed_percent == pytest.approx(removed, abs=0.1)
        assert report.flops_nominal_removed_percent == pytest.approx(removed_flops, abs=0.2)
        assert report.flops_dense == pytest.approx(DENSE_FLOPS[name], rel=0.01)
    # Honest FLOPs fall less: the last stage loses most and has the fewest tokens.
    assert report.flops_removed_percent < report.flops_nominal_removed_percent - 5


def test_the_summary_says_no_more_than_there_is():
    model = Tiny()
    text = str(
        dimap.prune(model, 0.0, patterns={"fc": r"blocks\.(?P<block>\d+)\.fc\.weight"}).report()
    )
    assert "threshold" not in text  # nothing was cut
    model.embed.bias.data.zero_()
    text = str(
        dimap.prune(model, 0.5, patterns={"fc": r"blocks\.(?P<block>\d+)\.fc\.weight"}).report()
    )
    assert "threshold" in text
    assert "that are kept were zero before" in text


class Tiny(nn.Module):
    """Two blocks; `fc` works on 16 tokens in the first and on 4 in the second."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 4, 2, stride=2)
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(4, 4)}) for _ in range(2))
        self.register_buffer("table", torch.ones(3))
        with torch.no_grad():
            # Scores fall with the rank in the layer, so a steep layer keeps fewer weights.
            ranks = torch.arange(16.0).view(4, 4)
            self.blocks[0]["fc"].weight.copy_(1.5**-ranks)
            self.blocks[1]["fc"].weight.copy_(2.0**-ranks)
            for bias in (self.embed.bias, self.blocks[0]["fc"].bias, self.blocks[1]["fc"].bias):
                bias.zero_()
            self.embed.weight.fill_(1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(image).flatten(2).mT
        tokens = self.blocks[0]["fc"](tokens)
        return self.blocks[1]["fc"](tokens.unflatten(1, (4, 4)).mean(1))


PATTERNS = {"fc": r"blocks\.(?P<block>\d+)\.fc\.weight"}


def pruned(sparsity: float = 0.5, **kwargs) -> tuple[dimap.Pruning, Tiny]:
    model = Tiny()
    return dimap.prune(model, sparsity, patterns=PATTERNS, **kwargs), model


def test_counts_of_a_small_model_are_exact():
    pruning, model = pruned(0.5)
    report = pruning.report(model, 8)
    kept = [int(mask.sum()) for mask in pruning.masks.values()]
    assert sum(kept) == 16
    assert kept[0] != kept[1]

    assert (report.weights, report.kept) == (52 + 20 + 20, 52 + 40 - 16)
    assert report.removed_percent == pytest.approx(100 * 16 / 92)
    assert report.nonzero == 48 + 16  # all biases are zero
    assert [(m.name, m.layers, m.weights, m.kept) for m in report.modules] == [
        ("fc", 2, 32, 16),
        ("aux", 4, 60, 60),
    ]
    assert [(r.name, r.block, r.weights, r.kept) for r in report.layers] == [
        ("blocks.0.fc", 0, 16, kept[0]),
        ("blocks.1.fc", 1, 16, kept[1]),
    ]
    tokens = (16, 4)
    embed = 48 * 16
    assert [r.flops_dense for r in report.layers] == [16 * n for n in tokens]
    assert [r.flops for r in report.layers] == [k * n for k, n in zip(kept, tokens, strict=True)]
    assert [r.flops_nominal for r in report.layers] == [8 * n for n in tokens]
    assert report.flops_dense == embed + 16 * 20
    assert report.flops_nominal == embed + 8 * 20
    assert report.flops == embed + kept[0] * 16 + kept[1] * 4
    assert report.flops_other == 0
    assert report.input_size == (3, 8, 8)
    assert report.notes == ()


def test_smallest_kept_is_the_cut_of_the_layer():
    pruning, _ = pruned(0.5)
    for layer, base in zip(pruning.report().layers, (1.5, 2.0), strict=True):
        assert layer.smallest_kept == pytest.approx(base ** -(layer.kept - 1))


def test_zeros_that_were_there_before_are_kept_but_not_counted():
    model = Tiny()
    with torch.no_grad():
        model.blocks[0]["fc"].weight[0] = 0
    report = dimap.prune(model, 0.0, patterns=PATTERNS).report(model, 8)
    first = report.layers[0]
    assert (first.kept, first.nonzero, first.smallest_kept) == (16, 12, 0)
    assert (first.flops_dense, first.flops_nominal, first.flops) == (256, 256, 192)
    assert report.removed_percent == 0


def test_float8_beside_what_is_pruned_is_counted():
    state = {f"blocks.{i}.fc.weight": torch.randn(4, 4) for i in range(2)}
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"):
        state[f"{name}.weight"] = torch.tensor([0.0, -0.0, 1.0, -0.5]).to(getattr(torch, name))
    report = dimap.prune(state, 0.5, patterns=PATTERNS).report()
    assert (report.weights, report.kept, report.nonzero) == (48, 32, 16 + 8)


class TestThreshold:
    def test_of_a_module_is_that_of_its_layers(self):
        pruning, _ = pruned(scope="module")
        report = pruning.report()
        assert report.modules[0].threshold == pruning.thresholds["fc"]
        assert {layer.threshold for layer in report.layers} == {pruning.thresholds["fc"]}

    def test_of_the_network_is_that_of_every_layer(self):
        pruning, _ = pruned(scope="global")
        report = pruning.report()
        (threshold,) = pruning.thresholds.values()
        assert {report.modules[0].threshold, *(x.threshold for x in report.layers)} == {threshold}

    def test_of_a_layer_is_its_own(self):
        pruning, _ = pruned(scope="layer")
        report = pruning.report()
        assert report.modules[0].threshold is None
        assert [x.threshold for x in report.layers] == list(pruning.thresholds.values())

    def test_of_aux_is_none(self):
        pruning, _ = pruned()
        assert pruning.report().modules[-1].threshold is None

    def test_where_nothing_is_kept_is_none(self):
        pruning, model = pruned(1.0)
        report = pruning.report(model, 8)
        assert report.modules[0].threshold is None
        assert {(x.threshold, x.smallest_kept, x.kept, x.flops) for x in report.layers} == {
            (None, None, 0, 0)
        }


class TestWithoutFlops:
    def test_state_dict_says_so(self):
        state = Tiny().state_dict()
        state.pop("table")
        pruning = dimap.prune(state, 0.5, patterns=PATTERNS)
        for report in (pruning.report(), build_report(pruning, state)):
            assert (report.kept, report.model) == (76, None)
            counts = [report, *report.modules, *report.layers]
            assert {(x.flops_dense, x.flops_nominal, x.flops) for x in counts} == {(None,) * 3}
            assert report.flops_removed_percent is None
            assert "no FLOPs" in str(report)
            assert "nominal" not in str(report)

    def test_unknown_input_size_says_so(self):
        pruning, model = pruned()
        (note,) = pruning.report(model).notes
        assert note.startswith("no FLOPs: input_size must be given")

    def test_input_size_that_was_given_must_fit(self):
        pruning, model = pruned()
        with pytest.raises(RuntimeError, match="forward pass of Tiny"):
            pruning.report(model, 6)

    def test_input_size_of_the_model_that_does_not_fit_says_so(self):
        pruning, model = pruned()
        model.image_size = 6
        report = pruning.report(model)
        assert report.flops is None
        assert "forward pass of Tiny" in report.notes[0]


def test_flops_of_a_state_dict_come_with_a_meta_model_of_its_shape():
    state = Tiny().state_dict()
    pruning = dimap.prune(state, 0.5, patterns=PATTERNS)
    expected = pruned(0.5)
    with torch.device("meta"):
        model = Tiny()
    assert pruning.report(model, 8).flops == expected[0].report(expected[1], 8).flops


def test_layer_that_takes_no_part_in_the_forward_pass_is_noted():
    class First(Tiny):
        def forward(self, image):
            return self.blocks[0]["fc"](self.embed(image).flatten(2).mT)

    report = pruned()[0].report(First(), 8)
    assert report.layers[1].flops_dense == 0
    assert report.notes == ("no FLOPs were seen of 1 layers, blocks.1.fc is the first",)


def test_another_model_is_refused_by_name_of_the_parameter():
    pruning, model = pruned()
    del model.blocks[1]
    with pytest.raises(ValueError, match=r"it has 1 of blocks\.\*\.fc\.weight, the weights have 2"):
        pruning.report(model, 8)
    model.blocks[0]["fc"] = nn.Linear(4, 5)
    with pytest.raises(ValueError, match=r"blocks\.0\.fc\.weight must have shape .*, got \(5, 4\)"):
        pruning.report(model, 8)


def test_split_qkv_is_one_layer():
    model = nn.Module()
    for name in "qkv":
        setattr(model, name, nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        for scale, linear in zip((1, 2, 4), model.children(), strict=True):
            linear.weight.fill_(scale)
    pruning = dimap.prune(model, 0.5, patterns={"qkv": [tuple(rf"{x}\.weight" for x in "qkv")]})
    (layer,) = pruning.report().layers
    assert layer.parameters == ("q.weight", "k.weight", "v.weight")
    assert (layer.weights, layer.kept, layer.nonzero, layer.smallest_kept) == (12, 6, 6, 2)


class TestJson:
    @pytest.fixture
    def report(self) -> Report:
        pruning, model = pruned()
        return pruning.report(model, 8)

    def test_round_trip(self, report, tmp_path):
        path = tmp_path / "report.json"
        text = report.to_json(path)
        assert path.read_text() == text
        assert Report.from_json(text) == report
        assert Report.from_json(path) == report
        assert Report.from_json(str(path)) == report
        assert Report.from_dict(report.to_dict()) == report
        assert list(tmp_path.iterdir()) == [path]

    def test_round_trip_without_flops(self):
        report = pruned()[0].report()
        assert Report.from_json(report.to_json()) == report

    def test_keys_are_the_documented_ones(self, report):
        derived = {
            "density", "removed", "removed_percent",
            "flops_removed_percent", "flops_nominal_removed_percent",
        }  # fmt: skip
        counts = {"weights", "kept", "nonzero", "flops_dense", "flops_nominal", "flops"} | derived
        data = json.loads(report.to_json())
        assert set(data) == counts | {
            "schema", "version", "flops_unit", "scope", "normalize", "sparsity", "modules",
            "layers", "model", "input_size", "flops_other", "notes", "asked", "got",
        }  # fmt: skip
        assert set(data["modules"][0]) == counts | {"name", "layers", "threshold"}
        assert set(data["layers"][0]) == counts | {
            "name", "module", "stage", "block", "tower", "parameters", "threshold",
            "smallest_kept", "nm",
        }  # fmt: skip
        assert (data["schema"], data["version"]) == ("dimap.report", VERSION)

    def test_nothing_kept_is_valid_json(self):
        def refuse(constant: str) -> None:
            raise AssertionError(constant)

        text = pruned(1.0)[0].report().to_json()
        assert json.loads(text, parse_constant=refuse)["layers"][0]["threshold"] is None

    def test_other_version_is_refused(self, report):
        data = report.to_dict() | {"version": VERSION + 1}
        with pytest.raises(ValueError, match=f"version {VERSION}, got 'dimap.report' and"):
            Report.from_dict(data)

    @pytest.mark.parametrize("field", ["kept", "modules"])
    def test_missing_field_is_named(self, report, field):
        data = report.to_dict()
        del data[field]
        with pytest.raises(ValueError, match=f"Report must have a field '{field}'"):
            Report.from_dict(data)

    def test_field_of_a_later_writer_is_ignored(self, report):
        data = report.to_dict() | {"colour": "red"}
        data["layers"][0]["colour"] = "blue"
        assert Report.from_dict(data) == report

    def test_failed_write_leaves_nothing(self, report, tmp_path):
        with pytest.raises(OSError, match="absent"):
            report.to_json(tmp_path / "absent" / "report.json")
        assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def large() -> Report:
    """Twenty-four blocks with long names and ten-digit counts."""
    small = pruned()[0].report(pruned()[1], 8)
    layers = tuple(
        dataclasses.replace(
            small.layers[0],
            name=f"swin.encoder.layers.{i // 6}.blocks.{i % 6}.attention.{leaf}",
            stage=i // 6,
            block=i % 6,
            weights=2_359_296_000,
            kept=j * 200_000_000,
            smallest_kept=1.5e-11,
            flops=99_900_000,
        )
        for i in range(24)
        for j, leaf in enumerate(("output.dense.name.of.an.long.attention", "self"))
    )
    modules = tuple(dataclasses.replace(m, weights=9 * 10**9, kept=10**9) for m in small.modules)
    return dataclasses.replace(small, layers=layers, modules=modules, weights=10**10, kept=10**9)


def drawn(*parts: object, encoding: str = "utf-8") -> list[str]:
    from rich.console import Console

    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=stream, width=80)
    console.print(*parts, sep="\n")
    stream.flush()
    return stream.buffer.getvalue().decode(encoding).splitlines()


class TestTables:
    def test_text_is_at_most_80_columns(self, large):
        lines = [*str(large).splitlines(), *drawn(large.layer_table(), encoding="ascii")]
        assert max(map(len, lines)) <= 80
        assert len(lines) > 2 * 24
        assert all(line.isascii() for line in lines)

    def test_rich_fits_80_columns_with_every_figure_whole(self, large):
        lines = drawn(large, large.layer_table())
        assert max(map(len, lines)) <= 80
        assert not any("…" in line for line in lines)
        row = next(line for line in lines if "2.3 " in line and "self" in line)
        assert row.split() == ["2.3", "self", "2.36G", "8.5", "%", "╸", "1.50e-11", "99.9M"]

    def test_long_name_keeps_its_end(self, large):
        row = next(line for line in drawn(large.layer_table()) if "attention" in line)
        assert row.split()[:3] == ["0.0", "..e.of.an.long.attention", "2.36G"]

    def test_ascii_terminal_gets_ascii(self, large):
        whole = dataclasses.replace(large.layers[0], kept=large.layers[0].weights)
        whole = dataclasses.replace(large, layers=(whole,))
        assert any(10 * "-" in line for line in drawn(whole.layer_table(), encoding="ascii")[2:])

    def test_str_is_the_summary(self, large):
        assert "threshold" in str(large)
        assert "blocks" not in str(large)
        assert "self" not in str(large)

    def test_print_with_layers(self, large, capsys):
        large.print()
        short = capsys.readouterr().out
        large.print(layers=True)
        assert capsys.readouterr().out.count("\n") > short.count("\n") + 48

    def test_model_without_parameters_to_prune_is_drawn(self):
        empty = dataclasses.replace(pruned()[0].report(), layers=())
        assert drawn(empty, empty.layer_table())
        assert str(empty)

    @pytest.mark.parametrize(
        ("count", "text"),
        [
            (None, ""), (0, "0"), (999, "999"), (1000, "1.00k"), (9994, "9.99k"), (9996, "10.0k"),
            (99_949, "99.9k"), (99_951, "100k"), (999_499, "999k"), (999_999, "1.00M"),
            (28_288_354, "28.3M"), (15_430_000_000, "15.4G"),
        ],
    )  # fmt: skip
    def test_counts_keep_three_digits(self, count, text):
        assert short(count) == text

    @pytest.mark.parametrize(
        ("names", "ends"),
        [
            (["a"], ["a"]),
            (["a.b.c.d"], ["c.d"]),
            (["x.0.attn.qkv", "x.0.attn.proj"], ["qkv", "proj"]),
            (["a", "a.b"], ["a", "a.b"]),
            (["fc1", "fc2"], ["fc1", "fc2"]),
        ],
    )
    def test_names_lose_what_a_block_shares(self, names, ends):
        assert leaves(names) == ends


def test_a_pruning_is_shown_in_a_line() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(20)))
    pruning = dimap.prune(model, 0.5, patterns={"all": r"(?P<block>\d+)\.weight"})
    wanted = "Pruning(layers={'all': 20}, scope='module', sparsity={'all': 0.5})"
    assert repr(pruning) == wanted


@pytest.mark.parametrize(("ours", "theirs"), [(3, 12), (12, 3)])
def test_a_model_of_another_depth_is_called_so(ours: int, theirs: int) -> None:
    def net(depth: int) -> nn.Module:
        return nn.Sequential(*(nn.Linear(8, 8) for _ in range(depth)))

    pruning = dimap.prune(net(ours), 0.5, patterns={"all": r"(?P<block>\d+)\.weight"})
    message = rf"whose weights these are: it has {theirs} of \*\.weight, the weights have {ours}"
    with pytest.raises(ValueError, match=message):
        pruning.report(net(theirs))


@pytest.mark.parametrize(
    ("fill", "sparsity", "said"), [(0.0, 0.5, ", as it was before"), (1.0, 1.0, "")]
)
def test_blocks_of_zeros_are_told(fill, sparsity, said):
    state = {
        f"blocks.0.{name}.weight": torch.full((4, 4), fill)
        for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    notes = dimap.prune(state, sparsity).report().notes
    assert f"every weight of all 4 layers is zero{said}: the blocks compute nothing" in notes
