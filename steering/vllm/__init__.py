"""Setpoint inside vLLM: unforked vLLM steers by our programs, and hands back what its kernels measured.

    plugin      what is put into each of vLLM's processes (entry point `vllm.general_plugins`)
    worker      where in vLLM's two runners a step begins and ends · controller  what is done in it · sites  where
    traced      the hooks of compiled models · outbox  what was measured and nobody took yet
    salt        which blocks of the prefix cache may be shared
    attachment  what a request carries to the workers · account  what comes back of it, and the front's books
    engine      vLLM as an engine of ours: it has `steering.runtime.engine`'s interface

`vllm serve` alone, with steering in `vllm_xargs`: `server.vllm_front`. Nothing here is imported unless vLLM is used: it
is an extra (`pip install 'setpoint[vllm]'`).
"""
