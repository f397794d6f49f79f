"""Pictures: what is drawn is what was counted."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from commands import runner

pytest.importorskip("matplotlib")
pytest.importorskip("typer")

import dimap
import numpy as np
from dimap import plots
from dimap.checkpoint import open_checkpoint
from dimap.plots.curves import METHODS
from dimap.plots.mask import KEPT, PRUNED, average
from dimap.plots.report_folder import kept_mask
from dimap.report import LayerReport, Report
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from PIL import Image
from safetensors.torch import save_file


def swin(stages=((8, 2), (16, 2)), split=False, dtype=torch.float32):
    """A Swin's prunable weights under timm's names; stages: (width, blocks)."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for stage, (width, blocks) in enumerate(stages):
        for block in range(blocks):
            name = f"layers.{stage}.blocks.{block}."
            shapes = {
                "attn.qkv": (3 * width, width), "attn.proj": (width, width),
                "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width),
            }  # fmt: skip
            for part, shape in shapes.items():
                weight = torch.randn(shape, generator=generator) / (1 + stage)
                state[f"{name}{part}.weight"] = weight.to(dtype)
    return state


def vit_split(blocks=3, width=8):
    """A ViT with query, key and value apart, as Hugging Face has it on disk."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for block in range(blocks):
        name = f"encoder.layer.{block}."
        for part in ("query", "key", "value"):
            key = f"{name}attention.attention.{part}.weight"
            state[key] = torch.randn(width, width, generator=generator)
        state[f"{name}attention.output.dense.weight"] = torch.randn(width, width)
        state[f"{name}intermediate.dense.weight"] = torch.randn(4 * width, width)
        state[f"{name}output.dense.weight"] = torch.randn(width, 4 * width)
    return state


def pixels(figure):
    """What the figure looks like: [height, width, 3] in 0..1, and a function to cut out axes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = np.asarray(canvas.buffer_rgba())[..., :3] / 255

    def cut(axes):
        box = axes.get_window_extent()
        x, y, w, h = (round(value) for value in box.bounds)
        return image[image.shape[0] - y - h : image.shape[0] - y, x : x + w]

    return image, cut


def overlapping(figure):
    """Pairs of words of the figure that lie on each other."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    words = []
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            words += [axis.label, *(tick.label1 for tick in ticks)]
        words += [axes.title, axes._left_title, *axes.texts]
    words += [*figure.texts, *(t for legend in figure.legends for t in legend.get_texts())]
    if figure._supxlabel is not None:
        words.append(figure._supxlabel)
    words = list({id(t): t for t in words if t.get_text() and t.get_visible()}.values())
    boxes = [(t.get_text(), t.get_window_extent().padded(-0.5)) for t in words]
    return [
        (a, b) for i, (a, box) in enumerate(boxes) for b, other in boxes[:i] if box.overlaps(other)
    ]


# what every layer keeps


def drawn_kept(figure):
    """Label -> the shares that its line shows."""
    return {line.get_label(): list(line.get_ydata()) for line in labelled(figure)}


def labelled(figure):
    return [line for line in figure.axes[0].lines if not line.get_label().startswith("_")]


def test_kept_ratios_are_the_reports():
    report = dimap.prune(swin(), 0.45).report()
    figure = plots.kept_ratios(report)
    drawn = drawn_kept(figure)
    for kind in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        rows = sorted((r for r in report.layers if kind in r.name), key=lambda r: r.name)
        assert drawn[kind] == pytest.approx([100 * row.density for row in rows])
    (level,) = (label for label in drawn if label.startswith("all"))
    kept, weights = sum(r.kept for r in report.layers), sum(r.weights for r in report.layers)
    assert drawn[level][0] == pytest.approx(100 * kept / weights)
    assert level == "all: 55.0 %"


def test_kept_ratios_are_the_same_from_report_pruning_weights_masks_and_file(tmp_path):
    dense = swin()
    masks = dimap.select(dense, 0.45)
    pruned = {name: weight.clone() for name, weight in dense.items()}
    pruning = dimap.prune(pruned, 0.45)
    save_file(pruned, tmp_path / "p.safetensors")
    want = drawn_kept(plots.kept_ratios(pruning.report()))
    assert drawn_kept(plots.kept_ratios(pruning)) == want
    assert drawn_kept(plots.kept_ratios(pruned)) == want
    assert drawn_kept(plots.kept_ratios(dense, masks=masks)) == want
    with open_checkpoint(tmp_path / "p.safetensors") as checkpoint:
        assert drawn_kept(plots.kept_ratios(checkpoint)) == want


def test_modules_have_their_colours_and_kinds_differ_without_colour():
    lines = labelled(plots.kept_ratios(dimap.prune(swin(), 0.5)))[1:]
    looks = {line.get_label(): line for line in lines}
    assert looks["mlp.fc1"].get_color() == looks["mlp.fc2"].get_color()
    assert len({line.get_color() for line in lines}) == 3
    assert len({line.get_marker() for line in lines}) == 4


def test_own_patterns_without_blocks_are_numbered():
    state = {f"part{i}.weight": torch.randn(4, 4) for i in range(3)}
    figure = plots.kept_ratios(state, patterns={"all$": r"part\d\.weight"})
    assert list(figure.axes[0].lines[1].get_xdata()) == [0, 1, 2]
    assert figure.axes[0].get_xlabel() == "layer"


@pytest.mark.parametrize(
    "stages",
    [((24, 2, 2, 18, 2)), (0, 12), (0, 2, 2, 44, 2), (0, 1, 1, 48), (0, 120), (0, 1)],
    ids=lambda stages: "-".join(map(str, stages[1:])),
)
def test_no_labels_overlap_in_kept_ratios(stages):
    counts = [
        LayerReport(f"layers.{s}.blocks.{b}.{kind}", module, s if len(stages) > 2 else None, b, (), 10, b % 11, b % 11, None)
        for s, blocks in enumerate(stages[1:])
        for b in range(blocks)
        for module, kind in (("qkv", "attn.qkv"), ("proj", "attn.proj"), ("mlp", "mlp.fc1"), ("mlp", "mlp.fc2"))
    ]  # fmt: skip
    report = Report("module", "layer", {}, 1, 1, 1, (), tuple(counts))
    assert overlapping(plots.kept_ratios(report, title="Kept")) == []


def test_long_names_in_the_legend_stay_in_the_picture():
    figure = plots.kept_ratios(dimap.prune(vit_split(), 0.5))
    FigureCanvasAgg(figure).draw()
    box = figure.legends[0].get_window_extent()
    assert (box.x0 >= 0, box.x1 <= figure.bbox.x1) == (True, True)
    assert overlapping(figure) == []


def test_words_that_are_wider_than_a_small_mask_stay_in_the_picture():
    figure = plots.mask_picture(
        dimap.prune(vit_split(), 0.5), "encoder.layer.1.attention.attention.qkv"
    )
    FigureCanvasAgg(figure).draw()
    assert all(text.get_window_extent().x1 <= figure.bbox.x1 for text in figure.texts)
    assert overlapping(figure) == []


# histograms


def test_histograms_count_every_weight_once():
    dense = swin()
    masks = dimap.select(dense, 0.45)
    figure = plots.weight_histograms(dense, masks=masks, blocks=[(0, 1), (1, 0)])
    cells = iter(figure.axes)
    for block in ("layers.0.blocks.1", "layers.1.blocks.0"):
        for kind in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            name = f"{block}.{kind}.weight"
            drawn = {patch.get_label(): patch.get_data() for patch in next(cells).patches}
            kept = dense[name][masks[name]].numpy()
            counts, edges = drawn["kept"].values, drawn["kept"].edges
            assert counts.sum() == len(kept)
            # What is out of view is in the outermost bins.
            inside = np.clip(kept, edges[0], edges[-1])
            np.testing.assert_array_equal(counts, np.histogram(inside, edges)[0])
            assert drawn["pruned"].values.sum() == dense[name].numel()


def test_histograms_of_a_pruned_model_leave_zeros_out():
    state = swin(dtype=torch.bfloat16)
    dimap.prune(state, 0.5)
    figure = plots.weight_histograms(state, blocks=[(0, 0)])
    (patch,) = figure.axes[0].patches
    weight = state["layers.0.blocks.0.attn.qkv.weight"]
    assert patch.get_data().values.sum() == weight.count_nonzero()
    share = 100 * float(weight.count_nonzero()) / weight.numel()
    assert figure.axes[0].texts[0].get_text() == f"{share:.0f} % kept"


def test_a_far_weight_is_counted_out_of_view():
    state = swin(((8, 1),))
    state["layers.0.blocks.0.attn.qkv.weight"][0, 0] = 1e6
    (axes, *_) = plots.weight_histograms(state).axes
    assert axes.patches[0].get_data().values.sum() == 192


def test_a_layer_that_lost_everything_has_an_empty_histogram():
    state = swin(((8, 1),))
    dimap.prune(state, 1.0)
    (axes, *_) = plots.weight_histograms(state).axes
    assert axes.patches[0].get_data().values.sum() == 0


@pytest.mark.parametrize(
    ("model", "rows"), [(swin(((8, 2), (8, 2), (8, 6))), 3), (vit_split(9), 4)]
)
def test_default_blocks_are_few_and_their_labels_apart(model, rows):
    figure = plots.weight_histograms(dimap.prune(model, 0.5), title="Weights")
    assert len(figure.axes) == 4 * rows
    assert overlapping(figure) == []


def test_an_unknown_block_is_named():
    with pytest.raises(
        ValueError, match=r"a block must be one of 0\.0, 0\.1, 1\.0, 1\.1, got 2\.0"
    ):
        plots.weight_histograms(swin(), blocks=[(2, 0)])


# masks


def test_a_fused_qkv_is_drawn_in_three_parts_pixel_by_pixel():
    pruning = dimap.prune(swin(), 0.5)
    mask = pruning.masks["layers.1.blocks.0.attn.qkv.weight"]
    figure = plots.mask_picture(pruning, "layers.1.blocks.0.attn.qkv")
    _, cut = pixels(figure)
    for axes, name, part in zip(figure.axes, ("query", "key", "value"), mask.chunk(3), strict=True):
        share = 100 * part.float().mean().item()
        assert axes.get_title(loc="left") == f"{name} {share:.1f} % kept"
        picture = cut(axes)
        assert picture.shape[0] % 16 == picture.shape[1] % 16 == 0
        n = picture.shape[0] // 16
        want = np.where(part.numpy()[..., None], to_rgb(KEPT), to_rgb(PRUNED))
        want = want.repeat(n, 0).repeat(n, 1)
        np.testing.assert_allclose(picture, want, atol=1 / 255)


def test_split_qkv_is_drawn_as_the_fused_one():
    pruning = dimap.prune(vit_split(), 0.5)
    name = "encoder.layer.1.attention.attention.qkv"
    assert name in [layer.name for layer in pruning.modules["qkv"]]
    figure = plots.mask_picture(pruning, name)
    assert [axes.get_title(loc="left").split()[0] for axes in figure.axes] == [
        "query",
        "key",
        "value",
    ]
    for axes, part in zip(figure.axes, ("query", "key", "value"), strict=True):
        mask = pruning.masks[f"encoder.layer.1.attention.attention.{part}.weight"]
        assert axes.images[0].get_array().mean() == pytest.approx(mask.float().mean().item())


def test_a_large_mask_is_averaged_and_keeps_its_density():
    state = {"a.weight": (torch.arange(900 * 1100) % 3 == 0).float().view(900, 1100)}
    figure = plots.mask_picture(state, "a", patterns={"all": r"a\.weight"})
    image, cut = pixels(figure)
    (axes,) = figure.axes
    drawn = axes.images[0].get_array()
    assert drawn.mean() == pytest.approx(1 / 3, abs=1e-5)
    assert cut(axes).shape[:2] == drawn.shape  # one pixel each: the screen samples nothing
    assert max(image.shape) <= 960


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (7, 5), (10, 3)])
def test_average_keeps_the_mean(rows, columns):
    mask = torch.rand(10, 7, generator=torch.Generator().manual_seed(0)) < 0.4
    got = average(mask, rows, columns)
    assert got.shape == (rows, columns)
    assert got.mean().item() == pytest.approx(mask.float().mean().item(), abs=1e-6)
    if (rows, columns) == (10, 7):
        assert got.equal(mask.float())


def test_a_tall_matrix_lies_on_its_side():
    pruning = dimap.prune(swin(), 0.5)
    figure = plots.mask_picture(pruning, "layers.0.blocks.0.mlp.fc1.weight")
    (axes,) = figure.axes
    assert axes.get_xlabel() == "output feature"
    h, w = axes.images[0].get_array().shape
    assert w == 4 * h
    assert overlapping(figure) == []


def test_an_unknown_layer_is_named_with_those_near_it():
    with pytest.raises(ValueError, match=r"near it are layers\.0\.blocks\.0\.attn\.qkv"):
        plots.mask_picture(swin(), "layers.0.blocks.0.attn.qk")


# accuracy


ROWS = [
    {"method": "dimap", "sparsity": 0.8, "accuracy": 80.0, "seed": 0},
    {"method": "dimap", "sparsity": 0.5, "accuracy": 88.0, "spread": 0.5},
    {"method": "dimap", "sparsity": 0.8, "accuracy": 84.0, "seed": 1, "note": "left alone"},
    {"method": "LAMP", "sparsity": 0.5, "accuracy": 87.0},
    {"method": "dense", "sparsity": 0.0, "accuracy": 89.0},
]


def curves(axes):
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines
    }


def test_accuracy_is_the_mean_over_seeds_in_order_of_sparsity():
    (axes,) = plots.accuracy_curves(ROWS).axes
    drawn = curves(axes)
    assert drawn["dimap"] == ([50, 80], [88, 82])
    assert drawn["LAMP"] == ([50], [87])
    assert drawn["dense"][1] == [89, 89]
    (band,) = axes.collections
    low, high = band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices[:, 1].max()
    assert (low, high) == pytest.approx((82 - 8**0.5, 88.5))


def test_panels_share_their_scales_and_the_legend_names_each_method_once():
    rows = [row | {"panel": panel} for row in ROWS for panel in ("one shot", "fine-tuned")]
    figure = plots.accuracy_curves(rows)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["one shot", "fine-tuned"]
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(names) == ["LAMP", "dense", "dimap"]
    assert overlapping(figure) == []


def test_any_methods_are_told_apart_without_colour():
    names = [*METHODS, "mine", "another", "Third one"]
    rows = [{"method": name, "sparsity": 0.5, "accuracy": 50} for name in names]
    lines = plots.accuracy_curves(rows).axes[0].lines
    assert len({line.get_marker() for line in lines}) == len(names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accuracy": 101}, r"rows\[0\]\['accuracy'\] must be in \[0, 100\], got 101"),
        ({"accuracy": None}, r"rows\[0\]\['accuracy'\] must be a number, got None"),
        ({"accuracy": float("nan")}, r"must be in \[0, 100\], got nan"),
        ({"sparsity": 45}, r"rows\[0\]\['sparsity'\] must be in \[0, 1\], got 45"),
        ({"method": ""}, r"rows\[0\]\['method'\] must be the method's name, got ''"),
        ({"panel": 1}, r"rows\[0\]\['panel'\] must be a string, got 1"),
        ({"spread": True}, r"rows\[0\]\['spread'\] must be a number, got True"),
    ],
)
def test_wrong_rows_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        plots.accuracy_curves([ROWS[0] | change])


def test_no_rows_and_another_schema_are_refused():
    with pytest.raises(ValueError, match="at least one measurement, got none"):
        plots.accuracy_curves([])
    with pytest.raises(ValueError, match=r"must have schema 'dimap\.accuracy' and version 1"):
        plots.accuracy_curves({"schema": "other", "rows": ROWS})
    with pytest.raises(TypeError, match="rows must be a list of mappings, got str"):
        plots.accuracy_curves("rows")


# files


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_picture_is_written_the_same_each_time(tmp_path, ending):
    files = [tmp_path / f"{i}.{ending}" for i in range(2)]
    for file in files:
        plots.accuracy_curves(ROWS, file)
    assert files[0].read_bytes() == files[1].read_bytes()
    if ending == "png":
        assert Image.open(files[0]).width > 700
    else:
        assert ElementTree.parse(files[0]).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_another_ending_is_refused_before_work(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.png or \.svg, got .*a\.pdf"):
        plots.accuracy_curves([], tmp_path / "a.pdf")


def test_dollar_signs_stay_as_they_are():
    figure = plots.accuracy_curves([ROWS[0] | {"method": r"a$\frac$b"}])
    pixels(figure)  # would raise where it is read as mathematics


def test_pyplot_and_global_settings_are_left_alone(tmp_path):
    code = (
        "import sys, dimap.plots as plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        "import matplotlib as m\n"
        "def settings(): return {k: m.rcParams[k] for k in m.rcParams if k != 'backend'}\n"
        "before = settings()\n"
        f"plots.accuracy_curves([dict(method='a', sparsity=0.5, accuracy=1)], {str(tmp_path / 'a.svg')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert settings() == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_matplotlib_is_told_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'torch-dimap\[plot\]'"):
        plots.kept_ratios(swin())


# the command line


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run the command in a folder with in.safetensors: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    save_file(swin(), "in.safetensors")

    return runner(capsys)


def test_plot_draws_the_same_from_a_file_its_masks_and_its_report(run, tmp_path):
    arguments = ["in.safetensors", "p.safetensors", "-s", 0.45]
    assert run("prune", *arguments, "--masks", "m", "--report", "r.json")[0] == 0
    assert run("plot", "kept", "p.safetensors", "a.png")[0] == 0
    assert run("plot", "kept", "in.safetensors", "b.png", "--masks", "m")[0] == 0
    assert run("plot", "kept", "r.json", "c.png")[0] == 0
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b == c
    layer = ["--layer", "layers.1.blocks.0.attn.qkv"]
    assert run("plot", "mask", "p.safetensors", "d.png", *layer)[0] == 0
    assert run("plot", "mask", "in.safetensors", "e.png", *layer, "--masks", "m")[0] == 0
    assert (tmp_path / "d.png").read_bytes() == (tmp_path / "e.png").read_bytes()


def test_plot_help_names_the_extra(run):
    assert "Needs matplotlib: torch-dimap[plot]." in " ".join(run("plot", "--help")[1].split())


def test_plot_accuracy_reads_both_forms_of_results(run, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    whole = {"schema": "dimap.accuracy", "version": 1, "rows": ROWS}
    (tmp_path / "b.json").write_text(json.dumps(whole))
    for name in "ab":
        assert run("plot", "accuracy", f"{name}.json", f"{name}.svg")[0] == 0
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["kept", "in.safetensors", "a.pdf"], "must end in .png or .svg, got a.pdf", 1),
        (["kept", "in.safetensors", "in.safetensors"], "must end in .png or .svg", 1),
        (["kept", "none.safetensors", "a.png"], "none.safetensors: No such file", 1),
        (["kept", "old.png", "old.png"], "exists already and is replaced only by force", 1),
        (["accuracy", "in.safetensors", "a.png"], "in.safetensors must be a JSON file", 1),
        (["mask", "in.safetensors", "a.png"], "give --layer NAME", 2),
        (["kept", "in.safetensors", "a.png", "--layer", "x"], "--layer is for mask only", 2),
        (
            ["weights", "in.safetensors", "a.png", "--block", "x"],
            "--block must be like 2.5 or 5",
            2,
        ),
        (["weights", "in.safetensors", "a.png", "--block", "7"], "a block must be one of 0.0", 1),
        (["mask", "in.safetensors", "a.png", "--layer", "x"], "got 'x'", 1),
    ],
)
def test_plot_tells_what_is_wrong_and_writes_nothing(
    run, tmp_path, monkeypatch, arguments, message, code
):
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "old.png").write_text("old")
    got, _, err = run("plot", *arguments)
    assert got == code
    assert message in " ".join(err.split())
    assert not (tmp_path / "a.png").exists()
    assert (tmp_path / "old.png").read_text() == "old"


def test_masks_of_another_model_are_refused(run):
    dimap.save_masks({"other.weight": torch.ones(2, 2, dtype=torch.bool)}, "m")
    got, _, err = run("plot", "kept", "in.safetensors", "a.png", "--masks", "m")
    assert (
        got,
        "must be of this model's prunable weights: model must have every masked" in err,
    ) == (
        1,
        True,
    )


def test_layers_option_prints_every_layer(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    _, out, _ = run("prune", "in.safetensors", "p.safetensors", "-s", 0.5, "--layers")
    assert out.count("mlp.fc2") == 4
    assert "mlp.fc2" not in run("prune", "in.safetensors", "q.safetensors", "-s", 0.5)[1]
    _, out, _ = run("inspect", "p.safetensors", "--layers")
    state = swin()
    dimap.prune(state, 0.5)
    for name in ("layers.0.blocks.1.attn.qkv", "layers.1.blocks.0.mlp.fc1"):
        (line,) = (line for line in out.splitlines() if name in line)
        assert line.split()[3] == f"{int(state[f'{name}.weight'].count_nonzero()):,}"


# the report's folder


class Page(HTMLParser):
    """What a page holds: tables as rows of cells, tags that do not match, addresses, ids."""

    VOID = ("meta", "img", "br", "hr", "path!")

    def __init__(self, text):
        super().__init__()
        self.tables, self.addresses, self.ids, self.open = {}, [], [], []
        self.headings, self.tags = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.addresses += [values[key] for key in ("src", "href", "xlink:href") if key in values]
        self.ids += [values["id"]] if "id" in values else []
        if tag == "table":
            self.rows = self.tables[values["id"]] = []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


FILES = [
    "index.html",
    "kept.png",
    "mask-1.png",
    "mask-2.png",
    "mask-3.png",
    "report.json",
    "weights.png",
]


def test_report_folder_holds_page_json_and_pictures(run, tmp_path):
    assert run("prune", "in.safetensors", "p.safetensors", "-s", 0.45, "--report", "r")[0] == 0
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == FILES
    report = Report.from_json(tmp_path / "r" / "report.json")
    page = Page((tmp_path / "r" / "index.html").read_text())
    modules = page.tables["modules"]
    assert [row[0] for row in modules] == ["module", *(m.name for m in report.modules), "all"]
    assert [row[3] for row in modules[1:-1]] == [
        f"{m.kept:,}" if m.layers else "" for m in report.modules
    ]
    *rows, aux, whole = page.tables["layers"][1:]
    assert [aux[0], whole[0]] == ["aux", "all"]
    layers = {row[0]: row for row in rows}
    assert len(layers) == len(report.layers) == 16
    for layer in report.layers:
        assert layers[layer.name][2:5] == [f"{layer.weights:,}", f"{layer.kept:,}", f"{100 * layer.density:.1f} %"]  # fmt: skip
    assert page.headings == ["Modules", "What every layer keeps", "Weights", "Masks", "Layers"]
    assert len(page.ids) == len(set(page.ids))


def test_report_page_loads_nothing(run, tmp_path):
    run("prune", "in.safetensors", "p.safetensors", "-s", 0.45, "--report", "r")
    text = (tmp_path / "r" / "index.html").read_text()
    page = Page(text)
    assert all(re.match("#|data:image/png;base64,", address) for address in page.addresses)
    assert {address[1:] for address in page.addresses if address[0] == "#"} <= set(page.ids)
    assert not re.search(r"@import|<script|<link", text)
    assert re.findall(r"url\((?!#)", text) == []
    images = [a for a in page.addresses if a.startswith("data:")]
    assert len(images) == 3 * 3  # query, key and value of three layers
    for image in images:
        Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2]))).verify()


def number(text):
    """Of a cell: "28,288,354", "15.4G"; nothing is 0."""
    digits, unit = re.fullmatch(r"([\d.,]*)([kMGT]?)", text).groups()
    return float(digits.replace(",", "") or 0) * 1000 ** " kMGT".index(unit or " ")


def test_rows_of_both_tables_add_up_to_the_whole(tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", depth=3, img_size=64)
    report = plots.write_report(dimap.prune(model, 0.5), tmp_path / "r", model)
    assert report.flops_other > 0
    page = Page((tmp_path / "r" / "index.html").read_text())
    columns = {"weights": 0, "kept": 0, "FLOPs": 0.01}  # and how far three digits may be off
    for rows in page.tables.values():
        assert [row[0] for row in rows[-3:]] == ["aux", "other", "all"]
        for column, off in columns.items():
            place = rows[0].index(column)
            *parts, whole = (number(row[place]) for row in rows[1:])
            assert sum(parts) == pytest.approx(whole, rel=off)
            assert whole == pytest.approx(getattr(report, column.lower()), rel=off)


def test_page_follows_the_readers_light_or_dark_colours(run, tmp_path):
    run("prune", "in.safetensors", "p.safetensors", "-s", 0.45, "--report", "r")
    text = (tmp_path / "r" / "index.html").read_text()
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w+)", block))
        for block in re.findall(r":root \{([^}]*)\}", text)
    )
    assert light.keys() == dark.keys()
    svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(svgs) == 5
    assert all(re.match('<svg role="img" aria-label="[^"]{9,}"', svg) for svg in svgs)
    for svg in svgs:  # words and pruned weights; markers that are not filled
        assert {"#262626", "#d9d9d9", "#ffffff"}.isdisjoint(re.findall("#[0-9a-f]{6}", svg))
        assert set(re.findall(r"var\(--(\w+)\)", svg)) <= dark.keys()
    assert "var(--back)" in svgs[0]
    assert all("var(--faint)" in svg for svg in svgs[1:])

    def contrast(color, back):
        a, b = sorted(
            np.dot([0.2126, 0.7152, 0.0722], np.power(to_rgb(c), 2.2)) for c in (color, back)
        )
        return (b + 0.05) / (a + 0.05)

    for theme in (light, dark):
        shown = {"blue": theme["blue"], "orange": "#E69F00", "green": "#009E73", "mask": KEPT}
        for color in shown.values():  # kept weights stand out, more than pruned ones
            assert contrast(color, theme["back"]) > contrast(theme["faint"], theme["back"]) + 0.5


def test_pictures_are_the_same_from_a_stream_and_from_memory(run, tmp_path):
    state = swin(dtype=torch.bfloat16)
    save_file(state, "in.safetensors")
    torch.save(state, "in.pth")
    run("prune", "in.safetensors", "a.safetensors", "-s", 0.45, "--report", "a")
    run("prune", "in.pth", "b.pth", "-s", 0.45, "--report", "b")
    for name in (name for name in FILES if name.endswith(".png")):
        a, b = ((tmp_path / folder / name).read_bytes() for folder in "ab")
        assert a == b, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scope", ["module", "global", "layer"])
def test_kept_mask_is_the_mask_with_ties(dtype, scope):
    state = {name: (4 * w).round().to(dtype) for name, w in swin().items()}  # many ties
    for sparsity in (0.0, 0.3, 0.6, 1.0):
        for name, mask in dimap.select(state, sparsity, scope=scope).items():
            assert kept_mask(state[name], int(mask.sum())).equal(mask), (name, sparsity)


def test_report_into_a_folder_that_is_there_keeps_its_other_files(run, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "notes.txt").write_text("mine")
    arguments = ["prune", "in.safetensors", "r/p.safetensors", "-s", 0.5, "--report", "r"]
    assert run(*arguments)[0] == 0
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == sorted([*FILES, "notes.txt", "p.safetensors", "p.safetensors.recipe.toml"])  # fmt: skip
    before = (tmp_path / "r" / "index.html").read_bytes()
    got, _, err = run("prune", "in.safetensors", "q.safetensors", "-s", 0.7, "--report", "r")
    assert (got, "exists already and is replaced only by force" in err) == (1, True)
    assert not (tmp_path / "q.safetensors").exists()
    assert (tmp_path / "r" / "index.html").read_bytes() == before
    assert run(*arguments[:-3], 0.7, "--report", "r", "--force")[0] == 0
    assert (tmp_path / "r" / "index.html").read_bytes() != before


def test_report_folder_without_matplotlib_fails_before_work(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    got, _, err = run("prune", "in.safetensors", "p.safetensors", "-s", 0.5, "--report", "r")
    assert (got, "pip install 'torch-dimap[plot]'" in err) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]
    assert run("prune", "in.safetensors", "p.safetensors", "-s", 0.5, "--report", "r.json")[0] == 0


def test_names_are_escaped_in_the_page(tmp_path):
    name = "<b>&\"'$x$"
    state = {f"{name}{i}.weight": torch.randn(4, 6) for i in range(2)}
    pruning = dimap.prune(state, 0.5, patterns={"<i>all</i>": r".*\.weight"})
    report = plots.write_report(pruning, tmp_path / "r")
    text = (tmp_path / "r" / "index.html").read_text()
    assert "<b>" not in text
    assert "<i>" not in text
    page = Page(text)
    names = [row[0] for row in page.tables["layers"][1:]]
    assert names == [*(layer.name for layer in report.layers), "aux", "all"]
    assert page.tables["modules"][1][0] == "<i>all</i>"
