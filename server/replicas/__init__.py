"""Copies of the model behind one address: a gateway in front of Ray Serve. Needs `pip install setpoint[ray]`."""
