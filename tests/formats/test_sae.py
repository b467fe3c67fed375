"""Published autoencoders become the function that their files describe; what is none of ours is refused by name."""

from __future__ import annotations

import io
import json
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from steering.errors import ArtifactCorrupt, SpecError
from steering.formats.sae import ARCHIVE, CONFIG, WEIGHTS, import_sae, is_autoencoder, parse_site
from steering.plan import SaePlan
from steering.plant.capture import capture
from steering.plant.plant import Plant
from steering.types import Site
from tests.plants import WIDTH, tiny, tiny_tokenizer
from tests.tolerances import CORE

FEATURES = 40
TEXTS = ["the cat sat on the mat", "a dog ran under the red tree", "I love the blue sea and the sky"]


@pytest.fixture(scope="module")
def plant() -> Plant:
    return Plant(tiny("llama"), tiny_tokenizer())


def tensors(jumps: bool, seed: int = 0) -> dict[str, Tensor]:
    """Decoder rows of any length."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    found = {
        "W_enc": noise(WIDTH, FEATURES),
        "b_enc": noise(FEATURES),
        "W_dec": 3 * noise(FEATURES, WIDTH),
        "b_dec": noise(WIDTH),
    }
    return found | ({"threshold": 2 * noise(FEATURES).abs()} if jumps else {})


def config(**changes: Any) -> dict[str, Any]:
    known: dict[str, Any] = {
        "architecture": "standard",
        "d_in": WIDTH,
        "d_sae": FEATURES,
        "hook_name": "blocks.1.hook_resid_post",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "activation_fn_str": "relu",
        "finetuning_scaling_factor": False,
        "model_from_pretrained_kwargs": {"center_writing_weights": False},
    }
    return {name: value for name, value in {**known, **changes}.items() if value != "absent"}


def saelens(folder: Path, found: dict[str, Tensor] | None = None, **changes: Any) -> dict[str, Tensor]:
    settings = config(**changes)
    found = tensors(settings.get("architecture") == "jumprelu") if found is None else found
    folder.mkdir(exist_ok=True, parents=True)
    (folder / CONFIG).write_text(json.dumps(settings))
    save_file(found, folder / WEIGHTS)
    return found


def scope(folder: Path, found: dict[str, Any] | None = None) -> dict[str, Any]:
    found = tensors(True) if found is None else found
    folder.mkdir(exist_ok=True, parents=True)
    np.savez(folder / ARCHIVE, **{name: np.asarray(tensor) for name, tensor in found.items()})
    return found


def published(found: dict[str, Tensor], x: Tensor, *, centred: bool = False) -> tuple[Tensor, Tensor]:
    """Activations and reconstruction as the file's own library computes them."""
    p = (x - found["b_dec"] if centred else x) @ found["W_enc"] + found["b_enc"]
    z = torch.relu(p) * (p > found["threshold"]) if "threshold" in found else torch.relu(p)
    return z, z @ found["W_dec"] + found["b_dec"]


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
@pytest.mark.parametrize("centred", [False, True])
def test_a_saelens_folder_becomes_its_function(plant: Plant, tmp_path: Path, architecture: str, centred: bool) -> None:
    found = saelens(tmp_path / "sae", architecture=architecture, apply_b_dec_to_input=centred)
    plan = import_sae(tmp_path / "sae", "d", plant)
    assert (plan.tap, plan.layers, plan.measured, plan.model) == ("resid_post", (1,), "nothing", plant.fingerprint)
    assert SaePlan.from_artifact(plan.artifact()).features == FEATURES
    x = 2 * torch.randn(60, WIDTH)
    z, rebuilt = published(found, x, centred=centred)
    ae, length = plan.autoencoder(0), found["W_dec"].norm(dim=-1)
    torch.testing.assert_close(ae.encode(x), z * length, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(ae.decode(ae.encode(x)), rebuilt, rtol=1e-4, atol=2e-3)
    torch.testing.assert_close(ae.writes(torch.arange(FEATURES)) * length[:, None], found["W_dec"], **CORE["float32"])


def test_newer_and_older_configurations(plant: Plant, tmp_path: Path) -> None:
    inside = {"hook_name": "blocks.2.hook_resid_pre", "model_from_pretrained_kwargs": None}
    saelens(tmp_path / "new", hook_name="absent", metadata=inside, activation_fn_str="absent")
    assert import_sae(tmp_path / "new", "d", plant).layers == (2,)
    found = saelens(
        tmp_path / "old",
        hook_name="absent",
        hook_point="blocks.0.hook_resid_pre",
        architecture="absent",
        apply_b_dec_to_input="absent",
        normalize_activations=False,
    )
    plan = import_sae(tmp_path / "old", "d", plant)
    assert (plan.tap, plan.layers) == ("resid_pre", (0,))
    x = torch.randn(20, WIDTH)
    length = found["W_dec"].norm(dim=-1)
    torch.testing.assert_close(
        plan.autoencoder(0).encode(x), published(found, x, centred=True)[0] * length, rtol=1e-4, atol=1e-3
    )


def test_a_model_whose_writing_weights_were_centred_is_read_the_same_from_the_plain_one(
    plant: Plant, tmp_path: Path
) -> None:
    found = saelens(tmp_path / "sae", model_from_pretrained_kwargs={"center_writing_weights": True})
    x = torch.randn(30, WIDTH) + 5
    z, _ = published(found, x - x.mean(-1, keepdim=True))
    ae = import_sae(tmp_path / "sae", "d", plant).autoencoder(0)
    torch.testing.assert_close(ae.encode(x), z * found["W_dec"].norm(dim=-1), rtol=1e-3, atol=1e-2)


def test_a_gemma_scope_folder_becomes_its_function(plant: Plant, tmp_path: Path) -> None:
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_2" / "width_16k" / "average_l0_71"
    found = scope(folder)
    plan = import_sae(folder, "d", plant)
    assert (plan.tap, plan.layers) == ("resid_post", (2,))
    x = 2 * torch.randn(60, WIDTH)
    z, rebuilt = published(found, x)
    assert 0 < int((z > 0).sum()) < int((x @ found["W_enc"] + found["b_enc"] > 0).sum())
    torch.testing.assert_close(plan.autoencoder(0).decode(plan.autoencoder(0).encode(x)), rebuilt, rtol=1e-4, atol=2e-3)


def test_the_site_may_be_told(plant: Plant, tmp_path: Path) -> None:
    scope(tmp_path / "sae")
    with pytest.raises(SpecError, match=r"a site such as resid_post\.20") as caught:
        import_sae(tmp_path / "sae", "d", plant)
    assert caught.value.param == "site"
    assert import_sae(tmp_path / "sae", "d", plant, site="resid_pre.1").layers == (1,)
    for site in ("resid_mid.1", "resid_post", "1", "resid_post.-1"):
        with pytest.raises(SpecError) as caught:
            parse_site(site)
        assert caught.value.param == "site"
    with pytest.raises(SpecError, match=r"layers in 0\.\.2, got 3"):
        import_sae(tmp_path / "sae", "d", plant, site="resid_post.3")
    scope(tmp_path / "gemma-scope-2b-pt-mlp" / "layer_1")
    with pytest.raises(SpecError, match="residual stream"):
        import_sae(tmp_path / "gemma-scope-2b-pt-mlp" / "layer_1", "d", plant)


def test_activations_are_measured_on_texts(plant: Plant, tmp_path: Path) -> None:
    saelens(tmp_path / "sae")
    plan = import_sae(tmp_path / "sae", "d", plant, texts=TEXTS)
    site = Site("resid_post", 1)
    x = torch.cat(capture(plant, [plant.encode(text) for text in TEXTS], [site], "all", skip=1)[site])
    z = plan.autoencoder(0).encode(x)
    torch.testing.assert_close(plan.peak[0], z.amax(0), **CORE["float32"])
    torch.testing.assert_close(plan.rate[0], (z > 0).float().mean(0), **CORE["float32"])
    assert plan.measured == "texts"
    assert "another model's" in plan.quality["warning"], "random weights rebuild nothing"
    with pytest.raises(SpecError) as caught:
        import_sae(tmp_path / "sae", "d", plant, texts=[])
    assert caught.value.param == "texts"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "gated"}, "architecture is standard or jumprelu, got 'gated'"),
        ({"architecture": "topk"}, "'topk'"),
        ({"architecture": "batchtopk"}, "'batchtopk'"),
        ({"activation_fn_str": "tanh-relu"}, "activation_fn is relu, got 'tanh-relu'"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations is none"),
        ({"normalize_activations": "constant_norm_rescale"}, "normalize_activations is none"),
        ({"normalize_activations": "expected_average_only_in"}, "fold the factor into the weights"),
        ({"normalize_activations": True}, "fold the factor into the weights"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor"),
        ({"hook_head_index": 3}, "hook_head_index"),
        ({"reshape_activations": "hook_z"}, "reshape_activations"),
        ({"hook_name": "blocks.1.hook_mlp_out"}, "hook blocks.N.hook_resid_pre"),
        ({"hook_name": "blocks.1.hook_resid_mid"}, "hook blocks.N.hook_resid_pre"),
        ({"hook_name": 7}, "hook blocks.N.hook_resid_pre"),
        ({"hook_name": "blocks.3.hook_resid_pre"}, "layers in 0..2"),
        ({"model_from_pretrained_kwargs": 3}, "SAELens's configuration"),
    ],
)
def test_what_is_no_such_autoencoder_is_refused(
    plant: Plant, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    saelens(tmp_path / "sae", tensors(False), **changes)
    with pytest.raises(SpecError) as caught:
        import_sae(tmp_path / "sae", "d", plant)
    assert said in str(caught.value)


def test_another_width_is_refused(plant: Plant, tmp_path: Path) -> None:
    saelens(tmp_path / "sae")
    with pytest.raises(SpecError, match="of width 16, the model's, got 32"):
        import_sae(tmp_path / "sae", "d", Plant(tiny("llama", width=16), tiny_tokenizer()))


def test_one_that_no_file_may_hold_is_refused(plant: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saelens(tmp_path / "sae")
    monkeypatch.setattr("steering.formats.sae.MAX_BYTES", 8 * (FEATURES - 1) * (WIDTH + 4))
    with pytest.raises(SpecError, match=f"at most {FEATURES - 1} features at width {WIDTH}"):
        import_sae(tmp_path / "sae", "d", plant)


def test_folders_of_something_else_are_refused(plant: Plant, tmp_path: Path) -> None:
    assert not is_autoencoder(tmp_path)
    with pytest.raises(SpecError, match=r"cfg\.json and sae_weights") as caught:
        import_sae(tmp_path, "d", plant)
    assert caught.value.param == "folder"
    (tmp_path / "sae.pt").write_bytes(b"\x80\x04")
    with pytest.raises(SpecError, match=r"\.pt files, which are pickles"):
        import_sae(tmp_path, "d", plant)
    (tmp_path / CONFIG).write_text("[")
    assert is_autoencoder(tmp_path)
    save_file(tensors(False), tmp_path / WEIGHTS)
    for text in ("[", "[]", '"x"', "9" * 2**21):
        (tmp_path / CONFIG).write_text(text)
        with pytest.raises(SpecError, match="SAELens's configuration"):
            import_sae(tmp_path, "d", plant)


DAMAGES: list[tuple[dict[str, Any], str]] = [
    ({"b_enc": None}, "no tensor 'b_enc'"),
    ({"threshold": None}, "'threshold'"),
    ({"b_enc": torch.zeros(3)}, "shapes disagree"),
    ({"W_dec": torch.zeros(WIDTH, FEATURES)}, "shapes disagree"),
    ({"W_enc": torch.zeros(3)}, "shapes disagree"),
    ({"threshold": torch.zeros(FEATURES, 1)}, "shapes disagree"),
    ({"b_dec": torch.full((WIDTH,), float("nan"))}, "no finite number"),
    ({"W_enc": torch.zeros(WIDTH, 0), "b_enc": torch.zeros(0), "W_dec": torch.zeros(0, WIDTH)}, "shapes disagree"),
]


@pytest.mark.parametrize(("change", "said"), DAMAGES)
def test_damaged_files_are_refused(plant: Plant, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    found = {name: tensor for name, tensor in (tensors(True) | change).items() if tensor is not None}
    saelens(tmp_path / "sae", found, architecture="jumprelu")
    scope(tmp_path / "layer_1", found)
    for folder in ("sae", "layer_1"):
        with pytest.raises(ArtifactCorrupt, match=said) as caught:
            import_sae(tmp_path / folder, "d", plant)
        assert caught.value.param == "folder"


def test_archives_that_could_run_code_or_lie_about_their_size_are_refused(plant: Plant, tmp_path: Path) -> None:
    folder = tmp_path / "layer_1"

    class Bomb:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("unpickled",))

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**7)})
    scope(folder)
    whole = (folder / ARCHIVE).read_bytes()
    bombs = [b"", b"PK\x03\x04", whole[:200], pickle.dumps(Bomb())]
    for content in (header.getvalue(), pickle.dumps(Bomb()), b"\x93NUMPY\x09\x00"):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("W_enc.npy", content)
        bombs.append(file.getvalue())
    objects = io.BytesIO()
    np.savez(objects, W_enc=np.array([Bomb()], dtype=object))
    whole_numbers = io.BytesIO()
    np.savez(whole_numbers, W_enc=np.zeros((WIDTH, FEATURES), dtype=np.int32))
    for content in (*bombs, objects.getvalue(), whole_numbers.getvalue()):
        (folder / ARCHIVE).write_bytes(content)
        with pytest.raises(ArtifactCorrupt):
            import_sae(folder, "d", plant)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': (",
        "(" * 9000,
        "-" * 9000 + "1",
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': (0, {10**25})}}",
    ],
    ids=["cut", "nested", "deep", "wide"],
)
def test_headers_that_no_parser_survives_are_refused(plant: Plant, tmp_path: Path, header: str) -> None:
    scope(tmp_path / "layer_1")
    with zipfile.ZipFile(tmp_path / "layer_1" / ARCHIVE, "w") as archive:
        archive.writestr("W_enc.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())
    with pytest.raises(ArtifactCorrupt):
        import_sae(tmp_path / "layer_1", "d", plant)


def test_archives_with_flipped_bytes_are_refused_or_taken(plant: Plant, tmp_path: Path) -> None:
    """Compressed, as numpy writes them: a damaged stream makes zlib give up in many ways."""
    folder = tmp_path / "layer_1"
    folder.mkdir()
    whole = io.BytesIO()
    np.savez_compressed(whole, **{name: np.asarray(tensor) for name, tensor in tensors(True).items()})
    refused = 0
    for seed in range(120):
        draw = random.Random(seed)
        damaged = bytearray(whole.getvalue())
        for _ in range(draw.randint(1, 20)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        (folder / ARCHIVE).write_bytes(bytes(damaged))
        try:
            import_sae(folder, "d", plant)
        except ArtifactCorrupt:
            refused += 1
    assert refused > 60


def test_an_archive_that_unpacks_to_too_much_is_refused(
    plant: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scope(tmp_path / "layer_1")
    saelens(tmp_path / "sae")
    size = 4 * 2 * FEATURES * (WIDTH + 1)
    monkeypatch.setattr("steering.formats.sae.MAX_BYTES", size // 2 - 64)
    for folder in ("layer_1", "sae"):
        with pytest.raises(ArtifactCorrupt, match="too large"):
            import_sae(tmp_path / folder, "d", plant)


def test_numbers_of_eight_bits_are_read(plant: Plant, tmp_path: Path) -> None:
    """torch has no isfinite for them."""
    found = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors(False).items()}
    saelens(tmp_path / "sae", found)
    plan = import_sae(tmp_path / "sae", "d", plant)
    torch.testing.assert_close(plan.encoder_bias[0], found["b_enc"].float() * found["W_dec"].float().norm(dim=-1))


def test_texts_are_measured_in_bounded_memory(plant: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saelens(tmp_path / "sae")
    first = import_sae(tmp_path / "sae", "d", plant, texts=TEXTS[:1])
    monkeypatch.setattr("steering.formats.sae.MEASURED", 8)
    assert torch.equal(import_sae(tmp_path / "sae", "d", plant, texts=TEXTS).peak, first.peak)


def test_a_file_that_is_no_safetensors_is_refused(plant: Plant, tmp_path: Path) -> None:
    saelens(tmp_path / "sae")
    for content in (b"", b"\xff" * 64, b"\x80\x04}q\x00."):
        (tmp_path / "sae" / WEIGHTS).write_bytes(content)
        with pytest.raises(ArtifactCorrupt):
            import_sae(tmp_path / "sae", "d", plant)
