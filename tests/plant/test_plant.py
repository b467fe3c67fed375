"""Loading, shells over shared weights, and encoding; every way to fail says what to do."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from steering.errors import PlantError
from steering.plant.plant import Plant
from steering.types import Site
from tests.plants import FAMILIES, VOCAB, WIDTH, prompts, tiny, tiny_tokenizer
from tests.tolerances import PLANT

IDS = torch.tensor([prompts(1)[0]])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama on disk, with its tokenizer."""
    path = tmp_path_factory.mktemp("checkpoint")
    tiny("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to break."""
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_loads_what_was_saved(checkpoint: Path) -> None:
    plant = Plant.load(checkpoint)
    assert torch.equal(plant.model(IDS).logits, tiny("llama")(IDS).logits)
    assert (plant.depth, plant.width, plant.vocab, plant.context) == (3, WIDTH, VOCAB, 128)
    assert (plant.device.type, plant.dtype, plant.name) == ("cpu", torch.float32, str(checkpoint))
    assert not plant.model.training
    assert plant.encode("the cat") == [1, 8, 10]
    assert plant.width_of(Site("mlp_act", 0)) == 48


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_format_changes_the_weights_but_not_the_fingerprint(checkpoint: Path, dtype: str) -> None:
    plant = Plant.load(checkpoint, dtype=dtype)  # type: ignore[arg-type]
    assert plant.dtype == getattr(torch, dtype)
    assert plant.fingerprint == Plant(tiny("llama")).fingerprint
    other = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
    assert torch.equal(plant.model(IDS).logits, other(IDS).logits)


def test_attention_is_chosen_at_loading(checkpoint: Path) -> None:
    assert Plant.load(checkpoint).model.config._attn_implementation == "sdpa"
    assert Plant.load(checkpoint, attn="eager").model.config._attn_implementation == "eager"


def test_no_such_folder(tmp_path: Path) -> None:
    for name in (tmp_path / "absent", "./absent", "models/of/mine"):
        with pytest.raises(PlantError, match="does not exist"):
            Plant.load(name)


def test_an_unreachable_hub_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to the hub.\nCheck your connection\nor read this page of advice.")

    monkeypatch.setattr("steering.plant.plant.AutoConfig.from_pretrained", offline)
    with pytest.raises(
        PlantError, match=r"'some/model' cannot be loaded \(We couldn't connect to the hub\): expected"
    ) as e:
        Plant.load("some/model")
    assert "\n" not in str(e.value)


def test_damaged_checkpoints(damaged: Path) -> None:
    weights = damaged / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.norm.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(PlantError, match=r"incomplete: 1 weights are missing, the first is model\.norm\.weight"):
        Plant.load(damaged)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(PlantError, match="cannot be loaded"):
        Plant.load(damaged)
    weights.unlink()
    with pytest.raises(PlantError, match="cannot be loaded"):
        Plant.load(damaged)
    (damaged / "config.json").write_text("{")
    with pytest.raises(PlantError, match="not a valid JSON"):
        Plant.load(damaged)


def test_an_architecture_without_a_row(damaged: Path) -> None:
    (damaged / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(PlantError, match=r"'bert' .* not supported: expected one of gemma2"):
        Plant.load(damaged)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_missing_tokenizer(family: str, tmp_path: Path) -> None:
    tiny(family, layers=1).save_pretrained(tmp_path)
    with pytest.raises(PlantError, match=r"no usable tokenizer .* put its tokenizer files beside the weights"):
        Plant.load(tmp_path)


def test_settings_that_do_not_exist(checkpoint: Path) -> None:
    with pytest.raises(PlantError, match="dtype: expected one of auto, float32, bfloat16, float16, got 'int3'"):
        Plant.load(checkpoint, dtype="int3")  # type: ignore[arg-type]
    with pytest.raises(PlantError, match="device 'nowhere' cannot be used"):
        Plant.load(checkpoint, device="nowhere")
    with pytest.raises(PlantError, match="attention 'telepathy' is not available"):
        Plant.load(checkpoint, attn="telepathy")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shell_shares_every_tensor_and_computes_the_same(family: str) -> None:
    plant = Plant(tiny(family))
    shell = plant.shell("eager")
    for kind in ("named_parameters", "named_buffers"):
        mine, its = (dict(getattr(model, kind)(remove_duplicate=False)) for model in (plant.model, shell))
        assert {name: t.data_ptr() for name, t in mine.items()} == {name: t.data_ptr() for name, t in its.items()}
    assert shell.config._attn_implementation == "eager"
    assert shell.base_model.config is shell.config is not plant.model.config
    assert {id(m) for m in shell.modules()}.isdisjoint(id(m) for m in plant.model.modules())
    torch.testing.assert_close(shell(IDS).logits, plant.model(IDS).logits, **PLANT["float32"])
    assert torch.equal(plant.shell()(IDS).logits, plant.model(IDS).logits)


def test_a_shell_keeps_tied_heads_tied_and_follows_the_weights() -> None:
    plant = Plant(tiny("llama"))
    shell = plant.shell()
    assert shell.get_output_embeddings().weight is shell.get_input_embeddings().weight
    plant.model.get_input_embeddings().weight.mul_(2)
    assert torch.equal(shell(IDS).logits, plant.model(IDS).logits)


def test_shells_do_not_see_each_others_hooks() -> None:
    plant = Plant(tiny("llama"))
    expected = plant.model(IDS).logits
    first, second = plant.shell(), plant.shell()
    plant.tap(first, Site("resid_post", 0), torch.zeros_like)
    assert not torch.equal(first(IDS).logits, expected)
    assert torch.equal(second(IDS).logits, expected)
    assert torch.equal(plant.model(IDS).logits, expected)
    plant.tap(plant.model, Site("resid_post", 0), torch.zeros_like)
    plant.model(IDS, output_hidden_states=True)  # leaves hooks of transformers' own
    third = plant.shell()
    assert torch.equal(third(IDS).logits, expected)
    assert len(third(IDS, output_hidden_states=True).hidden_states) == 4


def test_a_shell_with_an_attention_that_does_not_exist() -> None:
    with pytest.raises(PlantError, match="attention 'telepathy' is not available"):
        Plant(tiny("llama", layers=1)).shell("telepathy")


USER = {"role": "user", "content": "the cat"}
ASSISTANT = {"role": "assistant", "content": "sat"}


def test_chats_end_with_the_assistants_turn_or_with_an_invitation_to_it() -> None:
    plant = Plant(tiny("llama", layers=1), tiny_tokenizer())
    user = [1, 4, 8, 10, 7]
    assert plant.encode([USER]) == [*user, 5]
    assert plant.encode([{**USER, "role": "system"}]) == [1, 6, 8, 10, 7, 5]
    assert plant.encode([USER, ASSISTANT]) == [*user, 5, 13, 7]
    assert plant.encode([USER, ASSISTANT], answer=True) == [*user, 5, 13, 7, 5]
    assert plant.encode([USER, ASSISTANT], open_end=True) == [*user, 5, 13]
    assert plant.encode("the cat sat") == [1, 8, 10, 13]


def test_prompts_that_cannot_be_encoded() -> None:
    plant = Plant(tiny("llama", layers=1), tiny_tokenizer())
    plant.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(PlantError, match="chat template refuses these messages: roles must alternate"):
        plant.encode([USER])
    with pytest.raises(PlantError, match="expected at least one message"):
        plant.encode([])
    with pytest.raises(PlantError, match="refuses these messages: 'role'"):
        plant.encode([{"content": "the cat"}])
    with pytest.raises(PlantError, match="has no chat template: send a text prompt"):
        Plant(tiny("llama", layers=1), tiny_tokenizer(chat=False), name="m").encode([USER])
    with pytest.raises(PlantError, match="without a tokenizer"):
        Plant(tiny("llama", layers=1)).encode("the cat")
    plant.tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(PlantError, match="empty after tokenisation"):
        plant.encode("")


def test_a_long_prompt_is_encoded_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    """Who runs it refuses it, with both lengths; a library's warning of indexing errors would only alarm."""
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 4
    plant = Plant(tiny("llama"), tokenizer)
    logger = logging.getLogger("transformers.tokenization_utils_base")
    logger.addHandler(caplog.handler)
    try:
        assert len(plant.encode("the cat and the dog and the bird")) > 4
        assert len(plant.encode([{"role": "user", "content": "the cat and the dog"}])) > 4
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records
