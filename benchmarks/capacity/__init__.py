"""Capacity on paper: closed forms and discrete-event simulations, fitted to what `benchmarks/results` holds.

    python -m benchmarks.capacity            all of it from the results; no model is loaded
    python -m benchmarks.capacity.costs      measures on this machine what the store and a stream's piece cost

See docs/scale.md. Needs SimPy (`pip install setpoint[dev]`).
"""
