"""A smaller model as a folder: it loads again bit-equal, by any program where it can, and never with random weights."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from workbench import Site, Steer, Subject
from workbench.pruned import Plan, Weights
from workbench.pruned.exported import PLAN_FILE, export, load_pruned, plan_now
from workbench.toggles.prune import Prune

IDS = torch.tensor([[5, 9, 2, 7, 11, 30, 4, 8]])


def logits(subject: Subject) -> torch.Tensor:
    with torch.no_grad():
        return subject.model(input_ids=IDS).logits


def uneven(subject: Subject) -> Plan:
    heads = {} if subject.units[0].no_heads else {"kv_heads": [0]}
    return Plan.of(subject, {0: heads | {"neurons": range(3, 10)}, 2: {"neurons": range(33)}}, drop=[1])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gpt2", "phi3", "opt", "olmo2"])
def test_uneven_layers_load_again_bit_equal_and_stock_programs_refuse_them(family: str, tmp_path) -> None:
    subject = Subject.tiny(family)
    plan, folder = uneven(subject), tmp_path / "small"
    with subject.under(Prune(plan)):
        wanted, written = logits(subject), subject.generate([IDS[0].tolist()], max_new_tokens=4).ids
        assert plan_now(subject) == plan
        made = export(subject, folder)
    assert not made.stock and made.reason in str(made) and "neurons" in str(made)
    again = Subject.load(folder)
    assert torch.equal(logits(again), wanted) and again.n_layers == 2
    assert again.generate([IDS[0].tolist()], max_new_tokens=4).ids == written
    assert again.card.checks and all(check.passed for check in again.card.checks)
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(folder)
    (folder / PLAN_FILE).unlink()  # another program's folder: the sizes tell enough
    assert torch.equal(logits(load_pruned(folder)), wanted)
    with pytest.raises(ValueError, match=r"weights of other sizes than its config tells.*load_pruned"):
        Subject.load(folder)


def test_units_of_a_loaded_model_keep_the_numbers_that_they_had(tmp_path) -> None:
    subject = Subject.tiny("llama")
    plan = Plan.of(subject, {0: {"neurons": range(3, 10)}, 2: {"neurons": range(33)}})
    sites = [Site(0, "neurons"), Site(2, "neurons"), Site(0, "heads")]
    with subject.under(Prune(plan)):
        wanted = subject.capture([IDS[0].tolist()], sites)
        export(subject, tmp_path / "small")
    again = Subject.load(tmp_path / "small")
    found = again.capture([IDS[0].tolist()], sites)
    for site in sites:
        assert torch.equal(found[site], wanted[site])
    further = Plan.of(again, {0: {"neurons": [4, 5, 20]}})  # 20 is gone already
    with subject.under(Prune(plan & further)):
        smaller = logits(subject)
    with again.under(Prune(further)):
        assert torch.equal(logits(again), smaller) and plan_now(again).at(0).neurons == (4, 5)
        export(again, tmp_path / "smaller")
    assert torch.equal(logits(Subject.load(tmp_path / "smaller")), smaller)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "mistral"])
def test_even_layers_load_with_plain_transformers(family: str, tmp_path) -> None:
    subject = Subject.tiny(family)
    each = {"kv_heads": [1], "neurons": range(0, 48, 2)}
    with subject.under(Prune(Plan.of(subject, dict.fromkeys(range(3), each), drop=[0]))):
        wanted = logits(subject)
        made = export(subject, tmp_path / "small")
    assert made.stock and not (tmp_path / "small" / PLAN_FILE).exists()
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
        assert torch.equal(stock(input_ids=IDS).logits, wanted)
    again = Subject.load(tmp_path / "small")
    assert torch.equal(logits(again), wanted) and again.anatomy.d_mlp == 24 and again.anatomy.n_heads == 2
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["num_hidden_layers"] == 2 and config["head_dim"] == 8


def test_attention_and_mlps_that_are_off_stay_off_and_take_no_bytes(tmp_path) -> None:
    for family in ("llama", "gpt2"):
        subject = Subject.tiny(family)
        with subject.under(Prune(Plan.of(subject, {0: {"heads": ()}, 1: {"neurons": ()}}))):
            wanted = logits(subject)
            made = export(subject, tmp_path / family)
        again = Subject.load(tmp_path / family)
        assert torch.equal(logits(again), wanted)
        assert sum(p.nbytes for p in again.model.parameters()) == made.weight_bytes
        with pytest.raises(RuntimeError, match="mismatch"):  # and not "newly initialised"
            AutoModelForCausalLM.from_pretrained(tmp_path / family)


def test_the_flag_that_fills_in_random_weights_is_refused(tmp_path) -> None:
    subject = Subject.tiny("llama")
    with subject.under(Prune(uneven(subject))):
        wanted = logits(subject)
        export(subject, tmp_path / "small")
    trap = LlamaForCausalLM.from_pretrained(tmp_path / "small", ignore_mismatched_sizes=True).eval()
    with torch.no_grad():  # what we refuse, and why
        assert (trap(input_ids=IDS).logits - wanted).abs().max() > 0.1
    for folder in (tmp_path / "small", tmp_path / "none"):
        with pytest.raises(ValueError, match=r"random numbers|pruned model of ours; ignore_mismatched_sizes"):
            Subject.load(folder, ignore_mismatched_sizes=True)


def test_what_is_not_in_weights_is_not_exported(tmp_path) -> None:
    subject = Subject.tiny("llama")
    push = Steer(torch.ones(32), Site(1, "resid_out"), 1.0)
    with subject.under(Prune(uneven(subject)) | push):
        logits(subject)
        with pytest.raises(ValueError, match=r"Steer.* does not lie in the model's weights"):
            export(subject, tmp_path / "small")
    assert not list(tmp_path.iterdir())


def test_a_full_folder_is_not_overwritten_unasked_and_a_failure_leaves_it_alone(tmp_path, monkeypatch) -> None:
    subject = Subject.tiny("llama")
    export(subject, tmp_path / "small")
    before = {path.name: path.read_bytes() for path in (tmp_path / "small").iterdir()}
    with pytest.raises(FileExistsError, match="not empty"):
        export(subject, tmp_path / "small")
    from workbench.pruned import exported as module

    monkeypatch.setattr(module, "_write", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        export(subject, tmp_path / "small", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "small").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_folder_that_lacks_weights_is_refused(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    subject = Subject.tiny("llama")
    with subject.under(Prune(uneven(subject))):
        logits(subject)
        export(subject, tmp_path / "small")
    file = tmp_path / "small" / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up" not in name}, file)
    with pytest.raises(ValueError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        Subject.load(tmp_path / "small")
    save_file(tensors | {"model.layers.0.mlp.up_proj.weight": torch.zeros(3, 32)}, file)
    with pytest.raises(ValueError, match=r"up_proj\.weight of \(3, 32\), expected \(7, 32\)"):
        Subject.load(tmp_path / "small")


def test_the_organism_prunes_exports_and_loads_with_its_tied_embedding(tmp_path) -> None:
    subject = Subject.organism()
    plan = Plan.of(subject, {0: {"neurons": range(200), "kv_heads": [1]}, 3: {"neurons": range(100, 384)}}, drop=[5])
    with subject.under(Prune(plan)):
        wanted = logits(subject)
        export(subject, tmp_path / "small")
    again = Subject.load(tmp_path / "small", dtype="float32")
    assert torch.equal(logits(again), wanted)


def test_weights_are_a_value_by_name_and_bits(tmp_path) -> None:
    from workbench.values import decode, encode

    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(3)}
    held = Weights(tensors)
    saved = held.save(tmp_path / "w.safetensors")
    assert held == saved == Weights.load(tmp_path / "w.safetensors") and hash(held) == hash(saved)
    assert held != Weights({"a": tensors["a"]}) and held.nbytes == 36 and set(saved) == {"a", "b", "c"}
    for one in (held, saved):
        again = decode(json.loads(json.dumps(encode(one))), {"Weights": Weights})
        assert again == held and torch.equal(again["a"], tensors["a"])
    tensors["a"][0, 0] = 9.0
    assert held["a"][0, 0] == 0.0
    Weights(tensors).save(tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="holds other tensors"):
        Weights(path=str(tmp_path / "w.safetensors"), digest=held.digest).tensors  # noqa: B018
    with pytest.raises(ValueError, match="can't be read"):
        Weights.load(tmp_path / "absent")
    with pytest.raises(ValueError, match="expected tensors or the path"):
        Weights()
    with pytest.raises(ValueError, match="a is 1, expected a tensor"):
        Weights({"a": 1})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="got 'plan', expected a Plan"):
        Prune("plan")  # type: ignore[arg-type]


def test_what_is_off_goes_on_adding_its_bias_once_it_is_loaded(tmp_path) -> None:
    subject = Subject.tiny("gpt2")
    with torch.no_grad():  # random models begin with biases of zero, trained ones don't
        for name, parameter in subject.model.named_parameters():
            if name.endswith("c_proj.bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    with subject.under(Prune(Plan.of(subject, {0: {"heads": ()}, 1: {"neurons": ()}}))):
        wanted = logits(subject)
        export(subject, tmp_path / "small")
    assert torch.equal(logits(Subject.load(tmp_path / "small")), wanted)


def test_a_file_in_the_place_of_a_folder_is_not_overwritten(tmp_path) -> None:
    (tmp_path / "small").write_text("notes")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="is a file, expected a folder"):
            export(Subject.tiny("llama"), tmp_path / "small", overwrite=overwrite)
    assert (tmp_path / "small").read_text() == "notes"
