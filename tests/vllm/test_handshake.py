"""Nothing is steered before every worker has given the right answer; needs no vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest

from steering import EngineSettings, PlantError, SpecError, SteeringError, VllmEngine, VllmSettings
from steering.vllm.attachment import PROTOCOL
from steering.vllm.handshake import HELLO, Handshake
from steering.vllm.worker import refusal
from tests.vllm.common import plant, program

GOOD: dict[str, Any] = {
    "protocol": PROTOCOL, "refused": "", "runner": "a.Runner", "rank": 0, "tensor_parallel_size": 1,
    "backend": "native", "depth": 8, "width": 192, "taps": ["resid_pre", "resid_post", "final"], "compiled": False,
}  # fmt: skip


def shaken(*answers: Any) -> Handshake:
    def call(method: str) -> Sequence[Any]:
        assert method == HELLO
        return answers

    return Handshake.shake(call, 192, 8)


def test_workers_that_agree_are_taken_at_their_word() -> None:
    two = [{**GOOD, "rank": rank, "tensor_parallel_size": 2} for rank in (0, 1)]
    found = shaken(*two)
    assert (found.ranks, found.is_native, found.taps) == (2, True, {"resid_pre", "resid_post", "final"})


@pytest.mark.parametrize(
    ("answers", "part"),
    [
        ([], "no answer"),
        ([None], "no answer"),
        ([{**GOOD, "protocol": PROTOCOL + 1}], "one version"),
        ([{**GOOD, "refused": "Setpoint does not steer with LoRA."}], "LoRA"),
        ([{**GOOD, "tensor_parallel_size": 2}], "1 workers answered, expected 2"),
        ([GOOD | {"tensor_parallel_size": 2}, GOOD | {"tensor_parallel_size": 2, "taps": ["final"]}], "differ"),
        ([GOOD | {"tensor_parallel_size": 2}, GOOD | {"tensor_parallel_size": 2, "refused": "late"}], "late"),
        ([{**GOOD, "depth": 7}], "7 blocks, expected 192 and 8"),
    ],
    ids=str,
)
def test_whoever_is_not_right_is_refused_in_a_sentence(answers: list[Any], part: str) -> None:
    with pytest.raises(SteeringError, match=part):
        shaken(*answers)


def test_workers_without_the_plugin_are_told_what_to_install() -> None:
    def call(method: str) -> Sequence[Any]:
        raise NotImplementedError(method)

    with pytest.raises(SteeringError, match="install setpoint in their environment"):
        Handshake.shake(call, 192, 8)


def test_a_site_that_is_not_there_is_refused_with_the_remedy() -> None:
    shaken(GOOD).check(program())
    heads = program("heads", plan="tone-heads", heads=2, mode="zero")
    with pytest.raises(PlantError, match=r"attn_act\.\d, .*--model-impl transformers") as raised:
        shaken(GOOD).check(heads)
    assert raised.value.param == "steering"
    with pytest.raises(PlantError, match="SETPOINT_TAPS"):
        shaken({**GOOD, "backend": "transformers", "compiled": True}).check(heads)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model_impl": "jax"}, "model_impl"),
        ({"tensor_parallel": 0}, "tensor_parallel"),
        ({"quantization": "int8-outliers"}, "quantization"),
        ({"max_batch": 0}, "max_batch"),
        ({"compile": 1}, "compile"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError) as raised:
        VllmSettings(**fields)
    assert raised.value.param == param
    assert isinstance(VllmSettings(), EngineSettings)


@pytest.mark.parametrize(
    ("part", "field", "value", "told"),
    [
        ("", "speculative_config", object(), "speculative decoding"),
        ("", "lora_config", object(), "LoRA"),
        ("", "kv_transfer_config", object(), "transfer"),
        ("parallel_config", "pipeline_parallel_size", 2, "pipeline"),
        ("parallel_config", "data_parallel_size", 2, "data parallelism"),
        ("parallel_config", "_api_process_count", 2, "several API servers"),
        ("model_config", "is_multimodal_model", True, "other than text"),
        ("model_config", "runner_type", "pooling", "does not generate"),
        ("compilation_config", "cudagraph_mode", SimpleNamespace(has_full_cudagraphs=lambda: True), "whole steps"),
    ],
    ids=str,
)
def test_a_worker_refuses_what_steering_would_be_wrong_under(part: str, field: str, value: object, told: str) -> None:
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, data_parallel_size=1, _api_process_count=1),
        model_config=SimpleNamespace(is_encoder_decoder=False, is_multimodal_model=False, runner_type="generate"),
        compilation_config=SimpleNamespace(cudagraph_mode=None),
        speculative_config=None,
        lora_config=None,
        kv_transfer_config=None,
    )
    assert refusal(config) == ""
    setattr(getattr(config, part) if part else config, field, value)
    assert told in refusal(config)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_one_is_told_what_to_install() -> None:
    for make in (VllmEngine.require, lambda: VllmEngine(plant())):
        with pytest.raises(SpecError, match=r"pip install 'setpoint\[vllm\]'"):
            make()
