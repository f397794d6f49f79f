"""The callback for the Trainer of Hugging Face."""

from __future__ import annotations

import copy
import shutil

import dimap
import pytest
import torch
from ranks import Group
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from dimap.integrations.transformers import MASKS, PruningCallback  # noqa: E402

TOKENS = torch.randint(40, (24, 12), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": row, "labels": row} for row in TOKENS]
SCHEDULE = dimap.CubicSchedule(0.7, begin=1, end=5, every=2, initial=0.2)


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, vocab_size=40,
        )
    )  # fmt: skip


def trainer(folder, *callbacks, model=None, ready=lambda arguments: None, **options):
    options = {"max_steps": 6, "per_device_train_batch_size": 2, "weight_decay": 0.1} | options
    arguments = transformers.TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True,
        learning_rate=0.01, lr_scheduler_type="constant", logging_steps=1, seed=7, **options,
    )  # fmt: skip
    model = model or llama()
    ready(arguments)
    return transformers.Trainer(
        model, arguments, train_dataset=DATA, eval_dataset=DATA[:4], callbacks=list(callbacks)
    )


def assert_held(weights, masks, sparsity=None):
    for name, mask in masks.items():
        assert not weights[name].detach().float().view(torch.int32)[~mask].any(), name
        assert weights[name][mask].all(), name
    if sparsity is not None:
        dropped = sum(int((~m).sum()) for m in masks.values())
        assert dropped == pytest.approx(sparsity * sum(m.numel() for m in masks.values()), abs=2)


def assert_equal(first, second):
    for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize(
    "options",
    [{}, {"bf16": True}, {"gradient_accumulation_steps": 3}, {"optim": "adafactor"}],
    ids=["plain", "bfloat16", "accumulation", "adafactor"],
)
def test_zero_from_the_first_step_to_the_last(tmp_path, options):
    callback = PruningCallback(0.6, scope="global")
    run = trainer(tmp_path, callback, save_steps=2, **options)
    run.train()
    want = dimap.select(llama(), 0.6, scope="global")
    assert all(torch.equal(callback.masks[name], mask) for name, mask in want.items())
    assert_held(dict(run.model.named_parameters()), want, 0.6)
    for step in (2, 4, 6):
        folder = tmp_path / f"checkpoint-{step}"
        saved = transformers.LlamaForCausalLM.from_pretrained(folder)
        assert_held(dict(saved.named_parameters()), dimap.load_masks(folder / MASKS), 0.6)
    optimizer = run.optimizer.optimizer
    assert not optimizer._optimizer_step_post_hooks  # it let go
    assert not any(p._post_accumulate_grad_hooks for p in run.model.parameters())


def test_gradients_are_clipped_by_the_norm_of_those_that_are_used(tmp_path):
    """The Trainer takes the norm before it calls anybody: as in a loop of one's own."""
    masks = dimap.select(llama(), 0.8)
    run = trainer(
        tmp_path, PruningCallback(masks=masks), max_grad_norm=0.05, max_steps=3,
        per_device_train_batch_size=len(DATA), weight_decay=0.0,
    )  # fmt: skip
    run.train()
    norms = [row["grad_norm"] for row in run.state.log_history if "grad_norm" in row]

    model = llama().train()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.0)
    found, dense = [], []
    with dimap.hold_masks(model, masks, optimizer) as holding:
        for _ in range(3):
            model(input_ids=TOKENS, labels=TOKENS).loss.backward()
            dense.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters()])))
            holding.zero_gradients()
            found.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.05)))
            optimizer.step()
            optimizer.zero_grad()
    assert norms == pytest.approx(found, rel=1e-3)
    assert norms != pytest.approx(dense, rel=1e-2)
    for (name, p), q in zip(model.named_parameters(), run.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0.01, atol=1e-3, msg=name)


@pytest.mark.parametrize("what", [0.6, SCHEDULE], ids=["once", "schedule"])
@pytest.mark.parametrize("stop", [1, 4])
def test_resumed_training_ends_with_the_same_bits(tmp_path, what, stop):
    options = {"patterns": {"mlp": r"model\.layers\.(?P<block>\d+)\.mlp\..*weight"}}
    whole = PruningCallback(what, **options)
    run = trainer(tmp_path / "whole", whole, save_steps=1, gradient_accumulation_steps=2)
    run.train()
    folder = tmp_path / "again"
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{stop}", folder / f"checkpoint-{stop}")
    callback = PruningCallback(what, **options)
    again = trainer(folder, callback, save_steps=1, gradient_accumulation_steps=2)
    again.train(resume_from_checkpoint=True)
    assert_equal(run.model, again.model)
    assert all(torch.equal(callback.masks[name], mask) for name, mask in whole.masks.items())
    assert_held(dict(again.model.named_parameters()), callback.masks, 0.6 if what == 0.6 else 0.7)


def test_a_kept_weight_that_became_zero_stays_free(tmp_path):
    """A resumed training has the masks, and does not guess them from zeros."""
    callback = PruningCallback(0.6)
    trainer(tmp_path, callback, save_steps=1, max_steps=1).train()
    folder = tmp_path / "checkpoint-1"
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    name, mask = next(iter(callback.masks.items()))
    state[name][mask] = 0.0
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    again = PruningCallback(0.6)
    run = trainer(tmp_path, again, max_steps=3)
    run.train(resume_from_checkpoint=True)
    assert torch.equal(again.masks[name], mask)
    assert dict(run.model.named_parameters())[name][mask].any()


def test_the_schedule_is_followed(tmp_path):
    seen = {}

    class Look(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            masks = callback.masks
            assert_held(dict(model.named_parameters()), masks)
            total = sum(m.numel() for m in masks.values())
            seen[state.global_step] = sum(int((~m).sum()) for m in masks.values()) / max(1, total)

    callback = PruningCallback(SCHEDULE)
    trainer(tmp_path, callback, Look()).train()
    want = {step: SCHEDULE.sparsity(step) for step in (1, 3, 5)} | {6: 0.7}
    for step, sparsity in want.items():
        assert seen[step] == pytest.approx(sparsity, abs=1e-3)
    assert seen[2] == seen[1]


def test_masks_of_a_file_and_the_best_model(tmp_path):
    masks = dimap.select(llama(), 0.5)
    dimap.save_masks(masks, tmp_path / "masks.safetensors")
    callback = PruningCallback(masks=tmp_path / "masks.safetensors")
    run = trainer(
        tmp_path, callback, eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True,
    )  # fmt: skip
    run.train()
    assert_held(dict(run.model.named_parameters()), masks, 0.5)


def test_a_checkpoint_from_elsewhere_needs_its_masks(tmp_path):
    first = PruningCallback(SCHEDULE)
    run = trainer(tmp_path / "there", first, save_steps=3)
    run.train()
    elsewhere = tmp_path / "there" / "checkpoint-3"
    with pytest.raises(FileNotFoundError, match=r"must be there to go on with pruning"):
        trainer(tmp_path / "here", PruningCallback(SCHEDULE)).train(str(elsewhere))
    again = trainer(tmp_path / "here", PruningCallback(SCHEDULE, masks=elsewhere / MASKS))
    again.train(str(elsewhere))
    assert_equal(run.model, again.model)


def test_training_twice_with_one_callback(tmp_path):
    callback = PruningCallback(0.5)
    run = trainer(tmp_path, callback, max_steps=2)
    run.train()
    masks = copy.deepcopy(dict(callback.masks))
    run.train()
    assert_held(dict(run.model.named_parameters()), masks, 0.5)


def test_lora_with_the_masks_of_the_base_model(tmp_path):
    peft = pytest.importorskip("peft")
    masks = dimap.prune(model := llama(), 0.5).masks
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    run = trainer(tmp_path, PruningCallback(masks=masks), model=adapted, save_steps=3)
    run.train()
    merged = run.model.merge_and_unload()
    weights = dict(merged.named_parameters())
    assert any(bool(weights[n][~m].any()) for n, m in masks.items())  # LoRA is dense
    dimap.apply_masks(merged, dimap.load_masks(tmp_path / "checkpoint-6" / MASKS))
    assert_held(weights, masks, 0.5)
    assert any(not torch.equal(weights[n], before[n]) for n in masks)


def test_something_must_be_given():
    with pytest.raises(ValueError, match="give a sparsity, masks or both"):
        PruningCallback()


def on_two_ranks(folder):
    callback = PruningCallback(0.6)
    run = trainer(folder, callback, ddp_backend="gloo", save_steps=3, gradient_accumulation_steps=2)
    run.train()
    want = dimap.select(llama(), 0.6)
    assert run.args.world_size == 2
    assert all(torch.equal(callback.masks[name], mask) for name, mask in want.items())
    assert_held(dict(run.model.named_parameters()), want, 0.6)
    assert all(
        torch.equal(dimap.load_masks(folder / "checkpoint-3" / MASKS)[n], want[n]) for n in want
    )
    return {name: p.detach().numpy() for name, p in run.model.named_parameters()}


def test_data_parallel_training(tmp_path):
    group = Group(2)
    first, second = group(on_two_ranks, tmp_path)
    group.close()
    assert all((first[name] == second[name]).all() for name in first)


def on_two_sharded_ranks(folder, resumed):
    """FSDP2. accelerate shards on accelerators alone: these two CPUs say that they are some."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    def ready(arguments):
        assert PartialState().num_processes == arguments.world_size == 2
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU

    options = {
        "fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"},
        "ddp_backend": "gloo", "save_steps": 3, "ready": ready,
    }  # fmt: skip
    callback = PruningCallback(SCHEDULE)
    run = trainer(folder, callback, **options)
    run.train(resume_from_checkpoint=resumed)
    parameters = dict(run.model.named_parameters())
    assert {type(p).__name__ for p in parameters.values()} == {"DTensor"}
    masks = {name: mask.full_tensor() for name, mask in callback.masks.items()}
    whole = {name: p.full_tensor().detach() for name, p in parameters.items()}
    assert_held(whole, masks, 0.7)
    saved = dimap.load_masks(folder / "checkpoint-6" / MASKS)
    assert all(torch.equal(saved[name], mask) for name, mask in masks.items())
    return {name: (p.numpy(), masks.get(name)) for name, p in whole.items()}


def test_sharded_training_and_its_resumption(tmp_path):
    group = Group(2)
    shutil.rmtree(tmp_path)
    whole = group(on_two_sharded_ranks, tmp_path, False)
    shutil.rmtree(tmp_path / "checkpoint-6")
    again = group(on_two_sharded_ranks, tmp_path, True)
    group.close()
    for other in (whole[1], *again):
        for name, (weight, mask) in whole[0].items():
            assert (weight == other[name][0]).all(), name
            assert mask is None or torch.equal(mask, other[name][1]), name
