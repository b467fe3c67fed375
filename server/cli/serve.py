"""`setpoint serve`."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer

from server.cli.common import Device, Dtype, Quantization, StoreFolder, cleanly, quietly


@cleanly
def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            envvar="SETPOINT_MODEL", help="Folder or hub id of a model; the embedded demo model without it."
        ),
    ] = None,
    host: Annotated[str, typer.Option(envvar="SETPOINT_HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="SETPOINT_PORT", help="Port; 0 takes a free one.")] = 8000,
    engine: Annotated[
        str, typer.Option(envvar="SETPOINT_ENGINE", help="native, or vllm (pip install 'setpoint[vllm]').")
    ] = "native",
    model_impl: Annotated[
        str,
        typer.Option(
            envvar="SETPOINT_MODEL_IMPL", help="vLLM engine: auto, vllm or transformers, which has every site."
        ),
    ] = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    served_model_name: Annotated[
        str | None, typer.Option(envvar="SETPOINT_SERVED_MODEL_NAME", help="Id of the model in requests.")
    ] = None,
    max_batch: Annotated[int, typer.Option(envvar="SETPOINT_MAX_BATCH", help="Requests that run at once.")] = 32,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            envvar="SETPOINT_MAX_MODEL_LEN",
            help="Longest prompt and answer in tokens.",
            show_default="the model's context",
        ),
    ] = None,
    kv_tokens: Annotated[
        int | None,
        typer.Option(
            envvar="SETPOINT_KV_TOKENS",
            help="Tokens whose keys and values are kept, of running requests and remembered prompts.",
            show_default="what max-batch requests need, up to half of the free memory",
        ),
    ] = None,
    prefix_cache: Annotated[
        bool,
        typer.Option(
            "--prefix-cache/--no-prefix-cache",
            envvar="SETPOINT_PREFIX_CACHE",
            help="Share keys and values of prompts that begin alike.",
        ),
    ] = True,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            envvar="SETPOINT_COMPILE",
            help="Compile feed-forward modules at the start. Needs g++; pays for large models only.",
        ),
    ] = False,
    queue_limit: Annotated[
        int, typer.Option(envvar="SETPOINT_QUEUE_LIMIT", help="Requests that may wait; more get a 429.")
    ] = 256,
    api_key: Annotated[
        str | None, typer.Option(envvar="SETPOINT_API_KEY", help="Require this bearer token.", show_envvar=True)
    ] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(
            envvar="SETPOINT_ADMIN_KEY", help="Require this bearer token of calls that write.", show_envvar=True
        ),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", envvar="SETPOINT_INSECURE", help="Allow a public host without an API key.")
    ] = False,
    store: StoreFolder = None,
    drain_seconds: Annotated[
        float, typer.Option(envvar="SETPOINT_DRAIN_SECONDS", help="Time for running requests after SIGTERM.")
    ] = 30.0,
    body_limit: Annotated[int, typer.Option(envvar="SETPOINT_BODY_LIMIT", help="Largest request body in bytes.")] = 2
    ** 20,
    body_seconds: Annotated[
        float, typer.Option(envvar="SETPOINT_BODY_SECONDS", help="Longest pause within a request's body.")
    ] = 30.0,
    upload_limit: Annotated[
        int, typer.Option(envvar="SETPOINT_UPLOAD_LIMIT", help="Largest uploaded artifact in bytes.")
    ] = 2**28,
    replicas: Annotated[
        int, typer.Option(envvar="SETPOINT_REPLICAS", help="Copies of the model, on Ray Serve where there are several.")
    ] = 1,
    max_replicas: Annotated[
        int | None,
        typer.Option(
            envvar="SETPOINT_MAX_REPLICAS",
            help="Copies that may be started when those are busy.",
            show_default="as many as replicas",
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            envvar="SETPOINT_RAY_ADDRESS",
            help="Ray cluster for the copies, HOST:PORT or auto.",
            show_default="processes of this machine",
        ),
    ] = None,
    tensor_parallel: Annotated[
        int, typer.Option(envvar="SETPOINT_TENSOR_PARALLEL", help="Devices that share the model.")
    ] = 1,
    quantization: Quantization = "none",
) -> None:
    """Serve a model over HTTP. Prints `ready http://…` when the first request can be served."""
    quietly(model)
    from server.listen import listen
    from server.settings import ServerSettings

    settings = ServerSettings(
        model=model,
        served_model_name=served_model_name,
        host=host,
        port=port,
        engine=cast(Any, engine),  # checked there
        model_impl=cast(Any, model_impl),
        device=device,
        dtype=dtype,
        max_batch=max_batch,
        max_model_len=max_model_len,
        kv_tokens=kv_tokens,
        prefix_cache=prefix_cache,
        compile=compiled,
        queue_limit=queue_limit,
        api_key=api_key,
        admin_key=admin_key,
        insecure=insecure,
        store=store,
        drain_seconds=drain_seconds,
        body_limit=body_limit,
        body_seconds=body_seconds,
        upload_limit=upload_limit,
        replicas=replicas,
        max_replicas=max_replicas,
        ray_address=ray_address,
        tensor_parallel=tensor_parallel,
        quantization=quantization,
    )
    settings.require_ray()  # before anything that takes long to import
    with listen(settings) as listener:
        from server.serve import serve as run

        run(settings, listener)
